// y = x W^T + b in bfloat16 for a few rows, on AMX: a step of decode, or the logits of a prompt.
//
// What counts there is how fast the weight comes from memory. As the second operand of a product of
// tiles it would have to be turned first, which takes longer than to read it; and of the first, a
// few rows of activations, most of a tile would be empty. So operands change places: the weight is
// the first, 16 channels of 32 inputs as they lie in memory, and activations are the second, pairs
// of inputs of as many columns as there are rows. Sums are of channels times rows.
//
// Products commute, and are added as in dense_tile_amx.h: 32 inputs after the other, even and odd
// ones apart. So results are those of dense.h to the bit, whatever number of rows takes which way.
#pragma once

#include "dense_steps.h"
#include "dense_tile_amx.h"
#include "prefetch.h"
#include "threads.h"

namespace qllm {
namespace {

// So many rows at most. Weights of more are used so often that to turn them, once for all rows, is
// the smaller part: their tiles come from the first cache then, and not from memory again.
constexpr int64_t FEW_ROWS = 2 * ROWS;
constexpr int64_t FEW_PANELS = 4;  // at once: a product has to wait for the one before of its sums
constexpr int64_t TILE_INPUTS = 2 * TILE_STEPS;

// How weights are asked for: bytes ahead in every channel, and how many of one before those of the
// next, as FOR_FEW in dense.h. The machine does not follow so many channels by itself. They come to
// the second cache: in the first, those a multiple of 4096 bytes apart share a few places.
constexpr int64_t FEW_AHEAD = 1024, FEW_STRETCH = 512;

// Activations, as pairs of inputs: of up to 16 rows (steps, rows), and then of the others.
struct FewRows {
    int64_t rows, steps;  // whole tiles of steps, with zeros for what is not there
    float *x;

