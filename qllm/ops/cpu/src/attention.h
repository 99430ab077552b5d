// Attention, in float32, of one new token per sequence to the cache.
#pragma once

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "layout.h"
#include "quantized_attention.h"
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

// A thread's memory for `attend_codes`, in elements of 4 bytes.
struct CodesMemory {
    int64_t queries, scores, outs, numbers, planes, all;
};
static CodesMemory codes_memory(const Attend &a, int64_t capacity) {
    const int64_t shared = a.heads / a.kv_heads, most = a.width > RUN ? a.width : RUN;
    CodesMemory m;
    m.queries = 0;
    m.outs = shared * a.width;
    m.scores = 2 * m.outs;
    m.numbers = m.scores + shared * capacity;
    m.planes = m.numbers + 2 * RUN * a.width;  // a run of keys and values, too
    m.all = m.planes + most;
    return m;
}

// A sequence's new token, all heads that share one of keys and values: integers of the runs before
// its own, and what is in its own.
template <int64_t TYPE>
void attend_codes(const Attend &a, int64_t i, int64_t kv, int64_t capacity, float *memory) {
    const int64_t shared = a.heads / a.kv_heads, position = a.positions[i], row = a.rows[i];
    const int64_t runs = position / RUN, length = position + 1, recent = length - runs * RUN;
    const int64_t start = (row * a.kv_heads + kv) * RUN * a.dim, base = code_base(a.bits);
    const int64_t first = unseen(a.window, position), first_run = first / RUN;
    const CodesMemory at = codes_memory(a, capacity);
    float *queries = memory + at.queries, *outs = memory + at.outs, *numbers = memory + at.numbers;
    Integers x = {0, 0, reinterpret_cast<int8_t *>(memory + at.planes)};
    for (int64_t h = 0; h < shared; h++) {
        float *query = queries + h * a.width;
        for (int64_t d = 0; d < a.width; d++) query[d] = outs[h * a.width + d] = 0;
        load_head(query, a, i, kv * shared + h);
        rotate(query, a, i);
    }
    for (int64_t run = first_run; run < runs; run++) {
        const Codes c = codes_of(a, row, kv, run);
        for (int64_t h = 0; h < shared; h++) {
            for (int64_t d = 0; d < a.width; d += WIDTH) {
                VF scale = load_all<BFLOAT16>(c.key_scales, d);
                store_f(numbers + d, mul_f(load_f(queries + h * a.width + d), scale));
            }
            to_integers(&x, numbers, c.key_zeros, base, a.width);
            float *scores = memory + at.scores + h * capacity + run * RUN;
            if (a.bits == 8)
                score_run<8>(c.keys, a.width, x, scores);
            else
                score_run<4>(c.keys, a.width, x, scores);
        }
    }
    for (int64_t h = 0; h < shared; h++) {
        float *scores = memory + at.scores + h * capacity, m_i = -INFINITY;
        const float slope = a.slopes ? a.slopes[kv * shared + h] : 0;
        for (int64_t j = 0; j < recent; j++)
            scores[runs * RUN + j] =
                dot_product<TYPE>(queries + h * a.width, a.keys, start + j * a.dim, a.dim);
        const float scale = cap_scores(a, scores + first, length - first);
        for (int64_t j = first; j < length; j++) {
            scores[j] = scores[j] * scale + slope * float(j - position);
            m_i = scores[j] > m_i ? scores[j] : m_i;
        }
        // The query is not needed any more.
        queries[h * a.width] = 1 / exponents(scores + first, length - first, m_i);
        // Keys in front of the window weigh nothing.
        for (int64_t j = first_run * RUN; j < first; j++) scores[j] = 0;
    }
    for (int64_t run = first_run; run < runs; run++) {
        const Codes c = codes_of(a, row, kv, run);
        for (int64_t h = 0; h < shared; h++) {
            const float *weights_of = memory + at.scores + h * capacity + run * RUN;
            for (int64_t t = 0; t < RUN; t += WIDTH) {
                VF scale = load_all<BFLOAT16>(c.value_scales, t);
                store_f(numbers + t, mul_f(load_f(weights_of + t), scale));
            }
            to_integers(&x, numbers, c.value_zeros, base, RUN);
            if (a.bits == 8)
                add_values<8>(c.values, a.width, x, outs + h * a.width);
            else
                add_values<4>(c.values, a.width, x, outs + h * a.width);
        }
    }
    for (int64_t h = 0; h < shared; h++) {
        const float *weights_of = memory + at.scores + h * capacity + runs * RUN;
        float *out = outs + h * a.width;
        for (int64_t d = 0; d < a.dim; d += WIDTH) {
            VF sum = load_f(out + d);
            for (int64_t j = 0; j < recent; j++)
                sum = fma_f(set_f(weights_of[j]), load<TYPE>(a.values, start + j * a.dim + d, a.dim - d),
                            sum);
            store_f(out + d, mul_f(sum, set_f(queries[h * a.width])));
        }
        store_head(out, a, a.y, (i * a.heads + kv * shared + h) * a.dim);
    }
    if (recent < RUN) return;
    float *keys = numbers, *values = numbers + RUN * a.dim;
    for (int64_t j = 0; j < RUN * a.dim; j += WIDTH) {
        const int64_t count = RUN * a.dim - j;
        store_as(keys, j, FLOAT32, count, load_as(a.keys, start + j, a.type, count));
        store_as(values, j, FLOAT32, count, load_as(a.values, start + j, a.type, count));
    }
    quantize_run(a, codes_of(a, row, kv, runs), keys, values);
}

static Status attend(const Attend &a) {
    int64_t longest = 0;
    for (int64_t i = 0; i < a.sequences; i++)
        if (a.positions[i] > longest) longest = a.positions[i];
    int64_t capacity = (longest + 1 + 15) / 16 * 16, head = (a.dim + 15) / 16 * 16;
    int64_t each = a.bits == 16 ? capacity + 2 * head : codes_memory(a, capacity).all + head;
    float *memory = static_cast<float *>(scratch(size_t(most_threads() * each * 4)));
    if (!memory) return Status::NO_MEMORY;
    int64_t work = a.sequences * a.heads * (longest + 1) * a.dim;
    for_each(a.sequences * a.kv_heads, work > WORTH_THREADS, [&](int64_t item, int64_t thread) {
        int64_t i = item / a.kv_heads, kv = item % a.kv_heads, position = a.positions[i];
        float *query = memory + thread * each, *out = query + head;
        float *scores = out + head;
        const int64_t held = a.bits == 16 ? a.capacity : RUN;
        int64_t start = (a.rows[i] * a.kv_heads + kv) * held * a.dim;
        int64_t at = start + position % held * a.dim, first = unseen(a.window, position);
        load_head(query, a, i, a.heads + kv);
        rotate(query, a, i);
        store_head(query, a, a.keys, at);
        load_head(query, a, i, a.heads + a.kv_heads + kv);
        store_head(query, a, a.values, at);
        if (a.bits != 16) {
            BY_TYPE(a.type, attend_codes, a, i, kv, capacity, query + head);
            return;
        }
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

}  // namespace
}  // namespace qllm
