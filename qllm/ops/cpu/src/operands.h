// What every kind of tile takes, and how its sums become results.
#pragma once

#include "isa.h"
#include "kernels.h"

namespace qllm {
namespace {

constexpr int VECTORS = LANES / WIDTH;  // to a panel
constexpr int64_t GROUP_PANELS = 4;     // panels that share a pass over the activations
constexpr int64_t STEPS = K_BLOCK / STEP;
constexpr int64_t GROUP_LANES = GROUP_PANELS * LANES;

// How many operands the P int8 planes of a row are: where operands are of 16 bits, the first two
// planes are one, and the third and fourth, which need not fit together, have one each.
template <int P> constexpr int OPERAND_PLANES = OPERAND_BYTES == 1 ? P : P == 4 ? 3 : 1;

// Whether pairs of bfloat16 are multiplied.
#if !defined(HAS_PAIRS)
#define HAS_PAIRS 0
#endif

#if !defined(WIDENS)
// A sum of products is in int32, unless an instruction set has the latest ones apart, in 16 bits.
#define WIDENS 0
using Sum = VI;
constexpr int64_t steps_to_widen(int64_t) { return STEPS; }
inline Sum no_sum() { return zero_i(); }
inline Sum widened(Sum sum) { return sum; }
inline VI total(Sum sum) { return sum; }
#endif

// What a tile needs of a block: of the weights (a group of panels) and of the activations.
struct Operands {
    const uint8_t *w;      // panels w_stride bytes apart, 64 bytes per step
    int64_t w_stride;
    const float *scales;   // (panels, LANES)
    const int32_t *zeros;  // (panels, LANES); null where all of them are `middle`
    int32_t middle;
    const int8_t *x;       // the tile's, as `tile_offset` says
    int64_t steps;
    bool scaled;              // blocks have scales; without, their sums stay integers (one plane)
    const float *x_scale;     // (rows,)
    const int32_t *sum;       // (rows,): of the first two planes together
    const int32_t *low_sum;   // (rows,): of the third and fourth
    const float *scaled_sum;  // (rows,): of all planes, times x_scale: what offsets multiply
    float *out;               // (rows, GROUP_LANES), added to; int32 where not scaled
    int64_t widen = STEPS;    // steps after which sums widen, a power of two
    const float *offsets = nullptr;  // (panels, LANES), added to each weight, or null
    // Sums of the products of neighbours, inputs 2i and 2i + 1: see `Sums::add_words`.
    const int32_t *x_pairs = nullptr;  // (rows,)
    const int32_t *w_pairs = nullptr;  // (panels, LANES)
};

#if !defined(HAS_WORDS)
// Whether an instruction multiplies and adds pairs of int16: two planes then are one operand, where
// weights are unpacked to cache, and so is one plane where there is nothing for bytes. Weights
// become int16 there, less the middle of their integers, once for all rows; what is left of their
// zeros is taken off the sums.
#define HAS_WORDS 0
#endif
template <int P>
constexpr bool IN_WORDS = HAS_WORDS && (P == 2 || (P == 1 && OPERAND_BYTES == 2));
constexpr int64_t WORD_STEP_BYTES = 2 * STEP;  // of a row of activations, or of a lane of weights
constexpr int64_t UNPACKED_BYTES = HAS_WORDS ? 2 : 1;  // that a weight in cache takes at most

// How many operands a row is in a tile.
template <int P> constexpr int TILE_OPERANDS = IN_WORDS<P> ? 1 : OPERAND_PLANES<P>;

// Adds the products of slots of 4 bytes, each a float32 or a pair of bfloat16.
template <bool PAIR> INLINE inline VF add_slots(VF sum, VF a, VF b) {
#if HAS_PAIRS
    if constexpr (PAIR) return add_pair(sum, a, b);
#endif
    return add_product(sum, a, b);
}

// Two planes as one integer.
inline VI pair(VI high, VI low) { return add_i(shift_left<8>(high), low); }

// A row's results of the blocks before this one, and its own; `low` is of the third and fourth
// plane.
template <int P> INLINE inline VF add_scaled(VF out, VI high, VI low, float x_scale, VF scale) {
    VF value = to_float(high);
    if constexpr (P == 4) value = fma_f(value, set_f(65536), to_float(low));
    return fma_f(mul_f(value, set_f(x_scale)), scale, out);
}

// The same where blocks have no scales: integers.
INLINE inline void add_whole(float *out, VI sum) {
    int32_t *whole = reinterpret_cast<int32_t *>(out);
    store_i(whole, add_i(load_i(whole), sum));
}

}  // namespace
}  // namespace qllm
