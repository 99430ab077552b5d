// Attention of whole sequences to themselves, and its gradients: what tuning needs.
//
// Queries come SQUARE at a time and keys, too. The way back computes their weights once more, from
// what each query keeps of its softmax, so that no product is larger than the first cache
// (FlashAttention-2, Dao 2023, arXiv:2307.08691).
#pragma once

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "operands.h"
#include "prefetch.h"
#include "slot_products.h"
#include "softmax.h"
#include "threads.h"

namespace qllm {
namespace {

constexpr int64_t SQUARE = 64;

// How what is computed is laid out, of one sequence and one head of keys.
template <bool PAIR> struct Shape {
    static constexpr int64_t UNIT = PAIR ? 2 : 1;  // of what is summed over, in a slot
    int64_t blocks, tokens;  // of SQUARE tokens, and their tokens
    int64_t width, slots;    // of a head: its channels, filled up, and the slots of a row

    explicit Shape(const AttendSequences &a)
        : blocks((a.length + SQUARE - 1) / SQUARE),
          tokens(blocks * SQUARE),
          width(filled_up(a.dim, WIDTH > BLOCK_ROWS ? WIDTH : BLOCK_ROWS)),
          slots(filled_up(width, UNIT * WIDTH) / UNIT) {}
    int64_t row_slots() const { return tokens * slots; }           // of all rows, along them
    int64_t token_slots() const { return tokens / UNIT * width; }  // of all columns
};

// A head of all tokens of a sequence, its rows `stride` elements apart.
struct Head {
    const void *x;
    int64_t at, stride;
};

// Rows along their channels: (tokens, slots). They lie far apart: each is asked for ahead of time.
template <int64_t TYPE, bool PAIR>
void take_rows(const AttendSequences &a, const Shape<PAIR> &shape, Head head, float *to) {
    constexpr int64_t AHEAD = 16;
    const char *rows = static_cast<const char *>(head.x) + head.at * SIZE<TYPE>;
    const int64_t stride = head.stride * SIZE<TYPE>, bytes = a.dim * SIZE<TYPE>;
    prefetch_rows<false>(rows, stride, bytes, smaller(AHEAD, a.length));
    for (int64_t t = 0; t < a.length; t++, to += shape.slots) {
        if (t + AHEAD < a.length) prefetch_rows<false>(rows + (t + AHEAD) * stride, 0, bytes, 1);
        along_row<TYPE, PAIR>(head.x, head.at + t * head.stride, a.dim, to, shape.slots);
    }
    for (int64_t i = 0; i < (shape.tokens - a.length) * shape.slots; i++) to[i] = 0;
}

// The same, transposed within each block: (blocks, slots, SQUARE).
template <bool PAIR>
void transpose_rows(const Shape<PAIR> &shape, const float *rows, float *to) {
    for (int64_t t = 0; t < shape.tokens; t += WIDTH)
        for (int64_t s = 0; s < shape.slots; s += WIDTH) {
            VF square[WIDTH];
            for (int64_t i = 0; i < WIDTH; i++)
                square[i] = load_f(rows + (t + i) * shape.slots + s);
            transpose(square);
            float *block = to + (t / SQUARE * shape.slots + s) * SQUARE + t % SQUARE;
            for (int64_t i = 0; i < WIDTH; i++) store_f(block + i * SQUARE, square[i]);
        }
}

// Element `i` of rows, and those behind it in its vector.
template <bool PAIR> VF load_row(const float *rows, int64_t i) {
    return load_all<PAIR ? BFLOAT16 : FLOAT32>(rows, i);
}

// The rows along the tokens: (tokens / UNIT, width).
template <bool PAIR> void take_columns(const Shape<PAIR> &shape, const float *rows, float *to) {
    constexpr int64_t UNIT = Shape<PAIR>::UNIT;
    for (int64_t t = 0; t < shape.tokens; t += UNIT, to += shape.width)
        for (int64_t d = 0; d < shape.width; d += WIDTH)
            store_f(to + d, side_by_side<PAIR>(
                                load_row<PAIR>(rows, t * shape.slots * UNIT + d),
                                load_row<PAIR>(rows, (t + UNIT - 1) * shape.slots * UNIT + d)));
}

// The keys that a query at `position` sees: [begin, position].
inline int64_t first_key(const AttendSequences &a, int64_t position) {
    return unseen(a.window, position);
}

// Scores from products, in place, but for the slope: scaled and capped.
inline VF score_of(const AttendSequences &a, VF product) {
    return a.cap > 0 ? capped(product, float(a.scale), float(a.cap))
                     : mul_f(product, set_f(float(a.scale)));
}

// What is kept of the softmax of each query: the largest score, and one over the sum.
inline float *stats_of(const AttendSequences &a, int64_t sequence, int64_t head) {
    return a.stats + (sequence * a.heads + head) * a.length * 2;
}

inline float slope_of(const AttendSequences &a, int64_t head) {
    return a.slopes ? a.slopes[head] : 0;
}

// The part of a head's tensor (tokens, heads, dim) that is of one sequence.
inline Head head_of(const AttendSequences &a, const void *x, int64_t stride, int64_t sequence,
                    int64_t head) {
    return {x, sequence * a.length * stride + head * a.dim, stride};
}

// Memory, one part of it after the other.
struct Parts {
    float *next;
    float *take(int64_t count) {
        float *part = next;
        next += filled_up(count, 16);
        return part;
    }
};

template <int64_t TYPE, bool PAIR>
void attend_head(const AttendSequences &a, int64_t sequence, int64_t kv, float *memory) {
    const Shape<PAIR> shape(a);
    Parts parts = {memory};
    float *rows = parts.take(shape.row_slots()), *keys = parts.take(shape.row_slots());
    float *values = parts.take(shape.token_slots()), *scores = parts.take(SQUARE * shape.tokens);
    float *weights = parts.take(SQUARE * shape.tokens), *out = parts.take(SQUARE * shape.width);
    const int64_t weight_slots = shape.tokens / shape.UNIT, repeats = a.heads / a.kv_heads;
    take_rows<TYPE, PAIR>(a, shape, head_of(a, a.k, a.k_stride, sequence, kv), rows);
    transpose_rows(shape, rows, keys);
    take_rows<TYPE, PAIR>(a, shape, head_of(a, a.v, a.v_stride, sequence, kv), rows);
    take_columns(shape, rows, values);
    for (int64_t head = kv * repeats; head < (kv + 1) * repeats; head++) {
        take_rows<TYPE, PAIR>(a, shape, head_of(a, a.q, a.q_stride, sequence, head), rows);
        float *stats = stats_of(a, sequence, head);
        for (int64_t start = 0; start < a.length; start += SQUARE) {
            const int64_t begin = first_key(a, start) / SQUARE * SQUARE, end = start + SQUARE;
            for (int64_t j = begin; j < end; j += SQUARE)
                multiply<PAIR>({rows + start * shape.slots, shape.slots, 1, keys + j * shape.slots,
                                SQUARE, shape.slots, scores + j, shape.tokens},
                               SQUARE, SQUARE);
            for (int64_t i = start; i < end; i++) {
                float *row = scores + (i - start) * shape.tokens;
                // Queries behind the last token are no one's.
                const int64_t first = first_key(a, i), seen = i < a.length ? i + 1 - first : 0;
                float share = 0;
                if (seen) {
                    for (int64_t j = first; a.cap > 0 && j <= i; j += WIDTH)
                        store<FLOAT32>(row, j, i + 1 - j,
                                       score_of(a, load<FLOAT32>(row, j, i + 1 - j)));
                    float largest =
                        scale_scores(row + first, seen, a.cap > 0 ? 1 : float(a.scale),
                                     slope_of(a, head), first - i);
                    share = 1 / exponents(row + first, seen, &largest,
                                          a.sinks ? a.sinks + head : nullptr);
                    stats[2 * i] = largest;
                    stats[2 * i + 1] = share;
                }
                for (int64_t j = begin; j < first + seen; j += WIDTH) {
                    const int64_t count = first + seen - j;
                    store<FLOAT32>(row, j, count,
                                   mul_f(load<FLOAT32>(row, j, count), set_f(share)));
                }
                for (int64_t j = begin; j < smaller(first, end); j++) row[j] = 0;
                for (int64_t j = first + seen; j < end; j++) row[j] = 0;
                along_row<FLOAT32, PAIR>(row, begin, end - begin,
                                         weights + (i - start) * weight_slots,
                                         (end - begin) / shape.UNIT);
            }
            multiply<PAIR>({weights, weight_slots, 1, values + begin / shape.UNIT * shape.width,
                            shape.width, (end - begin) / shape.UNIT, out, shape.width},
                           SQUARE, shape.width);
            for (int64_t i = start; i < smaller(end, a.length); i++)
                for (int64_t d = 0; d < a.dim; d += WIDTH)
                    store<TYPE>(a.y, ((sequence * a.length + i) * a.heads + head) * a.dim + d,
                                a.dim - d, load_f(out + (i - start) * shape.width + d));
        }
    }
}

// What the weights of a block of queries and one of keys, and the gradients of their scores, are.
struct Square {
    int64_t start, first;  // of the queries, and of the keys
    float slope;
    const float *stats;    // of the head
    const float *inner;    // of each query, its result times the gradient by it
    float *weights;        // (SQUARE, SQUARE): products of queries and keys come in
    float *grad_scores;    // the same: gradients of weights come in
};

inline void block_gradients(const AttendSequences &a, const Square &b) {
    for (int64_t i = 0; i < SQUARE; i++) {
        const int64_t position = b.start + i, begin = first_key(a, position) - b.first;
        const int64_t end = position < a.length ? smaller(position + 1 - b.first, SQUARE) : 0;
        float *weights = b.weights + i * SQUARE, *grad_scores = b.grad_scores + i * SQUARE;
        if (end <= 0 || begin >= SQUARE) {
            for (int64_t j = 0; j < SQUARE; j++) weights[j] = grad_scores[j] = 0;
            continue;
        }
        const VF largest = set_f(b.stats[2 * position]), share = set_f(b.stats[2 * position + 1]);
        const VF inner = set_f(b.inner[position]), slope = set_f(b.slope);
        for (int64_t j = 0; j < SQUARE; j += WIDTH) {
            VF score = score_of(a, load_f(weights + j)), derivative = set_f(float(a.scale));
            if (a.cap > 0) {
                const VF u = div_f(score, set_f(float(a.cap)));  // whose derivative is 1 - u^2
                derivative = mul_f(derivative, sub_f(set_f(1), mul_f(u, u)));
            }
            if (b.slope != 0) {
                const VF distance = set_f(float(b.first + j - position));
                score = fma_f(slope, add_f(load_f(LANE), distance), score);
            }
            const VF weight = mul_f(exp_f(sub_f(score, largest)), share);
            const VF grad_score = mul_f(weight, sub_f(load_f(grad_scores + j), inner));
            store_f(weights + j, weight);
            store_f(grad_scores + j, mul_f(grad_score, derivative));
        }
        for (int64_t j = 0; j < begin; j++) weights[j] = grad_scores[j] = 0;
        for (int64_t j = end; j < SQUARE; j++) weights[j] = grad_scores[j] = 0;
    }
}

// Rows of a block (SQUARE, SQUARE) as slots along the queries: (SQUARE / UNIT, SQUARE).
template <bool PAIR> void block_columns(const float *block, float *to) {
    constexpr int64_t UNIT = PAIR ? 2 : 1;
    for (int64_t i = 0; i < SQUARE; i += UNIT, to += SQUARE)
        for (int64_t j = 0; j < SQUARE; j += WIDTH)
            store_f(to + j, side_by_side<PAIR>(load_f(block + i * SQUARE + j),
                                               load_f(block + (i + UNIT - 1) * SQUARE + j)));
}

// A transposed gradient (width, SQUARE) of a block of tokens from `first` on to rows of `y`.
template <int64_t TYPE>
void store_transposed(const AttendSequences &a, const float *columns, void *y, int64_t heads,
                  int64_t sequence, int64_t head, int64_t first) {
    for (int64_t d = 0; d < a.dim; d += WIDTH)
        for (int64_t t = 0; t < smaller(SQUARE, a.length - first); t += WIDTH) {
            VF square[WIDTH];
            for (int64_t i = 0; i < WIDTH; i++) square[i] = load_f(columns + (d + i) * SQUARE + t);
            transpose(square);
            for (int64_t i = 0; i < smaller(WIDTH, a.length - first - t); i++) {
                const int64_t row = sequence * a.length + first + t + i;
                store<TYPE>(y, (row * heads + head) * a.dim + d, a.dim - d, square[i]);
            }
        }
}

template <int64_t TYPE, bool PAIR>
void attend_head_backward(const AttendSequences &a, int64_t sequence, int64_t kv, float *memory) {
    const Shape<PAIR> shape(a);
    Parts parts = {memory};
    float *queries = parts.take(shape.row_slots());
    float *query_columns = parts.take(shape.token_slots());
    float *back = parts.take(shape.row_slots()), *back_columns = parts.take(shape.token_slots());
    float *keys = parts.take(shape.row_slots()), *key_columns = parts.take(shape.token_slots());
    float *values = parts.take(shape.row_slots()), *inner = parts.take(shape.tokens);
    float *grad_keys = parts.take(shape.tokens * shape.width);
    float *grad_values = parts.take(shape.tokens * shape.width);
    float *grad_queries = parts.take(shape.tokens * shape.width);
    float *weights = parts.take(SQUARE * SQUARE), *grad_scores = parts.take(SQUARE * SQUARE);
    float *weight_columns = parts.take(SQUARE * SQUARE), *score_rows = parts.take(SQUARE * SQUARE);
    float *score_columns = parts.take(SQUARE * SQUARE);
    const int64_t block_slots = SQUARE / shape.UNIT, repeats = a.heads / a.kv_heads;
    const int64_t y_stride = a.heads * a.dim;
    take_rows<TYPE, PAIR>(a, shape, head_of(a, a.k, a.k_stride, sequence, kv), queries);
    transpose_rows(shape, queries, keys);
    take_columns(shape, queries, key_columns);
    take_rows<TYPE, PAIR>(a, shape, head_of(a, a.v, a.v_stride, sequence, kv), queries);
    transpose_rows(shape, queries, values);
    for (int64_t i = 0; i < shape.tokens * shape.width; i++) grad_keys[i] = grad_values[i] = 0;
    for (int64_t head = kv * repeats; head < (kv + 1) * repeats; head++) {
        take_rows<TYPE, PAIR>(a, shape, head_of(a, a.grad_y, y_stride, sequence, head), back);
        take_columns(shape, back, back_columns);
        take_rows<TYPE, PAIR>(a, shape, head_of(a, a.y, y_stride, sequence, head), queries);
        for (int64_t t = 0; t < shape.tokens; t++) {
            const int64_t at = t * shape.slots * shape.UNIT;
            VF sum = set_f(0);
            for (int64_t d = 0; d < shape.width; d += WIDTH)
                sum = fma_f(load_row<PAIR>(queries, at + d), load_row<PAIR>(back, at + d), sum);
            inner[t] = sum_of(sum);
        }
        take_rows<TYPE, PAIR>(a, shape, head_of(a, a.q, a.q_stride, sequence, head), queries);
        take_columns(shape, queries, query_columns);
        for (int64_t i = 0; i < shape.tokens * shape.width; i++) grad_queries[i] = 0;
        for (int64_t first = 0; first < a.length; first += SQUARE)
            for (int64_t start = first; start < a.length; start += SQUARE) {
                // Nor do those behind them see it.
                if (first_key(a, start) >= first + SQUARE) break;
                const auto rows_by = [&](const float *rows, const float *columns, float *to) {
                    multiply<PAIR>({rows + start * shape.slots, shape.slots, 1,
                                    columns + first * shape.slots, SQUARE, shape.slots, to, SQUARE},
                                   SQUARE, SQUARE);
                };
                rows_by(queries, keys, weights);
                rows_by(back, values, grad_scores);
                block_gradients(a, {start, first, slope_of(a, head), stats_of(a, sequence, head),
                                    inner, weights, grad_scores});
                block_columns<PAIR>(weights, weight_columns);
                block_columns<PAIR>(grad_scores, score_columns);
                for (int64_t i = 0; i < SQUARE; i++)
                    along_row<FLOAT32, PAIR>(grad_scores, i * SQUARE, SQUARE,
                                             score_rows + i * block_slots, block_slots);
                const auto columns_by = [&](const float *columns, const float *block, float *to) {
                    multiply<PAIR, true>({columns + start / shape.UNIT * shape.width, 1,
                                          shape.width, block, SQUARE, block_slots,
                                          to + first * shape.width, SQUARE},
                                         shape.width, SQUARE);
                };
                columns_by(back_columns, weight_columns, grad_values);
                columns_by(query_columns, score_columns, grad_keys);
                multiply<PAIR, true>({score_rows, block_slots, 1,
                                key_columns + first / shape.UNIT * shape.width, shape.width,
                                block_slots, grad_queries + start * shape.width, shape.width},
                               SQUARE, shape.width);
            }
        for (int64_t t = 0; t < a.length; t++)
            for (int64_t d = 0; d < a.dim; d += WIDTH)
                store<TYPE>(a.grad_q, ((sequence * a.length + t) * a.heads + head) * a.dim + d,
                            a.dim - d, load_f(grad_queries + t * shape.width + d));
    }
    for (int64_t first = 0; first < a.length; first += SQUARE) {
        const int64_t at = first * shape.width;
        store_transposed<TYPE>(a, grad_keys + at, a.grad_k, a.kv_heads, sequence, kv, first);
        store_transposed<TYPE>(a, grad_values + at, a.grad_v, a.kv_heads, sequence, kv, first);
    }
}

// Upper limits of what the two need of memory, in elements.
template <bool PAIR> int64_t attend_memory(const AttendSequences &a, bool back) {
    const Shape<PAIR> shape(a);
    const int64_t of_tokens = shape.row_slots() > shape.tokens * shape.width
                                  ? shape.row_slots() : shape.tokens * shape.width;
    return back ? 11 * of_tokens + shape.tokens + 5 * SQUARE * SQUARE + 16 * 16
                : 3 * of_tokens + 2 * SQUARE * shape.tokens + SQUARE * shape.width + 6 * 16;
}

template <int64_t TYPE> Status attend_whole(const AttendSequences &a, bool back) {
    constexpr bool PAIR = HAS_PAIRS && TYPE == BFLOAT16;
    const size_t bytes = size_t(attend_memory<PAIR>(a, back)) * sizeof(float);
    const int64_t work = a.sequences * a.heads * a.length * a.length * a.dim;
    bool no_memory = false;
    for_each(a.sequences * a.kv_heads, work > WORTH_THREADS, [&](int64_t i, int64_t) {
        float *memory = static_cast<float *>(scratch(bytes));
        if (!memory) {
            __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
        } else if (back) {
            attend_head_backward<TYPE, PAIR>(a, i / a.kv_heads, i % a.kv_heads, memory);
        } else {
            attend_head<TYPE, PAIR>(a, i / a.kv_heads, i % a.kv_heads, memory);
        }
    });
    return no_memory ? Status::NO_MEMORY : Status::OK;
}

static Status attend_sequences(const AttendSequences &a) {
    return BY_TYPE(a.type, attend_whole, a, false);
}
static Status attend_sequences_backward(const AttendSequences &a) {
    return BY_TYPE(a.type, attend_whole, a, true);
}

}  // namespace
}  // namespace qllm
