/* Image files in memory, PNG and JPEG. */

#ifndef PHOTO_H
#define PHOTO_H

#include <stddef.h>
#include <stdint.h>

/* RGBA, in front of white or black, upright, to be freed; NULL, and *why in a few words, for what is not a whole PNG or
   JPEG image. */
uint8_t *decode_photo(const uint8_t *bytes, size_t size, int black, int *width, int *height, const char **why);

#endif
