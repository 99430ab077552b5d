// GGUF's blocks as rows of bits, with a scale, and perhaps an offset, for each 32 values or 16.
#pragma once

#include "isa.h"
#include "kernels.h"
#include "threads.h"

#if defined(__BMI2__)
#include <immintrin.h>
#endif

namespace qllm {
namespace {

constexpr int64_t BLOCK = 32;      // values of the smaller blocks, or of a part of the larger ones
constexpr int64_t SUPER_PARTS = 8;

// What a type's blocks are: bytes, parts, bits of a value as it is written, whether scales are the
// block's float16 as they are, which begin it, whether there are offsets; where the float16 factors
// of other scales lie, and how many of these a part has.
struct BlockShape {
    int64_t nbytes, parts, bits;
    bool halves, offsets;
    int64_t factors = 0, part_scales = 1;
};

constexpr BlockShape shape_of_block(int64_t kind) {
    switch (kind) {
        case Q4_0: return {18, 1, 4, true, false};
        case Q4_1: return {20, 1, 4, true, true};
        case Q5_0: return {22, 1, 5, true, false};
        case Q5_1: return {24, 1, 5, true, true};
        case Q8_0: return {34, 1, 8, true, false};
        case Q2_K: return {84, SUPER_PARTS, 2, false, true, 80, 2};
        case Q3_K: return {110, SUPER_PARTS, 3, false, false, 108, 2};
        case Q4_K: return {144, SUPER_PARTS, 4, false, true};
        case Q5_K: return {176, SUPER_PARTS, 5, false, true};
        case Q6_K: return {210, SUPER_PARTS, 6, false, false, 208, 2};
        case IQ4_NL: return {18, 1, 8, true, false};
        case IQ4_XS: return {136, SUPER_PARTS, 8, false, false};
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

// One of four quarters of 32 bytes.
static inline void quarter_of(const uint8_t *from, int64_t quarter, uint8_t *to) {
    for (int i = 0; i < BLOCK; i++) to[i] = from[i] >> (2 * quarter) & 3;
}

// The values of a part of a block, a byte each; of the last three types by their levels.
template <int64_t KIND>
inline void values_of_part(const uint8_t *block, int64_t part, const uint8_t *levels, uint8_t *to) {
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
    } else if constexpr (KIND == Q2_K) {
        quarter_of(block + 16 + part / 4 * BLOCK, part % 4, to);
    } else if constexpr (KIND == Q3_K) {
        quarter_of(block + 32 + part / 4 * BLOCK, part % 4, to);
        for (int i = 0; i < BLOCK; i++) to[i] |= (block[i] >> part & 1) << 2;
    } else if constexpr (KIND == Q4_K) {
        half_of(block + 16 + part / 2 * BLOCK, part % 2, to);
    } else if constexpr (KIND == Q5_K) {
        half_of(block + 48 + part / 2 * BLOCK, part % 2, to);
        for (int i = 0; i < BLOCK; i++) to[i] |= (block[16 + i] >> part & 1) << 4;
    } else if constexpr (KIND == Q6_K) {
        uint8_t high[BLOCK];
        half_of(block + part / 4 * 64 + part % 2 * BLOCK, part % 4 / 2, to);
        quarter_of(block + 128 + part / 4 * BLOCK, part % 4, high);
        for (int i = 0; i < BLOCK; i++) to[i] |= high[i] << 4;
    } else {
        constexpr int64_t FIRST = KIND == IQ4_XS ? 8 : KIND == MXFP4 ? 1 : 2;
        spread_halves(block + FIRST + part * BLOCK / 2, to);
        for (int i = 0; i < BLOCK; i++) to[i] = levels[to[i]];
    }
}

// The scales, and the offsets, of a block that has one or two factors for all of them.
template <int64_t KIND>
inline void grid_of_block(const uint8_t *block, float *scales, float *offsets) {
    if constexpr (KIND == MXFP4) {  // half of a power of two, by its exponent plus 127
        const uint32_t exponent = block[0];
        const uint32_t bits = exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23;
        __builtin_memcpy(scales, &bits, 4);
        return;
    }
    float factors[WIDTH < 2 ? 2 : WIDTH];
    constexpr BlockShape SHAPE = shape_of_block(KIND);
    constexpr int COUNT = SHAPE.offsets ? 2 : 1, SCALES = SHAPE.parts * SHAPE.part_scales;
    for (int64_t i = 0; i < COUNT; i += WIDTH)
        store_f(factors + i,
                load_as(block + SHAPE.factors + 2 * i, 0, FLOAT16, smaller(WIDTH, COUNT - i)));
    if constexpr (KIND == Q2_K) {
        for (int g = 0; g < SCALES; g++) {
            scales[g] = factors[0] * float(block[g] & 15);
            offsets[g] = -(factors[1] * float(block[g] >> 4));
        }
    } else if constexpr (KIND == Q3_K) {
        const uint8_t *packed = block + 96;  // the lower 4 bits of 16 scales, then 2 upper ones
        for (int g = 0; g < SCALES; g++) {
            const int low = packed[g % 8] >> (g / 8 * 4) & 15;
            const int high = packed[8 + g % 4] >> (g / 4 * 2) & 3;
            scales[g] = factors[0] * float((low | high << 4) - 32);
        }
    } else if constexpr (KIND == Q6_K) {
        for (int g = 0; g < SCALES; g++) scales[g] = factors[0] * float(int8_t(block[192 + g]));
    } else if constexpr (KIND == IQ4_XS) {
        uint16_t high;
        __builtin_memcpy(&high, block + 2, 2);
        for (int g = 0; g < SCALES; g++) {
            const int low = block[4 + g / 2] >> (4 * (g % 2)) & 15;
            scales[g] = factors[0] * float((low | (high >> (2 * g) & 3) << 4) - 32);
        }
    } else {
        const uint8_t *packed = block + 4;  // 6 bits each: 8 scales and 8 minima
        for (int g = 0; g < SCALES; g++) {
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
    constexpr int64_t BITS = SHAPE.bits, PARTS = SHAPE.parts;
    for_each(b.rows, true, [&](int64_t row, int64_t) {
        const uint8_t *block = b.x + row * b.blocks * SHAPE.nbytes;
        int64_t part = row * b.blocks * PARTS;
        for (int64_t i = 0; i < b.blocks; i++, block += SHAPE.nbytes) {
            const int64_t group = part * SHAPE.part_scales;
            if constexpr (SHAPE.halves) {
                __builtin_memcpy(static_cast<uint16_t *>(b.scales) + group, block, 2);
                if constexpr (SHAPE.offsets)
                    __builtin_memcpy(static_cast<uint16_t *>(b.offsets) + group, block + 2, 2);
            } else {
                float *offsets = static_cast<float *>(b.offsets);
                grid_of_block<KIND>(block, static_cast<float *>(b.scales) + group,
                                    SHAPE.offsets ? offsets + group : nullptr);
            }
            for (int64_t p = 0; p < PARTS; p++, part++) {
                alignas(32) uint8_t bytes[BLOCK];
                values_of_part<KIND>(block, p, b.levels, bytes);
                write_values<BITS>(bytes, b.q + part * BLOCK / 8 * BITS);
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
        case Q2_K: return unblock_kind<Q2_K>(b);
        case Q3_K: return unblock_kind<Q3_K>(b);
        case Q4_K: return unblock_kind<Q4_K>(b);
        case Q5_K: return unblock_kind<Q5_K>(b);
        case Q6_K: return unblock_kind<Q6_K>(b);
        case IQ4_NL: return unblock_kind<IQ4_NL>(b);
        case IQ4_XS: return unblock_kind<IQ4_XS>(b);
        default: return unblock_kind<MXFP4>(b);
    }
}

}  // namespace
}  // namespace qllm
