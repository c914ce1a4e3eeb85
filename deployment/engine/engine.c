/* Inference of a pruned convolutional network. It reads top to bottom: vectors, the model file, the plan for images of
   one size, the kernels, the operations, threads, and the functions of engine.h.

   A vector holds either neighboring pixels of one image ("single"), for the lowest latency, or the same pixel of as
   many images as it has lanes ("grouped"), for the highest throughput. A convolution is computed in one of four ways,
   which the model file names for each layer, layout and number of lanes:

   SPARSE     every nonzero weight is one multiply-add of a broadcast value to a tile of outputs in vector registers
              (Park et al., Faster CNNs with direct sparse convolutions and guided pruning, 2017; Elsen et al., Fast
              sparse convnets, 2020), with the input channels in blocks that fit the L1 cache
   DENSE      all weights; a tile has several filters
   WINOGRAD2, WINOGRAD4
              F(2x2, 3x3) and F(4x4, 3x3) (Lavin and Gray, Fast algorithms for convolutional neural networks, 2016)

   In all of them bias, residual and activation are applied to the outputs before they leave the L1 cache. */

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sched_getcpu */
#endif
#include "engine.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __BIG_ENDIAN__
#error "model files are little-endian"
#endif

#ifndef ENGINE_MAX_FLOATS
#define ENGINE_MAX_FLOATS ((uint64_t)1 << 28) /* of activations */
#endif
#define ENGINE_MAX_WORK 1e13        /* multiply-adds for one image */
#define GROUP_FLOATS (1 << 26)      /* above this many floats of activations, groups of images do not pay */
#define BLOCK_BYTES (32 * 1024)     /* of input that a sparse tile reads from one block of channels */
#define MIN_NONZEROS 16             /* a block and filter; fewer do not pay for loading and storing a tile */
#define AHEAD 2048                  /* bytes of weights that dense tiles fetch early */
#define MAX_PLANS 8                 /* image sizes, twice, for which an engine keeps its plans */

/* ---------------------------------------------------------------------------------------------------- vectors */

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#if LANES == 16 || defined(__aarch64__) /* 32 vector registers */
#define TILE 16   /* vectors in a sparse tile */
#define FILTERS 8 /* in a dense tile of up to 3 vectors; twice as many where a tile has one */
#else
#define TILE 8
#define FILTERS 4
#endif
#define MAX_VECTORS 3

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("clang loop unroll(full)")

INLINE vec load(const void *p) { return *(const vec *)p; }
INLINE void store(void *p, vec x) { *(vec *)p = x; }
INLINE vec splat(float x) { return x - (vec){0}; }
INLINE vec choose(bits mask, vec yes, vec no) { return (vec)((mask & (bits)yes) | (~mask & (bits)no)); }
INLINE vec at_least(vec low, vec x) { return choose((bits)(x < low), low, x); } /* NaN stays NaN */
INLINE vec at_most(vec high, vec x) { return choose((bits)(x > high), high, x); }

static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline size_t round16(size_t n) { return (n + 15) / 16 * 16; } /* floats of whole cache lines */
static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

#if LANES == 16
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

/* Every step-th float; step is 1, 2 or 4. */
INLINE vec load_every(const int step, const float *p) {
    if (step == 1) return load(p);
    if (step == 2) return EVEN(load(p), load(p + LANES));
    return EVEN(EVEN(load(p), load(p + LANES)), EVEN(load(p + 2 * LANES), load(p + 3 * LANES)));
}

/* m vectors, each with every m-th float, to m vectors of neighbors; m is 2 or 4. */
INLINE void interleave(const int m, const vec *v, float *to) {
    if (m == 2) {
        store(to, ZIP_LOW(v[0], v[1]));
        store(to + LANES, ZIP_HIGH(v[0], v[1]));
        return;
    }
    vec even = ZIP_LOW(v[0], v[2]), odd = ZIP_LOW(v[1], v[3]);
    vec even2 = ZIP_HIGH(v[0], v[2]), odd2 = ZIP_HIGH(v[1], v[3]);
    store(to, ZIP_LOW(even, odd));
    store(to + LANES, ZIP_HIGH(even, odd));
    store(to + 2 * LANES, ZIP_LOW(even2, odd2));
    store(to + 3 * LANES, ZIP_HIGH(even2, odd2));
}

enum { NONE, RELU, RELU6, HARDSWISH, SILU, SIGMOID, HARDSIGMOID, ACTIVATIONS };

/* exp(x) to 2 units in the last place: 2^n by its exponent bits, the rest by a polynomial. */
static vec exponential(vec x) {
    x = at_least(splat(-87), at_most(splat(88), x));
    vec magic = splat(12582912), shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * (r * (r * (r * (r * (r * 1.9875691500e-4f + 1.3981999507e-3f) + 8.3334519073e-3f) + 4.1665795894e-2f)
                      + 1.6666665459e-1f) + 0.5f);
    p = p * r + r + 1;
    return p * (vec)(((bits)shifted - 0x4b400000u + 127u) << 23);
}

static vec activated(vec x, int kind) {
    vec zero = splat(0), six = splat(6);
    switch (kind) {
    case RELU: return at_least(zero, x);
    case RELU6: return at_most(six, at_least(zero, x));
    case HARDSIGMOID: return at_most(six, at_least(zero, x + 3)) * (1 / 6.0f);
    case HARDSWISH: return x * at_most(six, at_least(zero, x + 3)) * (1 / 6.0f);
    case SIGMOID: return 1 / (1 + exponential(-x));
    case SILU: return x / (1 + exponential(-x));
    default: return x;
    }
}

/* ------------------------------------------------------------------------------------------------ the model file */

enum { CONVOLVE, AFFINE, ACTIVATE, ADD, MULTIPLY, CONCATENATE, MAX_POOL, AVERAGE_POOL, ADAPTIVE_POOL, PAD_CHANNELS,
       KINDS };
enum { SPARSE, DENSE, WINOGRAD2, WINOGRAD4, ALGORITHMS };
enum { RAW, BITS, GAPS, ENCODINGS };

#define HEADER_BYTES 64
#define VERSION 1
#define MAX_SIDE 16384
#define MAX_CHANNELS 65536
#define MAX_PARAMETER 1024
#define MAX_TAPS 16384

/* Operation i writes value i + 1; value 0 is the images. Pairs are rows, columns. */
typedef struct {
    int kind, activation, inputs;
    const uint32_t *input;
    int kernel[2], stride[2], padding[4] /* top, left, bottom, right */, dilation[2], groups, ceil_mode,
        count_include_pad, size[2], channels[2];
    int filters, depth; /* weights are (filters, depth, kernel rows, kernel columns) */
    uint32_t nonzeros, encoding, position_bytes, algorithm[6]; /* 4, 8, 16 lanes: single; then grouped */
    const float *bias, *values;
    const uint8_t *positions;
} Operation;

typedef struct Plan Plan;
typedef struct Pool Pool;

struct engine {
    int threads, height, width, classes, operations, has_names, background;
    const float *mean, *std;
    const char *names;
    Operation *operation;
    Plan *plans;
    Pool *pool;
    double *profile;
};

static uint32_t crc32(uint32_t crc, const uint8_t *bytes, size_t size) {
    uint32_t table[8][256]; /* of a byte that is followed by k zero bytes */
    for (int i = 0; i < 256; i++) {
        uint32_t c = (uint32_t)i;
        for (int k = 0; k < 8; k++) c = c >> 1 ^ (c & 1 ? 0xedb88320u : 0);
        table[0][i] = c;
    }
    for (int k = 1; k < 8; k++)
        for (int i = 0; i < 256; i++) table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 255];
    crc = ~crc;
    for (; size >= 8; size -= 8, bytes += 8) {
        uint32_t low, high;
        memcpy(&low, bytes, 4);
        memcpy(&high, bytes + 4, 4);
        low ^= crc;
        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24]
            ^ table[3][high & 255] ^ table[2][high >> 8 & 255] ^ table[1][high >> 16 & 255] ^ table[0][high >> 24];
    }
    while (size--) crc = crc >> 8 ^ table[0][(crc ^ *bytes++) & 255];
    return ~crc;
}

typedef struct {
    const uint8_t *at, *end;
    int bad; /* something did not fit; what was read since is of no use */
} Reader;

/* The next `bytes` bytes, and what fills the last word. */
static const void *take(Reader *r, uint64_t bytes) {
    static const uint32_t nothing[4];
    uint64_t padded = (bytes + 3) / 4 * 4;
    if (r->bad || padded > (uint64_t)(r->end - r->at)) {
        r->bad = 1;
        return nothing;
    }
    const void *found = r->at;
    r->at += padded;
    return found;
}

static uint32_t word(Reader *r, uint32_t low, uint32_t high) {
    uint32_t value = *(const uint32_t *)take(r, 4);
    if (value < low || value > high) r->bad = 1;
    return r->bad ? low : value;
}

/* The nonzero weights of a layer in order. */
typedef struct {
    const Operation *op;
    uint32_t at, taken; /* weights looked at; bytes of gaps taken */
    uint64_t word;      /* mask bits that are left of the current 64 */
    uint64_t weights;
} Nonzeros;

static Nonzeros nonzeros_of(const Operation *op) {
    uint64_t weights = (uint64_t)op->filters * op->depth * op->kernel[0] * op->kernel[1];
    return (Nonzeros){op, 0, 0, 0, weights};
}

/* The index of the next nonzero weight, or -1. */
static int64_t next_nonzero(Nonzeros *n) {
    const Operation *op = n->op;
    if (op->encoding == RAW) return n->at < n->weights ? (int64_t)n->at++ : -1;
    if (op->encoding == GAPS) {
        while (n->taken < op->position_bytes) {
            uint8_t gap = op->positions[n->taken++]; /* zeros before the next nonzero; 255: 255 zeros and no nonzero */
            if (n->weights - n->at <= gap) return -1;
            n->at += gap;
            if (gap < 255) return n->at++;
        }
        return -1;
    }
    while (n->word == 0) { /* `at` counts whole words here */
        uint32_t left = op->position_bytes - n->taken;
        if (left == 0) return -1;
        memcpy(&n->word, op->positions + n->taken, left < 8 ? left : 8);
        n->at = n->taken * 8;
        n->taken += left < 8 ? left : 8;
    }
    int64_t index = n->at + (int64_t)__builtin_ctzll(n->word);
    n->word &= n->word - 1;
    return (uint64_t)index < n->weights ? index : -1;
}

static void read_weights(Reader *r, Operation *op) {
    op->filters = word(r, 1, MAX_CHANNELS);
    op->depth = word(r, 1, MAX_CHANNELS);
    op->nonzeros = word(r, 0, INT32_MAX);
    op->encoding = word(r, 0, ENCODINGS - 1);
    op->position_bytes = word(r, 0, INT32_MAX);
    for (int i = 0; i < 6; i++) {
        op->algorithm[i] = word(r, 0, ALGORITHMS - 1);
        int *k = op->kernel, *s = op->stride, *d = op->dilation;
        if (op->algorithm[i] != SPARSE && op->groups > 1) r->bad = 1;
        if (op->algorithm[i] >= WINOGRAD2)
            r->bad |= k[0] != 3 || k[1] != 3 || s[0] != 1 || s[1] != 1 || d[0] != 1 || d[1] != 1;
    }
    op->bias = take(r, 4 * (uint64_t)op->filters);
    op->values = take(r, 4 * (uint64_t)op->nonzeros);
    op->positions = take(r, op->position_bytes);
    Nonzeros n = nonzeros_of(op);
    if (r->bad || n.weights > INT32_MAX || op->kernel[0] * op->kernel[1] > MAX_TAPS || op->filters % op->groups
        || (op->encoding == BITS && op->position_bytes != (n.weights + 7) / 8)
        || (op->encoding == RAW && (n.weights != op->nonzeros || op->position_bytes))) {
        r->bad = 1;
        return;
    }
    uint32_t found = op->nonzeros;
    if (op->encoding != RAW)
        for (found = 0; next_nonzero(&n) >= 0;) found++;
    /* Ways that store all weights are for layers with many nonzeros: no file takes far more memory than its bytes. */
    if (n.weights / 64 > op->nonzeros + 1024)
        for (int i = 0; i < 6; i++) op->algorithm[i] = SPARSE;
    if (found != op->nonzeros || n.taken != op->position_bytes) r->bad = 1;
}

