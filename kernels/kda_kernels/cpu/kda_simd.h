/* One head of KDA through the tokens of one sequence: docs/kda.md sections 2 to 5, in fp32.
 *
 * Included once for each instruction set, with WIDTH (lanes of a vector), KDA(name) and one of KDA_AVX512,
 * KDA_AVX2 or neither defined. Head dimensions are multiples of 16, so that no loop has a tail: every channel
 * goes through the same instructions. A value row of the state does not depend on the other rows, so it stays
 * in registers while it passes through a block of tokens; and each token does the same arithmetic in the same
 * order whatever block it falls in, so no split into chunks or batches changes a bit of the result.
 */

#include "vector.h"

/* ---- sections 2 and 3: from projections to the operands of the recurrence ---- */

/* weight [dim][kernel_size] of a layer's parameters -> [kernel_size][dim] in fp32 */
INLINE void KDA(transpose)(const char *base, int64_t first, int is_bf16, float *weight, int dim, int kernel_size) {
    float flat[MAX_KERNEL_SIZE * MAX_DIM] __attribute__((aligned(64)));
    if (is_bf16)
        for (int i = 0; i < dim * kernel_size; i += WIDTH) KDA(store)(flat + i, KDA(read)(base, first + i, 1));
    else
        for (int i = 0; i < dim * kernel_size; i += WIDTH) KDA(store)(flat + i, KDA(read)(base, first + i, 0));
    for (int i = 0; i < dim; i++)
        for (int tap = 0; tap < kernel_size; tap++) weight[tap * dim + i] = flat[i * kernel_size + tap];
}

/* y = silu(conv(window)): window [kernel_size-1 + n][dim], weight [kernel_size][dim], y [n][dim] */
INLINE void KDA(convolve)(const float *window, const float *weight, float *y, int n, int dim, int kernel_size) {
    for (int t = 0; t < n; t++)
        for (int i = 0; i < dim; i += WIDTH) {
            vec x = KDA(load)(window + t * dim + i) * KDA(load)(weight + i);
            for (int tap = 1; tap < kernel_size; tap++)
                x = KDA(fma)(KDA(load)(window + (t + tap) * dim + i), KDA(load)(weight + tap * dim + i), x);
            KDA(store)(y + t * dim + i, x * KDA(sigmoid)(x));
        }
}

/* x *= scale / sqrt(sum(x^2) + 1e-6) for each of n rows */
INLINE void KDA(normalise)(float *x, float scale, int n, int dim) {
    for (int t = 0; t < n; t++, x += dim) {
        vec square = {0};
        for (int i = 0; i < dim; i += WIDTH) square = KDA(fma)(KDA(load)(x + i), KDA(load)(x + i), square);
        float factor = scale / __builtin_sqrtf(KDA(sum)(square)[0] + 1e-6f);
        for (int i = 0; i < dim; i += WIDTH) KDA(store)(x + i, KDA(load)(x + i) * factor);
    }
}

/* ---- section 4: the recurrence ---- */

/* n tokens through the state of one head, read from `from` [dim][dim], left in S, which may be the same;
 * v [n][dim] is replaced by o.
 *
 * With k' = alpha k and q' = alpha q both products with the state can use S before its decay:
 *   e = beta (v - S k'),  S = alpha S + e k,  o = S q' + e (k.q),
 * so that the second product and the decay fill the time in which the first is summed up. */
