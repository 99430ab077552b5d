// amx_instructions.h in software, to test on CPUs without AMX: with -DQLLM_EMULATE_AMX. What would
// raise an exception ends the process. The environment variable QLLM_EMULATED_FAULT makes it what
// a self-test is to find: "wrong" products, a "crash", or tiles that "hang".
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <cstdint>

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

// What the product of a sum's row and lane begins with and adds, step by step.
template <typename T, int SUM, int X, int W, typename Add> SLOW void multiply_tiles(Add add) {
    static_assert(SUM != X && SUM != W && X != W);
    const uint8_t(*x)[64] = tile_of<X>(), (*w)[64] = tile_of<W>();
    uint8_t(*to)[64] = tile_of<SUM>();
    const TileShapes &s = emulated.shapes;
    demand(s.bytes[SUM] % 4 == 0 && s.bytes[X] % 4 == 0 && s.bytes[W] % 4 == 0);
    demand(s.rows[SUM] == s.rows[X] && s.bytes[SUM] == s.bytes[W] && s.bytes[X] / 4 == s.rows[W]);
    for (int m = 0; m < s.rows[SUM]; m++) {
        T sums[16];
        __builtin_memcpy(sums, to[m], 64);
        for (int n = 0; n < s.bytes[W] / 4; n++) sums[n] = add(sums[n], x[m], w, n, s.rows[W]);
        __builtin_memcpy(to[m], sums, 64);
        if (emulated.wrong) to[m][4 * m] ^= 1;
    }
}

template <int SUM, int X, int W> SLOW void add_product() {
    multiply_tiles<uint32_t, SUM, X, W>(
        [](uint32_t sum, const uint8_t *x, const uint8_t(*w)[64], int n, int steps) {
            for (int k = 0; k < steps; k++)
                for (int i = 0; i < 4; i++)
                    sum += uint32_t(int8_t(x[4 * k + i]) * int8_t(w[k][4 * n + i]));
            return sum;
        });
}

// Input `at` of a row of bfloat16; subnormal numbers count as zero, and become it in sums.
inline float flushed(float value) {
    return __builtin_fabsf(value) < __FLT_MIN__ ? value * 0 : value;
}
inline float number_at(const uint8_t *row, int at) {
    uint32_t bits = (uint32_t(row[2 * at + 1]) << 8 | row[2 * at]) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return flushed(value);
}

template <int SUM, int X, int W> SLOW void add_pairs() {
    multiply_tiles<float, SUM, X, W>(
        [](float sum, const uint8_t *x, const uint8_t(*w)[64], int n, int steps) {
            float halves[2] = {};  // of even and of odd inputs
            for (int k = 0; k < steps; k++)
                for (int i = 0; i < 2; i++)
                    halves[i] = flushed(__builtin_fmaf(number_at(x, 2 * k + i),
                                                       number_at(w[k], 2 * n + i), halves[i]));
            return flushed(flushed(sum) + flushed(halves[0] + halves[1]));
        });
}

}  // namespace
}  // namespace qllm