static void read_operation(Reader *r, Operation *op, uint32_t number) {
    op->kind = word(r, 0, KINDS - 1);
    op->activation = word(r, 0, ACTIVATIONS - 1);
    op->inputs = word(r, 1, MAX_CHANNELS);
    op->input = take(r, 4 * (uint64_t)op->inputs);
    int two = op->kind == ADD || op->kind == MULTIPLY;
    if (op->kind != CONCATENATE && (op->inputs > (two || op->kind == CONVOLVE ? 2 : 1) || op->inputs < 1 + two))
        r->bad = 1;
    if (op->kind > MULTIPLY && op->activation) r->bad = 1;
    for (int i = 0; i < op->inputs && !r->bad; i++)
        if (op->input[i] > number) r->bad = 1;
    for (int i = 0; i < 2; i++) op->kernel[i] = word(r, 1, MAX_PARAMETER);
    for (int i = 0; i < 2; i++) op->stride[i] = word(r, 1, MAX_PARAMETER);
    for (int i = 0; i < 4; i++) op->padding[i] = word(r, 0, MAX_PARAMETER);
    for (int i = 0; i < 2; i++) op->dilation[i] = word(r, 1, MAX_PARAMETER);
    op->groups = word(r, 1, MAX_CHANNELS);
    op->ceil_mode = word(r, 0, 1);
    op->count_include_pad = word(r, 0, 1);
    for (int i = 0; i < 2; i++) op->size[i] = word(r, 1, MAX_PARAMETER);
    for (int i = 0; i < 2; i++) op->channels[i] = word(r, 0, MAX_CHANNELS);
    if (op->kind == CONVOLVE || op->kind == AFFINE) read_weights(r, op);
    if (op->kind == AFFINE && !r->bad)
        r->bad = op->depth != 1 || op->kernel[0] != 1 || op->kernel[1] != 1 || op->groups != 1 || op->encoding != RAW;
}

static int read_model(engine *e, const uint8_t *bytes, size_t size) {
    static const uint8_t magic[8] = {0x89, 'E', 'N', 'G', 'I', 'N', 'E', '\n'};
    uint32_t stored;
    if (size < HEADER_BYTES) return ENGINE_SHORT;
    memcpy(&stored, bytes + 8, 4);
    if (crc32(crc32(0, bytes, 8), bytes + 12, size - 12) != stored) return ENGINE_CRC;
    Reader r = {bytes + 12, bytes + size, 0};
    if (memcmp(bytes, magic, 8) || word(&r, 0, UINT32_MAX) != VERSION) return ENGINE_MAGIC;
    e->height = word(&r, 1, MAX_SIDE);
    e->width = word(&r, 1, MAX_SIDE);
    e->classes = word(&r, 1, MAX_CHANNELS);
    e->operations = word(&r, 1, MAX_CHANNELS);
    uint32_t name_bytes = word(&r, 0, 1 << 24);
    e->mean = take(&r, 12);
    e->std = take(&r, 12);
    e->background = word(&r, 0, 1);
    e->names = take(&r, name_bytes);
    if (r.bad) return ENGINE_FORMAT;
    int names = 0;
    for (uint32_t i = 0; i < name_bytes; i++) names += e->names[i] == 0;
    e->has_names = name_bytes > 0;
    if (e->has_names && (names != e->classes || e->names[name_bytes - 1])) return ENGINE_FORMAT;
    if ((size_t)e->operations * 4 > size) return ENGINE_FORMAT;
    e->operation = calloc((size_t)e->operations, sizeof(Operation));
    e->profile = calloc(2 * (size_t)e->operations, sizeof(double));
    if (!e->operation || !e->profile) return ENGINE_MEMORY;
    for (int i = 0; i < e->operations && !r.bad; i++) read_operation(&r, e->operation + i, (uint32_t)i);
    return r.bad || r.at != r.end ? ENGINE_FORMAT : ENGINE_OK;
}

/* ------------------------------------------------------------------------- the plan for images of one size: shapes */

/* One value of the network. Grouped, it lies in a border of zeros, which is the padding of convolutions. Single, each
   channel is padded to whole vectors. */
typedef struct {
    int channels, height, width;
    int border[4];             /* top, left, bottom, right, in pixels */
    size_t line, pitch, place; /* floats: from row to row, from channel to channel, before the first pixel */
    int last_use;              /* the last operation that reads it */
} Value;

static int windows(int size, int before, int after, int kernel, int dilation, int stride, int ceil_mode) {
    int span = size + before + after - dilation * (kernel - 1) - 1;
    if (span < 0) return 0;
    int count = (span + (ceil_mode ? stride - 1 : 0)) / stride + 1;
    return count - (ceil_mode && (count - 1) * stride >= size + before);
}

/* The shape of the value that an operation writes, and how much work it is. */
static int infer_shape(const Operation *op, const Value *values, Value *out, double *work) {
    const Value *x = values + op->input[0], *y = values + op->input[op->inputs - 1];
    const int *k = op->kernel, *s = op->stride, *p = op->padding, *d = op->dilation;
    int64_t channels = x->channels, each = 1;
    int height = x->height, width = x->width, same = y->height == height && y->width == width;
    switch (op->kind) {
    case CONVOLVE: case MAX_POOL: case AVERAGE_POOL:
        height = windows(height, p[0], p[2], k[0], d[0], s[0], op->ceil_mode && op->kind != CONVOLVE);
        width = windows(width, p[1], p[3], k[1], d[1], s[1], op->ceil_mode && op->kind != CONVOLVE);
        each = k[0] * k[1];
        if (op->kind != CONVOLVE) break;
        if (channels != (int64_t)op->depth * op->groups) return ENGINE_FORMAT;
        channels = op->filters;
        each = op->nonzeros / op->filters + 1;
        for (int i = 0; i < 6; i++) /* the ways that read all weights */
            if (op->algorithm[i] != SPARSE) each = (int64_t)op->depth * k[0] * k[1];
        if (op->inputs > 1 && (y->channels != channels || y->height != height || y->width != width))
            return ENGINE_SIZE;
        break;
    case AFFINE:
        if (op->filters != channels) return ENGINE_FORMAT;
        break;
    case ADD:
        if (!same || y->channels != channels) return ENGINE_SIZE;
        break;
    case MULTIPLY:
        if (y->channels != channels || y->height != 1 || y->width != 1) return ENGINE_SIZE;
        break;
    case CONCATENATE:
        channels = 0;
        for (int i = 0; i < op->inputs; i++) {
            y = values + op->input[i];
            if (y->height != height || y->width != width) return ENGINE_SIZE;
            channels += y->channels;
        }
        break;
    case ADAPTIVE_POOL:
        height = op->size[0];
        width = op->size[1];
        each = (int64_t)(x->height / height + 2) * (x->width / width + 2);
        break;
    case PAD_CHANNELS:
        channels += op->channels[0] + op->channels[1];
        height = (height - 1) / s[0] + 1;
        width = (width - 1) / s[1] + 1;
        break;
    default: break;
    }
    if (channels > MAX_CHANNELS || height > MAX_SIDE || width > MAX_SIDE) return ENGINE_LARGE;
    if (height < 1 || width < 1) return ENGINE_SIZE;
    *work += (double)channels * height * width * (double)each;
    if (op->kind == CONVOLVE) *work += (double)k[0] * k[1] * ((double)x->channels * height * width + k[0] * k[1]);
    *out = (Value){(int)channels, height, width, {0}, 0, 0, 0, 0};
    return *work > ENGINE_MAX_WORK ? ENGINE_LARGE : ENGINE_OK;
}

static int infer_shapes(const engine *e, int height, int width, Value *values) {
    double work = 0;
    if (height < 1 || width < 1 || height > MAX_SIDE || width > MAX_SIDE) return ENGINE_SIZE;
    values[0] = (Value){3, height, width, {0}, 0, 0, 0, 0};
    for (int i = 0; i < e->operations; i++) {
        int code = infer_shape(e->operation + i, values, values + i + 1, &work);
        if (code) return code;
        for (int k = 0; k < e->operation[i].inputs; k++) values[e->operation[i].input[k]].last_use = i;
    }
    Value *logits = values + e->operations;
    logits->last_use = e->operations;
    if (logits->channels != e->classes) return ENGINE_FORMAT;
    return logits->height != 1 || logits->width != 1 ? ENGINE_SIZE : ENGINE_OK;
}

/* -------------------------------------------------------------------- the plan: memory, and weights in reading order */

typedef struct { uint32_t offset; float value; } Nonzero;            /* offset in bytes from the block's first channel */
typedef struct { uint32_t start, stop, filter, first, last; } Run;   /* the nonzeros of one filter in one block */

/* A copy of every stride-th line and pixel of a channel: line i begins at pixel (stride * i + y, x). Single images need
   it, so that the pixels that a weight reads for one vector of outputs lie side by side at an aligned address. */
typedef struct { int y, x, lines; size_t place, floats; } Plane;

/* How outputs read a value: as a kernel of this size, stride and dilation that begins this far above and left. */
typedef struct { int kernel[2], stride[2], dilation[2], top, left, rows, columns, separate; } Window;

/* A convolution, prepared. Places and pitches are in floats. */
typedef struct {
    int algorithm, rows, columns;        /* of the output */
    int blocks, block;                   /* of channels (sparse), of filters; the filters of a block */
    int copied_source, copies, planes;   /* whether it reads copies, makes them, and how many planes */
    int stride[2], step, flat, line_floats; /* of the copies: see copy_planes */
    Plane *plane;
    int32_t *table;                      /* for each float of a channel's copies: a mask; or what to gather, -1 for 0 */
    size_t jump;                         /* floats from one copied line to the next in the source */
    size_t copied, source, pitch, line;  /* floats of a channel's copies; first channel; channel to channel; output row to row */
    int column;                          /* floats from one output column to the next */
    uint32_t *offsets;                   /* bytes: where each channel and tap is read (dense), each tap (Winograd) */
    Nonzero *nonzeros;
    Run *runs;
    uint32_t *starts;                    /* the runs of each block and part */
    float *weights;                      /* (blocks, channels and taps, block); Winograd: (blocks, squares, channels,
                                            block) */
    int across, tiles, chunk, join;      /* Winograd: tiles in a row, (vectors of) tiles, how many at a time; tiles that
                                            lie side by side in memory */
} Convolution;

typedef struct Memory { struct Memory *next; } Memory;

struct Plan {
    Plan *next;
    int height, width, grouped, code;
    Value *values;
    Convolution *convolutions;
    size_t floats, copies, inputs, scratch; /* of the activations; copies of inputs; transformed inputs; of a thread */
    size_t margin;                          /* before and after the activations, which masked copies may read */
    const Convolution *copied;              /* the last one with copies of its input, */
    uint32_t copied_value;                  /* which was this value */
    float **arenas, **own;                  /* of each thread: activations, scratch memory */
    Memory *memory;
};

