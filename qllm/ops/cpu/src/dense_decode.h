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

// Rows and channels of which sums are in registers.
constexpr int DOT_ROWS = DENSE_GEMV_ROWS;
template <int R> constexpr int DOT_CHANNELS = WIDTH == 16 ? (R < 8 ? 4 : 2) : WIDTH == 8 ? 4 / R : 1;

// Channels that are read together: as many streams as sums are for, each of channels that follow on
// each other, so that the machine sees what comes next, from one channel to the next, too. Channels
// side by side would be as many streams, each of which leaves out what the others read.
constexpr int64_t DOT_GROUP = 64;

// So many rows take longer than their weights, which have to be asked for; and a few steps of
// theirs at once, or the first cache does not keep them. Channels of so few bytes are wholes.
template <int R> constexpr bool IN_BLOCKS = R > 1 && R == DOT_ROWS;
constexpr int64_t DOT_STEPS = 256, WHOLE_BYTES = 2048;
template <int R> constexpr int64_t DOT_SET = IN_BLOCKS<R> ? LANES : DOT_GROUP;

// The sums of C channels times R rows, in registers as those of `Sums` in tile.h.
template <int64_t TYPE, int R, int C> struct DotSums {
    static constexpr int64_t VECTOR_BYTES = WIDTH * INPUTS<TYPE> * SIZE<TYPE>;
    VF of[C * R * VECTORS];

    // From, and to, (C, R, LANES), channels `apart` floats from each other.
    template <int I = 0> INLINE void load(const float *from, int64_t apart) {
        of[I] = load_f(from + I / (R * VECTORS) * apart + I % (R * VECTORS) * WIDTH);
        if constexpr (I + 1 < C * R * VECTORS) load<I + 1>(from, apart);
    }

    template <int I = 0> INLINE void keep(float *to, int64_t apart) {
        store_f(to + I / (R * VECTORS) * apart + I % (R * VECTORS) * WIDTH, of[I]);
        if constexpr (I + 1 < C * R * VECTORS) keep<I + 1>(to, apart);
    }

    // Adds LANES steps of channels that lie `apart` bytes apart, times rows `x_row` steps apart.
    template <int V = 0>
    INLINE void add(const char *w, int64_t apart, const float *x, int64_t x_row) {
        VF weights[C];
        load_weights(weights, w + V * VECTOR_BYTES, apart);
        add_row<V>(weights, x + V * WIDTH, x_row);
        if constexpr (V + 1 < VECTORS) add<V + 1>(w, apart, x, x_row);
    }

    template <int CHANNEL = 0>
    INLINE static void load_weights(VF (&weights)[C], const char *w, int64_t apart) {
        weights[CHANNEL] = IN_PAIRS<TYPE> ? load_f(reinterpret_cast<const float *>(w))
                                          : load_all<TYPE>(w, 0);
        if constexpr (CHANNEL + 1 < C) load_weights<CHANNEL + 1>(weights, w + apart, apart);
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

// C channels, `apart` from each other, times R rows, from one step to another: added to their sums of
// a set (channels, R, LANES). Asks for as many steps from `next` on, where there are any.
template <int64_t TYPE, int R, int C>
__attribute__((noinline)) void add_dots(const Dense &a, const DotInput &in, int64_t channel,
                                        int64_t apart, int64_t step, int64_t end, const char *next,
                                        float *out) {
    constexpr int64_t BYTES = INPUTS<TYPE> * SIZE<TYPE>;  // of a step
    const int64_t stride = a.in * SIZE<TYPE>, whole = a.in / (INPUTS<TYPE> * LANES) * LANES;
    const char *w = static_cast<const char *>(a.w) + channel * stride;
    DotSums<TYPE, R, C> sums;
    sums.load(out, apart * R * LANES);
    for (; step < smaller(end, whole); step += LANES) {
        if (IN_BLOCKS<R> && step * BYTES % 64 == 0) {
            for (int c = 0; c < C; c++) __builtin_prefetch(next + c * apart * stride);
            next += 64;
        }
        sums.add(w + step * BYTES, apart * stride, in.x + step, in.steps);
    }
    if (step < end) {  // what is behind the whole vectors of a channel
        alignas(64) char some[C * LANES * BYTES] = {};
        for (int64_t c = 0; c < C; c++)
            __builtin_memcpy(some + c * LANES * BYTES, w + c * apart * stride + step * BYTES,
                             size_t(stride - step * BYTES));
        sums.add(some, LANES * BYTES, in.x + step, in.steps);
    }
    sums.keep(out, apart * R * LANES);
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

// Up to DOT_SET channels times R rows.
template <int64_t TYPE, int R>
void dot_set(const Dense &a, const DotInput &in, int64_t row, int64_t channel, int64_t channels) {
    constexpr int C = DOT_CHANNELS<R>;
    alignas(64) float sums[DOT_SET<R> * R * LANES] = {};
    const int64_t stride = a.in * SIZE<TYPE>, stream = channels / C;
    const int64_t block = IN_BLOCKS<R> && stride > WHOLE_BYTES ? DOT_STEPS : in.steps;
    const auto begin = [&](int64_t c, int64_t step) {
        return static_cast<const char *>(a.w) + (channel + c) * stride +
               step * INPUTS<TYPE> * SIZE<TYPE>;
    };
    for (int64_t step = 0; step < in.steps; step += block) {
        const int64_t end = smaller(step + block, in.steps);
        for (int64_t c = 0; c < stream; c++) {
            // Behind the streams' ends come their next steps, or the next set's first ones.
            const char *next = c + 1 < stream    ? begin(c + 1, step)
                               : end < in.steps ? begin(0, end)
                                                : begin(channels, 0);
            add_dots<TYPE, R, C>(a, in, channel + c, stream, step, end, next, sums + c * R * LANES);
        }
        for (int64_t c = stream * C; c < channels; c++)
            add_dots<TYPE, R, 1>(a, in, channel + c, 1, step, end, begin(c, step),
                                 sums + c * R * LANES);
    }
    for (int64_t r = 0; r < R && row + r < a.rows; r++)
        for (int64_t c = 0; c < channels; c += LANES)
            store_dots<TYPE>(a, row + r, channel + c, sums + (c * R + r) * LANES, R * LANES);
}

// Of some channels, the rows from one on: as many as there are, or DOT_ROWS.
template <int64_t TYPE, int R = 1>
void dot_rows(const Dense &a, const DotInput &in, int64_t row, int64_t channel, int64_t end) {
    if constexpr (R < DOT_ROWS)
        if (a.rows - row > R) return dot_rows<TYPE, 2 * R>(a, in, row, channel, end);
    for (; channel < end; channel += DOT_SET<R>)
        dot_set<TYPE, R>(a, in, row, channel, smaller(DOT_SET<R>, end - channel));
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
    // So few channels at once that all threads have some.
    const int64_t fair = smaller(a.out / max_threads() / 4 / LANES * LANES, DOT_GROUP);
    const int64_t group = fair < LANES ? LANES : fair;
    for_each((a.out + group - 1) / group, true, [&](int64_t i, int64_t) {
        for (int64_t row = 0; row < a.rows; row += DOT_ROWS)
            dot_rows<TYPE>(a, {x + row * steps, steps}, row, i * group,
                           smaller((i + 1) * group, a.out));
    });
    return Status::OK;
}

}  // namespace
}  // namespace qllm
