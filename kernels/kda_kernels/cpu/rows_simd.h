/* Products of rows of a matrix with a few tokens: y = x W^T.
 *
 * Included by the kernels that need them, once for each instruction set. A token's product with a row is one vector of
 * sums that runs along the row, whatever other tokens and rows are at work: the same bits in any batch and on any number
 * of threads. Weights are read where they lie, each once for up to TOKENS tokens. Tokens are rows of fp32, in whole
 * vectors: zeros stand behind their end.
 */

#include "vector.h"

/* Rows of W times tokens: sums[token][row] += over columns from k to end. */
INLINE void KDA(tile)(const float *const *x, const char *w, int64_t stride, int64_t k, int64_t end, int rows,
                      int tokens, int bf16, vec (*sums)[ROWS]) {
    vec s[6][ROWS];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) s[t][r] = sums[t][r];
    for (; k < end; k += WIDTH) {
        vec xs[6];
        for (int t = 0; t < tokens; t++) xs[t] = KDA(load)(x[t] + k);
        for (int r = 0; r < rows; r++) {
            const vec weight = KDA(read)(w, r * stride + k, bf16);
            for (int t = 0; t < tokens; t++) s[t][r] = KDA(fma)(weight, xs[t], s[t][r]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sums[t][r] = s[t][r];
}

/* As many tokens at once as registers hold sums of. */
INLINE void KDA(tiles)(const float *const *x, int tokens, const char *w, int64_t stride, int64_t k, int64_t end,
                       int rows, int bf16, vec (*sums)[ROWS]) {
    int t = 0;
#if defined(KDA_AVX512)
    for (; t + 6 <= tokens; t += 6) KDA(tile)(x + t, w, stride, k, end, rows, 6, bf16, sums + t);
#endif
    for (; t + 3 <= tokens; t += 3) KDA(tile)(x + t, w, stride, k, end, rows, 3, bf16, sums + t);
    if (tokens - t == 2) KDA(tile)(x + t, w, stride, k, end, rows, 2, bf16, sums + t);
    if (tokens - t == 1) KDA(tile)(x + t, w, stride, k, end, rows, 1, bf16, sums + t);
}

INLINE void KDA(multiply)(const float *const *x, int tokens, const char *w, int64_t stride, int64_t width, int rows,
                          int bf16, float (*y)[ROWS]) {
    vec sums[TOKENS][ROWS];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sums[t][r] = (vec){0};
    const int64_t whole = width - width % WIDTH;
    for (int64_t k = 0; k < whole; k += DEPTH) {
        const int64_t end = k + DEPTH < whole ? k + DEPTH : whole;
        if (!bf16 || tokens < 2 * 3) {
            KDA(tiles)(x, tokens, w, stride, k, end, rows, bf16, sums);
            continue;
        }
        float wide[ROWS * DEPTH]; /* for several tokens a weight is widened once */
        const float *piece[TOKENS];
        for (int r = 0; r < rows; r++)
            for (int64_t i = k; i < end; i += WIDTH) {
                __builtin_prefetch(w + 2 * (r * stride + i + DEPTH)); /* the next piece, or rows', while this multiplies */
                KDA(store)(wide + r * DEPTH + i - k, KDA(read)(w, r * stride + i, 1));
            }
        for (int t = 0; t < tokens; t++) piece[t] = x[t] + k;
        KDA(tiles)(piece, tokens, (const char *)wide, DEPTH, 0, end - k, rows, 0, sums);
    }
    if (whole < width) { /* the last columns, behind which there may be nothing */
        const int size = bf16 ? 2 : 4;
        char rest[ROWS * WIDTH * 4] = {0};
        const float *last[TOKENS];
        for (int r = 0; r < rows; r++)
            __builtin_memcpy(rest + r * WIDTH * size, w + (r * stride + whole) * size, (width - whole) * size);
        for (int t = 0; t < tokens; t++) last[t] = x[t] + whole;
        KDA(tiles)(last, tokens, rest, WIDTH, 0, WIDTH, rows, bf16, sums);
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) y[t][r] = KDA(sum)(sums[t][r])[0];
}

/* y[token][row] for `rows` (1 to ROWS) rows of W from row `first` on. */
static __attribute__((noinline)) void KDA(product)(const float *const *x, int tokens, const char *weight,
                                                   int64_t stride, int64_t first, int64_t width, int rows, int bf16,
                                                   float (*y)[ROWS]) {
    const char *w = weight + first * stride * (bf16 ? 2 : 4);
    if (rows == ROWS && bf16) KDA(multiply)(x, tokens, w, stride, width, ROWS, 1, y);
    else if (rows == ROWS) KDA(multiply)(x, tokens, w, stride, width, ROWS, 0, y);
    else
        for (int r = 0; r < rows; r++, w += stride * (bf16 ? 2 : 4)) {
            float one[TOKENS][ROWS];
            if (bf16) KDA(multiply)(x, tokens, w, stride, width, 1, 1, one);
            else KDA(multiply)(x, tokens, w, stride, width, 1, 0, one);
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

