/* The two elementwise passes of a tuning step over one Linear, each one read of its operands. The formulas, their sources
   and the plain twins are in numerics/integer.py and passes.py. A plain C ABI; needs neither Python nor torch.

   Weights and offsets are float32 [row][group][width], a row's last group padded where `inputs` is no multiple of width;
   scales, zero points, their gradients and what is added to a group's weights before, and taken away behind (`low`, or
   NULL), float32 [row][group]; gradients of W' and W' itself [row][inputs], the first of
   them `stride` values apart, float32 or bfloat16; running means bfloat16, as offsets lie.

   Every value is rounded as torch rounds it, so codes and offsets are the twin's to the bit; only the sums over a group
   are taken in another order, which depends on neither threads nor instruction set.                                    */

#include "compiled.h"

#include <math.h>

#define ABI 2
#define TINY 1e-30f /* keeps 0 / 0 away */
#define LANES 16
#define CHUNK 1024      /* values converted at once, a multiple of LANES */
#define CLAIM (1 << 14) /* weights that a thread claims at once */

typedef struct {
    const float *weight, *scale, *zero, *low;
    float *offset, *scale_grad, *zero_grad;
    uint16_t *first, *second; /* running means of the slope and of its square, bfloat16, laid out as offsets are */
    const void *grad;
    void *out;
    int64_t rows, inputs, width, stride;
    float most, lr; /* largest code; step size of the offsets */
    const float *kept, *taken; /* of each running mean in a step, and of what is new: two numbers each */
    float correction;          /* what both begin at 0 for is made up by */
    int dtype;
    int64_t groups, claim, next;
} Job;

/* ---- one row ---- */

INLINE float level_of(float ratio, float offset, float zero) { return rintf(ratio + offset) + zero; }

/* W' = s * (clamp(round((W + low)/s + V) + z, 0, M) - z) - low */
INLINE void build_row(const Job *job, int64_t row) {
    float fake[CHUNK];
    for (int64_t group = 0; group < job->groups; group++) {
        const int64_t first = row * job->groups + group, begin = group * job->width;
        const float scale = job->scale[first], zero = job->zero[first], low = job->low ? job->low[first] : 0, most = job->most;
        const int64_t end = MIN(begin + job->width, job->inputs);
        for (int64_t at = begin; at < end; at += CHUNK) {
            const int64_t count = MIN(CHUNK, end - at), place = first * job->width + at - begin;
            const float *restrict weight = job->weight + place, *restrict offset = job->offset + place;
            for (int64_t i = 0; i < count; i++)
                fake[i] = (clamped(level_of((weight[i] + low) / scale, offset[i], zero), most) - zero) * scale - low;
            store_floats(job->out, row * job->stride + at, fake, count, job->dtype);
        }
    }
}

#define STEP_ONE(i, lane)                                                                                   \
    {                                                                                                       \
        const float g = grad[i], level = level_of((weight[i] + low) / scale, offset[i], zero);              \
        const float code = clamped(level, most), inside = level == code ? g : 0, slope = inside * sign;     \
        for_scale[lane] += g * (code - zero);                                                               \
        for_zero[lane] += inside - g;                                                                       \
        first_mean[i] = first_mean[i] * kept[0] + slope * taken[0];                                         \
        second_mean[i] = second_mean[i] * kept[1] + slope * slope * taken[1];                               \
        const float share = first_mean[i] / (sqrtf(second_mean[i]) + TINY) * correction;                    \
        offset[i] -= (share < -1 ? -1 : share > 1 ? 1 : share) * lr;                                        \
    }

