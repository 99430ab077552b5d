// Any x86-64: the operations one lane at a time, in plain C++.
#pragma once

#include <math.h>

#include "kernels.h"

namespace qllm {
namespace {

using VI = int32_t;
using VF = float;
constexpr int WIDTH = 1;
#define REGISTER "r"
constexpr int FLOAT_ROWS = 6, MAX_OPERANDS = 6;
constexpr int ACCUMULATORS = 1;  // they lie in memory: no panels side by side

inline VI zero_i() { return 0; }
inline VI set_i(int32_t v) { return v; }
inline VI load_i(const int32_t *p) { return *p; }
inline void store_i(int32_t *p, VI v) { *p = v; }
// Sums wrap where those of the other paths do.
inline VI add_i(VI a, VI b) { return VI(uint32_t(a) + uint32_t(b)); }
inline VI sub_i(VI a, VI b) { return VI(uint32_t(a) - uint32_t(b)); }
inline VI and_i(VI a, VI b) { return a & b; }
inline VI mul_i(VI a, VI b) { return VI(uint32_t(a) * uint32_t(b)); }
template <int N> inline VI shift_left(VI a) { return VI(uint32_t(a) << N); }
template <int N> inline VI shift_right(VI a) { return a >> N; }
inline VI max_i(VI a, VI b) { return a > b ? a : b; }
inline int32_t sum_of_i(VI v) { return v; }
inline int32_t max_of_i(VI v) { return v; }

// uint8 weights of a step, int8 activations of a step, and their product.
inline VI weights(const uint8_t *p) {
    VI v;
    __builtin_memcpy(&v, p, 4);
    return v;
}
using Weights = VI;
using Inputs = VI;
constexpr int OPERAND_BYTES = 1;  // that an input of an operand takes
inline Weights prepared(VI bytes) { return bytes; }
inline Inputs four(const int8_t *p) {
    VI v;
    __builtin_memcpy(&v, p, 4);
    return v;
}
inline VI dot(VI sum, Weights w, Inputs x) {
    for (int i = 0; i < 32; i += 8) sum = add_i(sum, int32_t(uint8_t(w >> i)) * int8_t(x >> i));
    return sum;
}
// The low byte.
inline void store_bytes(int8_t *p, VI v) { *p = int8_t(v); }
// 16 bytes, and those of them that four bytes count.
using Table = const uint8_t *;
inline Table load_table(const uint8_t *p) { return p; }
inline VI look_up(Table table, VI indices) {
    uint8_t bytes[4];
    __builtin_memcpy(bytes, &indices, 4);
    for (uint8_t &byte : bytes) byte = table[byte];
    __builtin_memcpy(&indices, bytes, 4);
    return indices;
}
inline VI load_bytes(const uint8_t *p) { return *p; }

inline VF set_f(float v) { return v; }
inline VF load_f(const float *p) { return *p; }
inline void store_f(float *p, VF v) { *p = v; }
inline VF add_f(VF a, VF b) { return a + b; }
inline VF sub_f(VF a, VF b) { return a - b; }
inline VF mul_f(VF a, VF b) { return a * b; }
inline VF div_f(VF a, VF b) { return a / b; }
inline VF fma_f(VF a, VF b, VF c) { return __builtin_fmaf(a, b, c); }
// b where one of the two is not a number.
inline VF max_f(VF a, VF b) { return a > b ? a : b; }
inline VF min_f(VF a, VF b) { return a < b ? a : b; }
inline VF add_product(VF sum, VF a, VF b) { return fma_f(a, b, sum); }
inline VF abs_f(VF a) { return __builtin_fabsf(a); }
inline VF to_float(VI v) { return VF(v); }
inline VI bits_of(VF v) {
    VI bits;
    __builtin_memcpy(&bits, &v, 4);
    return bits;
}
inline VF from_bits(uint32_t bits) {
    VF v;
    __builtin_memcpy(&v, &bits, 4);
    return v;
}
inline VF as_float(VI v) { return from_bits(uint32_t(v)); }
inline float max_of(VF v) { return v; }
inline float sum_of(VF v) { return v; }
inline void store_sums(float *to, VF a, VF b, VF c, VF d) {
    to[0] = a, to[1] = b, to[2] = c, to[3] = d;
}
inline VF first_of(VF v, int64_t count) { return count > 0 ? v : 0; }
// To the nearest integer, halves to even; what is not a number becomes 0.
inline VI round_i(VF v) { return v == v ? VI(__builtin_lrintf(v)) : 0; }
// The same, whatever comes of what is not a number.
inline VI nearest_i(VF v) { return VI(__builtin_lrintf(v)); }

// The exponent's bias of 15 becomes 127. What is subnormal comes from an integer: as a float32 it
// would be, too, and zero where the processor is told to take such numbers for it.
inline VF from_half(uint16_t half) {
    uint32_t magnitude = uint32_t(half & 0x7FFF) << 13, sign = uint32_t(half & 0x8000) << 16;
    VF v = magnitude >= 0x0F800000   ? from_bits(magnitude + 0x70000000)
           : magnitude >= 0x00800000 ? from_bits(magnitude + 0x38000000)
                                     : VF(half & 0x3FF) * 0x1p-24f;
    return from_bits(uint32_t(bits_of(v)) | sign);
}
inline uint16_t to_half(VF v) {
    uint32_t bits = uint32_t(bits_of(v)), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
    if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);
    if (magnitude < 0x38800000) {
        // Subnormal: added to 2^-1, a value's last kept bit is the sum's.
        uint32_t sum = uint32_t(bits_of(from_bits(magnitude) + 0.5f));
        return uint16_t(sign | (sum - 0x3F000000));
    }
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13));
}

// An element.
template <int64_t TYPE> inline VF load_all(const void *p, int64_t i) {
    if constexpr (TYPE == FLOAT32) return static_cast<const float *>(p)[i];
    uint16_t half = static_cast<const uint16_t *>(p)[i];
    return TYPE == FLOAT16 ? from_half(half) : from_bits(uint32_t(half) << 16);
}

// The same, or zero where there is none.
inline VF load_as(const void *p, int64_t i, int64_t type, int64_t count) {
    if (count < 1) return 0;
    if (type == FLOAT32) return static_cast<const float *>(p)[i];
    uint16_t half = static_cast<const uint16_t *>(p)[i];
    return type == FLOAT16 ? from_half(half) : from_bits(uint32_t(half) << 16);
}

inline void store_as(void *p, int64_t i, int64_t type, int64_t count, VF v) {
    if (count < 1) return;
    if (type == FLOAT32) {
        static_cast<float *>(p)[i] = v;
    } else if (type == FLOAT16) {
        static_cast<uint16_t *>(p)[i] = to_half(v);
    } else {
        uint32_t bits = uint32_t(bits_of(v));
        bits = v == v ? bits + 0x7FFF + (bits >> 16 & 1) : 0x7FC00000;
        static_cast<uint16_t *>(p)[i] = uint16_t(bits >> 16);
    }
}

inline void transpose(VF (&)[WIDTH]) {}

}  // namespace
}  // namespace qllm
