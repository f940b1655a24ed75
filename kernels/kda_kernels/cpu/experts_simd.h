/* Experts: those that a token chose, weighted and summed, and a shared one's second half.
 *
 * Included once for each instruction set, as kda_simd.h.
 */

#include "panels.h"

/* Tokens of this thread: what experts multiply, as fp32; `total` zero. */
static void KDA(experts_prepare)(const experts_call *c, int64_t me, int64_t team) {
    const int64_t size = c->bf16 ? 2 : 4;
    const int bf16 = (int)c->bf16;
    for (int64_t t = c->tokens * me / team; t < c->tokens * (me + 1) / team; t++) {
        KDA(widen)(c->x + t * c->x_stride * size, c->width, bf16, c->wide + t * c->wide_stride, c->wide_stride);
        __builtin_memset(c->total + t * c->width, 0, c->width * sizeof(float));
        if (c->shared)
            KDA(widen)(c->shared_acts + t * c->shared * size, c->shared, bf16, c->shared_wide + t * c->shared_stride,
                       c->shared_stride);
    }
    for (int64_t p = c->tokens * c->top_k * me / team; p < c->tokens * c->top_k * (me + 1) / team; p++)
        for (int64_t i = c->inner; i < c->acts_stride; i++) c->acts[p * c->acts_stride + i] = 0;
}

/* This thread's part of the rows of every expert that was chosen: silu(gate x) (up x). */
static void KDA(experts_up)(const experts_call *c, int64_t me, int64_t team) {
    const float *x[TOKENS];
    float gate[TOKENS][PANEL], up[TOKENS][PANEL];
    const range mine = part_of(c->inner, me, team);
    for (int64_t e = 0; e < c->experts; e++)
        for (int64_t at = c->first[e]; at < c->first[e + 1]; at += TOKENS) {
            const int n = (int)(c->first[e + 1] - at < TOKENS ? c->first[e + 1] - at : TOKENS);
            for (int t = 0; t < n; t++) x[t] = c->wide + c->order[at + t] / c->top_k * c->wide_stride;
            const inputs in = KDA(group)(x, n, c->width);
            for (int64_t row = mine.begin; row < mine.end; row += PANEL) {
                const int rows = (int)(mine.end - row < PANEL ? mine.end - row : PANEL);
                KDA(product)(&in, &c->up, e * 2 * c->inner + row, c->width, rows, gate);
                KDA(product)(&in, &c->up, (e * 2 + 1) * c->inner + row, c->width, rows, up);
                for (int t = 0; t < n; t++)
                    for (int r = 0; r < rows; r++)
                        c->acts[c->order[at + t] * c->acts_stride + row + r] =
                            KDA(rounded)(KDA(splat)(KDA(gated)(gate[t][r], up[t][r])), (int)c->bf16)[0];
            }
        }
}

/* This thread's part of the output's columns: every token's experts in the order of their numbers, the shared last. */
static void KDA(experts_down)(const experts_call *c, int64_t me, int64_t team) {
    const float *x[TOKENS];
    float y[TOKENS][PANEL];
    const range mine = part_of(c->width, me, team);
    for (int64_t e = 0; e < c->experts; e++)
        for (int64_t at = c->first[e]; at < c->first[e + 1]; at += TOKENS) {
            const int n = (int)(c->first[e + 1] - at < TOKENS ? c->first[e + 1] - at : TOKENS);
            for (int t = 0; t < n; t++) x[t] = c->acts + c->order[at + t] * c->acts_stride;
            const inputs in = KDA(group)(x, n, c->inner);
            for (int64_t row = mine.begin; row < mine.end; row += PANEL) {
                const int rows = (int)(mine.end - row < PANEL ? mine.end - row : PANEL);
                KDA(product)(&in, &c->down, e * c->width + row, c->inner, rows, y);
                for (int t = 0; t < n; t++) {
                    const int64_t pair = c->order[at + t];
                    float *total = c->total + pair / c->top_k * c->width + row;
                    for (int r = 0; r < rows; r++) total[r] += c->weights[pair] * y[t][r];
                }
            }
        }
    for (int64_t first = 0; c->shared && first < c->tokens; first += TOKENS) {
        const int n = (int)(c->tokens - first < TOKENS ? c->tokens - first : TOKENS);
        for (int t = 0; t < n; t++) x[t] = c->shared_wide + (first + t) * c->shared_stride;
        const inputs in = KDA(group)(x, n, c->shared);
        for (int64_t row = mine.begin; row < mine.end; row += PANEL) {
            const int rows = (int)(mine.end - row < PANEL ? mine.end - row : PANEL);
            KDA(product)(&in, &c->shared_down, row, c->shared, rows, y);
            for (int t = 0; t < n; t++)
                for (int r = 0; r < rows; r++) c->total[(first + t) * c->width + row + r] += y[t][r];
        }
    }
    for (int64_t t = 0; t < c->tokens; t++)
        KDA(narrow)(c->total + t * c->width + mine.begin, mine.end - mine.begin, (int)c->bf16,
                    c->out + (t * c->width + mine.begin) * (c->bf16 ? 2 : 4));
}

#include "no_vector.h"
