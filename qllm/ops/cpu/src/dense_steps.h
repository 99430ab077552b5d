// Steps of dense products, and what becomes of their sums.
#pragma once

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "operands.h"

namespace qllm {
namespace {

// A step is what a vector takes of each of its channels, or a row, at once: 4 bytes, one input as
// float32 or, where there is an instruction for them, two as bfloat16.
template <int64_t TYPE> constexpr bool IN_PAIRS = HAS_PAIRS && TYPE == BFLOAT16;
template <int64_t TYPE> constexpr int64_t INPUTS = IN_PAIRS<TYPE> ? 2 : 1;  // of a step

// WIDTH steps of a row, in pairs of bfloat16 or not; zeros for a row that is not there.
template <int64_t TYPE, bool PAIRS>
INLINE inline VF load_steps(const Dense &a, int64_t row, int64_t step) {
    const int64_t input = step * (PAIRS ? 2 : 1), at = row * a.x_stride + input;
    const int64_t count = row < a.rows ? a.in - input : 0;
    if constexpr (PAIRS && TYPE == BFLOAT16) {
        alignas(64) float some[WIDTH] = {};
        const uint16_t *from = static_cast<const uint16_t *>(a.x) + at;
        if (count >= 2 * WIDTH) return load_f(reinterpret_cast<const float *>(from));
        if (count > 0) __builtin_memcpy(some, from, size_t(count * 2));
        return load_f(some);
    } else if constexpr (PAIRS) {
        return as_pairs(load<TYPE>(a.x, at, count), load<TYPE>(a.x, at + WIDTH, count - WIDTH));
    } else {
        return load<TYPE>(a.x, at, count);
    }
}

// Some channels' sums of a row, with the bias, as results.
template <int64_t TYPE>
void store_sums(const Dense &a, int64_t row, int64_t channel, int64_t channels, const float *sums) {
    for (int64_t i = 0; i < channels && channel + i < a.out; i += WIDTH) {
        VF value = load_f(sums + i);
        const int64_t count = a.out - channel - i;
        if (a.bias) value = add_f(value, load<TYPE>(a.bias, channel + i, count));
        store<TYPE>(a.y, row * a.out + channel + i, count, value);
    }
}

}  // namespace
}  // namespace qllm
