/* Classify photographs with a pruned network, on a device without anything installed.

       classify MODEL IMAGE...          classes with probabilities, and ms an image
       classify MODEL --bench           how fast the network is here

   deploy.py --target makes this program and the model. Exit code 2: something cannot be used, and a line says why. */

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _WIN32
#include <windows.h>
#else
#include <unistd.h>
#endif
#ifdef __AVX2__
#include <cpuid.h>
#endif

#include "../engine/engine.h"
#include "photo.h"
#include "pixels.h"

#define BATCH 64
#define BENCH_SECONDS 1.0
#define MAX_BENCH 2000
#define MOST_BYTES ((size_t)1 << 30)
#define MOST_SIDE 4096 /* of the images that a network is made for */

static const char usage[] =
    "usage: classify MODEL IMAGE... [--threads N] [--top N] [--logits]\n"
    "       classify MODEL --bench [--threads N]\n"
    "\n"
    "  IMAGE        PNG or JPEG files\n"
    "  --threads N  by default as many as the device has processors, up to 4\n"
    "  --top N      print the N most probable classes (3)\n"
    "  --logits     print the output of the network for each class, in place of probabilities\n"
    "  --bench      time the network, one image and 64 images at a time\n";

typedef struct {
    const char *model, **images;
    int count, threads, top, logits, bench;
} Options;

/* One line on standard error. */
static int fail(const char *what, const char *why) {
    fprintf(stderr, why ? "classify: %s %s\n" : "classify: %s\n", what, why);
    return 2;
}

static void *memory(size_t count, size_t size) {
    void *found = calloc(count ? count : 1, size);
    if (!found) exit(fail("there is too little memory", NULL));
    return found;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int processors(void) {
#ifdef _WIN32
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return (int)info.dwNumberOfProcessors;
#else
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
#endif
}

/* Whether the processor has the instructions that this program was compiled for. */
static int can_run(void) {
#ifdef __AVX2__
    unsigned a, b, c, d, low = 0, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & 1u << 12) || !(c & 1u << 27)) return 0; /* FMA, OSXSAVE */
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 6) != 6) return 0; /* the system saves the registers of AVX */
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b & 1u << 5; /* AVX2 */
#else
    return 1;
#endif
}

/* A whole file, to be freed; NULL and *why for one that cannot be read. */
static uint8_t *read_file(const char *path, size_t *size, const char **why) {
    FILE *file = fopen(path, "rb");
    size_t room = 1 << 16;
    uint8_t *bytes = file ? malloc(room) : NULL;
    *size = 0;
    while (bytes && *size < MOST_BYTES) {
        size_t got = fread(bytes + *size, 1, room - *size, file);
        if (got == 0) break;
        *size += got;
        if (*size == room) {
            uint8_t *larger = realloc(bytes, room *= 2);
            if (!larger) free(bytes);
            bytes = larger;
        }
    }
    *why = !bytes || ferror(file) ? strerror(errno) : *size >= MOST_BYTES ? "the file is too large" : NULL;
    if (file) fclose(file);
    if (*why) free(bytes), bytes = NULL;
    return bytes;
}

static int whole_number(const char *text, int most) {
    char *end;
    long value = strtol(text, &end, 10);
    return *text && !*end && value >= 1 && value <= most ? (int)value : 0;
}

/* 0 if the command line makes sense; else the exit code, after a line that says why. */
static int parse(int count, char **words, Options *options) {
    *options = (Options){NULL, memory((size_t)count, sizeof(char *)), 0, processors(), 3, 0, 0};
    if (options->threads < 1) options->threads = 1;
    if (options->threads > 4) options->threads = 4;
    for (int i = 1; i < count; i++) {
        int threads = !strcmp(words[i], "--threads"), top = !strcmp(words[i], "--top");
        if (threads || top) {
            int value = i + 1 < count ? whole_number(words[i + 1], 1024) : 0;
            if (!value) return fail(words[i], "needs a whole number from 1 to 1024");
            *(threads ? &options->threads : &options->top) = value;
            i++;
        } else if (!strcmp(words[i], "--logits")) options->logits = 1;
        else if (!strcmp(words[i], "--bench")) options->bench = 1;
        else if (!strncmp(words[i], "--", 2)) return fail(words[i], "is no option; without arguments, a help text is printed");
        else if (!options->model) options->model = words[i];
        else options->images[options->count++] = words[i];
    }
    if (!options->model) return fail("no model file is named", NULL);
    if (!options->count && !options->bench) return fail("no image is named", NULL);
    return 0;
}

static engine *load(const char *path, int threads) {
    const char *why;
    size_t size;
    engine *network;
    uint8_t *bytes = read_file(path, &size, &why); /* kept until the program ends */
    int code = bytes ? engine_load(bytes, size, threads, &network) : 0;
    if (!bytes || code) {
        fail(path, why ? why : engine_error(code));
        return NULL;
    }
    if (engine_height(network) <= MOST_SIDE && engine_width(network) <= MOST_SIDE) return network;
    fail(path, engine_error(ENGINE_LARGE));
    return NULL;
}

