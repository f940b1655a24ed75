/* Vectors of WIDTH floats, and what plain vector arithmetic does not give.
 *
 * Included by the kernels of each instruction set, with WIDTH (lanes of a vector), KDA(name) and one of KDA_AVX512,
 * KDA_AVX2 or neither defined; `no_vector.h` takes the macros away again.
 */

#define INLINE static inline __attribute__((always_inline))

typedef float KDA(vec) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint32_t KDA(bits) __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint8_t KDA(quarter) __attribute__((vector_size(WIDTH), aligned(1), may_alias));
typedef uint16_t KDA(half) __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
#define vec KDA(vec)
#define bits KDA(bits)
#define half KDA(half)
#define quarter KDA(quarter)

/* ---- the few operations that plain vector arithmetic does not give ---- */

INLINE vec KDA(splat)(float x) { return x - (vec){0}; }

#if defined(KDA_AVX512)
INLINE vec KDA(fma)(vec a, vec b, vec c) { return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
/* min and max give their second argument when one is NaN */
INLINE vec KDA(min)(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vec KDA(max)(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
/* the sum of all lanes, in every lane */
INLINE vec KDA(sum)(vec a) {
    __m512 x = (__m512)a;
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4E));
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xB1));
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4E));
    return (vec)_mm512_add_ps(x, _mm512_permute_ps(x, 0xB1));
}
#elif defined(KDA_AVX2)
INLINE vec KDA(fma)(vec a, vec b, vec c) { return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vec KDA(min)(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vec KDA(max)(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vec KDA(sum)(vec a) {
    __m256 x = (__m256)a;
    x = _mm256_add_ps(x, _mm256_permute2f128_ps(x, x, 1));
    x = _mm256_add_ps(x, _mm256_permute_ps(x, 0x4E));
    return (vec)_mm256_add_ps(x, _mm256_permute_ps(x, 0xB1));
}
#else
INLINE vec KDA(fma)(vec a, vec b, vec c) { return a * b + c; }
INLINE vec KDA(select)(bits mask, vec yes, vec no) { return (vec)((mask & (bits)yes) | (~mask & (bits)no)); }
INLINE vec KDA(min)(vec a, vec b) { return KDA(select)((bits)(a < b), a, b); }
INLINE vec KDA(max)(vec a, vec b) { return KDA(select)((bits)(a > b), a, b); }
INLINE vec KDA(sum)(vec a) { return KDA(splat)((a[0] + a[2]) + (a[1] + a[3])); }
#endif

INLINE vec KDA(load)(const float *p) { return *(const vec *)p; }
INLINE void KDA(store)(float *p, vec x) { *(vec *)p = x; }

/* WIDTH elements from index i of an array of bf16 or fp32 */
INLINE vec KDA(read)(const char *base, int64_t i, int is_bf16) {
    if (!is_bf16) return *(const vec *)((const float *)base + i);
#if defined(KDA_AVX512)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(base + 2 * i))), 16);
#elif defined(KDA_AVX2)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(base + 2 * i))), 16);
#else
    return (vec)(__builtin_convertvector(*(const half *)((const uint16_t *)base + i), bits) << 16);
#endif
}

/* As `read`, of weights in 8 and 4 bits, times their scale, rounded once. `scale` is what `scale_*` makes of it. */

/* e4m3; not a number counts as 480. Its bits are those of an fp16 2^8 times smaller, or of an fp32 2^120 times smaller, of
 * which the smallest are slow to multiply. */
INLINE vec KDA(read_fp8)(const char *p, vec scale) {
#if defined(KDA_AVX512)
    const __m256i x = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p)), 7);
    return (vec)_mm512_cvtph_ps(_mm256_and_si256(x, _mm256_set1_epi16((short)0xBF80))) * scale;
#elif defined(KDA_AVX2)
    const __m128i x = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const void *)p)), 7);
    return (vec)_mm256_cvtph_ps(_mm_and_si128(x, _mm_set1_epi16((short)0xBF80))) * scale;
#else
    const bits x = __builtin_convertvector(*(const quarter *)p, bits);
    return (vec)((x & 0x80) << 24 | (x & 0x7F) << 20) * 0x1p112f * scale;
#endif
}

INLINE vec KDA(scale_fp8)(float scale) { return KDA(splat)(scale * 0x1p8f); }

INLINE vec KDA(read_int8)(const char *p, vec scale) {
#if defined(KDA_AVX512)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p))) * scale;
#elif defined(KDA_AVX2)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p))) * scale;
#else
    typedef int32_t wide __attribute__((vector_size(4 * WIDTH)));
    return __builtin_convertvector((wide)(__builtin_convertvector(*(const quarter *)p, bits) << 24) >> 24, vec) * scale;
#endif
}

