// Scales and offsets of groups, as they lie in memory, and how float32 ones become smaller.
//
// Scales that were quantized themselves (llama.cpp's K types, by super-blocks) are products of a
// number that some groups share and a small integer. A byte for each group and the shared number
// are all of them, to the bit, in a third of the memory. Of powers of two (MXFP4) exponents are.
#pragma once

#include <math.h>

#include "isa.h"
#include "kernels.h"
#include "threads.h"

namespace qllm {
namespace {

constexpr int32_t MIDDLE = 128;  // of the bytes that are integers with signs

// Of FACTORED scales: how many groups share a factor, as a power of two.
inline int64_t factored_shift(int64_t group) { return group == HALF_K_BLOCK ? 4 : 3; }

// Those of a panel that are FACTORED.
struct Factors {
    const uint8_t *from;
    int64_t shift;

    INLINE inline Factors(const void *scales, int64_t group_size, int64_t groups, int64_t panel)
        : shift(factored_shift(group_size)) {
        const int64_t parts = (groups + (int64_t(1) << shift) - 1) >> shift;
        from = static_cast<const uint8_t *>(scales) + panel * parts * part_bytes();
    }
    int64_t part_bytes() const { return LANES * (4 + (int64_t(1) << shift)); }

    // A vector of a group's, from `lane` on.
    INLINE inline VF at(int64_t group, int64_t lane) const {
        const uint8_t *part = from + (group >> shift) * part_bytes();
        const int64_t within = group & ((int64_t(1) << shift) - 1);
        const VI whole = load_bytes(part + LANES * (4 + within) + lane);
        const VF factor = load_f(reinterpret_cast<const float *>(part) + lane);
        return mul_f(to_float(sub_i(whole, set_i(MIDDLE))), factor);
    }
};

// A vector of those that are POWERS, from a byte on.
INLINE inline VF powers_at(const uint8_t *exponents) {
    return as_float(shift_left<23>(load_bytes(exponents)));
}

// A vector of them, of the channels from `lane` on, for a group of a panel.
INLINE inline VF scales_at(const void *scales, int64_t type, int64_t group_size, int64_t groups,
                           int64_t panel, int64_t group, int64_t lane) {
    if (type == FACTORED) return Factors(scales, group_size, groups, panel).at(group, lane);
    const int64_t at = (panel * groups + group) * LANES + lane;
    if (type == POWERS) return powers_at(static_cast<const uint8_t *>(scales) + at);
    return load_as(scales, at, type, WIDTH);
}

// That of one channel.
inline float scale_at(const void *scales, int64_t type, int64_t group_size, int64_t groups,
                      int64_t panel, int64_t group, int64_t lane) {
    alignas(64) float some[WIDTH];
    const int64_t first = lane / WIDTH * WIDTH;
    store_f(some, scales_at(scales, type, group_size, groups, panel, group, first));
    return some[lane - first];
}

// The largest number of which all of some are products with integers of 8 bits; whether there is
// one. All of this is exact.
inline bool factor_of(const float *numbers, int64_t count, float *factor, int32_t *whole) {
    uint64_t odd[16];
    int exponent[16], least = 1 << 10;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        __builtin_memcpy(&bits, numbers + i, 4);
        const int field = bits >> 23 & 0xFF;
        odd[i] = 0;
        if (!(bits << 1)) continue;
        if (field == 0 || field == 0xFF) return false;  // which arithmetic may take for zero
        const uint32_t digits = (bits & 0x7FFFFF) | 0x800000;
        const int zeros = __builtin_ctz(digits);
        odd[i] = digits >> zeros;
        exponent[i] = field - 150 + zeros;
        if (exponent[i] < least) least = exponent[i];
    }
    uint32_t divisor = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!odd[i]) continue;
        const int shift = exponent[i] - least;
        if (shift > 31 || odd[i] << shift >> 31) return false;
        odd[i] <<= shift;
        for (uint32_t a = uint32_t(odd[i]); a;) {
            const uint32_t rest = divisor % a;
            divisor = a;
            a = rest;
        }
    }
    *factor = 0;
    bool over = false;
    for (int64_t i = 0; i < count; i++) {
        whole[i] = 0;
        if (!odd[i]) continue;
        const uint32_t times = uint32_t(odd[i]) / divisor;
        if (times > MIDDLE) return false;
        whole[i] = numbers[i] < 0 ? -int32_t(times) : int32_t(times);
        over |= whole[i] == MIDDLE;
    }
    if (!divisor) return true;
    *factor = ldexpf(float(divisor), least);
    if (uint32_t(float(divisor)) != divisor || !isnormal(*factor)) return false;
    if (!over) return true;
    *factor = -*factor;  // the other sign has one more
    for (int64_t i = 0; i < count; i++) {
        whole[i] = -whole[i];
        if (whole[i] == MIDDLE) return false;
    }
    return true;
}

inline Status factor(const Factoring &f) {
    const int64_t count = int64_t(1) << factored_shift(f.group);
    const int64_t parts = (f.groups + count - 1) / count;
    for_each((f.rows + LANES - 1) / LANES, true, [&](int64_t panel, int64_t) {
        for (int64_t part = 0; part < parts; part++) {
            uint8_t *to = f.factored + (panel * parts + part) * LANES * (4 + count);
            const int64_t groups = smaller(count, f.groups - part * count);
            for (int64_t lane = 0; lane < LANES; lane++) {
                const int64_t row = panel * LANES + lane;
                float shared = 0;
                int32_t whole[16] = {};
                if (row < f.rows) {
                    const float *from = f.scales + row * f.groups + part * count;
                    if (!factor_of(from, groups, &shared, whole))
                        return __atomic_store_n(f.failed, 1, __ATOMIC_RELAXED);
                }
                __builtin_memcpy(to + 4 * lane, &shared, 4);
                for (int64_t i = 0; i < count; i++)
                    to[LANES * (4 + i) + lane] = uint8_t(whole[i] + MIDDLE);
            }
        }
    });
    return Status::OK;
}

}  // namespace
}  // namespace qllm