INLINE void KDA(scan)(const float *from, float *S, const float *q, const float *k, const float *decayed_k,
                      const float *alpha, const float *beta, const float *kq, float *v, int n, int dim) {
    enum { ROWS = 2 };
    vec s[ROWS][MAX_DIM / WIDTH];
    const int width = dim / WIDTH;
    for (int row = 0; row < dim; row += ROWS) {
        const float *before = from + (int64_t)row * dim;
        float *after = S + (int64_t)row * dim;
        /* In decode the state comes from memory and the sums wait for it: ask early, for the second cache. */
        for (int i = 0; i < ROWS * dim; i += 16) __builtin_prefetch(before + 64 * dim + i, 0, 2);
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int i = 0; i < width; i++) s[r][i] = KDA(load)(before + r * dim + i * WIDTH);
        for (int t = 0; t < n; t++) {
            const int64_t at = (int64_t)t * dim;
            float *vt = v + at + row;
            vec dot[ROWS][2] = {{{0}}}, e[ROWS], o[ROWS][2] = {{{0}}};
#pragma GCC unroll 8
            for (int i = 0; i < width; i++) {
                const vec key = KDA(load)(decayed_k + at + i * WIDTH);
                for (int r = 0; r < ROWS; r++) dot[r][i & 1] = KDA(fma)(s[r][i], key, dot[r][i & 1]);
            }
            for (int r = 0; r < ROWS; r++) e[r] = beta[t] * (vt[r] - KDA(sum)(dot[r][0] + dot[r][1]));
#pragma GCC unroll 8
            for (int i = 0; i < width; i++) {
                const vec query = KDA(load)(q + at + i * WIDTH), a = KDA(load)(alpha + at + i * WIDTH);
                for (int r = 0; r < ROWS; r++) {
                    o[r][i & 1] = KDA(fma)(s[r][i], query, o[r][i & 1]);
                    s[r][i] *= a;
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < width; i++) {
                const vec key = KDA(load)(k + at + i * WIDTH);
                for (int r = 0; r < ROWS; r++) s[r][i] = KDA(fma)(e[r], key, s[r][i]);
            }
            for (int r = 0; r < ROWS; r++)
                vt[r] = KDA(fma)(e[r], KDA(splat)(kq[t]), KDA(sum)(o[r][0] + o[r][1]))[0];
        }
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int i = 0; i < width; i++) KDA(store)(after + r * dim + i * WIDTH, s[r][i]);
    }
}

/* Ask for `dim` elements from index i: a head's part of a token is too short for the hardware to see a pattern. */
INLINE void KDA(prefetch)(const char *base, int64_t i, int dim, int is_bf16) {
    const int size = is_bf16 ? 2 : 4;
    for (int byte = 0; byte < dim * size; byte += 64) __builtin_prefetch(base + i * size + byte);
}

/* ---- one head of one sequence, block by block ---- */

INLINE float *KDA(state_of)(const kda_call *c, int64_t state_index, int64_t head, int dim) {
    return c->recurrent + state_index * c->recurrent_state_stride + head * dim * dim;
}

/* The first kernel_size-1 rows of each part's window are the state of the convolution: store them. */
INLINE void KDA(store_conv_state)(const kda_call *c, float window[3][(MAX_KERNEL_SIZE - 1 + BLOCK) * MAX_DIM],
                                  int64_t state_index, int64_t head, int dim, int kernel_size, int bf16) {
    char *conv = c->conv + state_index * c->conv_state_stride * (bf16 ? 2 : 4);
    for (int part = 0; part < 3; part++)
        for (int row = 0; row < kernel_size - 1; row++)
            for (int i = 0; i < dim; i += WIDTH)
                KDA(write)(conv, row * c->conv_token_stride + (part * c->heads + head) * dim + i,
                           KDA(load)(window[part] + row * dim + i), bf16);
}

/* n, or fewer tokens if a state is to be kept between at and at + n. */
INLINE int KDA(until_checkpoint)(const kda_call *c, int64_t at, int n) {
    for (int64_t e = 0; e < c->num_checkpoints; e++)
        if (c->checkpoint_state_indices[e] > 0 && c->checkpoint_offsets[e] > at && c->checkpoint_offsets[e] < at + n)
            n = (int)(c->checkpoint_offsets[e] - at);
    return n;
}

