// Products with keys and values as integers: queries and the weights of values become integers of
// 15 bits for each run, its scales multiplied in, so that a score or a result is a sum of integers
// times one scale.
#pragma once

#include <math.h>

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "prefetch.h"

namespace qllm {
namespace {

// Of an integer: two planes of int8, the upper one times 256.
constexpr int32_t MAX_INTEGER = 127 * 128;

// What products of a run take in place of `count` numbers, a multiple of 16.
struct Integers {
    float step;      // that the integers are multiples of; NaN where a number is not finite
    int32_t offset;  // the sum of integers times zeros
    int8_t *planes;  // of fours: the upper plane, then the lower one; or pairs of 16 bits
};

// The scales and zeros of a run's channels or tokens, as every head that shares them takes them.
struct RunGrid {
    float *scales;
    int32_t *zeros;
};
inline void load_grid(const RunGrid &grid, const uint16_t *scales, const uint8_t *zeros,
                      int64_t base, int64_t count) {
    for (int64_t i = 0; i < count; i += WIDTH) {
        store_f(grid.scales + i, load_all<BFLOAT16>(scales, i));
        store_i(grid.zeros + i, sub_i(load_bytes(zeros + i), set_i(int32_t(base))));
    }
}

// Integers of the products of `count` numbers and a grid's scales.
inline void to_integers(Integers *out, const float *from, const RunGrid &grid, int64_t count) {
    VI top = zero_i(), sum = zero_i();
    for (int64_t i = 0; i < count; i += WIDTH)
        top = max_i(top, bits_of(abs_f(mul_f(load_f(from + i), load_f(grid.scales + i)))));
    const int32_t bits = max_of_i(top);
    float largest;
    __builtin_memcpy(&largest, &bits, 4);
    const bool finite = bits < 0x7F800000, some = largest > 1e-30f;
    const VF inverse = set_f(finite && some ? float(MAX_INTEGER) / largest : 0);
    out->step = !finite ? NAN : some ? largest / float(MAX_INTEGER) : 0;
    const auto rounded = [&](int64_t i) {
        const VF number = mul_f(mul_f(load_f(from + i), load_f(grid.scales + i)), inverse);
        const VI whole = nearest_i(number);
        sum = add_i(sum, mul_i(whole, load_i(grid.zeros + i)));
        return whole;
    };
    int64_t i = 0;
#if defined(HAS_PLANES)
    for (; i + 4 * WIDTH <= count; i += 4 * WIDTH) {
        const VI a = rounded(i), b = rounded(i + WIDTH);
        const VI c = rounded(i + 2 * WIDTH), d = rounded(i + 3 * WIDTH);
        store_planes(out->planes + i, out->planes + count + i, a, b, c, d);
    }
#endif
    for (; i < count; i += WIDTH) {
        const VI whole = rounded(i);
        if constexpr (OPERAND_BYTES == 1) {
            store_bytes(out->planes + i, shift_right<8>(add_i(whole, set_i(128))));
            store_bytes(out->planes + count + i, whole);
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

// Heads that share the way of codes to registers, as many as those hold sums of.
constexpr int CODE_HEADS = WIDTH == 16 ? 2 : 1;

// Sums of products of both planes.
struct Both {
    VI upper, lower;
};
inline Both no_products() { return {zero_i(), zero_i()}; }
inline void add_codes(Both *sum, const Weights &codes, Inputs upper, Inputs lower) {
    sum->upper = dot(sum->upper, codes, upper);
    if constexpr (OPERAND_BYTES == 1) sum->lower = dot(sum->lower, codes, lower);
}
inline VF numbers(const Both &sum, const Integers &x) {
    VI all = OPERAND_BYTES == 1 ? add_i(shift_left<8>(sum.upper), sum.lower) : sum.upper;
    return mul_f(to_float(sub_i(all, set_i(x.offset))), set_f(x.step));
}
inline VI low_codes(VI bytes) { return and_i(bytes, set_i(0x0F0F0F0F)); }
inline VI high_codes(VI bytes) { return and_i(shift_right<4>(bytes), set_i(0x0F0F0F0F)); }

// The scores of HEADS queries with a run's keys: RUN of each.
template <int BITS, int HEADS>
inline void score_run(const uint8_t *codes, int64_t width, const Integers *x, float *scores,
                      Coming &coming) {
    constexpr int64_t SLOTS = RUN * BITS / 8, VECTORS_AT_ONCE = BITS / 2;
    const int64_t lower = OPERAND_BYTES == 1 ? width : 0;
    for (int64_t slot = 0; slot < SLOTS; slot += VECTORS_AT_ONCE * WIDTH) {
        Both sums[HEADS][4];
        for (auto &head : sums)
            for (Both &sum : head) sum = no_products();
        const uint8_t *bytes = codes + slot * 4;
        for (int64_t in = 0; in < width * OPERAND_BYTES; in += 4 * OPERAND_BYTES) {
            coming.ask(VECTORS_AT_ONCE * WIDTH * 4);
            Inputs up[HEADS], low[HEADS];
            for (int h = 0; h < HEADS; h++)
                up[h] = four(x[h].planes + in), low[h] = four(x[h].planes + in + lower);
            for (int64_t v = 0; v < VECTORS_AT_ONCE; v++) {
                const VI of_four = weights(bytes + v * WIDTH * 4);
                const Weights first = prepared(BITS == 8 ? of_four : low_codes(of_four));
                for (int h = 0; h < HEADS; h++) add_codes(&sums[h][v], first, up[h], low[h]);
                if constexpr (BITS == 4) {
                    const Weights second = prepared(high_codes(of_four));
                    for (int h = 0; h < HEADS; h++)
                        add_codes(&sums[h][v + 2], second, up[h], low[h]);
                }
            }
            bytes += SLOTS * 4;
        }
        for (int h = 0; h < HEADS; h++)
            for (int64_t v = 0; v < VECTORS_AT_ONCE; v++) {
                float *to = scores + h * RUN + slot + v * WIDTH;
                store_f(to, numbers(sums[h][v], x[h]));
                if constexpr (BITS == 4) store_f(to + SLOTS, numbers(sums[h][v + 2], x[h]));
            }
    }
}

// out (width,) of each head = out times alpha + a run's values, weighted: VECTORS_AT_ONCE
// vectors of it.
template <int BITS, int VECTORS_AT_ONCE, int HEADS>
inline void add_values(const uint8_t *codes, int64_t width, const Integers *x, const VF *alphas,
                       float *out, Coming &coming) {
    constexpr int64_t SLOTS = RUN * BITS / 8, LOWER = OPERAND_BYTES == 1 ? RUN : 0;
    Both sums[HEADS][VECTORS_AT_ONCE];
    for (auto &head : sums)
        for (Both &sum : head) sum = no_products();
    for (int64_t in = 0; in < SLOTS * OPERAND_BYTES; in += 4 * OPERAND_BYTES) {
        const int64_t behind = in + SLOTS * OPERAND_BYTES;
        coming.ask(VECTORS_AT_ONCE * WIDTH * 4);
        for (int64_t v = 0; v < VECTORS_AT_ONCE; v++) {
            const VI bytes = weights(codes + v * WIDTH * 4);
            const Weights first = prepared(BITS == 8 ? bytes : low_codes(bytes));
            for (int h = 0; h < HEADS; h++) {
                const int8_t *p = x[h].planes;
                add_codes(&sums[h][v], first, four(p + in), four(p + in + LOWER));
            }
            if constexpr (BITS == 4) {
                const Weights second = prepared(high_codes(bytes));
                for (int h = 0; h < HEADS; h++) {
                    const int8_t *p = x[h].planes;
                    add_codes(&sums[h][v], second, four(p + behind), four(p + behind + LOWER));
                }
            }
        }
        codes += width * 4;
    }
    for (int h = 0; h < HEADS; h++)
        for (int64_t v = 0; v < VECTORS_AT_ONCE; v++) {
            float *to = out + h * width + v * WIDTH;
            store_f(to, fma_f(load_f(to), alphas[h], numbers(sums[h][v], x[h])));
        }
}
template <int BITS, int HEADS>
inline void add_values(const uint8_t *codes, int64_t width, const Integers *x, const VF *alphas,
                       float *out, Coming &coming) {
    int64_t d = 0;
    for (; d + 4 * WIDTH <= width; d += 4 * WIDTH)
        add_values<BITS, 4, HEADS>(codes + d * 4, width, x, alphas, out + d, coming);
    for (; d < width; d += WIDTH)
        add_values<BITS, 1, HEADS>(codes + d * 4, width, x, alphas, out + d, coming);
}

}  // namespace
}  // namespace qllm