/* The numbers that the network reads, (3, height, width); NULL after a line that says why. */
static float *prepare(const engine *network, const char *path) {
    const char *why;
    size_t size;
    int width, height, to_width = engine_width(network), to_height = engine_height(network);
    uint8_t *bytes = read_file(path, &size, &why);
    uint8_t *photo = bytes ? decode_photo(bytes, size, engine_background(network), &width, &height, &why) : NULL;
    free(bytes);
    if (!photo) {
        fprintf(stderr, "classify: %s cannot be read as an image: %s\n", path, why);
        return NULL;
    }
    size_t pixels = (size_t)to_width * (size_t)to_height;
    uint8_t *small = memory(pixels, 3);
    float *input = memory(pixels, 3 * sizeof(float));
    if (!resize(photo, 4, width, height, small, to_width, to_height)) exit(fail("there is too little memory", NULL));
    normalize(small, (int)pixels, engine_mean(network), engine_std(network), input);
    free(photo), free(small);
    return input;
}

static void print_name(const engine *network, int class) {
    const char *name = engine_class_name(network, class);
    if (!*name) printf("class %d", class);
    for (; *name; name++) putchar((unsigned char)*name < 32 || *name == 127 ? '?' : *name);
}

static void print_classes(const engine *network, const Options *options, const float *logits) {
    int classes = engine_classes(network);
    float *share = memory((size_t)classes, sizeof(float));
    softmax(logits, classes, share);
    for (int i = 0; i < options->top && i < classes; i++) {
        int best = 0;
        for (int k = 1; k < classes; k++)
            if (share[k] > share[best]) best = k;
        printf(i ? ", " : " ");
        print_name(network, best);
        printf(" %.1f %%", 100.0 * (double)share[best]);
        share[best] = -1;
    }
    free(share);
}

static int classify(engine *network, const Options *options, const char *path, float *logits) {
    float *input = prepare(network, path);
    if (!input) return 2;
    int height = engine_height(network), width = engine_width(network);
    int code = engine_run(network, input, 1, height, width, logits); /* the first run prepares the weights */
    double start = seconds();
    if (!code) code = engine_run(network, input, 1, height, width, logits);
    double took = seconds() - start;
    free(input);
    if (code) return fail(options->model, engine_error(code));
    printf("%s:", path);
    if (options->logits)
        for (int i = 0; i < engine_classes(network); i++) printf(" %.9g", (double)logits[i]);
    else print_classes(network, options, logits);
    printf("  (%.2f ms)\n", 1e3 * took);
    return 0;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The median over calls for a second, after one that prepares the weights. */
static int bench(engine *network, const Options *options, int batch) {
    int height = engine_height(network), width = engine_width(network), code, calls = 0;
    size_t floats = (size_t)batch * 3 * (size_t)height * (size_t)width;
    float *images = memory(floats, sizeof(float));
    float *logits = memory((size_t)batch * (size_t)engine_classes(network), sizeof(float));
    double *times = memory(MAX_BENCH, sizeof(double));
    uint32_t state = 1;
    for (size_t i = 0; i < floats; i++) {
        state = state * 1664525u + 1013904223u;
        images[i] = (float)(state >> 8) / (1 << 23) - 1;
    }
    code = engine_run(network, images, (size_t)batch, height, width, logits);
    for (double end = seconds() + BENCH_SECONDS; !code && calls < MAX_BENCH && (calls < 3 || seconds() < end); calls++) {
        double start = seconds();
        code = engine_run(network, images, (size_t)batch, height, width, logits);
        times[calls] = seconds() - start;
    }
    if (!code) {
        qsort(times, (size_t)calls, sizeof(double), by_size);
        double median = times[calls / 2];
        printf("%2d image%s at a time: %.3f ms (median of %d, fastest %.3f), %.0f images/s\n", batch, batch > 1 ? "s" : "",
               1e3 * median, calls, 1e3 * times[0], batch / median);
    }
    free(images), free(logits), free(times);
    return code ? fail(options->model, engine_error(code)) : 0;
}

int main(int count, char **words) {
    Options options;
    if (count < 2) {
        fputs(usage, stderr);
        return 2;
    }
    if (!can_run()) return fail("this program needs a processor with AVX2 and FMA", NULL);
    int code = parse(count, words, &options);
    engine *network = code ? NULL : load(options.model, options.threads);
    if (!network) return 2;
    float *logits = memory((size_t)engine_classes(network), sizeof(float));
    for (int i = 0; i < options.count; i++)
        if (classify(network, &options, options.images[i], logits)) code = 2; /* and on to the next image */
    if (options.bench) {
        printf("%d x %d pixels, %d threads, vectors of %d floats\n", engine_width(network), engine_height(network),
               options.threads, engine_lanes());
        code |= bench(network, &options, 1) | bench(network, &options, BATCH);
    }
    engine_free(network);
    free(logits);
    if (fflush(stdout)) return fail("standard output", strerror(errno));
    return code;
}
