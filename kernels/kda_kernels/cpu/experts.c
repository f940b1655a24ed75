/* Entry point of a mixture of experts.
 *
 * Built like kda.c: picks the instruction set, shares the work among threads. Each has its part of every stage.
 */
#include "experts.h"

#include <omp.h>

#define KERNELS "experts_simd.h"
#include "each_isa.h"

typedef struct {
    experts_stage *experts_prepare, *experts_up, *experts_down;
} stages;

#define STAGES(isa) ((stages){kda_##isa##_experts_prepare, kda_##isa##_experts_up, kda_##isa##_experts_down})

static stages stages_of(int64_t isa) {
#ifdef KDA_DISPATCH
    if (isa == ISA_AVX512) return STAGES(avx512);
    if (isa == ISA_AVX2) return STAGES(avx2);
#else
    (void)isa;
#endif
    return STAGES(base);
}

int64_t kda_experts_call_size(void) { return sizeof(experts_call); }

/* order: the pairs of tokens and choices by expert, those of expert e from first[e] to first[e + 1]. */
static void sort(const experts_call *c) {
    const int64_t pairs = c->tokens * c->top_k;
    for (int64_t e = 0; e <= c->experts; e++) c->first[e] = 0;
    for (int64_t p = 0; p < pairs; p++)
        if (c->ids[p] >= 0 && c->ids[p] < c->experts) c->first[c->ids[p]]++;
    int32_t end = 0;
    for (int64_t e = 0; e <= c->experts; e++) {
        end += c->first[e];
        c->first[e] = end;
    }
    for (int64_t p = pairs - 1; p >= 0; p--)
        if (c->ids[p] >= 0 && c->ids[p] < c->experts) c->order[--c->first[c->ids[p]]] = (int32_t)p;
}

/* 0. */
int64_t kda_experts(const experts_call *c) {
    const stages s = stages_of(c->isa);
    sort(c);
    const int threads = team_of(c->threads, (double)c->tokens * c->width * (3 * c->inner * c->top_k + c->shared));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        s.experts_prepare(c, me, team);
#pragma omp barrier
        s.experts_up(c, me, team);
#pragma omp barrier
        s.experts_down(c, me, team);
    }
    return 0;
}
