/* Products of activations with packed 2, 3, 4 and 8-bit weights on CPUs. A plain C ABI; needs neither Python nor torch.

   y[m, o] = sum_i x[m, i] * scale[o, g] * (code[o, i] - zero[o, g]) + bias[o],   g = i / group width

   Weights lie in tiles of 32 outputs. A group of inputs is padded to whole units and cut into segments of at most 128:
     codes   [tile][segment][unit][bytes], a vector being 32 outputs x 4 inputs = 128 bytes:
       8 bits  unit  4 inputs: 1 vector
       4 bits  unit  8 inputs: 1 vector, input quad q in bits 4q
       2 bits  unit 16 inputs: 1 vector, input quad q in bits 2q
       3 bits  unit 32 inputs: 2 vectors with the low two bits as above, 1 vector with the third bit of quad q in bit q
     scales  float16 [tile][group][32]      zeros  uint8 [tile][group][32], or none: 2^(bits-1) throughout

   Activations become fixed point, per token and segment: x = step * sum_p digit[p] * 128^(planes-1-p), digits in -64..63.
   Two planes keep 13 bits and the sign, three keep 20 (float32). All products and sums within a segment are exact.
   |digit| <= 64 and codes <= 255 fit what the 16-bit pair sums of AVX2 hold: 2 * 255 * 64 < 2^15.               */

#include "compiled.h"

#include <math.h>
#include <stdlib.h>

#define ABI 2
#define TILE 32
#define VECTOR 128
#define SEGMENT 128
#define MAX_PLANES 3
#define TOKEN_BLOCK 64
#define STREAMS 4  /* most tiles read in turns */
#define AHEAD 2048 /* bytes prefetched before they are needed */
#define TOTALS MAX(TOKEN_BLOCK, 8 * STREAMS)

enum { PLAIN, AVX2, AVXVNNI, AVX512 };

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <cpuid.h>
#include <immintrin.h>
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define VNNI_256 1
#else
#define VNNI_256 0
#endif
#endif

typedef struct {
    const void *x, *bias;
    const uint8_t *codes, *zeros;
    const uint16_t *scales;
    void *y;
    int64_t tokens, inputs, outputs, width;
    int bits, dtype, isa, planes, streams;
    int64_t groups, segments, padded, tile_bytes; /* of one row of tiles */
    int8_t *digits;                               /* [token][plane][padded] */
    int32_t *sums;                                /* [token][plane][segment] */
    float *steps;                                 /* [token][segment] */
    int64_t bands, next_token, next_item;         /* threads claim a token, later a band of tiles */
} Job;

INLINE int64_t tiles_of(const Job *job) { return (job->outputs + TILE - 1) / TILE; }

INLINE int unit_of(int bits) { return bits == 3 ? 32 : 32 / bits; }

/* Inputs of a group after padding, a whole number of units. */
INLINE int64_t padded_group(int64_t inputs, int bits) { return (inputs + unit_of(bits) - 1) / unit_of(bits) * unit_of(bits); }

/* ---- activations to fixed point ---- */

/* One segment: its digits, the sum of each plane's digits, its step. Infinity or NaN makes the step NaN. */
INLINE void fix_segment(const Job *job, const float *x, int64_t count, int64_t padded, int8_t *digits, int32_t *sums, float *step) {
    const int planes = job->planes;
    const float limit = planes == 3 ? 63 * 16384 + 63 * 128 + 63 : 63 * 128 + 63;
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t a = float_bits(x[i]) & 0x7fffffff;
        most = a > most ? a : most;
    }
    const float largest = bits_float(most);
    const int usable = most < 0x7f800000u && largest > 0x1p-100f;
    const float inverse = usable ? limit / largest : 0;
    int32_t v[SEGMENT];
    /* Adding 1.5 * 2^23 rounds to nearest and leaves the integer in the low bits. */
    for (int64_t i = 0; i < count; i++) v[i] = usable ? (int32_t)(float_bits(x[i] * inverse + 0x1.8p23f) - 0x4b400000u) : 0;
    for (int64_t i = count; i < padded; i++) v[i] = 0;
    for (int p = planes - 1; p >= 0; p--) {
        int8_t *restrict to = digits + p * job->padded; /* what is stored must not seem to change `job` */
        int32_t sum = 0;
        for (int64_t i = 0; i < padded; i++) {
            const int32_t rest = p ? (v[i] + 64) >> 7 : 0, digit = v[i] - rest * 128;
            to[i] = (int8_t)digit;
            sum += digit;
            v[i] = rest;
        }
        sums[p * job->segments] = sum;
    }
    *step = most >= 0x7f800000u ? NAN : largest / limit;
}

