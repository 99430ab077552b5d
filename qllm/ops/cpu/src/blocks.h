// GGUF's blocks of 32 values as rows of bits.
#pragma once

#include "kernels.h"
#include "threads.h"

#if defined(__BMI2__)
#include <immintrin.h>
#endif

namespace qllm {
namespace {

constexpr int64_t BLOCK = 32;  // values

// The low halves of 8 bytes, neighbours in a byte.
static inline uint32_t low_halves(uint64_t bytes) {
#if defined(__BMI2__)
    return uint32_t(_pext_u64(bytes, 0x0f0f0f0f0f0f0f0full));
#else
    uint32_t halves = 0;
    for (int i = 0; i < 8; i++) halves |= uint32_t(bytes >> (8 * i) & 0xf) << (4 * i);
    return halves;
#endif
}

// 16 bytes have values i in their low halves, and 16 + i in their high ones.
static inline void unblock_halves(const uint8_t *from, uint8_t *to) {
    for (int i = 0; i < 2; i++) {
        uint64_t bytes;
        __builtin_memcpy(&bytes, from + 8 * i, 8);
        const uint32_t low = low_halves(bytes), high = low_halves(bytes >> 4);
        __builtin_memcpy(to + 4 * i, &low, 4);
        __builtin_memcpy(to + 8 + 4 * i, &high, 4);
    }
}

inline Status unblock(const Blocks &b) {
    const int64_t header = b.offsets ? 4 : 2, width = BLOCK * b.bits / 8;
    const int64_t nbytes = header + width;
    for_each(b.rows, true, [&](int64_t row, int64_t) {
        const uint8_t *from = b.x + row * b.blocks * nbytes;
        uint8_t *to = b.q + row * b.blocks * width;
        for (int64_t i = row * b.blocks; i < (row + 1) * b.blocks; i++) {
            __builtin_memcpy(b.scales + i, from, 2);
            if (b.offsets) __builtin_memcpy(b.offsets + i, from + 2, 2);
            if (b.bits == 4) {
                unblock_halves(from + header, to);
            } else {
                for (int64_t j = 0; j < BLOCK; j++) to[j] = from[header + j] ^ 0x80;
            }
            from += nbytes;
            to += width;
        }
    });
    return Status::OK;
}

}  // namespace
}  // namespace qllm
