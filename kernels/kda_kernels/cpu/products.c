/* Entry point of products of tokens with a matrix.
 *
 * Built like kda.c: picks the instruction set, shares the work among threads. Each has its part of every stage.
 */
#include "products.h"

#include <omp.h>

#define KERNELS "products_simd.h"
#include "each_isa.h"

typedef struct {
    product_stage *prepare, *multiply_rows, *choose;
} stages;

#define STAGES(isa) ((stages){kda_##isa##_prepare, kda_##isa##_multiply_rows, kda_##isa##_choose})

static stages stages_of(int64_t isa) {
#ifdef KDA_DISPATCH
    if (isa == ISA_AVX512) return STAGES(avx512);
    if (isa == ISA_AVX2) return STAGES(avx2);
#else
    (void)isa;
#endif
    return STAGES(base);
}

int64_t kda_product_call_size(void) { return sizeof(product_call); }

/* 0. */
int64_t kda_product(const product_call *c) {
    const stages s = stages_of(c->isa);
    const int threads = team_of(c->threads, (double)c->tokens * c->width * (c->rows + 2 * c->pair_rows));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        if (c->wide) {
            s.prepare(c, me, team);
#pragma omp barrier
        }
        s.multiply_rows(c, me, team);
        if (c->bias) {
#pragma omp barrier
            s.choose(c, me, team);
        }
    }
    return 0;
}
