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

// The grid of `count` numbers, `stride` apart, of which those from `real` on are padding with 0.
struct CodeGrid {
    uint16_t scale;
    uint8_t zero;
    float step;
    bool finite;
};
static CodeGrid code_grid(const float *x, int64_t count, int64_t stride, int64_t bits) {
    const float base = float(code_base(bits)), steps = float((1 << bits) - 1);
    float low = x[0], high = x[0];
    bool finite = true;
    for (int64_t i = 0; i < count; i++) {
        float v = x[i * stride];
        finite = finite && v - v == 0;
        low = v < low ? v : low;
        high = v > high ? v : high;
    }
    if (!finite) return {0x7FC0, 0, 1, false};
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
    return {half, uint8_t(zero < 0 ? 0 : zero > 255 ? 255 : zero), step, true};
}

inline void store_code(uint8_t *codes, Place place, float x, const CodeGrid &grid, int64_t bits) {
    const float most = float((1 << bits) - 1);
    float code = __builtin_rintf(x / grid.step) + float(grid.zero - code_base(bits));
    code = !grid.finite || code < 0 ? 0 : code > most ? most : code;
    if (bits == 8) {
        codes[place.byte] = uint8_t(code);
    } else {
        const int keep = 15 << (4 - place.shift);
        codes[place.byte] = uint8_t((codes[place.byte] & keep) | int(code) << place.shift);
    }
}

// A whole run of keys and values (RUN, dim) in float32 to its integers.
static void quantize_run(const Attend &a, const Codes &c, const float *keys, const float *values) {
    for (int64_t d = 0; d < a.width; d++) {
        const float none = 0;
        const bool real = d < a.dim;
        const CodeGrid grid = real ? code_grid(keys + d, RUN, a.dim, a.bits) : code_grid(&none, 1, 1, a.bits);
        c.key_scales[d] = grid.scale, c.key_zeros[d] = grid.zero;
        for (int64_t t = 0; t < RUN; t++)
            store_code(c.keys, key_place(a, d, t), real ? keys[t * a.dim + d] : 0, grid, a.bits);
    }
    for (int64_t t = 0; t < RUN; t++) {
        const float *token = values + t * a.dim;
        const CodeGrid grid = code_grid(token, a.dim, 1, a.bits);
        c.value_scales[t] = grid.scale, c.value_zeros[t] = grid.zero;
        for (int64_t d = 0; d < a.width; d++)
            store_code(c.values, value_place(a, d, t), d < a.dim ? token[d] : 0, grid, a.bits);
    }
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
