/* What the dispatcher (kda.c) and the kernels (kda_simd.h, compiled once for each instruction set) share. */
#ifndef KDA_H
#define KDA_H

#include <stddef.h>
#include <stdint.h>

enum { MAX_DIM = 256, MAX_KERNEL_SIZE = 8, BLOCK = 16 };

/* One call of decode, prefill or spec_decode; every field is 8 bytes wide, in the order in which __init__.py packs
 * them. Pointers are to the first element; strides count elements. Flags ending in _bf16: else fp32. */
typedef struct {
    const char *qkv, *g, *beta, *output_gate;
    char *out;
    int64_t qkv_stride, g_stride, beta_stride, output_gate_stride, out_stride;
    const char *conv_weight, *norm_weight;
    const float *A_log, *dt_bias;
    char *conv;
    float *recurrent;
    int64_t conv_state_stride, conv_token_stride, recurrent_state_stride;
    const int32_t *state_indices;       /* [num_sequences][max_query_len] */
    const int32_t *cu_seqlens;          /* null in decode: one token for each sequence */
    const uint8_t *has_initial_state;   /* null but in prefill: all have one */
    const int32_t *num_accepted_tokens; /* null but in spec_decode */
    const int32_t *checkpoint_offsets, *checkpoint_state_indices;
    int64_t num_checkpoints, max_query_len; /* max_query_len: states of a sequence, 1 but in spec_decode */
    int64_t num_tokens, num_sequences, num_states, heads, dim, conv_kernel_size;
    int64_t inputs_bf16, conv_weight_bf16, norm_weight_bf16;
    int64_t threads, isa;
    double norm_eps;
} kda_call;

/* All tokens of one sequence for one head. */
typedef void kda_task(const kda_call *call, int64_t sequence, int64_t head);

#endif
