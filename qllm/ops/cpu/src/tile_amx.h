// A tile on AMX: 16 rows of 64 inputs times 16 channels are one instruction. In place of tile.h.
//
// Sums are of signed bytes: weights lose their zeros in cache, once for all rows, so that what
// remains to be done for each result is its scale. That is vector work, as long as the products
// of a small block, and is done for one set of sums while the tiles make the next: it comes after
// their products, so that it does not wait in front of them for sums that are not there yet.
#pragma once

#include "isa.h"
#include "operands.h"

#include "amx_instructions.h"

namespace qllm {
namespace {

constexpr int64_t ROWS = 16;         // of a tile
constexpr int64_t ROW_BYTES = 64;
constexpr int64_t SUMS = ROWS * LANES;
constexpr int64_t TILE_SUMS = 8 * SUMS;  // that a thread keeps in memory
// Of a block that has no scale of its own: its sums leave the tiles once in 1024 inputs.
constexpr int64_t UNSCALED_K_BLOCKS = 32;

// One plane has two tiles of rows side by side, as others have two planes.
template <int P> constexpr int64_t TILE_ROWS = P == 1 ? 2 * ROWS : ROWS;

// How many inputs a tile of activations has. Blocks of an odd number of K blocks take half tiles,
// and those of half a one quarters: shapes cannot change while sums are in tiles, and there are no
// tiles left for a second shape.
inline int64_t tile_inputs(int64_t steps) {
    return steps % STEPS ? HALF_K_BLOCK : steps % (2 * STEPS) ? K_BLOCK : 2 * K_BLOCK;
}

// Where the 4 inputs of a step of an operand lie among the activations of a tile: the rows of a
// tile one after the other, with those of other planes in between.
inline int64_t tile_offset(int64_t operands, int64_t operand, int64_t step, int64_t steps) {
    int64_t inputs = tile_inputs(steps), input = step * STEP;
    return (input & -inputs) * operands + operand * inputs + (input & (inputs - 1));
}

template <int P> constexpr int64_t INPUT_BYTES = P;  // that an input of a row takes

// LANES inputs of a row, from a step on, to the activations of a tile.
template <int P>
INLINE inline void put(int8_t *tile, int64_t rows, int64_t row, int64_t step, int64_t steps,
                       const int8_t (&planes)[P][LANES]) {
    for (int64_t p = 0; p < P; p++)
        __builtin_memcpy(tile + tile_offset(rows * P, row * P + p, step, steps), planes[p],
                         LANES);
}

// Tile registers: sums of X (one or two) tiles of activations times W of weights are 2 x + w.
constexpr int X_TILE = 4, W_TILE = 6;

template <int X, int W> INLINE inline void clear_sums() {
    zero_tile<0>();
    if constexpr (W == 2) zero_tile<1>();
    if constexpr (X == 2) zero_tile<2>();
    if constexpr (X == 2 && W == 2) zero_tile<3>();
}

// Their memory: `next_x` and `next_w` elements from one to the next, rows `stride` bytes apart.
template <int X, int W, typename T>
INLINE inline void load_sums(const T *from, int64_t next_x, int64_t next_w, int64_t stride) {
    load_tile<0>(from, stride);
    if constexpr (W == 2) load_tile<1>(from + next_w, stride);
    if constexpr (X == 2) load_tile<2>(from + next_x, stride);
    if constexpr (X == 2 && W == 2) load_tile<3>(from + next_x + next_w, stride);
}

template <int X, int W, typename T>
INLINE inline void store_sums(T *to, int64_t next_x, int64_t next_w, int64_t stride) {
    store_tile<0>(to, stride);
    if constexpr (W == 2) store_tile<1>(to + next_w, stride);
    if constexpr (X == 2) store_tile<2>(to + next_x, stride);
    if constexpr (X == 2 && W == 2) store_tile<3>(to + next_x + next_w, stride);
}

// Adds a block's products; activations `next_x` bytes from one tile to the next, in `operands`.
template <int X, int W>
INLINE inline void add_products(const Operands &o, const int8_t *x, int64_t next_x, int64_t stride,
                                int64_t operands, const uint8_t *w) {
    const int64_t inputs = tile_inputs(o.steps), next_w = o.w_stride;
    for (int64_t left = o.steps * STEP; left > 0; left -= inputs) {
        load_tile<X_TILE>(x, stride);
        load_tile<W_TILE>(w, ROW_BYTES);
        add_product<0, X_TILE, W_TILE>();
        if constexpr (X == 2) {
            load_tile<X_TILE + 1>(x + next_x, stride);
            add_product<2, X_TILE + 1, W_TILE>();
        }
        if constexpr (W == 2) {
            load_tile<W_TILE + 1>(w + next_w, ROW_BYTES);
            add_product<1, X_TILE, W_TILE + 1>();
        }
        if constexpr (X == 2 && W == 2) add_product<3, X_TILE + 1, W_TILE + 1>();
        x += operands * inputs;
        w += LANES * inputs;
    }
}

// What a thread keeps for its tiles.
class Tiles {
  public:
    // `sums`: (TILE_SUMS,), for `begin` to `end`.
    explicit Tiles(int32_t *sums) : sums_(sums) {}
    ~Tiles() {
        if (inputs_) release_tiles();
    }