INLINE void fix_token(const Job *job, int64_t token) {
    float x[SEGMENT];
    int8_t *digits = job->digits + token * job->planes * job->padded;
    int32_t *sums = job->sums + token * job->planes * job->segments;
    float *steps = job->steps + token * job->segments;
    for (int64_t begin = 0; begin < job->inputs; begin += job->width) {
        const int64_t end = MIN(begin + job->width, job->inputs);
        for (int64_t at = begin; at < end; at += SEGMENT) {
            const int64_t count = MIN(SEGMENT, end - at), padded = padded_group(count, job->bits);
            load_floats(x, job->x, token * job->inputs + at, count, job->dtype);
            fix_segment(job, x, count, padded, digits, sums++, steps++);
            digits += padded;
        }
    }
}

/* ---- codes of one segment: packed -> one byte each, [quad][32 outputs][4 inputs] ---- */

INLINE void unpack(const uint8_t *restrict from, uint8_t *restrict to, int64_t quads, int bits) {
    if (bits == 4)
        for (int64_t q = 0; q < quads; q += 2, from += VECTOR, to += 2 * VECTOR)
            for (int i = 0; i < VECTOR; i++) {
                to[i] = from[i] & 15;
                to[VECTOR + i] = from[i] >> 4;
            }
    else if (bits == 2)
        for (int64_t q = 0; q < quads; q += 4, from += VECTOR, to += 4 * VECTOR)
            for (int t = 0; t < 4; t++)
                for (int i = 0; i < VECTOR; i++) to[t * VECTOR + i] = from[i] >> 2 * t & 3;
    else /* 3 */
        for (int64_t q = 0; q < quads; q += 8, from += 3 * VECTOR, to += 8 * VECTOR)
            for (int t = 0; t < 8; t++)
                for (int i = 0; i < VECTOR; i++)
                    to[t * VECTOR + i] = (from[t / 4 * VECTOR + i] >> 2 * (t % 4) & 3) | (from[2 * VECTOR + i] >> t & 1) << 2;
}

/* ---- one segment of one tile times some tokens: sums of [token][32] grow ---- */

typedef struct {
    const uint8_t *codes; /* packed for a lone token where there are vector instructions, else unpacked */
    const uint8_t *zeros; /* [32] or NULL */
    const uint16_t *scales;
    int64_t quads, padded, segments;
    int bits, packed;
} Segment;

INLINE void dot_plain(const Segment *s, const int8_t *digits, const int32_t *sums, const float *step, float *total, const int planes) {
    int32_t acc[MAX_PLANES][TILE];
    for (int p = 0; p < planes; p++) {
        for (int r = 0; r < TILE; r++) acc[p][r] = -sums[p * s->segments] * (s->zeros ? s->zeros[r] : 1 << (s->bits - 1));
        for (int64_t q = 0; q < s->quads; q++) {
            const int8_t *d = digits + p * s->padded + 4 * q;
            for (int r = 0; r < TILE; r++) {
                const uint8_t *w = s->codes + q * VECTOR + 4 * r;
                acc[p][r] += w[0] * d[0] + w[1] * d[1] + w[2] * d[2] + w[3] * d[3];
            }
        }
    }
    for (int r = 0; r < TILE; r++) {
        float value = (float)acc[0][r];
        for (int p = 1; p < planes; p++) value = value * 128 + (float)acc[p][r];
        total[r] += value * (*step * half_to_float(s->scales[r]));
    }
}

#ifdef X86
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVXVNNI __attribute__((target("avx2,fma,f16c,avxvnni")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,fma,f16c" WHOLE_VECTORS)))

INLINE TARGET_AVX2 __m256i start_256(const Segment *s, int32_t sum, int at) {
    if (!s->zeros) return _mm256_set1_epi32(-sum * (1 << (s->bits - 1)));
    return _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(s->zeros + at))), _mm256_set1_epi32(-sum));
}

INLINE TARGET_AVX2 void
finish_256(const Segment *s, const __m256i *acc, float step, float *total, int at, const int planes, const float base) {
    __m256 value = _mm256_cvtepi32_ps(acc[0]);
    for (int p = 1; p < planes; p++) value = _mm256_fmadd_ps(value, _mm256_set1_ps(base), _mm256_cvtepi32_ps(acc[p]));
    __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(s->scales + at)));
    __m256 before = _mm256_loadu_ps(total + at);
    _mm256_storeu_ps(total + at, _mm256_fmadd_ps(value, _mm256_mul_ps(scale, _mm256_set1_ps(step)), before));
}

