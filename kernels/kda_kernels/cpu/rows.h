/* What all calls with products of rows share. Every field of a call is 8 bytes wide, in the order in which its Python
 * module packs them. Pointers are to the first element, strides count elements, flags ending in _bf16: else fp32; `bf16`
 * is of all inputs and outputs that no other flag names, but not of a matrix. */
#ifndef ROWS_H
#define ROWS_H

#include <stddef.h>
#include <stdint.h>

enum { ROWS = 4, TOKENS = 96, DEPTH = 512 }; /* of a weight, and inputs and columns at a time */

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

/* Bytes of so many elements. */
static inline int64_t bytes_of(int64_t kind, int64_t elements) {
    return kind == FP32 ? elements * 4 : kind == BF16 ? elements * 2 : kind == INT4 ? elements / 2 : elements;
}

/* A team of threads costs as much time as so many products. */
static inline int team_of(int64_t threads, double products) { return products < 1 << 16 ? 1 : (int)threads; }

#endif
