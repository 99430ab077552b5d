// The activations of a layer as integers, in blocks of up to MAX_K_BLOCKS K blocks of one group,
// with a scale to multiply with: a power of two, for int8 the block's largest value over 127, or,
// in int8 layers, the row's or the tensor's. An integer is split into int8 planes, one for every 8
// bits. A plane of a row is an operand of the products; where the instruction set multiplies 16
// bits, two planes are one.
#pragma once

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "layout.h"
#include "operands.h"
#include "threads.h"
#include "tiles.h"

namespace qllm {
namespace {

constexpr int64_t MAX_K_BLOCKS = 4;   // 128 inputs: 128 * 255 * 2^15 is below 2^31
constexpr int64_t CHUNK_ROWS = 192;  // rows whose sums stay in cache: 48 KiB
constexpr int64_t ROWS_AHEAD = 8;    // to prefetch while activations become integers

// What a thread has of its own in memory, for stacks may be small: sums of rows (CHUNK_ROWS,
// GROUP_LANES), a block of weights (GROUP_PANELS, WEIGHT_K_BLOCKS, K_BLOCK, LANES), sums of tiles.
constexpr int64_t SUM_BYTES = CHUNK_ROWS * GROUP_LANES * 4;
constexpr int64_t WEIGHT_K_BLOCKS =
    UNSCALED_K_BLOCKS > MAX_K_BLOCKS ? UNSCALED_K_BLOCKS : MAX_K_BLOCKS;
constexpr int64_t WEIGHT_BYTES = GROUP_LANES * WEIGHT_K_BLOCKS * K_BLOCK * UNPACKED_BYTES;
constexpr int64_t OWN_BYTES = SUM_BYTES + WEIGHT_BYTES + TILE_SUMS * 4;

// Up to so many activations become integers before another thread has begun.
constexpr int64_t WORTH_QUANTIZING = 1 << 12;

// |x| from 2^100 on, infinities and NaN are left to float arithmetic.
constexpr int32_t FALLBACK_BITS = 227 << 23;

struct Block {
    int64_t input, inputs;  // the first input, and how many there are
    int64_t step, steps;    // the same in steps, of whole K blocks or of half a one
    int64_t group;
    int64_t begin, row_bytes;  // in `Activations::q`: the first row's place, and bytes of each
};

// Rows of all tiles but the last, whose rows are a multiple of `step`: those that are not there are
// multiplied too, to no effect; and whether two planes of them are int16.
struct TileShape {
    int64_t rows, step;
    bool words;
};

struct Activations {
    int64_t rows, blocks, k_blocks;
    int64_t held_rows;            // and those that fill the last tile
    int64_t tile_rows;            // rows of all tiles but the last
    int64_t planes;
    bool words;                   // two planes as int16
    Block *block;      // (blocks,)
    int8_t *q;         // block after block, in it tile after tile
    float *scale;      // (blocks, held_rows)
    int32_t *sum;      // (blocks, held_rows): of the first two planes together
    int32_t *low_sum;  // (blocks, held_rows): of the third and fourth
    float *scaled_sum; // (blocks, held_rows): of all planes, times the scale, where blocks have one
    int32_t *pairs;    // (blocks, held_rows): of the products of neighbours, where `words`
    uint8_t *fallback; // (rows,): left to float arithmetic
    char *own;         // of threads

