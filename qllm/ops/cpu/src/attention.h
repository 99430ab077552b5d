// Attention: of one new token per row to the cache, and of a prompt to itself. In float32.
#pragma once

#include "steps.h"

namespace qllm {
namespace {

// e^(s - largest) in place of scores s; their sum.
inline float exponents(float *scores, int64_t count, float largest) {
    VF total = set_f(0);
    for (int64_t j = 0; j < count; j += WIDTH) {
        VF e = exp_f(sub_f(load<FLOAT32>(scores, j, count - j), set_f(largest)));
        if (count - j < WIDTH) e = first_of(e, count - j);
        total = add_f(total, e);
        store<FLOAT32>(scores, j, count - j, e);
    }
    return sum_of(total);
}

// One head turned by its angles: the halves (p, q) to (p cos - q sin, q cos + p sin).
template <typename Call> void turn(float *head, const Call &a, int64_t row) {
    if (!a.cos) return;
    int64_t half = a.dim / 2;
    for (int64_t i = 0; i < half; i += WIDTH) {
        int64_t count = half - i, at = row * a.dim + i;
        VF p = load_as(head, i, FLOAT32, count), q = load_as(head, half + i, FLOAT32, count);
        VF cos_p = load_as(a.cos, at, a.type, count), sin_p = load_as(a.sin, at, a.type, count);
        VF cos_q = load_as(a.cos, at + half, a.type, count);
        VF sin_q = load_as(a.sin, at + half, a.type, count);
        store_as(head, i, FLOAT32, count, sub_f(mul_f(p, cos_p), mul_f(q, sin_p)));
        store_as(head, half + i, FLOAT32, count, add_f(mul_f(q, cos_q), mul_f(p, sin_q)));
    }
}

template <typename Call> void load_head(float *head, const Call &a, int64_t row, int64_t index) {
    int64_t start = (row * (a.heads + 2 * a.kv_heads) + index) * a.dim;
    for (int64_t i = 0; i < a.dim; i += WIDTH)
        store_as(head, i, FLOAT32, a.dim - i, load_as(a.qkv, start + i, a.type, a.dim - i));
}

template <typename Call>
void store_head(const float *head, const Call &a, void *to, int64_t at) {
    for (int64_t i = 0; i < a.dim; i += WIDTH)
        store_as(to, at + i, a.type, a.dim - i, load_as(head, i, FLOAT32, a.dim - i));
}

// A query (dim,) times four keys, one after the other from element `start` on.
template <int64_t TYPE>
inline void four_scores(const Attend &a, const float *query, int64_t start, float *scores) {
    VF s0 = set_f(0), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t i = 0; i < a.dim; i += WIDTH) {
        int64_t count = a.dim - i, at = start + i;
        VF q = load<FLOAT32>(query, i, count);
        s0 = fma_f(q, load<TYPE>(a.keys, at, count), s0);
        s1 = fma_f(q, load<TYPE>(a.keys, at + a.dim, count), s1);
        s2 = fma_f(q, load<TYPE>(a.keys, at + 2 * a.dim, count), s2);
        s3 = fma_f(q, load<TYPE>(a.keys, at + 3 * a.dim, count), s3);
    }
    scores[0] = sum_of(s0);
    scores[1] = sum_of(s1);
    scores[2] = sum_of(s2);
    scores[3] = sum_of(s3);
}

// A query (dim,) over the keys and values of one head, of which there are `length`.
template <int64_t TYPE>
void attend_one(const Attend &a, const float *query, int64_t head, int64_t start, int64_t length,
                float *scores, float *out) {
    const float root = 1 / sqrtf(float(a.dim)), slope = a.slopes ? a.slopes[head] : 0;
    constexpr int64_t SIZE = TYPE == FLOAT32 ? 4 : 2;
    const char *keys = static_cast<const char *>(a.keys) + start * SIZE;
    const char *values = static_cast<const char *>(a.values) + start * SIZE;
    int64_t j = 0;
    for (; j + 4 <= length; j += 4) {
        // A head's run is too short for the machine to see it coming; values are next.
        for (int64_t i = j * a.dim * SIZE; i < (j + 4) * a.dim * SIZE; i += 64) {
            __builtin_prefetch(keys + AHEAD + i);
            __builtin_prefetch(values + i);
        }
        four_scores<TYPE>(a, query, start + j * a.dim, scores + j);
    }
    for (; j < length; j++)
        scores[j] = dot_product<TYPE>(query, a.keys, start + j * a.dim, a.dim);
    float largest = -INFINITY;
    for (j = 0; j < length; j++) {
        scores[j] = scores[j] * root + slope * float(j - (length - 1));
        largest = scores[j] > largest ? scores[j] : largest;
    }
    const VF share = set_f(1 / exponents(scores, length, largest));
    int64_t i = 0;
    for (; i + 4 * WIDTH <= a.dim; i += 4 * WIDTH) {
        VF s0 = set_f(0), s1 = s0, s2 = s0, s3 = s0;
        for (j = 0; j < length; j++) {
            VF weight = set_f(scores[j]);
            int64_t at = start + j * a.dim + i;
            s0 = fma_f(weight, load_all<TYPE>(a.values, at), s0);
            s1 = fma_f(weight, load_all<TYPE>(a.values, at + WIDTH), s1);
            s2 = fma_f(weight, load_all<TYPE>(a.values, at + 2 * WIDTH), s2);
            s3 = fma_f(weight, load_all<TYPE>(a.values, at + 3 * WIDTH), s3);
        }
        store_f(out + i, mul_f(s0, share));
        store_f(out + i + WIDTH, mul_f(s1, share));
        store_f(out + i + 2 * WIDTH, mul_f(s2, share));
        store_f(out + i + 3 * WIDTH, mul_f(s3, share));
    }
    for (; i < a.dim; i += WIDTH) {
        VF sum = set_f(0);
        for (j = 0; j < length; j++) {
            VF value = load<TYPE>(a.values, start + j * a.dim + i, a.dim - i);
            sum = fma_f(set_f(scores[j]), value, sum);
        }
        store_as(out, i, FLOAT32, a.dim - i, mul_f(sum, share));
    }
}

static bool attend(const Attend &a) {
    int64_t longest = 0;
    for (int64_t row = 0; row < a.rows; row++)
        if (a.positions[row] > longest) longest = a.positions[row];
    int64_t room = (longest + 1 + 15) / 16 * 16, head = (a.dim + 15) / 16 * 16;
    int64_t each = room + 2 * head;
    float *memory = static_cast<float *>(scratch(size_t(most_threads() * each * 4)));
    if (!memory) return false;
    int64_t work = a.rows * a.heads * (longest + 1) * a.dim;
    for_each(a.rows * a.kv_heads, work > WORTH_THREADS, [&](int64_t item, int64_t thread) {
        int64_t row = item / a.kv_heads, kv = item % a.kv_heads, position = a.positions[row];
        float *query = memory + thread * each, *out = query + head;
        float *scores = out + head;
        int64_t start = item * a.capacity * a.dim, at = start + position * a.dim;
        load_head(query, a, row, a.heads + kv);
        turn(query, a, row);
        store_head(query, a, a.keys, at);
        load_head(query, a, row, a.heads + a.kv_heads + kv);
        store_head(query, a, a.values, at);
        int64_t shared = a.heads / a.kv_heads;
        for (int64_t h = kv * shared; h < (kv + 1) * shared; h++) {
            load_head(query, a, row, h);
            turn(query, a, row);
            BY_TYPE(a.type, attend_one, a, query, h, start, position + 1, scores, out);
            store_head(out, a, a.y, (row * a.heads + h) * a.dim);
        }
    });
    return true;
}

// A prompt's queries are taken a few at a time, their keys a panel at a time.
constexpr int64_t QUERIES = 4;
constexpr int64_t PART_QUERIES = 32;  // that a thread takes at once
constexpr int64_t KEY_VECTORS = WIDTH == 16 ? 4 : 2;
constexpr int64_t KEYS = KEY_VECTORS * WIDTH;

// What the threads of a call share: keys (kv_heads, panels, dim, KEYS), values (kv_heads, length,
// width), in float32.
struct Shared {
    int64_t width, panels;
    float *keys, *values;
};

// Keys and values of some tokens to the cache, and to `shared`.
static void share_keys(const AttendPrompt &a, const Shared &shared, int64_t kv, int64_t panel,
                       float *head) {
    for (int64_t j = panel * KEYS; j < (panel + 1) * KEYS; j++) {
        float *keys = shared.keys + (kv * shared.panels + panel) * a.dim * KEYS + j % KEYS;
        if (j >= a.length) {
            for (int64_t d = 0; d < a.dim; d++) keys[d * KEYS] = 0;
            continue;
        }
        int64_t at = (kv * a.capacity + j) * a.dim;
        load_head(head, a, j, a.heads + kv);
        turn(head, a, j);
        // What decoding will find in the cache.
        store_head(head, a, a.keys, at);
        for (int64_t d = 0; d < a.dim; d += WIDTH)
            store_as(head, d, FLOAT32, a.dim - d, load_as(a.keys, at + d, a.type, a.dim - d));
        for (int64_t d = 0; d < a.dim; d++) keys[d * KEYS] = head[d];
        float *values = shared.values + (kv * a.length + j) * shared.width;
        load_head(values, a, j, a.heads + a.kv_heads + kv);
        store_head(values, a, a.values, at);
        for (int64_t d = a.dim; d < shared.width; d++) values[d] = 0;
    }
}

// The scores of QUERIES queries (each `dim` apart) and a panel of keys.
static void score_panel(const float *queries, int64_t dim, const float *keys, float *scores,
                        int64_t stride) {
    VF sums[QUERIES][KEY_VECTORS];
    for (int64_t q = 0; q < QUERIES; q++)
        for (int64_t v = 0; v < KEY_VECTORS; v++) sums[q][v] = set_f(0);
    for (int64_t d = 0; d < dim; d++, keys += KEYS) {
        VF key[KEY_VECTORS];
        for (int64_t v = 0; v < KEY_VECTORS; v++) key[v] = load_f(keys + v * WIDTH);
        for (int64_t q = 0; q < QUERIES; q++) {
            VF value = set_f(queries[q * dim + d]);
            for (int64_t v = 0; v < KEY_VECTORS; v++)
                sums[q][v] = add_product(sums[q][v], value, key[v]);
        }
    }
    for (int64_t q = 0; q < QUERIES; q++)
        for (int64_t v = 0; v < KEY_VECTORS; v++)
            store_f(scores + q * stride + v * WIDTH, sums[q][v]);
}

// The values of `length` tokens, weighted for QUERIES queries: KEY_VECTORS vectors of channels.
static void weigh_values(const float *weights, int64_t stride, int64_t length, const float *values,
                         int64_t width, float (*out)[KEYS]) {
    VF sums[QUERIES][KEY_VECTORS];
    for (int64_t q = 0; q < QUERIES; q++)
        for (int64_t v = 0; v < KEY_VECTORS; v++) sums[q][v] = set_f(0);
    for (int64_t j = 0; j < length; j++, values += width) {
        VF value[KEY_VECTORS];
        for (int64_t v = 0; v < KEY_VECTORS; v++) value[v] = load_f(values + v * WIDTH);
        for (int64_t q = 0; q < QUERIES; q++) {
            VF weight = set_f(weights[q * stride + j]);
            for (int64_t v = 0; v < KEY_VECTORS; v++)
                sums[q][v] = add_product(sums[q][v], weight, value[v]);
        }
    }
    for (int64_t q = 0; q < QUERIES; q++)
        for (int64_t v = 0; v < KEY_VECTORS; v++) store_f(out[q] + v * WIDTH, sums[q][v]);
}

// The queries of one head from `first` on, QUERIES of them or what is left.
static void attend_queries(const AttendPrompt &a, const Shared &shared, int64_t head, int64_t first,
                           float *queries, float *scores) {
    const int64_t count = a.length - first < QUERIES ? a.length - first : QUERIES;
    const int64_t length = first + count, stride = shared.panels * KEYS;
    const int64_t kv = head / (a.heads / a.kv_heads);
    const float root = 1 / sqrtf(float(a.dim)), slope = a.slopes ? a.slopes[head] : 0;
    for (int64_t q = 0; q < QUERIES; q++) {
        // Missing queries are the last one again.
        int64_t row = first + (q < count ? q : count - 1);
        load_head(queries + q * a.dim, a, row, head);
        turn(queries + q * a.dim, a, row);
    }
    for (int64_t panel = 0; panel * KEYS < length; panel++) {
        const float *keys = shared.keys + (kv * shared.panels + panel) * a.dim * KEYS;
        score_panel(queries, a.dim, keys, scores + panel * KEYS, stride);
    }
    float share[QUERIES];
    for (int64_t q = 0; q < QUERIES; q++) {
        float *row = scores + q * stride, largest = -INFINITY;
        int64_t position = first + (q < count ? q : count - 1);
        for (int64_t j = 0; j <= position; j++) {
            row[j] = row[j] * root + slope * float(j - position);
            largest = row[j] > largest ? row[j] : largest;
        }
        share[q] = 1 / exponents(row, position + 1, largest);
        // Keys behind the query, and the panel's filling, weigh nothing.
        for (int64_t j = position + 1; j < length; j++) row[j] = 0;
    }
    for (int64_t d = 0; d < a.dim; d += KEYS) {
        alignas(64) float out[QUERIES][KEYS];
        const float *values = shared.values + kv * a.length * shared.width + d;
        weigh_values(scores, stride, length, values, shared.width, out);
        for (int64_t q = 0; q < count; q++)
            for (int64_t i = 0; i < KEYS && d + i < a.dim; i += WIDTH) {
                VF value = mul_f(load_f(out[q] + i), set_f(share[q]));
                int64_t at = ((first + q) * a.heads + head) * a.dim + d + i;
                store_as(a.y, at, a.type, a.dim - d - i, value);
            }
    }
}

static bool attend_prompt(const AttendPrompt &a) {
    Shared shared;
    shared.width = (a.dim + KEYS - 1) / KEYS * KEYS;
    shared.panels = (a.length + KEYS - 1) / KEYS;
    int64_t keys = a.kv_heads * shared.panels * a.dim * KEYS;
    int64_t values = a.kv_heads * a.length * shared.width;
    int64_t queries = (QUERIES * a.dim + 15) / 16 * 16;
    int64_t each = queries + QUERIES * shared.panels * KEYS + 16;
    int64_t total = keys + values + each * most_threads();
    float *memory = static_cast<float *>(scratch(size_t(total * 4)));
    if (!memory) return false;
    shared.keys = memory;
    shared.values = memory + keys;
    int64_t parts = (a.length + PART_QUERIES - 1) / PART_QUERIES;
    auto own = [=](int64_t thread) { return memory + keys + values + thread * each; };
    for_each(a.kv_heads * shared.panels, true, [&](int64_t i, int64_t thread) {
        share_keys(a, shared, i / shared.panels, i % shared.panels, own(thread));
    });
    // A head's rows, which are longer the later they are, in turn with the other heads'.
    for_each(a.heads * parts, true, [&](int64_t i, int64_t thread) {
        int64_t start = i % parts * PART_QUERIES, end = smaller(start + PART_QUERIES, a.length);
        for (int64_t q = start; q < end; q += QUERIES)
            attend_queries(a, shared, i / parts, q, own(thread), own(thread) + queries);
    });
    return true;
}

}  // namespace
}  // namespace qllm
