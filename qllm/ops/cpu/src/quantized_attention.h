// Keys and values as integers: see qllm/ops/quantized_kv.py for what they stand for. Queries and the
// weights of values become integers of 15 bits for each run, its scales multiplied in, so that a
// score or a result is a sum of integers times one scale.
#pragma once

#include <math.h>

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "layout.h"

namespace qllm {
namespace {

constexpr int32_t MOST = 127 * 128;  // of an integer: two planes of int8, the upper one times 128

inline int64_t code_base(int64_t bits) { return bits == 8 ? 0 : 127; }

// Where the integers of a run of one head are.
struct Codes {
    uint8_t *keys, *values;
    uint16_t *key_scales, *value_scales;  // (width,) and (RUN,)
    uint8_t *key_zeros, *value_zeros;
};

static Codes codes_of(const Attend &a, int64_t row, int64_t kv, int64_t run) {
    const int64_t at = (row * a.kv_heads + kv) * (a.capacity / RUN) + run;
    const int64_t bytes = RUN * a.width * a.bits / 8;
    return {a.key_codes + at * bytes,      a.value_codes + at * bytes,
            a.key_scales + at * a.width,   a.value_scales + at * RUN,
            a.key_zeros + at * a.width,    a.value_zeros + at * RUN};
}

// A byte, and the half of it, of the integer of a channel and a token.
struct Place {
    int64_t byte, shift;
};
inline Place key_place(const Attend &a, int64_t channel, int64_t token) {
    const int64_t slots = RUN * a.bits / 8;
    return {(channel / 4 * slots + token % slots) * 4 + channel % 4, token / slots * 4};
}
inline Place value_place(const Attend &a, int64_t channel, int64_t token) {
    const int64_t slots = RUN * a.bits / 8;
    return {(token % slots / 4 * a.width + channel) * 4 + token % 4, token / slots * 4};
}

inline int64_t code_at(const uint8_t *codes, Place place, int64_t bits) {
    return bits == 8 ? codes[place.byte] : codes[place.byte] >> place.shift & 15;
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
    int64_t code = code_at(c.keys, key_place(a, channel, token), a.bits);
    return float(code - zero) * from_bfloat16(c.key_scales[channel]);
}
inline float value_at(const Attend &a, const Codes &c, int64_t channel, int64_t token) {
    int64_t zero = c.value_zeros[token] - code_base(a.bits);
    int64_t code = code_at(c.values, value_place(a, channel, token), a.bits);
    return float(code - zero) * from_bfloat16(c.value_scales[token]);
}

// The grid of numbers between two, all of which are finite or not.
struct CodeGrid {
    uint16_t scale;
    uint8_t zero;
    float step, offset;  // a code is x / step, rounded, + offset
    float most;          // of a code: 0 where a number is not finite
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
inline VI codes_of_numbers(VF x, VF step, VF offset, VF most) {
    const VF code = add_f(to_float(round_i(div_f(x, step))), offset);
    return round_i(min_f(max_f(code, set_f(0)), most));
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
        alignas(64) float steps[WIDTH], offsets[WIDTH], mosts[WIDTH];
        store_f(low, range.low), store_f(high, range.high), store_f(check, range.check);
        for (int64_t i = 0; i < WIDTH; i++) {
            const CodeGrid grid = code_grid(low[i], high[i], check[i] == 0, a.bits);
            c.key_scales[d + i] = grid.scale, c.key_zeros[d + i] = grid.zero;
            steps[i] = grid.step, offsets[i] = grid.offset, mosts[i] = grid.most;
        }
        const VF step = load_f(steps), offset = load_f(offsets), most = load_f(mosts);
        const auto codes = [&](int64_t t) {
            const VF x = load<FLOAT32>(keys + t * a.dim, d, a.dim - d);
            return codes_of_numbers(x, step, offset, most);
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
                                set_f(grids[t].most));
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

// What products of a run take in place of `count` numbers, a multiple of 16.
struct Integers {
    float step;      // that the integers are multiples of; NaN where a number is not finite
    int32_t offset;  // the sum of integers times zeros
    int8_t *planes;  // of fours: the upper plane, then the lower one; or pairs of 16 bits
};

// Integers of the products of `count` numbers and as many scales, which are put into memory.
inline void to_integers(Integers *out, const float *from, float *x, const uint16_t *scales, 
                        const uint8_t *zeros, int64_t base, int64_t count) {
    VI top = zero_i(), sum = zero_i();
    for (int64_t i = 0; i < count; i += WIDTH) {
        const VF product = mul_f(load_f(from + i), load_all<BFLOAT16>(scales, i));
        top = max_i(top, bits_of(abs_f(product)));
        store_f(x + i, product);
    }
    const int32_t bits = max_of_i(top);
    float most;
    __builtin_memcpy(&most, &bits, 4);
    const bool finite = bits < 0x7F800000, some = most > 1e-30f;
    const VF inverse = set_f(finite && some ? float(MOST) / most : 0);
    out->step = !finite ? NAN : some ? most / float(MOST) : 0;
    for (int64_t i = 0; i < count; i += WIDTH) {
        VI whole = finite ? round_i(mul_f(load_f(x + i), inverse)) : zero_i();
        sum = add_i(sum, mul_i(whole, sub_i(load_bytes(zeros + i), set_i(int32_t(base)))));
        if constexpr (OPERAND_BYTES == 1) {
            VI upper = shift_right<7>(add_i(whole, set_i(64)));
            store_bytes(out->planes + i, upper);
            store_bytes(out->planes + count + i, sub_i(whole, shift_left<7>(upper)));
        } else {
            // A four as products of 16 bits take it: 0 and 2, then 1 and 3.
            alignas(64) int32_t each[WIDTH];
            store_i(each, whole);
            int16_t *pairs = reinterpret_cast<int16_t *>(out->planes) + i;
            for (int64_t j = 0; j < WIDTH; j++)
                pairs[j / 4 * 4 + (j % 4 == 0 ? 0 : j % 4 == 1 ? 2 : j % 4 == 2 ? 1 : 3)] =
                    int16_t(each[j]);
        }
    }
    out->offset = sum_of_i(sum);
}

// Sums of products of both planes.
struct Both {
    VI upper, lower;
};
inline Both no_products() { return {zero_i(), zero_i()}; }
inline void add_codes(Both *sum, VI codes, Inputs upper, Inputs lower) {
    const Weights w = prepared(codes);
    sum->upper = dot(sum->upper, w, upper);
    if constexpr (OPERAND_BYTES == 1) sum->lower = dot(sum->lower, w, lower);
}
inline VF numbers(const Both &sum, const Integers &x) {
    VI all = OPERAND_BYTES == 1 ? add_i(shift_left<7>(sum.upper), sum.lower) : sum.upper;
    return mul_f(to_float(sub_i(all, set_i(x.offset))), set_f(x.step));
}
inline VI low_codes(VI bytes) { return and_i(bytes, set_i(0x0F0F0F0F)); }
inline VI high_codes(VI bytes) { return and_i(shift_right<4>(bytes), set_i(0x0F0F0F0F)); }

// The scores of a query with a run's keys: RUN of them.
template <int BITS>
inline void score_run(const uint8_t *codes, int64_t width, const Integers &x,
                      float *scores) {
    constexpr int64_t SLOTS = RUN * BITS / 8, VECTORS_AT_ONCE = BITS / 2;
    const int64_t lower = OPERAND_BYTES == 1 ? width : 0;
    for (int64_t slot = 0; slot < SLOTS; slot += VECTORS_AT_ONCE * WIDTH) {
        Both sums[4] = {no_products(), no_products(), no_products(), no_products()};
        const uint8_t *bytes = codes + slot * 4;
        const int8_t *in = x.planes, *end = in + width * OPERAND_BYTES;
        for (; in < end; in += 4 * OPERAND_BYTES, bytes += SLOTS * 4) {
            const Inputs up = four(in), low = four(in + lower);
            for (int64_t v = 0; v < VECTORS_AT_ONCE; v++) {
                const VI codes_of_four = weights(bytes + v * WIDTH * 4);
                if constexpr (BITS == 8) {
                    add_codes(&sums[v], codes_of_four, up, low);
                } else {
                    add_codes(&sums[v], low_codes(codes_of_four), up, low);
                    add_codes(&sums[v + 2], high_codes(codes_of_four), up, low);
                }
            }
        }
        for (int64_t v = 0; v < VECTORS_AT_ONCE; v++) {
            float *to = scores + slot + v * WIDTH;
            store_f(to, numbers(sums[v], x));
            if constexpr (BITS == 4) store_f(to + SLOTS, numbers(sums[v + 2], x));
        }
    }
}

// out (width,) = out times a factor + a run's values, weighted: VECTORS_AT_ONCE vectors of it.
template <int BITS, int VECTORS_AT_ONCE>
inline void add_values(const uint8_t *codes, int64_t width, const Integers &x,
                       VF factor, float *out) {
    constexpr int64_t SLOTS = RUN * BITS / 8, LOWER = OPERAND_BYTES == 1 ? RUN : 0;
    Both sums[VECTORS_AT_ONCE];
    for (Both &sum : sums) sum = no_products();
    const int8_t *in = x.planes, *end = in + SLOTS * OPERAND_BYTES;
    for (; in < end; in += 4 * OPERAND_BYTES, codes += width * 4) {
        const int8_t *behind = in + SLOTS * OPERAND_BYTES;
        const Inputs up = four(in), low = four(in + LOWER);
        for (int64_t v = 0; v < VECTORS_AT_ONCE; v++) {
            const VI bytes = weights(codes + v * WIDTH * 4);
            if constexpr (BITS == 8) {
                add_codes(&sums[v], bytes, up, low);
            } else {
                add_codes(&sums[v], low_codes(bytes), up, low);
                add_codes(&sums[v], high_codes(bytes), four(behind), four(behind + LOWER));
            }
        }
    }
    for (int64_t v = 0; v < VECTORS_AT_ONCE; v++)
        store_f(out + v * WIDTH,
                fma_f(load_f(out + v * WIDTH), factor, numbers(sums[v], x)));
}
template <int BITS>
inline void add_values(const uint8_t *codes, int64_t width, const Integers &x,
                       VF factor, float *out) {
    int64_t d = 0;
    for (; d + 4 * WIDTH <= width; d += 4 * WIDTH)
        add_values<BITS, 4>(codes + d * 4, width, x, factor, out + d);
    for (; d < width; d += WIDTH)
        add_values<BITS, 1>(codes + d * 4, width, x, factor, out + d);
}

}  // namespace
}  // namespace qllm
