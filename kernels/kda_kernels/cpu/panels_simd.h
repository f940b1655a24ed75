/* Products of many tokens with a panel of rows: y = x W^T.
 *
 * Included by `panels.c` once for each instruction set, not by those who need products: compilers take long over them.
 * Columns are taken DEPTH at a time, and with these the rows of a panel in turn: so their inputs stay in the second cache.
 * Sums are those of `rows_simd.h`, in its order.
 */

#include "rows_simd.h"

#if defined(KDA_AVX512)
#define GROUP 6 /* tokens with ROWS rows, as registers hold their sums */
#else
#define GROUP 3
#endif

/* Of so many tokens, in groups of at most GROUP, how many one has: as even as can be. */
INLINE int KDA(group_size)(int tokens, int group) {
    const int groups = (tokens + GROUP - 1) / GROUP;
    return tokens / groups + (group < tokens % groups);
}

/* Many tokens, so that their inputs are read in one stream: of DEPTH columns each group, of it each vector's tokens. */
inputs KDA(group)(const float *const *x, int tokens, int64_t width) {
    const int64_t whole = width - width % WIDTH;
    float *out = tokens < MANY ? 0 : scratch((size_t)(tokens * whole));
    const inputs in = {x, out, tokens};
    for (int64_t k = 0; out && k < whole; k += DEPTH) {
        const int64_t end = k + DEPTH < whole ? k + DEPTH : whole;
        for (int first = 0, g = 0, size; first < tokens; first += size, g++) {
            size = KDA(group_size)(tokens, g);
            for (int64_t i = k; i < end; i += WIDTH)
                for (int t = 0; t < size; t++, out += WIDTH) KDA(store)(out, KDA(load)(x[first + t] + i));
        }
    }
    return in;
}

/* ROWS rows of fp32 times a group of `size`: sums[token][row] += over `columns`. The same columns of so many rows from
 * `next` on, as far apart, are fetched. */
INLINE void KDA(group_tile)(const float *x, int size, const float *w, int64_t stride, int64_t columns,
                            const float *next, int fetched, vec (*sums)[ROWS]) {
    vec s[GROUP][ROWS];
    for (int t = 0; t < size; t++)
        for (int r = 0; r < ROWS; r++) s[t][r] = sums[t][r];
    for (int64_t k = 0; k < columns; k += WIDTH, x += size * WIDTH) {
        vec xs[GROUP];
        for (int t = 0; t < size; t++) xs[t] = KDA(load)(x + t * WIDTH);
        for (int r = 0; r < ROWS; r++) {
            const vec weight = KDA(load)(w + r * stride + k);
            if (r < fetched) __builtin_prefetch((const char *)((uintptr_t)next + 4 * (r * stride + k)));
            for (int t = 0; t < size; t++) s[t][r] = KDA(fma)(weight, xs[t], s[t][r]);
        }
    }
    for (int t = 0; t < size; t++)
        for (int r = 0; r < ROWS; r++) sums[t][r] = s[t][r];
}

INLINE void KDA(any_group_tile)(const float *x, int size, const float *w, int64_t stride, int64_t columns,
                                const float *next, int fetched, vec (*sums)[ROWS]) {
#if GROUP == 6
    if (size == 6) KDA(group_tile)(x, 6, w, stride, columns, next, fetched, sums);
    if (size == 5) KDA(group_tile)(x, 5, w, stride, columns, next, fetched, sums);
    if (size == 4) KDA(group_tile)(x, 4, w, stride, columns, next, fetched, sums);
#endif
    if (size == 3) KDA(group_tile)(x, 3, w, stride, columns, next, fetched, sums);
    if (size == 2) KDA(group_tile)(x, 2, w, stride, columns, next, fetched, sums);
}

/* Of ROWS rows in fp32 and all tokens; `next` are the rows that follow, or null. By itself: each kind of weights would
 * have these loops once more, and in the longest functions compilers no longer keep sums in registers. */
static __attribute__((noinline)) void KDA(group_tiles)(const inputs *in, int64_t from, const float *w, int64_t stride,
                                                       int64_t columns, const float *next, vec (*sums)[ROWS]) {
    const float *x = in->grouped + in->count * from;
    const int first_alone = in->count < ROWS * GROUP; /* else a row is fetched with each of the first groups */
    for (int first = 0, g = 0, size; first < in->count; first += size, g++) {
        size = KDA(group_size)(in->count, g);
        if (next && first_alone && g == 0) KDA(any_group_tile)(x, size, w, stride, columns, next, ROWS, sums);
        else if (next && !first_alone && g < ROWS)
            KDA(any_group_tile)(x, size, w, stride, columns, next + g * stride, 1, sums + first);
        else KDA(any_group_tile)(x, size, w, stride, columns, next, 0, sums + first);
        x += size * columns;
    }
}

