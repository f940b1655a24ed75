/* What kernels need around products of rows, and the products themselves, which `panels.c` has.
 *
 * Included once for each instruction set.
 */

#include "vector.h"

/* Tokens as the products take them; what `grouped` names holds until the next call of this thread. */
__attribute__((visibility("hidden"))) inputs KDA(group)(const float *const *x, int tokens, int64_t width);

/* y[token][row] for `rows` (1 to PANEL) rows of W from row `first` on. */
__attribute__((visibility("hidden"))) void KDA(product)(const inputs *in, const matrix *w, int64_t first,
                                                        int64_t width, int rows, float (*y)[PANEL]);

INLINE float KDA(gated)(float gate, float up) { return gate * KDA(sigmoid)(KDA(splat)(gate))[0] * up; }

/* A row as fp32, with zeros behind it. */
INLINE void KDA(widen)(const char *row, int64_t width, int bf16, float *wide, int64_t stride) {
    int64_t i = 0;
    for (; i + WIDTH <= width; i += WIDTH) KDA(store)(wide + i, KDA(read)(row, i, bf16));
    for (; i < width; i++) wide[i] = KDA(read_one)(row, i, bf16);
    for (; i < stride; i++) wide[i] = 0;
}

/* And back. */
INLINE void KDA(narrow)(const float *wide, int64_t width, int bf16, char *row) {
    int64_t i = 0;
    for (; i + WIDTH <= width; i += WIDTH) KDA(write)(row, i, KDA(load)(wide + i), bf16);
    for (; i < width; i++) KDA(write_one)(row, i, wide[i], bf16);
}