/* Zeroed memory that lives as long as the plan; it starts at a cache line. NULL if there is none. */
static void *allocate(Plan *plan, uint64_t count, size_t size) {
    if (count * size > 16 * ENGINE_MAX_FLOATS || count * size > SIZE_MAX / 2) return NULL;
    Memory *block = calloc(1, (size_t)count * size + 128);
    if (!block) return NULL;
    block->next = plan->memory;
    plan->memory = block;
    return (void *)(((uintptr_t)(block + 1) + 63) / 64 * 64);
}

static void free_plan(Plan *plan) {
    for (Memory *block = plan->memory, *next; block; block = next) {
        next = block->next;
        free(block);
    }
    free(plan);
}

static const Plane *find_plane(const Convolution *c, int planes, const Window *w, int y, int x) {
    for (const Plane *p = c->plane; p < c->plane + planes; p++)
        if (p->x == x && y >= p->y && (y - p->y) % w->stride[0] == 0
            && (y - p->y) / w->stride[0] + w->rows <= p->lines)
            return p;
    return NULL;
}

/* The copies that the taps of a window need: one for each horizontal offset and vertical phase, or for each tap where
   lines would not start at whole vectors and the copies are small. */
static int plan_copies(Plan *plan, Convolution *c, const Value *x, const Window *w) {
    c->copies = 1;
    c->plane = allocate(plan, (uint64_t)w->kernel[0] * w->kernel[1], sizeof(Plane));
    if (!c->plane) return ENGINE_MEMORY;
    for (int kx = 0; kx < w->kernel[1]; kx++)
        for (int ky = 0; ky < w->kernel[0]; ky++) {
            int at_y = ky * w->dilation[0] - w->top, at_x = kx * w->dilation[1] - w->left;
            Plane *p = c->plane, *end = c->plane + c->planes;
            while (p < end && (w->separate || p->x != at_x || (at_y - p->y) % w->stride[0])) p++;
            if (p == end) *end = (Plane){at_y, at_x, 0, 0, 0}, c->planes++;
            p->lines = max(p->lines, (at_y - p->y) / w->stride[0] + w->rows);
        }
    memcpy(c->stride, w->stride, sizeof c->stride);
    c->line_floats = w->columns;
    c->jump = (size_t)w->stride[0] * x->width;
    c->step = w->stride[1] == 1 || w->stride[1] == 2 || w->stride[1] == 4 ? w->stride[1] : 0;
    c->flat = c->jump == (size_t)w->stride[1] * w->columns;
    for (Plane *p = c->plane; p < c->plane + c->planes; p++) {
        p->place = c->copied;
        p->floats = round16((size_t)p->lines * w->columns + (c->flat ? 0 : LANES));
        c->copied += p->floats;
        if ((uint64_t)c->copied * x->channels > ENGINE_MAX_FLOATS) return ENGINE_LARGE; /* before a sum can overflow */
    }
    c->table = allocate(plan, c->copied, sizeof(int32_t));
    if (!c->table) return ENGINE_MEMORY;
    for (const Plane *p = c->plane; p < c->plane + c->planes; p++) {
        int32_t *to = c->table + p->place, *end = to + p->floats;
        for (int line = 0; line < p->lines; line++)
            for (int column = 0; column < w->columns; column++) {
                int y = line * w->stride[0] + p->y, from = column * w->stride[1] + p->x;
                int inside = y >= 0 && y < x->height && from >= 0 && from < x->width;
                *to++ = c->step ? -inside : inside ? y * x->width + from : -1;
            }
        while (to < end) *to++ = c->step ? 0 : -1;
    }
    if ((size_t)x->channels * c->copied > plan->copies) plan->copies = (size_t)x->channels * c->copied;
    return ENGINE_OK;
}

/* Where the taps of a window find their pixels: `taps`, in floats from the first channel. It sets source, pitch, line
   and column, and plans copies where they are needed. */
static int plan_source(Plan *plan, Convolution *c, uint32_t number, const Window *w, size_t *taps) {
    const Value *x = plan->values + number;
    int count = w->kernel[0] * w->kernel[1], lanes = plan->grouped ? LANES : 1, code;
    c->pitch = x->pitch;
    c->line = w->stride[0] * x->line;
    c->column = plan->grouped ? w->stride[1] * LANES : LANES;
    int one = w->rows * w->columns == 1, inside = w->top == 0 && w->left == 0
        && (w->kernel[0] - 1) * w->dilation[0] < x->height && (w->kernel[1] - 1) * w->dilation[1] < x->width;
    int every = w->stride[0] * w->stride[1] == 1 && w->rows == x->height && w->columns == x->width;
    if (plan->grouped || (inside && (one || (count == 1 && every)))) {
        c->source = x->place - w->top * x->line - (size_t)w->left * lanes;
        for (int i = 0; i < count; i++)
            taps[i] = i / w->kernel[1] * w->dilation[0] * x->line
                + (size_t)(i % w->kernel[1]) * w->dilation[1] * lanes;
        return ENGINE_OK;
    }
    const Convolution *from = plan->copied; /* a block's shortcut can read the copies of its first convolution */
    int shared = from && plan->copied_value == number && from->rows == w->rows && from->columns == w->columns
        && !memcmp(from->stride, w->stride, sizeof from->stride) && max(from->algorithm, c->algorithm) < WINOGRAD2;
    for (int pass = shared ? 0 : 1; pass < 2; pass++) {
        if (pass == 1) {
            if ((code = plan_copies(plan, c, x, w))) return code;
            plan->copied = from = c;
            plan->copied_value = number;
        }
        int i = 0;
        for (; i < count; i++) {
            int y = i / w->kernel[1] * w->dilation[0] - w->top, at_x = i % w->kernel[1] * w->dilation[1] - w->left;
            const Plane *p = find_plane(from, from->planes, w, y, at_x);
            if (!p) break;
            taps[i] = p->place + (size_t)((y - p->y) / w->stride[0]) * w->columns;
        }
        if (i == count) break;
    }
    c->copied_source = 1; /* make_plan sets c->source */
    c->pitch = from->copied;
    return ENGINE_OK;
}

/* SPARSE: nonzeros sorted by block of channels, then by filter. `reads`: floats that a tile reads from a channel. */
static int plan_sparse(Plan *plan, Convolution *c, const Operation *op, const size_t *taps, double reads, int threads) {
    int area = op->kernel[0] * op->kernel[1], channels = op->depth * op->groups, per_group = op->filters / op->groups;
    uint64_t size = (uint64_t)op->depth * area;
    double fits = BLOCK_BYTES / (4 * reads), a_channel = (op->nonzeros + 1.0) / op->filters / op->depth;
    double enough = op->groups > 1 ? 1 : MIN_NONZEROS / a_channel + 1;
    fits = fits < 1 ? 1 : fits;
    double length = enough < fits ? fits : enough > 4 * fits ? 4 * fits : enough;
    c->block = length < channels ? (int)length : channels;
    c->blocks = ceil_div(channels, c->block);
    uint32_t *counts = allocate(plan, op->filters + 1, 4), *cursor = allocate(plan, c->blocks + 1, 4);
    c->starts = allocate(plan, (uint64_t)c->blocks * threads + 1, 4);
    if (!counts || !cursor || !c->starts) return ENGINE_MEMORY;
    /* A filter without weights gets one of value 0, so that something writes its outputs. */
    uint64_t entries = 0;
    for (int pass = 0; pass < 2; pass++) {
        uint32_t *owners = NULL;
        if (pass == 1) {
            c->nonzeros = allocate(plan, entries, sizeof(Nonzero));
            owners = allocate(plan, entries, 4);
            if (!c->nonzeros || !owners) return ENGINE_MEMORY;
            for (int b = c->blocks; b > 0; b--) cursor[b] = cursor[b - 1];
            cursor[0] = 0;
            for (int b = 0; b < c->blocks; b++) cursor[b + 1] += cursor[b];
        }
        Nonzeros n = nonzeros_of(op);
        const float *value = op->values;
        int64_t index = next_nonzero(&n);
        for (int filter = 0; filter < op->filters; filter++) {
            uint64_t begin = filter * size;
            int empty = index < 0 || (uint64_t)index >= begin + size;
            for (int k = 0; empty ? k < 1 : index >= 0 && (uint64_t)index < begin + size; k++) {
                int at = empty ? 0 : (int)(index - begin), channel = filter / per_group * op->depth + at / area;
                int b = channel / c->block;
                if (pass == 0) {
                    cursor[b]++, counts[filter]++, entries++;
                } else {
                    size_t offset = channel % c->block * c->pitch + taps[at % area];
                    owners[cursor[b]] = (uint32_t)filter;
                    c->nonzeros[cursor[b]++] = (Nonzero){(uint32_t)(4 * offset), empty ? 0 : *value};
                }
                if (!empty) index = next_nonzero(&n), value++;
            }
        }
        if (pass == 0) continue;
        /* Now cursor[b] is the end of block b. */
        uint32_t runs = 0;
        for (uint64_t i = 0, b = 0; i < entries; i++) {
            int fresh = i == 0 || owners[i] != owners[i - 1];
            while (i == cursor[b]) b++, fresh = 1;
            runs += fresh;
        }
        c->runs = allocate(plan, runs, sizeof(Run));
        uint32_t *seen = allocate(plan, op->filters, 4);
        if (!c->runs || !seen) return ENGINE_MEMORY;
        /* The parts of the threads: whole filters, with about as many nonzeros. */
        double total = (double)entries + 8.0 * op->filters, work = 0;
        uint32_t *part = allocate(plan, op->filters, 4);
        if (!part) return ENGINE_MEMORY;
        for (int filter = 0; filter < op->filters; filter++) {
            part[filter] = (uint32_t)((work + counts[filter] / 2.0 + 4) * threads / total);
            work += counts[filter] + 8;
        }
        Run *run = c->runs - 1;
        uint32_t from = 0;
        for (int b = 0; b < c->blocks; b++) {
            int thread = 0;
            c->starts[b * threads] = (uint32_t)(run + 1 - c->runs);
            for (uint32_t i = from; i < cursor[b]; i++) {
                uint32_t filter = owners[i];
                if (i == from || filter != owners[i - 1]) {
                    *++run = (Run){i, i, filter, seen[filter] == 0, 0};
                    while (thread < (int)part[filter]) c->starts[b * threads + ++thread] = (uint32_t)(run - c->runs);
                }
                run->stop++;
                run->last = ++seen[filter] == counts[filter];
            }
            while (++thread < threads) c->starts[b * threads + thread] = (uint32_t)(run + 1 - c->runs);
            from = cursor[b];
        }
        c->starts[c->blocks * threads] = (uint32_t)(run + 1 - c->runs);
    }
    return ENGINE_OK;
}

/* DENSE: the weights in blocks of filters, and where each of them reads. */
static int plan_dense(Plan *plan, Convolution *c, const Operation *op, const size_t *taps, int vectors) {
    int area = op->kernel[0] * op->kernel[1], size = op->depth * area;
    c->block = vectors > 1 ? FILTERS : 2 * FILTERS;
    if (!plan->grouped && c->rows * c->columns == 1) c->block = LANES; /* a vector of filters, not of pixels */
    c->blocks = ceil_div(op->filters, c->block);
    c->weights = allocate(plan, (uint64_t)c->blocks * c->block * size, 4);
    c->offsets = allocate(plan, size, 4);
    if (!c->weights || !c->offsets) return ENGINE_MEMORY;
    for (int i = 0; i < size; i++) c->offsets[i] = (uint32_t)(4 * (i / area * c->pitch + taps[i % area]));
    Nonzeros n = nonzeros_of(op);
    const float *value = op->values;
    for (int64_t index; (index = next_nonzero(&n)) >= 0;) {
        int filter = (int)(index / size), at = (int)(index % size);
        c->weights[((size_t)(filter / c->block) * size + at) * c->block + filter % c->block] = *value++;
    }
    return ENGINE_OK;
}