/* Ask for codes before they are needed: a Zen 3 left to foresee them reads from memory a fifth slower. */
INLINE TARGET_AVX2 void ahead(const void *at) { _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0); }

#define QUAD(d, q) (((const int32_t *)(d))[q])

/* Quad t of a packed unit, 8 outputs from where `from` points into its vectors. */
INLINE TARGET_AVX2 __m256i take_256(const uint8_t *from, const int t, const int bits) {
    const __m256i first = _mm256_loadu_si256((const __m256i *)(from + (bits == 3 ? t / 4 * VECTOR : 0)));
    if (bits == 8) return first;
    if (bits == 4) return _mm256_and_si256(_mm256_srli_epi16(first, 4 * t), _mm256_set1_epi8(15));
    const __m256i low = _mm256_and_si256(_mm256_srli_epi16(first, 2 * (t % 4)), _mm256_set1_epi8(3));
    if (bits == 2) return low;
    const __m256i third = _mm256_loadu_si256((const __m256i *)(from + 2 * VECTOR));
    const __m256i moved = t < 2 ? _mm256_slli_epi16(third, 2 - t) : _mm256_srli_epi16(third, t - 2);
    return _mm256_or_si256(low, _mm256_and_si256(moved, _mm256_set1_epi8(4)));
}

/* As assembly: from the intrinsics, GCC copies every sum and loads codes twice. */
INLINE TARGET_AVX2 __m256i add_pairs(__m256i sums, __m256i codes, __m256i digits) {
    __m256i products;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(codes), "x"(digits));
    return sums;
}

/* 16 outputs at a time. Pair sums stay below 2^15 for 16 quads of codes up to 15, and for one quad of larger codes. */
INLINE TARGET_AVX2 void dot_avx2(const Segment *s, const int8_t *digits, const int32_t *sums, const float *step, float *total,
                                 const int planes, const int tokens) {
    const int run = s->bits == 8 ? 1 : 16, rows = tokens * planes; /* row: of digits, [token][plane] */
    const __m256i ones = _mm256_set1_epi16(1);
    for (int at = 0; at < TILE; at += 16) {
        __m256i acc[2][2 * MAX_PLANES];
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 2; h++) acc[h][r] = start_256(s, sums[r * s->segments], at + 8 * h);
        for (int64_t q = 0; q < s->quads;) {
            const int64_t stop = MIN(q + run, s->quads);
            __m256i pairs[2][2 * MAX_PLANES];
            for (int r = 0; r < rows; r++) pairs[0][r] = pairs[1][r] = _mm256_setzero_si256();
            for (; q < stop; q++) {
                const __m256i *w = (const __m256i *)(s->codes + q * VECTOR + 4 * at);
                const __m256i low = _mm256_loadu_si256(w), high = _mm256_loadu_si256(w + 1);
                for (int r = 0; r < rows; r++) {
                    const __m256i d = _mm256_set1_epi32(QUAD(digits + r * s->padded, q));
                    pairs[0][r] = add_pairs(pairs[0][r], low, d);
                    pairs[1][r] = add_pairs(pairs[1][r], high, d);
                }
            }
            for (int r = 0; r < rows; r++)
                for (int h = 0; h < 2; h++) acc[h][r] = _mm256_add_epi32(acc[h][r], _mm256_madd_epi16(pairs[h][r], ones));
        }
        for (int t = 0; t < tokens; t++)
            for (int h = 0; h < 2; h++)
                finish_256(s, acc[h] + t * planes, step[t * s->segments], total + t * TILE, at + 8 * h, planes, 128);
    }
}

/* A lone token: codes go from their packed form to the products in registers. The last two planes end in one sum, of
   128 times the first and the second: at most 255 * 64 * 129 * 128 < 2^31. All 32 outputs at a time where registers suffice. */
