/* Around the latent attention of decode tokens (docs/kda.md section 9): queries brought to the latents, the tokens' own
 * latents, normed, into the cache, and each head's value from its mix of latents.
 *
 * Included once for each instruction set, as kda_simd.h. The latent dimension is a multiple of CHANNELS.
 */

#include "panels.h"

/* CHANNELS channels of one head's query for up to 3 tokens. */
INLINE void KDA(absorb)(const latents_call *c, int64_t head, int64_t channel, int64_t first, int tokens, int bf16) {
    enum { VECTORS = CHANNELS / WIDTH };
    vec sums[3][VECTORS];
    const int64_t row = head * (c->nope + c->value), own = head * (c->nope + c->rope);
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < VECTORS; i++) sums[t][i] = (vec){0};
    for (int64_t n = 0; n < c->nope; n++)
        for (int t = 0; t < tokens; t++) {
            const vec q =
                KDA(splat)(KDA(read_one)(c->projected, (first + t) * c->projected_stride + own + n, bf16));
            for (int i = 0; i < VECTORS; i++)
                sums[t][i] = KDA(fma)(
                    KDA(read)(c->kv_b, (row + n) * c->latent + channel + i * WIDTH, bf16), q, sums[t][i]);
        }
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < VECTORS; i++)
            KDA(write)(c->query, ((first + t) * c->heads + head) * c->latent + channel + i * WIDTH, sums[t][i], bf16);
}

/* A token's latent, normed, and its shared key, to its slot. */
INLINE void KDA(keep)(const latents_call *c, int64_t token, int bf16) {
    const int64_t size = bf16 ? 2 : 4, slot = c->slots[token];
    const int64_t from = token * c->projected_stride + c->heads * (c->nope + c->rope);
    if (slot < 0) return;
    const int64_t to = slot / c->block_size * c->block_stride + slot % c->block_size * c->slot_stride;
    vec square = {0};
    for (int64_t i = 0; i < c->latent; i += WIDTH) {
        const vec x = KDA(read)(c->projected, from + i, bf16);
        square = KDA(fma)(x, x, square);
    }
    const float factor = 1.0f / __builtin_sqrtf(KDA(sum)(square)[0] / c->latent + (float)c->eps);
    for (int64_t i = 0; i < c->latent; i += WIDTH)
        KDA(write)(c->cache, to + i,
                   KDA(read)(c->projected, from + i, bf16) * factor * KDA(read)(c->norm_weight, i, bf16), bf16);
    __builtin_memcpy(c->cache + (to + c->latent) * size, c->projected + (from + c->latent) * size, c->rope * size);
}

static void KDA(latent_query)(const latents_call *c, int64_t me, int64_t team) {
    const int64_t pieces = c->latent / CHANNELS, count = c->heads * pieces;
    for (int64_t i = count * me / team; i < count * (me + 1) / team; i++)
        for (int64_t t = 0; t < c->tokens; t += 3) {
            const int n = (int)(c->tokens - t < 3 ? c->tokens - t : 3);
            const int64_t head = i / pieces, channel = i % pieces * CHANNELS;
            if (n == 3 && c->bf16) KDA(absorb)(c, head, channel, t, 3, 1);
            else if (n == 3) KDA(absorb)(c, head, channel, t, 3, 0);
            else
                for (int one = 0; one < n; one++) KDA(absorb)(c, head, channel, t + one, 1, (int)c->bf16);
        }
    for (int64_t t = c->tokens * me / team; t < c->tokens * (me + 1) / team; t++) KDA(keep)(c, t, (int)c->bf16);
}

static void KDA(latent_prepare)(const latents_call *c, int64_t me, int64_t team) {
    const int64_t count = c->tokens * c->heads;
    for (int64_t i = count * me / team; i < count * (me + 1) / team; i++) {
        const int64_t at = i / c->heads * c->token_stride + i % c->heads * c->head_stride;
        KDA(widen)(c->latents + at * (c->bf16 ? 2 : 4), c->latent, (int)c->bf16, c->wide + i * c->latent, c->latent);
    }
}

static void KDA(latent_value)(const latents_call *c, int64_t me, int64_t team) {
    const float *x[TOKENS];
    float y[TOKENS][PANEL];
    const int64_t panels = (c->value + PANEL - 1) / PANEL, count = c->heads * panels;
    const matrix kv_b = {c->kv_b, 0, c->bf16 ? BF16 : FP32, c->latent, 0, 0};
    for (int64_t first = 0; first < c->tokens; first += TOKENS) {
        const int n = (int)(c->tokens - first < TOKENS ? c->tokens - first : TOKENS);
        for (int64_t i = count * me / team; i < count * (me + 1) / team; i++) {
            const int64_t head = i / panels, row = i % panels * PANEL;
            const int rows = (int)(c->value - row < PANEL ? c->value - row : PANEL);
            for (int t = 0; t < n; t++) x[t] = c->wide + ((first + t) * c->heads + head) * c->latent;
            const inputs in = KDA(group)(x, n, c->latent);
            KDA(product)(&in, &kv_b, head * (c->nope + c->value) + c->nope + row, c->latent, rows, y);
            for (int t = 0; t < n; t++)
                for (int r = 0; r < rows; r++)
                    KDA(write_one)(c->out, ((first + t) * c->heads + head) * c->value + row + r, y[t][r],
                                   (int)c->bf16);
        }
    }
}

#include "no_vector.h"