    int8_t *tile(const Block &b, int64_t row) const {
        return q + b.begin + row * b.row_bytes;
    }
};

// Whether blocks have scales of their own.
static inline bool is_scaled(const Linear &a) { return a.mode <= WEIGHT_ONLY_INT8; }

static inline float float_of(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// 2^exponent, from -149, where it is subnormal, to 127.
static inline float power_of_two(int exponent) {
    return float_of(exponent >= -126 ? uint32_t(exponent + 127) << 23 : 1u << (exponent + 149));
}

// The largest |x| of a run as bits, which order as the numbers do, with NaN above infinity.
static int32_t largest_bits(const Linear &a, int64_t start, int64_t count) {
    VI best = zero_i();
    for (int64_t i = 0; i < count; i += WIDTH)
        best = max_i(best, bits_of(abs_f(load_as(a.x, start + i, a.x_type, count - i))));
    return max_of_i(best);
}

// The exponent of the power of two in which every |x| up to `largest` is an integer of P planes:
// largest / 2^exponent is 2^14 (2^30 for 4 planes) to twice that, if the top plane holds it.
template <int P> int exponent_of(int32_t largest) {
    constexpr int KEPT = 8 * P - 2;
    constexpr float TOP = P == 2 ? 0x7F7F : 0x7F7F7F00;  // 127 in every plane, as a float has it
    int exponent = (largest >> 23 ? (largest >> 23) - 127 : -126) - KEPT;
    if (exponent < -149) exponent = -149;
    int half = -exponent / 2;
    float scaled = float_of(largest) * power_of_two(half) * power_of_two(-exponent - half);
    return scaled > TOP ? exponent + 1 : exponent;
}

// The scale of all of a row, which begins at `start`, of a layer whose blocks are not scaled.
static float row_scale(const Linear &a, int64_t start) {
    if (a.mode != INT8_DYNAMIC) return a.input_scale ? *a.input_scale : 0;
    const float scale = float_of(largest_bits(a, start, a.in)) * 2 / 255;
    return scale == 0 ? 1 : scale;
}

// Numbers of a type over a step. Where those have 16 bits, and the step comes from the largest of
// them, the quotient is that of a division, to the bit, and takes less time: the step's inverse
// times the number, and once more times what that leaves. (A test has all significands.)
struct Quotient {
    VF step, less_step, inverse;
    bool divides;

    Quotient(float of, int64_t type, bool of_largest)
        : step(set_f(of)), less_step(set_f(-of)), inverse(set_f(1 / of)) {
        constexpr float LEAST = 0x1p-100, MOST = 0x1p100;  // nothing is subnormal or too large
        divides = type == FLOAT32 || !of_largest || !(of >= LEAST && of <= MOST);
    }

    INLINE VF operator()(VF value) const {
        if (divides) return div_f(value, step);
        const VF quotient = mul_f(value, inverse);
        return fma_f(fma_f(quotient, less_step, value), inverse, quotient);
    }
};

// One row of one block as integers. Blocks that are not scaled have the row's `scale`.
template <int P>
void quantize(const Linear &a, const Activations &x, int64_t row, int64_t b, int64_t start,
              float scale) {
    const Block &block = x.block[b];
    VF up = set_f(1), up_again = set_f(1);
    if (is_scaled(a)) {
        int32_t largest = largest_bits(a, start, block.inputs);
        if (largest >= FALLBACK_BITS) {
            // Threads that have other blocks of the row may do so, too.
            __atomic_store_n(x.fallback + row, 1, __ATOMIC_RELAXED);
            largest = 0;
        }
        if (P > 1) {
            int exponent = exponent_of<P>(largest), half = -exponent / 2;
            scale = power_of_two(exponent);
            up = set_f(power_of_two(half));
            up_again = set_f(power_of_two(-exponent - half));
        } else {
            scale = float_of(largest) / 127;
            if (scale == 0) scale = 1;
        }
    }
    const Quotient quotient(scale, a.x_type, a.mode != INT8_STATIC);
    const VF lowest = set_f(is_scaled(a) ? -127 : -128);
    int64_t tile_row = row / x.tile_rows * x.tile_rows;
    int64_t rows = smaller(x.tile_rows, x.held_rows - tile_row);
    int8_t *tile = x.tile(block, tile_row);
    VI sum = zero_i(), low_sum = zero_i();
    [[maybe_unused]] VI pairs = zero_i();
    // Where operands are of 16 bits, tiles of other rows have the same.
    constexpr bool ONLY_WORDS = IN_WORDS<P> && OPERAND_BYTES == 2;
    for (int64_t i = 0; i < block.steps * STEP; i += LANES) {
        int8_t bytes[P][LANES];
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = i + v * WIDTH;
            VF value = load_as(a.x, start + at, a.x_type, block.inputs - at);
            VI whole;
            if (P > 1) {
                whole = round_i(mul_f(mul_f(value, up), up_again));
            } else {
                whole = round_i(max_f(lowest, min_f(set_f(127), quotient(value))));
            }
#if HAS_WORDS
            if (ONLY_WORDS || x.words) {
                const int64_t step_bytes = rows * WORD_STEP_BYTES;
                const int64_t step = (i + v * WIDTH) / STEP;
                const int64_t to = step * step_bytes + (row - tile_row) * WORD_STEP_BYTES;
                store_words(tile + to, step_bytes, whole);
                sum = add_i(sum, whole);
                if (x.words) pairs = add_i(pairs, mul_neighbours(whole));
                continue;
            }
#endif
            VI all = whole, top = whole;
            for (int plane = P - 1; plane >= 0; plane--) {
                if (plane == 1) top = whole;
                store_bytes(bytes[plane] + v * WIDTH, whole);
                VI low = shift_right<24>(shift_left<24>(whole));
                whole = shift_right<8>(sub_i(whole, low));
            }
            sum = add_i(sum, top);
            if (P == 4) low_sum = add_i(low_sum, sub_i(all, shift_left<16>(top)));
        }
        if constexpr (!ONLY_WORDS)
            if (!x.words) put<P>(tile, rows, row - tile_row, i / STEP, block.steps, bytes);
    }
    int64_t at = b * x.held_rows + row;
    x.sum[at] = sum_of_i(sum);
    if (x.words) x.pairs[at] = sum_of_i(pairs);
    if (P == 4) x.low_sum[at] = sum_of_i(low_sum);
    if (!is_scaled(a)) return;  // there is one scale for all blocks
    float whole = float(x.sum[at]);
    if (P == 4) whole = whole * 65536 + float(x.low_sum[at]);
    x.scale[at] = scale;
    x.scaled_sum[at] = whole * scale;
}

// Of a row of a block, which is too short a run for the machine to see it coming.
static void prefetch(const Linear &a, int64_t start, int64_t count) {
    const int64_t bytes = bytes_of(a.x_type);
    const char *from = static_cast<const char *>(a.x) + start * bytes;
    for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(from + i);
}

// The activations, `first` being their first row in a.x. A thread takes blocks of whole tiles: rows
// of one lie side by side in cache lines, which threads would take from each other. It takes those
// of a tile one after the other, for then their rows are in its cache.
template <int P> void quantize_all(const Linear &a, const Activations &x, int64_t first) {
    const bool worth = x.rows * a.in > WORTH_QUANTIZING;
    if (!is_scaled(a))
        for_each(x.rows, worth && a.mode == INT8_DYNAMIC, [&](int64_t row, int64_t) {
            x.scale[row] = row_scale(a, (first + row) * a.x_stride);
        });
    const int64_t tiles = (x.rows + x.tile_rows - 1) / x.tile_rows;
    for_each(tiles * x.blocks, worth, [&](int64_t i, int64_t) {
        const int64_t b = i % x.blocks, begin = i / x.blocks * x.tile_rows;
        const int64_t end = smaller(x.rows, begin + x.tile_rows);
        for (int64_t row = begin; row < end; row++) {
            int64_t start = (first + row) * a.x_stride + x.block[b].input;
            if (row + ROWS_AHEAD < x.rows)
                prefetch(a, start + ROWS_AHEAD * a.x_stride, x.block[b].inputs);
            quantize<P>(a, x, row, b, start, is_scaled(a) ? 1 : x.scale[row]);
        }
    });
}

// What a tile needs of the activations of `row` and those below it.
static void point_at(Operands &o, const Activations &x, int64_t b, int64_t row) {
    int64_t at = b * x.held_rows + row;
    o.x = x.tile(x.block[b], row);
    o.steps = x.block[b].steps;
    o.x_scale = x.scale + at;
    o.sum = x.sum + at;
    o.low_sum = x.low_sum + at;
    o.scaled_sum = x.scaled_sum + at;
    o.x_pairs = x.pairs + at;
}

// Memory for the activations of `rows` rows, and for threads; false where there is none.
template <int P>
bool prepare(Activations &x, const Linear &a, int64_t rows, const TileShape &shape,
             int64_t own_bytes = OWN_BYTES) {
    x.rows = rows;
    x.held_rows = rows = (rows + shape.step - 1) / shape.step * shape.step;
    x.tile_rows = shape.rows;
    x.planes = P;
    x.words = shape.words;
    x.k_blocks = row_k_blocks(a.in, a.group);
    x.blocks = 0;
    const int64_t max_k_blocks = is_scaled(a) ? MAX_K_BLOCKS : UNSCALED_K_BLOCKS;
    int64_t per_group = (k_blocks_of(a.group) + max_k_blocks - 1) / max_k_blocks;
    int64_t max_blocks = (a.in / a.group + 1) * per_group;
    int64_t sizes[] = {max_blocks * int64_t(sizeof(Block)),
                       x.k_blocks * K_BLOCK * rows * INPUT_BYTES<P>,  // AMX reads 4 KiB more
                       max_blocks * rows * 4,
                       max_blocks * rows * 4,
                       max_blocks * rows * 4,
                       max_blocks * rows * 4,
                       x.words ? max_blocks * rows * 4 : 0,
                       rows,
                       max_threads() * own_bytes};
    char *parts[9];
    int64_t total = 0;
    for (int64_t size : sizes) total += (size + 63) / 64 * 64;
    char *memory = static_cast<char *>(scratch(total));
    if (!memory) return false;
    for (int i = 0; i < 9; i++) {
        parts[i] = memory;
        memory += (sizes[i] + 63) / 64 * 64;
    }
    x.block = reinterpret_cast<Block *>(parts[0]);
    x.q = reinterpret_cast<int8_t *>(parts[1]);
    x.scale = reinterpret_cast<float *>(parts[2]);
    x.sum = reinterpret_cast<int32_t *>(parts[3]);
    x.low_sum = reinterpret_cast<int32_t *>(parts[4]);
    x.scaled_sum = reinterpret_cast<float *>(parts[5]);
    x.pairs = reinterpret_cast<int32_t *>(parts[6]);
    x.fallback = reinterpret_cast<uint8_t *>(parts[7]);
    x.own = parts[8];
    const int64_t filled = a.group == HALF_K_BLOCK ? HALF_K_BLOCK : K_BLOCK;
    for (int64_t start = 0, step = 0, group = 0; start < a.in; start += a.group, group++) {
        int64_t end = smaller(a.in, start + a.group);
        for (int64_t input = start; input < end; input += max_k_blocks * K_BLOCK) {
            int64_t inputs = smaller(max_k_blocks * K_BLOCK, end - input);
            const int64_t steps = (inputs + filled - 1) / filled * filled / STEP;
            const int64_t bytes = STEP * INPUT_BYTES<P>;
            const int64_t begin = step * bytes * rows, row_bytes = steps * bytes;
            x.block[x.blocks++] = {input, inputs, step, steps, group, begin, row_bytes};
            step += steps;
        }
    }
    return true;
}

}  // namespace
}  // namespace qllm
