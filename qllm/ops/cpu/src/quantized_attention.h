// Keys and values as integers: see qllm/ops/quantized_kv.py for what they stand for.
#pragma once

#include <math.h>

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "layout.h"

namespace qllm {
namespace {

inline int64_t code_base(int64_t bits) { return bits == 8 ? 0 : 127; }

// Where the integers of a run of one head are.
struct Codes {
    uint8_t *keys, *values;
    uint16_t *key_scales, *value_scales;  // (width,) and (RUN,)
    uint8_t *key_zeros, *value_zeros;
};

static Codes codes_of(const Attend &a, int64_t row, int64_t kv, int64_t run) {
    const int64_t runs = a.capacity / RUN, at = (row * a.kv_heads + kv) * runs + run % runs;
    const int64_t bytes = RUN * a.width * a.bits / 8;
    return {a.key_codes + at * bytes,      a.value_codes + at * bytes,
            a.key_scales + at * a.width,   a.value_scales + at * RUN,
            a.key_zeros + at * a.width,    a.value_zeros + at * RUN};
}

// A byte, and the half of it, of the integer of a channel and a token.
struct CodeOffset {
    int64_t byte, shift;
};
inline CodeOffset key_offset(const Attend &a, int64_t channel, int64_t token) {
    const int64_t slots = RUN * a.bits / 8;
    return {(channel / 4 * slots + token % slots) * 4 + channel % 4, token / slots * 4};
}
inline CodeOffset value_offset(const Attend &a, int64_t channel, int64_t token) {
    const int64_t slots = RUN * a.bits / 8;
    return {(token % slots / 4 * a.width + channel) * 4 + token % 4, token / slots * 4};
}

inline int64_t code_at(const uint8_t *codes, CodeOffset offset, int64_t bits) {
    return bits == 8 ? codes[offset.byte] : codes[offset.byte] >> offset.shift & 15;
}

inline float from_bfloat16(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float v;
    __builtin_memcpy(&v, &bits, 4);
    return v;
}

// The numbers that integers of a run stand for.
inline float key_at(const Attend &a, const Codes &c, int64_t channel, int64_t token) {
    int64_t zero = c.key_zeros[channel] - code_base(a.bits);
    int64_t code = code_at(c.keys, key_offset(a, channel, token), a.bits);
    return float(code - zero) * from_bfloat16(c.key_scales[channel]);
}
inline float value_at(const Attend &a, const Codes &c, int64_t channel, int64_t token) {
    int64_t zero = c.value_zeros[token] - code_base(a.bits);
    int64_t code = code_at(c.values, value_offset(a, channel, token), a.bits);
    return float(code - zero) * from_bfloat16(c.value_scales[token]);
}

// The grid of numbers between two, all of which are finite or not.
struct CodeGrid {
    uint16_t scale;
    uint8_t zero;
    float step, offset;  // a code is x / step, rounded, + offset
    float max_code;      // 0 where a number is not finite
};
static CodeGrid code_grid(float low, float high, bool finite, int64_t bits) {
    const float base = float(code_base(bits)), steps = float((1 << bits) - 1);
    if (!finite) return {0x7FC0, 0, 1, 0, 0};
    if (base == 0) low = low < 0 ? low : 0, high = high > 0 ? high : 0;
    float scale = (high - low) / steps;
    if (base != 0) {
        float above = low / base, below = -low / (255 - base);
        scale = above > scale ? above : scale;
        scale = below > scale ? below : scale;
    }
    uint32_t word;
    __builtin_memcpy(&word, &scale, 4);
    uint16_t half = uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16);
    if (half == 0) half = 0x3F80;  // 1
    const float step = from_bfloat16(half), zero = base - __builtin_rintf(low / step);
    const uint8_t byte = uint8_t(zero < 0 ? 0 : zero > 255 ? 255 : zero);
    return {half, byte, step, float(byte) - base, steps};
}

// Codes of numbers, 0 where a grid has no others; what is not finite then is no matter.
inline VI codes_of_numbers(VF x, VF step, VF offset, VF max_code) {
    const VF code = add_f(to_float(round_i(div_f(x, step))), offset);
    return round_i(min_f(max_f(code, set_f(0)), max_code));
}

// The least and the largest of a run's keys in WIDTH channels, or of a token's values in one lane;
// `check` is not a number in a lane where one of them is not finite.
struct Range {
    VF low, high, check;
};
inline Range no_range() { return {set_f(INFINITY), set_f(-INFINITY), set_f(0)}; }
inline void extend(Range *range, VF x) {
    range->low = min_f(x, range->low);
    range->high = max_f(x, range->high);
    range->check = add_f(range->check, sub_f(x, x));
}

// A run's keys (RUN, dim) in float32 to integers, channel by channel.
static void quantize_keys(const Attend &a, const Codes &c, const float *keys) {
    const int64_t slots = RUN * a.bits / 8;
    for (int64_t d = 0; d < a.width; d += WIDTH) {
        Range range = no_range();
        for (int64_t t = 0; t < RUN; t++)
            extend(&range, load<FLOAT32>(keys + t * a.dim, d, a.dim - d));
        alignas(64) float low[WIDTH], high[WIDTH], check[WIDTH];
        alignas(64) float steps[WIDTH], offsets[WIDTH], max_codes[WIDTH];
        store_f(low, range.low), store_f(high, range.high), store_f(check, range.check);
        for (int64_t i = 0; i < WIDTH; i++) {
            const CodeGrid grid = code_grid(low[i], high[i], check[i] == 0, a.bits);
            c.key_scales[d + i] = grid.scale, c.key_zeros[d + i] = grid.zero;
            steps[i] = grid.step, offsets[i] = grid.offset, max_codes[i] = grid.max_code;
        }
        const VF step = load_f(steps), offset = load_f(offsets), max_code = load_f(max_codes);
        const auto codes = [&](int64_t t) {
            const VF x = load<FLOAT32>(keys + t * a.dim, d, a.dim - d);
            return codes_of_numbers(x, step, offset, max_code);
        };
        for (int64_t t = 0; t < slots; t++) {
            VI bytes = codes(t);
            if (slots < RUN) bytes = add_i(bytes, shift_left<4>(codes(t + slots)));
            alignas(16) int8_t four_by_four[16];
            store_bytes(four_by_four, bytes);
            for (int64_t i = 0; i < WIDTH; i++)
                c.keys[((d + i) / 4 * slots + t) * 4 + (d + i) % 4] = uint8_t(four_by_four[i]);
        }
    }
}

// A run's values (RUN, dim) in float32 to integers, token by token.
static void quantize_values(const Attend &a, const Codes &c, const float *values) {
    const int64_t slots = RUN * a.bits / 8;
    CodeGrid grids[RUN];
    for (int64_t t = 0; t < RUN; t++) {
        const float *token = values + t * a.dim;
        Range range = no_range();
        int64_t d = 0;
        for (; d + WIDTH <= a.dim; d += WIDTH) extend(&range, load_f(token + d));
        float low = -max_of(sub_f(set_f(0), range.low)), high = max_of(range.high);
        bool finite = sum_of(range.check) == 0;
        for (; d < a.dim; d++) {
            finite = finite && token[d] - token[d] == 0;
            low = token[d] < low ? token[d] : low;
            high = token[d] > high ? token[d] : high;
        }
        grids[t] = code_grid(low, high, finite, a.bits);
        c.value_scales[t] = grids[t].scale, c.value_zeros[t] = grids[t].zero;
    }
    const auto codes = [&](int64_t t, int64_t d) {
        const VF x = load<FLOAT32>(values + t * a.dim, d, a.dim - d);
        return codes_of_numbers(x, set_f(grids[t].step), set_f(grids[t].offset),
                                set_f(grids[t].max_code));
    };
    for (int64_t t = 0; t < slots; t += 4)
        for (int64_t d = 0; d < a.width; d += WIDTH) {
            VI bytes = zero_i();
            for (int64_t i = 3; i >= 0; i--) {
                VI byte = codes(t + i, d);
                if (slots < RUN) byte = add_i(byte, shift_left<4>(codes(t + i + slots, d)));
                bytes = add_i(shift_left<8>(bytes), byte);
            }
            store_i(reinterpret_cast<int32_t *>(c.values) + t / 4 * a.width + d, bytes);
        }
}

// A whole run of keys and values (RUN, dim) in float32 to its integers.
static void quantize_run(const Attend &a, const Codes &c, const float *keys, const float *values) {
    quantize_keys(a, c, keys);
    quantize_values(a, c, values);
}

}  // namespace
}  // namespace qllm
