/* Includes KERNELS once for each instruction set: with WIDTH, KDA(name) and KDA_AVX512 or KDA_AVX2 where it is one. */
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KDA_DISPATCH 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#define KDA(name) kda_avx512_##name
#define WIDTH 16
#define KDA_AVX512
#include KERNELS
#undef KDA_AVX512
#undef WIDTH
#undef KDA
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define KDA(name) kda_avx2_##name
#define WIDTH 8
#define KDA_AVX2
#include KERNELS
#undef KDA_AVX2
#undef WIDTH
#undef KDA
#pragma GCC pop_options
#endif

#define KDA(name) kda_base_##name
#define WIDTH 4
#include KERNELS
#undef WIDTH
#undef KDA

enum { ISA_BASE = 1, ISA_AVX2 = 2, ISA_AVX512 = 3 };
