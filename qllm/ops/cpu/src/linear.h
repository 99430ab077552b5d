// y = x W^T + b for packed weights, in terms of an instruction set's `isa_*.h` and a `tile.h`.
//
// Activations become integers. A block of weights is unpacked to bytes, in cache or, for few rows,
// in registers, and multiplied with tiles of operands in int32, which is exact.
// Sums over blocks are in float32, one fused multiply-add each, in the order of the inputs. So a
// row's result is the same to the bit whatever else is computed beside it, and on every path, but
// for prefill in bfloat16 and float16 on AMX (prefill_amx.h).
#pragma once

#include "activations.h"
#include "gemv.h"
#include "isa.h"
#include "layout.h"
#include "operands.h"
#include "results.h"
#include "threads.h"
#include "tiles.h"

namespace qllm {
namespace {

constexpr int64_t MAX_ROWS = 1536;         // rows whose activations are held at once
constexpr int64_t MEMORY_BOUND_ROWS = 16;  // up to here threads take longer parts, to read on

#if HAS_WORDS
// Steps of a K block as int16 less the middle of their integers; adds the products of neighbours to
// `pairs`.
template <int P>
void unpack_words(const Linear &a, const uint8_t *q, int64_t first, int64_t end, uint8_t *to,
                  int32_t *pairs) {
    alignas(64) uint8_t bytes[K_BLOCK * LANES];
    unpack_integers(a, q, bytes);
    const VI middle = set_words(int16_t(1 << (a.bits - 1)));
    for (int v = 0; v < VECTORS; v++) {
        const uint8_t *from = bytes + (first * LANES + v * WIDTH) * STEP;
        uint8_t *words = to + v * WIDTH * STEP;
        VI sum = load_i(pairs + v * WIDTH);
        for (int64_t step = first; step < end; step++, from += LANES * STEP) {
            const VI four_inputs = weights(from);
            const VI even = sub_words(even_words(four_inputs), middle);
            const VI odd = sub_words(odd_words(four_inputs), middle);
            store_words(words, even);
            store_words(words + LANES * STEP, odd);
            sum = dot_words(sum, even, odd);
            words += LANES * WORD_STEP_BYTES;
        }
        store_i(pairs + v * WIDTH, sum);
    }
}
#else
// There is no int16.
template <int P>
void unpack_words(const Linear &, const uint8_t *, int64_t, int64_t, uint8_t *, int32_t *);
#endif

// `panels` panels, up to GROUP_PANELS, times all rows: unpacked to cache for many rows.
template <int P>
void multiply_group(const Linear &a, const Activations &x, int64_t first, int64_t panel,
                    int64_t panels, float *sums, uint8_t *bytes, Tiles &tiles) {
    Grid grid;
    const int64_t held = a.held_bits();
    alignas(64) int32_t pairs[GROUP_LANES];
    constexpr int64_t unpacked = K_BLOCK * LANES * (IN_WORDS<P> ? 2 : 1);
    for (int64_t row = 0; row < x.rows; row += CHUNK_ROWS) {
        const int64_t rows = smaller(CHUNK_ROWS, x.rows - row);
        grid.end = 0;  // what it has is of the last groups
        for (int64_t i = 0; i < rows * GROUP_LANES; i += WIDTH) store_f(sums + i, set_f(0));
        for (int64_t b = 0; b < x.blocks; b++) {
            const Block &block = x.block[b];
            // Of a block that is half a K block, all of that is unpacked, or what becomes int16.
            const int64_t k_block = block.step / STEPS, half = block.step % STEPS;
            const int64_t k_blocks = (block.steps + STEPS - 1) / STEPS;
            uint8_t *w = bytes + (IN_WORDS<P> ? 0 : half * LANES * STEP);
            if (block.group >= grid.end)
                grid.load(a, panel, panels, block.group, Grid::ROOM / GROUP_PANELS, 1, IN_WORDS<P>);
            Operands o = operands_of(a, nullptr);
            grid.point(o, a, block.group, panels);
            o.w = w;
            o.w_stride = k_blocks * unpacked;
            o.widen = steps_to_widen(a.bits);
            if constexpr (IN_WORDS<P>) {
                o.w_pairs = pairs;
                for (int32_t &sum : pairs) sum = 0;
            }
            for (int64_t p = 0; p < panels; p++) {
                const uint8_t *q = a.q + ((panel + p) * x.k_blocks + k_block) * 64 * held;
                uint8_t *to = bytes + p * o.w_stride;
                for (int64_t s = 0; s < k_blocks; s++, q += 64 * held, to += unpacked) {
                    if constexpr (IN_WORDS<P>) {
                        unpack_words<P>(a, q, half, smaller(STEPS, half + block.steps), to,
                                        pairs + p * LANES);
                    } else {
                        unpack_integers(a, q, to);
                    }
                }
            }
            tiles.begin(o, a, w, panels, block.steps);
            for (int64_t r = 0; r < rows; r += x.tile_rows) {
                point_at(o, x, b, row + r);
                o.out = sums + r * GROUP_LANES;
                tiles.multiply<P>(o, smaller(x.tile_rows, rows - r), panels);
            }
        }
        tiles.end<P>();
        finish<P>(a, x, first, row, rows, panel, panels, sums, grid.scales);
        for (int64_t r = row; r < row + rows; r++)
            if (x.fallback[r]) multiply_fallback_row(a, first + r, panel, panels);
    }
}

// Panels `from` to `end`.
template <int P>
void multiply_part(const Linear &a, const Activations &x, int64_t first, int64_t from,
                   int64_t end, char *own, Tiles &tiles) {
    float *sums = reinterpret_cast<float *>(own);
    uint8_t *bytes = reinterpret_cast<uint8_t *>(own + SUM_BYTES);
    if constexpr (GEMV_MAX_ROWS<P> > 0)
        if (x.rows <= GEMV_MAX_ROWS<P>) return gemv_rows<P>(a, x, first, from, end, sums);
    for (; from < end; from += GROUP_PANELS)
        multiply_group<P>(a, x, first, from, smaller(GROUP_PANELS, end - from), sums, bytes, tiles);
}

// All panels.
template <int P> void multiply_all_panels(const Linear &a, const Activations &x, int64_t first) {
    const int64_t panels = (a.out + LANES - 1) / LANES;
    const int64_t groups = panels / GROUP_PANELS / max_threads() / RUN_PARTS;
    const int64_t part = GROUP_PANELS * (x.rows <= MEMORY_BOUND_ROWS && groups > 1 ? groups : 1);
    in_threads(panels, part, [&](const Share &share) {
        char *own = x.own + share.thread * OWN_BYTES;
        Tiles tiles(reinterpret_cast<int32_t *>(own + SUM_BYTES + WEIGHT_BYTES));
        take_parts(share, [&](int64_t from, int64_t end) {
            multiply_part<P>(a, x, first, from, end, own, tiles);
        });
    });
}

// How activations of so many rows lie in tiles.
template <int P> TileShape tiles_of(int64_t rows) {
    if (rows > GEMV_MAX_ROWS<P>) return {TILE_ROWS<P>, 1, IN_WORDS<P>};
    if (IN_WORDS_OF_FEW<P> && rows > GEMV_TILE_ROWS<P>) return {GEMV_WORD_ROWS, 2, true};
    return {GEMV_TILE_ROWS<P>, 1, false};
}

template <int P> Status linear_of(const Linear &a) {
    for (int64_t first = 0; first < a.rows; first += MAX_ROWS) {
        Activations x;
        const int64_t rows = smaller(MAX_ROWS, a.rows - first);
        if (!prepare<P>(x, a, rows, tiles_of<P>(rows))) return Status::NO_MEMORY;
        for (int64_t row = 0; row < x.rows; row++) x.fallback[row] = 0;
        quantize_all<P>(a, x, first);
        multiply_all_panels<P>(a, x, first);
    }
    return Status::OK;
}

#if !WIDENS  // which is for one plane
static Status linear(const Linear &a) {
    if (a.mode != WEIGHT_ONLY) return linear_of<1>(a);
    return a.x_type == FLOAT32 ? linear_of<4>(a) : linear_of<2>(a);
}
#endif

}  // namespace
}  // namespace qllm
