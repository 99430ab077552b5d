// Products of small matrices that are made for them on the way: of attention and its gradients.
#pragma once

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "operands.h"

namespace qllm {
namespace {

constexpr int64_t BLOCK_ROWS = 4;  // of a product whose sums are in registers
constexpr int BLOCK_VECTORS = WIDTH == 16 ? 4 : 2;

constexpr int64_t filled_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// c (rows, columns), or what is added to it, = a b. Operands are slots of 4 bytes, a float32 or a
// pair of bfloat16 that follow each other in what is summed over.
struct SlotProduct {
    const float *a;
    int64_t a_row, a_slot;  // from one row of a to the next, and from one slot of it
    const float *b;         // (slots, columns), its rows b_slot apart
    int64_t b_slot, slots;
    float *c;
    int64_t c_row;
};

// The sums of BLOCK_ROWS rows and V vectors, in registers as those of `Sums` in tile.h.
template <bool PAIR, int V> struct SlotSums {
    VF of[BLOCK_ROWS * V];

    template <bool ADDS, int I = 0> INLINE void begin(const float *c, int64_t c_row) {
        of[I] = ADDS ? load_f(c + I / V * c_row + I % V * WIDTH) : set_f(0);
        if constexpr (I + 1 < BLOCK_ROWS * V) begin<ADDS, I + 1>(c, c_row);
    }

    template <int ROW = 0> INLINE void add(const VF (&b)[V], const float *a, int64_t a_row) {
        add_row<ROW>(b, set_f(*a));
        if constexpr (ROW + 1 < BLOCK_ROWS) add<ROW + 1>(b, a + a_row, a_row);
    }

    template <int ROW, int I = 0> INLINE void add_row(const VF (&b)[V], VF a) {
        VF &sum = of[ROW * V + I];
        sum = add_slots<PAIR>(sum, b[I], a);
        if constexpr (I + 1 < V) add_row<ROW, I + 1>(b, a);
    }

    template <int I = 0> INLINE void finish(float *c, int64_t c_row) {
        store_f(c + I / V * c_row + I % V * WIDTH, of[I]);
        if constexpr (I + 1 < BLOCK_ROWS * V) finish<I + 1>(c, c_row);
    }
};

template <int V, int I = 0> INLINE inline void load_slots(VF (&b)[V], const float *from) {
    b[I] = load_f(from + I * WIDTH);
    if constexpr (I + 1 < V) load_slots<V, I + 1>(b, from);
}

template <bool PAIR, bool ADDS, int V>
__attribute__((noinline)) void multiply_slots(const SlotProduct &p, int64_t row, int64_t column) {
    float *c = p.c + row * p.c_row + column;
    const float *a = p.a + row * p.a_row, *b = p.b + column;
    SlotSums<PAIR, V> sums;
    sums.template begin<ADDS>(c, p.c_row);
    for (int64_t s = 0; s < p.slots; s++, a += p.a_slot, b += p.b_slot) {
        VF slots[V];
        load_slots(slots, b);
        sums.add(slots, a, p.a_row);
    }
    sums.finish(c, p.c_row);
}

// Rows and columns are multiples of BLOCK_ROWS and WIDTH.
template <bool PAIR, bool ADDS = false>
void multiply(const SlotProduct &p, int64_t rows, int64_t columns) {
    constexpr int64_t WIDE = BLOCK_VECTORS * WIDTH;
    for (int64_t column = 0; column < columns;) {
        const bool wide = column + WIDE <= columns;
        for (int64_t row = 0; row < rows; row += BLOCK_ROWS)
            wide ? multiply_slots<PAIR, ADDS, BLOCK_VECTORS>(p, row, column)
                 : multiply_slots<PAIR, ADDS, 1>(p, row, column);
        column += wide ? WIDE : WIDTH;
    }
}

template <int64_t TYPE> VF load_or_zero(const void *x, int64_t i, int64_t count) {
    return count > 0 ? load<TYPE>(x, i, count) : set_f(0);
}

// Slots of pairs that follow each other in a row: its first `count` elements, and zeros up to
// `slots`, a multiple of WIDTH.
template <int64_t TYPE, bool PAIR>
void along_row(const void *x, int64_t at, int64_t count, float *to, int64_t slots) {
    for (int64_t s = 0; s < slots; s += WIDTH) {
        const int64_t i = PAIR ? 2 * s : s;
        VF slot = load_or_zero<TYPE>(x, at + i, count - i);
#if HAS_PAIRS
        if (PAIR) slot = as_pairs(slot, load_or_zero<TYPE>(x, at + i + WIDTH, count - i - WIDTH));
#endif
        store_f(to + s, slot);
    }
}

// Slots of rows that follow each other, element by element: (rows / UNIT, width).
template <bool PAIR> VF side_by_side(VF first, [[maybe_unused]] VF second) {
#if HAS_PAIRS
    if (PAIR) return interleaved_pairs(first, second);
#endif
    return first;
}

}  // namespace
}  // namespace qllm