/* The weights of one 3x3 kernel at the points 0, 1, -1, infinity, or 0, 5/8, -5/8, 3/2, -3/2, infinity. The rounding
   error with the latter is a fifth of that with 0, 1, -1, 2, -2, infinity. */
#define SMALL 0.625f
#define LARGE 1.5f

static void transform_weights(int m, const float *g, float *to, size_t pitch) {
    static const float two[4][3] = {{-1, 0, 0}, {0.5f, 0.5f, 0.5f}, {0.5f, -0.5f, 0.5f}, {0, 0, 1}};
    float four[6][3] = {{1 / (SMALL * SMALL * LARGE * LARGE), 0, 0}};
    for (int i = 0; i < 4; i++) {
        float low = i < 2 ? SMALL : LARGE, high = i < 2 ? LARGE : SMALL, point = i % 2 ? -low : low;
        float scale = 1 / (2 * low * low * (low * low - high * high));
        for (int k = 0; k < 3; k++) four[i + 1][k] = scale * (k == 0 ? 1 : k == 1 ? point : point * point);
    }
    four[5][2] = 1;
    const float(*matrix)[3] = m == 2 ? two : (const float(*)[3])four;
    float half[6][3];
    for (int y = 0; y < m + 2; y++)
        for (int x = 0; x < 3; x++)
            half[y][x] = matrix[y][0] * g[x] + matrix[y][1] * g[3 + x] + matrix[y][2] * g[6 + x];
    for (int y = 0; y < m + 2; y++)
        for (int x = 0; x < m + 2; x++)
            to[(y * (m + 2) + x) * pitch] =
                half[y][0] * matrix[x][0] + half[y][1] * matrix[x][1] + half[y][2] * matrix[x][2];
}

static int plan_winograd(Plan *plan, Convolution *c, const Operation *op, const size_t *taps) {
    int m = c->algorithm == WINOGRAD2 ? 2 : 4, squares = (m + 2) * (m + 2);
    size_t pitch; /* from one square to the next */
    c->across = ceil_div(c->columns, m);
    c->tiles = c->across * ceil_div(c->rows, m);
    for (c->join = LANES; c->across % c->join;) c->join = c->join == LANES / 4 ? 1 : c->join / 2;
    if (!plan->grouped) c->tiles = ceil_div(c->tiles, LANES);
    c->chunk = min(c->tiles, 2);
    c->block = c->chunk > 1 ? FILTERS : 2 * FILTERS;
    c->blocks = ceil_div(op->filters, c->block);
    pitch = (size_t)op->depth * c->block;
    c->weights = allocate(plan, (uint64_t)squares * pitch * c->blocks, 4);
    c->offsets = allocate(plan, squares, 4);
    if (!c->weights || !c->offsets) return ENGINE_MEMORY;
    for (int i = 0; i < squares; i++) c->offsets[i] = (uint32_t)(4 * taps[i]);
    Nonzeros n = nonzeros_of(op);
    const float *value = op->values;
    for (int64_t index = next_nonzero(&n); index >= 0;) {
        int64_t kernel = index / 9, filter = kernel / op->depth, channel = kernel % op->depth;
        float g[9] = {0};
        for (; index >= 0 && index / 9 == kernel; index = next_nonzero(&n)) g[index % 9] = *value++;
        float *to = c->weights + filter / c->block * squares * pitch + channel * c->block + filter % c->block;
        transform_weights(m, g, to, pitch);
    }
    size_t inputs = (size_t)squares * (op->depth * c->chunk + 1) * LANES;
    size_t products = (size_t)squares * (c->block * c->chunk + 1) * LANES;
    size_t outputs = (size_t)c->block * m * m * c->tiles * LANES;
    size_t scratch = plan->grouped ? inputs + products : products + outputs;
    if (!plan->grouped && inputs * ceil_div(c->tiles, c->chunk) > plan->inputs)
        plan->inputs = inputs * ceil_div(c->tiles, c->chunk);
    if (scratch > plan->scratch) plan->scratch = scratch;
    return plan->inputs + plan->scratch > ENGINE_MAX_FLOATS ? ENGINE_LARGE : ENGINE_OK;
}

static int plan_convolution(Plan *plan, int number, const Operation *op, int threads) {
    Convolution *c = plan->convolutions + number;
    const Value *out = plan->values + number + 1;
    Window w = {{op->kernel[0], op->kernel[1]}, {op->stride[0], op->stride[1]}, {op->dilation[0], op->dilation[1]},
                op->padding[0], op->padding[1], out->height, out->width,
                out->width % LANES && out->height * out->width <= 4 * LANES};
    c->algorithm = op->algorithm[(LANES == 4 ? 0 : LANES == 8 ? 1 : 2) + 3 * plan->grouped];
    int m = c->algorithm == WINOGRAD2 ? 2 : 4;
    if (plan->grouped && c->algorithm >= WINOGRAD2 && min(out->height, out->width) < m) c->algorithm = SPARSE;
    c->rows = out->height;
    c->columns = out->width;
    if (c->algorithm >= WINOGRAD2) {
        w.kernel[0] = w.kernel[1] = m + 2;
        if (!plan->grouped) { /* copies of all lines; a vector then takes its tiles from every m-th */
            w.stride[1] = m;
            w.rows = (ceil_div(w.rows, m) - 1) * m + 1;
            w.columns = ceil_div(w.columns, m);
            w.separate = 0;
        }
    }
    size_t *taps = allocate(plan, (uint64_t)w.kernel[0] * w.kernel[1], sizeof(size_t));
    if (!taps) return ENGINE_MEMORY;
    int code = plan_source(plan, c, op->input[0], &w, taps);
    if (code) return code;
    if (c->algorithm >= WINOGRAD2) return plan_winograd(plan, c, op, taps);
    int vectors = plan->grouped ? c->columns : ceil_div(c->rows * c->columns, LANES);
    if (c->algorithm == DENSE) return plan_dense(plan, c, op, taps, vectors);
    double reads;
    if (plan->grouped) {
        double down = (min(TILE / 4, c->rows) - 1) * w.stride[0] + (w.kernel[0] - 1) * w.dilation[0] + 1;
        reads = down * ((min(4, c->columns) - 1) * w.stride[1] + (w.kernel[1] - 1) * w.dilation[1] + 1) * LANES;
    } else {
        double tile = min(vectors, TILE) * LANES;
        const Convolution *copies = c->copies ? c : plan->copied;
        reads = tile;
        if (c->copied_source) { /* of each plane the tile, and the lines around it */
            reads = 0;
            for (const Plane *p = copies->plane; p < copies->plane + copies->planes; p++)
                reads += tile + (p->lines - w.rows) * w.columns;
        }
    }
    return plan_sparse(plan, c, op, taps, reads, threads);
}

/* A place in the activations, which one value after another uses. Grouped, its border stays zero, so that only values
   of the same shape follow. */
typedef struct { size_t place, floats; int busy, shape[7]; } Slot;

static int place_values(const engine *e, Plan *plan) {
    Slot *slots = calloc((size_t)e->operations + 1, sizeof(Slot));
    int *slot_of = calloc((size_t)e->operations + 1, sizeof(int)), count = 0, lanes = plan->grouped ? LANES : 1;
    int code = slots && slot_of ? ENGINE_OK : ENGINE_MEMORY;
    for (int i = 0; i <= e->operations && !code; i++) {
        Value *v = plan->values + i;
        const int *b = v->border;
        v->line = (size_t)(b[1] + v->width + b[3]) * lanes;
        v->pitch = round16((b[0] + v->height + b[2]) * v->line);
        if ((double)v->channels * v->pitch > ENGINE_MAX_FLOATS) code = ENGINE_LARGE;
        int shape[7] = {v->channels, v->height, v->width, b[0], b[1], b[2], b[3]}, found = -1;
        size_t floats = v->channels * v->pitch;
        if (i > 0) { /* write over an input where every output depends on the same place of it only */
            const Operation *op = e->operation + i - 1;
            int k = op->kind == CONVOLVE && op->inputs > 1 ? 1 : 0;
            int number = (int)op->input[k], other = (int)op->input[op->inputs - 1 - k];
            int fits = op->kind == AFFINE || op->kind == ACTIVATE || op->kind == ADD || op->kind == MULTIPLY
                || (k == 1 && (!plan->grouped || (v->height % 4 == 0 && v->width % 4 == 0)));
            const Slot *s = slots + slot_of[number];
            if (fits && plan->values[number].last_use == i - 1 && !memcmp(s->shape, shape, sizeof shape)
                && (op->inputs == 1 || number != other))
                found = slot_of[number];
        }
        for (int k = 0; found < 0 && k < count; k++)
            if (!slots[k].busy && slots[k].floats >= floats
                && (!plan->grouped || !memcmp(slots[k].shape, shape, sizeof shape)))
                found = k;
        if (found < 0) {
            found = count++;
            slots[found] = (Slot){plan->floats, floats, 0, {0}};
            plan->floats += floats;
        }
        memcpy(slots[found].shape, shape, sizeof shape);
        slots[found].busy = 1;
        slot_of[i] = found;
        v->place = slots[found].place + b[0] * v->line + (size_t)b[1] * lanes;
        if (plan->floats > ENGINE_MAX_FLOATS) code = ENGINE_LARGE;
        if (i > 0)
            for (int k = 0; k < e->operation[i - 1].inputs; k++) {
                int number = (int)e->operation[i - 1].input[k];
                if (plan->values[number].last_use == i - 1 && slot_of[number] != found)
                    slots[slot_of[number]].busy = 0;
            }
        if (v->last_use < i) slots[found].busy = 0; /* nobody reads it */
    }
    free(slots);
    free(slot_of);
    return code;
}

static int fill_plan(const engine *e, Plan *plan) {
    int code = ENGINE_MEMORY;
    plan->values = allocate(plan, (uint64_t)e->operations + 1, sizeof(Value));
    plan->convolutions = allocate(plan, e->operations, sizeof(Convolution));
    plan->arenas = allocate(plan, e->threads, sizeof(float *));
    plan->own = allocate(plan, e->threads, sizeof(float *));
    if (!plan->values || !plan->convolutions || !plan->arenas || !plan->own) return code;
    if ((code = infer_shapes(e, plan->height, plan->width, plan->values))) return code;
    plan->margin = 16 * LANES;
    for (int i = 0; i < e->operations; i++) {
        const Operation *op = e->operation + i;
        Value *x = plan->values + op->input[0];
        if (op->kind != CONVOLVE) continue;
        const int *p = op->padding, *d = op->dilation, *k = op->kernel;
        for (int side = 0; side < 4 && plan->grouped; side++) x->border[side] = max(x->border[side], p[side]);
        size_t reach = (size_t)(p[0] + p[2] + k[0] * d[0] + 8) * x->width + p[1] + p[3] + k[1] * d[1] + 16 * LANES;
        if (!plan->grouped && reach > plan->margin) plan->margin = round16(reach);
    }
    for (int changed = 1; changed;) { /* a residual lies as the output does */
        changed = 0;
        for (int i = 0; i < e->operations; i++)
            for (int side = 0; side < 4 && e->operation[i].kind == CONVOLVE && e->operation[i].inputs > 1; side++) {
                int *a = plan->values[i + 1].border + side, *b = plan->values[e->operation[i].input[1]].border + side;
                changed |= *a != *b;
                *a = *b = max(*a, *b);
            }
    }
    if (plan->margin > ENGINE_MAX_FLOATS) return ENGINE_LARGE;
    plan->floats = plan->margin;
    if ((code = place_values(e, plan))) return code;
    plan->floats += plan->margin;
    if (plan->grouped && plan->floats > GROUP_FLOATS) return ENGINE_LARGE;
    for (int i = 0; i < e->operations; i++)
        if (e->operation[i].kind == CONVOLVE && (code = plan_convolution(plan, i, e->operation + i, e->threads)))
            return code;
    for (int i = 0; i < e->operations; i++)
        if (plan->convolutions[i].copied_source) plan->convolutions[i].source = plan->floats;
    if (plan->floats + plan->copies + plan->inputs > ENGINE_MAX_FLOATS) return ENGINE_LARGE;
    for (int t = 0; t < e->threads; t++) {
        if (t == 0 || plan->grouped)
            plan->arenas[t] = allocate(plan, plan->floats + plan->copies + plan->inputs + 16 * LANES, 4);
        else
            plan->arenas[t] = plan->arenas[0];
        plan->own[t] = allocate(plan, plan->scratch + 16, 4);
        if (!plan->arenas[t] || !plan->own[t]) return ENGINE_MEMORY;
    }
    return ENGINE_OK;
}

