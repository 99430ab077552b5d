// y = x W^T + b of a prefill in bfloat16, on AMX: weights are dequantized to a panel in cache, and
// sums stay in tiles over the whole of K, whatever the groups. A weight is rounded to bfloat16
// once, as is an activation of float16; products and sums are those of dense layers in bfloat16
// (dense.h). Rows that integers cannot stand for are left to float arithmetic here too: infinities
// and NaN are those of other paths.
#pragma once

#include "dense.h"
#include "isa.h"
#include "kernels.h"
#include "layout.h"
#include "operands.h"
#include "results.h"
#include "threads.h"
#include "tiles.h"

namespace qllm {
namespace {

constexpr int64_t PREFILL_STEPS = 256;  // of a panel: 512 inputs
constexpr int64_t PREFILL_PANELS = 2;   // that are dequantized at once: 32 KiB, which L1 holds
constexpr int64_t K_BLOCK_STEPS = K_BLOCK / 2;

// Floats of a thread's own: its sums, and what is dequantized.
constexpr int64_t PREFILL_OWN =
    DENSE_ROWS * GROUP_LANES + PREFILL_PANELS * PREFILL_STEPS * LANES;

// Whether a layer's prefill runs so. This is the one place where that is decided: it has not been
// measured on AMX yet. Groups have no gaps between them, and weights are in the range of bfloat16;
// those with offsets (of GGUF files) stay integers.
static inline bool is_bf16_prefill(const Linear &a) {
    const bool gaps = a.group % K_BLOCK && a.group < a.in;
    const bool halves = a.x_type != FLOAT32 && a.scale_type != FLOAT32;
    return a.prefill && a.mode == WEIGHT_ONLY && halves && !gaps && !a.offsets;
}

// Steps of a panel, from a whole K block on, to pairs of bfloat16: (q - zero) scale, rounded once.
static void dequantize(const Linear &a, int64_t panel, int64_t step, int64_t steps, float *to) {
    const int64_t k_blocks = row_k_blocks(a.in, a.group), groups = (a.in + a.group - 1) / a.group;
    const UnpackKBlock unpack = UNPACK_K_BLOCK[a.bits];
    alignas(64) uint8_t bytes[K_BLOCK * LANES];
    const int64_t end = (step + steps) / K_BLOCK_STEPS;
    for (int64_t k_block = step / K_BLOCK_STEPS, group = -1; k_block < end; k_block++) {
        unpack(a.q + (panel * k_blocks + k_block) * 64 * a.bits, bytes);
        group = k_block * K_BLOCK / a.group;
        const int64_t at = (panel * groups + group) * LANES;
        const VF scale = load_as(a.scales, at, a.scale_type, WIDTH);
        const VI zero = a.zeros ? load_bytes(a.zeros + at) : set_i(1 << (a.bits - 1));
        // All of this is exact: scales have 11 bits, and 256 + zero has 9.
        const VF less = mul_f(to_float(sub_i(set_i(-256), zero)), scale);
        for (int64_t s = 0; s < STEPS; s++, to += 2 * LANES) {
            const VI four = weights(bytes + s * 64);
            store_f(to, interleaved_pairs(fma_f(above_256<0>(four), scale, less),
                                          fma_f(above_256<1>(four), scale, less)));
            store_f(to + LANES, interleaved_pairs(fma_f(above_256<2>(four), scale, less),
                                                  fma_f(above_256<3>(four), scale, less)));
        }
    }
}

// Up to PREFILL_PANELS panels times all rows.
template <int64_t TYPE>
void prefill_panels(const Linear &a, const Dense &dense, const DenseInput &x, int64_t first,
                    const uint8_t *fallback, int64_t panel, int64_t panels, float *own,
                    DenseTiles &tiles) {
    float *sums = own, *weight = own + DENSE_ROWS * GROUP_LANES;
    for (int64_t i = 0; i < x.rows * GROUP_LANES; i += WIDTH) store_f(sums + i, set_f(0));
    for (int64_t step = 0; step < x.steps; step += x.block) {
        const int64_t steps = smaller(x.block, x.steps - step);
        for (int64_t p = 0; p < panels; p++)
            dequantize(a, panel + p, step, steps, weight + p * steps * LANES);
        for (int64_t row = 0; row < x.rows; row += DENSE_TILE_ROWS)
            tiles.multiply<true>(
                {weight, x.tile(row, step, steps), steps, steps, sums + row * GROUP_LANES},
                dense_tile_rows(x.rows - row), panels);
    }
    for (int64_t row = 0; row < x.rows && first + row < a.rows; row++) {
        store_sums<TYPE>(dense, first + row, panel * LANES, panels * LANES,
                         sums + row * GROUP_LANES);
        if (fallback[row]) multiply_fallback_row(a, first + row, panel, panels);
    }
}

template <int64_t TYPE> Status bf16_prefill(const Linear &a) {
    const int64_t panels = (a.out + LANES - 1) / LANES;
    const Dense dense = {a.rows, a.in, a.out, a.x_stride, a.x_type, 0, a.x, nullptr, a.bias, a.y};
    for (int64_t first = 0; first < a.rows; first += DENSE_ROWS) {
        const int64_t rows = smaller(DENSE_ROWS, a.rows - first);
        DenseInput x;
        x.rows = in_whole_tiles(rows);
        x.steps = row_k_blocks(a.in, a.group) * K_BLOCK_STEPS;
        x.block = PREFILL_STEPS;
        const int64_t held = x.steps * x.rows;
        x.x = static_cast<float *>(
            scratch(size_t((held + max_threads() * PREFILL_OWN) * 4 + DENSE_ROWS)));
        if (!x.x) return Status::NO_MEMORY;
        float *own = x.x + held;
        uint8_t *fallback = reinterpret_cast<uint8_t *>(own + max_threads() * PREFILL_OWN);
        const bool worth = x.rows * x.steps > WORTH_THREADS;
        for_each(rows, worth, [&](int64_t row, int64_t) {
            fallback[row] = largest_bits(a, (first + row) * a.x_stride, a.in) >= FALLBACK_BITS;
        });
        for_each((x.steps + x.block - 1) / x.block, worth, [&](int64_t block, int64_t) {
            for (int64_t row = 0; row < x.rows; row += dense_tile_rows(x.rows - row))
                lay_out<TYPE, true>(dense, x, first, row, block * x.block);
        });
        in_threads(panels, PREFILL_PANELS, [&](const Share &share) {
            DenseTiles tiles;
            take_parts(share, [&](int64_t panel, int64_t end) {
                prefill_panels<TYPE>(a, dense, x, first, fallback, panel, end - panel,
                                     own + share.thread * PREFILL_OWN, tiles);
            });
        });
    }
    return Status::OK;
}

}  // namespace
}  // namespace qllm
