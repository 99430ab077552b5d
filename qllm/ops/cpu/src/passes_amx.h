// Products of many rows on AMX: how weights and activations of any kind meet in tiles.
//
// A product of two by two tiles takes 64 cycles, and its operands are 4 KiB: more than the second
// cache gives meanwhile. Sums that leave the tiles for it and come back cost as much as four such
// products. So a block of two panels of weights, 32 KiB, is made in the first cache, or comes there
// where weights lie as tiles take them, and all rows pass it by: their tiles come from the second
// cache, by loads that do not put them into the first one, in the place of weights. Sums stay in
// tiles for the whole block, and are asked for before their turn. Those of the last block become
// results between its products: their lines, each of a row of its own, are asked for as well, and
// nothing waits for them. A block ahead, weights are asked for that are many bytes, and activations
// that are more than the second cache holds; each block of those meets many panels before it goes.
//
// A row is a sum over all inputs in their order, in tiles and in memory, whatever else is computed.
#pragma once

#include "dense_tile_amx.h"
#include "elements.h"
#include "isa.h"
#include "operands.h"
#include "prefetch.h"
#include "threads.h"
#include "tile_amx.h"

namespace qllm {
namespace {

constexpr int64_t PAIR = 2;           // panels of a block
constexpr int64_t PASS_STEPS = 256;   // of a block at most: a step has 4 bytes of a row or channel
constexpr int64_t PASS_ROWS = 512;    // with PASS_PANELS, 1 MiB of sums
constexpr int64_t PASS_PANELS = 32;   // in all that meet a block of activations
constexpr int64_t PASS_BLOCK = PAIR * PASS_STEPS * LANES;  // floats
constexpr int64_t PASS_PARTS = 4;     // of a thread's panels, for others to take
constexpr int64_t NEAR_BYTES = 1 << 20;  // of activations that stay in the second cache

// Where the results of a product go, and what is added to them.
struct Results {
    void *y;
    const void *bias;  // or null
    int64_t out, first;  // channels, and the row that others are counted from

    template <int64_t TYPE> char *place(int64_t row, int64_t panel) const {
        return static_cast<char *>(y) + ((first + row) * out + panel * LANES) * SIZE<TYPE>;
    }

