// The instructions of AMX. Not the intrinsics: some compilers take the number of a tile only as a
// literal, and GCC's do not say that they read memory.
#pragma once

#include <cstdint>

namespace qllm {
namespace {

// What LDTILECFG reads: of each tile, its rows and their bytes.
struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

inline void load_shapes(const TileShapes &shapes) {
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
}
inline void release_tiles() { __asm__ volatile("tilerelease"); }

template <int T> inline void zero_tile() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(T)); }

// Rows lie `stride` bytes apart.
template <int T> inline void load_tile(const void *from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
// The same of what is not read again soon: it does not take the place of others in the first cache.
template <int T> inline void load_tile_once(const void *from, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T> inline void store_tile(void *to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}

// Adds the products of int8 to int32 sums, which wrap: row m of X, with 4 inputs to a lane, times
// lane n of W, with 4 inputs to a row.
template <int SUM, int X, int W> inline void add_product() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(W));
}

// The same where the inputs of W are uint8.
template <int SUM, int X, int W> inline void add_unsigned_product() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(W));
}

// Adds products of bfloat16 to float32 sums, with 2 inputs to a lane and to a row; not as VDPBF16PS
// adds up a pair. Even and odd inputs have sums of their own, each of fused multiply-adds from 0
// on, in the order of the inputs; the two are added, and then that is added to the tile. All of it
// is rounded to nearest, halves to even; operands that are subnormal count as zero, and so do
// results; MXCSR is neither read nor written, and no exception raised.
template <int SUM, int X, int W> inline void add_pairs() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(W));
}

}  // namespace
}  // namespace qllm
