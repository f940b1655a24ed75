/* Products of rows of a matrix with tokens: y = x W^T. Here a few tokens; `panels_simd.h` has many.
 *
 * A token's product with a row is one vector of sums that runs along the row, whatever other tokens and rows are at work:
 * the same bits in any batch and on any number of threads. Weights are read where they lie, each once for up to TOKENS
 * tokens. Tokens are rows of fp32, in whole vectors: zeros stand behind their end.
 */

#include "panels.h"

#define LINE 64 /* bytes of the cache */
#define PAGE 4096

/* WIDTH elements of a row from column k on; `kind` is that of w, `scale` that of these columns. */
INLINE vec KDA(elements)(const matrix *w, int kind, int64_t row, int64_t k, vec scale) {
    const int64_t at = row * w->stride + k;
    if (kind == FP32 || kind == BF16) return KDA(read)(w->data, at, kind == BF16);
    return kind == FP8    ? KDA(read_fp8)(w->data + at, scale)
           : kind == INT8 ? KDA(read_int8)(w->data + at, scale)
                          : KDA(read_int4)(w->data + at / 2, scale);
}

INLINE vec KDA(scale)(const matrix *w, int kind, int64_t row, int64_t k) {
    const float scale = w->scales[row * w->scale_stride + (k >> w->shift)];
    return kind == FP8 ? KDA(scale_fp8)(scale) : kind == INT8 ? KDA(splat)(scale) : KDA(scale_int4)(scale);
}

/* What is read after columns from k on of this row. Of rows side by side that is the rows which follow: no processor
 * foresees several this short. One by one rows are a single stream, a page of which is on its way. */
INLINE void KDA(fetch)(const matrix *w, int kind, int64_t row, int64_t k, int rows) {
    const int64_t here = bytes_of(kind, row * w->stride + k);
    __builtin_prefetch((const char *)((uintptr_t)w->data + here + (rows > 1 ? bytes_of(kind, rows * w->stride) : PAGE)));
}

/* Where the columns that share a scale with column k end. */
INLINE int64_t KDA(group_end)(const matrix *w, int kind, int64_t k, int64_t end) {
    if (kind < FP8) return end;
    const int64_t next = ((k >> w->shift) + 1) << w->shift;
    return next < end ? next : end;
}