    // Shapes of tiles for so many inputs at once. Changing them costs about what a tile does.
    void take_shapes(int64_t inputs) {
        if (inputs == inputs_) return;
        TileShapes shapes = {};
        shapes.palette = 1;
        for (int t = 0; t < 8; t++) {
            shapes.rows[t] = uint8_t(t < W_TILE ? ROWS : inputs / STEP);
            shapes.bytes[t] = uint16_t(t >= X_TILE && t < W_TILE ? inputs : ROW_BYTES);
        }
        load_shapes(shapes);
        inputs_ = inputs;
    }

    // Takes a block of unpacked weights: what a signed byte can hold of their zeros is subtracted.
    void begin(const Operands &o, const Linear &a, uint8_t *bytes, int64_t panels,
               int64_t steps) {
        take_shapes(tile_inputs(steps));
        const VI max_zero = set_i(128);
        zeros_left_ = false;
        for (int64_t p = 0; p < panels; p++) {
            VI zero = o.zeros ? load_i(o.zeros + p * LANES) : set_i(o.middle);
            VI part = a.bits == 8 ? max_zero : _mm512_min_epi32(zero, max_zero);
            VI left = sub_i(zero, part), in_bytes = mul_i(part, set_i(0x01010101));
            store_i(zero_left_ + p * LANES, left);
            zeros_left_ |= _mm512_test_epi32_mask(left, left) != 0;
            uint8_t *w = bytes + p * o.w_stride;
            for (int64_t i = 0; i < steps * STEP * LANES; i += ROW_BYTES)
                _mm512_store_si512(w + i, _mm512_sub_epi8(weights(w + i), in_bytes));
        }
    }

    // Up to TILE_ROWS<P> rows times panels. Tiles have all their rows: what lies behind the last
    // activations (the rest of what `prepare` in activations.h takes) is multiplied too,
    // to no effect.
    template <int P> void multiply(const Operands &o, int64_t rows, int64_t panels) {
        int64_t panel = 0;
        for (; panel + 2 <= panels; panel += 2) multiply_panels<P, 2>(o, rows, panel);
        if (panel < panels) multiply_panels<P, 1>(o, rows, panel);
    }

    // All results are in memory after this.
    template <int P> void end() {
        finish<P>();
    }

  private:
    // Of sums that were stored, and are yet to be scaled.
    struct Pending {
        int64_t rows = 0, panels;
        float *out;
        const float *x_scale, *scaled_sum;
        const int32_t *sum, *low_sum;
        bool zeros;
        alignas(64) float scales[2 * LANES];
        alignas(64) int32_t zero_left[2 * LANES];
        bool has_offsets;
        alignas(64) float offsets[2 * LANES];
    };

    int64_t inputs_ = 0;  // of the shapes in use
    bool zeros_left_;
    alignas(64) int32_t zero_left_[GROUP_LANES];
    int32_t *sums_;  // (planes or row tiles, 2 panels, ROWS, LANES)
    Pending pending_;

