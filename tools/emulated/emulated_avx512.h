// The intrinsics of AVX-512 that the kernels call, and the instructions that they have in assembly,
// for machines with AVX2 alone: by halves where AVX2 has the same, else lane by lane. A name is
// that of the intrinsic without its prefix, or of the instruction; tools/emulate.py renames the
// calls.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define EMULATED inline __attribute__((always_inline, unused))
// Not inlined, nor moved across the changes of MXCSR around it.
#define IN_OWN_MODE __attribute__((noinline, noipa, unused))

// As a template's argument, a vector type loses the attribute that it may alias; copies need none.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace qllm {
namespace {
namespace emulated {

template <typename To, typename From> EMULATED To as(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

template <typename T, int COUNT = 64 / sizeof(T)> struct Lanes {
    T at[COUNT];
    T &operator[](int i) { return at[i]; }
};
using Floats = Lanes<float>;
using Ints = Lanes<int32_t>;
using Bits = Lanes<uint32_t>;
using Words = Lanes<uint16_t>;

template <typename Half> struct Halves {
    Half low, high;
};
EMULATED Halves<__m256i> halves(__m512i v) { return as<Halves<__m256i>>(v); }
EMULATED Halves<__m256> halves(__m512 v) { return as<Halves<__m256>>(v); }
EMULATED Halves<__m256d> halves(__m512d v) { return as<Halves<__m256d>>(v); }
EMULATED __m512i joined(__m256i low, __m256i high) {
    return as<__m512i>(Halves<__m256i>{low, high});
}
EMULATED __m512 joined(__m256 low, __m256 high) { return as<__m512>(Halves<__m256>{low, high}); }
EMULATED __m512d joined(__m256d low, __m256d high) {
    return as<__m512d>(Halves<__m256d>{low, high});
}

#define BY_HALVES(Vector, name, half)                                              \
    EMULATED Vector name(Vector a, Vector b) {                                     \
        const auto x = halves(a), y = halves(b);                                   \
        return joined(_mm256_##half(x.low, y.low), _mm256_##half(x.high, y.high)); \
    }
BY_HALVES(__m512i, add_epi16, add_epi16)
BY_HALVES(__m512i, add_epi32, add_epi32)
BY_HALVES(__m512i, and_si512, and_si256)
BY_HALVES(__m512i, max_epi32, max_epi32)
BY_HALVES(__m512i, min_epi32, min_epi32)
BY_HALVES(__m512i, mul_epi32, mul_epi32)
BY_HALVES(__m512i, mullo_epi32, mullo_epi32)
BY_HALVES(__m512i, packs_epi16, packs_epi16)
BY_HALVES(__m512i, packs_epi32, packs_epi32)
BY_HALVES(__m512i, packus_epi16, packus_epi16)
BY_HALVES(__m512i, shuffle_epi8, shuffle_epi8)
BY_HALVES(__m512i, sub_epi16, sub_epi16)
BY_HALVES(__m512i, sub_epi32, sub_epi32)
BY_HALVES(__m512i, sub_epi8, sub_epi8)
BY_HALVES(__m512, add_ps, add_ps)
BY_HALVES(__m512, div_ps, div_ps)
BY_HALVES(__m512, max_ps, max_ps)
BY_HALVES(__m512, min_ps, min_ps)
BY_HALVES(__m512, mul_ps, mul_ps)
BY_HALVES(__m512, sub_ps, sub_ps)
BY_HALVES(__m512, unpackhi_ps, unpackhi_ps)
BY_HALVES(__m512, unpacklo_ps, unpacklo_ps)
BY_HALVES(__m512d, unpackhi_pd, unpackhi_pd)
BY_HALVES(__m512d, unpacklo_pd, unpacklo_pd)
#undef BY_HALVES

#define SHIFTED_BY_HALVES(name)                                                   \
    EMULATED __m512i name(__m512i v, int count) {                                 \
        const auto x = halves(v);                                                 \
        return joined(_mm256_##name(x.low, count), _mm256_##name(x.high, count)); \
    }
SHIFTED_BY_HALVES(slli_epi32)
SHIFTED_BY_HALVES(srai_epi16)
SHIFTED_BY_HALVES(srai_epi32)
SHIFTED_BY_HALVES(srli_epi16)
SHIFTED_BY_HALVES(srli_epi32)
SHIFTED_BY_HALVES(srli_epi64)
#undef SHIFTED_BY_HALVES

EMULATED __m512 abs_ps(__m512 v) {
    const auto x = halves(v);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return joined(_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high));
}
EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
    const auto x = halves(a), y = halves(b), z = halves(c);
    return joined(_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high));
}

EMULATED __m512d castps_pd(__m512 v) { return as<__m512d>(v); }
EMULATED __m512 castpd_ps(__m512d v) { return as<__m512>(v); }
EMULATED __m512i castps_si512(__m512 v) { return as<__m512i>(v); }
EMULATED __m512 castsi512_ps(__m512i v) { return as<__m512>(v); }
EMULATED __m256 castps512_ps256(__m512 v) { return halves(v).low; }
EMULATED __m256 extractf32x8_ps(__m512 v, int half) {
    return half ? halves(v).high : halves(v).low;
}

EMULATED __m512i set1_epi16(int16_t v) {
    return joined(_mm256_set1_epi16(v), _mm256_set1_epi16(v));
}
EMULATED __m512i set1_epi32(int32_t v) {
    return joined(_mm256_set1_epi32(v), _mm256_set1_epi32(v));
}
EMULATED __m512 set1_ps(float v) { return joined(_mm256_set1_ps(v), _mm256_set1_ps(v)); }
EMULATED __m512i setzero_si512() {
    return joined(_mm256_setzero_si256(), _mm256_setzero_si256());
}
EMULATED __m512i broadcast_i32x4(__m128i v) {
    return joined(_mm256_broadcastsi128_si256(v), _mm256_broadcastsi128_si256(v));
}
template <typename... T> EMULATED __m512i setr_epi32(T... v) {
    return as<__m512i>(Ints{{int32_t(v)...}});
}
// The last argument is lane 0.
template <typename... T> EMULATED __m512i set_epi16(T... v) {
    Words given{{uint16_t(v)...}}, out;
    for (int i = 0; i < 32; i++) out[i] = given[31 - i];
    return as<__m512i>(out);
}

EMULATED __m256i cvtepi32_epi16(__m512i v) {
    auto x = as<Bits>(v);
    Lanes<uint16_t, 16> out;
    for (int i = 0; i < 16; i++) out[i] = uint16_t(x[i]);
    return as<__m256i>(out);
}
EMULATED __m128i cvtepi32_epi8(__m512i v) {
    auto x = as<Bits>(v);
    Lanes<uint8_t, 16> out;
    for (int i = 0; i < 16; i++) out[i] = uint8_t(x[i]);
    return as<__m128i>(out);
}
EMULATED __m512i cvtepu16_epi32(__m256i v) {
    return joined(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)),
                  _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}
EMULATED __m512i cvtepu8_epi32(__m128i v) {
    return joined(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}
EMULATED __m512 cvtepi32_ps(__m512i v) {
    return joined(_mm256_cvtepi32_ps(halves(v).low), _mm256_cvtepi32_ps(halves(v).high));
}
EMULATED __m512i cvtps_epi32(__m512 v) {
    return joined(_mm256_cvtps_epi32(halves(v).low), _mm256_cvtps_epi32(halves(v).high));
}
EMULATED __m512 cvtph_ps(__m256i v) {
    return joined(_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
                  _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}
// AVX2's instruction does not know _MM_FROUND_NO_EXC, which is about flags that nobody reads.
EMULATED __m256i cvtps_ph(__m512 v, int) {
    return _mm256_setr_m128i(_mm256_cvtps_ph(halves(v).low, _MM_FROUND_TO_NEAREST_INT),
                             _mm256_cvtps_ph(halves(v).high, _MM_FROUND_TO_NEAREST_INT));
}

// What needs 64 bytes' alignment raises an exception without it.
EMULATED void check_aligned(const void *p) {
    if (!(reinterpret_cast<uintptr_t>(p) & 63)) return;
    fprintf(stderr, "emulation: an aligned load or store at %p\n", p);
    abort();
}
EMULATED __m512i loadu_si512(const void *p) {
    __m512i v;
    memcpy(&v, p, 64);
    return v;
}
EMULATED __m512i load_si512(const void *p) {
    check_aligned(p);
    return loadu_si512(p);
}
EMULATED __m512 loadu_ps(const void *p) { return as<__m512>(loadu_si512(p)); }
EMULATED void storeu_si512(void *p, __m512i v) { memcpy(p, &v, 64); }
EMULATED void store_si512(void *p, __m512i v) {
    check_aligned(p);
    storeu_si512(p, v);
}
EMULATED void storeu_ps(void *p, __m512 v) { memcpy(p, &v, 64); }

// Lanes without a bit are neither read nor written, even where there is no memory.
template <typename T> EMULATED Lanes<T, 16> loaded(__mmask16 mask, const void *p) {
    Lanes<T, 16> out = {};
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) memcpy(&out[i], static_cast<const T *>(p) + i, sizeof(T));
    return out;
}
template <typename T> EMULATED void store(void *p, __mmask16 mask, Lanes<T, 16> v) {
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) memcpy(static_cast<T *>(p) + i, &v[i], sizeof(T));
}
EMULATED __m512 maskz_loadu_ps(__mmask16 mask, const void *p) {
    return as<__m512>(loaded<float>(mask, p));
}
EMULATED __m256i maskz_loadu_epi16(__mmask16 mask, const void *p) {
    return as<__m256i>(loaded<uint16_t>(mask, p));
}
EMULATED void mask_storeu_ps(void *p, __mmask16 mask, __m512 v) { store(p, mask, as<Floats>(v)); }
EMULATED void mask_storeu_epi16(void *p, __mmask16 mask, __m256i v) {
    store(p, mask, as<Lanes<uint16_t, 16>>(v));
}
EMULATED __m512i mask_mov_epi32(__m512i without, __mmask16 mask, __m512i with) {
    auto out = as<Bits>(without), x = as<Bits>(with);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) out[i] = x[i];
    return as<__m512i>(out);
}
EMULATED __m512i maskz_mov_epi32(__mmask16 mask, __m512i v) {
    return mask_mov_epi32(setzero_si512(), mask, v);
}
EMULATED __m512 maskz_mov_ps(__mmask16 mask, __m512 v) {
    return as<__m512>(maskz_mov_epi32(mask, as<__m512i>(v)));
}
EMULATED __m512i maskz_cvtps_epi32(__mmask16 mask, __m512 v) {
    return maskz_mov_epi32(mask, cvtps_epi32(v));
}
// Whether both are numbers, _CMP_ORD_Q, or one is not, _CMP_UNORD_Q.
EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b, int comparison) {
    auto x = as<Floats>(a), y = as<Floats>(b);
    if (comparison != _CMP_ORD_Q && comparison != _CMP_UNORD_Q) abort();
    int mask = 0;
    for (int i = 0; i < 16; i++)
        mask |= (__builtin_isunordered(x[i], y[i]) == (comparison == _CMP_UNORD_Q)) << i;
    return __mmask16(mask);
}
EMULATED __mmask16 test_epi32_mask(__m512i a, __m512i b) {
    auto x = as<Bits>(a), y = as<Bits>(b);
    int mask = 0;
    for (int i = 0; i < 16; i++) mask |= ((x[i] & y[i]) != 0) << i;
    return __mmask16(mask);
}

