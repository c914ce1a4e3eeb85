/* Inference of pruned convolutional networks on CPUs.

   An engine reads a model file (deployment/model_file.py describes and writes it) and skips its zero weights:

       engine *network;
       int code = engine_load(bytes, size, 2, &network);               bytes must stay in place until engine_free
       if (!code) code = engine_run(network, images, 1, 32, 32, logits);
       if (code) puts(engine_error(code));
       engine_free(network);

   An engine is used by one thread at a time; it has threads of its own. Different engines are independent. */

#ifndef ENGINE_H
#define ENGINE_H

#include <stddef.h>

enum {
    ENGINE_OK,
    ENGINE_SHORT,   /* fewer bytes than a header has */
    ENGINE_CRC,     /* the CRC-32 differs */
    ENGINE_MAGIC,   /* another kind of file, or of another version */
    ENGINE_FORMAT,  /* the CRC-32 is right, but the content contradicts itself */
    ENGINE_SIZE,    /* the network does not fit images of this size */
    ENGINE_LARGE,   /* more memory or work than ENGINE_MAX_FLOATS and ENGINE_MAX_WORK */
    ENGINE_MEMORY,  /* no memory, or no thread */
    ENGINE_CODES
};

typedef struct engine engine;

/* `bytes` is aligned to 4 bytes. `threads` includes the calling one. *out is NULL unless the code is ENGINE_OK. */
int engine_load(const void *bytes, size_t size, int threads, engine **out);

/* images: (count, 3, height, width) normalized floats. logits: (count, classes). */
int engine_run(engine *e, const float *images, size_t count, int height, int width, float *logits);

void engine_free(engine *e);

const char *engine_error(int code);                      /* one line of English */
int engine_lanes(void);                                  /* floats in a vector */
int engine_classes(const engine *e);
int engine_height(const engine *e), engine_width(const engine *e); /* of the images that the network was made for */
const char *engine_class_name(const engine *e, int i);   /* UTF-8; "" if the file has no names */
const float *engine_mean(const engine *e);               /* of each channel: normalized = (pixel - mean) / std, */
const float *engine_std(const engine *e);                /* with pixels from 0 to 1 */
int engine_background(const engine *e);                  /* behind transparent pixels: 0 white, 1 black */

/* For benchmarks, in a library that is built with ENGINE_PROFILE: seconds spent in operation i since loading, one image
   at a time (grouped 0) or in groups; -1 after the last operation. */
double engine_seconds(const engine *e, int grouped, int i);

#endif
