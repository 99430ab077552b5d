// The products of a prompt on AMX: packed and dense weights times bfloat16, and weights of int8.
//
// Packed weights are dequantized to blocks in cache, and sums stay in tiles over many inputs,
// whatever the groups. A weight is rounded to bfloat16 once, as is an activation of float16;
// products and sums are those of dense layers in bfloat16. Rows that integers cannot stand for are
// left to float arithmetic here too: infinities and NaN are those of other paths.
//
// Of `8:tc-li` all is integers, and weights are read as they are stored.
#pragma once

#include "dense_input.h"
#include "isa.h"
#include "kernels.h"
#include "layout.h"
#include "operands.h"
#include "passes_amx.h"
#include "results.h"
#include "threads.h"
#include "tiles.h"

namespace qllm {
namespace {

constexpr int64_t K_BLOCK_STEPS = K_BLOCK / 2;  // of pairs

// Whether a layer's prefill runs so: the one place where that is decided. With activations as int8
// it is faster than products of those, too. Groups have no gaps between them.
static inline bool is_bf16_prefill(const Linear &a) {
    const bool gaps = filled_inputs(a.group) % K_BLOCK && a.group < a.in;
    return a.prefill && is_scaled(a) && a.x_type != FLOAT32 && !gaps;
}

// How weights become numbers. Scales of 16 bits times integers are exact in float32, others not;
// weights with offsets have those in place of zeros.
enum Scales { HALVES, FLOATS, OFFSETS };

// (256 + integer) becomes a number, of channels that have their scale in common.
template <Scales KIND> struct ToNumber {
    VF scale, less;

    // Of a group of a panel.
    ToNumber(const Linear &a, int64_t groups, int64_t panel, int64_t group) {
        scale = scales_at(a.scales, a.scale_type, a.group, groups, panel, group, 0);
        if constexpr (KIND == OFFSETS) {
            less = scales_at(a.offsets, a.scale_type, a.group, groups, panel, group, 0);
        } else {
            const int64_t at = (panel * groups + group) * LANES;
            const VI zero = a.zeros ? load_bytes(a.zeros + at) : set_i(1 << (a.bits - 1));
            const VI all = add_i(set_i(256), zero);  // of 9 bits
            less = KIND == HALVES ? mul_f(to_float(sub_i(zero_i(), all)), scale) : to_float(all);
        }
    }

    INLINE VF operator()(VF above_256) const {
        if constexpr (KIND == HALVES) return fma_f(above_256, scale, less);
        if constexpr (KIND == FLOATS) return mul_f(sub_f(above_256, less), scale);
        return fma_f(sub_f(above_256, set_f(256)), scale, less);
    }
};

// Steps of a panel, from a whole K block on, to pairs of bfloat16, rounded once.
template <Scales KIND>
void dequantize(const Linear &a, int64_t panel, int64_t step, int64_t steps, float *to) {
    const int64_t k_blocks = row_k_blocks(a.in, a.group), groups = (a.in + a.group - 1) / a.group;
    alignas(64) uint8_t bytes[K_BLOCK * LANES];
    const int64_t end = (step + steps) / K_BLOCK_STEPS;
    const int64_t part = a.group == HALF_K_BLOCK ? STEPS / 2 : STEPS;  // that has one scale
    for (int64_t k_block = step / K_BLOCK_STEPS; k_block < end; k_block++) {
        unpack_integers(a, a.q + (panel * k_blocks + k_block) * 64 * a.held_bits(), bytes);
        for (int64_t s = 0; s < STEPS; s += part) {
            const int64_t group = smaller((k_block * K_BLOCK + s * STEP) / a.group, groups - 1);
            const ToNumber<KIND> number(a, groups, panel, group);
            for (int64_t i = s; i < s + part; i++, to += 2 * LANES) {
                const VI four = weights(bytes + i * 64);
                store_f(to, interleaved_pairs(number(above_256<0>(four)),
                                              number(above_256<1>(four))));
                store_f(to + LANES, interleaved_pairs(number(above_256<2>(four)),
                                                      number(above_256<3>(four))));
            }
        }
    }
}

static void dequantize(const Linear &a, int64_t panel, int64_t step, int64_t steps, float *to) {
    if (a.offsets) return dequantize<OFFSETS>(a, panel, step, steps, to);
    if (a.scale_type == FLOAT16 || a.scale_type == BFLOAT16)
        return dequantize<HALVES>(a, panel, step, steps, to);
    return dequantize<FLOATS>(a, panel, step, steps, to);
}

// A product in bfloat16, of some rows from `first` on.
template <int64_t TYPE_> struct PairProduct {
    static constexpr bool BYTES = false;
    static constexpr int64_t TYPE = TYPE_;  // of activations and results
    const Dense &dense;
    const Linear *packed;  // or null, where weights are dense
    Dense from;            // whose activations are taken, from row `from_first` on
    int64_t from_first = 0;
    int64_t first = 0, rows = 0, held_rows = 0, all_steps = 0, blocks = 0;
    float *x = nullptr;

    int64_t steps(int64_t b) const { return smaller(PASS_STEPS, all_steps - b * PASS_STEPS); }
    int64_t together(int64_t) const { return TILE_STEPS; }
    DenseInput input() const { return {held_rows, all_steps, x, PASS_STEPS}; }
    const float *tile(int64_t b, int64_t row) const {
        return input().tile(row, b * PASS_STEPS, steps(b));
    }
    Panels weights(int64_t panel, int64_t panels, int64_t b, float *own) const {
        const Panels made = {own, steps(b) * LANES};
        for (int64_t end = panel + panels; panel < end; panel++, own += made.apart) {
            if (packed) {
                dequantize(*packed, panel, b * PASS_STEPS, steps(b), own);
            } else if constexpr (TYPE == BFLOAT16) {
                load_panel<TYPE>(dense, panel, b * PASS_STEPS, steps(b), own);
            }
        }
        return made;
    }
    // Packed weights are few bytes, for what is to be done to them.
    ComingRows coming(int64_t panel, int64_t panels, int64_t b) const {
        if (packed) return {};
        const int64_t channel = panel * LANES, stride = dense.in * SIZE<TYPE>;
        const int64_t at = b * PASS_STEPS * STEP;
        return {static_cast<const char *>(dense.w) + channel * stride + at,
                smaller(panels * LANES, dense.out - channel), stride,
                smaller(steps(b) * STEP, stride - at)};
    }
    Results results() const { return {dense.y, dense.bias, dense.out, first}; }
    void store(int64_t row, int64_t rows, int64_t panel, int64_t panels, const float *sums) const {
        results().template store<TYPE>(row, rows, panel, panels,
                                       [&](int64_t r, int64_t p) INLINE {
                                           return load_f(sums + sum_place(r, p));
                                       });
    }
    // Activations as tiles take them, of two tiles and a block for each place up to `places()`.
    int64_t places() const { return (held_rows + 2 * ROWS - 1) / (2 * ROWS) * blocks; }
    void lay_out_place(int64_t i) const {
        lay_out<TYPE, true>(from, input(), from_first, i / blocks * 2 * ROWS,
                            i % blocks * PASS_STEPS);
    }
};

// A row of activations, from element `start` on, as what its int8 stand for, as `quantize` in
// activations.h makes those: of a block of a group, times its largest over 127.
static void round_row(const Linear &a, int64_t start, void *to, int64_t at) {
    constexpr int64_t INPUTS = MAX_K_BLOCKS * K_BLOCK;
    for (int64_t group = 0; group < a.in; group += a.group) {
        const int64_t end = smaller(a.in, group + a.group);
        for (int64_t input = group; input < end; input += INPUTS) {
            const int64_t inputs = smaller(INPUTS, end - input);
            const float least = float_of(largest_bits(a, start + input, inputs)) / 127;
            const Quotient quotient(least == 0 ? 1 : least, a.x_type, true);
            for (int64_t i = 0; i < inputs; i += WIDTH) {
                const VF value = load_as(a.x, start + input + i, a.x_type, inputs - i);
                const VF whole = max_f(set_f(-127), min_f(set_f(127), quotient(value)));
                store_as(to, at + input + i, a.x_type, inputs - i,
                         mul_f(to_float(round_i(whole)), quotient.step));
            }
        }
    }
}

// y = x W^T + b in bfloat16, of packed weights or of those of `dense`; `all_steps`: of a row.
template <int64_t TYPE>
Status multiply_pairs(const Dense &dense, const Linear *packed, int64_t all_steps) {
    const int64_t panels = (dense.out + LANES - 1) / LANES;
    for (int64_t first = 0; first < dense.rows; first += PASS_ROWS) {
        PairProduct<TYPE> product = {dense, packed, dense};
        product.first = product.from_first = first;
        product.rows = smaller(PASS_ROWS, dense.rows - first);
        product.held_rows = in_whole_tiles(product.rows);
        product.all_steps = all_steps;
        product.blocks = (all_steps + PASS_STEPS - 1) / PASS_STEPS;
        const int64_t held = all_steps * product.held_rows;
        const int64_t own = max_threads() * pass_own(panels, product.held_rows);
        const bool rounds = packed && packed->mode == WEIGHT_ONLY_INT8;
        const int64_t rounded = rounds ? (product.rows * dense.in + 31) / 32 * 16 : 0;
        product.x = static_cast<float *>(scratch(size_t((held + own + rounded) * 4 + PASS_ROWS)));
        if (!product.x) return Status::NO_MEMORY;
        if (rounds) {
            product.from.x = product.x + held + own;
            product.from.x_stride = dense.in;
            product.from.rows = product.rows;
            product.from_first = 0;
        }
        uint8_t *fallback = reinterpret_cast<uint8_t *>(product.x + held + own + rounded);
        const bool worth = held > WORTH_THREADS;
        if (packed)
            for_each(product.rows, worth, [&](int64_t row, int64_t) {
                const int64_t at = (first + row) * packed->x_stride;
                fallback[row] = largest_bits(*packed, at, packed->in) >= FALLBACK_BITS;
                if (rounds) round_row(*packed, at, product.x + held + own, row * dense.in);
            });
        for_each(product.places(), worth, [&](int64_t i, int64_t) { product.lay_out_place(i); });
        multiply_passes(product, panels, held * 4, product.x + held,
                        [&](int64_t panel, int64_t some) {
                            for (int64_t row = 0; packed && row < product.rows; row++)
                                if (fallback[row])
                                    multiply_fallback_row(*packed, first + row, panel, some);
                        });
    }
    return Status::OK;
}

template <int64_t TYPE> Status bf16_prefill(const Linear &a) {
    const Dense dense = {a.rows, a.in, a.out, a.x_stride, a.x_type, 0, a.x, nullptr, a.bias, a.y};
    return multiply_pairs<TYPE>(dense, &a, row_k_blocks(a.in, a.group) * K_BLOCK_STEPS);
}

// Dense weights in bfloat16; where there are no inputs, zeros take their place.
static Status dense_prefill(const Dense &a) {
    const int64_t tiles = (a.in + 2 * TILE_STEPS - 1) / (2 * TILE_STEPS);
    return multiply_pairs<BFLOAT16>(a, nullptr, (tiles ? tiles : 1) * TILE_STEPS);
}

// Weights and activations of int8, of some rows from `first` on.
template <int64_t TYPE_> struct ByteProduct {
    static constexpr bool BYTES = true;
    static constexpr int64_t TYPE = TYPE_;  // of activations and results
    const Linear &a;
    const Activations &x;
    int64_t first, rows, held_rows, blocks;

    int64_t steps(int64_t b) const { return x.block[b].steps; }
    int64_t together(int64_t b) const { return tile_inputs(steps(b)) / STEP; }
    const float *tile(int64_t b, int64_t row) const {
        return reinterpret_cast<const float *>(x.tile(x.block[b], row));
    }
    // As they are stored, 128 above what they stand for, unless those are places in a table.
    const uint8_t *stored(int64_t panel, int64_t b) const {
        return a.q + (panel * x.k_blocks + x.block[b].step / STEPS) * 64 * a.held_bits();
    }
    Panels weights(int64_t panel, int64_t panels, int64_t b, float *own) const {
        if (!a.levels)
            return {reinterpret_cast<const float *>(stored(panel, b)),
                    x.k_blocks * STEPS * LANES};
        const Panels made = {own, (steps(b) + STEPS - 1) / STEPS * STEPS * LANES};
        for (int64_t end = panel + panels; panel < end; panel++, own += made.apart) {
            const uint8_t *q = stored(panel, b);
            auto *to = reinterpret_cast<uint8_t *>(own);
            for (int64_t s = 0; s < steps(b); s += STEPS, to += K_BLOCK * LANES) {
                unpack_integers(a, q, to);
                q += 64 * a.held_bits();
            }
        }
        return made;
    }
    ComingRows coming(int64_t panel, int64_t panels, int64_t b) const {
        const int64_t k_block = 64 * a.held_bits();
        return {stored(panel, b), panels, x.k_blocks * k_block,
                (steps(b) + STEPS - 1) / STEPS * k_block};
    }
    Results results() const { return {a.y, a.bias, a.out, first}; }
    void store(int64_t row, int64_t rows, int64_t panel, int64_t panels, const float *sums) const {
        VF scale[PAIR] = {set_f(0), set_f(0)};
        for (int64_t p = 0; p < panels; p++)
            scale[p] = load_as(a.scales, (panel + p) * LANES, a.scale_type, WIDTH);
        results().template store<TYPE>(
            row, rows, panel, panels, [&](int64_t r, int64_t p) INLINE {
                const int32_t *sum = reinterpret_cast<const int32_t *>(sums + sum_place(r, p));
                const VI products = sub_i(load_i(sum), set_i(x.sum[row + r]));
                return mul_f(mul_f(to_float(products), set_f(x.scale[row + r])), scale[p]);
            });
    }
};

// A row of activations of int8, with its scale, and as its sum what stored weights make too much:
// as by `quantize` in activations.h, of all blocks at once.
template <int64_t TYPE>
void quantize_row(const Linear &a, const Activations &x, int64_t row, int64_t start) {
    x.scale[row] = row_scale(a, start);
    const Quotient quotient(x.scale[row], TYPE, a.mode == INT8_DYNAMIC);
    const int64_t tile_row = row / x.tile_rows * x.tile_rows;
    const int64_t rows = smaller(x.tile_rows, x.held_rows - tile_row);
    VI sum = zero_i();
    for (int64_t b = 0; b < x.blocks; b++) {
        const Block &block = x.block[b];
        const int64_t inputs = tile_inputs(block.steps);
        int8_t *to = x.tile(block, tile_row) + (row - tile_row) * inputs;
        for (int64_t tile = 0; tile < block.steps * STEP; tile += inputs, to += rows * inputs)
            for (int64_t i = 0; i < inputs; i += WIDTH) {
                const int64_t input = tile + i;
                const VF value = load<TYPE>(a.x, start + block.input + input, block.inputs - input);
                const VF whole = max_f(set_f(-128), min_f(set_f(127), quotient(value)));
                const VI integers = round_i(whole);
                sum = add_i(sum, integers);
                store_bytes(to + i, integers);
            }
    }
    x.sum[row] = sum_of_i(sum) * 128;
}

template <int64_t TYPE> Status int8_passes(const Linear &a) {
    const int64_t panels = (a.out + LANES - 1) / LANES;
    for (int64_t first = 0; first < a.rows; first += PASS_ROWS) {
        const int64_t rows = smaller(PASS_ROWS, a.rows - first), held_rows = in_whole_tiles(rows);
        Activations x;
        const TileShape shape = {2 * ROWS, ROWS, false};
        if (!prepare<1>(x, a, rows, shape, pass_own(panels, held_rows) * 4))
            return Status::NO_MEMORY;
        for_each(rows, rows * a.in > WORTH_QUANTIZING, [&](int64_t row, int64_t) {
            quantize_row<TYPE>(a, x, row, (first + row) * a.x_stride);
        });
        const ByteProduct<TYPE> product = {a, x, first, rows, held_rows, x.blocks};
        multiply_passes(product, panels, x.k_blocks * K_BLOCK * held_rows,
                        reinterpret_cast<float *>(x.own), [](int64_t, int64_t) {});
    }
    return Status::OK;
}

}  // namespace
}  // namespace qllm
