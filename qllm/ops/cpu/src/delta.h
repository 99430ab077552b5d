// The gated delta rule, the convolution in front of it, and gates; see `qllm.ops.reference.delta`.
//
// A token comes after the one in front of it, in prefill and in decode, so that no bit depends on
// where a prompt is cut. A head's memory goes from token to token in columns of as many values as
// stay in the first cache.
#pragma once

#include <math.h>
#include <string.h>

#include "elements.h"
#include "exponential.h"
#include "isa.h"
#include "kernels.h"
#include "steps.h"
#include "threads.h"

namespace qllm {
namespace {

// Tokens of a sequence that a convolution takes, and the row of the state that they go on from.
struct ConvolutionRun {
    int64_t first, tokens, row;
    bool begins;
};

// Input `token` of a run, or one of those in front of it, of channels [c, c + WIDTH).

template <int64_t TYPE>
inline VF conv_input(const Convolution &a, const ConvolutionRun &run, int64_t token, int64_t c) {
    const int64_t count = a.channels - c, past = a.kernel - 1;
    if (token >= 0) return load<TYPE>(a.x, (run.first + token) * a.stride + c, count);
    if (run.begins) return set_f(0);
    return load<TYPE>(a.inputs, (run.row * past + past + token) * a.channels + c, count);
}

template <int64_t TYPE>
void convolve(const Convolution &a, const ConvolutionRun &run, int64_t c, int64_t end) {
    const int64_t past = a.kernel - 1;
    for (int64_t token = 0; token < run.tokens; token++)
        for (int64_t i = c; i < end; i += WIDTH) {
            VF sum = set_f(0);
            for (int64_t k = 0; k <= past; k++)
                sum = fma_f(conv_input<TYPE>(a, run, token - past + k, i),
                            load<TYPE>(a.weight, k * a.channels + i, a.channels - i), sum);
            store<TYPE>(a.y, (run.first + token) * a.channels + i, end - i, activated<SILU>(sum));
        }
    for (int64_t k = 0; k < past; k++)  // each comes from behind where it goes
        for (int64_t i = c; i < end; i += WIDTH)
            store<TYPE>(a.inputs, (run.row * past + k) * a.channels + i, end - i,
                        conv_input<TYPE>(a, run, run.tokens - past + k, i));
}

static Status causal_conv(const Convolution &a) {
    constexpr int64_t PART = 256;  // channels
    const int64_t parts = (a.channels + PART - 1) / PART, tokens = a.starts[a.sequences];
    const bool worth = tokens * a.channels * a.kernel > WORTH_THREADS;
    for_each(a.sequences * parts, worth, [&](int64_t item, int64_t) {
        const int64_t sequence = item / parts, c = item % parts * PART;
        const int64_t first = a.starts[sequence];
        const ConvolutionRun run{first, a.starts[sequence + 1] - first, a.rows[sequence],
                                 a.positions[first] == 0};
        BY_TYPE(a.type, convolve, a, run, c, smaller(c + PART, a.channels));
    });
    return Status::OK;
}

// What a head's tokens take besides their values, of some at a time.
constexpr int64_t TOKENS_AT_ONCE = 32;
struct DeltaTokens {
    int64_t first, count;
    const float *q, *k;  // (count, key_dim), of a length of 1 / sqrt(key_dim), and of 1
    float rates[TOKENS_AT_ONCE], fades[TOKENS_AT_ONCE];
};

template <int64_t TYPE>
void normed(const DeltaRule &a, int64_t at, float factor, float *to) {
    VF squares = set_f(0);
    for (int64_t i = 0; i < a.key_dim; i += WIDTH) {
        const VF x = load<TYPE>(a.qkv, at + i, a.key_dim - i);
        squares = fma_f(x, x, squares);
    }
    const VF scale = set_f(factor / sqrtf(sum_of(squares) + 1e-6f));
    for (int64_t i = 0; i < a.key_dim; i += WIDTH) {
        const int64_t count = a.key_dim - i;
        store<FLOAT32>(to, i, count, mul_f(load<TYPE>(a.qkv, at + i, count), scale));
    }
}

template <int64_t TYPE> inline float scalar(const void *p, int64_t i) {
    alignas(64) float lane[WIDTH];
    store_f(lane, load<TYPE>(p, i, 1));
    return lane[0];
}

template <int64_t TYPE>
void prepare(const DeltaRule &a, int64_t head, float *q, float *k, DeltaTokens &t) {
    const int64_t keys = a.key_heads * a.key_dim, width = 2 * keys + a.heads * a.value_dim;
    const int64_t key = head / (a.heads / a.key_heads) * a.key_dim;
    for (int64_t i = 0; i < t.count; i++) {
        const int64_t token = t.first + i, gates = token * 2 * a.heads + head;
        normed<TYPE>(a, token * width + key, 1 / sqrtf(float(a.key_dim)), q + i * a.key_dim);
        normed<TYPE>(a, token * width + keys + key, 1, k + i * a.key_dim);
        const float fade = scalar<TYPE>(a.gates, gates + a.heads) + a.decay[a.heads + head];
        const float softplus = fade > 20 ? fade : log1pf(expf(fade));
        t.rates[i] = 1 / (1 + expf(-scalar<TYPE>(a.gates, gates)));
        t.fades[i] = expf(-expf(a.decay[head]) * softplus);
    }
    t.q = q, t.k = k;
}

// body(j, chain) for every j: sums of two chains each, whose places are known at compile time.
template <typename Body> inline void in_two_chains(int64_t count, const Body &body) {
    int64_t j = 0;
    for (; j + 1 < count; j += 2) {
        body(j, 0);
        body(j + 1, 1);
    }
    if (j < count) body(j, 0);
}

// Tokens through columns [c, c + VECTORS WIDTH) of a head's memory, or as many as there are.
template <int64_t TYPE, int VECTORS>
void columns(const DeltaRule &a, const DeltaTokens &t, int64_t head, int64_t c, float *memory) {
    const int64_t dim = a.value_dim, keys = 2 * a.key_heads * a.key_dim;
    const int64_t width = keys + a.heads * dim;
    auto each = [&](auto &&body) {
        for (int v = 0; v < VECTORS; v++) {
            const int64_t at = c + v * WIDTH;
            body(v, at, VECTORS > 1 ? WIDTH : dim - at);
        }
    };
    for (int64_t i = 0; i < t.count; i++) {
        const float *q = t.q + i * a.key_dim, *k = t.k + i * a.key_dim;
        const VF fade = set_f(t.fades[i]);
        VF found[2][VECTORS], change[VECTORS];
        each([&](int v, int64_t, int64_t) { found[0][v] = found[1][v] = set_f(0); });
        in_two_chains(a.key_dim, [&](int64_t j, int chain) {
            const VF key = set_f(k[j]);
            each([&](int v, int64_t at, int64_t count) {
                VF &sum = found[chain][v];
                sum = fma_f(load<FLOAT32>(memory, j * dim + at, count), key, sum);
            });
        });
        each([&](int v, int64_t at, int64_t count) {
            const VF old = mul_f(add_f(found[0][v], found[1][v]), fade);
            const int64_t value = (t.first + i) * width + keys + head * dim + at;
            change[v] = mul_f(sub_f(load<TYPE>(a.qkv, value, count), old), set_f(t.rates[i]));
            found[0][v] = found[1][v] = set_f(0);
        });
        in_two_chains(a.key_dim, [&](int64_t j, int chain) {
            const VF key = set_f(k[j]), query = set_f(q[j]);
            each([&](int v, int64_t at, int64_t count) {
                const VF old = mul_f(load<FLOAT32>(memory, j * dim + at, count), fade);
                const VF now = fma_f(key, change[v], old);
                store<FLOAT32>(memory, j * dim + at, count, now);
                VF &sum = found[chain][v];
                sum = fma_f(now, query, sum);
            });
        });
        each([&](int v, int64_t at, int64_t count) {
            const int64_t to = ((t.first + i) * a.heads + head) * dim + at;
            store<TYPE>(a.y, to, count, add_f(found[0][v], found[1][v]));
        });
    }
}

template <int64_t TYPE>
void delta_head(const DeltaRule &a, int64_t sequence, int64_t head, float *keys) {
    const int64_t first = a.starts[sequence], end = a.starts[sequence + 1];
    float *memory = a.memory + (a.rows[sequence] * a.heads + head) * a.key_dim * a.value_dim;
    if (a.positions[first] == 0)
        memset(memory, 0, size_t(a.key_dim * a.value_dim) * sizeof(float));
    for (int64_t token = first; token < end; token += TOKENS_AT_ONCE) {
        DeltaTokens t;
        t.first = token, t.count = smaller(TOKENS_AT_ONCE, end - token);
        prepare<TYPE>(a, head, keys, keys + TOKENS_AT_ONCE * a.key_dim, t);
        constexpr int VECTORS = 4;
        int64_t c = 0;
        for (; c + VECTORS * WIDTH <= a.value_dim; c += VECTORS * WIDTH)
            columns<TYPE, VECTORS>(a, t, head, c, memory);
        for (; c < a.value_dim; c += WIDTH) columns<TYPE, 1>(a, t, head, c, memory);
    }
}

static Status delta_rule(const DeltaRule &a) {
    const int64_t work = a.starts[a.sequences] * a.heads * a.key_dim * a.value_dim;
    bool failed = false;
    for_each(a.sequences * a.heads, work > WORTH_THREADS, [&](int64_t item, int64_t) {
        const int64_t floats = 2 * TOKENS_AT_ONCE * a.key_dim;
        float *keys = static_cast<float *>(scratch(size_t(floats) * sizeof(float)));
        if (!keys) {
            __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
            return;
        }
        BY_TYPE(a.type, delta_head, a, item / a.heads, item % a.heads, keys);
    });
    return failed ? Status::NO_MEMORY : Status::OK;
}

template <int64_t TYPE> void gate_row(const Gate &a, int64_t row) {
    for (int64_t i = 0; i < a.channels; i += WIDTH) {
        const int64_t count = a.channels - i, at = row * a.channels + i;
        const VF gate = load<TYPE>(a.gates, row * a.stride + a.first + i, count);
        const VF by = a.kind == SILU ? activated<SILU>(gate) : activated<SIGMOID>(gate);
        store<TYPE>(a.y, at, count, mul_f(load<TYPE>(a.x, at, count), by));
    }
}

static Status gate(const Gate &a) {
    for_each(a.rows, a.rows * a.channels > WORTH_THREADS,
             [&](int64_t row, int64_t) { BY_TYPE(a.type, gate_row, a, row); });
    return Status::OK;
}

}  // namespace
}  // namespace qllm