EMULATED __m512i permutexvar_epi32(__m512i order, __m512i v) {
    auto from = as<Bits>(order), x = as<Bits>(v);
    Bits out;
    for (int i = 0; i < 16; i++) out[i] = x[int(from[i] & 15)];
    return as<__m512i>(out);
}
EMULATED __m512i permutexvar_epi16(__m512i order, __m512i v) {
    auto from = as<Words>(order), x = as<Words>(v);
    Words out;
    for (int i = 0; i < 32; i++) out[i] = x[from[i] & 31];
    return as<__m512i>(out);
}
EMULATED __m512 shuffle_f32x4(__m512 a, __m512 b, int quarters) {
    auto x = as<Floats>(a), y = as<Floats>(b);
    Floats out;
    for (int i = 0; i < 4; i++)
        memcpy(&out[4 * i], &(i < 2 ? x : y)[4 * (quarters >> 2 * i & 3)], 16);
    return as<__m512>(out);
}
// Bit n of `table` is the result where a, b and c are bits 2, 1 and 0 of n.
EMULATED __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    auto x = as<Bits>(a), y = as<Bits>(b), z = as<Bits>(c);
    Bits out = {};
    for (int i = 0; i < 16; i++)
        for (int n = 0; n < 8; n++)
            if (table >> n & 1)
                out[i] |= (n & 4 ? x[i] : ~x[i]) & (n & 2 ? y[i] : ~y[i]) & (n & 1 ? z[i] : ~z[i]);
    return as<__m512i>(out);
}

