/* What the dispatcher (kda.c) and the kernels (kda_simd.h, compiled once for each instruction set) share. */
#ifndef KDA_H
#define KDA_H

#include <stddef.h>
#include <stdint.h>

enum { MAX_DIM = 256, MAX_TAPS = 8, BLOCK = 16 };

/* One call of decode, prefill or verify; every field is 8 bytes wide, in the order in which __init__.py packs them.
 * Pointers are to the first element; strides count elements. Flags ending in _bf16: else fp32. */
typedef struct {
    const char *qkv, *forget, *beta, *gate;
    char *out;
    int64_t qkv_stride, forget_stride, beta_stride, gate_stride, out_stride;
    const char *conv_weight, *norm_weight;
    const float *a_log, *dt_bias;
    char *conv;
    float *recurrent;
    int64_t conv_slot_stride, conv_row_stride, recurrent_slot_stride;
    const int32_t *slots;    /* [sequences][steps] */
    const int32_t *bounds;   /* cu_seqlens, or null in decode: one row for each sequence */
    const uint8_t *resume;   /* null but in prefill: always resume */
    const int32_t *accepted; /* null but in verify */
    const int32_t *export_after, *export_slots;
    int64_t exports, steps; /* steps: slots of a sequence, 1 but in verify */
    int64_t rows, sequences, state_slots, heads, dim, taps;
    int64_t rows_bf16, conv_weight_bf16, norm_weight_bf16;
    int64_t threads, isa;
    double norm_eps;
} kda_call;

/* All tokens of one sequence for one head. */
typedef void kda_task(const kda_call *call, int64_t sequence, int64_t head);

#endif
