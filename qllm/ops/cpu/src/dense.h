// y = x W^T + b for dense weights, in terms of an instruction set's `isa_*.h` and a `dense_tile.h`.
//
// A weight's rows are channels, one after the other, while vectors hold a few inputs of many
// channels: blocks of panels are turned on the way, in registers for few rows, in cache for many.
// The products of a run of steps are added in the order of the inputs, and then to those of the
// runs before it. So a row's result is the same to the bit whatever else is computed beside it. A
// step of decode is for dense_decode.h; few rows of bfloat16 on AMX are for dense_decode_amx.h.
//
// On every path it is, too, but for bfloat16 in pairs. There, the instruction says in which order
// two products (AVX512-BF16) or those of 32 inputs (AMX) are added, and takes what is subnormal for
// zero among operands and sums; results differ in the last digits. Infinities and NaN are those of
// other paths, but where such a zero meets an infinity, or a sum overflows half-way.
#pragma once

#include "dense_steps.h"
#include "elements.h"
#include "isa.h"
#include "operands.h"
#include "prefetch.h"
#include "threads.h"
#include "tiles.h"

#ifdef DENSE_GEMV_ROWS
#include "dense_decode.h"
#endif

namespace qllm {
namespace {

constexpr int64_t DENSE_STEPS = 128;  // of a block
constexpr int64_t DENSE_PANELS = 2;   // of one that is multiplied at once: 16 KiB
constexpr int64_t DENSE_ROWS = 768;   // held at once: their sums stay in cache, 384 KiB

// How weights are asked for: bytes ahead in every channel, and how many of one before those of the
// next. For few rows memory is read without a pause, and faster in stretches, most of all where
// channels lie a multiple of 4096 bytes apart; for many, what comes next is not the same channel's.
struct DenseAhead {
    int64_t bytes, stretch;
};
constexpr DenseAhead FOR_FEW = {1024, 512}, FOR_MANY = {256, 64};

// Floats of a thread's own: its sums, and a block of weights.
constexpr int64_t DENSE_SUMS = DENSE_ROWS * LANES * PASS_PANELS;
constexpr int64_t DENSE_OWN = DENSE_SUMS + DENSE_PANELS * DENSE_STEPS * LANES;

// Of a run. Shorter ones are more exact, and slower; other types lose more when they are stored.
template <int64_t TYPE> constexpr int64_t DENSE_RUN = TYPE == FLOAT32 ? 32 : DENSE_STEPS;

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

// Asks for what results of rows of some panels are written to.
template <int64_t TYPE>
void prefetch_results(const Dense &a, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    const int64_t stride = a.out * SIZE<TYPE>;
    char *first = static_cast<char *>(a.y) + row * stride + panel * LANES * SIZE<TYPE>;
    prefetch_rows<true>(first, stride, panels * LANES * SIZE<TYPE>, rows);
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
        for (int64_t step = 0; step < x.steps; step += DENSE_RUN<TYPE>) {
            const int64_t end = smaller(step + DENSE_RUN<TYPE>, x.steps);
            DenseSums<IN_PAIRS<TYPE>, R, 1> sums;
            sums.clear();
            for (int64_t s = step; s < end; s += WIDTH) {
                VF square[WIDTH];
                load_square<TYPE>(square, a, channel, s * INPUTS<TYPE>, FOR_FEW);
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

// Where the sums of a row and panel p of a pass are among a thread's.
inline float *dense_sums(float *own, int64_t row, int64_t p) {
    return own + (p / GROUP_PANELS * DENSE_ROWS + row) * GROUP_LANES + p % GROUP_PANELS * LANES;
}

// So few panels at once, of all there are, that threads end at the same time.
static int64_t fair_panels(int64_t panels) {
    const int64_t fair = panels / max_threads() / 6 / DENSE_PANELS * DENSE_PANELS;
    return fair < DENSE_PANELS ? DENSE_PANELS : smaller(fair, PASS_PANELS);
}

// Up to PASS_PANELS panels times all rows: a block of two of them stays in the first cache
// meanwhile, and what a tile will write to is asked for before it begins.
template <int64_t TYPE>
void dense_many(const Dense &a, const DenseInput &x, int64_t first, int64_t panel,
                int64_t panels, float *own, DenseTiles &tiles) {
    float *block = own + DENSE_SUMS;
    for (int64_t p = 0; p < panels; p += GROUP_PANELS)
        for (int64_t i = 0; i < x.rows * GROUP_LANES; i += WIDTH)
            store_f(dense_sums(own, 0, p) + i, set_f(0));
    int64_t step = 0;
    do {  // once without inputs, too
        const int64_t steps = smaller(DENSE_STEPS, x.steps - step);
        for (int64_t p = 0; p < panels; p += DENSE_PANELS) {
            const int64_t some = smaller(DENSE_PANELS, panels - p);
            for (int64_t n = 0; n < some; n++)
                load_panel<TYPE>(a, panel + p + n, step, steps, block + n * steps * LANES);
            for (int64_t row = 0, rows; row < x.rows; row += rows) {
                rows = dense_tile_rows(x.rows - row);
                const bool last = step + steps == x.steps;
                const int64_t real = last ? smaller(rows, a.rows - first - row) : 0;
                float *out = dense_sums(own, row, p);
                prefetch_rows<true>(out, GROUP_LANES * 4, some * LANES * 4, rows);
                prefetch_results<TYPE>(a, first + row, real, panel + p, some);
                tiles.multiply<IN_PAIRS<TYPE>>(
                    {block, x.tile(row, step, steps), steps, DENSE_RUN<TYPE>, out}, rows, some);
                for (int64_t r = 0; r < real; r++)
                    store_sums<TYPE>(a, first + row + r, (panel + p) * LANES, some * LANES,
                                     out + r * GROUP_LANES);
            }
        }
        step += steps;
    } while (step < x.steps);
}

template <int64_t TYPE> Status dense_of(const Dense &a) {
#ifdef DENSE_GEMV_ROWS
    if (a.decode) return dense_decode_of<TYPE>(a);
#endif
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
            for (int64_t row = 0; row < x.rows; row += dense_tile_rows(x.rows - row))
                lay_out<TYPE>(a, x, first, row, block * DENSE_STEPS);
        });
        if (dense_as_gemv<TYPE>(a, x, first)) continue;
        in_threads(panels, fair_panels(panels), [&](const Share &share) {
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
