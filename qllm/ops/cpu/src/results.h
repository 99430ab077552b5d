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

// A vector of channels of a row to y, with the bias.
INLINE inline void store_result(const Linear &a, int64_t row, int64_t channel, VF value) {
    const int64_t count = a.out - channel;
    if (a.bias) value = add_f(value, load_as(a.bias, channel, a.x_type, count));
    store_as(a.y, row * a.out + channel, a.x_type, count, value);
}

// The sums of a group of panels to y.
template <int P>
void finish(const Linear &a, const Activations &x, int64_t first, int64_t row, int64_t rows,
            int64_t panel, int64_t panels, const float *sums, const float *scales) {
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t lane = 0; lane < panels * LANES; lane += WIDTH) {
            const int64_t channel = panel * LANES + lane;
            if (channel >= a.out) break;
            const float *sum = sums + r * GROUP_LANES + lane;
            VF value;
            if (is_scaled(a)) {
                value = load_f(sum);
            } else {
                value = to_float(load_i(reinterpret_cast<const int32_t *>(sum)));
                value = mul_f(value, set_f(x.scale[row + r]));
                value = mul_f(value, load_f(scales + lane));
            }
            store_result(a, first + row + r, channel, value);
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

// What a tile's products take, but for the block.
inline Operands operands_of(const Linear &a, float *out) {
    Operands o;
    o.scaled = is_scaled(a);
    o.out = out;
    return o;
}

// Numbers of a run of groups of a panel, which are loaded to places `width` numbers apart.
struct Numbers {
    int64_t type, group_size, groups, panel, begin, count;

    void load(const void *from, float *to, int64_t width) const {
        if (type == FLOAT16) return load_plain<FLOAT16>(from, to, width);
        if (type == BFLOAT16) return load_plain<BFLOAT16>(from, to, width);
        if (type == FLOAT32) return load_plain<FLOAT32>(from, to, width);
        if (type == POWERS) return load_powers(static_cast<const uint8_t *>(from), to, width);
        const Factors factors(from, group_size, groups, panel);
        for (int64_t g = begin; g < begin + count; g++, to += width)
            for (int64_t lane = 0; lane < LANES; lane += WIDTH)
                store_f(to + lane, factors.at(g, lane));
    }

    // Zeros less `base`.
    void load_zeros(const uint8_t *from, int32_t base, int32_t *to, int64_t width) const {
        from += (panel * groups + begin) * LANES;
        for (int64_t g = 0; g < count; g++, from += LANES, to += width)
            for (int64_t lane = 0; lane < LANES; lane += WIDTH)
                store_i(to + lane, sub_i(load_bytes(from + lane), set_i(base)));
    }

private:
    void load_powers(const uint8_t *from, float *to, int64_t width) const {
        from += (panel * groups + begin) * LANES;
        for (int64_t g = 0; g < count; g++, from += LANES, to += width)
            for (int64_t lane = 0; lane < LANES; lane += WIDTH)
                store_f(to + lane, powers_at(from + lane));
    }

    template <int64_t TYPE>
    INLINE void load_plain(const void *from, float *to, int64_t width) const {
        const int64_t at = (panel * groups + begin) * LANES;
        for (int64_t g = 0; g < count; g++, to += width)
            for (int64_t lane = 0; lane < LANES; lane += WIDTH)
                store_f(to + lane, load_all<TYPE>(from, at + g * LANES + lane));
    }
};

// The scales and zeros, or offsets, of some groups of inputs and panels, as tiles take them. They
// are made for a run of groups at once: group by group, finding where they lie takes longer than
// making them, and, where groups are small, about as long as the products.
struct Grid {
    static constexpr int64_t ROOM = 32;  // for groups times panels
    int64_t begin = 0, end = 0;  // the groups
    int32_t middle = 0;          // their zeros where the weight has none
    alignas(64) float scales[ROOM * LANES];
    alignas(64) int32_t zeros[ROOM * LANES];  // where it has some
    alignas(64) float offsets[ROOM * LANES];

    // Lets products take a group's, of so many panels.
    INLINE void point(Operands &o, const Linear &a, int64_t group, int64_t panels) const {
        const int64_t at = (group - begin) * panels * LANES;
        o.scales = scales + at;
        o.zeros = a.zeros ? zeros + at : nullptr;
        o.middle = middle;
        o.offsets = a.offsets ? offsets + at : nullptr;
    }

    // Those of up to `count` groups from `group` on, of panels `step` apart. Of weights that are
    // less their middle zeros are, too.
    __attribute__((noinline)) void load(const Linear &a, int64_t panel, int64_t panels,
                                        int64_t group, int64_t count, int64_t step = 1,
                                        bool centered = false) {
        const int64_t groups = (a.in + a.group - 1) / a.group;
        count = smaller(count, groups - group);
        const int64_t width = panels * LANES;  // of a group
        begin = group;
        end = group + count;
        const int32_t half = 1 << (a.bits - 1);
        middle = centered ? 0 : half;
        for (int64_t p = 0; p < panels; p++) {
            const Numbers numbers = {a.scale_type, a.group, groups, panel + p * step, group, count};
            float *own_scales = scales + p * LANES, *own_offsets = offsets + p * LANES;
            numbers.load(a.scales, own_scales, width);
            if (a.offsets) {  // on integers without their middle, whose sums are smaller
                numbers.load(a.offsets, own_offsets, width);
                const VF whole = set_f(float(half));
                for (int64_t i = 0; i < count * width; i += width)
                    for (int64_t lane = i; lane < i + LANES; lane += WIDTH)
                        store_f(own_offsets + lane, fma_f(load_f(own_scales + lane), whole,
                                                          load_f(own_offsets + lane)));
            }
            if (a.zeros) numbers.load_zeros(a.zeros, half - middle, zeros + p * LANES, width);
        }
    }
};

}  // namespace
}  // namespace qllm