/* The plan for images of one size: an old one or a new one; its `code` says what is wrong with it. NULL: no memory. */
static Plan *find_plan(engine *e, int height, int width, int grouped) {
    int count = 0;
    Plan **at = &e->plans;
    for (; *at; at = &(*at)->next, count++) {
        Plan *plan = *at;
        if (plan->height != height || plan->width != width || plan->grouped != grouped) continue;
        *at = plan->next;
        plan->next = e->plans;
        return e->plans = plan;
    }
    if (count >= MAX_PLANS) { /* the one that was not used for longest */
        for (at = &e->plans; (*at)->next; at = &(*at)->next) {}
        free_plan(*at);
        *at = NULL;
    }
    Plan *plan = calloc(1, sizeof(Plan));
    if (!plan) return NULL;
    plan->height = height;
    plan->width = width;
    plan->grouped = grouped;
    plan->code = fill_plan(e, plan);
    plan->next = e->plans;
    return e->plans = plan;
}

/* -------------------------------------------------------------------------------------------------------- kernels */

/* Where the outputs of a tile are, and what they depend on. Pitches of outputs in floats, of inputs in bytes. */
typedef struct {
    const char *source;
    size_t source_line, source_column;
    float *out;
    const float *residual; /* or NULL */
    size_t line, pitch;    /* from row to row, from filter to filter */
    const float *bias;
    int activation, filters;
} Tile;

/* A tile of rows x columns vectors for each run of nonzeros. In the source the vectors of a row are `step` vectors
   apart. `unroll` partial sums hide the latency of a multiply-add when a tile has too few vectors to do so. */
INLINE void sparse_tile(const int rows, const int columns, const int step, const int unroll, const Tile *t,
                        const Nonzero *nonzeros, const Run *run, const Run *end) {
    const int size = rows * columns;
    for (; run < end; run++) {
        float *out = t->out + run->filter * t->pitch;
        vec sum[16];
        vec bias = splat(t->bias[run->filter]);
        if (!run->first) {
            UNROLL for (int i = 0; i < size; i++) sum[i] = load(out + i / columns * t->line + i % columns * LANES);
        } else if (t->residual) {
            const float *add = t->residual + run->filter * t->pitch;
            UNROLL for (int i = 0; i < size; i++)
                sum[i] = bias + load(add + i / columns * t->line + i % columns * LANES);
        } else {
            UNROLL for (int i = 0; i < size; i++) sum[i] = bias;
        }
        UNROLL for (int i = size; i < size * unroll; i++) sum[i] = splat(0);
        const Nonzero *at = nonzeros + run->start, *stop = nonzeros + run->stop;
        if (unroll > 1)
            for (; stop - at >= unroll; at += unroll) {
                UNROLL for (int u = 0; u < unroll; u++) {
                    const char *from = t->source + at[u].offset;
                    UNROLL for (int i = 0; i < size; i++)
                        sum[u * size + i] += at[u].value
                            * load(from + i / columns * t->source_line + i % columns * step * 4 * LANES);
                }
            }
        for (; at < stop; at++) {
            const char *from = t->source + at->offset;
            UNROLL for (int i = 0; i < size; i++)
                sum[i] += at->value * load(from + i / columns * t->source_line + i % columns * step * 4 * LANES);
        }
        UNROLL for (int half = unroll / 2; half > 0; half /= 2)
            UNROLL for (int i = 0; i < half * size; i++) sum[i] += sum[half * size + i];
        if (run->last && t->activation == RELU)
            UNROLL for (int i = 0; i < size; i++) sum[i] = at_least(splat(0), sum[i]);
        UNROLL for (int i = 0; i < size; i++) store(out + i / columns * t->line + i % columns * LANES, sum[i]);
        if (run->last && t->activation > RELU)
            for (int i = 0; i < size; i++) {
                float *p = out + i / columns * t->line + i % columns * LANES;
                store(p, activated(load(p), t->activation));
            }
    }
}

/* Tiles of one image: so many vectors side by side. */
static void sparse_single(int vectors, const Tile *t, const Nonzero *n, const Run *run, const Run *end) {
    switch (vectors) {
#if TILE == 16
    case 16: sparse_tile(1, 16, 1, 1, t, n, run, end); break;
#endif
    case 8: sparse_tile(1, 8, 1, TILE / 8, t, n, run, end); break;
    case 4: sparse_tile(1, 4, 1, TILE / 4, t, n, run, end); break;
    case 2: sparse_tile(1, 2, 1, TILE / 2, t, n, run, end); break;
    default: sparse_tile(1, 1, 1, 8, t, n, run, end);
    }
}

/* Tiles of a group of images: so many rows, every step-th column. */
static void sparse_group(int rows, int step, const Tile *t, const Nonzero *n, const Run *run, const Run *end) {
    if (rows == 1) sparse_tile(1, 1, 1, 8, t, n, run, end);
    else if (rows == 2 && step == 1) sparse_tile(2, 2, 1, TILE / 4, t, n, run, end);
    else if (rows == 2) sparse_tile(2, 2, 2, TILE / 4, t, n, run, end);
    else if (step == 1) sparse_tile(TILE / 4, 4, 1, 1, t, n, run, end);
    else sparse_tile(TILE / 4, 4, 2, 1, t, n, run, end);
}

/* Products of all weights: out[f][v] = sum over k of weights[k][f] * vector v at source + offset k, for a block of
   filters and a few vectors. Offset k is offsets[k], or k * pitch without offsets. */
INLINE void multiply_tile(const int filters, const int vectors, const float *weights, size_t count, const char *source,
                          size_t column, const uint32_t *offsets, size_t pitch, float *out) {
    vec sum[24];
    UNROLL for (int i = 0; i < filters * vectors; i++) sum[i] = splat(0);
    for (size_t k = 0; k < count; k++, weights += filters) {
        const char *from = source + (offsets ? offsets[k] : k * pitch);
        __builtin_prefetch((const char *)weights + AHEAD);
        vec x[MAX_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) x[v] = load(from + v * column);
        UNROLL for (int f = 0; f < filters; f++)
            UNROLL for (int v = 0; v < vectors; v++) sum[f * vectors + v] += weights[f] * x[v];
    }
    UNROLL for (int i = 0; i < filters * vectors; i++) store(out + i * LANES, sum[i]);
}

static void multiply(int vectors, const float *weights, size_t count, const char *source, size_t column,
                     const uint32_t *offsets, float *out) {
    switch (vectors) {
    case 3: multiply_tile(FILTERS, 3, weights, count, source, column, offsets, 0, out); break;
    case 2: multiply_tile(FILTERS, 2, weights, count, source, column, offsets, 0, out); break;
    case 1: multiply_tile(FILTERS, 1, weights, count, source, column, offsets, 0, out); break;
    default: multiply_tile(2 * FILTERS, 1, weights, count, source, column, offsets, 0, out);
    }
}

static void multiply_squares(int wide, int vectors, const float *weights, size_t count, const float *source, float *out) {
    const char *from = (const char *)source;
    size_t column = 4 * LANES, pitch = vectors * column;
    if (wide) multiply_tile(2 * FILTERS, 1, weights, count, from, column, NULL, pitch, out);
    else if (vectors == 1) multiply_tile(FILTERS, 1, weights, count, from, column, NULL, pitch, out);
    else multiply_tile(FILTERS, 2, weights, count, from, column, NULL, pitch, out);
}

