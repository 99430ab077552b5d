// GGUF's blocks as rows of bits, with a scale, and perhaps an offset, for each 32 values.
#pragma once

#include "isa.h"
#include "kernels.h"
#include "threads.h"

#if defined(__BMI2__)
#include <immintrin.h>
#endif

namespace qllm {
namespace {

constexpr int64_t BLOCK = 32;        // values of a group
constexpr int64_t SUPER_GROUPS = 8;  // groups of the larger blocks

// What a type's blocks are: bytes, groups, bits of a value as it is written, whether scales are the
// block's float16 as they are, which begin it, and whether there are offsets.
struct BlockShape {
    int64_t nbytes, groups, bits;
    bool halves, offsets;
};

constexpr BlockShape shape_of_block(int64_t kind) {
    switch (kind) {
        case Q4_0: return {18, 1, 4, true, false};
        case Q4_1: return {20, 1, 4, true, true};
        case Q5_0: return {22, 1, 5, true, false};
        case Q5_1: return {24, 1, 5, true, true};
        case Q8_0: return {34, 1, 8, true, false};
        case Q4_K: return {144, SUPER_GROUPS, 4, false, true};
        case Q5_K: return {176, SUPER_GROUPS, 5, false, true};
        case IQ4_NL: return {18, 1, 8, true, false};
        case IQ4_XS: return {136, SUPER_GROUPS, 8, false, false};
        default: return {17, 1, 5, false, false};  // MXFP4
    }
}

// The low halves of 16 bytes, then their high ones.
static inline void spread_halves(const uint8_t *from, uint8_t *to) {
    for (int i = 0; i < 16; i++) {
        to[i] = from[i] & 15;
        to[16 + i] = from[i] >> 4;
    }
}

// One of two halves of 32 bytes.
static inline void half_of(const uint8_t *from, int64_t high, uint8_t *to) {
    for (int i = 0; i < BLOCK; i++) to[i] = from[i] >> (4 * high) & 15;
}

// The values of a group of a block, a byte each; of the last three types by their levels.
template <int64_t KIND>
inline void values_of_group(const uint8_t *block, int64_t group, const uint8_t *levels,
                            uint8_t *to) {
    constexpr BlockShape SHAPE = shape_of_block(KIND);
    constexpr int64_t HEADER = SHAPE.offsets ? 4 : 2;
    if constexpr (KIND == Q4_0 || KIND == Q4_1) {
        spread_halves(block + HEADER, to);
    } else if constexpr (KIND == Q5_0 || KIND == Q5_1) {
        uint32_t fifths;
        __builtin_memcpy(&fifths, block + HEADER, 4);
        spread_halves(block + HEADER + 4, to);
        for (int i = 0; i < BLOCK; i++) to[i] |= (fifths >> i & 1) << 4;
    } else if constexpr (KIND == Q8_0) {
        for (int i = 0; i < BLOCK; i++) to[i] = block[HEADER + i] ^ 0x80;
    } else if constexpr (KIND == Q4_K) {
        half_of(block + 16 + group / 2 * BLOCK, group % 2, to);
    } else if constexpr (KIND == Q5_K) {
        half_of(block + 48 + group / 2 * BLOCK, group % 2, to);
        for (int i = 0; i < BLOCK; i++) to[i] |= (block[16 + i] >> group & 1) << 4;
    } else {
        constexpr int64_t FIRST = KIND == IQ4_XS ? 8 : KIND == MXFP4 ? 1 : 2;
        spread_halves(block + FIRST + group * BLOCK / 2, to);
        for (int i = 0; i < BLOCK; i++) to[i] = levels[to[i]];
    }
}

// The scales, and the offsets, of a block whose groups share one or two factors.
template <int64_t KIND>
inline void grid_of_block(const uint8_t *block, float *scales, float *offsets) {
    if constexpr (KIND == MXFP4) {  // half of a power of two, by its exponent plus 127
        const uint32_t exponent = block[0];
        const uint32_t bits = exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23;
        __builtin_memcpy(scales, &bits, 4);
        return;
    }
    float factors[WIDTH < 2 ? 2 : WIDTH];
    for (int64_t i = 0; i < 2; i += WIDTH)
        store_f(factors + i, load_as(block + 2 * i, 0, FLOAT16, smaller(WIDTH, 2 - i)));
    if constexpr (KIND == IQ4_XS) {
        uint16_t high;
        __builtin_memcpy(&high, block + 2, 2);
        for (int g = 0; g < SUPER_GROUPS; g++) {
            const int low = block[4 + g / 2] >> (4 * (g % 2)) & 15;
            scales[g] = factors[0] * float((low | (high >> (2 * g) & 3) << 4) - 32);
        }
    } else {
        const uint8_t *packed = block + 4;  // 6 bits each: 8 scales and 8 minima
        for (int g = 0; g < SUPER_GROUPS; g++) {
            int scale = packed[g] & 63, minimum = packed[4 + g] & 63;
            if (g >= 4) {
                scale = (packed[4 + g] & 15) | packed[g - 4] >> 6 << 4;
                minimum = packed[4 + g] >> 4 | packed[g] >> 6 << 4;
            }
            scales[g] = factors[0] * float(scale);
            offsets[g] = -(factors[1] * float(minimum));
        }
    }
}

// 32 bytes as a stream of values of b bits, the lowest bits first.
template <int BITS> inline void write_values(const uint8_t *bytes, uint8_t *to) {
    for (int i = 0; i < 4; i++) {
        uint64_t word, packed;
        __builtin_memcpy(&word, bytes + 8 * i, 8);
#if defined(__BMI2__)
        packed = _pext_u64(word, ((1u << BITS) - 1) * 0x0101010101010101ull);
#else
        packed = 0;
        for (int j = 0; j < 8; j++)
            packed |= (word >> (8 * j) & ((1u << BITS) - 1)) << (BITS * j);
#endif
        __builtin_memcpy(to + BITS * i, &packed, BITS);
    }
}

template <int64_t KIND> Status unblock_kind(const Blocks &b) {
    constexpr BlockShape SHAPE = shape_of_block(KIND);
    constexpr int64_t BITS = SHAPE.bits, GROUPS = SHAPE.groups;
    for_each(b.rows, true, [&](int64_t row, int64_t) {
        const uint8_t *block = b.x + row * b.blocks * SHAPE.nbytes;
        int64_t group = row * b.blocks * GROUPS;
        for (int64_t i = 0; i < b.blocks; i++, block += SHAPE.nbytes) {
            if constexpr (SHAPE.halves) {
                __builtin_memcpy(static_cast<uint16_t *>(b.scales) + group, block, 2);
                if constexpr (SHAPE.offsets)
                    __builtin_memcpy(static_cast<uint16_t *>(b.offsets) + group, block + 2, 2);
            } else {
                float *offsets = static_cast<float *>(b.offsets);
                grid_of_block<KIND>(block, static_cast<float *>(b.scales) + group,
                                    SHAPE.offsets ? offsets + group : nullptr);
            }
            for (int64_t g = 0; g < GROUPS; g++, group++) {
                alignas(32) uint8_t bytes[BLOCK];
                values_of_group<KIND>(block, g, b.levels, bytes);
                write_values<BITS>(bytes, b.q + group * BLOCK / 8 * BITS);
            }
        }
    });
    return Status::OK;
}

inline Status unblock(const Blocks &b) {
    switch (b.kind) {
        case Q4_0: return unblock_kind<Q4_0>(b);
        case Q4_1: return unblock_kind<Q4_1>(b);
        case Q5_0: return unblock_kind<Q5_0>(b);
        case Q5_1: return unblock_kind<Q5_1>(b);
        case Q8_0: return unblock_kind<Q8_0>(b);
        case Q4_K: return unblock_kind<Q4_K>(b);
        case Q5_K: return unblock_kind<Q5_K>(b);
        case IQ4_NL: return unblock_kind<IQ4_NL>(b);
        case IQ4_XS: return unblock_kind<IQ4_XS>(b);
        default: return unblock_kind<MXFP4>(b);
    }
}

}  // namespace
}  // namespace qllm
