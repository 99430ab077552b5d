// A tile of a dense product: some rows of activations times a block of panels, on vector units.
#pragma once

#include "isa.h"
#include "operands.h"

// Rows whose sums stay in registers.
#define DENSE_GEMV_ROWS (WIDTH == 16 ? 8 : WIDTH == 8 ? 4 : 1)

namespace qllm {
namespace {

constexpr int64_t DENSE_TILE_ROWS = FLOAT_ROWS;

// Rows of the tile that takes the first of those that are left; those that are not there are
// multiplied too, to no effect: a function for every number would take long to compile.
inline int64_t dense_tile_rows(int64_t left) {
    for (int64_t rows = 1; rows < DENSE_TILE_ROWS; rows *= 2)
        if (left <= rows) return rows;
    return DENSE_TILE_ROWS;
}

// Where a step of a row lies among the activations of a tile.
inline int64_t dense_offset(int64_t rows, int64_t row, int64_t step) { return step * rows + row; }

struct DenseOperands {
    const float *w;  // panels of (steps, LANES)
    const float *x;  // the tile's, as `dense_offset` says
    int64_t steps, run;  // steps whose products are added up before they join others
    float *out;      // (rows, GROUP_LANES), added to
};

// The sums of R rows times V vectors of channels, in registers as those of `Sums` in tile.h.
template <bool PAIR, int R, int V> struct DenseSums {
    VF of[R * V];

    template <int I = 0> INLINE void clear() {
        of[I] = set_f(0);
        if constexpr (I + 1 < R * V) clear<I + 1>();
    }

    // Adds a step: its weights times the activations of every row.
    template <int ROW = 0> INLINE void add(const VF (&w)[V], const float *x) {
        add_row<ROW>(w, set_f(x[ROW]));
        if constexpr (ROW + 1 < R) add<ROW + 1>(w, x);
    }

    template <int ROW, int I = 0> INLINE void add_row(const VF (&w)[V], VF x) {
        VF &sum = of[ROW * V + I];
        sum = add_slots<PAIR>(sum, w[I], x);
        if constexpr (I + 1 < V) add_row<ROW, I + 1>(w, x);
    }

    // Adds the run's results to those of the runs before it.
    template <int I = 0> INLINE void finish(float *out) {
        float *to = out + I / V * GROUP_LANES + I % V * WIDTH;
        store_f(to, add_f(load_f(to), of[I]));
        if constexpr (I + 1 < R * V) finish<I + 1>(out);
    }
};

template <int V, int I = 0>
INLINE inline void load_dense_step(VF (&w)[V], const float *from, int64_t stride) {
    w[I] = load_f(from + I / VECTORS * stride + I % VECTORS * WIDTH);
    if constexpr (I + 1 < V) load_dense_step<V, I + 1>(w, from, stride);
}

// R rows, N panels from panel `from` on.
template <bool PAIR, int R, int N>
__attribute__((noinline)) void multiply_dense(const DenseOperands &o, int64_t from) {
    const int64_t stride = o.steps * LANES;
    const float *w = o.w + from * stride, *x = o.x;
    for (int64_t first = 0; first < o.steps; first += o.run) {
        DenseSums<PAIR, R, N * VECTORS> sums;
        sums.clear();
        const int64_t end = smaller(first + o.run, o.steps);
        for (int64_t step = first; step < end; step++, x += R, w += LANES) {
            VF step_weights[N * VECTORS];
            load_dense_step(step_weights, w, stride);
            sums.add(step_weights, x);
        }
        sums.finish(o.out + from * LANES);
    }
}

template <bool PAIR, int R> void multiply_dense_panels(const DenseOperands &o, int64_t panels) {
    constexpr int MAX_PANELS = ACCUMULATORS / (R * VECTORS);
    int64_t n = 0;
    if constexpr (MAX_PANELS >= 4)
        for (; n + 4 <= panels; n += 4) multiply_dense<PAIR, R, 4>(o, n);
    if constexpr (MAX_PANELS >= 2)
        for (; n + 2 <= panels; n += 2) multiply_dense<PAIR, R, 2>(o, n);
    for (; n < panels; n++) multiply_dense<PAIR, R, 1>(o, n);
}

// What a thread keeps for its tiles: nothing.
struct DenseTiles {
    template <bool PAIR, int R = 1>
    void multiply(const DenseOperands &o, int64_t rows, int64_t panels) {
        if (rows == R) return multiply_dense_panels<PAIR, R>(o, panels);
        if constexpr (R < DENSE_TILE_ROWS)
            multiply<PAIR, smaller(2 * R, DENSE_TILE_ROWS)>(o, rows, panels);
    }
};

}  // namespace
}  // namespace qllm