/* A vector of filters for an output of one pixel: the weights are vectors, the inputs are broadcast. */
static vec multiply_pixel(const float *weights, size_t count, const char *source, const uint32_t *offsets) {
    vec sum[8];
    UNROLL for (int u = 0; u < 8; u++) sum[u] = splat(0);
    size_t k = 0;
    for (; k + 8 <= count; k += 8)
        UNROLL for (int u = 0; u < 8; u++)
            sum[u] += *(const float *)(source + offsets[k + u]) * load(weights + (k + u) * LANES);
    for (; k < count; k++) sum[0] += *(const float *)(source + offsets[k]) * load(weights + k * LANES);
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

/* Winograd's transforms of one line, in place; `s` vectors from element to element. */
INLINE void transform_input(const int m, vec *v, const int s) {
    vec a = v[0], b = v[s], c = v[2 * s], d = v[3 * s];
    if (m == 2) {
        v[0] = c - a;
        v[s] = c + b;
        v[2 * s] = c - b;
        v[3 * s] = d - b;
        return;
    }
    const float low = SMALL * SMALL, high = LARGE * LARGE;
    vec e = v[4 * s], f = v[5 * s];
    vec even = e - high * c, odd = d - high * b, even2 = e - low * c, odd2 = d - low * b;
    v[0] = e - (low + high) * c + low * high * a;
    v[s] = even + SMALL * odd;
    v[2 * s] = even - SMALL * odd;
    v[3 * s] = even2 + LARGE * odd2;
    v[4 * s] = even2 - LARGE * odd2;
    v[5 * s] = f - (low + high) * d + low * high * b;
}

INLINE void transform_output(const int m, vec *v, const int s) {
    vec sum = v[s] + v[2 * s], difference = v[s] - v[2 * s];
    if (m == 2) {
        v[0] += sum;
        v[s] = difference + v[3 * s];
        return;
    }
    vec sum2 = v[3 * s] + v[4 * s], difference2 = v[3 * s] - v[4 * s], last = v[5 * s];
    v[0] += sum + sum2;
    v[s] = SMALL * difference + LARGE * difference2;
    v[2 * s] = SMALL * SMALL * sum + LARGE * LARGE * sum2;
    v[3 * s] = SMALL * SMALL * SMALL * difference + LARGE * LARGE * LARGE * difference2 + last;
}

/* A vector in parts of `join` floats at source + places[0], places[1], ... */
INLINE vec load_joined(const int join, const char *source, const uint32_t *places) {
    if (join == LANES) return load(source + places[0]);
    float v[LANES];
    UNROLL for (int i = 0; i < LANES / join; i++) memcpy(v + i * join, source + places[i], 4 * join);
    return load(v);
}

INLINE void input_tile(const int m, const int join, const char *from, const uint32_t *places, const uint32_t *offsets,
                       float *to, size_t pitch) {
    const int n = m + 2;
    vec v[36];
    UNROLL for (int i = 0; i < n * n; i++) v[i] = load_joined(join, from + offsets[i], places);
    UNROLL for (int x = 0; x < n; x++) transform_input(m, v + x, n);
    UNROLL for (int y = 0; y < n; y++) transform_input(m, v + n * y, 1);
    UNROLL for (int i = 0; i < n * n; i++) store(to + i * pitch, v[i]);
}

/* The outputs are at v[(m + 2) * y + x] then. */
INLINE void output_tile(const int m, const float *from, size_t pitch, vec *v) {
    const int n = m + 2;
    UNROLL for (int i = 0; i < n * n; i++) v[i] = load(from + i * pitch);
    UNROLL for (int x = 0; x < n; x++) transform_output(m, v + x, n);
    UNROLL for (int y = 0; y < m; y++) transform_output(m, v + n * y, 1);
}

/* ------------------------------------------------------------------------------------------------- the operations */

/* What one thread computes: its share of one image or group of images. */
typedef struct {
    engine *e;
    const Plan *plan;
    float *arena, *own;
    const float *images;
    float *logits;
    int count, thread, threads; /* images; of those that compute them together */
} Call;

static void barrier(const Call *call);

/* Where part i of `count` things begins. */
static int part(int count, int i, int parts) { return (int)((int64_t)count * i / parts); }
static int first_of(const Call *call, int count) { return part(count, call->thread, call->threads); }
static int last_of(const Call *call, int count) { return part(count, call->thread + 1, call->threads); }

INLINE void copy_plane(const int step, const float *from, size_t jump, const int32_t *mask, float *to, int lines,
                       int columns, size_t length) {
    for (int line = 0; line < lines; line++, from += jump, mask += columns, to += columns)
        for (size_t i = 0; i < length; i += LANES)
            store(to + i, (vec)((bits)load_every(step, from + step * i) & *(const bits *)(mask + i)));
}

/* Where lines follow each other like columns (flat), a plane is one long line. Otherwise the last vector of a line
   reaches into the next line, which is written later. */
static void copy_planes(const Call *call, const Convolution *c, const Value *x) {
    for (int channel = first_of(call, x->channels); channel < last_of(call, x->channels); channel++) {
        const float *from = call->arena + x->place + channel * x->pitch;
        float *copies = call->arena + call->plan->floats + channel * c->copied;
        for (const Plane *p = c->plane; p < c->plane + c->planes; p++) {
            const float *start = from + (ptrdiff_t)p->y * x->width + p->x;
            const int32_t *table = c->table + p->place;
            float *to = copies + p->place;
            int lines = c->flat ? 1 : p->lines, columns = c->line_floats;
            size_t length = c->flat ? p->floats : (size_t)columns;
            switch (c->step) {
            case 1: copy_plane(1, start, c->jump, table, to, lines, columns, length); break;
            case 2: copy_plane(2, start, c->jump, table, to, lines, columns, length); break;
            case 4: copy_plane(4, start, c->jump, table, to, lines, columns, length); break;
            default:
                for (size_t i = 0; i < p->floats; i++) to[i] = table[i] < 0 ? 0 : from[table[i]];
            }
        }
    }
}

static void run_sparse(const Call *call, const Convolution *c, Tile t) {
    int vectors = ceil_div(c->rows * c->columns, LANES), first = call->thread, last = call->thread + 1;
    int parts = call->e->threads, step = c->column / LANES, high = 1, wide = 1;
    if (call->threads == 1) first = 0, last = parts;
    const char *source = t.source;
    float *out = t.out;
    const float *residual = t.residual;
    if (call->plan->grouped) {
        if (step <= 2 && min(c->rows, c->columns) >= 2) high = wide = 2;
        if (high == 2 && c->rows >= TILE / 4 && c->columns >= 4) high = TILE / 4, wide = 4;
        vectors = ceil_div(c->rows, high) * ceil_div(c->columns, wide);
    }
    for (int v = 0, size = 1; v < vectors; v += size) {
        size_t at = (size_t)v * LANES;
        t.source = source + 4 * at;
        if (call->plan->grouped) { /* the last tile of a row or column overlaps the previous one */
            int across = ceil_div(c->columns, wide);
            int y = min(v / across * high, c->rows - high), x = min(v % across * wide, c->columns - wide);
            at = y * t.line + (size_t)x * LANES;
            t.source = source + y * t.source_line + x * t.source_column;
        } else {
            for (size = TILE; size > vectors - v;) size /= 2;
        }
        t.out = out + at;
        t.residual = residual ? residual + at : NULL;
        for (int b = 0; b < c->blocks; b++) {
            const Run *run = c->runs + c->starts[b * parts + first], *end = c->runs + c->starts[b * parts + last];
            if (!call->plan->grouped) sparse_single(size, &t, c->nonzeros, run, end);
            else sparse_group(wide == 4 ? 4 : high, step, &t, c->nonzeros, run, end);
            t.source += 4 * c->block * c->pitch;
        }
    }
}

static void run_pixel(const Call *call, const Convolution *c, const Operation *op, const Tile *t) {
    size_t count = (size_t)op->depth * op->kernel[0] * op->kernel[1];
    for (int b = first_of(call, c->blocks); b < last_of(call, c->blocks); b++) {
        vec sum = multiply_pixel(c->weights + b * count * LANES, count, t->source, c->offsets);
        for (int f = b * LANES; f < min(t->filters, (b + 1) * LANES); f++) {
            float x = sum[f - b * LANES] + t->bias[f] + (t->residual ? t->residual[f * t->pitch] : 0);
            vec y = activated(splat(x), t->activation);
            t->out[f * t->pitch] = y[0];
        }
    }
}

/* A few vectors of outputs of one block of filters. */
static void dense_tile(const Convolution *c, const Tile *t, const char *source, size_t at, int b, size_t count,
                       int vectors) {
    float products[24 * LANES];
    int kind = c->block > FILTERS ? 0 : vectors;
    multiply(kind, c->weights + b * count * c->block, count, source, t->source_column, c->offsets, products);
    const float *product = products;
    for (int f = b * c->block; f < min(t->filters, (b + 1) * c->block); f++)
        for (int v = 0; v < vectors; v++, product += LANES) {
            size_t place = f * t->pitch + at + v * LANES;
            vec x = load(product) + splat(t->bias[f]);
            if (t->residual) x += load(t->residual + place);
            store(t->out + place, activated(x, t->activation));
        }
}

static void run_dense(const Call *call, const Convolution *c, const Operation *op, const Tile *t) {
    size_t count = (size_t)op->depth * op->kernel[0] * op->kernel[1];
    int first = first_of(call, c->blocks), last = last_of(call, c->blocks), most = c->block > FILTERS ? 1 : MAX_VECTORS;
    if (!call->plan->grouped) {
        int vectors = ceil_div(c->rows * c->columns, LANES), chunks = ceil_div(vectors, most);
        for (int b = first; b < last; b++)
            for (int i = 0; i < chunks; i++) {
                int v = part(vectors, i, chunks), end = part(vectors, i + 1, chunks);
                dense_tile(c, t, t->source + (size_t)v * 4 * LANES, (size_t)v * LANES, b, count, end - v);
            }
        return;
    }
    int chunks = ceil_div(c->columns, most);
    for (int y = 0; y < c->rows; y++)
        for (int i = 0; i < chunks; i++) {
            int x = part(c->columns, i, chunks), end = part(c->columns, i + 1, chunks);
            for (int b = first; b < last; b++)
                dense_tile(c, t, t->source + y * t->source_line + x * t->source_column, y * t->line + (size_t)x * LANES,
                           b, count, end - x);
        }
}

/* The place of a tile of a group of images: its first row and column. The last tiles overlap the previous ones. */
static int tile_row(const Convolution *c, int m, int tile) { return min(tile / c->across * m, c->rows - m); }
static int tile_column(const Convolution *c, int m, int tile) { return min(tile % c->across * m, c->columns - m); }

/* Where the parts of a vector of tiles begin: grouped, one tile of every image; single, different tiles. */
static void place_tiles(const Call *call, const Convolution *c, const Tile *t, int m, int tile, uint32_t *places) {
    if (call->plan->grouped)
        places[0] = (uint32_t)(tile_row(c, m, tile) * t->source_line + tile_column(c, m, tile) * t->source_column);
    else
        for (int i = 0; i < LANES / c->join; i++) {
            int at = min(tile * LANES + i * c->join, c->across * ceil_div(c->rows, m) - c->join);
            places[i] = 4 * (uint32_t)(at / c->across * m * c->across + at % c->across);
        }
}

INLINE void winograd_inputs(const int m, const int join, const Call *call, const Convolution *c, const Tile *t,
                            int depth, int tile, int tiles, float *inputs) {
    uint32_t places[2][LANES];
    int threads_share = !call->plan->grouped; /* else each thread has tiles of its own */
    int from = threads_share ? first_of(call, depth) : 0, to = threads_share ? last_of(call, depth) : depth;
    for (int i = 0; i < tiles; i++) place_tiles(call, c, t, m, tile + i, places[i]);
    for (int channel = from; channel < to; channel++)
        for (int i = 0; i < tiles; i++)
            input_tile(m, join, t->source + 4 * channel * c->pitch, places[i], c->offsets,
                       inputs + (size_t)(channel * tiles + i) * LANES, (size_t)(depth * tiles + 1) * LANES);
}

static void transform_inputs(int m, const Call *call, const Convolution *c, const Tile *t, int depth, int tile,
                             int tiles, float *inputs) {
    int join = call->plan->grouped ? LANES : c->join;
    if (m == 2 && join == LANES) winograd_inputs(2, LANES, call, c, t, depth, tile, tiles, inputs);
    else if (m == 2 && join == LANES / 2) winograd_inputs(2, LANES / 2, call, c, t, depth, tile, tiles, inputs);
    else if (m == 2 && join == LANES / 4) winograd_inputs(2, LANES / 4, call, c, t, depth, tile, tiles, inputs);
    else if (m == 2) winograd_inputs(2, 1, call, c, t, depth, tile, tiles, inputs);
    else if (join == LANES) winograd_inputs(4, LANES, call, c, t, depth, tile, tiles, inputs);
    else if (join == LANES / 2) winograd_inputs(4, LANES / 2, call, c, t, depth, tile, tiles, inputs);
    else if (join == LANES / 4) winograd_inputs(4, LANES / 4, call, c, t, depth, tile, tiles, inputs);
    else winograd_inputs(4, 1, call, c, t, depth, tile, tiles, inputs);
}

/* The outputs of a block of filters for some tiles: grouped, in place; single, lines of each tile row in `outputs`. */
INLINE void winograd_filters(const int m, const Call *call, const Convolution *c, const Tile *t, int depth, int b,
                             int tile, int tiles, const float *inputs, float *products, float *outputs) {
    const int n = m + 2, squares = n * n;
    size_t pitch = (size_t)(c->block * tiles + 1) * LANES, inputs_pitch = (size_t)(depth * tiles + 1) * LANES;
    const float *weights = c->weights + (size_t)b * squares * depth * c->block;
    for (int i = 0; i < squares; i++)
        multiply_squares(c->block > FILTERS, tiles, weights + (size_t)i * depth * c->block, depth,
                         inputs + i * inputs_pitch, products + i * pitch);
    for (int f = 0; f < min(c->block, t->filters - b * c->block); f++)
        for (int i = 0; i < tiles; i++) {
            vec v[36];
            output_tile(m, products + (size_t)(f * tiles + i) * LANES, pitch, v);
            if (!call->plan->grouped) {
                size_t line = (size_t)c->tiles * m * LANES; /* of one row of every tile */
                float *out = outputs + f * m * line + (size_t)(tile + i) * m * LANES;
                UNROLL for (int y = 0; y < m; y++) interleave(m, v + n * y, out + y * line);
                continue;
            }
            int filter = b * c->block + f, row = tile_row(c, m, tile + i), column = tile_column(c, m, tile + i);
            size_t place = filter * t->pitch + row * t->line + (size_t)column * LANES;
            /* The rows and columns of previous tiles, which another thread may write, stay as they are. */
            int top = (tile + i) / c->across * m - row, left = (tile + i) % c->across * m - column;
            vec bias = splat(t->bias[filter]), floor = splat(t->activation == RELU ? 0 : -__builtin_inff());
            UNROLL for (int y = 0; y < m; y++)
                UNROLL for (int x = 0; x < m; x++) {
                    if (y < top || x < left) continue;
                    size_t at = place + y * t->line + x * LANES;
                    vec sum = v[n * y + x] + bias;
                    if (t->residual) sum += load(t->residual + at);
                    store(t->out + at, at_least(floor, sum));
                }
            if (t->activation > RELU)
                for (int k = 0; k < m * m; k++) {
                    if (k / m < top || k % m < left) continue;
                    float *at = t->out + place + k / m * t->line + k % m * LANES;
                    store(at, activated(load(at), t->activation));
                }
        }
}

static void activate_floats(float *x, size_t floats, int activation) {
    for (size_t i = 0; i < floats; i += LANES) store(x + i, activated(load(x + i), activation));
}

/* One image: from lines of the rows of all tiles to the channel. */
static void finish_channel(int m, const Convolution *c, const Tile *t, int filter, const float *outputs) {
    float *out = t->out + filter * t->pitch;
    const float *residual = t->residual ? t->residual + filter * t->pitch : NULL;
    vec bias = splat(t->bias[filter]), floor = splat(t->activation == RELU ? 0 : -__builtin_inff());
    for (int y = 0; y < c->rows; y++) {
        const float *from = outputs + (size_t)(y % m) * c->tiles * m * LANES + (size_t)(y / m) * c->across * m;
        float *to = out + (size_t)y * c->columns;
        const float *add = residual ? residual + (size_t)y * c->columns : NULL;
        for (int x = 0; x < c->columns; x += LANES) {
            vec sum = load(from + x) + bias;
            if (add) sum += load(add + x);
            sum = at_least(floor, sum);
            int left = c->columns - x;
            if (left >= LANES) store(to + x, sum);
            else if (left == LANES / 2) memcpy(to + x, &sum, 2 * LANES);
            else memcpy(to + x, &sum, 4 * (size_t)left);
        }
    }
    if (t->activation > RELU) activate_floats(out, t->pitch, t->activation);
}

INLINE void run_winograd(const int m, const Call *call, const Convolution *c, const Operation *op, const Tile *t) {
    const int squares = (m + 2) * (m + 2);
    size_t inputs_floats = (size_t)squares * (op->depth * c->chunk + 1) * LANES;
    int chunks = ceil_div(c->tiles, c->chunk);
    if (call->plan->grouped) {
        float *inputs = call->own, *products = call->own + inputs_floats;
        for (int i = first_of(call, chunks); i < last_of(call, chunks); i++) {
            int tile = i * c->chunk, tiles = min(c->chunk, c->tiles - tile);
            transform_inputs(m, call, c, t, op->depth, tile, tiles, inputs);
            for (int b = 0; b < c->blocks; b++)
                winograd_filters(m, call, c, t, op->depth, b, tile, tiles, inputs, products, NULL);
        }
        return;
    }
    float *inputs = call->arena + call->plan->floats + call->plan->copies, *products = call->own;
    float *outputs = products + (size_t)squares * (c->block * c->chunk + 1) * LANES;
    for (int i = 0; i < chunks; i++)
        transform_inputs(m, call, c, t, op->depth, i * c->chunk, min(c->chunk, c->tiles - i * c->chunk),
                         inputs + i * inputs_floats);
    barrier(call);
    for (int b = first_of(call, c->blocks); b < last_of(call, c->blocks); b++) {
        for (int i = 0; i < chunks; i++)
            winograd_filters(m, call, c, t, op->depth, b, i * c->chunk, min(c->chunk, c->tiles - i * c->chunk),
                             inputs + i * inputs_floats, products, outputs);
        for (int f = b * c->block; f < min(t->filters, (b + 1) * c->block); f++)
            finish_channel(m, c, t, f, outputs + (size_t)(f - b * c->block) * m * m * c->tiles * LANES);
    }
}

static void run_convolution(const Call *call, const Operation *op, int number) {
    const Convolution *c = call->plan->convolutions + number;
    const Value *x = call->plan->values + op->input[0], *out = call->plan->values + number + 1;
    if (c->copies) {
        copy_planes(call, c, x);
        barrier(call);
    }
    Tile t = {(const char *)(call->arena + c->source), 4 * c->line, 4 * (size_t)c->column, call->arena + out->place,
              NULL, out->line, out->pitch, op->bias, op->activation, op->filters};
    if (op->inputs > 1) t.residual = call->arena + call->plan->values[op->input[1]].place;
    switch (c->algorithm) {
    case SPARSE: run_sparse(call, c, t); break;
    case WINOGRAD2: run_winograd(2, call, c, op, &t); break;
    case WINOGRAD4: run_winograd(4, call, c, op, &t); break;
    default:
        if (!call->plan->grouped && c->rows * c->columns == 1) run_pixel(call, c, op, &t);
        else run_dense(call, c, op, &t);
    }
}

/* out = activation(x * scale + shift) */
static void scale_floats(float *out, const float *x, size_t floats, vec scale, vec shift, int activation) {
    for (size_t i = 0; i < floats; i += LANES) store(out + i, activated(load(x + i) * scale + shift, activation));
}

/* Operations that work on each channel alone, with the same shape before and after. */
static void run_elementwise(const Call *call, const Operation *op, int number) {
    const Value *out = call->plan->values + number + 1;
    int grouped = call->plan->grouped, rows = grouped ? out->height : 1, channel = 0;
    size_t floats = grouped ? (size_t)out->width * LANES : (size_t)out->height * out->width;
    for (int i = 0; i < (op->kind == CONCATENATE ? op->inputs : 1); i++) {
        const Value *x = call->plan->values + op->input[i], *y = call->plan->values + op->input[op->inputs - 1];
        for (int from = 0; from < x->channels; from++, channel++) {
            if (channel < first_of(call, out->channels) || channel >= last_of(call, out->channels)) continue;
            vec scale = splat(1), shift = splat(0);
            if (op->kind == AFFINE) scale = splat(op->values[channel]), shift = splat(op->bias[channel]);
            if (op->kind == MULTIPLY) {
                const float *gate = call->arena + y->place + channel * y->pitch;
                scale = grouped ? load(gate) : splat(*gate);
            }
            for (int row = 0; row < rows; row++) {
                float *to = call->arena + out->place + channel * out->pitch + row * out->line;
                const float *a = call->arena + x->place + from * x->pitch + row * x->line;
                if (op->kind == ADD) {
                    const float *b = call->arena + y->place + channel * y->pitch + row * y->line;
                    for (size_t k = 0; k < floats; k += LANES)
                        store(to + k, activated(load(a + k) + load(b + k), op->activation));
                } else {
                    scale_floats(to, a, floats, scale, shift, op->activation);
                }
            }
        }
    }
}

static void run_pad_channels(const Call *call, const Operation *op, int number) {
    const Value *x = call->plan->values + op->input[0], *out = call->plan->values + number + 1;
    int lanes = call->plan->grouped ? LANES : 1;
    for (int channel = first_of(call, out->channels); channel < last_of(call, out->channels); channel++) {
        int from = channel - op->channels[0], inside = from >= 0 && from < x->channels;
        for (int row = 0; row < out->height; row++) {
            float *to = call->arena + out->place + channel * out->pitch + row * out->line;
            for (int i = 0; i < out->width * lanes; i++)
                to[i] = !inside ? 0
                    : call->arena[x->place + from * x->pitch + (size_t)row * op->stride[0] * x->line
                                  + (size_t)(i / lanes) * op->stride[1] * lanes + i % lanes];
        }
    }
}

/* to = to + from, or the larger of both, for `count` pixels; in `from` they are `step` pixels apart. */
INLINE void gather_pixels(const int lanes, const int step, const int largest, float *to, const float *from, int count) {
    for (int x = 0; x < count; x++)
        for (int lane = 0; lane < lanes; lane++) {
            float a = to[x * lanes + lane], b = from[(size_t)x * step * lanes + lane];
            to[x * lanes + lane] = !largest ? a + b : a > b || a != a ? a : b;
        }
}

static void gather(int grouped, int step, int largest, float *to, const float *from, int count) {
    if (grouped && largest) gather_pixels(LANES, step, 1, to, from, count);
    else if (grouped) gather_pixels(LANES, step, 0, to, from, count);
    else if (largest && step == 1) gather_pixels(1, 1, 1, to, from, count);
    else if (largest && step == 2) gather_pixels(1, 2, 1, to, from, count);
    else if (largest) gather_pixels(1, step, 1, to, from, count);
    else if (step == 1) gather_pixels(1, 1, 0, to, from, count);
    else gather_pixels(1, step, 0, to, from, count);
}

static void run_pool(const Call *call, const Operation *op, int number) {
    const Value *x = call->plan->values + op->input[0], *out = call->plan->values + number + 1;
    int grouped = call->plan->grouped, lanes = grouped ? LANES : 1, largest = op->kind == MAX_POOL;
    const int *k = op->kernel, *s = op->stride, *p = op->padding, *d = op->dilation;
    for (int channel = first_of(call, out->channels); channel < last_of(call, out->channels); channel++)
        for (int y = 0; y < out->height; y++) {
            float *to = call->arena + out->place + channel * out->pitch + y * out->line;
            for (int i = 0; i < out->width * lanes; i++) to[i] = largest ? -__builtin_inff() : 0;
            for (int ky = 0; ky < k[0]; ky++) {
                int row = y * s[0] + ky * d[0] - p[0];
                if (row < 0 || row >= x->height) continue;
                const float *from = call->arena + x->place + channel * x->pitch + row * x->line;
                for (int kx = 0; kx < k[1]; kx++) {
                    int left = kx * d[1] - p[1]; /* of output column 0 */
                    int first = left < 0 ? ceil_div(-left, s[1]) : 0, room = x->width - 1 - left;
                    int last = room < 0 ? 0 : min(out->width, room / s[1] + 1);
                    if (first < last)
                        gather(grouped, s[1], largest, to + first * lanes,
                               from + ((ptrdiff_t)first * s[1] + left) * lanes, last - first);
                }
            }
            for (int column = 0; column < out->width && !largest; column++) {
                int top = y * s[0] - p[0], left = column * s[1] - p[1];
                int bottom = min(top + k[0], x->height + p[2]), right = min(left + k[1], x->width + p[3]);
                int area = (bottom - top) * (right - left);
                if (!op->count_include_pad)
                    area = max(min(bottom, x->height) - max(top, 0), 0) * max(min(right, x->width) - max(left, 0), 0);
                for (int i = 0; i < lanes; i++) to[column * lanes + i] /= (float)area;
            }
        }
}

static void run_adaptive_pool(const Call *call, const Operation *op, int number) {
    const Value *x = call->plan->values + op->input[0], *out = call->plan->values + number + 1;
    int lanes = call->plan->grouped ? LANES : 1;
    for (int channel = first_of(call, out->channels); channel < last_of(call, out->channels); channel++)
        for (int i = 0; i < out->height * out->width; i++) {
            int row = i / out->width, column = i % out->width;
            int top = row * x->height / out->height, bottom = ceil_div((row + 1) * x->height, out->height);
            int left = column * x->width / out->width, right = ceil_div((column + 1) * x->width, out->width);
            vec sum = splat(0);
            float rest = 0;
            for (int y = top; y < bottom; y++) {
                const float *from = call->arena + x->place + channel * x->pitch + y * x->line;
                int at = left * lanes;
                for (; at + LANES <= right * lanes; at += LANES) sum += load(from + at);
                for (; at < right * lanes; at++) rest += from[at];
            }
            float *to = call->arena + out->place + channel * out->pitch + row * out->line + (size_t)column * lanes;
            float area = (float)((bottom - top) * (right - left));
            if (lanes > 1) {
                store(to, sum / area);
            } else {
                for (int k = 0; k < LANES; k++) rest += sum[k];
                *to = rest / area;
            }
        }
}

static void load_images(const Call *call) {
    const Value *v = call->plan->values;
    int lanes = call->plan->grouped ? LANES : 1;
    size_t area = (size_t)v->height * v->width;
    for (int row = first_of(call, v->channels * v->height); row < last_of(call, v->channels * v->height); row++) {
        float *to = call->arena + v->place + row / v->height * v->pitch + row % v->height * v->line;
        for (int lane = 0; lane < lanes; lane++) { /* lanes without an image compute the last one again */
            const float *from = call->images + min(lane, call->count - 1) * 3 * area + (size_t)row * v->width;
            for (int x = 0; x < v->width; x++) to[x * lanes + lane] = from[x];
        }
    }
}

/* Zeros that were skipped do not turn NaN into NaN, so that logits of images with NaN are set here. */
static void store_logits(const Call *call) {
    const Value *v = call->plan->values + call->e->operations;
    size_t floats = (size_t)3 * call->plan->height * call->plan->width;
    for (int image = call->thread; image < call->count; image += call->threads) {
        const float *pixels = call->images + image * floats;
        uint32_t nan = 0;
        for (size_t i = 0; i < floats; i++) nan |= pixels[i] != pixels[i];
        for (int k = 0; k < v->channels; k++)
            call->logits[(size_t)image * v->channels + k] =
                nan ? __builtin_nanf("") : call->arena[v->place + k * v->pitch + (call->plan->grouped ? image : 0)];
    }
}

#ifdef ENGINE_PROFILE
#include <time.h>
static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
#else
static double seconds(void) { return 0; }
#endif

static void run_plan(const Call *call) {
    load_images(call);
    barrier(call);
    for (int i = 0; i < call->e->operations; i++) {
        double begin = seconds();
        const Operation *op = call->e->operation + i;
        switch (op->kind) {
        case CONVOLVE: run_convolution(call, op, i); break;
        case MAX_POOL: case AVERAGE_POOL: run_pool(call, op, i); break;
        case ADAPTIVE_POOL: run_adaptive_pool(call, op, i); break;
        case PAD_CHANNELS: run_pad_channels(call, op, i); break;
        default: run_elementwise(call, op, i);
        }
        barrier(call);
        /* Of the calling thread: several have number 0 while each computes a group of its own. */
        if (call->own == call->plan->own[0]) call->e->profile[2 * i + call->plan->grouped] += seconds() - begin;
    }
    store_logits(call);
    barrier(call);
}

/* -------------------------------------------------------------------------------------------------------- threads */

typedef struct {
    engine *e;
    const Plan *single, *group;
    const float *images;
    float *logits;
    size_t count, groups; /* images; groups of images, which come first */
} Job;

static void run_job(Job job, int thread);

#ifdef ENGINE_ONE_THREAD

static void barrier(const Call *call) { (void)call; }

static int start_pool(engine *e) { return e->threads == 1 ? ENGINE_OK : ENGINE_MEMORY; }
static void stop_pool(engine *e) { (void)e; }
static void run_in_pool(engine *e, const Job *job) { (void)e, run_job(*job, 0); }

#else

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define SPINS 20000 /* looks before a thread that waits for work sleeps: a fraction of a millisecond */
#define LOOKS 2000  /* before one that waits for others offers its processor */

typedef struct { Pool *pool; int thread; pthread_t handle; } Worker;

struct Pool {
    int threads;
    Job job;
    atomic_uint jobs, arrived, passed, sleeping, stop; /* arrived at a barrier; barriers passed so far */
    atomic_int caller; /* processor of the calling thread */
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    Worker *workers;
};

INLINE void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Linux often wakes a thread on the processor of the thread that woke it and leaves it there: the two would take turns,
   and a call would take twice the time. */
static void leave_processor(int caller) {
#if defined(__linux__) && !defined(__ANDROID__)
    static _Thread_local int known;
    static _Thread_local cpu_set_t usable;
    if (sched_getcpu() != caller) return;
    if (!known) known = sched_getaffinity(0, sizeof usable, &usable) == 0;
    cpu_set_t others = usable;
    CPU_CLR((size_t)caller, &others);
    if (known && CPU_COUNT(&others)) sched_setaffinity(0, sizeof others, &others);
#else
    (void)caller;
#endif
}

static int current_processor(void) {
#if defined(__linux__) && !defined(__ANDROID__)
    return sched_getcpu();
#else
    return -1;
#endif
}

/* All threads of a call wait for each other. */
static void barrier(const Call *call) {
    Pool *pool = call->e->pool;
    if (call->threads < 2) return;
    unsigned passed = atomic_load(&pool->passed);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 == (unsigned)call->threads) {
        atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed); /* before `passed` for whoever reads that */
        atomic_fetch_add(&pool->passed, 1);
        return;
    }
    for (unsigned looks = 0; atomic_load_explicit(&pool->passed, memory_order_acquire) == passed;) {
        relax();
        if (++looks <= LOOKS) continue;
        if (call->thread == 0) atomic_store(&pool->caller, current_processor()); /* it may have moved since */
        else leave_processor(atomic_load(&pool->caller));
        sched_yield();
    }
}

