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

// Of a panel: 256 inputs. Two panels of them stay in the first cache while all rows meet them: with
// a tile's activations and sums they are 36 KiB, of 48; of 512 inputs that would be 68.
constexpr int64_t PREFILL_STEPS = DENSE_STEPS;
constexpr int64_t PREFILL_PANELS = DENSE_PANELS;  // that are dequantized at once
constexpr int64_t K_BLOCK_STEPS = K_BLOCK / 2;

// Floats of a thread's own: its sums, and what is dequantized.
constexpr int64_t PREFILL_OWN = DENSE_SUMS + PREFILL_PANELS * PREFILL_STEPS * LANES;

// Whether a layer's prefill runs so. This is the one place where that is decided: it has not been
// measured on AMX yet. Groups have no gaps between them, and weights are in the range of bfloat16;
// those with offsets (of GGUF files) stay integers.
static inline bool is_bf16_prefill(const Linear &a) {
    const bool gaps = a.group % K_BLOCK && a.group < a.in;
    const bool half_scales = a.scale_type == FLOAT16 || a.scale_type == BFLOAT16;
    return a.prefill && a.mode == WEIGHT_ONLY && a.x_type != FLOAT32 && half_scales && !gaps &&
           !a.offsets;
}

// Steps of a panel, from a whole K block on, to pairs of bfloat16: (q - zero) scale, rounded once.
static void dequantize(const Linear &a, int64_t panel, int64_t step, int64_t steps, float *to) {
    const int64_t k_blocks = row_k_blocks(a.in, a.group), groups = (a.in + a.group - 1) / a.group;
    alignas(64) uint8_t bytes[K_BLOCK * LANES];
    const int64_t end = (step + steps) / K_BLOCK_STEPS;
    for (int64_t k_block = step / K_BLOCK_STEPS; k_block < end; k_block++) {
        unpack_integers(a, a.q + (panel * k_blocks + k_block) * 64 * a.held_bits(), bytes);
        const int64_t at = (panel * groups + k_block * K_BLOCK / a.group) * LANES;
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

// Up to PASS_PANELS panels times all rows, which are read once for all of them.
template <int64_t TYPE>
void prefill_panels(const Linear &a, const Dense &dense, const DenseInput &x, int64_t first,
                    const uint8_t *fallback, int64_t panel, int64_t panels, float *own,
                    DenseTiles &tiles) {
    float *weight = own + DENSE_SUMS;
    for (int64_t p = 0; p < panels; p += GROUP_PANELS)
        for (int64_t i = 0; i < x.rows * GROUP_LANES; i += WIDTH)
            store_f(dense_sums(own, 0, p) + i, set_f(0));
    for (int64_t step = 0; step < x.steps; step += x.block) {
        const int64_t steps = smaller(x.block, x.steps - step);
        for (int64_t p = 0; p < panels; p += PREFILL_PANELS) {
            const int64_t some = smaller(PREFILL_PANELS, panels - p);
            for (int64_t n = 0; n < some; n++)
                dequantize(a, panel + p + n, step, steps, weight + n * steps * LANES);
            for (int64_t row = 0, rows; row < x.rows; row += rows) {
                rows = dense_tile_rows(x.rows - row);
                float *out = dense_sums(own, row, p);
                prefetch_rows<true>(out, GROUP_LANES * 4, some * LANES * 4, rows);
                tiles.multiply<true>({weight, x.tile(row, step, steps), steps, steps, out}, rows,
                                     some);
            }
        }
    }
    for (int64_t row = 0; row < x.rows && first + row < a.rows; row++) {
        for (int64_t p = 0; p < panels; p += GROUP_PANELS)
            store_sums<TYPE>(dense, first + row, (panel + p) * LANES,
                             smaller(GROUP_PANELS, panels - p) * LANES, dense_sums(own, row, p));
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
        in_threads(panels, fair_panels(panels), [&](const Share &share) {
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