    int64_t columns(int64_t tile) const { return smaller(rows - tile * ROWS, ROWS); }
    float *at(int64_t tile, int64_t step) const {
        return x + tile * ROWS * steps + step * columns(tile);
    }
};

// The thread's tiles have these shapes as long as this lives.
class FewTiles {
  public:
    explicit FewTiles(const FewRows &x) {
        TileShapes shapes = {};
        shapes.palette = 1;
        for (int t = 0; t < 8; t++) {
            shapes.rows[t] = ROWS;
            shapes.bytes[t] = ROW_BYTES;
        }
        const bool two = x.rows > ROWS;
        const uint16_t bytes = uint16_t(x.columns(two) * STEP);
        for (int sums = two ? 2 : 0; sums < 4; sums++) shapes.bytes[sums] = bytes;
        shapes.bytes[X_TILE + two] = bytes;
        load_shapes(shapes);
    }
    ~FewTiles() { release_tiles(); }
    FewTiles(const FewTiles &) = delete;
    FewTiles &operator=(const FewTiles &) = delete;
};

// Which tile has sums I of (X, W), tiles of rows times panels.
template <int X, int W, int I> constexpr int FEW_SUMS = X == 1 ? I : I / W * 2 + I % W;

template <int X, int W, int I = 0> INLINE inline void clear_few() {
    zero_tile<FEW_SUMS<X, W, I>>();
    if constexpr (I + 1 < X * W) clear_few<X, W, I + 1>();
}

// To (X, W, LANES, ROWS).
template <int X, int W, int I = 0> INLINE inline void store_few(float *to) {
    store_tile<FEW_SUMS<X, W, I>>(to + I * SUMS, ROWS * STEP);
    if constexpr (I + 1 < X * W) store_few<X, W, I + 1>(to);
}

// Adds the products of 32 inputs: W panels, whose channels lie `apart` bytes apart, times X tiles
// of rows.
template <int X, int W, int P = 0> INLINE inline void add_panels(const char *w, int64_t apart) {
    constexpr int TILE = X == 1 ? X_TILE + 1 + P % 3 : W_TILE + P;  // one that is not in use yet
    load_tile<TILE>(w, apart);
    add_pairs<FEW_SUMS<X, W, P>, TILE, X_TILE>();
    if constexpr (X == 2) add_pairs<FEW_SUMS<X, W, W + P>, TILE, X_TILE + 1>();
    if constexpr (P + 1 < W) add_panels<X, W, P + 1>(w + LANES * apart, apart);
}

// W panels times all rows: to (X, W, LANES, ROWS). Where one has fewer channels than LANES, zeros
// take the place of the others, as they do behind the last input: what lies there in memory may be
// no number, or may not be read at all.
template <int X, int W>
__attribute__((noinline)) void multiply_few(const Dense &a, const FewRows &x, int64_t panel,
                                            float *sums) {
    constexpr int64_t MOST = W * LANES, PART = FEW_STRETCH / ROW_BYTES;
    static_assert(X * W <= 4 && MOST % PART == 0);
    const int64_t stride = a.in * SIZE<BFLOAT16>, channel = panel * LANES;
    const int64_t channels = smaller(MOST, a.out - channel);
    const int64_t whole = channels < MOST ? 0 : a.in / TILE_INPUTS * TILE_STEPS;
    const char *w = static_cast<const char *>(a.w) + channel * stride;
    clear_few<X, W>();
    for (int64_t step = 0; step < x.steps; step += TILE_STEPS) {
        const int64_t at = step * STEP, bytes = smaller(ROW_BYTES, stride - at);
        load_tile<X_TILE>(x.at(0, step), x.columns(0) * STEP);
        if constexpr (X == 2) load_tile<X_TILE + 1>(x.at(1, step), x.columns(1) * STEP);
        if (step < whole) {
            // The steps of a stretch share its channels. Behind their end come the next ones.
            const int64_t in_stretch = at % FEW_STRETCH, to = at - in_stretch + FEW_AHEAD;
            const char *ahead = w + to + (to < stride ? 0 : (MOST - 1) * stride) +
                                in_stretch / ROW_BYTES * (MOST / PART) * stride;
            for (int64_t c = 0; c < MOST / PART; c++)
                for (int64_t b = 0; b < FEW_STRETCH; b += 64)
                    prefetch_into<2>(ahead + c * stride + b);
            add_panels<X, W>(w + at, stride);
        } else {
            alignas(64) char some[MOST * ROW_BYTES] = {};
            for (int64_t c = 0; c < channels; c++)
                __builtin_memcpy(some + c * ROW_BYTES, w + c * stride + at, size_t(bytes));
            add_panels<X, W>(some, ROW_BYTES);
        }
    }
    store_few<X, W>(sums);
}

// As many panels as go together, of those up to `end`; returns how many.
template <int X>
int64_t multiply_few_panels(const Dense &a, const FewRows &x, int64_t panel, int64_t end) {
    constexpr int W = int(FEW_PANELS) / X;
    alignas(64) float sums[X * W * SUMS];
    const bool all = panel + W <= end && (panel + W) * LANES <= a.out;
    const int64_t panels = all ? W : 1;
    if (all) {
        multiply_few<X, W>(a, x, panel, sums);
    } else {
        multiply_few<X, 1>(a, x, panel, sums);
    }
    for (int64_t t = 0; t < X; t++)
        for (int64_t p = 0; p < panels; p++) {
            VF square[LANES];
            for (int64_t c = 0; c < LANES; c++)
                square[c] = load_f(sums + (t * panels + p) * SUMS + c * ROWS);
            transpose(square);
            for (int64_t r = 0; r < x.columns(t); r++) {
                alignas(64) float of_row[LANES];
                store_f(of_row, square[r]);
                store_sums<BFLOAT16>(a, t * ROWS + r, (panel + p) * LANES, LANES, of_row);
            }
        }
    return panels;
}

// TILE_STEPS of all rows to where `FewRows` has them.
static void lay_out_few(const Dense &a, const FewRows &x, int64_t step) {
    for (int64_t tile = 0; tile * ROWS < x.rows; tile++) {
        const int64_t columns = x.columns(tile);
        VF square[TILE_STEPS];
        for (int64_t r = 0; r < ROWS; r++)
            square[r] = load_steps<BFLOAT16, true>(a, r < columns ? tile * ROWS + r : a.rows, step);
        if (columns == 1) {
            store_f(x.at(tile, step), square[0]);
            continue;
        }
        transpose(square);
        for (int64_t s = 0; s < TILE_STEPS; s++)
            store_as(x.at(tile, step + s), 0, FLOAT32, columns, square[s]);
    }
}

// For up to FEW_ROWS rows.
static Status dense_few(const Dense &a) {
    if (!a.rows) return Status::OK;  // tiles have columns
    FewRows x = {a.rows, (a.in + TILE_INPUTS - 1) / TILE_INPUTS * TILE_STEPS, nullptr};
    x.x = static_cast<float *>(scratch(size_t((x.rows * x.steps + LANES) * 4)));
    if (!x.x) return Status::NO_MEMORY;
    for_each(x.steps / TILE_STEPS, x.rows * x.steps > WORTH_THREADS,
             [&](int64_t tile, int64_t) { lay_out_few(a, x, tile * TILE_STEPS); });
    // So few panels at once that all threads have some.
    const int64_t panels = (a.out + LANES - 1) / LANES, fair = panels / max_threads();
    const int64_t most = fair / RUN_PARTS / FEW_PANELS * FEW_PANELS;
    const int64_t part = most ? most : fair ? smaller(fair, FEW_PANELS) : 1;
    in_threads(panels, part, [&](const Share &share) {
        FewTiles tiles(x);
        take_parts(share, [&](int64_t panel, int64_t end) {
            while (panel < end)
                panel += x.rows > ROWS ? multiply_few_panels<2>(a, x, panel, end)
                                       : multiply_few_panels<1>(a, x, panel, end);
        });
    });
    return Status::OK;
}

}  // namespace
}  // namespace qllm