static void *work(void *argument) {
    Worker *worker = argument;
    Pool *pool = worker->pool;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load_explicit(&pool->jobs, memory_order_acquire) == seen; i++) relax();
        if (atomic_load(&pool->jobs) == seen) {
            pthread_mutex_lock(&pool->mutex);
            atomic_fetch_add(&pool->sleeping, 1);
            while (atomic_load(&pool->jobs) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
            atomic_fetch_sub(&pool->sleeping, 1);
            pthread_mutex_unlock(&pool->mutex);
        }
        seen = atomic_load(&pool->jobs);
        if (atomic_load(&pool->stop)) return NULL;
        leave_processor(atomic_load(&pool->caller));
        run_job(pool->job, worker->thread);
    }
}

static void announce(Pool *pool) {
    atomic_fetch_add(&pool->jobs, 1);
    if (atomic_load(&pool->sleeping)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
}

static void stop_pool(engine *e) {
    Pool *pool = e->pool;
    if (!pool) return;
    atomic_store(&pool->stop, 1);
    announce(pool);
    for (int i = 1; i < pool->threads; i++) pthread_join(pool->workers[i].handle, NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->workers);
    free(pool);
    e->pool = NULL;
}

static int start_pool(engine *e) {
    Pool *pool = e->pool = calloc(1, sizeof(Pool));
    if (!pool) return ENGINE_MEMORY;
    pool->workers = calloc((size_t)e->threads, sizeof(Worker));
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->threads = 1;
    while (pool->workers && pool->threads < e->threads) {
        Worker *worker = pool->workers + pool->threads;
        *worker = (Worker){pool, pool->threads, 0};
        if (pthread_create(&worker->handle, NULL, work, worker)) break;
        pool->threads++;
    }
    if (pool->threads == e->threads) return ENGINE_OK;
    stop_pool(e);
    return ENGINE_MEMORY;
}

static void run_in_pool(engine *e, const Job *job) {
    e->pool->job = *job;
    atomic_store(&e->pool->caller, current_processor());
    announce(e->pool);
    run_job(*job, 0);
}

#endif

/* Each thread computes whole groups of images; all threads compute together what is left over. The job
   is a copy: the last barrier lets the calling thread write the next one. */
static void run_job(Job job, int thread) {
    engine *e = job.e;
    const Plan *any = job.single ? job.single : job.group;
    int threads = e->threads;
    size_t floats = (size_t)3 * any->height * any->width, alone = job.groups / threads * threads;
    Call call = {e, NULL, NULL, NULL, NULL, NULL, LANES, thread, threads};
    for (size_t image = 0; image < job.count;) {
        size_t number = image / LANES;
        int grouped = number < job.groups, own = grouped && number < alone;
        call.plan = grouped ? job.group : job.single;
        call.count = grouped ? LANES : 1;
        if ((size_t)call.count > job.count - image) call.count = (int)(job.count - image);
        call.images = job.images + image * floats;
        call.logits = job.logits + image * e->classes;
        call.thread = own ? 0 : thread;
        call.threads = own ? 1 : threads;
        call.arena = call.plan->arenas[own ? thread : 0];
        call.own = call.plan->own[thread];
        if (!own || number % threads == (size_t)thread) run_plan(&call);
        image += call.count;
        if (own && number + 1 == alone) { /* the first thread's memory is everybody's next */
            call.threads = threads;
            barrier(&call);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------ API */

int engine_load(const void *bytes, size_t size, int threads, engine **out) {
    *out = NULL;
    if (threads < 1 || threads > 1024) return ENGINE_MEMORY;
    engine *e = calloc(1, sizeof(engine));
    if (!e) return ENGINE_MEMORY;
    e->threads = threads;
    int code = (uintptr_t)bytes % 4 ? ENGINE_FORMAT : read_model(e, bytes, size);
    if (!code) {
        Value *values = calloc((size_t)e->operations + 1, sizeof(Value));
        code = values ? infer_shapes(e, e->height, e->width, values) : ENGINE_MEMORY;
        free(values);
    }
    if (!code) code = start_pool(e);
    if (code) engine_free(e);
    else *out = e;
    return code;
}

int engine_run(engine *e, const float *images, size_t count, int height, int width, float *logits) {
    if (count == 0) return ENGINE_OK;
    Job job = {e, NULL, NULL, images, logits, count, count / LANES};
    if (2 * (count % LANES) > LANES) job.groups++; /* idle lanes cost less than so many images one by one */
    if (job.groups) {
        const Plan *plan = find_plan(e, height, width, 1);
        if (!plan) return ENGINE_MEMORY;
        if (plan->code == ENGINE_LARGE || plan->code == ENGINE_MEMORY) job.groups = 0;
        else if (plan->code) return plan->code;
        else job.group = plan;
    }
    if (job.groups * LANES < count) {
        job.single = find_plan(e, height, width, 0);
        if (!job.single) return ENGINE_MEMORY;
        if (job.single->code) return job.single->code;
    }
    run_in_pool(e, &job);
    return ENGINE_OK;
}

void engine_free(engine *e) {
    if (!e) return;
    stop_pool(e);
    for (Plan *plan = e->plans, *next; plan; plan = next) {
        next = plan->next;
        free_plan(plan);
    }
    free(e->operation);
    free(e->profile);
    free(e);
}

const char *engine_error(int code) {
    static const char *const texts[ENGINE_CODES] = {
        "no error",
        "the model file is shorter than its header",
        "the CRC-32 of the model file is wrong: it is damaged, cut short, or another kind of file",
        "not a model file of this version",
        "the content of the model file contradicts itself, although its CRC-32 is right",
        "the network does not fit images of this size",
        "the network needs too much memory or work for images of this size",
        "no memory, or no thread",
    };
    return code >= 0 && code < ENGINE_CODES ? texts[code] : "unknown error";
}

int engine_lanes(void) { return LANES; }
int engine_classes(const engine *e) { return e->classes; }
int engine_height(const engine *e) { return e->height; }
int engine_width(const engine *e) { return e->width; }
const float *engine_mean(const engine *e) { return e->mean; }
const float *engine_std(const engine *e) { return e->std; }
int engine_background(const engine *e) { return e->background; }

const char *engine_class_name(const engine *e, int i) {
    const char *name = e->has_names && i >= 0 && i < e->classes ? e->names : "";
    while (*name && i-- > 0) name += strlen(name) + 1;
    return name;
}

double engine_seconds(const engine *e, int grouped, int i) {
    return i >= 0 && i < e->operations ? e->profile[2 * i + !!grouped] : -1;
}