INLINE void KDA(head)(const kda_call *c, int64_t sequence, int64_t head, int dim, int kernel_size, int bf16) {
    const int64_t start = c->cu_seqlens ? c->cu_seqlens[sequence] : sequence;
    const int64_t end = c->cu_seqlens ? c->cu_seqlens[sequence + 1] : sequence + 1;
    const int32_t *state_indices = c->state_indices + sequence * c->max_query_len;
    const int64_t width = c->heads * dim, first = head * dim;
    const size_t size = bf16 ? 2 : 4;
    if (state_indices[0] <= 0) {
        for (int64_t t = start; t < end; t++)
            __builtin_memset(c->out + (t * c->out_stride + first) * size, 0, dim * size);
        return;
    }
    if (c->num_accepted_tokens && start == end) return;
    const int has_initial_state = c->has_initial_state ? c->has_initial_state[sequence] : 1, past = kernel_size - 1;
    int64_t state_index = state_indices[0];
    const int64_t source = c->num_accepted_tokens ? state_indices[c->num_accepted_tokens[sequence] - 1] : state_index;
    float *S = KDA(state_of)(c, state_index, head, dim);
    const float *from = KDA(state_of)(c, source, head, dim);
    const char *conv = c->conv + source * c->conv_state_stride * size;

    float window[3][(MAX_KERNEL_SIZE - 1 + BLOCK) * MAX_DIM] __attribute__((aligned(64)));
    float weight[3][MAX_KERNEL_SIZE * MAX_DIM] __attribute__((aligned(64)));
    float qkv[3][BLOCK * MAX_DIM] __attribute__((aligned(64)));
    float alpha[BLOCK * MAX_DIM] __attribute__((aligned(64)));
    float decayed_k[BLOCK * MAX_DIM] __attribute__((aligned(64)));
    float beta[BLOCK], kq[BLOCK];

    if (!has_initial_state) __builtin_memset(S, 0, sizeof(float) * dim * dim);
    for (int part = 0; part < 3; part++) {
        const int64_t channel = part * width + first;
        for (int row = 0; row < past; row++)
            for (int i = 0; i < dim; i += WIDTH)
                KDA(store)(window[part] + row * dim + i,
                           has_initial_state ? KDA(read)(conv, row * c->conv_token_stride + channel + i, bf16)
                                             : (vec){0});
        KDA(transpose)(c->conv_weight, channel * kernel_size, c->conv_weight_bf16, weight[part], dim, kernel_size);
    }
    const vec rate = -KDA(exp)(KDA(splat)(c->A_log[head]));
    const float scale = 1.0f / __builtin_sqrtf((float)dim), eps = (float)c->norm_eps;

    int n;
    for (int64_t at = start; at < end; at += n) {
        n = KDA(until_checkpoint)(c, at, end - at < BLOCK ? (int)(end - at) : BLOCK);
        if (c->num_accepted_tokens) { /* a state for each token */
            n = 1;
            state_index = state_indices[at - start];
            S = KDA(state_of)(c, state_index, head, dim);
        }
        for (int part = 0; part < 3; part++) {
            float *fresh = window[part] + past * dim;
            for (int t = 0; t < n; t++)
                for (int i = 0; i < dim; i += WIDTH)
                    KDA(store)(fresh + t * dim + i,
                               KDA(read)(c->qkv, (at + t) * c->qkv_stride + part * width + first + i, bf16));
            KDA(convolve)(window[part], weight[part], qkv[part], n, dim, kernel_size);
            __builtin_memmove(window[part], window[part] + n * dim, sizeof(float) * past * dim);
        }
        for (int t = 0; t < n; t++) KDA(prefetch)(c->output_gate, (at + t) * c->output_gate_stride + first, dim, bf16);
        for (int64_t t = at + n; t < end && t < at + n + BLOCK; t++) {
            KDA(prefetch)(c->g, t * c->g_stride + first, dim, bf16);
            for (int part = 0; part < 3; part++)
                KDA(prefetch)(c->qkv, t * c->qkv_stride + part * width + first, dim, bf16);
        }
        KDA(normalise)(qkv[0], scale, n, dim);
        KDA(normalise)(qkv[1], 1.0f, n, dim);
        for (int t = 0; t < n; t++) {
            vec product = {0};
            for (int i = 0; i < dim; i += WIDTH) {
                vec z = KDA(read)(c->g, (at + t) * c->g_stride + first + i, bf16)
                        + KDA(load)(c->dt_bias + first + i);
                vec a = KDA(exp)(rate * KDA(softplus)(z));
                vec q = KDA(load)(qkv[0] + t * dim + i), k = KDA(load)(qkv[1] + t * dim + i);
                product = KDA(fma)(q, k, product);
                KDA(store)(alpha + t * dim + i, a);
                KDA(store)(qkv[0] + t * dim + i, a * q);
                KDA(store)(decayed_k + t * dim + i, a * k);
            }
            kq[t] = KDA(sum)(product)[0];
            beta[t] = KDA(sigmoid)(KDA(splat)(KDA(read_one)(c->beta, (at + t) * c->beta_stride + head, bf16)))[0];
        }
        KDA(scan)(from, S, qkv[0], qkv[1], decayed_k, alpha, beta, kq, qkv[2], n, dim);
        for (int t = 0; t < n; t++) { /* section 5 */
            const float *o = qkv[2] + t * dim;
            vec square = {0};
            for (int i = 0; i < dim; i += WIDTH) square = KDA(fma)(KDA(load)(o + i), KDA(load)(o + i), square);
            const float factor = 1.0f / __builtin_sqrtf(KDA(sum)(square)[0] / dim + eps);
            for (int i = 0; i < dim; i += WIDTH) {
                vec gate = KDA(sigmoid)(KDA(read)(c->output_gate, (at + t) * c->output_gate_stride + first + i, bf16));
                vec norm = c->norm_weight_bf16 ? KDA(read)(c->norm_weight, i, 1) : KDA(read)(c->norm_weight, i, 0);
                KDA(write)(c->out, (at + t) * c->out_stride + first + i, KDA(load)(o + i) * factor * norm * gate,
                           bf16);
            }
        }
        from = S;
        if (c->num_accepted_tokens) KDA(store_conv_state)(c, window, state_index, head, dim, kernel_size, bf16);
        for (int64_t e = 0; e < c->num_checkpoints; e++)
            if (c->checkpoint_offsets[e] == at + n && c->checkpoint_state_indices[e] > 0) {
                float *kept = KDA(state_of)(c, c->checkpoint_state_indices[e], head, dim);
                __builtin_memcpy(kept, S, sizeof(float) * dim * dim);
                KDA(store_conv_state)(c, window, c->checkpoint_state_indices[e], head, dim, kernel_size, bf16);
            }
    }
    if (!c->num_accepted_tokens) KDA(store_conv_state)(c, window, state_index, head, dim, kernel_size, bf16);
}

/* Common shapes get code of their own; the last line serves the rest. */
static void KDA(task)(const kda_call *c, int64_t sequence, int64_t head) {
    const int dim = (int)c->dim, kernel_size = (int)c->conv_kernel_size, bf16 = (int)c->inputs_bf16;
    if (dim == 128 && kernel_size == 4 && bf16) KDA(head)(c, sequence, head, 128, 4, 1);
    else if (dim == 128 && kernel_size == 4) KDA(head)(c, sequence, head, 128, 4, 0);
    else if (dim == 64 && kernel_size == 4 && bf16) KDA(head)(c, sequence, head, 64, 4, 1);
    else if (dim == 64 && kernel_size == 4) KDA(head)(c, sequence, head, 64, 4, 0);
    else KDA(head)(c, sequence, head, dim, kernel_size, bf16);
}

#include "no_vector.h"
