/* What the dispatcher (latents.c) and the kernels (latents_simd.h, compiled once for each instruction set) share. */
#ifndef LATENTS_H
#define LATENTS_H

#include "rows.h"

enum { CHANNELS = 32 }; /* of the latents at a time */

/* kv_b [heads][nope + value][latent]: what stands before the attention of decode tokens, and behind it. */
typedef struct {
    const char *projected; /* [tokens]: queries of all heads (nope, then rope channels), latent, shared key; or null */
    int64_t projected_stride;
    const char *kv_b, *norm_weight;
    char *cache; /* slot s at (s / block_size) * block_stride + (s % block_size) * slot_stride: latent, shared key */
    const int64_t *slots; /* [tokens]; below 0: none */
    int64_t block_stride, slot_stride, block_size;
    char *query;         /* [tokens][heads][latent] */
    const char *latents; /* what a head attended to: a token's [heads][latent] at its stride; null if projected is not */
    int64_t token_stride, head_stride;
    float *wide; /* scratch [tokens][heads][latent] */
    char *out;   /* [tokens][heads][value] */
    int64_t tokens, heads, nope, rope, value, latent, bf16, threads, isa;
    double eps;
} latents_call;

/* This thread's part of a stage. */
typedef void latents_stage(const latents_call *call, int64_t me, int64_t team);

#endif
