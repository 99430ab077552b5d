// amx_instructions.h in software, to test on CPUs without AMX: with -DQLLM_EMULATE_AMX. What would raise an exception ends the process. The environment variable
// QLLM_EMULATED_FAULT makes it what a self-test is to find: "wrong" products, a "crash", or tiles
// that "hang".
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <cstdint>

#include "isa.h"

namespace qllm {
namespace {

struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

#define SLOW __attribute__((noinline))  // so that compiling is not

struct Emulated {
    TileShapes shapes;  // palette 0: none
    bool wrong;
    alignas(64) uint8_t tile[8][16][64];
};

static thread_local Emulated emulated;

inline void demand(bool condition) {
    if (!condition) abort();
}

inline void load_shapes(const TileShapes &shapes) {
    demand(reinterpret_cast<uintptr_t>(&shapes) % 64 == 0);
    demand(shapes.palette == 1 && shapes.start_row == 0);
    for (uint8_t byte : shapes.reserved) demand(byte == 0);
    for (int t = 0; t < 16; t++) {
        demand((shapes.rows[t] == 0) == (shapes.bytes[t] == 0));
        demand(t < 8 ? shapes.rows[t] <= 16 && shapes.bytes[t] <= 64 : shapes.rows[t] == 0);
    }
    const char *fault = getenv("QLLM_EMULATED_FAULT");
    if (fault && *fault == 'c') __builtin_trap();
    while (fault && *fault == 'h') pause();
    emulated = {};
    emulated.shapes = shapes;
    emulated.wrong = fault && *fault == 'w';
}
inline void release_tiles() { emulated = {}; }

// A tile that there is now.
template <int T> inline uint8_t (*tile_of())[64] {
    static_assert(T >= 0 && T < 8);
    demand(emulated.shapes.palette == 1 && emulated.shapes.rows[T] > 0);
    return emulated.tile[T];
}

template <int T> SLOW void zero_tile() {
    __builtin_memset(tile_of<T>(), 0, sizeof emulated.tile[T]);
}

template <int T> SLOW void load_tile(const void *from, int64_t stride) {
    zero_tile<T>();
    for (int r = 0; r < emulated.shapes.rows[T]; r++)
        __builtin_memcpy(tile_of<T>()[r], static_cast<const char *>(from) + r * stride,
                         emulated.shapes.bytes[T]);
}
template <int T> SLOW void store_tile(void *to, int64_t stride) {
    for (int r = 0; r < emulated.shapes.rows[T]; r++)
        __builtin_memcpy(static_cast<char *>(to) + r * stride, tile_of<T>()[r],
                         emulated.shapes.bytes[T]);
}

// Adds to each row of sums the products of that row and the steps of W.
template <int SUM, int X, int W, typename Add> SLOW void multiply_tiles(Add add) {
    static_assert(SUM != X && SUM != W && X != W);
    const uint8_t(*x)[64] = tile_of<X>(), (*w)[64] = tile_of<W>();
    uint8_t(*to)[64] = tile_of<SUM>();
    const TileShapes &s = emulated.shapes;
    demand(s.bytes[SUM] % 4 == 0 && s.bytes[X] % 4 == 0 && s.bytes[W] % 4 == 0);
    demand(s.rows[SUM] == s.rows[X] && s.bytes[SUM] == s.bytes[W] && s.bytes[X] / 4 == s.rows[W]);
    for (int m = 0; m < s.rows[SUM]; m++) {
        add(to[m], x[m], w, s.rows[W]);
        if (emulated.wrong) to[m][4 * m] ^= 1;
    }
}

// Lanes that a tile does not have are zeros, and stay so.
template <int SUM, int X, int W> SLOW void add_product() {
    multiply_tiles<SUM, X, W>([](uint8_t *to, const uint8_t *x, const uint8_t(*w)[64], int steps) {
        uint32_t sums[16];
        __builtin_memcpy(sums, to, 64);
        for (int k = 0; k < steps; k++)
            for (int n = 0; n < 16; n++)
                for (int i = 0; i < 4; i++)
                    sums[n] += uint32_t(int8_t(x[4 * k + i]) * int8_t(w[k][4 * n + i]));
        __builtin_memcpy(to, sums, 64);
    });
}

// TDPBF16PS as the pseudo-code of Intel's manual has it (Software Developer's Manual, volume 2),
// which is not how VDPBF16PS adds up a pair: even and odd inputs have sums of their own, each of
// fused multiply-adds from 0 on, in the order of the inputs; the two are added, and then that is
// added to the tile. All of it is rounded to nearest, halves to even; operands that are subnormal
// count as zero, and so do results; MXCSR is neither read nor written, and no exception raised.
//
// x86 of any make computes just that with these bits in its MXCSR. What the manual leaves open is
// then as x86 has it: a result is subnormal if it is below the normal numbers after it was rounded
// to 24 bits, and NaN is that of an operand, or the default one. Real tiles may have another NaN,
// which no result of a layer shows, and could find out what is subnormal before rounding. On a
// machine with AMX, this compares both with exact arithmetic, over operands that are hard:
//
//     python3 -m pytest tests/ops/cpu/test_amx.py -k manual
//
// All that this header stands in for is tested so, on CPUs with AVX-512:
//
//     QLLM_CXXFLAGS=-DQLLM_EMULATE_AMX python3 -m pytest tests/ops/cpu tests/test_invariance.py
class PairArithmetic {
  public:
    // Denormals are zeros, flush to zero, exceptions masked; rounding is 0, to nearest.
    PairArithmetic() {
        const uint32_t own = 0x0040 | 0x8000 | 0x1F80;
        __asm__ volatile("vstmxcsr %0\n\tvldmxcsr %1" : "=m"(before_) : "m"(own));
    }
    ~PairArithmetic() { __asm__ volatile("vldmxcsr %0" : : "m"(before_)); }

    // In assembly that stays where it is: compilers move arithmetic across changes of MXCSR.
    VF add(VF a, VF b) const {
        __asm__ volatile("vaddps %1, %0, %0" : "+v"(a) : "v"(b));
        return a;
    }
    VF add_product(VF sum, VF a, VF b) const {
        __asm__ volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        return sum;
    }

  private:
    uint32_t before_;
};

// The even or odd bfloat16 of every lane.
template <int ODD> inline VF half_of(VI pairs) {
    return as_float(ODD ? _mm512_and_si512(pairs, set_i(-0x10000)) : shift_left<16>(pairs));
}

template <int SUM, int X, int W> SLOW void add_pairs() {
    multiply_tiles<SUM, X, W>([](uint8_t *to, const uint8_t *x, const uint8_t(*w)[64], int steps) {
        const PairArithmetic with;
        VF even = set_f(0), odd = set_f(0);
        for (int k = 0; k < steps; k++) {
            const VI a = four(reinterpret_cast<const int8_t *>(x) + 4 * k), b = weights(w[k]);
            even = with.add_product(even, half_of<0>(a), half_of<0>(b));
            odd = with.add_product(odd, half_of<1>(a), half_of<1>(b));
        }
        float *sums = reinterpret_cast<float *>(to);
        store_f(sums, with.add(load_f(sums), with.add(even, odd)));
    });
}

}  // namespace
}  // namespace qllm