/* With AVX-512 `scale` holds what each of the sixteen integers stands for. */
INLINE vec KDA(read_int4)(const char *p, vec scale) {
#if defined(KDA_AVX512)
    const __m512i place = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i pair = _mm512_broadcastq_epi64(_mm_loadl_epi64((const void *)p));
    const __m512i each = _mm512_permutexvar_epi32(_mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0), pair);
    return (vec)_mm512_permutexvar_ps(_mm512_srlv_epi32(each, place), (__m512)scale);
#elif defined(KDA_AVX2)
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    const __m256i x = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0));
    return KDA(fma)((vec)_mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(15))), scale, scale * -8.0f);
#else
    uint16_t word;
    __builtin_memcpy(&word, p, 2);
    const bits x = {word, word, word, word}, place = {0, 4, 8, 12};
    typedef int32_t wide __attribute__((vector_size(4 * WIDTH)));
    return (__builtin_convertvector((wide)(x >> place & 15), vec) - 8.0f) * scale;
#endif
}

INLINE vec KDA(scale_int4)(float scale) {
#if defined(KDA_AVX512)
    return (vec){-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7} * scale;
#else
    return KDA(splat)(scale);
#endif
}

/* to nearest, ties to even; in the low half of each lane */
INLINE bits KDA(to_bf16)(vec x) {
    bits b = (bits)x, nan = (bits)(x != x);
    bits rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
    return (nan & 0x7FC0) | (~nan & rounded);
}

INLINE vec KDA(rounded)(vec x, int is_bf16) { return is_bf16 ? (vec)(KDA(to_bf16)(x) << 16) : x; }

INLINE void KDA(write)(char *base, int64_t i, vec x, int is_bf16) {
    if (is_bf16) *(half *)((uint16_t *)base + i) = __builtin_convertvector(KDA(to_bf16)(x), half);
    else *(vec *)((float *)base + i) = x;
}

INLINE void KDA(write_one)(char *base, int64_t i, float x, int is_bf16) {
    if (is_bf16) ((uint16_t *)base)[i] = (uint16_t)KDA(to_bf16)(KDA(splat)(x))[0];
    else ((float *)base)[i] = x;
}

INLINE float KDA(read_one)(const char *base, int64_t i, int is_bf16) {
    if (!is_bf16) return ((const float *)base)[i];
    union { uint32_t u; float f; } x = {(uint32_t)((const uint16_t *)base)[i] << 16};
    return x.f;
}

/* ---- elementary functions, right to 3 units in the last place ---- */

/* e^x; 0 below -87.7, at least 1.6e38 above 88, NaN for NaN */
INLINE vec KDA(exp)(vec x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, kept in the low bits */
    x = KDA(max)(KDA(splat)(-88.0f), KDA(min)(KDA(splat)(88.0f), x));
    vec shifted = KDA(fma)(x, KDA(splat)(1.44269504f), KDA(splat)(shift));
    vec n = shifted - shift;
    vec r = KDA(fma)(n, KDA(splat)(-0.693359375f), x); /* ln 2 in two parts, the first exact in few bits */
    r = KDA(fma)(n, KDA(splat)(2.12194440e-4f), r);
    vec p = KDA(splat)(0.0013814538f);
    p = KDA(fma)(p, r, KDA(splat)(0.008368745f));
    p = KDA(fma)(p, r, KDA(splat)(0.04166839f));
    p = KDA(fma)(p, r, KDA(splat)(0.16666521f));
    p = KDA(fma)(p, r, KDA(splat)(0.49999994f));
    p = KDA(fma)(p * r, r, r) + 1.0f;
    bits exponent = (bits)shifted + 127; /* the shift's own bits fall out at the top */
    return p * (vec)(exponent << 23);
}

INLINE vec KDA(sigmoid)(vec x) { return 1.0f / (1.0f + KDA(exp)(-x)); }

/* log(1 + e^x) = max(x, 0) + log1p(u) with u = e^-|x|, and log1p(u) = 2 artanh(u / (2 + u)) */
INLINE vec KDA(softplus)(vec x) {
    vec u = KDA(exp)(-(vec)((bits)x & 0x7FFFFFFF));
    vec s = u / (2.0f + u), w = s * s;
    vec p = KDA(splat)(0.2803128f);
    p = KDA(fma)(p, w, KDA(splat)(0.27997863f));
    p = KDA(fma)(p, w, KDA(splat)(0.4002177f));
    p = KDA(fma)(p, w, KDA(splat)(0.6666641f));
    return KDA(max)(KDA(splat)(0.0f), x) + KDA(fma)(s * w, p, s + s);
}