    template <int P, int W>
    __attribute__((noinline)) void multiply_panels(const Operands &o, int64_t rows, int64_t panel) {
        const uint8_t *w = o.w + panel * o.w_stride;
        const int64_t inputs = tile_inputs(o.steps);
        const int64_t stride = P * inputs, operands = P * rows;
        if (P > 1) {
            for (int plane = 0; plane < P; plane += 2) {
                clear_sums<2, W>();
                add_products<2, W>(o, o.x + plane * inputs, inputs, stride, operands, w);
                // While tiles multiply, and before their sums take the place of those.
                if (plane == 0) finish<P>();
                store_sums<2, W>(sums_ + plane * 2 * SUMS, 2 * SUMS, SUMS, LANES * 4);
            }
            postpone<W>(o, rows, panel);
        } else {
            if (rows > ROWS) {
                clear_sums<2, W>();
                add_products<2, W>(o, o.x, ROWS * stride, stride, operands, w);
                finish<P>();
                store_sums<2, W>(sums_, 2 * SUMS, SUMS, LANES * 4);
            } else {
                clear_sums<1, W>();
                add_products<1, W>(o, o.x, 0, stride, operands, w);
                finish<P>();
                store_sums<1, W>(sums_, 0, SUMS, LANES * 4);
            }
            postpone<W>(o, rows, panel);
        }
    }

    template <int W> void postpone(const Operands &o, int64_t rows, int64_t panel) {
        const int64_t lane = panel * LANES;
        pending_.rows = rows;
        pending_.panels = W;
        pending_.out = o.out + lane;
        pending_.x_scale = o.x_scale;
        pending_.sum = o.sum;
        pending_.low_sum = o.low_sum;
        pending_.scaled_sum = o.scaled_sum;
        pending_.zeros = zeros_left_;
        pending_.has_offsets = o.offsets != nullptr;
        for (int64_t i = 0; i < W * LANES; i += LANES) {
            store_f(pending_.scales + i, load_f(o.scales + lane + i));
            store_i(pending_.zero_left + i, load_i(zero_left_ + lane + i));
            if (o.offsets) store_f(pending_.offsets + i, load_f(o.offsets + lane + i));
        }
    }

    // Scales what is pending, if anything is, and adds it to the results.
    template <int P> void finish() {
        if (!pending_.rows) return;
        if (pending_.zeros) {
            finish<P, true>();
        } else {
            finish<P, false>();
        }
        pending_.rows = 0;
    }

    template <int P, bool ZEROS> __attribute__((noinline)) void finish() {
        const int64_t rows = pending_.rows;
        const float *x_scale = pending_.x_scale;
        const int32_t *sum = pending_.sum, *low_sum = pending_.low_sum;
        for (int64_t p = 0; p < pending_.panels; p++) {
            const int32_t *from = sums_ + p * SUMS;
            float *out = pending_.out + p * LANES;
            const VF scale = load_f(pending_.scales + p * LANES);
            const VI zero = load_i(pending_.zero_left + p * LANES);
            const bool has_offsets = pending_.has_offsets;
            const VF offset = has_offsets ? load_f(pending_.offsets + p * LANES) : set_f(0);
            for (int64_t r = 0; r < rows; r++, from += LANES, out += GROUP_LANES) {
                if (P == 1 && r == ROWS) from += SUMS;  // to the second tile: past the other panel
                VI high = load_i(from), low = zero_i();
                if constexpr (P > 1) high = pair(high, load_i(from + 2 * SUMS));
                if constexpr (P == 4) low = pair(load_i(from + 4 * SUMS), load_i(from + 6 * SUMS));
                if constexpr (ZEROS) {
                    high = sub_i(high, mul_i(zero, set_i(sum[r])));
                    if (P == 4) low = sub_i(low, mul_i(zero, set_i(low_sum[r])));
                }
                VF value = add_scaled<P>(load_f(out), high, low, x_scale[r], scale);
                if (has_offsets) value = fma_f(set_f(pending_.scaled_sum[r]), offset, value);
                store_f(out, value);
            }
        }
    }
};

}  // namespace
}  // namespace qllm
