#include "photo.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "pixels.h"

#define STBI_ONLY_JPEG
#define STBI_ONLY_PNG
#define STBI_NO_STDIO
#define STBI_MAX_DIMENSIONS 65535
#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Weverything"
#include "stb_image.h"
#pragma clang diagnostic pop

#define MOST_PIXELS 200000000

static unsigned number(const uint8_t *p, int bytes, int big) {
    unsigned value = 0;
    for (int i = 0; i < bytes; i++) value |= (unsigned)p[i] << 8 * (big ? bytes - 1 - i : i);
    return value;
}

/* The Exif orientation of a JPEG file, 1 to 8; 1 is upright, and the answer where nothing says otherwise. */
static int orientation(const uint8_t *bytes, size_t size) {
    size_t at = 2;
    if (size < 4 || bytes[0] != 0xff || bytes[1] != 0xd8) return 1;
    for (; at + 4 <= size && bytes[at] == 0xff && bytes[at + 1] != 0xda; at += 2 + number(bytes + at + 2, 2, 1)) {
        size_t length = number(bytes + at + 2, 2, 1);
        const uint8_t *exif = bytes + at + 10; /* a TIFF header; offsets count from here */
        if (at + 2 + length > size) return 1;
        if (bytes[at + 1] != 0xe1 || length < 22 || memcmp(bytes + at + 4, "Exif\0", 6)) continue;
        int big = exif[0] == 'M';
        size_t room = length - 8, entry = number(exif + 4, 4, big);
        if (entry > room - 2) return 1;
        unsigned entries = number(exif + entry, 2, big);
        for (entry += 2; entries-- > 0 && entry + 12 <= room; entry += 12)
            if (number(exif + entry, 2, big) == 0x0112) {
                unsigned value = number(exif + entry + 8, 2, big);
                return value >= 1 && value <= 8 ? (int)value : 1;
            }
        return 1;
    }
    return 1;
}

/* A copy of an image as its orientation wants it shown; NULL if there is no memory. */
static uint8_t *turn(const uint8_t *rgba, int *width, int *height, int orientation) {
    int w = *width, h = *height, swap = orientation >= 5;
    int right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    int below = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    uint8_t *turned = malloc((size_t)w * (size_t)h * 4);
    if (!turned) return NULL;
    *width = swap ? h : w;
    *height = swap ? w : h;
    for (int y = 0; y < *height; y++)
        for (int x = 0; x < *width; x++) {
            int column = swap ? y : x, row = swap ? x : y;
            if (right) column = w - 1 - column;
            if (below) row = h - 1 - row;
            memcpy(turned + ((size_t)y * (size_t)*width + x) * 4, rgba + ((size_t)row * (size_t)w + column) * 4, 4);
        }
    return turned;
}

uint8_t *decode_photo(const uint8_t *bytes, size_t size, int black, int *width, int *height, const char **why) {
    int channels;
    *why = "it is too large";
    if (size > INT_MAX) return NULL;
    if (stbi_info_from_memory(bytes, (int)size, width, height, &channels) && MOST_PIXELS / *width < *height) return NULL;
    uint8_t *found = stbi_load_from_memory(bytes, (int)size, width, height, &channels, 4);
    if (!found) {
        *why = stbi_failure_reason();
        if (!*why || !**why) *why = "it is damaged"; /* some errors have no text */
        if (!strcmp(*why, "unknown image type")) *why = "it is neither PNG nor JPEG";
        return NULL;
    }
    make_opaque(found, *width * *height, black);
    int how = orientation(bytes, size);
    if (how == 1) return found;
    *why = "there is too little memory";
    uint8_t *turned = turn(found, width, height, how);
    free(found);
    return turned;
}