EMULATED int32_t reduce_add_epi32(__m512i v) {
    auto x = as<Bits>(v);
    uint32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += x[i];
    return int32_t(sum);
}
EMULATED int32_t reduce_max_epi32(__m512i v) {
    auto x = as<Ints>(v);
    int32_t most = x[0];
    for (int i = 1; i < 16; i++) most = x[i] > most ? x[i] : most;
    return most;
}
// In the order that compilers' headers have: halves, quarters, pairs.
EMULATED float reduce_add_ps(__m512 v) {
    const __m256 half = _mm256_add_ps(halves(v).high, halves(v).low);
    const __m128 quarter =
        _mm_add_ps(_mm256_extractf128_ps(half, 1), _mm256_castps256_ps128(half));
    const __m128 pair = _mm_add_ps(quarter, _mm_permute_ps(quarter, 0x4E));
    return pair[0] + pair[1];
}
EMULATED float reduce_max_ps(__m512 v) {
    const __m256 half = _mm256_max_ps(halves(v).high, halves(v).low);
    const __m128 quarter =
        _mm_max_ps(_mm256_extractf128_ps(half, 1), _mm256_castps256_ps128(half));
    const __m128 pair = _mm_max_ps(quarter, _mm_permute_ps(quarter, 0x4E));
    return _mm_cvtss_f32(_mm_max_ps(pair, _mm_permute_ps(pair, 0xB1)));
}

