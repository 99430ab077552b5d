// What lies between the linear layers of a decoder: norms, activation functions, sums, embeddings;
// attention is in attention.h. Arithmetic is in float32, rounded once to the type of the
// activations. A row's result does not depend on the rows beside it, nor on the threads.
#pragma once

#include <float.h>
#include <math.h>

#include "elements.h"
#include "exponential.h"
#include "isa.h"
#include "kernels.h"
#include "threads.h"

namespace qllm {
namespace {

// e^v; of what floats do not reach, infinity, so that what is divided by it is 0.
inline VF exp_or_infinity(VF v) {
    const VF beyond = max_f(set_f(0), sub_f(v, set_f(88)));  // up to which `exp_f` goes
    return fma_f(beyond, set_f(FLT_MAX), exp_f(v));
}

template <int KIND> inline VF activated(VF v) {
    if constexpr (KIND == RELU) {
        return max_f(set_f(0), v);
    } else if constexpr (KIND == RELU2) {
        const VF positive = max_f(set_f(0), v);
        return mul_f(positive, positive);
    } else if constexpr (KIND == SILU) {
        return div_f(v, add_f(set_f(1), exp_or_infinity(sub_f(set_f(0), v))));
    } else if constexpr (KIND == SIGMOID) {
        return div_f(set_f(1), add_f(set_f(1), exp_or_infinity(sub_f(set_f(0), v))));
    } else if constexpr (KIND == GELU_TANH) {
        // v / 2 (1 + tanh u) = v / (1 + e^-2u), u = sqrt(2 / pi) (v + 0.044715 v^3)
        VF u = fma_f(mul_f(mul_f(v, v), v), set_f(0.044715f), v);
        return div_f(v, add_f(set_f(1), exp_or_infinity(mul_f(u, set_f(-1.5957691216f)))));
    } else {
        alignas(64) float lane[WIDTH];
        store_f(lane, v);
        for (float &x : lane) x = x * 0.5f * (1 + erff(x * 0.70710678f));
        return load_f(lane);
    }
}

// gpt-oss's SwiGLU: see `qllm.ops.reference.gated_activation`.
inline VF clamped_swiglu(VF gate, VF up) {
    const VF limit = set_f(7), negated_alpha = set_f(-1.702f);
    gate = min_f(limit, gate);
    up = min_f(limit, max_f(set_f(-7), up));
    const VF swish = div_f(gate, add_f(set_f(1), exp_or_infinity(mul_f(gate, negated_alpha))));
    return mul_f(swish, add_f(up, set_f(1)));
}

template <int64_t TYPE, int KIND> void activate_row(const Activate &a, int64_t row) {
    int64_t from = row * a.channels * (a.gated ? 2 : 1), to = row * a.channels;
    for (int64_t i = 0; i < a.channels; i += WIDTH) {
        int64_t count = a.channels - i;
        const VF x = load<TYPE>(a.x, from + i, count);
        VF value;
        if constexpr (KIND == SWIGLU_OAI) {
            value = clamped_swiglu(x, load<TYPE>(a.x, from + a.channels + i, count));
        } else {
            value = activated<KIND>(x);
            if (a.gated) value = mul_f(value, load<TYPE>(a.x, from + a.channels + i, count));
        }
        store<TYPE>(a.y, to + i, count, value);
    }
}

template <int64_t TYPE> void activate_row(const Activate &a, int64_t row) {
    if (a.kind == RELU) return activate_row<TYPE, RELU>(a, row);
    if (a.kind == RELU2) return activate_row<TYPE, RELU2>(a, row);
    if (a.kind == SILU) return activate_row<TYPE, SILU>(a, row);
    if (a.kind == SWIGLU_OAI) return activate_row<TYPE, SWIGLU_OAI>(a, row);
    if (a.kind == GELU_TANH) return activate_row<TYPE, GELU_TANH>(a, row);
    activate_row<TYPE, GELU>(a, row);
}

static Status activate(const Activate &a) {
    for_each(a.rows, a.rows * a.channels > WORTH_THREADS,
             [&](int64_t row, int64_t) { BY_TYPE(a.type, activate_row, a, row); });
    return Status::OK;
}

// part(start, end) of a few vectors each, added in pairs: a sum of thousands, one after the other,
// would drift where all are alike.
template <typename Part> VF sum_in_pairs(int64_t start, int64_t end, const Part &part) {
    if (end - start <= 8 * WIDTH) return part(start, end);
    int64_t middle = start + (end - start) / (2 * WIDTH) * WIDTH;
    return add_f(sum_in_pairs(start, middle, part), sum_in_pairs(middle, end, part));
}

template <int64_t TYPE> void norm_row(const Norm &a, int64_t row) {
    const int64_t first = row * a.stride;
    const int64_t row_in_run = a.run ? row % a.run : 0;
    const int64_t weight = a.run && row_in_run >= a.first ? a.channels : 0;
    const bool bare = !a.weight || (a.run && row_in_run >= a.first + a.second);
    if (a.run && row_in_run >= a.first + a.second + a.third) {
        for (int64_t i = 0; i < a.channels; i += WIDTH) {
            int64_t count = a.channels - i;
            store<TYPE>(a.y, first + i, count, load<TYPE>(a.x, first + i, count));
        }
        return;
    }
    auto sum = [&](int64_t start, int64_t end) {
        VF total = set_f(0);
        for (int64_t i = start; i < end; i += WIDTH)
            total = add_f(total, load<TYPE>(a.x, first + i, a.channels - i));
        return total;
    };
    const VF total = a.centered ? sum_in_pairs(0, a.channels, sum) : set_f(0);
    const VF mean = set_f(sum_of(total) / float(a.channels));
    auto sum_squares = [&](int64_t start, int64_t end) {
        VF squares = set_f(0);
        for (int64_t i = start; i < end; i += WIDTH) {
            int64_t count = a.channels - i;
            VF value = sub_f(load<TYPE>(a.x, first + i, count), mean);
            // What lies behind the row's end is no 0 any more.
            if (count < WIDTH) value = first_of(value, count);
            squares = fma_f(value, value, squares);
        }
        return squares;
    };
    const VF squares = sum_in_pairs(0, a.channels, sum_squares);
    const VF scale = set_f(1 / sqrtf(sum_of(squares) / float(a.channels) + float(a.eps)));
    const VF offset = set_f(float(a.offset));
    for (int64_t i = 0; i < a.channels; i += WIDTH) {
        int64_t count = a.channels - i;
        VF value = mul_f(sub_f(load<TYPE>(a.x, first + i, count), mean), scale);
        if (!bare)
            value = mul_f(value, add_f(load<TYPE>(a.weight, weight + i, count), offset));
        if (a.bias) value = add_f(value, load<TYPE>(a.bias, i, count));
        store<TYPE>(a.y, first + i, count, value);
    }
}

static Status norm(const Norm &a) {
    for_each(a.rows, a.rows * a.channels > WORTH_THREADS,
             [&](int64_t row, int64_t) { BY_TYPE(a.type, norm_row, a, row); });
    return Status::OK;
}

template <int64_t TYPE> void add_part(const Add &a, int64_t start, int64_t end) {
    for (int64_t i = start; i < end; i += WIDTH) {
        int64_t count = a.count - i;
        VF x = load<TYPE>(a.x, i, count);
        VF y = a.z ? add_f(x, load<TYPE>(a.z, i, count)) : mul_f(x, set_f(float(a.factor)));
        store<TYPE>(a.y, i, count, y);
    }
}

static Status add(const Add &a) {
    constexpr int64_t PART = 4096;
    for_each((a.count + PART - 1) / PART, a.count > WORTH_THREADS, [&](int64_t part, int64_t) {
        BY_TYPE(a.type, add_part, a, part * PART, smaller((part + 1) * PART, a.count));
    });
    return Status::OK;
}

template <int64_t TYPE> void scale_row(const ScaleRows &a, int64_t row) {
    alignas(64) float factor[WIDTH];
    store_f(factor, load<TYPE>(a.factors, row, 1));
    const int64_t first = row * a.columns;
    for (int64_t i = 0; i < a.scaled; i += WIDTH) {
        const int64_t count = a.scaled - i;
        VF x = load<TYPE>(a.x, first + i, count);
        store<TYPE>(a.y, first + i, count, mul_f(x, set_f(factor[0])));
    }
    for (int64_t i = a.scaled; i < a.columns; i += WIDTH)
        store<TYPE>(a.y, first + i, a.columns - i, load<TYPE>(a.x, first + i, a.columns - i));
}

static Status scale_rows(const ScaleRows &a) {
    for_each(a.rows, a.rows * a.columns > WORTH_THREADS,
             [&](int64_t row, int64_t) { BY_TYPE(a.type, scale_row, a, row); });
    return Status::OK;
}

template <typename Element> void gather_row(const Gather &a, int64_t row) {
    const Element *x = static_cast<const Element *>(a.x) + row * a.columns;
    Element *y = static_cast<Element *>(a.y) + row * a.gathered;
    for (int64_t i = 0; i < a.gathered; i++) y[i] = x[a.index[i]];
}

static Status gather(const Gather &a) {
    for_each(a.rows, a.rows * a.gathered > WORTH_THREADS, [&](int64_t row, int64_t) {
        a.bytes == 2 ? gather_row<uint16_t>(a, row) : gather_row<uint32_t>(a, row);
    });
    return Status::OK;
}

static Status join(const Join &a) {
    const int64_t own = a.columns * a.bytes, more = a.joined * a.bytes, whole = a.others * a.bytes;
    for_each(a.rows, a.rows * (a.columns + a.joined) > WORTH_THREADS, [&](int64_t row, int64_t) {
        char *y = static_cast<char *>(a.y) + row * (own + more);
        __builtin_memcpy(y, static_cast<const char *>(a.x) + row * own, size_t(own));
        const char *z = static_cast<const char *>(a.z) + (row + 1) * whole - more;
        __builtin_memcpy(y + own, z, size_t(more));
    });
    return Status::OK;
}

static Status embed(const Embed &a) {
    for (int64_t row = 0; row < a.rows; row++) {
        int64_t index = a.index[row] + a.offset;
        if (index < 0 || index >= a.table_rows) return Status::BAD_INDEX;
        __builtin_memcpy(static_cast<char *>(a.y) + row * a.bytes,
                         static_cast<const char *>(a.table) + index * a.bytes, size_t(a.bytes));
    }
    return Status::OK;
}

}  // namespace
}  // namespace qllm
