// Attention, in float32, of one new token per sequence to the cache.
#pragma once

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "layout.h"
#include "prefetch.h"
#include "quantized_attention.h"
#include "quantized_products.h"
#include "softmax.h"
#include "threads.h"

namespace qllm {
namespace {

// One head rotated by its cosines and sines: the halves (p, q) to (p cos - q sin, q cos + p sin).
static void rotate(float *head, const Attend &a, int64_t row) {
    if (!a.cos) return;
    int64_t half = a.dim / 2;
    for (int64_t i = 0; i < half; i += WIDTH) {
        int64_t count = half - i, at = row * a.dim + i;
        VF p = load_as(head, i, FLOAT32, count), q = load_as(head, half + i, FLOAT32, count);
        VF cos_p = load_as(a.cos, at, a.type, count), sin_p = load_as(a.sin, at, a.type, count);
        VF cos_q = load_as(a.cos, at + half, a.type, count);
        VF sin_q = load_as(a.sin, at + half, a.type, count);
        store_as(head, i, FLOAT32, count, sub_f(mul_f(p, cos_p), mul_f(q, sin_p)));
        store_as(head, half + i, FLOAT32, count, add_f(mul_f(q, cos_q), mul_f(p, sin_q)));
    }
}

static void load_head(float *head, const Attend &a, int64_t row, int64_t index) {
    int64_t start = (row * (a.heads + 2 * a.kv_heads) + index) * a.dim;
    for (int64_t i = 0; i < a.dim; i += WIDTH)
        store_as(head, i, FLOAT32, a.dim - i, load_as(a.qkv, start + i, a.type, a.dim - i));
}

static void store_head(const float *head, const Attend &a, void *to, int64_t at) {
    for (int64_t i = 0; i < a.dim; i += WIDTH)
        store_as(to, at + i, a.type, a.dim - i, load_as(head, i, FLOAT32, a.dim - i));
}

template <int N> struct Count {
    static constexpr int value = N;
};

// Keys and values of up to RUN tokens of a head as they came, from element `start` on.
struct Tokens {
    int64_t start, count;
};

// Heads that share the way of keys and values to float32, as many as registers hold sums of.
constexpr int HEADS_AT_ONCE = WIDTH == 16 ? 4 : WIDTH == 8 ? 2 : 1;

// Queries (dim,), `width` apart, times the keys of some tokens: RUN scores of each.
template <int64_t TYPE, int HEADS>
void score_tokens(const Attend &a, const Tokens &tokens, const float *queries, float *scores,
                  Coming &behind) {
    Coming coming = behind;
    int64_t j = 0;
    for (; j < tokens.count; j += 4) {
        coming.ask(4 * a.dim * SIZE<TYPE>);
        int64_t at[4];  // where there are fewer, the last one again
        for (int64_t t = 0; t < 4; t++)
            at[t] = tokens.start + smaller(j + t, tokens.count - 1) * a.dim;
        VF sums[HEADS][4];
        for (auto &sum : sums)
            for (VF &each : sum) each = set_f(0);
        for (int64_t i = 0; i < a.dim; i += WIDTH) {
            const int64_t count = a.dim - i;
            VF keys[4];
            for (int t = 0; t < 4; t++) keys[t] = load<TYPE>(a.keys, at[t] + i, count);
            for (int h = 0; h < HEADS; h++) {
                const VF query = load_f(queries + h * a.width + i);
                for (int t = 0; t < 4; t++) sums[h][t] = fma_f(query, keys[t], sums[h][t]);
            }
        }
        for (int h = 0; h < HEADS; h++)
            store_sums(scores + h * RUN + j, sums[h][0], sums[h][1], sums[h][2], sums[h][3]);
    }
    behind = coming;
    for (int h = 0; h < HEADS; h++)
        for (int64_t t = j; t < RUN; t++) scores[h * RUN + t] = 0;
}

// Some vectors of `add_tokens`, from channel i on, of whose last some channels may not be there.
template <int64_t TYPE, int HEADS, int VECTORS_AT_ONCE>
INLINE inline void add_tokens(const Attend &a, const Tokens &tokens, const float *weights,
                              const VF *alphas, float *out, int64_t i, Coming &coming) {
    VF sums[HEADS][VECTORS_AT_ONCE];
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < VECTORS_AT_ONCE; v++)
            sums[h][v] = mul_f(load_f(out + h * a.width + i + v * WIDTH), alphas[h]);
    for (int64_t j = 0, at = tokens.start + i; j < tokens.count; j++, at += a.dim) {
        coming.ask(VECTORS_AT_ONCE * WIDTH * SIZE<TYPE>);
        VF values[VECTORS_AT_ONCE];
        for (int v = 0; v < VECTORS_AT_ONCE; v++)
            values[v] = VECTORS_AT_ONCE > 1 ? load_all<TYPE>(a.values, at + v * WIDTH)
                                            : load<TYPE>(a.values, at, a.dim - i);
        for (int h = 0; h < HEADS; h++) {
            const VF weight = set_f(weights[h * RUN + j]);
            for (int v = 0; v < VECTORS_AT_ONCE; v++)
                sums[h][v] = fma_f(weight, values[v], sums[h][v]);
        }
    }
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < VECTORS_AT_ONCE; v++)
            store_f(out + h * a.width + i + v * WIDTH, sums[h][v]);
}

