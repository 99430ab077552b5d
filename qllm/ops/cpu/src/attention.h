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

// The score of a product of a query and a key: cap tanh u = cap (1 - 2 / (1 + e^2u)).
inline VF capped(VF product, float scale, float cap) {
    const VF e = exp_f(mul_f(product, set_f(2 * scale / cap)));
    return mul_f(sub_f(set_f(1), div_f(set_f(2), add_f(set_f(1), e))), set_f(cap));
}

// Scores from products of queries and keys, where they are capped; else the scale is left to do.
inline float cap_scores(const Attend &a, float *scores, int64_t count) {
    const float scale = float(a.scale), cap = float(a.cap);
    if (!(cap > 0)) return scale;
    for (int64_t j = 0; j < count; j += WIDTH)
        store<FLOAT32>(scores, j, count - j,
                       capped(load<FLOAT32>(scores, j, count - j), scale, cap));
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

// The softmax of a query's scores so far, which come RUN at a time: sums of e^(s - top).
struct Softmax {
    float top;
    VF sum, factor;  // what came before the latest scores is to be multiplied with the factor
};
constexpr float LOWEST = -3.4028234e38f;
inline Softmax no_softmax() { return {LOWEST, set_f(0), set_f(1)}; }

// What results are to be multiplied with at the end; NaN where no score was finite.
inline VF share_of(const Softmax &softmax) {
    return set_f(softmax.top == LOWEST ? NAN : 1 / sum_of(softmax.sum));
}

// Products of a query at `position` and the keys of RUN tokens, from `first` on, to weights
// e^(s - top); those of tokens outside of [begin, end) to 0.
inline void to_weights(const Attend &a, Softmax *softmax, float slope, int64_t position,
                       int64_t first, int64_t begin, int64_t end, float *scores) {
    alignas(64) static const float LANE[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    constexpr int64_t COUNT = RUN / WIDTH;
    const float scale = float(a.scale), cap = float(a.cap);
    VF s[COUNT];
    for (int64_t v = 0; v < COUNT; v++) s[v] = load_f(scores + v * WIDTH);
    const auto fill = [&](float with) {
        if (begin <= first && end >= first + RUN) return;
        for (int64_t v = 0; v < COUNT; v++) store_f(scores + v * WIDTH, s[v]);
        for (int64_t j = first; j < first + RUN; j++)
            if (j < begin || j >= end) scores[j - first] = with;
        for (int64_t v = 0; v < COUNT; v++) s[v] = load_f(scores + v * WIDTH);
    };
    for (VF &score : s) score = cap > 0 ? capped(score, scale, cap) : mul_f(score, set_f(scale));
    if (a.slopes)
        for (int64_t v = 0; v < COUNT; v++) {
            const VF distance = set_f(float(first + v * WIDTH - position));
            s[v] = add_f(s[v], mul_f(set_f(slope), add_f(load_f(LANE), distance)));
        }
    fill(LOWEST);
    VF most = set_f(softmax->top);
    for (VF score : s) most = max_f(score, most);
    const float top = max_of(most);
    softmax->factor = set_f(1);
    if (top > softmax->top) {
        softmax->factor = exp_f(set_f(softmax->top - top));
        softmax->sum = mul_f(softmax->sum, softmax->factor);
        softmax->top = top;
    }
    for (VF &score : s) score = exp_f(sub_f(score, set_f(top)));
    fill(0);
    for (int64_t v = 0; v < COUNT; v++) {
        softmax->sum = add_f(softmax->sum, s[v]);
        store_f(scores + v * WIDTH, s[v]);
    }
}

// Keys and values of up to RUN tokens of a head as they came, from element `start` on.
struct Tokens {
    int64_t start, count;
};

// A query (dim,) times the keys of some tokens; what fills RUN up is 0.
template <int64_t TYPE>
void score_tokens(const Attend &a, const Tokens &tokens, const float *query, float *scores) {
    int64_t j = 0, start = tokens.start;
    for (; j + 4 <= tokens.count; j += 4, start += 4 * a.dim) {
        VF s0 = set_f(0), s1 = s0, s2 = s0, s3 = s0;
        for (int64_t i = 0; i < a.dim; i += WIDTH) {
            const int64_t count = a.dim - i, at = start + i;
            const VF q = load<FLOAT32>(query, i, count);
            s0 = fma_f(q, load<TYPE>(a.keys, at, count), s0);
            s1 = fma_f(q, load<TYPE>(a.keys, at + a.dim, count), s1);
            s2 = fma_f(q, load<TYPE>(a.keys, at + 2 * a.dim, count), s2);
            s3 = fma_f(q, load<TYPE>(a.keys, at + 3 * a.dim, count), s3);
        }
        scores[j] = sum_of(s0);
        scores[j + 1] = sum_of(s1);
        scores[j + 2] = sum_of(s2);
        scores[j + 3] = sum_of(s3);
    }
    for (; j < tokens.count; j++, start += a.dim)
        scores[j] = dot_product<TYPE>(query, a.keys, start, a.dim);
    for (; j < RUN; j++) scores[j] = 0;
}

// out (dim,) = out times a factor + the values of some tokens, weighted.
template <int64_t TYPE>
void add_tokens(const Attend &a, const Tokens &tokens, const float *weights, VF factor,
                float *out) {
    int64_t i = 0;
    for (; i + 4 * WIDTH <= a.dim; i += 4 * WIDTH) {
        VF s[4];
        for (int v = 0; v < 4; v++) s[v] = mul_f(load_f(out + i + v * WIDTH), factor);
        for (int64_t j = 0, at = tokens.start + i; j < tokens.count; j++, at += a.dim)
            for (int v = 0; v < 4; v++)
                s[v] = fma_f(set_f(weights[j]), load_all<TYPE>(a.values, at + v * WIDTH), s[v]);
        for (int v = 0; v < 4; v++) store_f(out + i + v * WIDTH, s[v]);
    }
    for (; i < a.dim; i += WIDTH) {
        VF sum = mul_f(load_f(out + i), factor);
        for (int64_t j = 0, at = tokens.start + i; j < tokens.count; j++, at += a.dim)
            sum = fma_f(set_f(weights[j]), load<TYPE>(a.values, at, a.dim - i), sum);
        store_f(out + i, sum);
    }
}

// A thread's memory for `attend_token`, in elements of 4 bytes: of all heads that share one of keys
// and values.
struct TokenMemory {
    int64_t queries, outs, scores, softmax, integers, numbers, planes, all;
};
static TokenMemory token_memory(const Attend &a) {
    const int64_t shared = a.heads / a.kv_heads, most = a.width > RUN ? a.width : RUN;
    const auto whole = [](int64_t bytes) { return (bytes + 63) / 64 * 16; };
    TokenMemory m;
    m.queries = 0;
    m.outs = m.queries + shared * a.width;
    m.scores = m.outs + shared * a.width;
    m.softmax = m.scores + shared * RUN;
    m.integers = m.softmax + whole(shared * int64_t(sizeof(Softmax)));
    m.numbers = m.integers + whole(shared * int64_t(sizeof(Integers)));
    m.planes = m.numbers + 2 * RUN * a.width;  // a run of keys and values
    m.all = m.planes + shared * most;
    return m;
}

// A sequence's new token, all heads that share one of keys and values, over RUN tokens after the
// other: integers, where the cache holds them, but for those of the token's own run. Heads go side
// by side through what is done with integers, none of which waits for that of another.
//
// Nothing is prefetched: keys and values are two streams, which processors see coming, and Zen 4
// reads them at half the rate where it is told.
template <int64_t TYPE, int BITS>
void attend_token(const Attend &a, int64_t i, int64_t kv, float *memory) {
    const int64_t shared = a.heads / a.kv_heads, position = a.positions[i], row = a.rows[i];
    const int64_t own = position / RUN, length = position + 1, base = code_base(BITS);
    const int64_t first = unseen(a.window, position), most = a.width > RUN ? a.width : RUN;
    const TokenMemory at = token_memory(a);
    float *numbers = memory + at.numbers;
    Softmax *softmax = reinterpret_cast<Softmax *>(memory + at.softmax);
    Integers *x = reinterpret_cast<Integers *>(memory + at.integers);
    const auto query = [=](int64_t h) { return memory + at.queries + h * a.width; };
    const auto out = [=](int64_t h) { return memory + at.outs + h * a.width; };
    const auto scores = [=](int64_t h) { return memory + at.scores + h * RUN; };
    for (int64_t h = 0; h < shared; h++) {
        for (int64_t d = 0; d < a.width; d++) query(h)[d] = out(h)[d] = 0;
        load_head(query(h), a, i, kv * shared + h);
        rotate(query(h), a, i);
        softmax[h] = no_softmax();
        x[h].planes = reinterpret_cast<int8_t *>(memory + at.planes + h * most);
    }
    const auto weigh = [&](int64_t h, int64_t run) {
        const float slope = a.slopes ? a.slopes[kv * shared + h] : 0;
        to_weights(a, &softmax[h], slope, position, run * RUN, first, length, scores(h));
    };
    int64_t run = first / RUN;
    if constexpr (BITS != 16)
        for (; run < own; run++) {
            const Codes c = codes_of(a, row, kv, run);
            for (int64_t h = 0; h < shared; h++)
                to_integers(&x[h], query(h), numbers, c.key_scales, c.key_zeros, base, a.width);
            for (int64_t h = 0; h < shared; h++) score_run<BITS>(c.keys, a.width, x[h], scores(h));
            for (int64_t h = 0; h < shared; h++) weigh(h, run);
            for (int64_t h = 0; h < shared; h++)
                to_integers(&x[h], scores(h), numbers, c.value_scales, c.value_zeros, base, RUN);
            for (int64_t h = 0; h < shared; h++)
                add_values<BITS>(c.values, a.width, x[h], softmax[h].factor, out(h));
        }
    for (; run <= own; run++) {
        const int64_t held = BITS == 16 ? a.capacity : RUN, from = BITS == 16 ? run * RUN : 0;
        const Tokens tokens = {((row * a.kv_heads + kv) * held + from) * a.dim,
                               smaller(length - run * RUN, RUN)};
        for (int64_t h = 0; h < shared; h++) {
            score_tokens<TYPE>(a, tokens, query(h), scores(h));
            weigh(h, run);
            add_tokens<TYPE>(a, tokens, scores(h), softmax[h].factor, out(h));
        }
    }
    for (int64_t h = 0; h < shared; h++) {
        const VF share = share_of(softmax[h]);
        for (int64_t d = 0; d < a.width; d += WIDTH)
            store_f(out(h) + d, mul_f(load_f(out(h) + d), share));
        store_head(out(h), a, a.y, (i * a.heads + kv * shared + h) * a.dim);
    }
    if (BITS == 16 || length % RUN != 0) return;
    const int64_t start = (row * a.kv_heads + kv) * RUN * a.dim;
    float *keys = numbers, *values = numbers + RUN * a.dim;
    for (int64_t j = 0; j < RUN * a.dim; j += WIDTH) {
        const int64_t count = RUN * a.dim - j;
        store_as(keys, j, FLOAT32, count, load_as(a.keys, start + j, a.type, count));
        store_as(values, j, FLOAT32, count, load_as(a.values, start + j, a.type, count));
    }
    quantize_run(a, codes_of(a, row, kv, own), keys, values);
}
template <int64_t TYPE>
void attend_token(const Attend &a, int64_t i, int64_t kv, float *memory) {
    if (a.bits == 16) return attend_token<TYPE, 16>(a, i, kv, memory);
    a.bits == 8 ? attend_token<TYPE, 8>(a, i, kv, memory) : attend_token<TYPE, 4>(a, i, kv, memory);
}

static Status attend(const Attend &a) {
    int64_t longest = 0;
    for (int64_t i = 0; i < a.sequences; i++)
        if (a.positions[i] > longest) longest = a.positions[i];
    const int64_t each = token_memory(a).all;
    float *memory = static_cast<float *>(scratch(size_t(most_threads() * each * 4)));
    if (!memory) return Status::NO_MEMORY;
    int64_t work = a.sequences * a.heads * (longest + 1) * a.dim;
    for_each(a.sequences * a.kv_heads, work > WORTH_THREADS, [&](int64_t item, int64_t thread) {
        const int64_t i = item / a.kv_heads, kv = item % a.kv_heads;
        float *head = memory + thread * each;
        const int64_t held = a.bits == 16 ? a.capacity : RUN;
        const int64_t at = ((a.rows[i] * a.kv_heads + kv) * held + a.positions[i] % held) * a.dim;
        load_head(head, a, i, a.heads + kv);
        rotate(head, a, i);
        store_head(head, a, a.keys, at);
        load_head(head, a, i, a.heads + a.kv_heads + kv);
        store_head(head, a, a.values, at);
        BY_TYPE(a.type, attend_token, a, i, kv, head);
    });
    return Status::OK;
}

}  // namespace
}  // namespace qllm
