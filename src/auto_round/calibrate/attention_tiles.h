/* The tiles of attention.c for one instruction set: NAME of its functions, LANES of a vector, TARGET. */

typedef float NAME(wide) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(whole) __attribute__((vector_size(4 * LANES)));
#define WIDE NAME(wide)

INLINE TARGET WIDE NAME(load)(const float *from) { return *(const WIDE *)from; }

/* a where `which` is all ones, b where it is 0 */
INLINE TARGET WIDE NAME(choose)(NAME(whole) which, WIDE a, WIDE b) {
    return (WIDE)((which & (NAME(whole))a) | (~which & (NAME(whole))b));
}

/* e^x to within two roundings; 0 below -87. */
INLINE TARGET WIDE NAME(exponential)(WIDE x) {
    const WIDE zero = {0}, least = zero - 87;
    const NAME(whole) low = x < least;
    x = NAME(choose)(low, least, x);
    const WIDE shifted = x * 1.44269504f + 12582912.f, twos = shifted - 12582912.f; /* whole powers of two */
    const WIDE r = (x - twos * 0.693145752f) - twos * 1.42860677e-6f;
    WIDE sum = r * (1.f / 5040) + 1.f / 720;
    sum = sum * r + 1.f / 120;
    sum = sum * r + 1.f / 24;
    sum = sum * r + 1.f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1;
    sum = sum * r + 1;
    const NAME(whole) power = (__builtin_convertvector(twos, NAME(whole)) + 127) << 23;
    sum *= (WIDE)power;
    return NAME(choose)(low, zero, sum);
}

/* ROWS x (COLUMNS * LANES) values of C: A B, or what is there plus A B. A's value of row i and step k lies at i * ar + k * ak. */
INLINE TARGET void NAME(corner)(float *c, int64_t cr, const float *a, int64_t ar, int64_t ak, const float *b, int64_t br, int64_t steps,
                                float factor, int add, const int rows, const int columns) {
    WIDE sum[6][4] = {{{0}}};
    for (int64_t k = 0; k < steps; k++) {
        WIDE right[4];
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) right[j] = NAME(load)(b + k * br + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            const float left = a[i * ar + k * ak];
#pragma GCC unroll 4
            for (int j = 0; j < columns; j++) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) {
            WIDE *to = (WIDE *)(c + i * cr + j * LANES);
            *to = add ? *to + sum[i][j] * factor : sum[i][j] * factor;
        }
}

/* Columns of C in a corner: with six rows, as many sums as hide the latency of a product, and fit the registers. */
#define ACROSS (LANES == 16 ? 4 : 2)

/* C (m, n) = factor A B, or plus what is there; n a multiple of 16. B: `steps` rows, br apart. */
static TARGET void NAME(product)(float *c, int64_t cr, const float *a, int64_t ar, int64_t ak, const float *b, int64_t br, int64_t m,
                                 int64_t n, int64_t steps, float factor, int add) {
    for (int64_t k = 0; k < steps; k += DEPTH, add = 1) /* a corner's part of B stays in the first cache for all of its rows */
        for (int64_t j = 0; j < n;) {
            const int64_t depth = MIN(DEPTH, steps - k);
            const int across = n - j >= ACROSS * LANES ? ACROSS : 1;
            for (int64_t i = 0; i < m;) {
                const int rows = m - i >= 6 ? 6 : m - i >= 2 ? 2 : 1;
                float *to = c + i * cr + j;
                const float *left = a + i * ar + k * ak, *right = b + k * br + j;
#define CORNER(r, c) NAME(corner)(to, cr, left, ar, ak, right, br, depth, factor, add, r, c)
                if (across > 1) {
                    if (rows == 6) CORNER(6, ACROSS);
                    else if (rows == 2) CORNER(2, ACROSS);
                    else CORNER(1, ACROSS);
                } else if (rows == 6) CORNER(6, 1);
                else if (rows == 2) CORNER(2, 1);
                else CORNER(1, 1);
#undef CORNER
                i += rows;
            }
            j += across * LANES;
        }
}