INLINE TARGET_AVX2 void lone_avx2(const Segment *s, const int8_t *digits, const int32_t *sums, const float *step, float *total,
                                  const int planes, const int bits) {
    const int quads = unit_of(bits) / 4, bytes = unit_of(bits) * TILE * bits / 8, run = bits == 8 ? 1 : 16;
    const int parts = planes == 2 ? 4 : 2, last = planes - 2; /* vectors of outputs at a time; the sum of the last two planes */
    const __m256i ones = _mm256_set1_epi16(1), times = _mm256_set1_epi16(128);
    const int32_t sum = sums[last * s->segments] * 128 + sums[(last + 1) * s->segments];
    for (int at = 0; at < TILE; at += 8 * parts) {
        __m256i acc[4][2];
        for (int h = 0; h < parts; h++) {
            if (last) acc[h][0] = start_256(s, sums[0], at + 8 * h);
            acc[h][last] = start_256(s, sum, at + 8 * h);
        }
        const uint8_t *from = s->codes + 4 * at;
        for (int64_t q = 0; q < s->quads;) {
            const int64_t stop = MIN(q + run, s->quads);
            __m256i pairs[4][MAX_PLANES];
            for (int p = 0; p < planes; p++)
                for (int h = 0; h < parts; h++) pairs[h][p] = _mm256_setzero_si256();
            for (; q < stop; q += quads, from += bytes) {
                for (int b = 0; b < bytes; b += VECTOR)
                    for (int line = 0; line < parts / 2; line++) ahead(from + b + 64 * line);
                for (int t = 0; t < quads; t++) {
                    __m256i d[MAX_PLANES];
                    for (int p = 0; p < planes; p++) d[p] = _mm256_set1_epi32(QUAD(digits + p * s->padded, q + t));
                    for (int h = 0; h < parts; h++) {
                        const __m256i w = take_256(from + 32 * h, t, bits);
                        for (int p = 0; p < planes; p++)
                            pairs[h][p] = bits == 8 ? _mm256_maddubs_epi16(w, d[p]) : add_pairs(pairs[h][p], w, d[p]);
                    }
                }
            }
            for (int h = 0; h < parts; h++) {
                if (last) acc[h][0] = _mm256_add_epi32(acc[h][0], _mm256_madd_epi16(pairs[h][0], ones));
                acc[h][last] = _mm256_add_epi32(acc[h][last], _mm256_madd_epi16(pairs[h][last], times));
                acc[h][last] = _mm256_add_epi32(acc[h][last], _mm256_madd_epi16(pairs[h][last + 1], ones));
            }
        }
        for (int h = 0; h < parts; h++) finish_256(s, acc[h], *step, total, at + 8 * h, planes - 1, 16384);
    }
}

/* Functions of their own: in one with all of them, GCC keeps the addresses of the innermost loops in memory. */
#define APART(name, body)                                                                                                \
    static TARGET_AVX2 __attribute__((noinline)) void name(const Segment *s, const int8_t *d, const int32_t *m, const float *f, \
                                                           float *y) {                                                \
        body;                                                                                                         \
    }
#define APART_PLANES(planes)                                                                                          \
    APART(avx2_##planes##_tokens_2, dot_avx2(s, d, m, f, y, planes, 2))                                               \
    APART(avx2_##planes##_bits_2, lone_avx2(s, d, m, f, y, planes, 2))                                                \
    APART(avx2_##planes##_bits_3, lone_avx2(s, d, m, f, y, planes, 3))                                                \
    APART(avx2_##planes##_bits_4, lone_avx2(s, d, m, f, y, planes, 4))                                                \
    APART(avx2_##planes##_tokens_1, if (s->bits == 8) lone_avx2(s, d, m, f, y, planes, 8); else dot_avx2(s, d, m, f, y, planes, 1))
APART_PLANES(2)
APART_PLANES(3)

#if VNNI_256
INLINE TARGET_AVXVNNI void
dot_avxvnni(const Segment *s, const int8_t *digits, const int32_t *sums, const float *step, float *total, const int planes) {
    for (int at = 0; at < TILE; at += 16) {
        __m256i acc[2][MAX_PLANES];
        for (int p = 0; p < planes; p++)
            for (int h = 0; h < 2; h++) acc[h][p] = start_256(s, sums[p * s->segments], at + 8 * h);
        for (int64_t q = 0; q < s->quads; q++) {
            const __m256i *w = (const __m256i *)(s->codes + q * VECTOR + 4 * at);
            const __m256i low = _mm256_loadu_si256(w), high = _mm256_loadu_si256(w + 1);
            for (int p = 0; p < planes; p++) {
                const __m256i d = _mm256_set1_epi32(QUAD(digits + p * s->padded, q));
                acc[0][p] = _mm256_dpbusd_avx_epi32(acc[0][p], low, d);
                acc[1][p] = _mm256_dpbusd_avx_epi32(acc[1][p], high, d);
            }
        }
        for (int h = 0; h < 2; h++) finish_256(s, acc[h], *step, total, at + 8 * h, planes, 128);
    }
}

INLINE TARGET_AVXVNNI void lone_avxvnni(const Segment *s, const int8_t *digits, const int32_t *sums, const float *step, float *total,
                                        const int planes, const int bits) {
    const int quads = unit_of(bits) / 4, bytes = unit_of(bits) * TILE * bits / 8;
    for (int at = 0; at < TILE; at += 16) {
        __m256i acc[2][MAX_PLANES];
        for (int p = 0; p < planes; p++)
            for (int h = 0; h < 2; h++) acc[h][p] = start_256(s, sums[p * s->segments], at + 8 * h);
        const uint8_t *from = s->codes + 4 * at;
        for (int64_t q = 0; q < s->quads; q += quads, from += bytes)
            for (int t = 0; t < quads; t++)
                for (int h = 0; h < 2; h++) {
                    const __m256i w = take_256(from + 32 * h, t, bits);
                    for (int p = 0; p < planes; p++)
                        acc[h][p] = _mm256_dpbusd_avx_epi32(acc[h][p], w, _mm256_set1_epi32(QUAD(digits + p * s->padded, q + t)));
                }
        for (int h = 0; h < 2; h++) finish_256(s, acc[h], *step, total, at + 8 * h, planes, 128);
    }
}
#endif

INLINE TARGET_AVX512 __m512i start_512(const Segment *s, int32_t sum, int at) {
    if (!s->zeros) return _mm512_set1_epi32(-sum * (1 << (s->bits - 1)));
    return _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(s->zeros + at))), _mm512_set1_epi32(-sum));
}

INLINE TARGET_AVX512 void finish_512(const Segment *s, const __m512i *acc, float step, float *total, int at, const int planes) {
    __m512 value = _mm512_cvtepi32_ps(acc[0]);
    for (int p = 1; p < planes; p++) value = _mm512_fmadd_ps(value, _mm512_set1_ps(128), _mm512_cvtepi32_ps(acc[p]));
    __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(s->scales + at)));
    _mm512_storeu_ps(total + at, _mm512_fmadd_ps(value, _mm512_mul_ps(scale, _mm512_set1_ps(step)), _mm512_loadu_ps(total + at)));
}

