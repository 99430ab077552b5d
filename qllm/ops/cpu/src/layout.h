// Between rows of bits, in which weights are stored, and the layout that the kernels read.
#pragma once

#include "isa.h"
#include "machine.h"
#include "operands.h"
#include "prefetch.h"
#include "threads.h"

#if defined(__BMI2__)
#include <immintrin.h>
#endif

namespace qllm {
namespace {

// A part of a vector, as long as a register: compilers make little of longer ones. They may alias:
// bytes of all sorts are read as these.
constexpr int64_t PART = WIDTH * STEP < 16 ? 16 : WIDTH * STEP;
typedef uint8_t Bytes __attribute__((vector_size(PART), may_alias));
typedef uint16_t Halves __attribute__((vector_size(PART), may_alias));

// Bytes to prefetch ahead of what is read, in each of the LANES rows that are packed.
constexpr int64_t PACK_AHEAD = 512;

// Where the planes of a K block begin, in bits of a value; a plane of p bits is p vectors long, so
// this counts vectors as well. 7 bits: the plane of 4 at 0, of 2 at 4, of 1 at 6.
constexpr int plane_begin(int bits, int plane) { return bits & ~(2 * plane - 1); }

template <int SHIFT> inline Halves shifted(Halves v) {
    if constexpr (SHIFT >= 0) {
        return v >> SHIFT;
    } else {
        return v << -SHIFT;
    }
}

inline Bytes &part(uint8_t *k_block, int vector) {
    return *reinterpret_cast<Bytes *>(k_block + vector * 64);
}
inline const Bytes &part(const uint8_t *k_block, int vector) {
    return *reinterpret_cast<const Bytes *>(k_block + vector * 64);
}

// The bits that a plane of p bits gives to the values of a step, a part of its lanes: that which a
// pointer to the K block's first vector points to.
template <int BITS, int PLANE, int STEP_INDEX> inline Bytes plane_of(const uint8_t *k_block) {
    constexpr int BEGIN = plane_begin(BITS, PLANE), PER_VECTOR = 8 / PLANE;
    constexpr int SHIFT = STEP_INDEX % PER_VECTOR * PLANE - BEGIN;
    Halves v = (Halves)part(k_block, BEGIN + STEP_INDEX / PER_VECTOR);
    return (Bytes)shifted<SHIFT>(v) & uint8_t(((1 << PLANE) - 1) << BEGIN);
}

// The values of a step: a byte each, 4 inputs of every lane.
template <int BITS, int STEP_INDEX> inline Bytes step_of(const uint8_t *k_block) {
    Bytes value = {};
    if constexpr (BITS & 8) value = part(k_block, STEP_INDEX);
    if constexpr (BITS & 4) value = plane_of<BITS, 4, STEP_INDEX>(k_block);
    if constexpr (BITS & 2) value |= plane_of<BITS, 2, STEP_INDEX>(k_block);
    if constexpr (BITS & 1) value |= plane_of<BITS, 1, STEP_INDEX>(k_block);
    return value;
}

template <int BITS, int STEP_INDEX = 0>
inline void unpack_steps(const uint8_t *k_block, uint8_t *out) {
    part(out, STEP_INDEX) = step_of<BITS, STEP_INDEX>(k_block);
    if constexpr (STEP_INDEX + 1 < STEPS) unpack_steps<BITS, STEP_INDEX + 1>(k_block, out);
}

// A K block of a panel to bytes, step after step.
template <int BITS> void unpack_k_block(const uint8_t *k_block, uint8_t *out) {
    for (int v = 0; v < BITS; v++) prefetch_into<2>(k_block + v * 64 + machine.ahead);
    for (int64_t at = 0; at < 64; at += PART) unpack_steps<BITS>(k_block + at, out + at);
}

typedef void (*UnpackKBlock)(const uint8_t *, uint8_t *);
const UnpackKBlock UNPACK_K_BLOCK[] = {
    nullptr,           unpack_k_block<1>, unpack_k_block<2>, unpack_k_block<3>, unpack_k_block<4>,
    unpack_k_block<5>, unpack_k_block<6>, unpack_k_block<7>, unpack_k_block<8>};

// A K block of a weight as its integers, a byte each.
template <typename Weight>
inline void unpack_integers(const Weight &a, const uint8_t *k_block, uint8_t *out) {
    UNPACK_K_BLOCK[a.held_bits()](k_block, out);
    if (!a.levels) return;
    const Table table = load_table(a.levels);
    for (int64_t at = 0; at < K_BLOCK * LANES; at += WIDTH * STEP) {
        VI some;
        __builtin_memcpy(&some, out + at, WIDTH * STEP);
        some = look_up(table, some);
        __builtin_memcpy(out + at, &some, WIDTH * STEP);
    }
}

// The inverse: bytes of a K block to its planes.
template <int PLANE>
inline void pack_plane(const uint8_t *bytes, uint8_t *k_block, int bits) {
    if (!(bits & PLANE)) return;
    int begin = plane_begin(bits, PLANE);
    uint16_t mask = uint16_t(((1 << PLANE) - 1) * 0x101);
    for (int64_t at = 0; at < 64; at += PART)
        for (int v = 0; v < PLANE; v++) {
            Halves value = {};
            for (int j = 0; j < 8 / PLANE; j++) {
                Halves step = (Halves)part(bytes + at, v * (8 / PLANE) + j);
                value |= ((step >> begin) & mask) << (j * PLANE);
            }
            part(k_block + at, begin + v) = (Bytes)value;
        }
}

static void pack_k_block(const uint8_t *bytes, uint8_t *k_block, int bits) {
    pack_plane<8>(bytes, k_block, bits);
    pack_plane<4>(bytes, k_block, bits);
    pack_plane<2>(bytes, k_block, bits);
    pack_plane<1>(bytes, k_block, bits);
}

// One value of a K block.
static int value_at(const uint8_t *k_block, int bits, int64_t lane, int64_t input) {
    int64_t step = input / STEP, byte = lane * STEP + input % STEP;
    int value = 0;
    for (int plane = 8; plane; plane /= 2) {
        if (!(bits & plane)) continue;
        int begin = plane_begin(bits, plane);
        int64_t vector = begin + step / (8 / plane);
        int from = int(step % (8 / plane)) * plane;
        value |= (k_block[vector * 64 + byte] >> from & ((1 << plane) - 1)) << begin;
    }
    return value;
}

// The same as the integer of a weight.
template <typename Weight>
int integer_at(const Weight &a, const uint8_t *k_block, int64_t lane, int64_t input) {
    const int value = value_at(k_block, int(a.held_bits()), lane, input);
    return a.levels ? a.levels[value] : value;
}

// Up to 8 values of b bits from a row's bit stream, a byte each; `end` is the end of the row.
static uint64_t read_values(const uint8_t *row, const uint8_t *end, int64_t bit, int bits) {
    const uint8_t *from = row + bit / 8;
    uint64_t word = 0;
    if (end - from >= 8) {
        __builtin_memcpy(&word, from, 8);
    } else {
        for (int i = 0; from + i < end; i++) word |= uint64_t(from[i]) << (8 * i);
    }
    int shift = int(bit % 8);
    word >>= shift;  // at least 57 bits are left: 8 values of 7 bits
    uint64_t mask = ((1u << bits) - 1) * 0x0101010101010101ull;
#if defined(__BMI2__)
    return _pdep_u64(word, mask);
#else
    uint64_t values = 0;
    for (int i = 0; i < 8; i++) values |= (word >> (i * bits) & ((1u << bits) - 1)) << (8 * i);
    (void)mask;
    return values;
#endif
}

// A byte each for 8 values that begin with a byte; 8 bytes are read.
static inline uint64_t spread(const uint8_t *from, uint64_t mask, int bits) {
#if defined(__BMI2__)
    uint64_t word;
    __builtin_memcpy(&word, from, 8);
    (void)bits;
    return _pdep_u64(word, mask);
#else
    (void)mask;
    return read_values(from, from + 8, 0, bits);
#endif
}

// The values from `start` on of LANES rows, a K block of them or what is left of a group.
static void read_k_block(const Packing &p, int64_t first, int64_t lanes, int64_t start,
                         int64_t count, uint32_t (&bytes)[STEPS][LANES]) {
    const int bits = int(p.bits);
    const int64_t at = start * bits / 8;
    if (count == K_BLOCK && start % 8 == 0 && at + 3 * bits + 8 <= p.row_bytes) {
        const uint64_t mask = ((1u << bits) - 1) * 0x0101010101010101ull;
        for (int64_t lane = 0; lane < lanes; lane++) {
            const uint8_t *row = p.rows + (first + lane) * p.row_bytes + at;
            __builtin_prefetch(row + PACK_AHEAD);
            for (int i = 0; i < K_BLOCK / 8; i++) {
                uint64_t values = spread(row + i * bits, mask, bits);
                bytes[2 * i][lane] = uint32_t(values);
                bytes[2 * i + 1][lane] = uint32_t(values >> 32);
            }
        }
        return;
    }
    for (int64_t lane = 0; lane < lanes; lane++) {
        const uint8_t *row = p.rows + (first + lane) * p.row_bytes;
        for (int64_t i = 0; i < count; i += 8) {
            uint64_t values = read_values(row, row + p.row_bytes, (start + i) * bits, bits);
            if (count - i < 8) values &= (uint64_t(1) << (8 * (count - i))) - 1;
            bytes[i / STEP][lane] = uint32_t(values);
            bytes[i / STEP + 1][lane] = uint32_t(values >> 32);
        }
    }
}

template <typename T>
void pack_grid(const T *from, T *to, int64_t lanes, int64_t groups) {
    for (int64_t lane = 0; lane < LANES; lane++) to[lane] = lane < lanes ? from[lane * groups] : 0;
}

// The scales and zeros of a group of a panel.
static void pack_grid(const Packing &p, int64_t panel, int64_t lanes, int64_t group,
                      int64_t groups) {
    int64_t from = panel * LANES * groups + group, to = (panel * groups + group) * LANES;
    const auto numbers = [&](const uint8_t *rows, uint8_t *packed) {
        if (!p.scale_bytes) return;
        if (p.scale_bytes == 4) {
            pack_grid(reinterpret_cast<const uint32_t *>(rows) + from,
                      reinterpret_cast<uint32_t *>(packed) + to, lanes, groups);
        } else {
            pack_grid(reinterpret_cast<const uint16_t *>(rows) + from,
                      reinterpret_cast<uint16_t *>(packed) + to, lanes, groups);
        }
    };
    numbers(p.row_scales, p.scales);
    if (p.offsets) numbers(p.row_offsets, p.offsets);
    if (p.zeros) pack_grid(p.row_zeros + from, p.zeros + to, lanes, groups);
}

// Panel by panel; a group's inputs begin a K block, and what fills up panels and K blocks is zero.
inline Status pack(const Packing &p) {
    int64_t panels = (p.out + LANES - 1) / LANES, k_blocks = row_k_blocks(p.in, p.group);
    int64_t groups = (p.in + p.group - 1) / p.group, bits = p.held_bits();
    const int64_t filled = filled_inputs(p.group);
    uint8_t codes[256] = {};
    if (p.levels)
        for (int64_t i = 0; i < 1 << LEVEL_BITS; i++) codes[p.levels[i]] = uint8_t(i);
    for_each(panels, true, [&](int64_t panel, int64_t) {
        int64_t lanes = p.out - panel * LANES < LANES ? p.out - panel * LANES : LANES;
        uint8_t *to = p.q + panel * k_blocks * 64 * bits;
        for (int64_t first = 0; first < p.in; first += filled) {
            int64_t end = first + filled < p.in ? first + filled : p.in;
            for (int64_t start = first; start < end; start += K_BLOCK, to += 64 * bits) {
                alignas(64) uint32_t bytes[STEPS][LANES] = {};
                int64_t count = end - start < K_BLOCK ? end - start : K_BLOCK;
                read_k_block(p, panel * LANES, lanes, start, count, bytes);
                uint8_t *values = reinterpret_cast<uint8_t *>(bytes);
                if (p.levels)
                    for (int64_t i = 0; i < K_BLOCK * LANES; i++) values[i] = codes[values[i]];
                pack_k_block(values, to, int(bits));
            }
        }
        for (int64_t group = 0; group < groups; group++) pack_grid(p, panel, lanes, group, groups);
    });
    return Status::OK;
}

// The inverse of `pack`: `rows` is zero before.
inline Status unpack(const Packing &p) {
    int64_t k_blocks = row_k_blocks(p.in, p.group), groups = (p.in + p.group - 1) / p.group;
    for_each(p.out, true, [&](int64_t n, int64_t) {
        int64_t panel = n / LANES, lane = n % LANES;
        uint8_t *row = p.rows + n * p.row_bytes;
        for (int64_t k = 0; k < p.in; k++) {
            const Place at = place_of(k, p.group);
            const uint8_t *k_blocks_of_panel = p.q + panel * k_blocks * 64 * p.held_bits();
            int value = integer_at(p, k_blocks_of_panel + at.k_block * 64 * p.held_bits(), lane,
                                   at.input);
            int64_t bit = k * p.bits;
            row[bit / 8] |= uint8_t(value << bit % 8);
            if (bit % 8 + p.bits > 8) row[bit / 8 + 1] |= uint8_t(value >> (8 - bit % 8));
        }
        for (int64_t group = 0; group < groups; group++) {
            int64_t at = (panel * groups + group) * LANES + lane;
            for (int64_t i = 0; i < p.scale_bytes; i++) {
                const int64_t from = at * p.scale_bytes + i;
                const int64_t to = (n * groups + group) * p.scale_bytes + i;
                p.row_scales[to] = p.scales[from];
                if (p.offsets) p.row_offsets[to] = p.offsets[from];
            }
            if (p.zeros) p.row_zeros[n * groups + group] = p.zeros[at];
        }
    });
    return Status::OK;
}

inline Status distinct(const Distinct &d) {
    for_each(d.out, true, [&](int64_t n, int64_t) {
        const uint8_t *row = d.rows + n * d.row_bytes, *end = row + d.row_bytes;
        int count = 0;
        for (int i = 0; i < 256; i++) count += __atomic_load_n(d.found + i, __ATOMIC_RELAXED);
        if (count > 1 << LEVEL_BITS) return;
        uint8_t own[256] = {};
        for (int64_t k = 0; k < d.in; k += 8) {
            uint64_t values = read_values(row, end, k * d.bits, int(d.bits));
            for (int64_t i = 0; i < smaller(8, d.in - k); i++, values >>= 8) own[values & 255] = 1;
        }
        for (int i = 0; i < 256; i++)
            if (own[i]) __atomic_store_n(d.found + i, 1, __ATOMIC_RELAXED);
    });
    return Status::OK;
}

}  // namespace
}  // namespace qllm
