/* Products of rows of a matrix with a few tokens: y = x W^T.
 *
 * Included by the kernels that need them, once for each instruction set. A token's product with a row is one vector of
 * sums that runs along the row, whatever other tokens and rows are at work: the same bits in any batch and on any number
 * of threads. Weights are read where they lie, each once for up to TOKENS tokens. Tokens are rows of fp32, in whole
 * vectors: zeros stand behind their end.
 */

#include "vector.h"

/* WIDTH elements of a row from column k on; `kind` is that of w. */
INLINE vec KDA(weight)(const matrix *w, int kind, int64_t row, int64_t k) {
    const int64_t at = row * w->stride + k;
    if (kind == FP32 || kind == BF16) return KDA(read)(w->data, at, kind == BF16);
    const vec stored = kind == FP8    ? KDA(read_fp8)(w->data + at)
                       : kind == INT8 ? KDA(read_int8)(w->data + at)
                                      : KDA(read_int4)(w->data + at / 2);
    return stored * w->scales[row * w->scale_stride + (k >> w->shift)];
}

/* Rows of W times tokens: sums[token][row] += over columns from k to end. */
INLINE void KDA(tile)(const float *const *x, const matrix *w, int kind, int64_t k, int64_t end, int rows, int tokens,
                      vec (*sums)[ROWS]) {
    vec s[6][ROWS];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) s[t][r] = sums[t][r];
    for (; k < end; k += WIDTH) {
        vec xs[6];
        for (int t = 0; t < tokens; t++) xs[t] = KDA(load)(x[t] + k);
        for (int r = 0; r < rows; r++) {
            const vec weight = KDA(weight)(w, kind, r, k);
            for (int t = 0; t < tokens; t++) s[t][r] = KDA(fma)(weight, xs[t], s[t][r]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sums[t][r] = s[t][r];
}

/* As many tokens at once as registers hold sums of. */
INLINE void KDA(tiles)(const float *const *x, int tokens, const matrix *w, int kind, int64_t k, int64_t end, int rows,
                       vec (*sums)[ROWS]) {
    int t = 0;
#if defined(KDA_AVX512)
    for (; t + 6 <= tokens; t += 6) KDA(tile)(x + t, w, kind, k, end, rows, 6, sums + t);
#endif
    for (; t + 3 <= tokens; t += 3) KDA(tile)(x + t, w, kind, k, end, rows, 3, sums + t);
    if (tokens - t == 2) KDA(tile)(x + t, w, kind, k, end, rows, 2, sums + t);
    if (tokens - t == 1) KDA(tile)(x + t, w, kind, k, end, rows, 1, sums + t);
}

/* The matrix from row and column on. */
INLINE matrix KDA(from)(const matrix *w, int kind, int64_t row, int64_t column) {
    matrix part = *w;
    part.data += bytes_of(kind, row * w->stride + column);
    if (kind >= FP8) part.scales += row * w->scale_stride + (column >> w->shift);
    return part;
}

INLINE void KDA(multiply)(const float *const *x, int tokens, const matrix *w, int kind, int64_t width, int rows,
                          float (*y)[ROWS]) {
    vec sums[TOKENS][ROWS];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sums[t][r] = (vec){0};
    const int64_t whole = width - width % WIDTH;
    for (int64_t k = 0; k < whole; k += DEPTH) {
        const int64_t end = k + DEPTH < whole ? k + DEPTH : whole;
        if (kind == FP32 || tokens < 2 * 3) {
            KDA(tiles)(x, tokens, w, kind, k, end, rows, sums);
            continue;
        }
        float wide[ROWS * DEPTH]; /* for several tokens a weight is widened once */
        const matrix widened = {(const char *)wide, 0, FP32, DEPTH, 0, 0};
        const float *piece[TOKENS];
        for (int r = 0; r < rows; r++)
            for (int64_t i = k; i < end; i += WIDTH) {
                /* the next piece, or rows', while this multiplies */
                __builtin_prefetch(w->data + bytes_of(kind, r * w->stride + i + DEPTH));
                KDA(store)(wide + r * DEPTH + i - k, KDA(weight)(w, kind, r, i));
            }
        for (int t = 0; t < tokens; t++) piece[t] = x[t] + k;
        KDA(tiles)(piece, tokens, &widened, FP32, 0, end - k, rows, sums);
    }
    if (whole < width) { /* the last columns, behind which there may be nothing */
        char rest[ROWS * WIDTH * 4] = {0};
        matrix last = KDA(from)(w, kind, 0, whole);
        const float *ends[TOKENS];
        for (int r = 0; r < rows; r++)
            __builtin_memcpy(rest + bytes_of(kind, r * WIDTH), w->data + bytes_of(kind, r * w->stride + whole),
                             bytes_of(kind, width - whole));
        last.data = rest;
        last.stride = WIDTH;
        for (int t = 0; t < tokens; t++) ends[t] = x[t] + whole;
        KDA(tiles)(ends, tokens, &last, kind, 0, WIDTH, rows, sums);
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) y[t][r] = KDA(sum)(sums[t][r])[0];
}

/* Of ROWS rows, or of one. */
INLINE void KDA(multiply_kind)(const float *const *x, int tokens, const matrix *w, int64_t width, int rows,
                               float (*y)[ROWS]) {
    if (w->kind == FP32) KDA(multiply)(x, tokens, w, FP32, width, rows, y);
    else if (w->kind == BF16) KDA(multiply)(x, tokens, w, BF16, width, rows, y);
    else if (w->kind == FP8) KDA(multiply)(x, tokens, w, FP8, width, rows, y);
    else if (w->kind == INT8) KDA(multiply)(x, tokens, w, INT8, width, rows, y);
    else KDA(multiply)(x, tokens, w, INT4, width, rows, y);
}

/* y[token][row] for `rows` (1 to ROWS) rows of W from row `first` on. */
static __attribute__((noinline)) void KDA(product)(const float *const *x, int tokens, const matrix *w, int64_t first,
                                                   int64_t width, int rows, float (*y)[ROWS]) {
    if (rows == ROWS) {
        const matrix part = KDA(from)(w, (int)w->kind, first, 0);
        KDA(multiply_kind)(x, tokens, &part, width, ROWS, y);
        return;
    }
    for (int r = 0; r < rows; r++) {
        const matrix part = KDA(from)(w, (int)w->kind, first + r, 0);
        float one[TOKENS][ROWS];
        KDA(multiply_kind)(x, tokens, &part, width, 1, one);
        for (int t = 0; t < tokens; t++) y[t][r] = one[t][0];
    }
}

INLINE float KDA(gated)(float gate, float up) { return gate * KDA(sigmoid)(KDA(splat)(gate))[0] * up; }

/* A row as fp32, with zeros behind it. */
INLINE void KDA(widen)(const char *row, int64_t width, int bf16, float *wide, int64_t stride) {
    int64_t i = 0;
    for (; i + WIDTH <= width; i += WIDTH) KDA(store)(wide + i, KDA(read)(row, i, bf16));
    for (; i < width; i++) wide[i] = KDA(read_one)(row, i, bf16);
    for (; i < stride; i++) wide[i] = 0;
}

/* And back. */
INLINE void KDA(narrow)(const float *wide, int64_t width, int bf16, char *row) {
    int64_t i = 0;
    for (; i + WIDTH <= width; i += WIDTH) KDA(write)(row, i, KDA(load)(wide + i), bf16);
    for (; i < width; i++) KDA(write_one)(row, i, wide[i], bf16);
}

