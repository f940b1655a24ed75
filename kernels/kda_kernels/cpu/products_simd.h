/* Products of tokens with a matrix, normed before where asked; gated pairs of them; the choice of experts.
 *
 * Included once for each instruction set, as kda_simd.h.
 */

#include "panels.h"

/* Tokens of this thread: x as fp32, with its residual added, normed. Rows of `wide` are whole vectors; what lies behind
 * a row's end is zero and stays so. */
static void KDA(prepare)(const product_call *c, int64_t me, int64_t team) {
    const int64_t size = c->bf16 ? 2 : 4, width = c->width;
    const int bf16 = (int)c->bf16;
    for (int64_t t = c->tokens * me / team; t < c->tokens * (me + 1) / team; t++) {
        float *wide = c->wide + t * c->wide_stride, *more = c->wide + (c->tokens + me) * c->wide_stride;
        KDA(widen)(c->x + t * c->x_stride * size, width, bf16, wide, c->wide_stride);
        if (c->residual) {
            KDA(widen)(c->residual + t * c->residual_stride * size, width, bf16, more, c->wide_stride);
            for (int64_t i = 0; i < width; i += WIDTH)
                KDA(store)(wide + i, KDA(rounded)(KDA(load)(wide + i) + KDA(load)(more + i), bf16));
        }
        if (c->total) KDA(narrow)(wide, width, bf16, c->total + t * width * size);
        if (!c->norm_weight) continue;
        vec square = {0};
        for (int64_t i = 0; i < width; i += WIDTH)
            square = KDA(fma)(KDA(load)(wide + i), KDA(load)(wide + i), square);
        const float factor = 1.0f / __builtin_sqrtf(KDA(sum)(square)[0] / width + (float)c->eps);
        KDA(widen)(c->norm_weight, width, bf16, more, c->wide_stride);
        for (int64_t i = 0; i < width; i += WIDTH)
            KDA(store)(wide + i, KDA(rounded)(KDA(load)(wide + i) * factor * KDA(load)(more + i), bf16));
        if (c->normed) KDA(narrow)(wide, width, bf16, c->normed + t * width * size);
    }
}

/* Rows of this thread. */
static void KDA(multiply_rows)(const product_call *c, int64_t me, int64_t team) {
    const float *x[TOKENS];
    float y[TOKENS][PANEL], up[TOKENS][PANEL];
    const range single = part_of(c->weight.data ? c->rows : 0, me, team);
    const range pair = part_of(c->pair.data ? c->pair_rows : 0, me, team);
    for (int64_t first = 0; first < c->tokens; first += TOKENS) {
        const int n = (int)(c->tokens - first < TOKENS ? c->tokens - first : TOKENS);
        for (int t = 0; t < n; t++)
            x[t] = c->wide ? c->wide + (first + t) * c->wide_stride : (const float *)c->x + (first + t) * c->x_stride;
        const inputs in = KDA(group)(x, n, c->width);
        for (int64_t row = single.begin; row < single.end; row += PANEL) {
            const int rows = (int)(single.end - row < PANEL ? single.end - row : PANEL);
            KDA(product)(&in, &c->weight, row, c->width, rows, y);
            for (int t = 0; t < n; t++)
                for (int r = 0; r < rows; r++)
                    KDA(write_one)(c->out, (first + t) * c->out_stride + row + r, y[t][r], (int)c->out_bf16);
        }
        for (int64_t row = pair.begin; row < pair.end; row += PANEL) {
            const int rows = (int)(pair.end - row < PANEL ? pair.end - row : PANEL);
            KDA(product)(&in, &c->pair, row, c->width, rows, y);
            KDA(product)(&in, &c->pair, c->pair_rows + row, c->width, rows, up);
            for (int t = 0; t < n; t++)
                for (int r = 0; r < rows; r++)
                    KDA(write_one)(c->acts, (first + t) * c->pair_rows + row + r, KDA(gated)(y[t][r], up[t][r]),
                                   (int)c->bf16);
        }
    }
}

/* The top_k rows of the largest score + bias, of equals the first, weighted by their scores: docs/kda.md section 9.
 * `out` has the logits in fp32. What is not a number counts as 0. */
static void KDA(choose)(const product_call *c, int64_t me, int64_t team) {
    for (int64_t t = c->tokens * me / team; t < c->tokens * (me + 1) / team; t++) {
        float *score = (float *)c->out + t * c->out_stride, *weights = c->weights + t * c->top_k, total = 0;
        int32_t *ids = c->ids + t * c->top_k;
        for (int64_t e = 0; e < c->rows; e++) {
            const float s = KDA(sigmoid)(KDA(splat)(score[e]))[0];
            score[e] = s == s ? s : 0;
        }
        for (int64_t i = 0; i < c->top_k; i++) {
            int64_t best = -1;
            for (int64_t e = 0; e < c->rows; e++) {
                int taken = 0;
                for (int64_t j = 0; j < i; j++) taken |= ids[j] == e;
                if (!taken && (best < 0 || score[e] + c->bias[e] > score[best] + c->bias[best])) best = e;
            }
            ids[i] = (int32_t)best;
            total += weights[i] = score[best];
        }
        for (int64_t i = 0; i < c->top_k; i++)
            weights[i] = (c->renormalize ? weights[i] / (total + 1e-20f) : weights[i]) * (float)c->scale;
    }
}

#include "no_vector.h"
