/* What all calls with products of rows share. Every field of a call is 8 bytes wide, in the order in which its Python
 * module packs them. Pointers are to the first element, strides count elements, flags ending in _bf16: else fp32; `bf16`
 * is of all inputs and outputs that no other flag names. */
#ifndef ROWS_H
#define ROWS_H

#include <stddef.h>
#include <stdint.h>

enum { ROWS = 4, TOKENS = 96, DEPTH = 512 }; /* of a weight, and inputs and columns at a time */

/* A team of threads costs as much time as so many products. */
static inline int team_of(int64_t threads, double products) { return products < 1 << 16 ? 1 : (int)threads; }

#endif
