// A tile of a dense product of bfloat16 on AMX: 16 rows of 32 inputs times 16 channels are one
// instruction, and sums are tiles again in the next block. In place of dense_tile.h.
#pragma once

#include "isa.h"
#include "operands.h"
#include "tile_amx.h"

namespace qllm {
namespace {

constexpr int64_t DENSE_TILE_ROWS = 2 * ROWS;
constexpr int64_t TILE_STEPS = ROW_BYTES / STEP;

// Rows of the tiles that take the first of those that are left.
inline int64_t dense_tile_rows(int64_t left) { return left > ROWS ? 2 * ROWS : ROWS; }

// Where a step of a row lies among the activations of a tile: 16 steps of each row, row by row.
inline int64_t dense_offset(int64_t rows, int64_t row, int64_t step) {
    return step / TILE_STEPS * TILE_STEPS * rows + row * TILE_STEPS + step % TILE_STEPS;
}

struct DenseOperands {
    const float *w;  // panels of (steps, LANES)
    const float *x;  // the tile's, as `dense_offset` says
    int64_t steps, run;  // steps whose products are added up before they join others
    float *out;      // (rows, GROUP_LANES), added to
};

// What a thread keeps for its tiles.
class DenseTiles {
  public:
    DenseTiles() { tiles_.take_shapes(ROW_BYTES); }

    template <bool PAIR> void multiply(const DenseOperands &o, int64_t rows, int64_t panels) {
        int64_t panel = 0;
        for (; panel + 2 <= panels; panel += 2) multiply_panels<2>(o, rows, panel);
        if (panel < panels) multiply_panels<1>(o, rows, panel);
    }

  private:
    Tiles tiles_{nullptr};

    template <int W> void multiply_panels(const DenseOperands &o, int64_t rows, int64_t panel) {
        if (rows > ROWS) {
            multiply<2, W>(o, rows, panel);
        } else {
            multiply<1, W>(o, rows, panel);
        }
    }

    template <int X, int W>
    __attribute__((noinline)) void multiply(const DenseOperands &o, int64_t rows, int64_t panel) {
        constexpr int64_t NEXT = ROWS * GROUP_LANES, STRIDE = GROUP_LANES * 4;
        float *out = o.out + panel * LANES;
        const float *x = o.x, *w = o.w + panel * o.steps * LANES, *next_w = w + o.steps * LANES;
        load_sums<X, W>(out, NEXT, LANES, STRIDE);
        for (int64_t step = 0; step < o.steps; step += TILE_STEPS) {
            load_tile<X_TILE>(x, ROW_BYTES);
            load_tile<W_TILE>(w, ROW_BYTES);
            add_pairs<0, X_TILE, W_TILE>();
            if constexpr (X == 2) {
                load_tile<X_TILE + 1>(x + ROWS * TILE_STEPS, ROW_BYTES);
                add_pairs<2, X_TILE + 1, W_TILE>();
            }
            if constexpr (W == 2) {
                load_tile<W_TILE + 1>(next_w, ROW_BYTES);
                add_pairs<1, X_TILE, W_TILE + 1>();
            }
            if constexpr (X == 2 && W == 2) add_pairs<3, X_TILE + 1, W_TILE + 1>();
            x += rows * TILE_STEPS;
            w += TILE_STEPS * LANES;
            next_w += TILE_STEPS * LANES;
        }
        store_sums<X, W>(out, NEXT, LANES, STRIDE);
    }
};

}  // namespace
}  // namespace qllm
