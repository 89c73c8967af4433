/* Attention and its gradient on a CPU in float32, in tiles: the formulas and the plain twin are in attention.py. What has the
   shape (queries, keys) is there for one tile alone; the softmax of a row is gathered over its tiles (FlashAttention-2, arXiv
   2307.08691). A plain C ABI; needs neither Python nor torch.

   Tensors are float32 [batch][head][token][width] with strides of their own, in values; that of a width is 1. A thread claims
   one head of one sample; no two write the same place, so results do not depend on threads. */

#include "compiled.h"

#include <math.h>

#define ABI 1
#define TILE 64   /* queries, and keys, in a tile */
#define DEPTH 128 /* products added up at once */

typedef struct {
    int64_t batch, head, token;
} Strides;

typedef struct {
    const float *query, *key, *value, *mask; /* mask is added to the scores, [batch][head][query][key], or NULL */
    float *output, *sums; /* sums: of each row the largest score and 1 / sum of e^(score - largest), [batch][head][query][2] */
    const float *grad, *along;               /* dL/doutput; its product with the output, [batch][head][query] */
    float *for_query, *for_key, *for_value;  /* gradients; those of keys and values per head of the queries */
    Strides q, k, v, m, o, g, fq, fk, fv;
    int64_t batch, heads, shared; /* shared: heads that read the same keys */
    int64_t queries, keys, width, value_width;
    float scale;
    int causal;
    float *room; /* of one thread: `size` values */
    int64_t size, slots, next;
} Job;

INLINE int64_t at(Strides strides, int64_t batch, int64_t head) { return batch * strides.batch + head * strides.head; }

static int64_t tiles_of(int64_t tokens) { return (tokens + TILE - 1) / TILE; }

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

#define NAME(what) JOIN(what, _plain)
#define LANES 4
#define TARGET
#include "attention_tiles.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define NAME(what) JOIN(what, _avx2)
#define LANES 8
#define TARGET FOR_AVX2
#include "attention_tiles.h"

#define NAME(what) JOIN(what, _avx512)
#define LANES 16
#define TARGET FOR_AVX512
#include "attention_tiles.h"

static void (*const FORWARD[])(void *) = {forward_plain, forward_avx2, forward_avx512};
static void (*const BACKWARD[])(void *) = {backward_plain, backward_avx2, backward_avx512};
#else
static void (*const FORWARD[])(void *) = {forward_plain};
static void (*const BACKWARD[])(void *) = {backward_plain};
#endif

/* ---- the ABI ---- */

int auto_round_attention_abi(void) { return ABI; }

int auto_round_attention_paths(void) { return paths_of_this_cpu(); }

/* Values of `room` that a thread needs: keys and values transposed, and two tiles. */
int64_t auto_round_attention_room(int64_t keys, int64_t width, int64_t value_width) {
    return tiles_of(keys) * TILE * (width + value_width) + 2 * TILE * TILE;
}

#define STRIDES(s) {(s)[0], (s)[1], (s)[2]}

/* sizes: batch, heads, heads that share keys, queries, keys, width, width of values. strides: three each. */
void auto_round_attention(const float *query, const float *key, const float *value, const float *mask, float *output, float *sums,
                          const int64_t *sizes, const int64_t *strides, float scale, int causal, float *room, int path, int threads) {
    Job job = {.query = query, .key = key, .value = value, .mask = mask, .output = output, .sums = sums, .batch = sizes[0],
               .heads = sizes[1], .shared = sizes[2], .queries = sizes[3], .keys = sizes[4], .width = sizes[5],
               .value_width = sizes[6], .q = STRIDES(strides), .k = STRIDES(strides + 3), .v = STRIDES(strides + 6),
               .m = STRIDES(strides + 9), .o = STRIDES(strides + 12), .scale = scale, .causal = causal, .room = room,
               .size = auto_round_attention_room(sizes[4], sizes[5], sizes[6])};
    in_threads(FORWARD[path], &job, threads);
}

void auto_round_attention_back(const float *query, const float *key, const float *value, const float *mask, const float *sums,
                               const float *grad, const float *along, float *for_query, float *for_key, float *for_value,
                               const int64_t *sizes, const int64_t *strides, float scale, int causal, float *room, int path, int threads) {
    Job job = {.query = query, .key = key, .value = value, .mask = mask, .sums = (float *)sums, .grad = grad, .along = along,
               .for_query = for_query, .for_key = for_key, .for_value = for_value, .batch = sizes[0], .heads = sizes[1],
               .shared = sizes[2], .queries = sizes[3], .keys = sizes[4], .width = sizes[5], .value_width = sizes[6],
               .q = STRIDES(strides), .k = STRIDES(strides + 3), .v = STRIDES(strides + 6), .m = STRIDES(strides + 9),
               .g = STRIDES(strides + 12), .fq = STRIDES(strides + 15), .fk = STRIDES(strides + 18), .fv = STRIDES(strides + 21),
               .scale = scale, .causal = causal, .room = room, .size = auto_round_attention_room(sizes[4], sizes[5], sizes[6])};
    in_threads(BACKWARD[path], &job, threads);
}