    // Those of some rows and up to PAIR panels, which are `value(row, panel)` of them.
    template <int64_t TYPE, typename Value>
    INLINE void store(int64_t row, int64_t rows, int64_t panel, int64_t panels,
                      const Value &value) const {
        const int64_t left = out - panel * LANES;
        VF add[PAIR] = {set_f(0), set_f(0)};
        for (int64_t p = 0; bias && p < panels; p++)
            add[p] = load<TYPE>(bias, (panel + p) * LANES, left - p * LANES);
        char *to = place<TYPE>(row, panel);
        const bool whole = panels == PAIR && left >= PAIR * LANES;
        for (int64_t r = 0; r < rows; r++, to += out * SIZE<TYPE>) {
            if (whole) {
                const VF a = value(r, 0), b = value(r, 1);
                qllm::store<TYPE>(to, 0, WIDTH, bias ? add_f(a, add[0]) : a);
                qllm::store<TYPE>(to, LANES, WIDTH, bias ? add_f(b, add[1]) : b);
            } else {
                for (int64_t p = 0; p < panels; p++) {
                    const VF a = value(r, p);
                    qllm::store<TYPE>(to, p * LANES, left - p * LANES,
                                      bias ? add_f(a, add[p]) : a);
                }
            }
        }
    }
};

// A block's weights.
struct Panels {
    const float *first;  // (steps, LANES)
    int64_t apart;       // floats from one to the next
};

// What a pair of panels times up to two tiles of rows is made of.
struct Pass {
    const float *x;  // tiles as `dense_offset` says
    Panels w;
    int64_t steps, together;   // `together` of them to a tile
    bool first;                // there are no sums yet
    float *sums;               // (row tiles, PAIR, ROWS, LANES), added to
    const char *results = nullptr;  // where they go behind this, if they do: the first row's line,
    int64_t result_rows = 0, result_stride = 0;  // how many, and bytes from one to the next
};

// Where the sums of a row and a panel of a pass begin.
INLINE inline int64_t sum_place(int64_t row, int64_t panel) {
    return ((row / ROWS * PAIR + panel) * ROWS + row % ROWS) * LANES;
}

// Adds products of bytes, the weights' without sign, or of pairs of bfloat16.
template <bool BYTES, int SUM, int X, int W> INLINE inline void add_tiles() {
    if constexpr (BYTES) {
        add_unsigned_product<SUM, X, W>();
    } else {
        add_pairs<SUM, X, W>();
    }
}

// What is behind a pass.
struct ComingOperands {
    ComingInto<2> x;
    ComingRows w;
};

// The sums behind these are asked for meanwhile, and so are lines of results and what is `coming`.
template <bool BYTES, int X, int W>
__attribute__((noinline)) void multiply_pass(const Pass &t, ComingOperands &coming) {
    constexpr int64_t LINES = X * PAIR * SUMS * 4 / 64;
    const int64_t bytes = t.together * STEP, tiles = t.steps / t.together;
    const int64_t lines = (LINES + tiles - 1) / tiles;
    const float *x = t.x, *w = t.w.first, *next_w = w + t.w.apart;
    char *ahead = reinterpret_cast<char *>(t.sums + X * PAIR * SUMS);
    const char *result = t.results;
    const int64_t results = (t.result_rows + tiles - 1) / tiles;
    if (t.first) {
        clear_sums<X, W>();
    } else {
        load_sums<X, W>(t.sums, PAIR * SUMS, SUMS, ROW_BYTES);
    }
    for (int64_t left = tiles; left > 0; left--) {
        load_tile_once<X_TILE>(x, bytes);
        load_tile<W_TILE>(w, ROW_BYTES);
        add_tiles<BYTES, 0, X_TILE, W_TILE>();
        if constexpr (X == 2) {
            load_tile_once<X_TILE + 1>(x + ROWS * t.together, bytes);
            add_tiles<BYTES, 2, X_TILE + 1, W_TILE>();
        }
        if constexpr (W == 2) {
            load_tile<W_TILE + 1>(next_w, ROW_BYTES);
            add_tiles<BYTES, 1, X_TILE, W_TILE + 1>();
        }
        if constexpr (X == 2 && W == 2) add_tiles<BYTES, 3, X_TILE + 1, W_TILE + 1>();
        for (int64_t line = 0; line < lines; line++, ahead += 64) __builtin_prefetch(ahead, 1);
        for (int64_t r = 0; r < results; r++, result += t.result_stride)
            __builtin_prefetch(result, 1);
        coming.x.ask(1);
        coming.w.ask();
        x += X * ROWS * t.together;
        w += LANES * t.together;
        next_w += LANES * t.together;
    }
    store_sums<X, W>(t.sums, PAIR * SUMS, SUMS, ROW_BYTES);
}

template <bool BYTES>
void multiply_pass(const Pass &t, int64_t rows, int64_t panels, ComingOperands &coming) {
    if (panels < PAIR)
        return rows > ROWS ? multiply_pass<BYTES, 2, 1>(t, coming)
                           : multiply_pass<BYTES, 1, 1>(t, coming);
    return rows > ROWS ? multiply_pass<BYTES, 2, 2>(t, coming)
                       : multiply_pass<BYTES, 1, 2>(t, coming);
}

// Some panels times all rows of a product, which has
//
//   BYTES                       whether its operands are bytes
//   rows, held_rows             its rows, and those that fill whole tiles
//   blocks, steps(block)        of its inputs; steps are a multiple of `together(block)`
//   tile(block, row)            activations of a tile that begins with a row
//   weights(panel, panels, block, own)  a block's, which may be made in PASS_BLOCK floats
//   coming(panel, panels, block)  what those are read from, if it is worth asking for
//   TYPE, results()             of its results, and where they go
//   store(row, rows, panel, panels, sums)  sums of up to two row tiles and PAIR panels as results
template <typename Product>
void pass_panels(const Product &product, int64_t panel, int64_t panels, bool near, float *own,
                 Tiles &tiles) {
    const int64_t rows = product.held_rows, row_tiles = (rows + 2 * ROWS - 1) / (2 * ROWS);
    const int64_t all_panels = (product.results().out + LANES - 1) / LANES;
    float *all_sums = own + PASS_BLOCK;
    for (int64_t b = 0; b < product.blocks; b++) {
        const int64_t steps = product.steps(b), together = product.together(b);
        const int64_t turns = row_tiles * (steps / together);  // of a pair of panels
        const bool last = b + 1 == product.blocks;
        tiles.take_shapes(together * STEP);
        ComingOperands coming;
        if (!near && !last)
            coming.x = ComingInto<2>(product.tile(b + 1, 0), product.steps(b + 1) * rows * STEP,
                                     (panels + 1) / PAIR * turns);
        for (int64_t p = 0; p < panels; p += PAIR) {
            const int64_t some = smaller(PAIR, panels - p);
            const Panels w = product.weights(panel + p, some, b, own);
            // Then come the next panels, and behind these the next block or those of the next part.
            const bool ends = p + PAIR >= panels;
            const int64_t next = !ends ? panel + p + PAIR : last ? panel + panels : panel;
            const int64_t next_block = !ends ? b : last ? 0 : b + 1;
            const int64_t next_panels = smaller(PAIR, all_panels - next);
            coming.w = ComingRows();
            if (next_panels > 0)
                coming.w = product.coming(next, next_panels, next_block).in(turns);
            float *sums = all_sums + p * rows * LANES;
            for (int64_t row = 0, count; row < rows; row += count, sums += count * PAIR * LANES) {
                count = dense_tile_rows(rows - row);
                Pass pass = {product.tile(b, row), w, steps, together, !b, sums};
                const int64_t results = smaller(count, product.rows - row);
                if (last) {
                    pass.results = product.results().template place<Product::TYPE>(row, panel + p);
                    pass.result_rows = results;
                    pass.result_stride = product.results().out * SIZE<Product::TYPE>;
                }
                multiply_pass<Product::BYTES>(pass, count, some, coming);
                if (last) product.store(row, results, panel + p, some, sums);
            }
        }
    }
}

// How many panels are taken at once, of all there are.
static int64_t pass_part(int64_t panels) {
    const int64_t fair = panels / max_threads() / PASS_PARTS / PAIR * PAIR;
    return fair < PAIR ? PAIR : smaller(fair, PASS_PANELS);
}

// Floats that a thread has of its own for that: a block, and sums.
static int64_t pass_own(int64_t panels, int64_t held_rows) {
    return PASS_BLOCK + (pass_part(panels) * held_rows + 2 * PAIR * ROWS) * LANES;
}

// All panels; `behind(panel, panels)` is called when those are done. `own`: of all threads.
template <typename Product, typename Behind>
void multiply_passes(const Product &product, int64_t panels, int64_t x_bytes, float *own,
                     const Behind &behind) {
    const bool near = x_bytes <= NEAR_BYTES;
    in_threads(panels, pass_part(panels), [&](const Share &share) {
        Tiles tiles(nullptr);
        float *memory = own + share.thread * pass_own(panels, product.held_rows);
        take_parts(share, [&](int64_t panel, int64_t end) {
            // Activations that are near need not be used up: weights are read without a pause.
            const int64_t most = near ? PAIR : end - panel;
            for (int64_t some; panel < end; panel += some) {
                some = smaller(most, end - panel);
                pass_panels(product, panel, some, near, memory, tiles);
                behind(panel, some);
            }
        });
    });
}

}  // namespace
}  // namespace qllm
