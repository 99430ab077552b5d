// y = x W^T + b for dense weights in a step of decode: dot products along the inputs.
//
// What counts there is how fast the weight comes from memory. A vector takes a few steps (see
// dense_steps.h) of one channel, as they lie; to turn them, as dense.h does for many rows, takes
// longer than to read them. Of LANES sums of a channel each has the products of every LANES-th step,
// in the order of the inputs; at the end halves of them are added to each other until one is left. So
// a row's result is the same to the bit whatever else is computed beside it, and on every path but
// for bfloat16 in pairs; that of a prompt's pass may differ in the last digits.
#pragma once

#include "dense_steps.h"
#include "dense_tile.h"
#include "threads.h"

namespace qllm {
namespace {

// Rows and channels of which sums are in registers: few of the ones, many of the others.
constexpr int DOT_ROWS = DENSE_GEMV_ROWS;
template <int64_t TYPE, int R>
constexpr int DOT_CHANNELS = WIDTH == 16 ? (R <= 2 ? (IN_PAIRS<TYPE> ? 4 : 8) : R == 4 ? 4 : 2)
                             : WIDTH == 8 ? 4 / R : 1;
// Steps of long channels at once: activations, and what comes next, stay in the first cache
// meanwhile. Shorter channels are read faster as wholes, and so are four channels of few rows.
constexpr int64_t DOT_STEPS = 256, WHOLE_BYTES = 2048;

// Asks for blocks of channels, in the order in which they lie.
class ComingChannels {
  public:
    ComingChannels(const char *from, int64_t block, int64_t stride)
        : line_(from), left_(block), block_(block), skipped_(stride - block) {}

    INLINE void ask(int64_t bytes) {
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(line_ + b);
        line_ += bytes, left_ -= bytes;
        if (left_ <= 0) line_ += skipped_, left_ += block_;
    }

