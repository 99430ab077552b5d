// The operands of a dense product: activations as tiles take them, and blocks of weights that are
// turned on the way, for a weight's rows are channels.
#pragma once

#include "dense_steps.h"
#include "elements.h"
#include "isa.h"
#include "operands.h"
#include "prefetch.h"
#include "threads.h"
#include "tiles.h"

namespace qllm {
namespace {

constexpr int64_t DENSE_STEPS = 128;  // of a block

// How weights are asked for: bytes ahead in every channel, and how many of one before those of the
// next. For few rows memory is read without a pause, and faster in stretches, most of all where
// channels lie a multiple of 4096 bytes apart; for many, what comes next is not the same channel's.
struct DenseAhead {
    int64_t bytes, stretch;
};
constexpr DenseAhead FOR_FEW = {1024, 512}, FOR_MANY = {256, 64};

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
INLINE inline void load_square(VF (&steps)[WIDTH], const Dense &a, int64_t channel, int64_t input,
                               DenseAhead ahead) {
    constexpr int64_t SQUARE_INPUTS = WIDTH * INPUTS<TYPE>, BYTES = SQUARE_INPUTS * SIZE<TYPE>;
    const int64_t stride = a.in * SIZE<TYPE>, at = input * SIZE<TYPE>;
    const char *from = static_cast<const char *>(a.w) + channel * stride + at;
    if (channel + WIDTH <= a.out && input + SQUARE_INPUTS <= a.in) {
        // The squares of a stretch share its channels. Behind their end come the next ones.
        const int64_t stretch = smaller(ahead.stretch, WIDTH * BYTES), in_stretch = at % stretch;
        const int64_t channels = WIDTH * BYTES / stretch, to = at - in_stretch + ahead.bytes;
        const char *begin = from - at + to + (to < stride ? 0 : (WIDTH - 1) * stride) +
                            in_stretch / BYTES * channels * stride;
        for (int c = 0; c < channels; c++)
            for (int b = 0; b < stretch; b += 64) prefetch_into<2>(begin + c * stride + b);
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
    float *x;             // block after block, in it tile after tile, as `dense_offset` says
    int64_t block = DENSE_STEPS;  // steps of a block

    float *tile(int64_t row, int64_t step, int64_t steps_of_block) const {
        return x + step * rows + row * steps_of_block;
    }
};

static int64_t in_whole_tiles(int64_t rows) {
    const int64_t rest = rows % DENSE_TILE_ROWS;
    return rows - rest + (rest ? dense_tile_rows(rest) : 0);
}

// The tile of one block that begins with a row. Rows of activations lie far apart: those of the
// next tile are asked for.
template <int64_t TYPE, bool PAIRS = IN_PAIRS<TYPE>>
void lay_out(const Dense &a, const DenseInput &x, int64_t first, int64_t row, int64_t step) {
    const int64_t steps = smaller(x.block, x.steps - step), rows = dense_tile_rows(x.rows - row);
    const int64_t ahead = smaller(first + row + 2 * rows, a.rows) - first - row - rows;
    const int64_t size = SIZE<TYPE>, input = step * (PAIRS ? 2 : 1);
    float *tile = x.tile(row, step, steps);
    if (ahead > 0)
        prefetch_rows<false>(static_cast<const char *>(a.x) +
                                 ((first + row + rows) * a.x_stride + input) * size,
                      a.x_stride * size, smaller(steps * (PAIRS ? 2 : 1), a.in - input) * size,
                      ahead);
    for (int64_t s = 0; s < steps; s += WIDTH) {
        if (DENSE_TILE_ROWS > WIDTH || rows == 1) {  // WIDTH steps of a row lie side by side
            for (int64_t r = 0; r < rows; r++)
                store_f(tile + dense_offset(rows, r, s),
                        load_steps<TYPE, PAIRS>(a, first + row + r, step + s));
            continue;
        }
        VF square[WIDTH];
        for (int64_t r = 0; r < WIDTH; r++)
            square[r] = r < rows ? load_steps<TYPE, PAIRS>(a, first + row + r, step + s) : set_f(0);
        transpose(square);
        for (int64_t i = 0; i < WIDTH; i++) {
            // What is stored behind a step's rows is where the next one's come.
            const int64_t to = (s + i) * rows;
            if (to + WIDTH <= steps * rows) {
                store_f(tile + to, square[i]);
            } else {
                store_as(tile, to, FLOAT32, rows, square[i]);
            }
        }
    }
}

// Some steps of a panel, one after the other: LANES channels of each.
template <int64_t TYPE>
void load_panel(const Dense &a, int64_t panel, int64_t step, int64_t steps, float *to) {
    for (int64_t lane = 0; lane < LANES; lane += WIDTH)
        for (int64_t s = 0; s < steps; s += WIDTH) {
            VF square[WIDTH];
            const int64_t channel = panel * LANES + lane;
            load_square<TYPE>(square, a, channel, (step + s) * INPUTS<TYPE>, FOR_MANY);
            for (int64_t i = 0; i < WIDTH; i++)
                store_f(to + (s + i) * LANES + lane, square[i]);
        }
}

}  // namespace
}  // namespace qllm
