// y = x W^T + b for dense weights in a step of decode: dot products along the inputs.
//
// What counts there is how fast the weight comes from memory. A vector takes a few steps (see
// dense_steps.h) of one channel, as they lie; to turn them, as dense.h does for many rows, takes
// longer than to read them. Of LANES sums of a channel each has the products of every LANES-th
// step, in the order of the inputs; at the end halves of them are added to each other until one is
// left. So a row's result is the same to the bit whatever else is computed beside it, and on every
// path but for bfloat16 in pairs; that of a prompt's pass may differ in the last digits.
#pragma once

#include "dense_steps.h"
#include "dense_tile.h"
#include "prefetch.h"
#include "threads.h"

namespace qllm {
namespace {

// Rows and channels of which sums are in registers.
constexpr int DOT_ROWS = WIDTH == 16 ? 4 : WIDTH == 8 ? 2 : 1;
template <int R> constexpr int DOT_CHANNELS = WIDTH == 16 ? 4 : WIDTH == 8 ? 4 / R : 1;

// Channels that are read together: as many streams as sums are for, each of channels that follow on
// each other, so that the machine sees what comes next, from one channel to the next, too. Channels
// side by side would be as many streams, each of which leaves out what the others read. So many at
// most, and of so many bytes, that the second cache keeps them for more rows, and the next ones
// beside them.
constexpr int64_t DOT_GROUP = 64, DOT_BYTES = 256 << 10;
constexpr int64_t DOT_SUMS = DOT_GROUP * DOT_ROWS * LANES;  // a thread's own; stacks may be small

// The channels that come next, and from how many rows on they are asked for while these are
// multiplied: there is about as much to compute as to read, more where weights become float32
// first. For fewer rows the machine sees by itself what comes.
using Next = ComingInto<2>;
template <int64_t TYPE> constexpr int64_t NEXT_ROWS = SIZE<TYPE> == 2 && !IN_PAIRS<TYPE> ? 2 : 3;

// Floats between rows of activations: where a row is a multiple of 4096 bytes, those of all rows
// would have the same few places in the first cache, and channels have them, too.
constexpr int64_t DOT_GAP = 48;

// The sums of C channels times R rows, in registers as those of `Sums` in tile.h.
template <int64_t TYPE, int R, int C> struct DotSums {
    static constexpr int64_t VECTOR_BYTES = WIDTH * INPUTS<TYPE> * SIZE<TYPE>;
    VF of[C * R * VECTORS];

    template <int I = 0> INLINE void clear() {
        of[I] = set_f(0);
        if constexpr (I + 1 < C * R * VECTORS) clear<I + 1>();
    }

    // To (C, R, LANES), channels `apart` floats from each other.
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

    template <int V, int ROW, int CHANNEL = 0>
    INLINE void add_channel(const VF (&weights)[C], VF x) {
        VF &sum = of[(CHANNEL * R + ROW) * VECTORS + V];
        sum = add_slots<IN_PAIRS<TYPE>>(sum, weights[CHANNEL], x);
        if constexpr (CHANNEL + 1 < C) add_channel<V, ROW, CHANNEL + 1>(weights, x);
    }
};

// Activations of R rows, `stride` apart, as `load_steps` has them: with zeros up to so many steps,
// a multiple of LANES.
struct DotInput {
    const float *x;
    int64_t steps, stride;
};

// C channels, `apart` from each other, times R rows: their sums, (channels, R, LANES).
template <int64_t TYPE, int R, int C>
__attribute__((noinline)) void dots(const Dense &a, const DotInput &in, int64_t channel,
                                    int64_t apart, float *out, Next &next) {
    constexpr int64_t BYTES = INPUTS<TYPE> * SIZE<TYPE>;  // of a step
    const int64_t stride = a.in * SIZE<TYPE>, whole = a.in / (INPUTS<TYPE> * LANES) * LANES;
    const char *w = static_cast<const char *>(a.w) + channel * stride;
    DotSums<TYPE, R, C> sums;
    sums.clear();
    Next asked = next;
    for (int64_t step = 0; step < whole; step += LANES) {
        asked.ask(C * LANES * BYTES);
        sums.add(w + step * BYTES, apart * stride, in.x + step, in.stride);
    }
    next = asked;
    if (whole < in.steps) {  // what is behind the whole vectors of a channel
        alignas(64) char some[C * LANES * BYTES] = {};
        for (int64_t c = 0; c < C; c++)
            __builtin_memcpy(some + c * LANES * BYTES, w + c * apart * stride + whole * BYTES,
                             size_t(stride - whole * BYTES));
        sums.add(some, LANES * BYTES, in.x + whole, in.stride);
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

// Up to DOT_GROUP channels times R rows.
template <int64_t TYPE, int R>
void dot_group(const Dense &a, const DotInput &in, int64_t row, int64_t channel, int64_t channels,
               float *sums, Next &next) {
    constexpr int C = DOT_CHANNELS<R>;
    const int64_t stream = channels / C, padded = (channels + LANES - 1) / LANES * LANES;
    for (int64_t c = 0; c < stream; c++)
        dots<TYPE, R, C>(a, in, channel + c, stream, sums + c * R * LANES, next);
    for (int64_t c = stream * C; c < channels; c++)
        dots<TYPE, R, 1>(a, in, channel + c, 1, sums + c * R * LANES, next);
    for (int64_t i = channels * R * LANES; i < padded * R * LANES; i += WIDTH)
        store_f(sums + i, set_f(0));
    for (int64_t r = 0; r < R && row + r < a.rows; r++)
        for (int64_t c = 0; c < channels; c += LANES)
            store_dots<TYPE>(a, row + r, channel + c, sums + (c * R + r) * LANES, R * LANES);
}

// Of some channels, the rows from one on: as many as there are, or DOT_ROWS.
template <int64_t TYPE, int R = 1>
void dot_rows(const Dense &a, const DotInput &in, int64_t row, int64_t channel, int64_t channels,
              float *sums, Next &next) {
    if constexpr (R < DOT_ROWS)
        if (a.rows - row > R)
            return dot_rows<TYPE, 2 * R>(a, in, row, channel, channels, sums, next);
    dot_group<TYPE, R>(a, in, row, channel, channels, sums, next);
}

// All rows times up to `group` channels from one on, while those behind them are asked for, up to
// `asked`.
template <int64_t TYPE>
void dot_channels(const Dense &a, const DotInput &in, int64_t channel, int64_t group, int64_t asked,
                  float *sums) {
    const int64_t channels = smaller(group, a.out - channel), end = channel + channels;
    const int64_t bytes = a.in * SIZE<TYPE>, passes = (a.rows + DOT_ROWS - 1) / DOT_ROWS;
    Next next;
    if (bytes && a.rows >= NEXT_ROWS<TYPE>)
        next = {static_cast<const char *>(a.w) + end * bytes, (asked - end) * bytes,
                channels * bytes * passes};
    for (int64_t row = 0; row < a.rows; row += DOT_ROWS)
        dot_rows<TYPE>(a, {in.x + row * in.stride, in.steps, in.stride}, row, channel, channels,
                       sums, next);
}

template <int64_t TYPE> Status dense_decode_of(const Dense &a) {
    const int64_t steps = (a.in + INPUTS<TYPE> * LANES - 1) / (INPUTS<TYPE> * LANES) * LANES;
    const int64_t rest = a.rows % DOT_ROWS;  // padded to as many as `dot_rows` takes, and no more
    const int64_t rows = a.rows - rest + (rest ? dense_tile_rows(rest) : 0);
    const int64_t stride = steps + DOT_GAP, held = rows * stride;
    auto *x = static_cast<float *>(scratch(size_t((held + max_threads() * DOT_SUMS) * 4)));
    if (!x) return Status::NO_MEMORY;
    for_each(rows, rows * steps > WORTH_THREADS, [&](int64_t row, int64_t) {
        for (int64_t s = 0; s < steps; s += WIDTH)
            store_f(x + row * stride + s, load_steps<TYPE, IN_PAIRS<TYPE>>(a, row, s));
    });
    // So few channels at once that all threads have some.
    const int64_t cached = DOT_BYTES / (a.in * SIZE<TYPE> + 1), fair = a.out / max_threads() / 4;
    const int64_t limit = smaller(smaller(cached, fair) / LANES * LANES, DOT_GROUP);
    const int64_t group = limit < LANES ? LANES : limit, groups = (a.out + group - 1) / group;
    in_threads(groups, groups / max_threads() / RUN_PARTS + 1, [&](const Share &share) {
        float *sums = x + held + share.thread * DOT_SUMS;
        const int64_t run = share.runs[share.thread].end;  // behind it are another thread's
        take_parts(share, [&](int64_t from, int64_t end) {
            for (; from < end; from++) {
                const int64_t asked = smaller((from + (from + 1 == run ? 1 : 2)) * group, a.out);
                dot_channels<TYPE>(a, {x, steps, stride}, from * group, group, asked, sums);
            }
        });
    });
    return Status::OK;
}

}  // namespace
}  // namespace qllm
