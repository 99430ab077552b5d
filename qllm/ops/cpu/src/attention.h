// Attention, in float32: of one new token per sequence to the cache, and of runs of tokens.
#pragma once

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "layout.h"
#include "steps.h"
#include "threads.h"

namespace qllm {
namespace {

// e^(s - m_i), the softmax before its division, in place of scores s of which m_i is the largest;
// their sum l_i.
inline float exponents(float *scores, int64_t count, float m_i) {
    VF l_i = set_f(0);
    for (int64_t j = 0; j < count; j += WIDTH) {
        VF e = exp_f(sub_f(load<FLOAT32>(scores, j, count - j), set_f(m_i)));
        if (count - j < WIDTH) e = first_of(e, count - j);
        l_i = add_f(l_i, e);
        store<FLOAT32>(scores, j, count - j, e);
    }
    return sum_of(l_i);
}

// How much further back than `window` tokens, its own included, a query at a position would see.
inline int64_t unseen(int64_t window, int64_t position) {
    return window > 0 && position + 1 > window ? position + 1 - window : 0;
}

// Scores from products of queries and keys, where they are capped; else the scale is left to do.
inline float cap_scores(const Attend &a, float *scores, int64_t count) {
    const float scale = float(a.scale), cap = float(a.cap);
    if (!(cap > 0)) return scale;
    for (int64_t j = 0; j < count; j += WIDTH) {
        // cap tanh u = cap (1 - 2 / (1 + e^2u))
        VF e = exp_f(mul_f(load<FLOAT32>(scores, j, count - j), set_f(2 * scale / cap)));
        VF value = sub_f(set_f(1), div_f(set_f(2), add_f(set_f(1), e)));
        store<FLOAT32>(scores, j, count - j, mul_f(value, set_f(cap)));
    }
    return 1;
}

// One head rotated by its cosines and sines: the halves (p, q) to (p cos - q sin, q cos + p sin).
static void rotate(float *head, const Attend &a, int64_t row) {
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

static void load_head(float *head, const Attend &a, int64_t row, int64_t index) {
    int64_t start = (row * (a.heads + 2 * a.kv_heads) + index) * a.dim;
    for (int64_t i = 0; i < a.dim; i += WIDTH)
        store_as(head, i, FLOAT32, a.dim - i, load_as(a.qkv, start + i, a.type, a.dim - i));
}

static void store_head(const float *head, const Attend &a, void *to, int64_t at) {
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
    const float slope = a.slopes ? a.slopes[head] : 0;
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
    const float scale = cap_scores(a, scores, length);
    float m_i = -INFINITY;
    for (j = 0; j < length; j++) {
        scores[j] = scores[j] * scale + slope * float(j - (length - 1));
        m_i = scores[j] > m_i ? scores[j] : m_i;
    }
    const VF share = set_f(1 / exponents(scores, length, m_i));
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

static Status attend(const Attend &a) {
    int64_t longest = 0;
    for (int64_t i = 0; i < a.sequences; i++)
        if (a.positions[i] > longest) longest = a.positions[i];
    int64_t capacity = (longest + 1 + 15) / 16 * 16, head = (a.dim + 15) / 16 * 16;
    int64_t each = capacity + 2 * head;
    float *memory = static_cast<float *>(scratch(size_t(most_threads() * each * 4)));
    if (!memory) return Status::NO_MEMORY;
    int64_t work = a.sequences * a.heads * (longest + 1) * a.dim;
    for_each(a.sequences * a.kv_heads, work > WORTH_THREADS, [&](int64_t item, int64_t thread) {
        int64_t i = item / a.kv_heads, kv = item % a.kv_heads, position = a.positions[i];
        float *query = memory + thread * each, *out = query + head;
        float *scores = out + head;
        int64_t start = (a.rows[i] * a.kv_heads + kv) * a.capacity * a.dim;
        int64_t at = start + position * a.dim, first = unseen(a.window, position);
        load_head(query, a, i, a.heads + kv);
        rotate(query, a, i);
        store_head(query, a, a.keys, at);
        load_head(query, a, i, a.heads + a.kv_heads + kv);
        store_head(query, a, a.values, at);
        int64_t shared = a.heads / a.kv_heads;
        for (int64_t h = kv * shared; h < (kv + 1) * shared; h++) {
            load_head(query, a, i, h);
            rotate(query, a, i);
            BY_TYPE(a.type, attend_one, a, query, h, start + first * a.dim, position + 1 - first,
                    scores, out);
            store_head(out, a, a.y, (i * a.heads + h) * a.dim);
        }
    });
    return Status::OK;
}

// A sequence's queries are taken a few at a time, its keys a panel at a time, from its first token
// on: what is summed, and in which order, does not depend on the runs in which the tokens come.
constexpr int64_t QUERIES = 4;
constexpr int64_t PART_QUERIES = 32;  // that a thread takes at once
constexpr int64_t KEY_VECTORS = WIDTH == 16 ? 4 : 2;
constexpr int64_t KEYS = KEY_VECTORS * WIDTH;
constexpr int64_t SHARED_BYTES = 64 << 20;  // of keys and values in float32, but for one head's

// A run of tokens of one sequence, some heads of keys and values of which the threads share:
// keys (heads, panels, dim, KEYS), values (heads, length, width), in float32.
struct Sequence {
    int64_t row, token, past, length;  // of the cache; the first new one; those before; all
    int64_t kv_head, panels, width;    // the first head that is shared
    float *keys, *values;
};

// Keys and values of some tokens, of which the new ones go to the cache, to what is shared.
static void share_keys(const Attend &a, const Sequence &s, int64_t index, int64_t panel,
                       float *head) {
    const int64_t kv = s.kv_head + index;
    for (int64_t j = panel * KEYS; j < (panel + 1) * KEYS; j++) {
        float *keys = s.keys + (index * s.panels + panel) * a.dim * KEYS + j % KEYS;
        if (j >= s.length) {
            for (int64_t d = 0; d < a.dim; d++) keys[d * KEYS] = 0;
            continue;
        }
        int64_t at = ((s.row * a.kv_heads + kv) * a.capacity + j) * a.dim;
        float *values = s.values + (index * s.length + j) * s.width;
        if (j >= s.past) {
            int64_t token = s.token + j - s.past;
            load_head(head, a, token, a.heads + kv);
            rotate(head, a, token);
            store_head(head, a, a.keys, at);
            load_head(head, a, token, a.heads + a.kv_heads + kv);
            store_head(head, a, a.values, at);
        }
        // What decoding will find in the cache.
        for (int64_t d = 0; d < a.dim; d += WIDTH) {
            store_as(head, d, FLOAT32, a.dim - d, load_as(a.keys, at + d, a.type, a.dim - d));
            store_f(values + d, load_as(a.values, at + d, a.type, a.dim - d));
        }
        for (int64_t d = 0; d < a.dim; d++) keys[d * KEYS] = head[d];
        for (int64_t d = (a.dim + WIDTH - 1) / WIDTH * WIDTH; d < s.width; d++) values[d] = 0;
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

// The queries of one head from the new token `first` on, QUERIES of them or what is left.
static void attend_queries(const Attend &a, const Sequence &s, int64_t head, int64_t first,
                           float *queries, float *scores) {
    const int64_t tokens = s.length - s.past, count = smaller(tokens - first, QUERIES);
    const int64_t length = s.past + first + count, stride = s.panels * KEYS;
    const int64_t kv = head / (a.heads / a.kv_heads) - s.kv_head;
    const float slope = a.slopes ? a.slopes[head] : 0;
    // Panels of which no query sees anything are left out.
    const int64_t begin = unseen(a.window, s.past + first) / KEYS * KEYS;
    for (int64_t q = 0; q < QUERIES; q++) {
        // Missing queries are the last one again.
        int64_t token = s.token + first + (q < count ? q : count - 1);
        load_head(queries + q * a.dim, a, token, head);
        rotate(queries + q * a.dim, a, token);
    }
    for (int64_t panel = begin / KEYS; panel * KEYS < length; panel++) {
        const float *keys = s.keys + (kv * s.panels + panel) * a.dim * KEYS;
        score_panel(queries, a.dim, keys, scores + panel * KEYS, stride);
    }
    float share[QUERIES];
    for (int64_t q = 0; q < QUERIES; q++) {
        float *row = scores + q * stride, m_i = -INFINITY;
        int64_t position = s.past + first + (q < count ? q : count - 1);
        int64_t start = unseen(a.window, position), seen = position + 1 - start;
        const float scale = cap_scores(a, row + start, seen);
        for (int64_t j = start; j <= position; j++) {
            row[j] = row[j] * scale + slope * float(j - position);
            m_i = row[j] > m_i ? row[j] : m_i;
        }
        share[q] = 1 / exponents(row + start, seen, m_i);
        // Keys in front of the window and behind the query, and the panel's filling, weigh nothing.
        for (int64_t j = begin; j < start; j++) row[j] = 0;
        for (int64_t j = position + 1; j < length; j++) row[j] = 0;
    }
    for (int64_t d = 0; d < a.dim; d += KEYS) {
        alignas(64) float out[QUERIES][KEYS];
        const float *values = s.values + (kv * s.length + begin) * s.width + d;
        weigh_values(scores + begin, stride, length - begin, values, s.width, out);
        for (int64_t q = 0; q < count; q++)
            for (int64_t i = 0; i < KEYS && d + i < a.dim; i += WIDTH) {
                VF value = mul_f(load_f(out[q] + i), set_f(share[q]));
                int64_t at = ((s.token + first + q) * a.heads + head) * a.dim + d + i;
                store_as(a.y, at, a.type, a.dim - d - i, value);
            }
    }
}

// The run of tokens of one sequence; of a long one a few heads at a time, so that memory is bounded.
static bool attend_run(const Attend &a, int64_t index) {
    Sequence s;
    s.row = a.rows[index], s.token = a.starts[index], s.past = a.positions[s.token];
    const int64_t tokens = a.starts[index + 1] - s.token, shared = a.heads / a.kv_heads;
    s.length = s.past + tokens;
    s.width = (a.dim + KEYS - 1) / KEYS * KEYS;
    s.panels = (s.length + KEYS - 1) / KEYS;
    const int64_t keys = s.panels * a.dim * KEYS, values = s.length * s.width;
    const int64_t fitting = SHARED_BYTES / 4 / (keys + values);
    const int64_t at_once = fitting < 1 ? 1 : smaller(fitting, a.kv_heads);
    const int64_t queries = (QUERIES * a.dim + 15) / 16 * 16;
    const int64_t each = queries + QUERIES * s.panels * KEYS + 16;
    const int64_t total = at_once * (keys + values) + each * most_threads();
    float *memory = static_cast<float *>(scratch(size_t(total * 4)));
    if (!memory) return false;
    s.keys = memory;
    s.values = memory + at_once * keys;
    auto own = [=](int64_t thread) {
        return memory + at_once * (keys + values) + thread * each;
    };
    const int64_t parts = (tokens + PART_QUERIES - 1) / PART_QUERIES;
    for (s.kv_head = 0; s.kv_head < a.kv_heads; s.kv_head += at_once) {
        const int64_t heads = smaller(at_once, a.kv_heads - s.kv_head);
        for_each(heads * s.panels, true, [&](int64_t i, int64_t thread) {
            share_keys(a, s, i / s.panels, i % s.panels, own(thread));
        });
        // A head's rows, which are longer the later they are, in turn with the other heads'.
        for_each(heads * shared * parts, true, [&](int64_t i, int64_t thread) {
            const int64_t head = s.kv_head * shared + i / parts;
            int64_t first = i % parts * PART_QUERIES, end = smaller(first + PART_QUERIES, tokens);
            for (; first < end; first += QUERIES)
                attend_queries(a, s, head, first, own(thread), own(thread) + queries);
        });
    }
    return true;
}

static Status attend_prefill(const Attend &a) {
    for (int64_t i = 0; i < a.sequences; i++)
        if (!attend_run(a, i)) return Status::NO_MEMORY;
    return Status::OK;
}

}  // namespace
}  // namespace qllm
