// The instructions of AMX by loops, for machines without tiles: tools/emulate.py puts this in the
// place of the kernels' file of the same name. What Intel's manual (Software Developer's Manual,
// volume 2) says is an exception ends the process.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulated_avx512.h"

namespace qllm {
namespace {

// What LDTILECFG reads: of each tile, its rows and their bytes.
struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

struct EmulatedTiles {
    uint8_t palette, rows[8];  // palette 0: none
    uint16_t bytes[8];
    alignas(64) uint8_t data[8][16][64];
};
thread_local EmulatedTiles held;

inline void demand(bool condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "emulated tiles: %s\n", what);
    abort();
}

inline void release_tiles() { memset(&held, 0, sizeof(held)); }

inline void load_shapes(const TileShapes &shapes) {
    release_tiles();
    demand(shapes.palette == 1, "not palette 1");
    demand(shapes.start_row == 0, "a start_row");
    for (uint8_t byte : shapes.reserved) demand(!byte, "a reserved byte");
    for (int t = 0; t < 16; t++) {
        const int rows = shapes.rows[t], bytes = shapes.bytes[t];
        demand(t < 8 || (!rows && !bytes), "a reserved byte");
        demand(bytes <= 64 && rows <= 16, "a tile that is too large");
        demand(!bytes == !rows, "rows without bytes");
        if (t >= 8) continue;
        held.bytes[t] = uint16_t(bytes);
        held.rows[t] = uint8_t(rows);
    }
    held.palette = 1;
}

template <int T> inline void check_tile() {
    static_assert(T >= 0 && T < 8);
    demand(held.palette && held.rows[T], "a tile that is not there");
    demand(held.bytes[T] % 4 == 0, "a tile of parts of 4 bytes");
}

template <int T> inline void zero_tile() {
    check_tile<T>();
    memset(held.data[T], 0, sizeof(held.data[T]));
}

// Rows lie `stride` bytes apart.
template <int T> inline void load_tile(const void *from, int64_t stride) {
    zero_tile<T>();
    for (int row = 0; row < held.rows[T]; row++)
        memcpy(held.data[T][row], static_cast<const char *>(from) + row * stride, held.bytes[T]);
}
template <int T> inline void load_tile_once(const void *from, int64_t stride) {
    load_tile<T>(from, stride);
}

template <int T> inline void store_tile(void *to, int64_t stride) {
    check_tile<T>();
    for (int row = 0; row < held.rows[T]; row++)
        memcpy(static_cast<char *>(to) + row * stride, held.data[T][row], held.bytes[T]);
}

template <int SUM, int X, int W> inline void check_product() {
    static_assert(SUM != X && SUM != W && X != W);
    check_tile<SUM>();
    check_tile<X>();
    check_tile<W>();
    demand(held.rows[SUM] == held.rows[X] && held.bytes[SUM] == held.bytes[W] &&
               held.bytes[X] / 4 == held.rows[W],
           "a product of tiles that do not fit");
}

// int8 times bytes of a type, sums wrap. Tiles have zeros behind their bytes, and so do products.
template <int SUM, int X, int W, typename BYTE> inline void add_bytes() {
    check_product<SUM, X, W>();
    for (int row = 0; row < held.rows[SUM]; row++) {
        uint32_t sums[16];
        memcpy(sums, held.data[SUM][row], 64);
        for (int k = 0; k < held.rows[W]; k++) {
            const uint8_t *x = held.data[X][row] + 4 * k, *w = held.data[W][k];
            for (int lane = 0; lane < 16; lane++)
                for (int i = 0; i < 4; i++)
                    sums[lane] += uint32_t(int8_t(x[i]) * BYTE(w[4 * lane + i]));
        }
        memcpy(held.data[SUM][row], sums, 64);
    }
}

// TDPBSSD and TDPBSUD.
template <int SUM, int X, int W> inline void add_product() { add_bytes<SUM, X, W, int8_t>(); }
template <int SUM, int X, int W> inline void add_unsigned_product() {
    add_bytes<SUM, X, W, uint8_t>();
}

// Half a row of sums: even and odd inputs have sums of their own, which are added to each other and
// then to the tile.
IN_OWN_MODE void add_pairs_of_row(__m256 *sum, const uint8_t *x, const uint8_t (*w)[64],
                                  int steps) {
    __m256 even = _mm256_setzero_ps(), odd = even;
    for (int k = 0; k < steps; k++) {
        int32_t pair;
        memcpy(&pair, x + 4 * k, 4);
        const __m256i inputs = _mm256_set1_epi32(pair);
        const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w[k]));
        even = _mm256_fmadd_ps(emulated::even_pairs(inputs), emulated::even_pairs(weights), even);
        odd = _mm256_fmadd_ps(emulated::odd_pairs(inputs), emulated::odd_pairs(weights), odd);
    }
    *sum = _mm256_add_ps(*sum, _mm256_add_ps(even, odd));
}

// TDPBF16PS.
template <int SUM, int X, int W> inline void add_pairs() {
    check_product<SUM, X, W>();
    const unsigned before = _mm_getcsr();
    _mm_setcsr(emulated::BFLOAT16_MODE);
    for (int row = 0; row < held.rows[SUM]; row++)
        for (int half = 0; half < 64; half += 32) {
            __m256 sum;
            uint8_t *to = held.data[SUM][row] + half;
            memcpy(&sum, to, 32);
            const uint8_t(*w)[64] =
                reinterpret_cast<const uint8_t(*)[64]>(&held.data[W][0][half]);
            add_pairs_of_row(&sum, held.data[X][row], w, held.rows[W]);
            memcpy(to, &sum, 32);
        }
    _mm_setcsr(before);
}

}  // namespace
}  // namespace qllm