/* Tiles [width][TILE] of rows (tokens, width), zeros behind the last token. */
static TARGET void NAME(transpose)(float *to, const float *from, int64_t stride, int64_t tokens, int64_t width) {
    for (int64_t tile = 0; tile < tokens; tile += TILE, to += TILE * width)
        for (int64_t d = 0; d < width; d += 16)
            for (int64_t t = 0; t < TILE; t++)
                for (int64_t e = d; e < d + 16; e++) to[e * TILE + t] = tile + t < tokens ? from[(tile + t) * stride + e] : 0;
}

/* Scores (m, TILE) of queries from `first` on with the keys from `begin` on; minus infinity where a key is not seen. */
static TARGET void NAME(scores)(float *scores, const Job *job, const float *query, const float *mask, const float *turned, int64_t first,
                                int64_t m, int64_t begin) {
    NAME(product)(scores, TILE, query, job->q.token, 1, turned + begin * job->width, TILE, m, TILE, job->width, job->scale, 0);
    const int64_t count = MIN(TILE, job->keys - begin);
    for (int64_t i = 0; i < m; i++) {
        const int64_t seen = job->causal ? MIN(count, first + i + 1 - begin) : count;
        if (mask)
            for (int64_t j = 0; j < count; j++) scores[i * TILE + j] += mask[(first + i) * job->m.token + begin + j];
        for (int64_t j = MAX(seen, 0); j < TILE; j++) scores[i * TILE + j] = -INFINITY;
    }
}

/* One head: softmax over all its keys, tile by tile; what is there is scaled down whenever a larger score comes. */
INLINE TARGET void NAME(forward_head)(const Job *job, float *room, int64_t batch, int64_t head) {
    const int64_t width = job->value_width;
    const float *query = job->query + at(job->q, batch, head), *value = job->value + at(job->v, batch, head / job->shared);
    const float *mask = job->mask ? job->mask + at(job->m, batch, head) : NULL;
    float *output = job->output + at(job->o, batch, head), *sums = job->sums + 2 * (batch * job->heads + head) * job->queries;
    float *turned = room, *scores = turned + tiles_of(job->keys) * TILE * job->width, *largest = scores + TILE * TILE, *total = largest + TILE;
    NAME(transpose)(turned, job->key + at(job->k, batch, head / job->shared), job->k.token, job->keys, job->width);
    for (int64_t first = 0; first < job->queries; first += TILE) {
        const int64_t m = MIN(TILE, job->queries - first), end = job->causal ? MIN(job->keys, first + m) : job->keys;
        float *into = output + first * job->o.token;
        for (int64_t i = 0; i < m; i++) {
            largest[i] = -INFINITY;
            total[i] = 0;
            for (int64_t d = 0; d < width; d++) into[i * job->o.token + d] = 0;
        }
        for (int64_t begin = 0; begin < end; begin += TILE) {
            NAME(scores)(scores, job, query + first * job->q.token, mask, turned, first, m, begin);
            for (int64_t i = 0; i < m; i++) {
                float *row = scores + i * TILE, most = largest[i];
                WIDE best = NAME(load)(row);
                for (int64_t j = LANES; j < TILE; j += LANES) {
                    const WIDE next = NAME(load)(row + j);
                    best = NAME(choose)(next > best, next, best);
                }
                for (int64_t l = 0; l < LANES; l++) most = MAX(most, best[l]);
                const float base = most == -INFINITY ? 0 : most, shrink = largest[i] == -INFINITY ? 0 : expf(largest[i] - base);
                WIDE sum = {0};
                for (int64_t j = 0; j < TILE; j += LANES) {
                    const WIDE part = NAME(exponential)(NAME(load)(row + j) - base);
                    *(WIDE *)(row + j) = part;
                    sum += part;
                }
                float added = 0;
                for (int64_t l = 0; l < LANES; l++) added += sum[l];
                total[i] = total[i] * shrink + added;
                if (shrink != 1)
                    for (int64_t d = 0; d < width; d += LANES) *(WIDE *)(into + i * job->o.token + d) *= shrink;
                largest[i] = most;
            }
            const int64_t count = MIN(TILE, job->keys - begin);
            NAME(product)(into, job->o.token, scores, TILE, 1, value + begin * job->v.token, job->v.token, m, width, count, 1, 1);
        }
        for (int64_t i = 0; i < m; i++) {
            const float share = total[i] ? 1 / total[i] : 0;
            for (int64_t d = 0; d < width; d += LANES) *(WIDE *)(into + i * job->o.token + d) *= share;
            sums[2 * (first + i)] = largest[i] == -INFINITY ? 0 : largest[i];
            sums[2 * (first + i) + 1] = share;
        }
    }
}