/* Rows of W times tokens: sums[token][row] += over columns from k to end; `ahead`: what comes next is fetched. */
INLINE void KDA(tile)(const float *const *x, const matrix *w, int kind, int64_t k, int64_t end, int rows, int tokens,
                      int ahead, vec (*sums)[ROWS]) {
    vec s[6][ROWS], scales[ROWS] = {{0}};
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) s[t][r] = sums[t][r];
    while (k < end) {
        const int64_t group = KDA(group_end)(w, kind, k, end);
        if (kind >= FP8)
            for (int r = 0; r < rows; r++) scales[r] = KDA(scale)(w, kind, r, k);
        for (; k < group; k += WIDTH) {
            vec xs[6];
            for (int t = 0; t < tokens; t++) xs[t] = KDA(load)(x[t] + k);
            for (int r = 0; r < rows; r++) {
                const vec weight = KDA(elements)(w, kind, r, k, scales[r]);
                if (ahead && bytes_of(kind, k) % LINE == 0) KDA(fetch)(w, kind, r, k, rows);
                for (int t = 0; t < tokens; t++) s[t][r] = KDA(fma)(weight, xs[t], s[t][r]);
            }
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sums[t][r] = s[t][r];
}

/* Columns k to end of rows of W in fp32, DEPTH apart. */
INLINE void KDA(widen_rows)(const matrix *w, int kind, int64_t k, int64_t end, int rows, float *wide) {
    for (int r = 0; r < rows; r++)
        for (int64_t i = k; i < end;) {
            const int64_t group = KDA(group_end)(w, kind, i, end);
            vec scale = {0};
            if (kind >= FP8) scale = KDA(scale)(w, kind, r, i);
            for (; i < group; i += WIDTH) {
                KDA(fetch)(w, kind, r, i, rows);
                KDA(store)(wide + r * DEPTH + i - k, KDA(elements)(w, kind, r, i, scale));
            }
        }
}

/* As many tokens at once as registers hold sums of; `ahead`: as the last go by, which are the fewest, and where nothing
 * is widened as the first do. */
INLINE void KDA(tiles)(const float *const *x, int tokens, const matrix *w, int kind, int64_t k, int64_t end, int rows,
                       int ahead, vec (*sums)[ROWS]) {
    const int first = ahead && kind == FP32, last = ahead;
    int t = tokens > 3 ? 3 : 0;
    if (tokens > 3) KDA(tile)(x, w, kind, k, end, rows, 3, first, sums);
    for (; t + 3 < tokens; t += 3) KDA(tile)(x + t, w, kind, k, end, rows, 3, 0, sums + t);
    if (tokens - t == 3) KDA(tile)(x + t, w, kind, k, end, rows, 3, last, sums + t);
    if (tokens - t == 2) KDA(tile)(x + t, w, kind, k, end, rows, 2, last, sums + t);
    if (tokens - t == 1) KDA(tile)(x + t, w, kind, k, end, rows, 1, last, sums + t);
}

/* The matrix from row and column on. */
INLINE matrix KDA(from)(const matrix *w, int kind, int64_t row, int64_t column) {
    matrix part = *w;
    part.data += bytes_of(kind, row * w->stride + column);
    if (kind >= FP8) part.scales += row * w->scale_stride + (column >> w->shift);
    return part;
}

/* The columns from `whole` on of rows of W, behind which there may be nothing: one vector, zeros behind their end. */
INLINE matrix KDA(last_columns)(const matrix *w, int kind, int64_t whole, int64_t width, int rows, char *rest) {
    matrix last = KDA(from)(w, kind, 0, whole);
    for (int r = 0; r < rows; r++)
        __builtin_memcpy(rest + bytes_of(kind, r * WIDTH), w->data + bytes_of(kind, r * w->stride + whole),
                         bytes_of(kind, width - whole));
    last.data = rest;
    last.stride = WIDTH;
    return last;
}

/* `rows` rows with few tokens: the weights go by once, from memory into registers. */
INLINE void KDA(multiply)(const float *const *x, int tokens, const matrix *w, int kind, int64_t width, int rows,
                          float (*y)[PANEL]) {
    vec sums[TOKENS][ROWS];
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) sums[t][r] = (vec){0};
    const int64_t whole = width - width % WIDTH;
    for (int64_t k = 0; k < whole; k += DEPTH) {
        const int64_t end = k + DEPTH < whole ? k + DEPTH : whole;
        if (kind == FP32 || tokens < (kind == BF16 ? MANY : 2)) {
            KDA(tiles)(x, tokens, w, kind, k, end, rows, 1, sums);
            continue;
        }
        float wide[ROWS * DEPTH]; /* for several tokens a weight is widened once */
        const matrix widened = {(const char *)wide, 0, FP32, DEPTH, 0, 0};
        const float *piece[TOKENS];
        KDA(widen_rows)(w, kind, k, end, rows, wide);
        for (int t = 0; t < tokens; t++) piece[t] = x[t] + k;
        KDA(tiles)(piece, tokens, &widened, FP32, 0, end - k, rows, 0, sums);
    }
    if (whole < width) {
        char rest[ROWS * WIDTH * 4] = {0};
        const matrix last = KDA(last_columns)(w, kind, whole, width, rows, rest);
        const float *ends[TOKENS];
        for (int t = 0; t < tokens; t++) ends[t] = x[t] + whole;
        KDA(tiles)(ends, tokens, &last, kind, 0, WIDTH, rows, 0, sums);
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) y[t][r] = KDA(sum)(sums[t][r])[0];
}

/* Of ROWS rows, or of one. */
INLINE void KDA(multiply_kind)(const float *const *x, int tokens, const matrix *w, int64_t width, int rows,
                               float (*y)[PANEL]) {
    if (w->kind == FP32) KDA(multiply)(x, tokens, w, FP32, width, rows, y);
    else if (w->kind == BF16) KDA(multiply)(x, tokens, w, BF16, width, rows, y);
    else if (w->kind == FP8) KDA(multiply)(x, tokens, w, FP8, width, rows, y);
    else if (w->kind == INT8) KDA(multiply)(x, tokens, w, INT8, width, rows, y);
    else KDA(multiply)(x, tokens, w, INT4, width, rows, y);
}
