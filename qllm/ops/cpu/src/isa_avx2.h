// AVX2 with FMA: 8 lanes to a register, a panel is two registers wide. With AVX-VNNI one
// instruction makes the products of a step and adds them up, without it four do; where sums fit
// into 16 bits for a while (SHORT_SUMS: int8 times up to 6 bits) two, and two more now and then.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace qllm {
namespace {

using VI = __m256i;
using VF = __m256;
constexpr int WIDTH = 8;
#define REGISTER "x"
constexpr int FLOAT_ROWS = 6;  // of a tile; 16 registers hold no more
#define GEMV_OPERANDS 4        // of tiles for which weights are not unpacked to cache

inline VI zero_i() { return _mm256_setzero_si256(); }
inline VI set_i(int32_t v) { return _mm256_set1_epi32(v); }
inline VI load_i(const int32_t *p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
}
inline void store_i(int32_t *p, VI v) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), v); }
inline VI add_i(VI a, VI b) { return _mm256_add_epi32(a, b); }
inline VI sub_i(VI a, VI b) { return _mm256_sub_epi32(a, b); }
inline VI and_i(VI a, VI b) { return _mm256_and_si256(a, b); }
inline VI mul_i(VI a, VI b) { return _mm256_mullo_epi32(a, b); }
template <int N> inline VI shift_left(VI a) { return _mm256_slli_epi32(a, N); }
template <int N> inline VI shift_right(VI a) { return _mm256_srai_epi32(a, N); }
inline VI max_i(VI a, VI b) { return _mm256_max_epi32(a, b); }

