// AVX-512 with VNNI: 16 lanes to a register, a panel is one register wide.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace qllm {
namespace {

using VI = __m512i;
using VF = __m512;
constexpr int WIDTH = 16;
#define REGISTER "v"
constexpr int FLOAT_ROWS = 12;    // of a tile
constexpr int MAX_OPERANDS = 12;  // rows x operands of one
constexpr int ACCUMULATORS = 24;  // registers that its sums may take
#define GEMV_OPERANDS 8  // of tiles for which weights are not unpacked to cache

inline __mmask16 first(int64_t count) {
    return count >= 16 ? 0xFFFF : count > 0 ? (1u << count) - 1 : 0;
}

inline VI zero_i() { return _mm512_setzero_si512(); }
inline VI set_i(int32_t v) { return _mm512_set1_epi32(v); }
inline VI load_i(const int32_t *p) { return _mm512_loadu_si512(p); }
inline void store_i(int32_t *p, VI v) { _mm512_storeu_si512(p, v); }
inline VI add_i(VI a, VI b) { return _mm512_add_epi32(a, b); }
inline VI sub_i(VI a, VI b) { return _mm512_sub_epi32(a, b); }
inline VI and_i(VI a, VI b) { return _mm512_and_si512(a, b); }
inline VI mul_i(VI a, VI b) { return _mm512_mullo_epi32(a, b); }
template <int N> inline VI shift_left(VI a) { return _mm512_slli_epi32(a, N); }
template <int N> inline VI shift_right(VI a) { return _mm512_srai_epi32(a, N); }
inline VI max_i(VI a, VI b) { return _mm512_max_epi32(a, b); }
inline int32_t sum_of_i(VI v) { return _mm512_reduce_add_epi32(v); }
inline int32_t max_of_i(VI v) { return _mm512_reduce_max_epi32(v); }

// uint8 weights of a step, int8 activations of a step in every lane, and their product.
inline VI weights(const uint8_t *p) { return _mm512_load_si512(p); }
using Weights = VI;
using Inputs = VI;
constexpr int OPERAND_BYTES = 1;  // that an input of an operand takes
inline Weights prepared(VI bytes) { return bytes; }
inline VI broadcast(const int8_t *p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}
inline Inputs four(const int8_t *p) { return broadcast(p); }
// Not the intrinsic: GCC moves its sums from register to register and to memory.
inline VI dot(VI sum, Weights w, Inputs x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}
// Two int16 weights of every lane times two int16 activations, and the activations of WIDTH inputs:
// of each step the inputs 0, 2, 1 and 3, steps `next_step` bytes apart.
#define HAS_WORDS 1
#define GEMV_IN_WORDS 1  // for few rows, too, weights become int16: see gemv.h
inline VI dot_words(VI sum, VI w, VI x) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}
inline void store_words(int8_t *p, int64_t next_step, VI v) {
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    const __m256i words = _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(v), order);
    const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    const int64_t steps[] = {_mm_cvtsi128_si64(low), _mm_extract_epi64(low, 1),
                             _mm_cvtsi128_si64(high), _mm_extract_epi64(high, 1)};
    for (int64_t step : steps) {
        __builtin_memcpy(p, &step, 8);
        p += next_step;
    }
}
// The bytes of a step as int16: inputs 0 and 2 of each lane, 1 and 3.
inline VI even_words(VI bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi16(255)); }
inline VI odd_words(VI bytes) { return _mm512_srli_epi16(bytes, 8); }
inline VI set_words(int16_t v) { return _mm512_set1_epi16(v); }
inline VI add_words(VI a, VI b) { return _mm512_add_epi16(a, b); }
inline VI sub_words(VI a, VI b) { return _mm512_sub_epi16(a, b); }
inline void store_words(uint8_t *p, VI v) { _mm512_store_si512(p, v); }
// Each of the lanes 0, 2, … times its neighbour; 0 in the others.
inline VI mul_neighbours(VI v) {
    return _mm512_maskz_mov_epi32(0x5555, _mm512_mul_epi32(v, _mm512_srli_epi64(v, 32)));
}
// The low byte of every lane.
inline void store_bytes(int8_t *p, VI v) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(v));
}
// Numbers of 16 bits, none of them above 2^15 - 129, as two planes of bytes of which the upper one
// counts 256 times.
#define HAS_PLANES 1
inline void store_planes(int8_t *upper, int8_t *lower, VI a, VI b, VI c, VI d) {
    // Packing takes a quarter of every vector after the other.
    const VI order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const VI ab = _mm512_packs_epi32(a, b), cd = _mm512_packs_epi32(c, d);
    const VI half = _mm512_set1_epi16(128), byte = _mm512_set1_epi16(255);
    const VI high = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(ab, half), 8),
                                       _mm512_srai_epi16(_mm512_add_epi16(cd, half), 8));
    const VI low = _mm512_packus_epi16(_mm512_and_si512(ab, byte), _mm512_and_si512(cd, byte));
    _mm512_storeu_si512(upper, _mm512_permutexvar_epi32(order, high));
    _mm512_storeu_si512(lower, _mm512_permutexvar_epi32(order, low));
}
// 16 bytes, and those of them that the low halves of bytes count.
using Table = VI;
inline Table load_table(const uint8_t *p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline VI look_up(Table table, VI indices) { return _mm512_shuffle_epi8(table, indices); }
inline VI load_bytes(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}

inline VF set_f(float v) { return _mm512_set1_ps(v); }
inline VF load_f(const float *p) { return _mm512_loadu_ps(p); }
inline void store_f(float *p, VF v) { _mm512_storeu_ps(p, v); }
inline VF add_f(VF a, VF b) { return _mm512_add_ps(a, b); }
inline VF sub_f(VF a, VF b) { return _mm512_sub_ps(a, b); }
inline VF mul_f(VF a, VF b) { return _mm512_mul_ps(a, b); }
inline VF div_f(VF a, VF b) { return _mm512_div_ps(a, b); }
inline VF fma_f(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
// b where one of the two is not a number.
inline VF max_f(VF a, VF b) { return _mm512_max_ps(a, b); }
inline VF min_f(VF a, VF b) { return _mm512_min_ps(a, b); }
// sum + a b; not the intrinsic where the sums are many, for the same reason as `dot`.
inline VF add_product(VF sum, VF a, VF b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
inline VF abs_f(VF a) { return _mm512_abs_ps(a); }
inline float max_of(VF v) { return _mm512_reduce_max_ps(v); }
inline VF to_float(VI v) { return _mm512_cvtepi32_ps(v); }
inline VF as_float(VI v) { return _mm512_castsi512_ps(v); }
inline float sum_of(VF v) { return _mm512_reduce_add_ps(v); }
// The sums of four vectors, side by side.
inline void store_sums(float *to, VF a, VF b, VF c, VF d) {
    const __m512d ab = _mm512_castps_pd(
        _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(
        _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    const VF all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                                      _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
// Zeros from lane `count` on.
inline VF first_of(VF v, int64_t count) { return _mm512_maskz_mov_ps(first(count), v); }
inline VI bits_of(VF v) { return _mm512_castps_si512(v); }
// To the nearest integer, halves to even; what is not a number becomes 0.
inline VI round_i(VF v) {
    return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
}

// The same, whatever comes of what is not a number.
inline VI nearest_i(VF v) { return _mm512_cvtps_epi32(v); }

// WIDTH elements.
template <int64_t TYPE> inline VF load_all(const void *p, int64_t i) {
    if constexpr (TYPE == FLOAT32) return _mm512_loadu_ps(static_cast<const float *>(p) + i);
    const __m256i *from =
        reinterpret_cast<const __m256i *>(static_cast<const uint16_t *>(p) + i);
    if constexpr (TYPE == FLOAT16) return _mm512_cvtph_ps(_mm256_loadu_si256(from));
    VI wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// Up to WIDTH elements, zeros behind them.
inline VF load_as(const void *p, int64_t i, int64_t type, int64_t count) {
    if (count >= WIDTH)
        return type == FLOAT32   ? load_all<FLOAT32>(p, i)
               : type == FLOAT16 ? load_all<FLOAT16>(p, i)
                                 : load_all<BFLOAT16>(p, i);
    __mmask16 mask = first(count);
    if (type == FLOAT32) return _mm512_maskz_loadu_ps(mask, static_cast<const float *>(p) + i);
    __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(p) + i);
    if (type == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Whole vectors go without a mask: what is stored through one is not loaded again before it has
// come to the cache.
inline void store_as(void *p, int64_t i, int64_t type, int64_t count, VF v) {
    __mmask16 mask = first(count);
    if (type == FLOAT32) {
        if (count >= WIDTH) return _mm512_storeu_ps(static_cast<float *>(p) + i, v);
        return _mm512_mask_storeu_ps(static_cast<float *>(p) + i, mask, v);
    }
    __m256i half;
    if (type == FLOAT16) {
        half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        VI u = _mm512_castps_si512(v);
        VI odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), set_i(1));
        VI rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, set_i(0x7FFF)));
        __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        rounded = _mm512_mask_mov_epi32(rounded, nan, set_i(0x7FC00000));
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    uint16_t *to = static_cast<uint16_t *>(p) + i;
    if (count >= WIDTH) return _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), half);
    _mm256_mask_storeu_epi16(to, mask, half);
}

// Vector c, element i to vector i, element c: pairs of vectors, then pairs of pairs, within the
// quarters of vectors, and then quarters as wholes.
template <int I = 0> INLINE inline void transpose_quarters(VF (&v)[WIDTH]) {
    __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[I], v[I + 1]));
    __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[I], v[I + 1]));
    __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[I + 2], v[I + 3]));
    __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[I + 2], v[I + 3]));
    v[I] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    v[I + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    v[I + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    v[I + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    if constexpr (I + 4 < WIDTH) transpose_quarters<I + 4>(v);
}
template <int I = 0> INLINE inline void exchange_quarters(VF (&v)[WIDTH]) {
    VF a = _mm512_shuffle_f32x4(v[I], v[I + 4], 0x88);
    VF b = _mm512_shuffle_f32x4(v[I], v[I + 4], 0xDD);
    VF c = _mm512_shuffle_f32x4(v[I + 8], v[I + 12], 0x88);
    VF d = _mm512_shuffle_f32x4(v[I + 8], v[I + 12], 0xDD);
    v[I] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[I + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[I + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
    v[I + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
    if constexpr (I < 3) exchange_quarters<I + 1>(v);
}
INLINE inline void transpose(VF (&v)[WIDTH]) {
    transpose_quarters(v);
    exchange_quarters(v);
}

#if defined(__AVX512BF16__)
#define HAS_PAIRS 1
// Two vectors of numbers as bfloat16, to nearest, halves to even: one after the other.
inline VF as_pairs(VF first, VF second) {
    return (VF)_mm512_cvtne2ps_pbh(second, first);
}
// The first inputs and the second ones of every lane as pairs of bfloat16.
inline VF interleaved_pairs(VF first, VF second) {
    const VI order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                      23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(
        _mm512_permutexvar_epi16(order, (VI)_mm512_cvtne2ps_pbh(second, first)));
}
// 256 + input I of every lane, a byte, as float32: it is put into the significand.
template <int I> inline VF above_256(VI bytes) {
    const VI bits = set_i(255 << 15), high = set_i(0x43800000);
    VI v = I == 0   ? _mm512_slli_epi32(bytes, 15)
           : I == 1 ? _mm512_slli_epi32(bytes, 7)
           : I == 2 ? _mm512_srli_epi32(bytes, 1)
                    : _mm512_srli_epi32(bytes, 9);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(v, bits, high, 0xEA));  // v & bits | high
}
// Adds the two products of bfloat16 in each lane, the odd one first, each fused with its sum. What
// is subnormal counts as zero, and becomes it.
inline VF add_pair(VF sum, VF a, VF b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
#endif

}  // namespace
}  // namespace qllm
