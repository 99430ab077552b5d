// Packed weights times one or a few rows (GEMV): weights become bytes in registers.
#pragma once

#include "activations.h"
#include "isa.h"
#include "layout.h"
#include "machine.h"
#include "operands.h"
#include "prefetch.h"
#include "results.h"
#include "tiles.h"

namespace qllm {
namespace {

#if !defined(GEMV_IN_WORDS)
#define GEMV_IN_WORDS 0
#endif
template <int P> constexpr bool IN_WORDS_OF_FEW = GEMV_IN_WORDS && IN_WORDS<P>;

#if GEMV_OPERANDS
constexpr int64_t GEMV_TILES = 6;  // from here on the way through the cache is as fast
constexpr int64_t GEMV_WORD_ROWS = 8;  // of a tile of int16

// Up to how many rows weights are unpacked in registers. In float32 they never are, which spares a
// third of the functions.
template <int P> constexpr int64_t GEMV_TILE_ROWS = GEMV_OPERANDS / OPERAND_PLANES<P>;
template <int P>
constexpr int64_t GEMV_MAX_ROWS =
    P > 2 ? 0 : GEMV_TILES * (IN_WORDS_OF_FEW<P> ? GEMV_WORD_ROWS : GEMV_TILE_ROWS<P>);

constexpr int HALF = STEPS / 2;  // of a K block, where it has two groups

// Weights with two groups to a K block have functions of their own, in files of their own, since
// these take as long to compile as all others.
#if !defined(HALF_GROUPS)
#define HALF_GROUPS 0
#endif
constexpr bool HALVES = HALF_GROUPS;

// The integers of a step, of a weight that has levels, as KIND says, or not.
constexpr int WITH_LEVELS = 16;  // added to LEVEL_BITS, or, where sums widen, to those of integers
template <int KIND> constexpr int HELD_BITS = KIND > WITH_LEVELS ? LEVEL_BITS : KIND;
template <int KIND> constexpr int INTEGER_BITS = KIND % WITH_LEVELS;
template <int KIND, int T> INLINE inline VI integers_of(const uint8_t *q, const Table &table) {
    const VI held = (VI)step_of<HELD_BITS<KIND>, T>(q);
    if constexpr (KIND > WITH_LEVELS) return look_up(table, held);
    return held;
}

template <int KIND, int V, int T, int I = 0>
INLINE inline void load_step(Weights (&w)[V], const uint8_t *q, int64_t stride,
                             const Table &table) {
    const uint8_t *from = q + I / VECTORS * stride + I % VECTORS * PART;
    w[I] = prepared(integers_of<KIND, T>(from, table));
    if constexpr (I + 1 < V) load_step<KIND, V, T, I + 1>(w, q, stride, table);
}

// Adds steps of a K block, all of them or half, V vectors of panels, to each of the sums in turn.
template <int KIND, int FIRST, int END, int S, int V, int SETS, int T = FIRST>
INLINE inline void add_steps(Sums<S, V> (&sums)[SETS], const uint8_t *q, int64_t stride,
                             const int8_t *x, const Table &table) {
    Weights w[V];
    load_step<KIND, V, T>(w, q, stride, table);
    sums[T % SETS].add(w, x + (T - FIRST) * S * OPERAND_BYTES * STEP);
    constexpr int64_t EVERY = steps_to_widen(INTEGER_BITS<KIND>);
    if constexpr (WIDENS && ((T + 1) % EVERY == 0 || T + 1 == END)) sums[0].widen();
    if constexpr (T + 1 < END)
        add_steps<KIND, FIRST, END, S, V, SETS, T + 1>(sums, q, stride, x, table);
}

// One or N panels times the S operands of a tile, rows from `row` on or their two planes, each step
// unpacked in registers: where weights are used a few times, memory has to be read without a pause,
// and the way through the cache costs more than it saves. It is slower in several places at once,
// where it is slow: no more panels go together than the units need to be busy, for which one panel
// has several sets of sums. What comes next is asked for into one of two caches.
template <int KIND, int S, int N, int CACHE>
__attribute__((noinline)) void gemv(const Linear &a, const Activations &x, int64_t row,
                                    int64_t panel, int64_t panels, Grid &grid, float *out) {
    constexpr int BITS = HELD_BITS<KIND>;
    const Table table = load_table(KIND > WITH_LEVELS ? a.levels : a.q);  // else of no use
    const int64_t size = x.k_blocks * 64 * BITS;
    const int64_t stride = panels < N ? 0 : size;  // one in place of N: the same again, for nothing
    const uint8_t *q = a.q + panel * size, *end = q + size;
    Operands o = operands_of(a, out);
    grid.end = 0;  // what it has is of other panels
    const int64_t away = CACHE == 1 ? FIRST_AHEAD : machine.ahead;
    constexpr int V = N * VECTORS;
    constexpr int SETS = WIDENS || OPERAND_BYTES == 2 || S * V > 4 ? 1 : S * V > 2 ? 2 : 4;
    for (int64_t b = 0; b < x.blocks; b++) {
        const int64_t group = x.block[b].group;
        if (group >= grid.end) grid.load(a, panel, N, group, Grid::ROOM / N, stride ? 1 : 0);
        grid.point(o, a, group, N);
        point_at(o, x, b, row);
        Sums<S, V> sums[SETS];
        for (auto &set : sums) set.clear();
        const auto read_ahead = [&] {
            if (row > 0) return;  // for the tiles below, panels are in cache
            // Behind the end of these panels come the next ones.
            const uint8_t *ahead = q + away + (q + away < end ? 0 : (N - 1) * stride);
            for (int n = 0; n < N; n++)
                for (int v = 0; v < BITS; v++) prefetch_into<CACHE>(ahead + n * stride + v * 64);
        };
        if constexpr (HALVES) {
            if (b % 2 == 0) {
                read_ahead();
                add_steps<KIND, 0, HALF>(sums, q, stride, o.x, table);
            } else {
                add_steps<KIND, HALF, STEPS>(sums, q, stride, o.x, table);
                q += 64 * BITS;
            }
        } else {
            for (int64_t s = 0; s < o.steps; s += STEPS, q += 64 * BITS) {
                read_ahead();
                const int8_t *from = o.x + s * (STEP * S * OPERAND_BYTES);
                add_steps<KIND, 0, STEPS>(sums, q, stride, from, table);
            }
        }
        if constexpr (SETS > 1)
            for (int i = 1; i < SETS; i++) sums[0].join(sums[i]);
        if constexpr (S % OPERAND_PLANES<2> == 0 && !WIDENS)
            if (x.planes == 2) sums[0].template finish<2>(o, 0);
        if (x.planes == 1) sums[0].template finish<1>(o, 0);
    }
}

#if GEMV_IN_WORDS
// The same of a tile of activations of int16, and weights that become int16 with their zeros, but
// for those of 8 bits, which lose their middle to leave room for sums: from more rows on than the
// tiles above have, units are busy, and what is left to save is unpacking.
template <int KIND> constexpr bool CENTERED = KIND == 8 || KIND > WITH_LEVELS;

// What it takes of a weight besides the integers.
struct WordsOf {
    Table table;
    VI middle;
};

template <int KIND, int FIRST, int END, int EVERY, int R, int T = FIRST>
INLINE inline void add_words_of_steps(Sums<R, 2> &sums, VI (&pairs)[2], const uint8_t *q,
                                      int64_t stride, const int8_t *x, const WordsOf &of) {
    const VI bytes[] = {integers_of<KIND, T>(q, of.table),
                        integers_of<KIND, T>(q + stride, of.table)};
    VI even[] = {even_words(bytes[0]), even_words(bytes[1])};
    VI odd[] = {odd_words(bytes[0]), odd_words(bytes[1])};
    for (int n = 0; n < 2; n++) {
        if (CENTERED<KIND>) {
            even[n] = sub_words(even[n], of.middle);
            odd[n] = sub_words(odd[n], of.middle);
        }
        if (EVERY > 1) pairs[n] = dot_words(pairs[n], even[n], odd[n]);
    }
    sums.template add_words<EVERY>(even, odd, x + (T - FIRST) * R * WORD_STEP_BYTES);
    if constexpr (T + 1 < END)
        add_words_of_steps<KIND, FIRST, END, EVERY, R, T + 1>(sums, pairs, q, stride, x, of);
}

// Two panels, or one, times the R rows of a tile from `row` on.
template <int KIND, int R, int EVERY>
__attribute__((noinline)) void gemv_words(const Linear &a, const Activations &x, int64_t row,
                                          int64_t panel, int64_t panels, Grid &grid, float *out) {
    constexpr int BITS = HELD_BITS<KIND>;
    const WordsOf of = {load_table(KIND > WITH_LEVELS ? a.levels : a.q),
                        set_words(int16_t(1 << (a.bits - 1)))};
    const int64_t size = x.k_blocks * 64 * BITS, stride = panels < 2 ? 0 : size;
    const uint8_t *q = a.q + panel * size, *end = q + size;
    Operands o = operands_of(a, out);
    grid.end = 0;  // what it has is of other panels
    for (int64_t b = 0; b < x.blocks; b++) {
        const int64_t group = x.block[b].group;
        if (group >= grid.end)
            grid.load(a, panel, 2, group, Grid::ROOM / 2, stride ? 1 : 0, CENTERED<KIND>);
        grid.point(o, a, group, 2);
        point_at(o, x, b, row);
        Sums<R, 2> sums;
        sums.clear();
        VI pairs[2] = {zero_i(), zero_i()};
        const auto read_ahead = [&] {
            if (row > 0) return;
            const uint8_t *ahead = q + machine.ahead + (q + machine.ahead < end ? 0 : stride);
            for (int v = 0; v < BITS; v++) {
                prefetch_into<2>(ahead + v * 64);
                prefetch_into<2>(ahead + stride + v * 64);
            }
        };
        if constexpr (HALVES) {
            if (b % 2 == 0) {
                read_ahead();
                add_words_of_steps<KIND, 0, HALF, EVERY>(sums, pairs, q, stride, o.x, of);
            } else {
                add_words_of_steps<KIND, HALF, STEPS, EVERY>(sums, pairs, q, stride, o.x, of);
                q += 64 * BITS;
            }
        } else {
            for (int64_t s = 0; s < o.steps; s += STEPS, q += 64 * BITS) {
                read_ahead();
                const int8_t *from = o.x + s * R * WORD_STEP_BYTES;
                add_words_of_steps<KIND, 0, STEPS, EVERY>(sums, pairs, q, stride, from, of);
            }
        }
        alignas(64) int32_t w_pairs[2 * LANES];
        for (int n = 0; n < 2; n++) store_i(w_pairs + n * LANES, pairs[n]);
        o.w_pairs = w_pairs;
        sums.template finish_words<EVERY, CENTERED<KIND>>(o, 0);
    }
}
#endif

// What multiplies a tile of so many rows, and with how many panels at once.
struct Gemv {
    void (*multiply)(const Linear &, const Activations &, int64_t, int64_t, int64_t, Grid &,
                     float *);
    int64_t panels;
};

// What a weight's integers are, as the functions above take it: KIND.
constexpr int FIRST_KIND = WITH_LEVELS + (WIDENS ? SHORT_SUM_BITS : LEVEL_BITS);
inline int64_t kind_of(const Linear &a) {
    return a.levels ? WITH_LEVELS + (WIDENS ? a.bits : LEVEL_BITS) : a.bits;
}
constexpr int next_kind(int kind) {
    if (kind <= WITH_LEVELS || kind - 1 > WITH_LEVELS + LEVEL_BITS) return kind - 1;
    return WIDENS ? SHORT_SUM_BITS : 8;
}

template <int S, int KIND = FIRST_KIND>
Gemv gemv_of_kind(const Linear &a) {
    if constexpr (KIND > 1)
        if (kind_of(a) != KIND) return gemv_of_kind<S, next_kind(KIND)>(a);
    constexpr int N = VECTORS == 1 && S > 2 ? 2 : 1;
    if constexpr (3 * S <= HELD_BITS<KIND>)  // few operands take less time than memory
        if (machine.into_first) return {gemv<KIND, S, N, 1>, N};
    return {gemv<KIND, S, N, 2>, N};
}

template <int S = GEMV_OPERANDS> Gemv gemv_of(const Linear &a, int64_t operands) {
    if constexpr (S > 1)
        if (operands < S) return gemv_of<S - 1>(a, operands);
    return gemv_of_kind<S>(a);
}

#if GEMV_IN_WORDS
template <int R, int EVERY, int KIND = FIRST_KIND>
Gemv gemv_words_of_kind(const Linear &a) {
    if constexpr (KIND > 1)
        if (kind_of(a) != KIND) return gemv_words_of_kind<R, EVERY, next_kind(KIND)>(a);
    return {gemv_words<KIND, R, EVERY>, 2};
}

template <int R> Gemv gemv_words_of(const Linear &a) {
    // Every other row is multiplied as it is: sums take the time of unpacking, too.
    if constexpr (R == GEMV_WORD_ROWS && !HALVES)
        if (machine.spare_adders) return gemv_words_of_kind<R, 2>(a);
    return gemv_words_of_kind<R, 1>(a);
}
#endif

// What multiplies a tile of so many rows as they lie.
template <int P, int R = GEMV_WORD_ROWS>
Gemv gemv_of_rows(const Linear &a, [[maybe_unused]] const Activations &x, int64_t rows) {
#if GEMV_IN_WORDS
    if constexpr (IN_WORDS_OF_FEW<P>)
        if (x.words) {
            if constexpr (R > 2)
                if (rows < R) return gemv_of_rows<P, R - 2>(a, x, rows);
            return gemv_words_of<R>(a);
        }
#endif
    return gemv_of(a, rows * OPERAND_PLANES<P>);
}

// Panels up to `end` times all rows, a tile after the other while the panels are in cache.
template <int P>
void gemv_rows(const Linear &a, const Activations &x, int64_t first, int64_t panel,
                       int64_t end, float *sums) {
    const Gemv full = gemv_of_rows<P>(a, x, x.tile_rows);
    const Gemv last = gemv_of_rows<P>(a, x, (x.held_rows - 1) % x.tile_rows + 1);
    const int64_t together = x.held_rows < x.tile_rows ? last.panels : full.panels;
    Grid grid{};
    for (int64_t panels; panel < end; panel += panels) {
        panels = smaller(together, end - panel);
        for (int64_t row = 0; row < x.rows; row += x.tile_rows) {
            const int64_t rows = smaller(x.tile_rows, x.rows - row);
            const Gemv &some_rows = row + x.tile_rows > x.held_rows ? last : full;
            for (int64_t n = 0; n < panels; n += some_rows.panels) {
                const int64_t some = smaller(some_rows.panels, panels - n);
                for (int64_t i = 0; i < x.tile_rows * GROUP_LANES; i += WIDTH)
                    store_f(sums + i, set_f(0));
                some_rows.multiply(a, x, row, panel + n, some, grid, sums);
                finish<P>(a, x, first, row, rows, panel + n, some, sums, grid.scales);
            }
        }
        for (int64_t r = 0; r < x.rows; r++)
            if (x.fallback[r]) multiply_fallback_row(a, first + r, panel, panels);
    }
}
#else
template <int P> constexpr int64_t GEMV_TILE_ROWS = 0;
template <int P> constexpr int64_t GEMV_MAX_ROWS = 0;  // other paths do not unpack in registers
constexpr int64_t GEMV_WORD_ROWS = 0;
template <int P>
void gemv_rows(const Linear &, const Activations &, int64_t, int64_t, int64_t, float *);
#endif

}  // namespace
}  // namespace qllm
