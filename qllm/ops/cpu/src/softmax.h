// The softmax of attention: of all scores at once in a prefill, of RUN after the other in a
// decode step.
#pragma once

#include <math.h>

#include "elements.h"
#include "exponential.h"
#include "isa.h"
#include "kernels.h"

namespace qllm {
namespace {

alignas(64) constexpr float LANE[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// e^(s - m_i), the softmax before its division, in place of scores s of which m_i is the largest;
// their sum l_i. The least that exp_f knows becomes 0: sums of values that weigh no more, such as
// those of tokens far away under ALiBi, would be subnormal, for each of which Intel's processors
// take some hundred cycles.
inline float exponents(float *scores, int64_t count, float m_i) {
    const VF least = exp_f(set_f(LEAST_EXPONENT));
    VF l_i = set_f(0);
    for (int64_t j = 0; j < count; j += WIDTH) {
        VF e = exp_f(sub_f(load<FLOAT32>(scores, j, count - j), set_f(m_i)));
        e = sub_f(e, least);
        if (count - j < WIDTH) e = first_of(e, count - j);
        l_i = add_f(l_i, e);
        store<FLOAT32>(scores, j, count - j, e);
    }
    return sum_of(l_i);
}

// Scores in place to e^(s - m), of which m is the larger of their largest, `m_i`, and a sink, a
// score that weighs no value; none where it is null. What is returned divides them.
inline float exponents(float *scores, int64_t count, float *m_i, const float *sink) {
    if (!sink) return exponents(scores, count, *m_i);
    if (*sink > *m_i) *m_i = *sink;
    alignas(64) float first[WIDTH];
    store_f(first, exp_f(set_f(*sink - *m_i)));
    return exponents(scores, count, *m_i) + first[0];
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

// Scores s of keys of a query, `distance` from it (none behind it) and nearer, from products, in
// place; the largest.
inline float scale_scores(float *scores, int64_t count, float scale, float slope,
                          int64_t distance) {
    VF m_i = set_f(-INFINITY);
    for (int64_t j = 0; j < count; j += WIDTH) {
        const VF from = add_f(load_f(LANE), set_f(float(j + distance)));
        VF s = mul_f(load<FLOAT32>(scores, j, count - j), set_f(scale));
        s = add_f(s, mul_f(set_f(slope), from));
        store<FLOAT32>(scores, j, count - j, s);
        if (count - j < WIDTH) {
            alignas(64) float few[WIDTH];
            for (float &each : few) each = -INFINITY;
            for (int64_t i = j; i < count; i++) few[i - j] = scores[i];
            s = load_f(few);
        }
        m_i = max_f(s, m_i);
    }
    return max_of(m_i);
}

// The softmax of a query's scores so far, which come RUN at a time: m_i is the largest of them,
// l_i sums of e^(s - m_i).
struct Softmax {
    float m_i;
    VF l_i;
};
constexpr float LOWEST = -3.4028234e38f;
inline Softmax no_softmax() { return {LOWEST, set_f(0)}; }

// One in which there is a sink: a score that weighs no value.
inline Softmax softmax_of_sink(float sink) { return {sink, first_of(set_f(1), 1)}; }

// What results are to be multiplied with at the end; NaN where no score was finite.
inline VF share_of(const Softmax &softmax) {
    return set_f(softmax.m_i == LOWEST ? NAN : 1 / sum_of(softmax.l_i));
}

// Products of a query at `position` and the keys of RUN tokens, from `first` on, to weights
// e^(s - m_i); those of tokens outside of [begin, end) to 0. What came before them is to be
// multiplied with what is returned, alpha.
inline VF to_weights(const Attend &a, Softmax *softmax, float slope, int64_t position,
                     int64_t first, int64_t begin, int64_t end, float *scores) {
    constexpr int64_t COUNT = RUN / WIDTH;
    const float cap = float(a.cap);
    const bool is_whole = begin <= first && end >= first + RUN;
    const auto each = [&](const auto &function) {
        for (int64_t v = 0; v < COUNT; v++)
            store_f(scores + v * WIDTH, function(load_f(scores + v * WIDTH), v));
    };
    const auto fill = [&](float with) {
        for (int64_t j = first; j < first + RUN; j++)
            if (j < begin || j >= end) scores[j - first] = with;
    };
    float scale = float(a.scale);
    // Where scores are products times a scale, and no more, the largest is the largest product's.
    if (cap > 0 || a.slopes || !is_whole || !(scale > 0)) {
        if (cap > 0)
            each([=](VF score, int64_t) { return capped(score, scale, cap); });
        else
            each([=](VF score, int64_t) { return mul_f(score, set_f(scale)); });
        if (a.slopes)
            each([=](VF score, int64_t v) {
                const VF distance = set_f(float(first + v * WIDTH - position));
                return add_f(score, mul_f(set_f(slope), add_f(load_f(LANE), distance)));
            });
        if (!is_whole) fill(LOWEST);
        scale = 1;
    }
    VF largest = set_f(-INFINITY);
    for (int64_t v = 0; v < COUNT; v++) largest = max_f(load_f(scores + v * WIDTH), largest);
    const float best = max_of(largest) * scale, m_i = best > softmax->m_i ? best : softmax->m_i;
    VF alpha = set_f(1);
    if (m_i > softmax->m_i) {
        alpha = exp_f(set_f(softmax->m_i - m_i));
        softmax->l_i = mul_f(softmax->l_i, alpha);
        softmax->m_i = m_i;
    }
    VF l_i = softmax->l_i;
    each([&](VF score, int64_t) {
        const VF weight = exp_f(sub_f(mul_f(score, set_f(scale)), set_f(m_i)));
        l_i = add_f(l_i, weight);
        return weight;
    });
    if (!is_whole) {
        fill(0);
        l_i = softmax->l_i;
        for (int64_t v = 0; v < COUNT; v++) l_i = add_f(l_i, load_f(scores + v * WIDTH));
    }
    softmax->l_i = l_i;
    return alpha;
}

}  // namespace
}  // namespace qllm