// out (dim,) of each head, `width` apart, = out times alpha + the values of some tokens, weighted.
template <int64_t TYPE, int HEADS>
void add_tokens(const Attend &a, const Tokens &tokens, const float *weights, const VF *alphas,
                float *out, Coming &behind) {
    Coming coming = behind;
    int64_t i = 0;
    for (; i + 4 * WIDTH <= a.dim; i += 4 * WIDTH)
        add_tokens<TYPE, HEADS, 4>(a, tokens, weights, alphas, out, i, coming);
    for (; i + 2 * WIDTH <= a.dim; i += 2 * WIDTH)
        add_tokens<TYPE, HEADS, 2>(a, tokens, weights, alphas, out, i, coming);
    for (; i < a.dim; i += WIDTH)
        add_tokens<TYPE, HEADS, 1>(a, tokens, weights, alphas, out, i, coming);
    behind = coming;
}

// The tokens of a sequence's run that are as they came, where that is so.
template <int BITS>
Tokens tokens_of(const Attend &a, int64_t i, int64_t kv, int64_t run) {
    const int64_t held = BITS == 16 ? a.capacity : RUN;
    int64_t from = run * RUN;
    if (from >= held) from %= held;  // a division takes as long as some tokens
    return {((a.rows[i] * a.kv_heads + kv) * held + from) * a.dim,
            smaller(a.positions[i] + 1 - run * RUN, RUN)};
}

// What is read behind the values of a run, of which there are `beside` bytes: the next run's keys,
// or those with which the next head begins, or the next sequence.
template <int64_t TYPE, int BITS>
inline Coming keys_behind(const Attend &a, int64_t i, int64_t kv, int64_t run, int64_t beside) {
    if (++run > a.positions[i] / RUN) {
        if (++kv == a.kv_heads) kv = 0, i++;
        if (i == a.sequences) return {};
        run = unseen(a.window, a.positions[i]) / RUN;
    }
    if (BITS != 16 && run < a.positions[i] / RUN)
        return {codes_of(a, a.rows[i], kv, run).keys, RUN * a.width * BITS / 8, beside};
    const Tokens tokens = tokens_of<BITS>(a, i, kv, run);
    return {static_cast<const char *>(a.keys) + tokens.start * SIZE<TYPE>,
            tokens.count * a.dim * SIZE<TYPE>, beside};
}

// The grids of a run's values, and of the keys of the run that lies behind it.
inline void ask_for_grids(const Attend &a, const Codes &c) {
    prefetch_rows<false>(c.value_scales, 0, RUN * 2, 1);
    prefetch_rows<false>(c.value_zeros, 0, RUN, 1);
    prefetch_rows<false>(c.key_scales + a.width, 0, a.width * 2, 1);
    prefetch_rows<false>(c.key_zeros + a.width, 0, a.width, 1);
}

