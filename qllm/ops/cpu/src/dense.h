// y = x W^T + b for dense weights, in terms of an instruction set's `isa_*.h` and a `dense_tile.h`.
//
// A weight's rows are channels, one after the other, while vectors hold a few inputs of many
// channels: blocks of panels are turned on the way, in registers for few rows, in cache for many.
// The products of a run of steps are added in the order of the inputs, and then to those of the
// runs before it. So a row's result is the same to the bit whatever else is computed beside it. A
// step of decode is for dense_decode.h; on AMX bfloat16 is for dense_decode_amx.h, of few rows, and
// for prefill_amx.h.
//
// On every path it is, too, but for bfloat16 in pairs. There, the instruction says in which order
// two products (AVX512-BF16) or those of 32 inputs (AMX) are added, and takes what is subnormal for
// zero among operands and sums; results differ in the last digits. Infinities and NaN are those of
// other paths, but where such a zero meets an infinity, or a sum overflows half-way.
#pragma once

#include "dense_input.h"
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

constexpr int64_t PASS_PANELS = 8;    // that share a pass over the activations
constexpr int64_t DENSE_PANELS = 2;   // of a block that is multiplied at once: 16 KiB
constexpr int64_t DENSE_ROWS = 768;   // held at once: their sums stay in cache, 384 KiB

// Floats of a thread's own: its sums, and a block of weights.
constexpr int64_t DENSE_SUMS = DENSE_ROWS * LANES * PASS_PANELS;
constexpr int64_t DENSE_OWN = DENSE_SUMS + DENSE_PANELS * DENSE_STEPS * LANES;

// Of a run. Shorter ones are more exact, and slower; other types lose more when they are stored.
template <int64_t TYPE> constexpr int64_t DENSE_RUN = TYPE == FLOAT32 ? 32 : DENSE_STEPS;

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