// To nearest, halves to even; what is subnormal becomes zero, and NaN a quiet one.
EMULATED uint16_t to_bfloat16(uint32_t bits) {
    if (!(bits & 0x7F800000)) return uint16_t(bits >> 16 & 0x8000);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
// The second operand takes the low half.
EMULATED __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
    auto x = as<Bits>(low), y = as<Bits>(high);
    Words out;
    for (int i = 0; i < 16; i++) {
        out[i] = to_bfloat16(x[i]);
        out[16 + i] = to_bfloat16(y[i]);
    }
    return as<__m512i>(out);
}

EMULATED __m512 vfmadd231ps(__m512 sum, __m512 a, __m512 b) { return fmadd_ps(a, b, sum); }

// uint8 times int8, four products to a lane. Sums wrap.
EMULATED __m256i vpdpbusd(__m256i sum, __m256i w, __m256i x) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
EMULATED __m512i vpdpbusd(__m512i sum, __m512i w, __m512i x) {
    return joined(vpdpbusd(halves(sum).low, halves(w).low, halves(x).low),
                  vpdpbusd(halves(sum).high, halves(w).high, halves(x).high));
}
// int16 times int16, two products to a lane. Sums wrap.
EMULATED __m512i vpdpwssd(__m512i sum, __m512i w, __m512i x) {
    const __m256i low = _mm256_madd_epi16(halves(w).low, halves(x).low);
    const __m256i high = _mm256_madd_epi16(halves(w).high, halves(x).high);
    return add_epi32(sum, joined(low, high));
}

// To nearest, halves to even, no exceptions; what is subnormal counts as zero, and becomes it: what
// instructions for bfloat16 do whatever MXCSR says, and others where it says so.
constexpr unsigned BFLOAT16_MODE = 0x1F80 | 0x8000 | 0x0040;

// The first and the second bfloat16 of every lane as float32.
EMULATED __m256 even_pairs(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
EMULATED __m256 odd_pairs(__m256i v) {
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(int32_t(0xFFFF0000))));
}
// The odd product first, each fused with its sum.
IN_OWN_MODE void add_pairs_of_half(__m256 *sum, const __m256i *a, const __m256i *b) {
    *sum = _mm256_fmadd_ps(odd_pairs(*a), odd_pairs(*b), *sum);
    *sum = _mm256_fmadd_ps(even_pairs(*a), even_pairs(*b), *sum);
}
IN_OWN_MODE __m512 vdpbf16ps(__m512 sum, __m512 a, __m512 b) {
    auto sums = halves(sum);
    const auto x = halves(as<__m512i>(a)), y = halves(as<__m512i>(b));
    const unsigned before = _mm_getcsr();
    _mm_setcsr(BFLOAT16_MODE);
    add_pairs_of_half(&sums.low, &x.low, &y.low);
    add_pairs_of_half(&sums.high, &x.high, &y.high);
    _mm_setcsr(before);
    return joined(sums.low, sums.high);
}

}  // namespace emulated
}  // namespace
}  // namespace qllm

#pragma GCC diagnostic pop
