// Attention of prompts on AMX, in bfloat16 and float16: products of queries with keys, and of their
// weights with values, are of tiles.
//
// What is not a bfloat16 is two: queries that RoPE has turned, weights, and all of float16. Of two
// such numbers the product of the lower parts is left out, 2^-16 of the whole. So errors are those
// of float32's sums, nearly. Scores become weights as in prefill_attention.h, in float32.
//
// Results of a query do not depend on what others there are: a row of a tile is a sum over all
// tokens in their order, of which those that it does not see weigh nothing.
#pragma once

#include "attention.h"
#include "dense_tile_amx.h"
#include "isa.h"
#include "kernels.h"
#include "prefill_attention.h"
#include "threads.h"
#include "tile_amx.h"

namespace qllm {
namespace {

constexpr int64_t TILE_TOKENS = 2 * LANES;     // whose values are the inputs of one tile
constexpr int64_t TILE_QUERIES = 2 * ROWS;     // that a thread takes at once
constexpr int64_t OPERAND = LANES * ROWS;      // slots of a tile: pairs of bfloat16
constexpr int64_t PARTS = 2;                   // that queries and weights consist of
constexpr int64_t ALL_ROWS = PARTS * TILE_QUERIES * LANES;  // slots of those of a chunk of inputs

// A run of tokens of one sequence as tiles take it, some heads of keys and values at a time.
//
//   keys    (heads, P, tokens / LANES, dim / 2, LANES) slots of two channels of a token
//   values  (heads, P, tokens / TILE_TOKENS, dim / LANES, ROWS, LANES) of two tokens' channel
//
// of P parts, dim filled up to whole tiles, and tokens too, from `begin` on, a multiple of RUN.
struct TileSequence {
    Sequence s;
    int64_t parts, key_dim, value_tiles, tokens;
    float *keys, *values;
    bool *finite;  // becomes false where some key or value is not

