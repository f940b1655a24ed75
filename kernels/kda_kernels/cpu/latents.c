/* Entry point of what stands around latent attention.
 *
 * Built like kda.c: picks the instruction set, shares the work among threads. Each has its part of every stage.
 */
#include "latents.h"

#include <omp.h>

#define KERNELS "latents_simd.h"
#include "each_isa.h"

typedef struct {
    latents_stage *latent_query, *latent_prepare, *latent_value;
} stages;

#define STAGES(isa) ((stages){kda_##isa##_latent_query, kda_##isa##_latent_prepare, kda_##isa##_latent_value})

static stages stages_of(int64_t isa) {
#ifdef KDA_DISPATCH
    if (isa == ISA_AVX512) return STAGES(avx512);
    if (isa == ISA_AVX2) return STAGES(avx2);
#else
    (void)isa;
#endif
    return STAGES(base);
}

int64_t kda_latents_call_size(void) { return sizeof(latents_call); }

/* The queries and the cache if `projected` is there, the values if not. 0. */
int64_t kda_latents(const latents_call *c) {
    const stages s = stages_of(c->isa);
    const int threads = team_of(c->threads, (double)c->tokens * c->heads * c->latent * c->value);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        if (c->projected) {
            s.latent_query(c, me, team);
        } else {
            s.latent_prepare(c, me, team);
#pragma omp barrier
            s.latent_value(c, me, team);
        }
    }
    return 0;
}