/* dL/ds and dL/dz of each group, and V against dL/dV over its size. */
INLINE void step_row(const Job *job, int64_t row) {
    float grad[CHUNK], first_mean[CHUNK], second_mean[CHUNK];
    const float kept[] = {job->kept[0], job->kept[1]}, taken[] = {job->taken[0], job->taken[1]}, correction = job->correction;
    for (int64_t group = 0; group < job->groups; group++) {
        const int64_t first = row * job->groups + group, begin = group * job->width;
        const float scale = job->scale[first], zero = job->zero[first], low = job->low ? job->low[first] : 0;
        const float most = job->most, lr = job->lr, sign = scale < 0 ? -1 : 1;
        const int64_t end = MIN(begin + job->width, job->inputs);
        float for_scale[LANES] = {0}, for_zero[LANES] = {0};
        for (int64_t at = begin; at < end; at += CHUNK) {
            const int64_t count = MIN(CHUNK, end - at), place = first * job->width + at - begin;
            const float *restrict weight = job->weight + place;
            float *restrict offset = job->offset + place;
            load_floats(grad, job->grad, row * job->stride + at, count, job->dtype);
            load_floats(first_mean, job->first, place, count, BFLOAT16);
            load_floats(second_mean, job->second, place, count, BFLOAT16);
            const int64_t whole = count / LANES * LANES;
            for (int64_t i = 0; i < whole; i += LANES)
                for (int l = 0; l < LANES; l++) STEP_ONE(i + l, l)
            for (int64_t i = whole; i < count; i++) STEP_ONE(i, i - whole)
            store_floats(job->first, place, first_mean, count, BFLOAT16);
            store_floats(job->second, place, second_mean, count, BFLOAT16);
        }
        for (int half = LANES / 2; half; half /= 2)
            for (int l = 0; l < half; l++) {
                for_scale[l] += for_scale[l + half];
                for_zero[l] += for_zero[l + half];
            }
        job->scale_grad[first] = for_scale[0];
        job->zero_grad[first] = for_zero[0] * scale;
    }
}

/* ---- threads claim rows; every instruction set compiles the same lines ---- */

#define EACH_ROW(body)                                                                                       \
    for (int64_t row; (row = __atomic_fetch_add(&job->next, job->claim, __ATOMIC_RELAXED)) < job->rows;)     \
        for (int64_t r = row; r < MIN(row + job->claim, job->rows); r++) body(job, r);

INLINE void build_rows(Job *job) { EACH_ROW(build_row) }
INLINE void step_rows(Job *job) { EACH_ROW(step_row) }

#define PATH(name, attribute) \
    static attribute void build_##name(void *job) { build_rows(job); } \
    static attribute void step_##name(void *job) { step_rows(job); }
PATH(plain, )
PATH(avx2, FOR_AVX2)
PATH(avx512, FOR_AVX512)
static void (*const BUILD[])(void *) = {build_plain, build_avx2, build_avx512};
static void (*const STEP[])(void *) = {step_plain, step_avx2, step_avx512};

static void over_rows(void (*run)(void *), Job *job, int threads) {
    job->groups = (job->inputs + job->width - 1) / job->width;
    job->claim = CLAIM / job->inputs + 1;
    in_threads(run, job, threads);
}

/* ---- the ABI ---- */

int auto_round_passes_abi(void) { return ABI; }

int auto_round_passes_paths(void) { return paths_of_this_cpu(); }

void auto_round_build(const float *weight, const float *offset, const float *scale, const float *zero, const float *low, void *out, int64_t rows,
                      int64_t inputs, int64_t width, int64_t stride, float most, int dtype, int path, int threads) {
    Job job = {.weight = weight, .offset = (float *)offset, .scale = scale, .zero = zero, .low = low, .out = out, .rows = rows,
               .inputs = inputs, .width = width, .stride = stride, .most = most, .dtype = dtype};
    over_rows(BUILD[path], &job, threads);
}

/* kept, taken: two floats each, for `first` and `second`. */
void auto_round_step(const float *weight, float *offset, const float *scale, const float *zero, const float *low, uint16_t *first, uint16_t *second,
                     const float *kept, const float *taken, const void *grad, float *scale_grad, float *zero_grad, int64_t rows,
                     int64_t inputs, int64_t width, int64_t stride, float most, float lr, float correction, int dtype, int path, int threads) {
    Job job = {.weight = weight, .offset = offset, .scale = scale, .zero = zero, .low = low, .first = first, .second = second,
               .kept = kept, .taken = taken, .grad = grad, .scale_grad = scale_grad, .zero_grad = zero_grad, .rows = rows,
               .inputs = inputs, .width = width, .stride = stride, .most = most, .lr = lr, .correction = correction, .dtype = dtype};
    over_rows(STEP[path], &job, threads);
}