    int64_t keys_size() const { return tokens * key_dim / 2; }  // of a part of a head
    int64_t values_size() const { return tokens / TILE_TOKENS * value_tiles * OPERAND; }
    float *keys_of(int64_t kv, int64_t part) const {
        return keys + (kv * parts + part) * keys_size();
    }
    float *values_of(int64_t kv, int64_t part) const {
        return values + (kv * parts + part) * values_size();
    }
};

// To the nearest bfloat16, halves to even, as float32: of numbers that are finite.
INLINE inline VF upper_part(VF v) {
    const VI bits = bits_of(v), odd = and_i(shift_right<16>(bits), set_i(1));
    const VI rounded = add_i(bits, add_i(odd, set_i(0x7FFF)));
    return as_float(and_i(rounded, set_i(int32_t(0xFFFF0000))));
}

// TILE_TOKENS tokens of a head of keys and values to what is shared, and the new ones to the cache.
// `memory`: of two tokens' channels times TILE_TOKENS.
static void share_tiles(const Attend &a, const TileSequence &t, int64_t index, int64_t block,
                        float *memory) {
    const Sequence &s = t.s;
    const int64_t kv = s.kv_head + index, first = s.begin + block * TILE_TOKENS;
    const int64_t end = smaller(first + TILE_TOKENS, s.length), width = t.value_tiles * LANES;
    const int64_t stride = t.key_dim > width ? t.key_dim : width;
    float *keys = memory, *values = memory + TILE_TOKENS * stride;
    if (const int64_t next = first > s.past ? first : s.past; next < end) {
        fetch_heads(a, s.token + next - s.past, a.heads + kv, end - next);
        fetch_heads(a, s.token + next - s.past, a.heads + a.kv_heads + kv, end - next);
    }
    VI largest = zero_i();
    const int64_t at = (s.row * a.kv_heads + kv) * a.capacity;
    for (int64_t j = 0; j < TILE_TOKENS; j++) {
        float *key = keys + j * stride, *value = values + j * stride;
        const int64_t token = first + j, channels = token < end ? a.dim : 0;
        if (channels) {
            load_token(a, s, kv, token, false, key);
            load_token(a, s, kv, token, true, value);
            if (token >= s.past) {
                store_head(key, a, a.keys, (at + token % a.capacity) * a.dim);
                store_head(value, a, a.values, (at + token % a.capacity) * a.dim);
            }
        }
        for (int64_t d = 0; d < stride; d += WIDTH) {
            const VF some_key = first_of(load_f(key + d), channels - d);
            const VF some_value = first_of(load_f(value + d), channels - d);
            store_f(key + d, some_key);
            store_f(value + d, some_value);
            largest = max_i(largest, max_i(bits_of(abs_f(some_key)), bits_of(abs_f(some_value))));
        }
    }
    if (max_of_i(largest) >= 255 << 23) __atomic_store_n(t.finite, false, __ATOMIC_RELAXED);
    for (int64_t part = 0; part < t.parts; part++) {
        const auto of_part = [=](const float *from) {
            const VF v = load_f(from), upper = upper_part(v);
            return part ? sub_f(v, upper) : upper;
        };
        for (int64_t tile = 0; tile < TILE_TOKENS / LANES; tile++)
            for (int64_t d = 0; d < t.key_dim; d += 2 * WIDTH) {
                VF square[WIDTH];
                for (int64_t j = 0; j < LANES; j++) {
                    const float *from = keys + (tile * LANES + j) * stride + d;
                    square[j] = as_pairs(of_part(from), of_part(from + WIDTH));
                }
                transpose(square);
                float *to = t.keys_of(index, part) +
                            ((block * 2 + tile) * t.key_dim / 2 + d / 2) * LANES;
                for (int64_t i = 0; i < WIDTH; i++) store_f(to + i * LANES, square[i]);
            }
        for (int64_t d = 0; d < width; d += LANES) {
            float *to = t.values_of(index, part) +
                        (block * t.value_tiles + d / LANES) * OPERAND;
            for (int64_t j = 0; j < TILE_TOKENS; j += 2) {
                const float *from = values + j * stride + d;
                store_f(to + j / 2 * LANES,
                        interleaved_pairs(of_part(from), of_part(from + stride)));
            }
        }
    }
}

// Where products of two by two tiles are: rows (chunks, PARTS, TILE_QUERIES, LANES), columns `next`
// slots from one tile to the next, `apart` from one chunk to the next, `lower` to their lower part.
struct TileProduct {
    const float *rows, *columns;
    int64_t chunks, next, apart, lower;
};

// Adds a chunk's products of rows from `x` on and columns from `w` on.
template <int X, int W> INLINE inline void add_tile_products() {
    add_pairs<0, X_TILE, W_TILE>();
    if constexpr (X == 2) add_pairs<2, X_TILE + 1, W_TILE>();
    if constexpr (W == 2) add_pairs<1, X_TILE, W_TILE + 1>();
    if constexpr (X == 2 && W == 2) add_pairs<3, X_TILE + 1, W_TILE + 1>();
}
template <int X> INLINE inline void load_rows(const float *x) {
    load_tile<X_TILE>(x, ROW_BYTES);
    if constexpr (X == 2) load_tile<X_TILE + 1>(x + OPERAND, ROW_BYTES);
}
template <int W> INLINE inline void load_columns(const float *w, int64_t next) {
    load_tile<W_TILE>(w, ROW_BYTES);
    if constexpr (W == 2) load_tile<W_TILE + 1>(w + next, ROW_BYTES);
}

// Sums over all chunks, to rows `stride` floats apart.
template <int P, int X, int W>
__attribute__((noinline)) void multiply_tiles(const TileProduct &t, float *to, int64_t stride) {
    clear_sums<X, W>();
    const float *x = t.rows, *w = t.columns;
    for (int64_t chunk = 0; chunk < t.chunks; chunk++, x += ALL_ROWS, w += t.apart) {
        load_rows<X>(x);
        load_columns<W>(w, t.next);
        add_tile_products<X, W>();
        if constexpr (P == 2) {
            load_columns<W>(w + t.lower, t.next);
            add_tile_products<X, W>();
            load_columns<W>(w, t.next);
        }
        load_rows<X>(x + ALL_ROWS / PARTS);
        add_tile_products<X, W>();
    }
    store_sums<X, W>(to, ROWS * stride, LANES, stride * 4);
}

template <int P>
void multiply_tiles(const TileProduct &t, int64_t rows, int64_t columns, float *to,
                    int64_t stride) {
    if (rows > ROWS)
        return columns > 1 ? multiply_tiles<P, 2, 2>(t, to, stride)
                           : multiply_tiles<P, 2, 1>(t, to, stride);
    return columns > 1 ? multiply_tiles<P, 1, 2>(t, to, stride)
                       : multiply_tiles<P, 1, 1>(t, to, stride);
}

// 2 WIDTH numbers of a row to both parts of a chunk.
INLINE inline void store_parts(float *chunk, int64_t row, VF first, VF second) {
    const VF first_upper = upper_part(first), second_upper = upper_part(second);
    float *to = chunk + row * LANES;
    store_f(to, as_pairs(first_upper, second_upper));
    store_f(to + ALL_ROWS / PARTS,
            as_pairs(sub_f(first, first_upper), sub_f(second, second_upper)));
}

// What a thread has of its own: queries, scores, weights, results, and a head.
struct TileMemory {
    int64_t queries, scores, weights, results, head, all, stride;
};
static TileMemory tile_memory(const Attend &a, const TileSequence &t) {
    const int64_t width = t.value_tiles * LANES, key_chunks = t.key_dim / TILE_TOKENS;
    const int64_t longer = t.key_dim > width ? t.key_dim : width;
    TileMemory m;
    m.stride = t.tokens + LANES;  // rows of scores lie in different places of the first cache
    m.queries = 0;
    m.scores = m.queries + key_chunks * ALL_ROWS;
    m.weights = m.scores + TILE_QUERIES * m.stride;
    m.results = m.weights + t.tokens / TILE_TOKENS * ALL_ROWS;
    m.head = m.results + TILE_QUERIES * width;
    m.all = m.head + 2 * TILE_TOKENS * longer + (a.width + LANES) / LANES * LANES;
    return m;
}

// Queries of one head from `start` on, a multiple of TILE_QUERIES, to `end`, that are asked for.
template <int P>
void attend_tiles(const Attend &a, const TileSequence &t, int64_t head, int64_t start, int64_t end,
                  float *memory) {
    const Sequence &s = t.s;
    const int64_t kv = head / (a.heads / a.kv_heads) - s.kv_head;
    const int64_t position = start > s.asked ? start : s.asked, count = end - position;
    const TileMemory at = tile_memory(a, t);
    float *queries = memory + at.queries, *scores = memory + at.scores;
    float *weights = memory + at.weights, *results = memory + at.results;
    float *one = memory + at.head;
    const float slope = a.slopes ? a.slopes[head] : 0;
    // Tiles of tokens that some of these see.
    const int64_t begin = (unseen(a.window, position) - s.begin) / TILE_TOKENS;
    const int64_t tiles = (end - s.begin + TILE_TOKENS - 1) / TILE_TOKENS;
    fetch_heads(a, s.token + position - s.past, head, count);
    for (int64_t i = 0; i < dense_tile_rows(count); i++) {
        if (i < count) {
            load_head(one, a, s.token + position + i - s.past, head);
            rotate(one, a, s.token + position + i - s.past);
        }
        for (int64_t d = 0; d < t.key_dim; d += 2 * WIDTH) {
            const int64_t channels = i < count ? a.dim - d : 0;
            store_parts(queries + d / TILE_TOKENS * ALL_ROWS, i,
                        first_of(load_f(one + d), channels),
                        first_of(load_f(one + d + WIDTH), channels - WIDTH));
        }
    }
    const TileProduct of_keys = {queries, nullptr, t.key_dim / TILE_TOKENS, t.key_dim / 2 * LANES,
                                 OPERAND, t.keys_size()};
    for (int64_t tile = begin; tile < tiles; tile++) {
        TileProduct product = of_keys;
        product.columns = t.keys_of(kv, 0) + tile * t.key_dim * LANES;
        multiply_tiles<P>(product, count, 2, scores + tile * TILE_TOKENS, at.stride);
    }
    float share[TILE_QUERIES];
    for (int64_t i = 0; i < dense_tile_rows(count); i++) {
        float *row = scores + i * at.stride;
        int64_t first = s.begin, seen = 0;
        if (i < count) {
            first = unseen(a.window, position + i);
            seen = position + i + 1 - first;
            float *seen_row = row + first - s.begin;
            const float scale = cap_scores(a, seen_row, seen);
            float m_i = scale_scores(seen_row, seen, scale, slope, -seen + 1);
            share[i] = 1 / exponents(seen_row, seen, &m_i, a.sinks ? a.sinks + head : nullptr);
        }
        // Tokens in front of the window and behind the query weigh nothing.
        for (int64_t tile = begin; tile < tiles; tile++) {
            float *some = row + tile * TILE_TOKENS;
            const int64_t before = first - s.begin - tile * TILE_TOKENS, behind = before + seen;
            if (before > 0 || behind < TILE_TOKENS)
                for (int64_t j = 0; j < TILE_TOKENS; j++)
                    if (j < before || j >= behind) some[j] = 0;
            store_parts(weights + tile * ALL_ROWS, i, load_f(some), load_f(some + WIDTH));
        }
    }
    const int64_t width = t.value_tiles * LANES;
    for (int64_t d = 0; d < t.value_tiles; d += 2) {
        const float *values = t.values_of(kv, 0) + (begin * t.value_tiles + d) * OPERAND;
        const TileProduct product = {weights + begin * ALL_ROWS, values, tiles - begin, OPERAND,
                                     t.value_tiles * OPERAND, t.values_size()};
        multiply_tiles<P>(product, count, t.value_tiles - d, results + d * LANES, width);
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t result = s.result + position + i - s.asked;
        for (int64_t d = 0; d < a.dim; d += WIDTH)
            store_as(a.y, (result * a.heads + head) * a.dim + d, a.type, a.dim - d,
                     mul_f(load_f(results + i * width + d), set_f(share[i])));
    }
}

// The run of tokens of one sequence. Where some of its keys or values are not finite, tiles would
// put them into the results of queries that do not see them: `finite` becomes false, and results
// are to be made in another way.
template <int P> Status attend_run_in_tiles(const Attend &a, int64_t index, bool *finite) {
    TileSequence t;
    Sequence &s = t.s = sequence_of(a, index);
    const int64_t shared = a.heads / a.kv_heads;
    t.parts = P;
    t.key_dim = (a.dim + TILE_TOKENS - 1) / TILE_TOKENS * TILE_TOKENS;
    t.value_tiles = (a.dim + LANES - 1) / LANES;
    t.tokens = (s.count + TILE_TOKENS - 1) / TILE_TOKENS * TILE_TOKENS;
    t.finite = finite;
    *finite = true;
    const int64_t of_head = P * (t.keys_size() + t.values_size());
    const int64_t fitting = max_threads() * SHARED_BYTES / 4 / of_head;
    const int64_t at_once = fitting < 1 ? 1 : smaller(fitting, a.kv_heads);
    const int64_t each = (tile_memory(a, t).all + 15) / 16 * 16;
    const int64_t in_all = at_once * of_head;
    float *memory = static_cast<float *>(scratch(size_t((in_all + each * max_threads()) * 4)));
    if (!memory) return Status::NO_MEMORY;
    t.keys = memory;
    t.values = memory + at_once * P * t.keys_size();
    const auto own = [=](int64_t thread) { return memory + in_all + thread * each; };
    const int64_t blocks = t.tokens / TILE_TOKENS;
    const int64_t before = s.asked / TILE_QUERIES * TILE_QUERIES;
    const int64_t parts = (s.length - before + TILE_QUERIES - 1) / TILE_QUERIES;
    for (s.kv_head = 0; s.kv_head < a.kv_heads; s.kv_head += at_once) {
        const int64_t heads = smaller(at_once, a.kv_heads - s.kv_head);
        for_each(heads * blocks, true, [&](int64_t i, int64_t thread) {
            share_tiles(a, t, i / blocks, i % blocks, own(thread));
        });
        if (!*finite) continue;  // what is new is still to come to the cache
        const int64_t count = heads * shared * parts;
        in_threads(count, count / max_threads() / RUN_PARTS + 1, [&](const Share &share) {
            Tiles tiles(nullptr);
            tiles.take_shapes(ROW_BYTES);
            take_parts(share, [&](int64_t i, int64_t stop) {
                for (; i < stop; i++) {
                    const int64_t head = s.kv_head * shared + i / parts;
                    const int64_t start = before + i % parts * TILE_QUERIES;
                    attend_tiles<P>(a, t, head, start, smaller(start + TILE_QUERIES, s.length),
                                    own(share.thread));
                }
            });
        });
    }
    return Status::OK;
}

// What tiles do not know is as on other paths: float32, and keys and values of 8 and 4 bits.
static Status attend_prefill_in_tiles(const Attend &a) {
    for (int64_t i = 0; i < a.sequences; i++) {
        bool finite = false;
        Status status = Status::OK;
        if (a.bits == 16 && a.type == BFLOAT16) status = attend_run_in_tiles<1>(a, i, &finite);
        if (a.bits == 16 && a.type == FLOAT16) status = attend_run_in_tiles<2>(a, i, &finite);
        if (status == Status::OK && !finite) status = attend_run(a, i);
        if (status != Status::OK) return status;
    }
    return Status::OK;
}

}  // namespace
}  // namespace qllm
