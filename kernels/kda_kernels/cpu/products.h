/* What the dispatcher (products.c) and the kernels (products_simd.h, compiled once for each instruction set) share. */
#ifndef PRODUCTS_H
#define PRODUCTS_H

#include "rows.h"

typedef struct {
    const char *x, *residual, *norm_weight; /* [tokens][width]; null: nothing is added, nothing is normed */
    int64_t x_stride, residual_stride;
    char *total, *normed; /* null, or x + residual and its norm, [tokens][width] */
    float *wide;          /* scratch [tokens + threads][wide_stride], or null if x is fp32 and goes as it is */
    int64_t wide_stride;
    matrix weight; /* [rows][width] */
    char *out;
    int64_t out_stride, rows, out_bf16;
    matrix pair; /* gate and up, [2 pair_rows][width] */
    char *acts;  /* [tokens][pair_rows] */
    int64_t pair_rows;
    const float *bias; /* [rows] of the router; null: no choice */
    int32_t *ids;      /* [tokens][top_k] */
    float *weights;
    int64_t top_k, renormalize;
    int64_t tokens, width, bf16, threads, isa;
    double eps, scale;
} product_call;

/* This thread's part of a stage. */
typedef void product_stage(const product_call *call, int64_t me, int64_t team);

#endif