// A thread's memory for `attend_token`, in elements of 4 bytes: of all heads that share one of keys
// and values.
struct TokenMemory {
    int64_t queries, outs, scores, softmax, alphas, integers, numbers, planes, all;
};
static TokenMemory token_memory(const Attend &a) {
    const int64_t shared = a.heads / a.kv_heads, longest = a.width > RUN ? a.width : RUN;
    const auto whole = [](int64_t bytes) { return (bytes + 63) / 64 * 16; };
    TokenMemory m;
    m.queries = 0;
    m.outs = m.queries + shared * a.width;
    m.scores = m.outs + shared * a.width;
    m.softmax = m.scores + shared * RUN;
    m.alphas = m.softmax + whole(shared * int64_t(sizeof(Softmax)));
    m.integers = m.alphas + whole(shared * int64_t(sizeof(VF)));
    m.numbers = m.integers + whole(shared * int64_t(sizeof(Integers)));
    m.planes = m.numbers + 2 * RUN * a.width;  // a run of keys and values
    m.all = m.planes + shared * longest;
    return m;
}

// function(h, HEADS) for all heads, HEADS of them (as a type) at a time, the last ones one by one.
template <int HEADS, typename Function> void by_heads(int64_t shared, const Function &function) {
    int64_t h = 0;
    for (; h + HEADS <= shared; h += HEADS) function(h, Count<HEADS>());
    for (; h < shared; h++) function(h, Count<1>());
}

