/* The inner loops of error-compensated rounding and of coordinate descent: the columns (inputs) of one run, in turn, for all
   outputs. The formulas, their sources and the plain twins are in numerics/compensate.py. A plain C ABI; needs neither
   Python nor torch.

   Columns lie as rows: everything that is said to be [column][output] has one contiguous row for each column, in the
   order in which they are taken. An output's columns depend on no other output, so a thread claims SLAB outputs and takes
   them through the whole run in its cache. Each sum is added up in the order of the twin; results depend on neither threads nor
   instruction set. */

#include "compiled.h"

#include <math.h>

#define ABI 1
#define SLAB 64
#define RUN 128 /* most columns */

typedef struct {
    float *values, *codes, *moves; /* [column][output] */
    const float *lower;            /* [column][column], what a column's move adds to a later one; read below the diagonal */
    const float *diagonal;         /* [column] */
    const float *scale, *zero;     /* [group][output] */
    const int64_t *group;          /* [column] */
    int64_t count, outputs;
    float most; /* largest code */
    int64_t next;
} Job;

INLINE void gather(float *to, const float *from, int64_t lanes, float rest) {
    for (int64_t l = 0; l < SLAB; l++) to[l] = l < lanes ? from[l] : rest;
}

/* One row of a slab back to its place. */
INLINE void put(float *to, const float *from, const Job *job, int64_t j, int64_t first) {
    memcpy(to + j * job->outputs + first, from, (size_t)MIN(SLAB, job->outputs - first) * 4);
}

/* values of column j: what was there, plus what the columns before it have added */
INLINE void gathered(float *restrict value, const Job *job, float (*moved)[SLAB], int64_t j, int64_t first, int64_t lanes) {
    gather(value, job->values + j * job->outputs + first, lanes, 0);
    for (int64_t i = 0; i < j; i++) {
        const float share = job->lower[j * job->count + i];
        const float *restrict move = moved[i];
        for (int l = 0; l < SLAB; l++) value[l] += share * move[l];
    }
}

#define EACH_SLAB                                                                                                    \
    for (int64_t first; (first = __atomic_fetch_add(&job->next, SLAB, __ATOMIC_RELAXED)) < job->outputs;)

/* code = clamp(round(w / s) + z), which takes the place of w; the error over the factor's diagonal goes on */
INLINE void round_slabs(Job *job) {
    float moved[RUN][SLAB], value[SLAB], step[SLAB], shift[SLAB];
    EACH_SLAB {
        const int64_t lanes = MIN(SLAB, job->outputs - first);
        for (int64_t j = 0; j < job->count; j++) {
            const float diagonal = job->diagonal[j], most = job->most;
            gather(step, job->scale + job->group[j] * job->outputs + first, lanes, 1);
            gather(shift, job->zero + job->group[j] * job->outputs + first, lanes, 0);
            gathered(value, job, moved, j, first, lanes);
            for (int l = 0; l < SLAB; l++) {
                const float code = clamped(rintf(value[l] / step[l]) + shift[l], most);
                moved[j][l] = ((code - shift[l]) * step[l] - value[l]) / diagonal;
                value[l] = code;
            }
            put(job->values, value, job, j, first);
            put(job->moves, moved[j], job, j, first);
        }
    }
}

/* code = clamp(round(code + pull / (s * h))), h being the moment's diagonal; the change of the weight goes on */
INLINE void descend_slabs(Job *job) {
    float moved[RUN][SLAB], value[SLAB], step[SLAB], old[SLAB];
    EACH_SLAB {
        const int64_t lanes = MIN(SLAB, job->outputs - first);
        for (int64_t j = 0; j < job->count; j++) {
            const float diagonal = job->diagonal[j], most = job->most;
            gather(step, job->scale + job->group[j] * job->outputs + first, lanes, 1);
            gather(old, job->codes + j * job->outputs + first, lanes, 0);
            gathered(value, job, moved, j, first, lanes);
            for (int l = 0; l < SLAB; l++) {
                const float code = clamped(rintf(value[l] / (step[l] * diagonal) + old[l]), most);
                moved[j][l] = (code - old[l]) * step[l];
                old[l] = code;
            }
            put(job->codes, old, job, j, first);
            put(job->moves, moved[j], job, j, first);
        }
    }
}

#define PATH(name, attribute) \
    static attribute void round_##name(void *job) { round_slabs(job); } \
    static attribute void descend_##name(void *job) { descend_slabs(job); }
PATH(plain, )
PATH(avx2, FOR_AVX2)
PATH(avx512, FOR_AVX512)
static void (*const ROUND[])(void *) = {round_plain, round_avx2, round_avx512};
static void (*const DESCEND[])(void *) = {descend_plain, descend_avx2, descend_avx512};

/* ---- the ABI ---- */

int auto_round_columns_abi(void) { return ABI; }

int auto_round_columns_paths(void) { return paths_of_this_cpu(); }

/* values: the run's weights, which become codes. */
void auto_round_round(float *values, float *moves, const float *lower, const float *diagonal, const float *scale, const float *zero,
                      const int64_t *group, int64_t count, int64_t outputs, float most, int path, int threads) {
    Job job = {.values = values, .moves = moves, .lower = lower, .diagonal = diagonal, .scale = scale, .zero = zero, .group = group,
               .count = count, .outputs = outputs, .most = most};
    in_threads(ROUND[path], &job, threads);
}

/* values: the run's pulls, which stay as they are. codes become better ones. */
void auto_round_descend(const float *values, float *codes, float *moves, const float *lower, const float *diagonal, const float *scale,
                        const int64_t *group, int64_t count, int64_t outputs, float most, int path, int threads) {
    Job job = {.values = (float *)values, .codes = codes, .moves = moves, .lower = lower, .diagonal = diagonal, .scale = scale,
               .group = group, .count = count, .outputs = outputs, .most = most};
    in_threads(DESCEND[path], &job, threads);
}
