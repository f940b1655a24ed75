/* What all calls with products of rows share. Every field of a call is 8 bytes wide, in the order in which its Python
 * module packs them. Pointers are to the first element, strides count elements, flags ending in _bf16: else fp32; `bf16`
 * is of all inputs and outputs that no other flag names, but not of a matrix. */
#ifndef ROWS_H
#define ROWS_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

enum { ROWS = 4, PANEL = 32, MANY = 6, TOKENS = 96, DEPTH = 768 }; /* rows at once and in turn, few inputs and many,
                                                                      columns at a time */

/* Of a matrix: floating point of 32, 16 (bfloat16) and 8 bits (e4m3), and integers: INT4 are 4 bits above -8, two a byte,
 * the first in its low half. */
enum { FP32, BF16, FP8, INT8, INT4 };

/* [rows][columns], `data` null for none. From FP8 on, what is stored times scales[row][column >> shift], where 1 << shift
 * columns are whole vectors and INT4 rows whole bytes. */
typedef struct {
    const char *data;
    const float *scales;
    int64_t kind, stride, scale_stride, shift;
} matrix;

/* Tokens that are multiplied: `rows` of fp32 in whole vectors, and `grouped` as `group` leaves them, or null. */
typedef struct {
    const float *const *rows;
    const float *grouped;
    int count;
} inputs;

/* Bytes of so many elements. */
static inline int64_t bytes_of(int64_t kind, int64_t elements) {
    return kind == FP32 ? elements * 4 : kind == BF16 ? elements * 2 : kind == INT4 ? elements / 2 : elements;
}

typedef struct {
    int64_t begin, end;
} range;

/* Of so many rows those of thread `me`, in whole ROWS but for the last. */
static inline range part_of(int64_t rows, int64_t me, int64_t team) {
    const int64_t tiles = (rows + ROWS - 1) / ROWS, end = tiles * (me + 1) / team * ROWS;
    return (range){tiles * me / team * ROWS, end < rows ? end : rows};
}

/* This thread's own, of at least so many floats, until it is asked again; null if there is no memory. */
static inline float *scratch(size_t floats) {
    static _Thread_local float *kept;
    static _Thread_local size_t size;
    if (size < floats) {
        free(kept);
        size = (floats + 15) / 16 * 16;
        kept = aligned_alloc(64, size * sizeof(float));
        if (!kept) size = 0;
    }
    return kept;
}

/* A team of threads costs as much time as so many products. */
static inline int team_of(int64_t threads, double products) { return products < 1 << 16 ? 1 : (int)threads; }

#endif