/* As assembly: from the intrinsic, GCC copies every sum and keeps half of them in memory. */
INLINE TARGET_AVX512 __m512i dpbusd_512(__m512i sums, __m512i codes, __m512i digits) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(digits));
    return sums;
}

/* `tokens` at once, each weight loaded once. */
INLINE TARGET_AVX512 void
dot_avx512(const Segment *s, const int8_t *digits, const int32_t *sums, const float *step, float *total, const int planes, const int tokens) {
    __m512i acc[4][2][MAX_PLANES]; /* [token][half][plane] */
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < planes; p++)
            for (int h = 0; h < 2; h++) acc[t][h][p] = start_512(s, sums[(t * planes + p) * s->segments], 16 * h);
    for (int64_t q = 0; q < s->quads; q++) {
        const uint8_t *w = s->codes + q * VECTOR;
        const __m512i low = _mm512_loadu_si512(w), high = _mm512_loadu_si512(w + 64);
        for (int t = 0; t < tokens; t++)
            for (int p = 0; p < planes; p++) {
                const __m512i d = _mm512_set1_epi32(QUAD(digits + (t * planes + p) * s->padded, q));
                acc[t][0][p] = dpbusd_512(acc[t][0][p], low, d);
                acc[t][1][p] = dpbusd_512(acc[t][1][p], high, d);
            }
    }
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < 2; h++) finish_512(s, acc[t][h], step[t * s->segments], total + t * TILE, 16 * h, planes);
}

/* Quad t of a packed unit, 16 outputs from where `from` points into its vectors. */
INLINE TARGET_AVX512 __m512i take_512(const uint8_t *from, const int t, const int bits) {
    const __m512i first = _mm512_loadu_si512(from + (bits == 3 ? t / 4 * VECTOR : 0));
    if (bits == 4) return _mm512_and_si512(_mm512_srli_epi16(first, 4 * t), _mm512_set1_epi8(15));
    const __m512i low = _mm512_and_si512(_mm512_srli_epi16(first, 2 * (t % 4)), _mm512_set1_epi8(3));
    if (bits == 2) return low;
    const __m512i third = _mm512_loadu_si512(from + 2 * VECTOR);
    const __m512i moved = t < 2 ? _mm512_slli_epi16(third, 2 - t) : _mm512_srli_epi16(third, t - 2);
    return _mm512_or_si512(low, _mm512_and_si512(moved, _mm512_set1_epi8(4)));
}