/* Columns k to end of ROWS rows in fp32. */
INLINE void KDA(widen_kind)(const matrix *w, int64_t k, int64_t end, float *wide) {
    if (w->kind == BF16) KDA(widen_rows)(w, BF16, k, end, ROWS, wide);
    else if (w->kind == FP8) KDA(widen_rows)(w, FP8, k, end, ROWS, wide);
    else if (w->kind == INT8) KDA(widen_rows)(w, INT8, k, end, ROWS, wide);
    else if (w->kind == INT4) KDA(widen_rows)(w, INT4, k, end, ROWS, wide);
    else KDA(widen_rows)(w, FP32, k, end, ROWS, wide);
}

/* Up to PANEL rows, whole tiles of ROWS, with many tokens. */
static __attribute__((noinline)) void KDA(multiply_panel)(const inputs *in, const matrix *w, int64_t width, int rows,
                                                          float (*y)[PANEL]) {
    const int kind = (int)w->kind;
    const int64_t whole = width - width % WIDTH;
    vec sums[PANEL / ROWS][TOKENS][ROWS] __attribute__((aligned(64)));
    float wide[ROWS * DEPTH] __attribute__((aligned(64)));
    for (int i = 0; i < rows / ROWS; i++)
        for (int t = 0; t < in->count; t++)
            for (int r = 0; r < ROWS; r++) sums[i][t][r] = (vec){0};
    for (int64_t k = 0; k < whole; k += DEPTH) {
        const int64_t end = k + DEPTH < whole ? k + DEPTH : whole;
        for (int i = 0; i < rows / ROWS; i++) {
            const matrix tile = KDA(from)(w, kind, i * ROWS, 0);
            const int last = (i + 1) * ROWS == rows;
            if (kind == FP32) {
                const float *here = (const float *)tile.data + k;
                const float *next = last ? (const float *)w->data + end : here + ROWS * w->stride;
                KDA(group_tiles)(in, k, here, w->stride, end - k, next, sums[i]);
            } else {
                KDA(widen_kind)(&tile, k, end, wide);
                KDA(group_tiles)(in, k, wide, DEPTH, end - k, 0, sums[i]);
            }
        }
    }
    for (int i = 0; i < rows / ROWS; i++) {
        if (whole < width) {
            const matrix tile = KDA(from)(w, kind, i * ROWS, 0);
            char rest[ROWS * WIDTH * 4] = {0};
            const matrix last = KDA(last_columns)(&tile, kind, whole, width, ROWS, rest);
            const matrix widened = {(const char *)wide, 0, FP32, DEPTH, 0, 0};
            const float *ends[TOKENS];
            for (int t = 0; t < in->count; t++) ends[t] = in->rows[t] + whole;
            KDA(widen_kind)(&last, 0, WIDTH, wide);
            KDA(tiles)(ends, in->count, &widened, FP32, 0, WIDTH, ROWS, 0, sums[i]);
        }
        for (int t = 0; t < in->count; t++)
            for (int r = 0; r < ROWS; r++) y[t][i * ROWS + r] = KDA(sum)(sums[i][t][r])[0];
    }
}

void KDA(product)(const inputs *in, const matrix *w, int64_t first, int64_t width, int rows, float (*y)[PANEL]) {
    const int single = w->kind == FP32 && in->count < 3; /* memory gives one stream faster than four */
    int row = 0;
    if (in->grouped && rows >= ROWS) {
        const matrix part = KDA(from)(w, (int)w->kind, first, 0);
        row = rows / ROWS * ROWS;
        KDA(multiply_panel)(in, &part, width, row, y);
    }
    for (; row + ROWS <= rows && !single; row += ROWS) {
        const matrix part = KDA(from)(w, (int)w->kind, first + row, 0);
        KDA(multiply_kind)(in->rows, in->count, &part, width, ROWS, (float(*)[PANEL])(y[0] + row));
    }
    for (; row < rows; row++) {
        const matrix part = KDA(from)(w, (int)w->kind, first + row, 0);
        KDA(multiply_kind)(in->rows, in->count, &part, width, 1, (float(*)[PANEL])(y[0] + row));
    }
}

#include "no_vector.h"
