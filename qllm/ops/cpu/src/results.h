// How the sums over blocks become results: scales and zeros of the weights, bias, and the rows that
// integers cannot stand for.
#pragma once

#include "activations.h"
#include "isa.h"
#include "layout.h"
#include "operands.h"
#include "scales.h"

namespace qllm {
namespace {

// The sums of a group of panels to y.
template <int P>
void finish(const Linear &a, const Activations &x, int64_t first, int64_t row, int64_t rows,
            int64_t panel, int64_t panels, const float *sums, const float *scales) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t start = (first + row + r) * a.out;
        for (int64_t lane = 0; lane < panels * LANES; lane += WIDTH) {
            int64_t channel = panel * LANES + lane, count = a.out - channel;
            if (count <= 0) break;
            const float *sum = sums + r * GROUP_LANES + lane;
            VF value;
            if (is_scaled(a)) {
                value = load_f(sum);
            } else {
                value = to_float(load_i(reinterpret_cast<const int32_t *>(sum)));
                value = mul_f(value, set_f(x.scale[row + r]));
                value = mul_f(value, load_f(scales + lane));
            }
            if (a.bias) value = add_f(value, load_as(a.bias, channel, a.x_type, count));
            store_as(a.y, start + channel, a.x_type, count, value);
        }
    }
}

static float one(const void *p, int64_t i, int64_t type) {
    alignas(64) float value[WIDTH];
    store_f(value, load_as(p, i, type, 1));
    return value[0];
}

// A row with numbers that integers cannot stand for: the products as they are.
static void multiply_fallback_row(const Linear &a, int64_t row, int64_t panel, int64_t panels) {
    int64_t k_blocks = row_k_blocks(a.in, a.group), groups = (a.in + a.group - 1) / a.group;
    for (int64_t n = panel * LANES; n < smaller(a.out, (panel + panels) * LANES); n++) {
        double sum = 0;  // K products one by one: in float32 their roundings would add up
        for (int64_t k = 0; k < a.in; k++) {
            const Place at = place_of(k, a.group);
            const auto number = [&](const void *of_groups) {
                return scale_at(of_groups, a.scale_type, a.group, groups, n / LANES, k / a.group,
                                n % LANES);
            };
            const int64_t from = (n / LANES * k_blocks + at.k_block) * 64 * a.held_bits();
            int value = integer_at(a, a.q + from, n % LANES, at.input);
            const int64_t zero = (n / LANES * groups + k / a.group) * LANES + n % LANES;
            if (!a.offsets) value -= a.zeros ? a.zeros[zero] : 1 << (a.bits - 1);
            float weight = float(value) * number(a.scales);
            if (a.offsets) weight += number(a.offsets);
            sum += one(a.x, row * a.x_stride + k, a.x_type) * weight;
        }
        if (a.bias) sum += one(a.bias, n, a.x_type);
        // Of two that are no numbers, whose bits remain is the compiler's choice.
        const float result = sum == sum ? float(sum) : __builtin_nanf("");
        store_as(a.y, row * a.out + n, a.x_type, 1, set_f(result));
    }
}

// The scales and zeros, or offsets, of a group of inputs, for some panels, `step` apart.
struct Grid {
    alignas(64) float scales[GROUP_LANES];
    alignas(64) int32_t zeros[GROUP_LANES];
    alignas(64) float offsets[GROUP_LANES];

    // What a tile's products take of them.
    Operands operands(const Linear &a) const {
        Operands o;
        o.scales = scales;
        o.zeros = zeros;
        o.offsets = a.offsets ? offsets : nullptr;
        o.scaled = is_scaled(a);
        return o;
    }

    // Of weights of which the middle is taken off their zeros are, too.
    INLINE void load(const Linear &a, int64_t panel, int64_t panels, int64_t group,
                     int64_t step = 1, bool centered = false) {
        int64_t groups = (a.in + a.group - 1) / a.group;
        for (int64_t p = 0; p < panels; p++) {
            int64_t from = ((panel + p * step) * groups + group) * LANES, to = p * LANES;
            const auto numbers = [&](const void *of_groups, int64_t lane) INLINE {
                return scales_at(of_groups, a.scale_type, a.group, groups, panel + p * step, group,
                                 lane);
            };
            for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
                VF scale = numbers(a.scales, lane);
                store_f(scales + to + lane, scale);
                if (a.offsets) {  // on integers without their middle, whose sums are smaller
                    VF offset = numbers(a.offsets, lane);
                    VF middle = set_f(float(1 << (a.bits - 1)));
                    store_f(offsets + to + lane, fma_f(scale, middle, offset));
                }
                const VI middle = set_i(1 << (a.bits - 1));
                VI zero = a.zeros ? load_bytes(a.zeros + from + lane) : middle;
                if (centered) zero = sub_i(zero, middle);
                store_i(zeros + to + lane, zero);
            }
        }
    }
};

}  // namespace
}  // namespace qllm
