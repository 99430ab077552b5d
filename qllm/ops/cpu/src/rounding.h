// A step of roundings and ranges against the signs of their gradients: all that a row takes in one
// go, while it is in the caches.
#pragma once

#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "threads.h"

namespace qllm {
namespace {

struct ScaleAndZero {
    float scale, zero;
};

// A value as the type of scales stores it.
inline float stored(float value, int64_t type) {
    float rounded = value, first[WIDTH];
    store_as(&rounded, 0, type, 1, set_f(value));
    store_f(first, load_as(&rounded, 0, type, 1));
    return first[0];
}

inline ScaleAndZero grid_of(const StepRounding &a, int64_t at) {
    const float low = a.low[at] * a.factors[at];
    const float high = a.high[at] * a.factors[a.factor_stride + at];
    float scale = (high - low) / float(a.qmax);
    if (a.scale_type == FLOAT16) {
        const float least = float(a.least_scale);
        scale = stored(scale > least ? scale : least, FLOAT16);
    }
    float zero = float(__builtin_lrintf(-low / scale));
    if (zero < 0) zero = 0;
    if (zero > float(a.qmax)) zero = float(a.qmax);
    return {scale, zero};
}

inline VF clamp_f(VF v, float low, float high) { return min_f(set_f(high), max_f(set_f(low), v)); }

// The nearest integers, no further than 1 beyond a grid's: an integer holds no more than 2^31.
inline VF nearest_to(VF v, float low, float high) {
    return to_float(nearest_i(clamp_f(v, low - 1, high + 1)));
}

// -1, 0 or 1: the smallest number there is times 2^252 is above 1.
inline VF sign_f(VF v) { return clamp_f(mul_f(mul_f(v, set_f(0x1p126f)), set_f(0x1p126f)), -1, 1); }

// Which way an average goes, once a gradient has come to what it was.
inline VF direction(const StepRounding &a, VF average, VF gradient) {
    return sign_f(sub_f(average, mul_f(sub_f(average, gradient), set_f(1 - float(a.beta1)))));
}
inline VF averaged(const StepRounding &a, VF average, VF gradient) {
    return add_f(average, mul_f(set_f(float(1 - a.beta2)), sub_f(gradient, average)));
}
inline float first_lane(VF v) {
    float lanes[WIDTH];
    store_f(lanes, v);
    return lanes[0];
}

// The gradient of a row in the order of the groups, filled up with zeros to `width`.
template <int64_t TYPE>
void take_gradient(const StepRounding &a, int64_t row, int64_t width, float *to, float *spare) {
    float *sums = a.perm ? spare : to;
    for (int64_t i = 0; i < a.in; i += WIDTH) {
        VF sum = set_f(0);
        for (int64_t part = 0; part < a.parts; part++)
            sum = add_f(
                sum, load<TYPE>(a.gradients, part * a.part_stride + row * a.in + i, a.in - i));
        store_as(sums, i, FLOAT32, a.in - i, sum);
    }
    if (a.perm)
        for (int64_t i = 0; i < a.in; i++) to[i] = sums[a.perm[i]];
    for (int64_t i = a.in; i < width; i++) to[i] = 0;
}

// Moves the factors of group `at`, given the gradients by its scale and by its zero.
inline void step_range(const StepRounding &a, int64_t at, float scale, float grad_scale,
                       float grad_zero) {
    const float low = a.low[at], high = a.high[at], qmax = float(a.qmax);
    float *factor[] = {a.factors + at, a.factors + a.factor_stride + at};
    float *average[] = {a.factor_exp_avg + at, a.factor_exp_avg + a.factor_stride + at};
    grad_scale += grad_zero * low * *factor[0] / (scale * scale);
    float ends[] = {-grad_scale * low / qmax - grad_zero * low / scale, grad_scale * high / qmax};
    if (a.symmetric) ends[0] = ends[1] = ends[0] + ends[1];
    for (int i = 0; i < 2; i++) {
        const VF was = set_f(*average[i]), gradient = set_f(ends[i]);
        const VF moved = fma_f(set_f(float(-a.range_rate)), direction(a, was, gradient),
                               set_f(*factor[i]));
        *factor[i] = first_lane(clamp_f(moved, float(a.least), float(a.largest)));
        *average[i] = first_lane(averaged(a, was, gradient));
    }
}

// The step of a group, whose gradient is `grad_value`.
inline void step_group(const StepRounding &a, int64_t at, const float *grad_value) {
    const ScaleAndZero grid = grid_of(a, at);
    float *ideal = a.ideal + at * a.group, *average = a.ideal_exp_avg + at * a.group;
    const VF scale = set_f(grid.scale), back = set_f(float(-a.rate));
    const float highest = float(a.qmax) - grid.zero;
    VF integer_dot = set_f(0), steps_dot = integer_dot, whole = integer_dot, inside = integer_dot;
    for (int64_t i = 0; i < a.group; i += WIDTH) {
        const int64_t count = a.group - i;
        const VF gradient = load<FLOAT32>(grad_value, i, count);
        const VF value = load<FLOAT32>(ideal, i, count);
        const VF steps = div_f(value, scale), nearest = nearest_to(steps, -grid.zero, highest);
        const VF integer = clamp_f(nearest, -grid.zero, highest);
        // What is clamped has no gradient: integers differ by 1 at least.
        const VF within = sub_f(set_f(1), min_f(set_f(1), abs_f(sub_f(nearest, integer))));
        const VF grad_ideal = mul_f(within, gradient);
        integer_dot = fma_f(integer, gradient, integer_dot);
        steps_dot = fma_f(steps, grad_ideal, steps_dot);
        whole = add_f(whole, gradient);
        inside = add_f(inside, grad_ideal);
        const VF was = load<FLOAT32>(average, i, count);
        const VF move = mul_f(direction(a, was, grad_ideal), scale);
        store<FLOAT32>(average, i, count, averaged(a, was, grad_ideal));
        store<FLOAT32>(ideal, i, count, fma_f(back, move, value));
    }
    const float grad_zero = (sum_of(inside) - sum_of(whole)) * grid.scale;
    step_range(a, at, grid.scale, sum_of(integer_dot) - sum_of(steps_dot), grad_zero);
}

// What the integers of a row stand for, in the matrix.
template <int64_t TYPE>
void dequantize_row(const StepRounding &a, int64_t row, float *values, float *spare) {
    for (int64_t j = 0; j < a.groups; j++) {
        const int64_t at = row * a.groups + j;
        const ScaleAndZero grid = grid_of(a, at);
        const float *ideal = a.ideal + at * a.group;
        for (int64_t i = 0; i < a.group; i += WIDTH) {
            const VF steps = div_f(load<FLOAT32>(ideal, i, a.group - i), set_f(grid.scale));
            const float highest = float(a.qmax) - grid.zero;
            const VF nearest = nearest_to(steps, -grid.zero, highest);
            const VF integer = clamp_f(nearest, -grid.zero, highest);
            store_as(values, j * a.group + i, FLOAT32, a.group - i,
                     mul_f(integer, set_f(grid.scale)));
        }
    }
    if (a.perm) {
        for (int64_t i = 0; i < a.in; i++) spare[a.perm[i]] = values[i];
        values = spare;
    }
    for (int64_t i = 0; i < a.in; i += WIDTH)
        store<TYPE>(a.matrix, row * a.in + i, a.in - i, load<FLOAT32>(values, i, a.in - i));
}

template <int64_t TYPE> void step_row(const StepRounding &a, int64_t row, float *memory) {
    const int64_t width = a.groups * a.group;
    float *spare = memory + width;
    take_gradient<TYPE>(a, row, width, memory, spare);
    for (int64_t j = 0; j < a.groups; j++)
        step_group(a, row * a.groups + j, memory + j * a.group);
    dequantize_row<TYPE>(a, row, memory, spare);
}

static Status step_rounding(const StepRounding &a) {
    const size_t bytes = size_t(2 * a.groups * a.group) * sizeof(float);
    bool no_memory = false;
    for_each(a.rows, a.rows * a.in > WORTH_THREADS, [&](int64_t row, int64_t) {
        float *memory = static_cast<float *>(scratch(bytes));
        if (memory) {
            BY_TYPE(a.type, step_row, a, row, memory);
        } else {
            __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
        }
    });
    return no_memory ? Status::NO_MEMORY : Status::OK;
}

}  // namespace
}  // namespace qllm
