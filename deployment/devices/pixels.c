#include "pixels.h"

#include <math.h>
#include <stdlib.h>

#define FRACTION 22 /* bits of a weight after the point */
#define LARGEST 65535

/* The pixels of the image that one pixel of the result is the weighted mean of. */
typedef struct { int first, count, weight; } Span;

/* The spans of `to` pixels out of `from`, and their weights. NULL if there is no memory. */
static Span *plan(int from, int to, int32_t **weights) {
    double scale = (double)from / to, wide = scale < 1 ? 1 : scale;
    int most = 2 * (int)ceil(wide) + 1;
    Span *spans = malloc((size_t)to * sizeof(Span));
    double *exact = malloc((size_t)most * sizeof(double));
    *weights = malloc((size_t)to * (size_t)most * sizeof(int32_t));
    if (!spans || !exact || !*weights) {
        free(spans), free(exact), free(*weights);
        return NULL;
    }
    for (int i = 0; i < to; i++) {
        double center = (i + 0.5) * scale, sum = 0;
        int first = (int)(center - wide + 0.5), end = (int)(center + wide + 0.5);
        if (center - wide + 0.5 < 0) first = 0;
        if (end > from) end = from;
        for (int k = 0; k < end - first; k++) {
            double distance = fabs(first + k - center + 0.5) / wide;
            sum += exact[k] = distance < 1 ? 1 - distance : 0;
        }
        spans[i] = (Span){first, end - first, i * most};
        for (int k = 0; k < end - first; k++)
            (*weights)[i * most + k] = (int32_t)(exact[k] / sum * (1 << FRACTION) + 0.5);
    }
    free(exact);
    return spans;
}

static uint8_t mean(const uint8_t *from, size_t step, const int32_t *weights, int count) {
    int32_t sum = 1 << (FRACTION - 1);
    for (int k = 0; k < count; k++) sum += weights[k] * from[k * step];
    sum >>= FRACTION;
    return (uint8_t)(sum > 255 ? 255 : sum);
}

int resize(const uint8_t *from, int step, int width, int height, uint8_t *to, int to_width, int to_height) {
    if (width < 1 || height < 1 || to_width < 1 || to_height < 1 || width > LARGEST || height > LARGEST
        || to_width > LARGEST || to_height > LARGEST)
        return 0;
    int32_t *across_weights = NULL, *down_weights = NULL;
    Span *across = plan(width, to_width, &across_weights), *down = plan(height, to_height, &down_weights);
    size_t line = (size_t)to_width * 3;
    uint8_t *narrow = malloc((size_t)height * line); /* rounded to bytes, as Pillow does */
    int done = across && down && narrow;
    for (int y = 0; y < height && done; y++)
        for (int x = 0; x < to_width; x++)
            for (int c = 0; c < 3; c++) {
                const uint8_t *row = from + (size_t)y * (size_t)width * (size_t)step + c;
                narrow[y * line + (size_t)x * 3 + c] = mean(row + (size_t)across[x].first * (size_t)step, (size_t)step,
                                                            across_weights + across[x].weight, across[x].count);
            }
    for (int y = 0; y < to_height && done; y++)
        for (size_t i = 0; i < line; i++)
            to[y * line + i] = mean(narrow + down[y].first * line + i, line, down_weights + down[y].weight, down[y].count);
    if (across) free(across_weights);
    if (down) free(down_weights);
    free(across), free(down), free(narrow);
    return done;
}

void normalize(const uint8_t *rgb, int pixels, const float *mean, const float *std, float *to) {
    for (int i = 0; i < pixels; i++)
        for (int c = 0; c < 3; c++) to[(size_t)c * (size_t)pixels + i] = (rgb[3 * i + c] / 255.0f - mean[c]) / std[c];
}

void make_opaque(uint8_t *rgba, int pixels, int black) {
    int behind = black ? 0 : 255;
    for (uint8_t *p = rgba, *end = rgba + 4 * (size_t)pixels; p < end; p += 4) {
        for (int c = 0; c < 3; c++) p[c] = (uint8_t)((p[c] * p[3] + behind * (255 - p[3]) + 127) / 255);
        p[3] = 255;
    }
}

void softmax(const float *logits, int count, float *probabilities) {
    float largest = logits[0], sum = 0;
    for (int i = 1; i < count; i++)
        if (logits[i] > largest) largest = logits[i];
    for (int i = 0; i < count; i++) sum += probabilities[i] = expf(logits[i] - largest);
    for (int i = 0; i < count; i++) probabilities[i] /= sum;
}
