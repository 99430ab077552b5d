// y = x W^T + b for dense weights, in terms of an instruction set's `isa_*.h` and a `dense_tile.h`.
//
// A weight's rows are channels, one after the other, while vectors hold a few inputs of many
// channels: blocks of panels are turned on the way, in registers for few rows, in cache for many.
// What a vector takes at once is a step: 4 bytes of each of its channels, one input as float32 or,
// where there is an instruction for them, two as bfloat16. The products of a run of steps are added
// in the order of the inputs, and then to those of the runs before it. So a row's result is the same
// to the bit whatever else is computed beside it.
//
// On every path it is, too, but for bfloat16 in pairs. There, the instruction says in which order two
// products (AVX512-BF16) or those of 32 inputs (AMX) are added, and takes what is subnormal for zero
// among operands and sums; results differ in the last digits. Infinities and NaN are those of other
// paths, but where such a zero meets an infinity, or a sum overflows half-way.
#pragma once

#include "elements.h"
#include "isa.h"
#include "operands.h"
#include "threads.h"
#include "tiles.h"

namespace qllm {
namespace {

constexpr int64_t DENSE_STEPS = 128;  // of a block: with four panels, 32 KiB
constexpr int64_t DENSE_ROWS = 768;   // held at once: their sums stay in cache, 192 KiB
constexpr int64_t DENSE_AHEAD = 256;  // bytes to prefetch ahead in every channel

// Floats of a thread's own: its sums, and a block of weights.
constexpr int64_t DENSE_OWN = (DENSE_ROWS + DENSE_STEPS) * GROUP_LANES;

// Of a run. Shorter ones are more exact, and slower; other types lose more when they are stored.
template <int64_t TYPE> constexpr int64_t RUN = TYPE == FLOAT32 ? 32 : DENSE_STEPS;
template <int64_t TYPE> constexpr bool IN_PAIRS = HAS_PAIRS && TYPE == BFLOAT16;
template <int64_t TYPE> constexpr int64_t INPUTS = IN_PAIRS<TYPE> ? 2 : 1;  // of a step
template <int64_t TYPE> constexpr int64_t SIZE = TYPE == FLOAT32 ? 4 : 2;   // of an element

// WIDTH steps of WIDTH channels that lie `stride` elements apart, step by step.
template <int64_t TYPE, int C = 0>
INLINE inline void load_square(VF (&steps)[WIDTH], const char *from, int64_t stride) {
    const char *channel = from + C * stride * SIZE<TYPE>;
    steps[C] = IN_PAIRS<TYPE> ? load_f(reinterpret_cast<const float *>(channel))
                              : load_all<TYPE>(channel, 0);
    if constexpr (C + 1 < WIDTH) {
        load_square<TYPE, C + 1>(steps, from, stride);
    } else {
        transpose(steps);
    }
}

// The square that begins with a channel and an input, zeros where there are none.
template <int64_t TYPE>
INLINE inline void load_square(VF (&steps)[WIDTH], const Dense &a, int64_t channel, int64_t input) {
    constexpr int64_t SQUARE_INPUTS = WIDTH * INPUTS<TYPE>;
    const int64_t stride = a.in * SIZE<TYPE>;
    const char *from = static_cast<const char *>(a.w) + channel * stride + input * SIZE<TYPE>;
    if (channel + WIDTH <= a.out && input + SQUARE_INPUTS <= a.in) {
        // Behind the end of these channels come the next ones.
        const bool behind = input * SIZE<TYPE> + DENSE_AHEAD >= stride;
        const char *ahead = from + DENSE_AHEAD + (behind ? (WIDTH - 1) * stride : 0);
        for (int c = 0; c < WIDTH; c++) __builtin_prefetch(ahead + c * stride);
        load_square<TYPE>(steps, from, a.in);
    } else {
        alignas(64) char some[WIDTH * SQUARE_INPUTS * SIZE<TYPE>] = {};
        const int64_t channels = smaller(WIDTH, a.out - channel);
        const int64_t inputs = smaller(SQUARE_INPUTS, a.in - input);
        for (int64_t c = 0; c < channels && inputs > 0; c++)
            __builtin_memcpy(some + c * SQUARE_INPUTS * SIZE<TYPE>, from + c * stride,
                             size_t(inputs * SIZE<TYPE>));
        load_square<TYPE>(steps, some, SQUARE_INPUTS);
    }
}

// The activations of some rows, as steps.
struct DenseInput {
    int64_t rows, steps;  // whole tiles and LANES, with zeros for what is not there
    float *x;             // block after block, in it tile after tile, as `dense_place` says
    int64_t block = DENSE_STEPS;  // steps of a block