/* Two chains of sums, or a product would wait for the one before. */
INLINE TARGET_AVX512 void lone_avx512(const Segment *s, const int8_t *digits, const int32_t *sums, const float *step, float *total,
                                      const int planes, const int bits) {
    const int quads = unit_of(bits) / 4, bytes = unit_of(bits) * TILE * bits / 8;
    __m512i acc[2][2][MAX_PLANES]; /* [chain][half][plane] */
    for (int p = 0; p < planes; p++)
        for (int h = 0; h < 2; h++) {
            acc[0][h][p] = start_512(s, sums[p * s->segments], 16 * h);
            acc[1][h][p] = _mm512_setzero_si512();
        }
    const uint8_t *from = s->codes;
    for (int64_t q = 0; q < s->quads; q += quads, from += bytes)
        for (int t = 0; t < quads; t++)
            for (int h = 0; h < 2; h++) {
                const __m512i w = take_512(from + 64 * h, t, bits);
                for (int p = 0; p < planes; p++)
                    acc[t & 1][h][p] = dpbusd_512(acc[t & 1][h][p], w, _mm512_set1_epi32(QUAD(digits + p * s->padded, q + t)));
            }
    for (int h = 0; h < 2; h++) {
        for (int p = 0; p < planes; p++) acc[0][h][p] = _mm512_add_epi32(acc[0][h][p], acc[1][h][p]);
        finish_512(s, acc[0][h], *step, total, 16 * h, planes);
    }
}
#endif

/* All tokens of a block, compiled for one instruction set. */
typedef void Dots(const Segment *, const int8_t *digits, const int32_t *sums, const float *steps, float *total, int64_t tokens,
                  int planes);

/* Each case has its planes, tokens and bits as constants. LONE: how one token goes with packed codes. */
#define DOTS(name, attribute, most_2, most_3, CALL, LONE)                                                             \
    static attribute void dots_##name(const Segment *s, const int8_t *digits, const int32_t *sums, const float *steps, \
                                      float *total, int64_t tokens, int planes) {                                     \
        for (int64_t t = 0; t < tokens;) {                                                                            \
            const int8_t *d = digits + t * planes * s->padded;                                                        \
            const int32_t *m = sums + t * planes * s->segments;                                                       \
            const float *f = steps + t * s->segments;                                                                 \
            float *y = total + t * TILE;                                                                              \
            if (s->packed && planes == 2) { BY_BITS(LONE, 2) t++; }                                                   \
            else if (s->packed) { BY_BITS(LONE, 3) t++; }                                                             \
            else if (planes == 2 && tokens - t >= most_2) { CALL(2, most_2); t += most_2; }                           \
            else if (planes == 3 && tokens - t >= most_3) { CALL(3, most_3); t += most_3; }                           \
            else if (planes == 2) { CALL(2, 1); t++; }                                                                \
            else { CALL(3, 1); t++; }                                                                                 \
        }                                                                                                             \
    }
#define BY_BITS(LONE, planes)                                                                                         \
    if (s->bits == 2) LONE(planes, 2);                                                                                \
    else if (s->bits == 3) LONE(planes, 3);                                                                           \
    else LONE(planes, 4);
#define CALL_PLAIN(planes, count) dot_plain(s, d, m, f, y, planes)
#define CALL_AVX2(planes, count) avx2_##planes##_tokens_##count(s, d, m, f, y)
#define CALL_AVXVNNI(planes, count) dot_avxvnni(s, d, m, f, y, planes)
#define CALL_AVX512(planes, count) dot_avx512(s, d, m, f, y, planes, count)
#define LONE_PLAIN(planes, bits) (void)0
#define LONE_AVX2(planes, bits) avx2_##planes##_bits_##bits(s, d, m, f, y)
#define LONE_AVXVNNI(planes, bits) lone_avxvnni(s, d, m, f, y, planes, bits)
#define LONE_AVX512(planes, bits) lone_avx512(s, d, m, f, y, planes, bits)
DOTS(plain, , 1, 1, CALL_PLAIN, LONE_PLAIN)
#ifdef X86
DOTS(avx2, TARGET_AVX2, 2, 2, CALL_AVX2, LONE_AVX2)
#if VNNI_256
DOTS(avxvnni, TARGET_AVXVNNI, 1, 1, CALL_AVXVNNI, LONE_AVXVNNI)
#endif
DOTS(avx512, TARGET_AVX512, 4, 3, CALL_AVX512, LONE_AVX512)
#endif

/* ---- a band of tiles times at most TOKEN_BLOCK tokens ---- */

