/* Products of tokens with rows of a matrix, for every instruction set. */

#include "rows.h"

#define KERNELS "panels_simd.h"
#include "each_isa.h"