  private:
    const char *line_;
    int64_t left_, block_, skipped_;
};

// The sums of C channels times R rows, in registers as those of `Sums` in tile.h.
template <int64_t TYPE, int R, int C> struct DotSums {
    static constexpr int64_t VECTOR_BYTES = WIDTH * INPUTS<TYPE> * SIZE<TYPE>;
    VF of[C * R * VECTORS];

    template <int I = 0> INLINE void load(const float *from) {
        of[I] = load_f(from + I * WIDTH);
        if constexpr (I + 1 < C * R * VECTORS) load<I + 1>(from);
    }

    template <int I = 0> INLINE void keep(float *to) {
        store_f(to + I * WIDTH, of[I]);
        if constexpr (I + 1 < C * R * VECTORS) keep<I + 1>(to);
    }

    // Adds LANES steps of channels that lie `stride` bytes apart, times rows `x_row` steps apart.
    template <int V = 0>
    INLINE void add(const char *w, int64_t stride, const float *x, int64_t x_row) {
        VF weights[C];
        load_weights(weights, w + V * VECTOR_BYTES, stride);
        add_row<V>(weights, x + V * WIDTH, x_row);
        if constexpr (V + 1 < VECTORS) add<V + 1>(w, stride, x, x_row);
    }

    template <int CHANNEL = 0>
    INLINE static void load_weights(VF (&weights)[C], const char *w, int64_t stride) {
        weights[CHANNEL] = IN_PAIRS<TYPE> ? load_f(reinterpret_cast<const float *>(w))
                                          : load_all<TYPE>(w, 0);
        if constexpr (CHANNEL + 1 < C) load_weights<CHANNEL + 1>(weights, w + stride, stride);
    }

    template <int V, int ROW = 0>
    INLINE void add_row(const VF (&weights)[C], const float *x, int64_t x_row) {
        add_channel<V, ROW>(weights, load_f(x));
        if constexpr (ROW + 1 < R) add_row<V, ROW + 1>(weights, x + x_row, x_row);
    }

    template <int V, int ROW, int CHANNEL = 0> INLINE void add_channel(const VF (&weights)[C], VF x) {
        VF &sum = of[(CHANNEL * R + ROW) * VECTORS + V];
        sum = add_slots<IN_PAIRS<TYPE>>(sum, weights[CHANNEL], x);
        if constexpr (CHANNEL + 1 < C) add_channel<V, ROW, CHANNEL + 1>(weights, x);
    }
};

// Activations of R rows, (R, steps), as `load_steps` has them, with zeros up to a multiple of LANES.
struct DotInput {
    const float *x;
    int64_t steps;
};

// C channels times R rows, from one step to another: added to sums (C, R, LANES).
template <int64_t TYPE, int R, int C>
__attribute__((noinline)) void add_dots(const Dense &a, const DotInput &in, int64_t channel,
                                        int64_t step, int64_t end, const char *next, float *out) {
    constexpr int64_t BYTES = INPUTS<TYPE> * SIZE<TYPE>;  // of a step
    const int64_t stride = a.in * SIZE<TYPE>, whole = a.in / (INPUTS<TYPE> * LANES) * LANES;
    const char *w = static_cast<const char *>(a.w) + channel * stride;
    ComingChannels coming(next, (end - step) * BYTES, stride);
    DotSums<TYPE, R, C> sums;
    sums.load(out);
    for (; step < smaller(end, whole); step += LANES) {
        coming.ask(C * LANES * BYTES);
        sums.add(w + step * BYTES, stride, in.x + step, in.steps);
    }
    if (step < end) {  // what is behind the whole vectors of a channel
        alignas(64) char some[C * LANES * BYTES] = {};
        for (int64_t c = 0; c < C; c++)
            __builtin_memcpy(some + c * LANES * BYTES, w + c * stride + step * BYTES,
                             size_t(stride - step * BYTES));
        sums.add(some, LANES * BYTES, in.x + step, in.steps);
    }
    sums.keep(out);
}

// Results of a row and LANES channels, whose sums are `stride` floats apart.
template <int64_t TYPE>
void store_dots(const Dense &a, int64_t row, int64_t channel, const float *sums, int64_t stride) {
    for (int64_t lane = 0; lane < LANES && channel + lane < a.out; lane += WIDTH) {
        VF square[WIDTH];
        for (int64_t c = 0; c < WIDTH; c++) {
            VF of[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                of[v] = load_f(sums + (lane + c) * stride + v * WIDTH);
            for (int half = VECTORS / 2; half; half /= 2)
                for (int v = 0; v < half; v++) of[v] = add_f(of[v], of[v + half]);
            square[c] = of[0];
        }
        transpose(square);
        for (int half = WIDTH / 2; half; half /= 2)
            for (int i = 0; i < half; i++) square[i] = add_f(square[i], square[i + half]);
        alignas(64) float results[WIDTH];
        store_f(results, square[0]);
        store_sums<TYPE>(a, row, channel + lane, WIDTH, results);
    }
}

// LANES channels times R rows.
template <int64_t TYPE, int R>
void dot_panel(const Dense &a, const DotInput &in, int64_t row, int64_t panel) {
    constexpr int C = DOT_CHANNELS<TYPE, R>;
    alignas(64) float sums[LANES * R * LANES] = {};
    const int64_t channel = panel * LANES, channels = smaller(LANES, a.out - channel);
    const int64_t stride = a.in * SIZE<TYPE>;
    const bool in_parts = stride > WHOLE_BYTES && (R > 2 || C > 4);
    const int64_t block = in_parts ? DOT_STEPS : in.steps;
    const auto begin = [&](int64_t c, int64_t step) {
        return static_cast<const char *>(a.w) + (channel + c) * stride +
               step * INPUTS<TYPE> * SIZE<TYPE>;
    };
    for (int64_t step = 0; step < in.steps; step += block) {
        const int64_t end = smaller(step + block, in.steps);
        int64_t c = 0;
        for (; c + C <= channels; c += C) {
            // Behind a panel's last channels come the first ones' next steps, or the next panel.
            const bool last = c + 2 * C > channels;
            const char *next = !last              ? begin(c + C, step)
                               : end < in.steps ? begin(0, end)
                                                : begin(c + C, 0);
            add_dots<TYPE, R, C>(a, in, channel + c, step, end, next, sums + c * R * LANES);
        }
        for (; c < channels; c++)
            add_dots<TYPE, R, 1>(a, in, channel + c, step, end, begin(c, step),
                                 sums + c * R * LANES);
    }
    for (int64_t r = 0; r < R && row + r < a.rows; r++)
        store_dots<TYPE>(a, row + r, channel, sums + r * LANES, R * LANES);
}

// Of a panel, the rows from one on: as many as there are, or DOT_ROWS.
template <int64_t TYPE, int R = 1>
void dot_rows(const Dense &a, const DotInput &in, int64_t row, int64_t panel) {
    if constexpr (R < DOT_ROWS)
        if (a.rows - row > R) return dot_rows<TYPE, 2 * R>(a, in, row, panel);
    dot_panel<TYPE, R>(a, in, row, panel);
}

template <int64_t TYPE> Status dense_decode_of(const Dense &a) {
    const int64_t steps = (a.in + INPUTS<TYPE> * LANES - 1) / (INPUTS<TYPE> * LANES) * LANES;
    const int64_t rest = a.rows % DOT_ROWS;  // padded to as many as `dot_rows` takes, and no more
    const int64_t rows = a.rows - rest + (rest ? dense_tile_rows(rest) : 0);
    auto *x = static_cast<float *>(scratch(size_t(rows * steps * 4)));
    if (!x) return Status::NO_MEMORY;
    for_each(rows, rows * steps > WORTH_THREADS, [&](int64_t row, int64_t) {
        for (int64_t s = 0; s < steps; s += WIDTH)
            store_f(x + row * steps + s, load_steps<TYPE, IN_PAIRS<TYPE>>(a, row, s));
    });
    for_each((a.out + LANES - 1) / LANES, true, [&](int64_t panel, int64_t) {
        for (int64_t row = 0; row < a.rows; row += DOT_ROWS)
            dot_rows<TYPE>(a, {x + row * steps, steps}, row, panel);
    });
    return Status::OK;
}

}  // namespace
}  // namespace qllm