/* The tiles of a band take turns segment by segment, so that memory is read in as many streams at once. */
INLINE void multiply(const Job *job, int64_t first, int64_t last, int64_t token, int64_t count, Dots *dots, const int bits) {
    const int planes = job->planes, packed = bits != 8 && count == 1 && job->isa != PLAIN, unpacks = bits != 8 && !packed;
    uint8_t unpacked[SEGMENT / 4 * VECTOR] __attribute__((aligned(64)));
    float total[TOTALS * TILE] __attribute__((aligned(64))); /* [tile][token][32] */
    memset(total, 0, (size_t)((last - first) * count) * TILE * 4);
    int64_t at = 0, offset = 0, segment = token * job->segments;
    const int8_t *digits = job->digits + token * planes * job->padded;
    for (int64_t group = 0; group < job->groups; group++) {
        const int64_t end = MIN((group + 1) * job->width, job->inputs);
        for (int64_t i = group * job->width; i < end; i += SEGMENT, segment++) {
            const int64_t inputs = padded_group(MIN(SEGMENT, end - i), bits);
            for (int64_t tile = first; tile < last; tile++) {
                const int64_t scale_at = (tile * job->groups + group) * TILE, bytes = inputs * TILE * bits / 8;
                const uint8_t *codes = job->codes + tile * job->tile_bytes + offset;
                const Segment s = {unpacks ? unpacked : codes, job->zeros ? job->zeros + scale_at : NULL,
                                   job->scales + scale_at, inputs / 4, job->padded, job->segments, bits, packed};
                if (job->streams > 1 && !(packed && job->isa == AVX2)) /* where a lone token asks for its codes itself */
                    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(codes + AHEAD + b);
                if (unpacks) unpack(codes, unpacked, inputs / 4, bits);
                dots(&s, digits + at, job->sums + segment + token * (planes - 1) * job->segments, job->steps + segment,
                     total + (tile - first) * count * TILE, count, planes);
            }
            offset += inputs * TILE * bits / 8;
            at += inputs;
        }
    }
    for (int64_t tile = first; tile < last; tile++) {
        const int64_t row = tile * TILE, rows = MIN(TILE, job->outputs - row);
        float bias[TILE] = {0};
        if (job->bias) load_floats(bias, job->bias, row, rows, job->dtype);
        for (int64_t t = 0; t < count; t++) {
            float *y = total + ((tile - first) * count + t) * TILE;
            for (int r = 0; r < TILE; r++) y[r] += bias[r];
            store_floats(job->y, (token + t) * job->outputs + row, y, rows, job->dtype);
        }
    }
}

/* ---- threads claim tokens, then tiles ---- */

INLINE void fix_tokens(Job *job) {
    for (int64_t t; (t = __atomic_fetch_add(&job->next_token, 1, __ATOMIC_RELAXED)) < job->tokens;) fix_token(job, t);
}

INLINE void multiply_bands(Job *job, Dots *dots) {
    const int64_t tiles = tiles_of(job), blocks = (job->tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK;
    for (int64_t item; (item = __atomic_fetch_add(&job->next_item, 1, __ATOMIC_RELAXED)) < job->bands * blocks;) {
        const int64_t band = item % job->bands, first = band * tiles / job->bands, last = (band + 1) * tiles / job->bands;
        const int64_t token = item / job->bands * TOKEN_BLOCK, count = MIN(TOKEN_BLOCK, job->tokens - token);
        switch (job->bits) {
        case 2: multiply(job, first, last, token, count, dots, 2); break;
        case 3: multiply(job, first, last, token, count, dots, 3); break;
        case 4: multiply(job, first, last, token, count, dots, 4); break;
        default: multiply(job, first, last, token, count, dots, 8);
        }
    }
}

#define PATH(name, attribute) \
    static attribute void fix_##name(void *job) { fix_tokens(job); } \
    static attribute void run_##name(void *job) { multiply_bands(job, dots_##name); }
PATH(plain, )
#ifdef X86
PATH(avx2, TARGET_AVX2)
#if VNNI_256
PATH(avxvnni, TARGET_AVXVNNI)
#else
#define fix_avxvnni fix_avx2
#define run_avxvnni run_avx2
#endif
PATH(avx512, TARGET_AVX512)
static void (*const FIX[])(void *) = {fix_plain, fix_avx2, fix_avxvnni, fix_avx512};
static void (*const RUN[])(void *) = {run_plain, run_avx2, run_avxvnni, run_avx512};
#else
static void (*const FIX[])(void *) = {fix_plain};
static void (*const RUN[])(void *) = {run_plain};
#endif

/* ---- one token times a dense bfloat16 weight, row after row ---- */

#define LANES 64
#define ROWS 32 /* that a thread claims at once */

typedef struct {
    const uint16_t *weight, *bias;
    const float *x;
    uint16_t *y;
    int64_t inputs, outputs, next;
} Dense;

/* Sums in float32, LANES of them side by side. */
INLINE float dense_row(const float *restrict x, const uint16_t *restrict row, int64_t inputs) {
    float sums[LANES] = {0};
    const int64_t whole = inputs / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int l = 0; l < LANES; l++) sums[l] += bits_float((uint32_t)row[i + l] << 16) * x[i + l];
    for (int64_t i = whole; i < inputs; i++) sums[i - whole] += bits_float((uint32_t)row[i] << 16) * x[i];
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) sums[l] += sums[l + half];
    return sums[0];
}