inline int32_t sum_of_i(VI v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
inline int32_t max_of_i(VI v) {
    __m128i s = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

// uint8 weights of a step, int8 activations of a step in every lane, and their product.
inline VI weights(const uint8_t *p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i *>(p));
}
inline VI broadcast(const int8_t *p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}
#if defined(__AVXVNNI__)
constexpr int MAX_OPERANDS = 6;   // rows x operands of a tile
constexpr int ACCUMULATORS = 12;  // sums of one that registers hold
constexpr int OPERAND_BYTES = 1;   // that an input of an operand takes
using Weights = VI;
using Inputs = VI;
inline Weights prepared(VI bytes) { return bytes; }
inline Inputs four(const int8_t *p) { return broadcast(p); }
// Not the intrinsic: GCC moves its sums from register to register and to memory.
inline VI dot(VI sum, Weights w, Inputs x) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
    return sum;
}
#elif defined(SHORT_SUMS)
// Sums of pairs of products in 16 bits, which hold some steps of them, and those before them.
#define WIDENS 1
constexpr int MAX_OPERANDS = 4;
constexpr int ACCUMULATORS = 8;
constexpr int OPERAND_BYTES = 1;
using Weights = VI;
using Inputs = VI;
struct Sum {
    VI whole, pairs;
};
// After so many steps of b bits the sums in 16 bits may be full: 2 · 127 · (2^b - 1) to a step.
constexpr int64_t steps_to_widen(int64_t bits) { return bits < 5 ? 8 : 1 << (7 - bits); }
inline Weights prepared(VI bytes) { return bytes; }
inline Inputs four(const int8_t *p) { return broadcast(p); }
// Not the intrinsics: GCC moves their sums from register to register and to memory.
inline Sum dot(Sum sum, Weights w, Inputs x) {
    VI products;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
            : "+x"(sum.pairs), "=&x"(products)
            : "x"(w), "x"(x));
    return sum;
}
inline Sum no_sum() { return {zero_i(), zero_i()}; }
inline Sum widened(Sum sum) {
    return {add_i(sum.whole, _mm256_madd_epi16(sum.pairs, _mm256_set1_epi16(1))), zero_i()};
}
inline VI total(Sum sum) { return sum.whole; }
#else
// Pairs of products of bytes would saturate; those of 16 bits do not, and two planes of an input
// are one number of 16 bits, so that it takes one product: the inputs 0 and 2 of a step, 1 and 3.
constexpr int MAX_OPERANDS = 4;
constexpr int ACCUMULATORS = 12;
constexpr int OPERAND_BYTES = 2;
struct Weights {
    VI even, odd;
};
using Inputs = Weights;
inline Weights prepared(VI bytes) {
    return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
}
inline Inputs four(const int8_t *p) { return {broadcast(p), broadcast(p + 4)}; }
// Not the intrinsics, for the same reason: sums would go to memory.
inline VI add_products(VI sum, VI w, VI x) {
    VI products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(sum), "=&x"(products)
            : "x"(w), "x"(x));
    return sum;
}
inline VI dot(VI sum, const Weights &w, const Inputs &x) {
    return add_products(add_products(sum, w.even, x.even), w.odd, x.odd);
}
// Two int16 weights of every lane times two int16 activations, and the activations of WIDTH inputs:
// of each step the inputs 0, 2, 1 and 3, steps `next_step` bytes apart.
#define HAS_WORDS 1
inline VI dot_words(VI sum, VI w, VI x) { return add_products(sum, w, x); }
inline void store_words(int8_t *p, int64_t next_step, VI v) {
    const VI words = _mm256_shufflelo_epi16(_mm256_packs_epi32(v, v), 0xD8);
    const int64_t steps[] = {_mm256_extract_epi64(words, 0), _mm256_extract_epi64(words, 2)};
    __builtin_memcpy(p, steps, 8);
    __builtin_memcpy(p + next_step, steps + 1, 8);
}
// The bytes of a step as int16: inputs 0 and 2 of each lane, 1 and 3.
inline VI even_words(VI bytes) { return prepared(bytes).even; }
inline VI odd_words(VI bytes) { return prepared(bytes).odd; }
inline VI set_words(int16_t v) { return _mm256_set1_epi16(v); }
inline VI add_words(VI a, VI b) { return _mm256_add_epi16(a, b); }
inline VI sub_words(VI a, VI b) { return _mm256_sub_epi16(a, b); }
inline void store_words(uint8_t *p, VI v) {
    _mm256_store_si256(reinterpret_cast<__m256i *>(p), v);
}
// Each of the lanes 0, 2, … times its neighbour; 0 in the others.
inline VI mul_neighbours(VI v) {
    const VI products = _mm256_mul_epi32(v, _mm256_srli_epi64(v, 32));
    return _mm256_and_si256(products, _mm256_set1_epi64x(0xFFFFFFFF));
}
#endif
// The low byte of every lane.
inline void store_bytes(int8_t *p, VI v) {
    const VI bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                      0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    VI low = _mm256_shuffle_epi8(v, bytes);
    int32_t half[2] = {_mm256_extract_epi32(low, 0), _mm256_extract_epi32(low, 4)};
    __builtin_memcpy(p, half, 8);
}
// 16 bytes, and those of them that the low halves of bytes count.
using Table = VI;
inline Table load_table(const uint8_t *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline VI look_up(Table table, VI indices) { return _mm256_shuffle_epi8(table, indices); }
inline VI load_bytes(const uint8_t *p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
}

inline VF set_f(float v) { return _mm256_set1_ps(v); }
inline VF load_f(const float *p) { return _mm256_loadu_ps(p); }
inline void store_f(float *p, VF v) { _mm256_storeu_ps(p, v); }
inline VF add_f(VF a, VF b) { return _mm256_add_ps(a, b); }
inline VF sub_f(VF a, VF b) { return _mm256_sub_ps(a, b); }
inline VF mul_f(VF a, VF b) { return _mm256_mul_ps(a, b); }
inline VF div_f(VF a, VF b) { return _mm256_div_ps(a, b); }
inline VF fma_f(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
// b where one of the two is not a number.
inline VF max_f(VF a, VF b) { return _mm256_max_ps(a, b); }
inline VF min_f(VF a, VF b) { return _mm256_min_ps(a, b); }
// sum + a b; not the intrinsic where the sums are many, for the same reason as `dot`.
inline VF add_product(VF sum, VF a, VF b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
}
inline VF abs_f(VF a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline VF to_float(VI v) { return _mm256_cvtepi32_ps(v); }
inline VF as_float(VI v) { return _mm256_castsi256_ps(v); }
inline float sum_of(VF v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float max_of(VF v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
// The sums of four vectors, side by side.
inline void store_sums(float *to, VF a, VF b, VF c, VF d) {
    const VF all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
// Zeros from lane `count` on.
inline VF first_of(VF v, int64_t count) {
    VI lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(set_i(int32_t(count)), lane)));
}
inline VI bits_of(VF v) { return _mm256_castps_si256(v); }
// To the nearest integer, halves to even; what is not a number becomes 0.
inline VI round_i(VF v) {
    VI number = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q));
    return _mm256_and_si256(number, _mm256_cvtps_epi32(v));
}

// The same, whatever comes of what is not a number.
inline VI nearest_i(VF v) { return _mm256_cvtps_epi32(v); }

// Up to 8 elements of `size` bytes, zeros behind them.
template <int SIZE> inline void copy_few(void *to, const void *from, int64_t count) {
    for (int64_t i = 0; i < count * SIZE; i++)
        static_cast<char *>(to)[i] = static_cast<const char *>(from)[i];
}

// WIDTH elements.
template <int64_t TYPE> inline VF load_all(const void *p, int64_t i) {
    if constexpr (TYPE == FLOAT32) return _mm256_loadu_ps(static_cast<const float *>(p) + i);
    const __m128i *from =
        reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(p) + i);
    if constexpr (TYPE == FLOAT16) return _mm256_cvtph_ps(_mm_loadu_si128(from));
    VI wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// Up to WIDTH elements, zeros behind them.
inline VF load_as(const void *p, int64_t i, int64_t type, int64_t count) {
    if (type == FLOAT32) {
        const float *from = static_cast<const float *>(p) + i;
        if (count >= WIDTH) return _mm256_loadu_ps(from);
        alignas(32) float few[WIDTH] = {};
        if (count > 0) copy_few<4>(few, from, count);
        return _mm256_load_ps(few);
    }
    const uint16_t *from = static_cast<const uint16_t *>(p) + i;
    __m128i half;
    if (count >= WIDTH) {
        half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    } else {
        alignas(16) uint16_t few[WIDTH] = {};
        if (count > 0) copy_few<2>(few, from, count);
        half = _mm_load_si128(reinterpret_cast<const __m128i *>(few));
    }
    if (type == FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline void store_as(void *p, int64_t i, int64_t type, int64_t count, VF v) {
    if (type == FLOAT32) {
        float *to = static_cast<float *>(p) + i;
        if (count >= WIDTH) return _mm256_storeu_ps(to, v);
        alignas(32) float few[WIDTH];
        _mm256_store_ps(few, v);
        return copy_few<4>(to, few, count);
    }
    __m128i half;
    if (type == FLOAT16) {
        half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        VI u = _mm256_castps_si256(v);
        VI odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), set_i(1));
        VI rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, set_i(0x7FFF)));
        VI nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, set_i(0x7FC00000), nan), 16);
        rounded = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
        half = _mm256_castsi256_si128(rounded);
    }
    uint16_t *to = static_cast<uint16_t *>(p) + i;
    if (count >= WIDTH) return _mm_storeu_si128(reinterpret_cast<__m128i *>(to), half);
    alignas(16) uint16_t few[WIDTH];
    _mm_store_si128(reinterpret_cast<__m128i *>(few), half);
    copy_few<2>(to, few, count);
}

// Vector c, element i to vector i, element c: pairs of vectors, then pairs of pairs, within the
// halves of vectors, and then halves as wholes.
template <int I = 0> INLINE inline void transpose_halves(VF (&v)[WIDTH]) {
    __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[I], v[I + 1]));
    __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[I], v[I + 1]));
    __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[I + 2], v[I + 3]));
    __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[I + 2], v[I + 3]));
    v[I] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    v[I + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    v[I + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    v[I + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
    if constexpr (I + 4 < WIDTH) transpose_halves<I + 4>(v);
}
template <int I = 0> INLINE inline void exchange_halves(VF (&v)[WIDTH]) {
    VF a = v[I], b = v[I + 4];
    v[I] = _mm256_permute2f128_ps(a, b, 0x20);
    v[I + 4] = _mm256_permute2f128_ps(a, b, 0x31);
    if constexpr (I < 3) exchange_halves<I + 1>(v);
}
INLINE inline void transpose(VF (&v)[WIDTH]) {
    transpose_halves(v);
    exchange_halves(v);
}

}  // namespace
}  // namespace qllm
