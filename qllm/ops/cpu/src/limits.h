// What the machine allows, for benchmarks: the rates of reading memory and of int8 products.
#pragma once

#include "isa.h"
#include "layout.h"
#include "machine.h"
#include "prefetch.h"
#include "threads.h"
#include "tiles.h"

namespace qllm {
namespace {

// Reads `bytes`, every thread a part of its own, and sums them up in some way.
static int64_t read_all(const uint8_t *from, int64_t bytes) {
    int64_t total = 0;
    const int64_t parts = bytes / 256;
    in_threads(parts, parts / max_threads() / RUN_PARTS + 1, [&](const Share &share) {
        VI sums[4] = {zero_i(), zero_i(), zero_i(), zero_i()};
        take_parts(share, [&](int64_t part, int64_t end) {
            for (; part < end; part++) {
                const uint8_t *p = from + part * 256;
                for (int i = 0; i < 4; i++) {
                    prefetch_into<1>(p + i * 64 + FIRST_AHEAD);
                    for (int v = 0; v < VECTORS; v++)
                        sums[i] = add_i(sums[i], weights(p + i * 64 + v * WIDTH * STEP));
                }
            }
        });
        for (VI sum : sums) __atomic_fetch_add(&total, sum_of_i(sum), __ATOMIC_RELAXED);
    });
    return total;
}

// The tile whose sums fill the registers; one of a prompt, where int8 is multiplied as int16.
constexpr int VECTORS_AT_ONCE = IN_WORDS<1> ? VECTORS : ACCUMULATORS > 2 ? 2 : 1;
constexpr int OPERANDS_AT_ONCE =
    IN_WORDS<1> ? TILE_ROWS<1> : ACCUMULATORS > 2 ? ACCUMULATORS / 2 : 1;

// A step of it, of which all but each EVERY-th operand goes as `Sums::add_words` says, if any does.
template <int EVERY, int S, int V>
INLINE inline void multiply_step(Sums<S, V> &sums, const VI (&bytes)[V], const int8_t *x) {
#if HAS_WORDS
    if constexpr (IN_WORDS<1>) return sums.template add_words<EVERY>(bytes, bytes, x);
#endif
    Weights w[V];
    for (int v = 0; v < V; v++) w[v] = prepared(bytes[v]);
    sums.add(w, x);
}

// Multiplies and adds int8 in registers, so many rounds for each thread; returns how many
// operations, two for a product.
template <int EVERY> int64_t multiply_rounds(int64_t rounds) {
    const int64_t all_rounds = rounds * max_threads();
    alignas(64) const int8_t x[OPERANDS_AT_ONCE * STEP * OPERAND_BYTES] = {1, 2, 3};
    in_threads(all_rounds, rounds / RUN_PARTS + 1, [&](const Share &share) {
        volatile int32_t sink;
        take_parts(share, [&](int64_t round, int64_t end) {
            // Its own, and activations loaded anew: else sums do not stay in registers.
            Sums<OPERANDS_AT_ONCE, VECTORS_AT_ONCE> sums;
            sums.clear();
            VI bytes[VECTORS_AT_ONCE];
            for (VI &v : bytes) v = set_i(int32_t(rounds));
            for (; round < end; round++) {
                const int8_t *from = x;
                __asm__ volatile("" : "+r"(from));
                multiply_step<EVERY>(sums, bytes, from);
                // The weights may be others now, so that no round can be left out.
                for (VI &v : bytes) __asm__ volatile("" : "+" REGISTER(v));
            }
            int32_t all = 0;
            for (VI sum : sums.of) all += sum_of_i(sum);
            sink = all;
        });
        (void)sink;
    });
    return all_rounds * OPERANDS_AT_ONCE * VECTORS_AT_ONCE * WIDTH * STEP * 2;
}

static int64_t multiply_all(int64_t rounds) {
    if constexpr (IN_WORDS<1>)
        if (machine.spare_adders) return multiply_rounds<WORDS_EVERY>(rounds);
    return multiply_rounds<1>(rounds);
}

}  // namespace
}  // namespace qllm
