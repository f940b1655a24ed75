/* Entry point of the CPU kernels: checks the tables, picks the instruction set, shares the work among threads.
 *
 * Plain C for ctypes, no Python headers. Wants GCC (other compilers get the baseline instruction set only).
 * It is compiled with -fopenmp but not linked with an OpenMP runtime: that of torch, already in the process,
 * is to be used, since a second one would bring threads of its own to fight over the same cores.
 */
#include "kda.h"

#include <omp.h>
#include <stdlib.h>

#define KERNELS "kda_simd.h"
#include "each_isa.h"

/* The best instruction set of this machine: 1 baseline, 2 AVX2, 3 AVX-512. */
int64_t kda_best_isa(void) {
#ifdef KDA_DISPATCH
    __builtin_cpu_init();
    /* Exactly what the code above is compiled for. */
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return ISA_BASE;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl"))
        return ISA_AVX512;
    return ISA_AVX2;
#else
    return ISA_BASE;
#endif
}

/* Whether an index is none of the cache's, or above 0 and taken already; takes it. */
static int taken(const kda_call *c, uint8_t *seen, int32_t state_index) {
    if (state_index >= c->num_states) return 1;
    if (state_index <= 0) return 0;
    const int bad = seen[state_index / 8] >> (state_index % 8) & 1;
    seen[state_index / 8] |= (uint8_t)(1 << (state_index % 8));
    return bad;
}

/* The states of sequence n in spec_decode: one for each token, and the one that it starts from. */
static int bad_spec_decode(const kda_call *c, uint8_t *seen, int64_t n) {
    const int32_t *state_indices = c->state_indices + n * c->max_query_len;
    const int32_t tokens = c->cu_seqlens[n + 1] - c->cu_seqlens[n], from = c->num_accepted_tokens[n];
    if (!tokens || state_indices[0] <= 0) return 0;
    if (tokens > c->max_query_len || from < 1 || from > c->max_query_len) return 1;
    int bad = 0;
    for (int i = 0; i < tokens || i < from; i++)
        if (i < tokens || i == from - 1) bad |= state_indices[i] <= 0 || taken(c, seen, state_indices[i]);
    return bad;
}

/* 0 if the tables are sound; __init__.py then finds the sentence for what is not. */
static int check(const kda_call *c) {
    if (c->cu_seqlens) {
        const int32_t last = c->cu_seqlens[c->num_sequences];
        if (c->cu_seqlens[0] != 0 || (c->num_accepted_tokens ? last > c->num_tokens : last != c->num_tokens)) return 1;
        for (int64_t n = 0; n < c->num_sequences; n++)
            if (c->cu_seqlens[n] > c->cu_seqlens[n + 1]) return 1;
    }
    uint8_t *seen = calloc((size_t)c->num_states / 8 + 1, 1);
    if (!seen) return 1;
    int bad = 0;
    for (int64_t n = 0; n < c->num_sequences; n++)
        bad |= c->num_accepted_tokens ? bad_spec_decode(c, seen, n) : taken(c, seen, c->state_indices[n]);
    for (int64_t e = 0; e < c->num_checkpoints; e++) {
        bad |= taken(c, seen, c->checkpoint_state_indices[e]);
        bad |= c->checkpoint_state_indices[e] > 0
               && (c->checkpoint_offsets[e] < 1 || c->checkpoint_offsets[e] > c->num_tokens);
    }
    free(seen);
    return bad;
}

/* For the caller to find out whether it and this library were made for one another. */
int64_t kda_run_call_size(void) { return sizeof(kda_call); }

/* One step of a layer. 0 if done; otherwise nothing was written. */
int64_t kda_run(const kda_call *c) {
    if (check(c)) return 1;
    kda_task *task = kda_base_task;
#ifdef KDA_DISPATCH
    if (c->isa == ISA_AVX512) task = kda_avx512_task;
    if (c->isa == ISA_AVX2) task = kda_avx2_task;
#endif
    const int64_t heads = c->heads, count = c->num_sequences * heads;
    const int threads = (int)(count < c->threads ? count : c->threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#if defined(__x86_64__)
        /* Decayed state passes through denormals, slow on many chips and too small to matter: make them zero. */
        const unsigned control = _mm_getcsr();
        _mm_setcsr(control | 0x8040);
#endif
        /* Each thread takes its part of the heads of every sequence, so that long and short sequences balance;
         * the parts rotate from sequence to sequence, so that uneven parts do, too. */
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        for (int64_t n = 0; n < c->num_sequences; n++) {
            const int64_t part = (me + n) % team;
            for (int64_t head = heads * part / team; head < heads * (part + 1) / team; head++) task(c, n, head);
        }
#if defined(__x86_64__)
        _mm_setcsr(control);
#endif
    }
    return 0;
}
