/* What the C code of this package shares: a clamp, dtypes, threads, and instruction sets for code that is compiled for each. */

#ifndef AUTO_ROUND_COMPILED_H
#define AUTO_ROUND_COMPILED_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

enum { FLOAT32, BFLOAT16, FLOAT16 };

INLINE float clamped(float level, float most) { return level < 0 ? 0 : level > most ? most : level; }

/* ---- dtypes; rounding is to nearest, ties to even ---- */

INLINE float bits_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
INLINE uint32_t float_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

INLINE float half_to_float(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
    float value = bits_float(magnitude) * 0x1p112f;
    uint32_t special = (h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : float_bits(value);
    return bits_float(special | (uint32_t)(h & 0x8000) << 16);
}

INLINE uint16_t float_to_half(float f) {
    uint32_t u = float_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    uint32_t tiny = float_bits(bits_float(a) + 0.5f) - 0x3f000000u;
    uint32_t normal = (a + 0xc8000fffu + (a >> 13 & 1)) >> 13;
    uint32_t huge = a > 0x7f800000u ? 0x7e00 : 0x7c00;
    return (uint16_t)(sign | (a < 0x38800000u ? tiny : a < 0x477ff000u ? normal : huge));
}

INLINE uint16_t float_to_bfloat(float f) {
    uint32_t u = float_bits(f);
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000u ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}

INLINE void load_floats(float *to, const void *from, int64_t at, int64_t count, int dtype) {
    if (dtype == FLOAT32) memcpy(to, (const float *)from + at, (size_t)count * 4);
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = bits_float((uint32_t)((const uint16_t *)from)[at + i] << 16);
    else
        for (int64_t i = 0; i < count; i++) to[i] = half_to_float(((const uint16_t *)from)[at + i]);
}

INLINE void store_floats(void *to, int64_t at, const float *from, int64_t count, int dtype) {
    if (dtype == FLOAT32) memcpy((float *)to + at, from, (size_t)count * 4);
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[at + i] = float_to_bfloat(from[i]);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[at + i] = float_to_half(from[i]);
}

/* ---- threads ---- */

/* The parallel region of the OpenMP runtime that torch has loaded, so that one pool of threads serves both. */
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));

INLINE void in_threads(void (*run)(void *), void *job, int threads) {
    if (threads > 1 && GOMP_parallel) GOMP_parallel(run, job, (unsigned)threads, 0);
    else run(job);
}

/* ---- instruction sets ---- */

#if defined(__x86_64__) && defined(__GNUC__)
#define FOR_AVX2 __attribute__((target("avx2,fma")))
#ifdef __clang__
#define WHOLE_VECTORS "" /* gcc's word for it would void the attribute */
#else
#define WHOLE_VECTORS ",prefer-vector-width=512"
#endif
#define FOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,fma" WHOLE_VECTORS)))

/* How many paths this CPU can take: plain C, AVX2 with FMA, AVX-512. */
INLINE int paths_of_this_cpu(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") ? 3 : 2;
}
#else
#define FOR_AVX2
#define FOR_AVX512
INLINE int paths_of_this_cpu(void) { return 1; }
#endif

#endif