INLINE void dense_rows(Dense *job) {
    for (int64_t row; (row = __atomic_fetch_add(&job->next, ROWS, __ATOMIC_RELAXED)) < job->outputs;)
        for (int64_t r = row; r < MIN(row + ROWS, job->outputs); r++) {
            const float bias = job->bias ? bits_float((uint32_t)job->bias[r] << 16) : 0;
            job->y[r] = float_to_bfloat(dense_row(job->x, job->weight + r * job->inputs, job->inputs) + bias);
        }
}

static void dense_plain(void *job) { dense_rows(job); }
#ifdef X86
static TARGET_AVX2 void dense_avx2(void *job) { dense_rows(job); }
static TARGET_AVX512 void dense_avx512(void *job) { dense_rows(job); }
static void (*const DENSE[])(void *) = {dense_plain, dense_avx2, dense_avx2, dense_avx512};
#else
static void (*const DENSE[])(void *) = {dense_plain};
#endif

/* Tiles that a thread reads in turns: four, prefetched by hand, as was best on an Intel CPU; a Zen 4 of AMD reads one stream
   twice as fast as four. */
static int best_streams(void) {
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) return 1;
#endif
    return STREAMS;
}

/* ---- the ABI ---- */

int auto_round_abi(void) { return ABI; }

/* The paths that this CPU can take: bit i for path i. */
int auto_round_paths(void) {
    int paths = 1 << PLAIN;
#ifdef X86
    unsigned a = 0, b, c, d;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        paths |= 1 << AVX2;
        if (VNNI_256 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1) paths |= 1 << AVXVNNI;
    }
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        paths |= 1 << AVX512;
#endif
    return paths;
}

/* Returns 0, or 1 when there is no memory for the fixed-point activations. */
int auto_round_linear(const void *x, const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros, const void *bias, void *y,
                      int64_t tokens, int64_t inputs, int64_t outputs, int64_t width, int bits, int dtype, int isa, int threads) {
    Job job = {.x = x, .codes = codes, .scales = scales, .zeros = zeros, .bias = bias, .y = y, .tokens = tokens, .inputs = inputs,
               .outputs = outputs, .width = width, .bits = bits, .dtype = dtype, .isa = isa, .planes = dtype == FLOAT32 ? 3 : 2};
    job.groups = (inputs + width - 1) / width;
    for (int64_t begin = 0; begin < inputs; begin += width) {
        const int64_t end = MIN(begin + width, inputs);
        for (int64_t at = begin; at < end; at += SEGMENT, job.segments++) job.padded += padded_group(MIN(SEGMENT, end - at), bits);
    }
    job.tile_bytes = job.padded * TILE * bits / 8;
    const int64_t rows = tokens * job.planes, digits = (rows * job.padded + 63) / 64 * 64;
    job.digits = malloc((size_t)(digits + (rows + tokens) * job.segments * 4));
    if (!job.digits) return 1;
    job.sums = (int32_t *)(job.digits + digits);
    job.steps = (float *)(job.sums + rows * job.segments);
    /* Few tokens: bands of a few tiles, as many for each thread. Many: single tiles, their activations being the larger part. */
    const int64_t tiles = tiles_of(&job);
    job.streams = tokens > TOTALS / STREAMS ? 1 : best_streams();
    const int64_t least = (tiles + job.streams - 1) / job.streams;
    job.bands = MIN(tiles, (least + threads - 1) / threads * threads);
    in_threads(FIX[isa], &job, tokens > 1 ? threads : 1);
    in_threads(RUN[isa], &job, threads);
    free(job.digits);
    return 0;
}

/* y = weight x + bias for one token, all bfloat16. Returns as above. */
int auto_round_dense(const uint16_t *x, const uint16_t *weight, const uint16_t *bias, uint16_t *y, int64_t inputs, int64_t outputs,
                     int isa, int threads) {
    float *floats = malloc((size_t)inputs * sizeof(float));
    if (!floats) return 1;
    load_floats(floats, x, 0, inputs, BFLOAT16);
    Dense job = {.weight = weight, .bias = bias, .x = floats, .y = y, .inputs = inputs, .outputs = outputs};
    in_threads(DENSE[isa], &job, threads);
    free(floats);
    return 0;
}
