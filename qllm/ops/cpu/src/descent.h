// Coordinate descent on the integers of some channels: rows are lanes, since each goes its own way.
#pragma once

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "threads.h"

namespace qllm {
namespace {

inline void descend_lanes(const DescendBlock &a, int64_t start, float *slopes) {
    const int64_t count = a.rows - start;
    for (int64_t i = 0; i < a.channels; i++)
        store_f(slopes + i * WIDTH, load<FLOAT32>(a.gradient, i * a.rows + start, count));
    const VF qmax = set_f(float(a.qmax));
    for (int64_t i = 0; i < a.channels; i++) {
        const int64_t at = i * a.rows + start;
        const VF value = load<FLOAT32>(a.values, at, count);
        const VF lowest = load<FLOAT32>(a.low, at, count);
        const VF step = mul_f(load_f(slopes + i * WIDTH), load<FLOAT32>(a.step_sizes, at, count));
        // Clamped first: an integer holds no more than 2^31.
        const VF ideal = min_f(add_f(lowest, qmax), max_f(lowest, sub_f(value, step)));
        const VF best = to_float(nearest_i(ideal));
        const VF move = mul_f(sub_f(best, value), load<FLOAT32>(a.scales, at, count));
        store<FLOAT32>(a.values, at, count, best);
        store<FLOAT32>(a.moves, at, count, move);
        const float *products = a.products + i * a.stride;
        for (int64_t j = i + 1; j < a.channels; j++) {
            float *slope = slopes + j * WIDTH;
            store_f(slope, fma_f(set_f(products[j]), move, load_f(slope)));
        }
    }
}

static Status descend_block(const DescendBlock &a) {
    const int64_t vectors = (a.rows + WIDTH - 1) / WIDTH;
    bool no_memory = false;
    for_each(vectors, a.channels * a.channels * a.rows > WORTH_THREADS, [&](int64_t i, int64_t) {
        float *memory = static_cast<float *>(scratch(size_t(a.channels * WIDTH) * sizeof(float)));
        if (memory) {
            descend_lanes(a, i * WIDTH, memory);
        } else {
            __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
        }
    });
    return no_memory ? Status::NO_MEMORY : Status::OK;
}

}  // namespace
}  // namespace qllm
