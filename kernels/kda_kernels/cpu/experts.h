/* What the dispatcher (experts.c) and the kernels (experts_simd.h, compiled once for each instruction set) share. */
#ifndef EXPERTS_H
#define EXPERTS_H

#include "rows.h"

/* The weighted sum of the experts that tokens chose, and of a shared expert's second half where there is one. */
typedef struct {
    const char *x; /* [tokens][width] */
    int64_t x_stride;
    matrix up, down, shared_down; /* [experts][2 inner][width], [experts][width][inner]; [width][shared] or none */
    const int32_t *ids;    /* [tokens][top_k]; below 0: another rank's */
    const float *weights;
    const char *shared_acts; /* null, or [tokens][shared] */
    char *out;               /* [tokens][width] */
    float *wide, *acts, *shared_wide, *total; /* scratch: [tokens][..] but acts, [tokens * top_k][..] */
    int32_t *order, *first;                   /* scratch: [tokens * top_k], [experts + 1] */
    int64_t wide_stride, acts_stride, shared_stride;
    int64_t tokens, width, inner, shared, experts, top_k, bf16, threads, isa;
} experts_call;

/* This thread's part of a stage. */
typedef void experts_stage(const experts_call *call, int64_t me, int64_t team);

#endif
