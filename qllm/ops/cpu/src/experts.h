// Mixtures of experts: which experts each token takes, and in a step what they give.
#pragma once

#include <string.h>

#include <mutex>

#include "elements.h"
#include "exponential.h"
#include "isa.h"
#include "kernels.h"
#include "threads.h"

namespace qllm {
namespace {

constexpr float TAKEN = -1;  // in the place of a probability

template <int64_t TYPE> void route_row(const Route &a, int64_t row) {
    alignas(64) float p[MAX_EXPERTS];
    const int64_t count = a.experts, more = a.gate ? 1 : 0, first = row * (a.top_k + more);
    for (int64_t i = 0; i < count; i += WIDTH)
        store_f(p + i, load<TYPE>(a.logits, row * count + i, count - i));
    float most = p[0];
    for (int64_t i = 1; i < count; i++) most = p[i] > most ? p[i] : most;
    for (int64_t i = 0; i < count; i += WIDTH)
        store_f(p + i, exp_f(sub_f(load_f(p + i), set_f(most))));
    double total = 0;
    for (int64_t i = 0; i < count; i++) total += p[i];
    for (int64_t i = 0; i < count; i++) p[i] = float(p[i] / total);
    float sum = 0;
    for (int64_t taken = 0; taken < a.top_k; taken++) {
        int64_t best = 0;
        while (p[best] == TAKEN) best++;
        for (int64_t i = best + 1; i < count; i++)
            if (p[i] > p[best]) best = i;  // of equal ones the first
        a.weights[first + taken] = p[best];
        a.chosen[first + taken] = best;
        sum += p[best];
        p[best] = TAKEN;
    }
    for (int64_t i = 0; a.normalizes && i < a.top_k; i++) a.weights[first + i] /= sum;
    if (!more) return;
    alignas(64) float gate[WIDTH];
    store_f(gate, exp_f(sub_f(set_f(0), load<TYPE>(a.gate, row, 1))));
    a.weights[first + a.top_k] = 1 / (1 + gate[0]);
    a.chosen[first + a.top_k] = count;
}

static Status route(const Route &a) {
    for_each(a.rows, a.rows * a.experts * a.top_k > WORTH_THREADS,
             [&](int64_t row, int64_t) { BY_TYPE(a.type, route_row, a, row); });
    return Status::OK;
}

// Adds weight times a row of what an expert gives to a token's total.
template <int64_t TYPE>
void add_weighted(const Experts &a, int64_t from, int64_t to, float weight) {
    float *total = a.total + to * a.channels;
    for (int64_t i = 0; i < a.channels; i += WIDTH) {
        const int64_t count = a.channels - i;
        const VF given = load<TYPE>(a.given, from * a.channels + i, count);
        const VF before = load<FLOAT32>(total, i, count);
        store<FLOAT32>(total, i, count, add_f(before, mul_f(given, set_f(weight))));
    }
}

template <int64_t TYPE> void take_row(const Experts &a, int64_t from, int64_t to) {
    const int64_t bytes = a.channels * SIZE<TYPE>;
    memcpy(static_cast<char *>(a.taken) + to * bytes, static_cast<const char *>(a.x) + from * bytes,
           size_t(bytes));
}

template <int64_t TYPE> void round_total(const Experts &a, int64_t row) {
    for (int64_t i = 0; i < a.channels; i += WIDTH) {
        const int64_t at = row * a.channels + i, count = a.channels - i;
        store<TYPE>(a.y, at, count, load<FLOAT32>(a.total, at, count));
    }
}

// One expert after the other, each for those tokens that take it, some at a time: its calls are
// made of as many rows as that are. Their arguments are those of all steps of a layer.
static Status experts(const Experts &a) {
    static std::mutex one_step;
    const std::lock_guard<std::mutex> lock(one_step);
    memset(a.total, 0, size_t(a.rows * a.channels) * sizeof(float));
    const int64_t places = a.rows * a.top_k;
    for (int64_t expert = 0; expert < a.experts; expert++) {
        const Call *calls = a.calls + expert * a.calls_each;
        for (int64_t place = 0; place < places;) {
            int64_t found[MAX_TAKEN], count = 0;
            for (; place < places && count < a.capacity; place++)
                if (a.chosen[place] == expert) found[count++] = place;
            for (int64_t i = 0; i < count; i++)
                BY_TYPE(a.type, take_row, a, found[i] / a.top_k, i);
            for (int64_t i = 0; count && i < a.calls_each; i++) {
                *static_cast<int64_t *>(calls[i].arguments) = count;  // rows come first in all
                const int64_t status = calls[i].function(calls[i].arguments);
                if (status != int64_t(Status::OK)) return Status(status);
            }
            for (int64_t i = 0; i < count; i++)
                BY_TYPE(a.type, add_weighted, a, i, found[i] / a.top_k, a.weights[found[i]]);
        }
    }
    for (int64_t row = 0; row < a.rows; row++) BY_TYPE(a.type, round_total, a, row);
    return Status::OK;
}

}  // namespace
}  // namespace qllm
