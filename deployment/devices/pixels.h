/* From the pixels of an image to the numbers that a network reads. */

#ifndef PIXELS_H
#define PIXELS_H

#include <stdint.h>

/* Resize like Pillow's Image.resize(size, BILINEAR): a triangle as wide as a pixel of the result, or of the image where
   that is larger, first along rows, then along columns, in 22-bit fixed point. `from` has `step` bytes a pixel (3 or 4),
   of which the first 3 are RGB; `to` gets 3. Returns 0 where there is no memory or a size is not from 1 to 65535. */
int resize(const uint8_t *from, int step, int width, int height, uint8_t *to, int to_width, int to_height);

/* (pixels, 3) bytes -> (3, pixels) floats: (byte / 255 - mean) / std */
void normalize(const uint8_t *rgb, int pixels, const float *mean, const float *std, float *to);

/* Put pixels in front of white, or black; `rgba` has 4 bytes a pixel, and becomes opaque. */
void make_opaque(uint8_t *rgba, int pixels, int black);

void softmax(const float *logits, int count, float *probabilities);

#endif