/* Gradients of one head; the softmax comes back from the scores and the rows' sums. */
INLINE TARGET void NAME(backward_head)(const Job *job, float *room, int64_t batch, int64_t head) {
    const float *query = job->query + at(job->q, batch, head), *grad = job->grad + at(job->g, batch, head);
    const float *key = job->key + at(job->k, batch, head / job->shared), *value = job->value + at(job->v, batch, head / job->shared);
    const float *mask = job->mask ? job->mask + at(job->m, batch, head) : NULL;
    const int64_t rows = (batch * job->heads + head) * job->queries;
    float *for_query = job->for_query + at(job->fq, batch, head), *for_key = job->for_key + at(job->fk, batch, head);
    float *for_value = job->for_value + at(job->fv, batch, head);
    float *turned = room, *turned_value = turned + tiles_of(job->keys) * TILE * job->width;
    float *weights = turned_value + tiles_of(job->keys) * TILE * job->value_width, *slopes = weights + TILE * TILE;
    NAME(transpose)(turned, key, job->k.token, job->keys, job->width);
    NAME(transpose)(turned_value, value, job->v.token, job->keys, job->value_width);
    for (int64_t first = 0; first < job->queries; first += TILE) {
        const int64_t m = MIN(TILE, job->queries - first), end = job->causal ? MIN(job->keys, first + m) : job->keys;
        const float *q = query + first * job->q.token, *g = grad + first * job->g.token;
        for (int64_t begin = 0; begin < end; begin += TILE) {
            const int64_t count = MIN(TILE, job->keys - begin);
            NAME(scores)(weights, job, q, mask, turned, first, m, begin);
            NAME(product)(slopes, TILE, g, job->g.token, 1, turned_value + begin * job->value_width, TILE, m, TILE, job->value_width, 1, 0);
            for (int64_t i = 0; i < m; i++) {
                const float *sum = job->sums + 2 * (rows + first + i), along = job->along[rows + first + i];
                for (int64_t j = i * TILE; j < (i + 1) * TILE; j += LANES) {
                    const WIDE weight = NAME(exponential)(NAME(load)(weights + j) - sum[0]) * sum[1];
                    *(WIDE *)(weights + j) = weight;
                    *(WIDE *)(slopes + j) = weight * (NAME(load)(slopes + j) - along) * job->scale;
                }
            }
            NAME(product)(for_value + begin * job->fv.token, job->fv.token, weights, 1, TILE, g, job->g.token, count, job->value_width, m, 1, 1);
            NAME(product)(for_key + begin * job->fk.token, job->fk.token, slopes, 1, TILE, q, job->q.token, count, job->width, m, 1, 1);
            NAME(product)(for_query + first * job->fq.token, job->fq.token, slopes, TILE, 1, key + begin * job->k.token, job->k.token, m, job->width,
                          count, 1, begin > 0);
        }
    }
}

#define EACH_HEAD(body)                                                                                         \
    Job *job = given;                                                                                           \
    float *room = job->room + job->size * __atomic_fetch_add(&job->slots, 1, __ATOMIC_RELAXED);                 \
    for (int64_t task; (task = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->batch * job->heads;) \
        body(job, room, task / job->heads, task % job->heads);

static TARGET void NAME(forward)(void *given) { EACH_HEAD(NAME(forward_head)) }
static TARGET void NAME(backward)(void *given) { EACH_HEAD(NAME(backward_head)) }

#undef EACH_HEAD
#undef ACROSS
#undef WIDE
#undef NAME
#undef LANES
#undef TARGET