    float *tile(int64_t row, int64_t step, int64_t steps_of_block) const {
        return x + step * rows + row * steps_of_block;
    }
};

static int64_t in_whole_tiles(int64_t rows) {
    const int64_t rest = rows % DENSE_TILE_ROWS;
    return rows - rest + (rest ? dense_tile_rows(rest) : 0);
}

// One row of one block, in pairs of bfloat16 or not.
template <int64_t TYPE, bool PAIRS = IN_PAIRS<TYPE>>
void lay_out(const Dense &a, const DenseInput &x, int64_t first, int64_t row, int64_t step) {
    const int64_t steps = smaller(x.block, x.steps - step);
    const int64_t tile_row = row / DENSE_TILE_ROWS * DENSE_TILE_ROWS;
    const int64_t rows = dense_tile_rows(x.rows - tile_row);
    float *tile = x.tile(tile_row, step, steps);
    for (int64_t s = 0; s < steps; s += WIDTH) {
        const int64_t input = (step + s) * (PAIRS ? 2 : 1);
        const int64_t count = first + row < a.rows ? a.in - input : 0;
        const int64_t at = (first + row) * a.x_stride + input;
        alignas(64) float some[WIDTH] = {};
        if constexpr (PAIRS && TYPE == BFLOAT16) {
            if (count > 0)
                __builtin_memcpy(some, static_cast<const uint16_t *>(a.x) + at,
                                 size_t(smaller(2 * WIDTH, count) * 2));
        } else if constexpr (PAIRS) {
            store_f(some, as_pairs(load<TYPE>(a.x, at, count),
                                   load<TYPE>(a.x, at + WIDTH, count - WIDTH)));
        } else {
            store_f(some, load<TYPE>(a.x, at, count));
        }
        if (rows == 1) {
            store_f(tile + s, load_f(some));
        } else {
            for (int64_t i = 0; i < WIDTH; i++)
                tile[dense_place(rows, row - tile_row, s + i)] = some[i];
        }
    }
}

template <int64_t TYPE>
void store_sums(const Dense &a, int64_t row, int64_t channel, int64_t channels, const float *sums) {
    for (int64_t i = 0; i < channels && channel + i < a.out; i += WIDTH) {
        VF value = load_f(sums + i);
        const int64_t count = a.out - channel - i;
        if (a.bias) value = add_f(value, load<TYPE>(a.bias, channel + i, count));
        store<TYPE>(a.y, row * a.out + channel + i, count, value);
    }
}

#ifdef DENSE_GEMV_ROWS
// Steps I and on of a square times R rows.
template <bool PAIR, int R, int I = 0>
INLINE inline void add_square(DenseSums<PAIR, R, 1> &sums, const VF (&square)[WIDTH],
                              const float *x) {
    const VF w[1] = {square[I]};
    sums.add(w, x + I * R);
    if constexpr (I + 1 < WIDTH) add_square<PAIR, R, I + 1>(sums, square, x);
}

// A panel times R rows, all there are: memory has to be read without a pause.
template <int64_t TYPE, int R>
__attribute__((noinline)) void dense_gemv(const Dense &a, const DenseInput &x, int64_t first,
                                         int64_t panel) {
    for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
        const int64_t channel = panel * LANES + lane;
        alignas(64) float total[R * GROUP_LANES] = {};
        for (int64_t step = 0; step < x.steps; step += RUN<TYPE>) {
            const int64_t end = smaller(step + RUN<TYPE>, x.steps);
            DenseSums<IN_PAIRS<TYPE>, R, 1> sums;
            sums.clear();
            for (int64_t s = step; s < end; s += WIDTH) {
                VF square[WIDTH];
                load_square<TYPE>(square, a, channel, s * INPUTS<TYPE>);
                add_square(sums, square, x.x + s * R);
            }
            sums.finish(total);
        }
        for (int64_t r = 0; r < R && first + r < a.rows; r++)
            store_sums<TYPE>(a, first + r, channel, WIDTH, total + r * GROUP_LANES);
    }
}

template <int64_t TYPE, int R = 1>
bool dense_as_gemv(const Dense &a, const DenseInput &x, int64_t first) {
    if (x.rows == R) {
        const int64_t panels = (a.out + LANES - 1) / LANES;
        for_each(panels, true,
                 [&](int64_t panel, int64_t) { dense_gemv<TYPE, R>(a, x, first, panel); });
        return true;
    }
    if constexpr (R < DENSE_GEMV_ROWS) return dense_as_gemv<TYPE, 2 * R>(a, x, first);
    return false;
}
#else
template <int64_t TYPE>
bool dense_as_gemv(const Dense &, const DenseInput &, int64_t) {
    return false;
}
#endif

// Up to GROUP_PANELS panels times all rows.
template <int64_t TYPE>
void dense_many(const Dense &a, const DenseInput &x, int64_t first, int64_t panel,
                int64_t panels, float *own, DenseTiles &tiles) {
    float *sums = own, *block = own + DENSE_ROWS * GROUP_LANES;
    for (int64_t i = 0; i < x.rows * GROUP_LANES; i += WIDTH) store_f(sums + i, set_f(0));
    for (int64_t step = 0; step < x.steps; step += DENSE_STEPS) {
        const int64_t steps = smaller(DENSE_STEPS, x.steps - step);
        for (int64_t lane = 0; lane < panels * LANES; lane += WIDTH)
            for (int64_t s = 0; s < steps; s += WIDTH) {
                VF square[WIDTH];
                load_square<TYPE>(square, a, panel * LANES + lane, (step + s) * INPUTS<TYPE>);
                float *to = block + (lane / LANES * steps + s) * LANES + lane % LANES;
                for (int64_t i = 0; i < WIDTH; i++) store_f(to + i * LANES, square[i]);
            }
        for (int64_t row = 0; row < x.rows; row += DENSE_TILE_ROWS)
            tiles.multiply<IN_PAIRS<TYPE>>(
                {block, x.tile(row, step, steps), steps, RUN<TYPE>, sums + row * GROUP_LANES},
                dense_tile_rows(x.rows - row), panels);
    }
    for (int64_t row = 0; row < x.rows && first + row < a.rows; row++)
        store_sums<TYPE>(a, first + row, panel * LANES, panels * LANES, sums + row * GROUP_LANES);
}

template <int64_t TYPE> Status dense_of(const Dense &a) {
    const int64_t panels = (a.out + LANES - 1) / LANES;
    for (int64_t first = 0; first < a.rows; first += DENSE_ROWS) {
        DenseInput x;
        x.rows = in_whole_tiles(smaller(DENSE_ROWS, a.rows - first));
        x.steps = (a.in + INPUTS<TYPE> * LANES - 1) / (INPUTS<TYPE> * LANES) * LANES;
        const int64_t held = (x.steps * x.rows + 15) / 16 * 16;
        x.x = static_cast<float *>(scratch(size_t((held + max_threads() * DENSE_OWN) * 4)));
        if (!x.x) return Status::NO_MEMORY;
        const int64_t blocks = (x.steps + DENSE_STEPS - 1) / DENSE_STEPS;
        for_each(blocks, x.rows * x.steps > WORTH_THREADS, [&](int64_t block, int64_t) {
            for (int64_t row = 0; row < x.rows; row++)
                lay_out<TYPE>(a, x, first, row, block * DENSE_STEPS);
        });
        if (dense_as_gemv<TYPE>(a, x, first)) continue;
        const int64_t group = smaller(GROUP_PANELS, panels / max_threads() + 1);
        in_threads(panels, group, [&](const Share &share) {
            DenseTiles tiles;
            float *memory = x.x + held + share.thread * DENSE_OWN;
            take_parts(share, [&](int64_t panel, int64_t end) {
                dense_many<TYPE>(a, x, first, panel, end - panel, memory, tiles);
            });
        });
    }
    return Status::OK;
}

[[maybe_unused]] static Status dense(const Dense &a) { return BY_TYPE(a.type, dense_of, a); }

}  // namespace
}  // namespace qllm
