// A tile: the activations of a few rows times a block of unpacked weights, on vector units.
#pragma once

#include "isa.h"
#include "machine.h"
#include "operands.h"

namespace qllm {
namespace {

template <int P> constexpr int64_t TILE_ROWS = MAX_OPERANDS / TILE_OPERANDS<P>;
constexpr int64_t TILE_SUMS = 0;          // that a thread keeps in memory
// See `Sums::add_words`: where adders are spare. With 16 registers all rows go in pairs.
constexpr int WORDS_EVERY = WIDTH == 16 ? 3 : MAX_OPERANDS + 1;
constexpr int64_t UNSCALED_K_BLOCKS = 4;  // of a block that has no scale of its own

// What an input of a row takes.
template <int P> constexpr int64_t INPUT_BYTES = OPERAND_PLANES<P> * OPERAND_BYTES;

// LANES inputs of a row, from a step on, to the activations of a tile: step by step the operands.
template <int P>
INLINE inline void put(int8_t *tile, int64_t rows, int64_t row, int64_t step, int64_t /*steps*/,
                       const int8_t (&planes)[P][LANES]) {
    for (int64_t s = 0; s < LANES / STEP; s++, step++)
        for (int64_t operand = 0; operand < OPERAND_PLANES<P>; operand++) {
            const int64_t at = (step * rows + row) * OPERAND_PLANES<P> + operand;
            int8_t *to = tile + at * (STEP * OPERAND_BYTES);
            if constexpr (OPERAND_BYTES == 1) {
                __builtin_memcpy(to, planes[operand] + s * STEP, STEP);
            } else {
                int16_t four[STEP];
                for (int64_t i = 0; i < STEP; i++) {
                    const int64_t k = s * STEP + i;
                    const int whole = operand == 0 ? planes[0][k] * 256 + planes[1][k]
                                                   : planes[operand + 1][k];
                    four[i % 2 * 2 + i / 2] = int16_t(whole);
                }
                __builtin_memcpy(to, four, sizeof(four));
            }
        }
}

// The sums of S operands times V vectors of channels. They stay in registers: what indexes them is
// written out at compile time, since compilers leave in memory what a loop indexes.
template <int S, int V> struct Sums {
    static constexpr int COUNT = S * V;
    Sum of[COUNT];

    template <int I = 0> INLINE void clear() {
        of[I] = no_sum();
        if constexpr (I + 1 < COUNT) clear<I + 1>();
    }

    // Adds a step: its weights times the activations of every operand.
    template <int I = 0> INLINE void add(const Weights (&w)[V], const int8_t *x) {
        add_operand<I>(w, four(x + I * STEP * OPERAND_BYTES));
        if constexpr (I + 1 < S) add<I + 1>(w, x);
    }

    template <int OPERAND, int I = 0>
    INLINE void add_operand(const Weights (&w)[V], const Inputs &x) {
        of[OPERAND * V + I] = dot(of[OPERAND * V + I], w[I], x);
        if constexpr (I + 1 < V) add_operand<OPERAND, I + 1>(w, x);
    }

#if HAS_WORDS
    // The same of a step in int16, of which `even` and `odd` have two inputs each.
    //
    // All rows but each EVERY-th take Winograd's way (A new algorithm for inner products, 1968),
    // half of the products for two sums each: x0 w0 + x1 w1 = (x0 + w1) (x1 + w0) - x0 x1 - w0 w1,
    // of which the last two are the row's, and the channel's. Integers wrap, and what wraps on the
    // way does not in the end; a sum of two fits 16 bits, since |x| is up to 2^15 - 129, a
    // weight 128.
    template <int EVERY, int ROW = 0>
    INLINE void add_words(const VI (&even)[V], const VI (&odd)[V], const int8_t *x) {
        const int8_t *of_row = x + ROW * WORD_STEP_BYTES;
        add_words_of_row<EVERY, ROW>(even, odd, broadcast(of_row), broadcast(of_row + STEP));
        if constexpr (ROW + 1 < S) add_words<EVERY, ROW + 1>(even, odd, x);
    }

    template <int EVERY, int ROW, int I = 0>
    INLINE void add_words_of_row(const VI (&even)[V], const VI (&odd)[V], VI x_even, VI x_odd) {
        VI &sum = of[ROW * V + I];
        if constexpr (IN_PAIRS<EVERY, ROW>) {
            sum = dot_words(sum, qllm::add_words(x_even, odd[I]), qllm::add_words(x_odd, even[I]));
        } else {
            sum = dot_words(dot_words(sum, even[I], x_even), odd[I], x_odd);
        }
        if constexpr (I + 1 < V) add_words_of_row<EVERY, ROW, I + 1>(even, odd, x_even, x_odd);
    }

    template <int EVERY, int ROW> static constexpr bool IN_PAIRS = ROW % EVERY != EVERY - 1;

    // Adds the results of a block, scaled if blocks have scales, to those of the blocks before it;
    // weights that are centered have no zeros where all of these are the middle.
    template <int EVERY, bool CENTERED> INLINE void finish_words(const Operands &o, int64_t lane) {
        // Of one plane, which is int16 where there is nothing for bytes; nor have those zeros.
        if (OPERAND_BYTES == 2 && !o.scaled) {
            finish_words_of<EVERY, false, false, false>(o, lane);
        } else if (o.offsets) {
            finish_words_of<EVERY, !CENTERED, true>(o, lane);
        } else if (!CENTERED || o.zeros) {
            finish_words_of<EVERY, true, false>(o, lane);
        } else {
            finish_words_of<EVERY, false, false>(o, lane);
        }
    }

    template <int EVERY, bool ZEROS, bool OFFSETS, bool SCALED = true, int I = 0>
    INLINE void finish_words_of(const Operands &o, int64_t lane) {
        const VI zero = ZEROS ? zero_at(o, lane + I * WIDTH) : zero_i();
        const VI pairs = EVERY > 1 ? load_i(o.w_pairs + lane + I * WIDTH) : zero_i();
        const VF scale = SCALED ? load_f(o.scales + lane + I * WIDTH) : set_f(0);
        const VF offset = OFFSETS ? load_f(o.offsets + lane + I * WIDTH) : set_f(0);
        float *out = o.out + lane + I * WIDTH;
        finish_words_of_row<EVERY, ZEROS, OFFSETS, SCALED, I>(o, out, zero, pairs, scale, offset);
        if constexpr (I + 1 < V) finish_words_of<EVERY, ZEROS, OFFSETS, SCALED, I + 1>(o, lane);
    }

    template <int EVERY, bool ZEROS, bool OFFSETS, bool SCALED, int I, int ROW = 0>
    INLINE void finish_words_of_row(const Operands &o, float *out, VI zero, VI pairs, VF scale,
                                    VF offset) {
        VI high = of[ROW * V + I];
        if constexpr (IN_PAIRS<EVERY, ROW>) high = sub_i(high, add_i(pairs, set_i(o.x_pairs[ROW])));
        if constexpr (ZEROS) high = sub_i(high, mul_i(zero, set_i(o.sum[ROW])));
        if constexpr (SCALED) {
            VF value = add_scaled<2>(load_f(out), high, zero_i(), o.x_scale[ROW], scale);
            if constexpr (OFFSETS) value = fma_f(set_f(o.scaled_sum[ROW]), offset, value);
            store_f(out, value);
        } else {
            add_whole(out, high);
        }
        if constexpr (ROW + 1 < S)
            finish_words_of_row<EVERY, ZEROS, OFFSETS, SCALED, I, ROW + 1>(
                o, out + GROUP_LANES, zero, pairs, scale, offset);
    }
#endif

    template <int I = 0> INLINE void widen() {
        of[I] = widened(of[I]);
        if constexpr (I + 1 < COUNT) widen<I + 1>();
    }

    template <int I = 0> INLINE void join(const Sums &other) {
        of[I] = add_i(of[I], other.of[I]);
        if constexpr (I + 1 < COUNT) join<I + 1>(other);
    }

    static VI zero_at(const Operands &o, int64_t lane) {
        return o.zeros ? load_i(o.zeros + lane) : set_i(o.middle);
    }

    // Adds the results of a block, of rows of P planes, scaled, to those of the blocks before it.
    template <int P> INLINE void finish(const Operands &o, int64_t lane) {
        if (o.zeros) {
            finish_of<P, true>(o, lane);
        } else {
            finish_of<P, false>(o, lane);
        }
    }

    template <int P, bool ZEROS, int I = 0> INLINE void finish_of(const Operands &o, int64_t lane) {
        VI zero = ZEROS ? load_i(o.zeros + lane + I * WIDTH) : zero_i();
        VF scale = load_f(o.scales + lane + I * WIDTH);
        VF offset = o.offsets ? load_f(o.offsets + lane + I * WIDTH) : set_f(0);
        finish_row<P, ZEROS, I>(o, o.out + lane + I * WIDTH, zero, scale, offset);
        if constexpr (I + 1 < V) finish_of<P, ZEROS, I + 1>(o, lane);
    }

    // What zeros are of a sum of products, as the sum of activations has it.
    template <bool ZEROS> INLINE static VI of_zeros(const Operands &o, VI zero, int32_t sum) {
        return ZEROS ? mul_i(zero, set_i(sum)) : set_i(o.middle * sum);
    }

    template <int P, bool ZEROS, int I, int ROW = 0>
    INLINE void finish_row(const Operands &o, float *out, VI zero, VF scale, VF offset) {
        constexpr int AT = ROW * OPERAND_PLANES<P> * V + I;
        VI high = total(of[AT]), low = zero_i();
        if constexpr (P > 1 && OPERAND_BYTES == 1) high = pair(high, total(of[AT + V]));
        high = sub_i(high, of_zeros<ZEROS>(o, zero, o.sum[ROW]));
        if constexpr (P == 4) {
            constexpr int LAST = AT + (OPERAND_PLANES<P> - 1) * V;
            low = pair(total(of[LAST - V]), total(of[LAST]));
            low = sub_i(low, of_zeros<ZEROS>(o, zero, o.low_sum[ROW]));
        }
        if (P > 1 || o.scaled) {
            VF value = add_scaled<P>(load_f(out), high, low, o.x_scale[ROW], scale);
            if (o.offsets) value = fma_f(set_f(o.scaled_sum[ROW]), offset, value);
            store_f(out, value);
        } else {
            add_whole(out, high);
        }
        if constexpr ((ROW + 1) * OPERAND_PLANES<P> < S)
            finish_row<P, ZEROS, I, ROW + 1>(o, out + GROUP_LANES, zero, scale, offset);
    }
};

#if HAS_WORDS
template <int V, int I = 0>
INLINE inline void load_words(VI (&w)[V], const uint8_t *from, int64_t stride) {
    w[I] = weights(from + I / VECTORS * stride + I % VECTORS * (WIDTH * STEP));
    if constexpr (I + 1 < V) load_words<V, I + 1>(w, from, stride);
}
#endif

template <int V, int I = 0>
INLINE inline void load(Weights (&w)[V], const uint8_t *from, int64_t stride) {
    w[I] = prepared(weights(from + I / VECTORS * stride + I % VECTORS * (WIDTH * STEP)));
    if constexpr (I + 1 < V) load<V, I + 1>(w, from, stride);
}

// P planes, R rows, N panels from panel `from` on.
template <int P, int R, int N>
__attribute__((noinline)) void multiply(const Operands &o, int64_t from) {
    Sums<OPERAND_PLANES<P> * R, N * VECTORS> sums;
    sums.clear();
    const uint8_t *w = o.w + from * o.w_stride;
    const int8_t *x = o.x;
    const int64_t steps = o.steps, together = WIDENS ? smaller(o.widen, steps) : steps;
    for (int64_t done = 0; done < steps; done += together) {
        for (int64_t step = 0; step < together; step++, w += LANES * STEP) {
            Weights step_weights[N * VECTORS];
            load(step_weights, w, o.w_stride);
            sums.add(step_weights, x);
            x += R * INPUT_BYTES<P> * STEP;
        }
        sums.widen();
    }
    sums.template finish<P>(o, from * LANES);
}

// The same of activations and weights that are int16; of each EVERY-th row as they are.
template <int EVERY, int R, int N>
__attribute__((noinline)) void multiply_words([[maybe_unused]] const Operands &o,
                                              [[maybe_unused]] int64_t from) {
#if HAS_WORDS
    Sums<R, N * VECTORS> sums;
    sums.clear();
    const uint8_t *w = o.w + from * o.w_stride;
    const int8_t *x = o.x;
    for (int64_t step = 0; step < o.steps; step++, x += R * WORD_STEP_BYTES) {
        VI even[N * VECTORS], odd[N * VECTORS];
        load_words(even, w, o.w_stride);
        load_words(odd, w + LANES * STEP, o.w_stride);
        sums.template add_words<EVERY>(even, odd, x);
        w += LANES * WORD_STEP_BYTES;
    }
    sums.template finish_words<EVERY, true>(o, from * LANES);
#endif
}

template <int P, int R, int N> void multiply_some(const Operands &o, int64_t from) {
    if constexpr (IN_WORDS<P>) {
        // One function more: with fewer rows or panels there are fewer sums for the units.
        if constexpr (R == TILE_ROWS<P> && N * VECTORS > 1)
            if (machine.spare_adders) return multiply_words<WORDS_EVERY, R, N>(o, from);
        multiply_words<1, R, N>(o, from);
    } else {
        multiply<P, R, N>(o, from);
    }
}

template <int P, int R> void multiply_panels(const Operands &o, int64_t panels) {
    constexpr int MAX_PANELS = ACCUMULATORS / (TILE_OPERANDS<P> * R * VECTORS);
    int64_t n = 0;
    if constexpr (MAX_PANELS >= 4)
        for (; n + 4 <= panels; n += 4) multiply_some<P, R, 4>(o, n);
    if constexpr (MAX_PANELS >= 2)
        for (; n + 2 <= panels; n += 2) multiply_some<P, R, 2>(o, n);
    for (; n < panels; n++) multiply_some<P, R, 1>(o, n);
}

// A tile of up to TILE_ROWS<P> rows.
template <int P, int R = TILE_ROWS<P>>
void multiply_tile(const Operands &o, int64_t rows, int64_t panels) {
    if (rows == R) return multiply_panels<P, R>(o, panels);
    if constexpr (R > 1) multiply_tile<P, R - 1>(o, rows, panels);
}

// What a thread keeps for its tiles: nothing.
struct Tiles {
    explicit Tiles(int32_t *) {}
    void begin(const Operands &, const Linear &, uint8_t *, int64_t, int64_t) {}
    template <int P> void multiply(const Operands &o, int64_t rows, int64_t panels) {
        multiply_tile<P>(o, rows, panels);
    }
    template <int P> void end() {}
};

}  // namespace
}  // namespace qllm