// A sequence's new token, all heads that share one of keys and values, over RUN tokens after the
// other: integers, where the cache holds them, but for those of the token's own run. Heads go side
// by side through what is done with integers, none of which waits for that of another.
//
// While a run's keys are read its values are asked for, and while those are the keys of what comes
// next. Each is a short stretch of memory: left to themselves processors have hardly seen one
// coming when it ends, and read them at a half to a third of the rate.
template <int64_t TYPE, int BITS>
void attend_token(const Attend &a, int64_t i, int64_t kv, float *memory) {
    const int64_t shared = a.heads / a.kv_heads, position = a.positions[i], row = a.rows[i];
    const int64_t own = position / RUN, length = position + 1, base = code_base(BITS);
    const int64_t first = unseen(a.window, position), longest = a.width > RUN ? a.width : RUN;
    const TokenMemory at = token_memory(a);
    float *numbers = memory + at.numbers;
    Softmax *softmax = reinterpret_cast<Softmax *>(memory + at.softmax);
    VF *alphas = reinterpret_cast<VF *>(memory + at.alphas);
    const auto query = [=](int64_t h) { return memory + at.queries + h * a.width; };
    const auto out = [=](int64_t h) { return memory + at.outs + h * a.width; };
    const auto scores = [=](int64_t h) { return memory + at.scores + h * RUN; };
    for (int64_t h = 0; h < shared; h++) {
        for (int64_t d = 0; d < a.width; d++) query(h)[d] = out(h)[d] = 0;
        load_head(query(h), a, i, kv * shared + h);
        rotate(query(h), a, i);
        softmax[h] = a.sinks ? softmax_of_sink(a.sinks[kv * shared + h]) : no_softmax();
    }
    const auto weigh = [&](int64_t h, int64_t run) {
        const float slope = a.slopes ? a.slopes[kv * shared + h] : 0;
        alphas[h] =
            to_weights(a, &softmax[h], slope, position, run * RUN, first, length, scores(h));
    };
    int64_t run = first / RUN;
    if constexpr (BITS != 16) {
        Integers *x = reinterpret_cast<Integers *>(memory + at.integers);
        for (int64_t h = 0; h < shared; h++)
            x[h].planes = reinterpret_cast<int8_t *>(memory + at.planes + h * longest);
        const RunGrid grid = {numbers, reinterpret_cast<int32_t *>(numbers + longest)};
        for (; run < own; run++) {
            const Codes c = codes_of(a, row, kv, run);
            ask_for_grids(a, c);
            constexpr int64_t BYTES_OF_CHANNEL = RUN * BITS / 8;
            Coming values(c.values, a.width * BYTES_OF_CHANNEL, a.width * BYTES_OF_CHANNEL);
            Coming next = keys_behind<TYPE, BITS>(a, i, kv, run, a.width * BYTES_OF_CHANNEL);
            load_grid(grid, c.key_scales, c.key_zeros, base, a.width);
            for (int64_t h = 0; h < shared; h++) to_integers(&x[h], query(h), grid, a.width);
            by_heads<CODE_HEADS>(shared, [&](int64_t h, auto heads) {
                score_run<BITS, decltype(heads)::value>(c.keys, a.width, x + h, scores(h),
                                                         values);
            });
            for (int64_t h = 0; h < shared; h++) weigh(h, run);
            load_grid(grid, c.value_scales, c.value_zeros, base, RUN);
            for (int64_t h = 0; h < shared; h++) to_integers(&x[h], scores(h), grid, RUN);
            by_heads<CODE_HEADS>(shared, [&](int64_t h, auto heads) {
                add_values<BITS, decltype(heads)::value>(c.values, a.width, x + h, alphas + h,
                                                         out(h), next);
            });
        }
    }
    for (; run <= own; run++) {
        const Tokens tokens = tokens_of<BITS>(a, i, kv, run);
        const int64_t bytes = tokens.count * a.dim * SIZE<TYPE>;
        Coming values(static_cast<const char *>(a.values) + tokens.start * SIZE<TYPE>, bytes,
                      bytes);
        Coming next = keys_behind<TYPE, BITS>(a, i, kv, run, bytes);
        by_heads<HEADS_AT_ONCE>(shared, [&](int64_t h, auto heads) {
            constexpr int HEADS = decltype(heads)::value;
            score_tokens<TYPE, HEADS>(a, tokens, query(h), scores(h), values);
            for (int64_t each = h; each < h + HEADS; each++) weigh(each, run);
            add_tokens<TYPE, HEADS>(a, tokens, scores(h), alphas + h, out(h), next);
        });
    }
    for (int64_t h = 0; h < shared; h++) {
        const VF share = share_of(softmax[h]);
        for (int64_t d = 0; d < a.width; d += WIDTH)
            store_f(out(h) + d, mul_f(load_f(out(h) + d), share));
        store_head(out(h), a, a.y, (i * a.heads + kv * shared + h) * a.dim);
    }
    if (BITS == 16 || length % RUN != 0) return;
    const int64_t start = (row * a.kv_heads + kv) * RUN * a.dim;
    float *keys = numbers, *values = numbers + RUN * a.dim;
    for (int64_t j = 0; j < RUN * a.dim; j += WIDTH) {
        const int64_t count = RUN * a.dim - j;
        store_as(keys, j, FLOAT32, count, load_as(a.keys, start + j, a.type, count));
        store_as(values, j, FLOAT32, count, load_as(a.values, start + j, a.type, count));
    }
    quantize_run(a, codes_of(a, row, kv, own), keys, values);
}
template <int64_t TYPE>
void attend_token(const Attend &a, int64_t i, int64_t kv, float *memory) {
    if (a.bits == 16) return attend_token<TYPE, 16>(a, i, kv, memory);
    a.bits == 8 ? attend_token<TYPE, 8>(a, i, kv, memory) : attend_token<TYPE, 4>(a, i, kv, memory);
}

static Status attend(const Attend &a) {
    int64_t longest = 0;
    for (int64_t i = 0; i < a.sequences; i++)
        if (a.positions[i] > longest) longest = a.positions[i];
    const int64_t each = token_memory(a).all;
    float *memory = static_cast<float *>(scratch(size_t(max_threads() * each * 4)));
    if (!memory) return Status::NO_MEMORY;
    int64_t work = a.sequences * a.heads * (longest + 1) * a.dim;
    for_each(a.sequences * a.kv_heads, work > WORTH_THREADS, [&](int64_t item, int64_t thread) {
        const int64_t i = item / a.kv_heads, kv = item % a.kv_heads;
        float *head = memory + thread * each;
        const int64_t held = a.bits == 16 ? a.capacity : RUN;
        const int64_t at = ((a.rows[i] * a.kv_heads + kv) * held + a.positions[i] % held) * a.dim;
        load_head(head, a, i, a.heads + kv);
        rotate(head, a, i);
        store_head(head, a, a.keys, at);
        load_head(head, a, i, a.heads + a.kv_heads + kv);
        store_head(head, a, a.values, at);
        BY_TYPE(a.type, attend_token, a, i, kv, head);
    });
    return Status::OK;
}

}  // namespace
}  // namespace qllm
