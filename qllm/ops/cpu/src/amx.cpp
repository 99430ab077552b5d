#include "isa_avx512.h"
#include "tile_amx.h"
#include "linear.h"

namespace qllm {
namespace {

constexpr int64_t MOST_FOR_VECTORS = 8;  // rows; memory is the limit, or tiles would be half empty

static_assert(CHUNK_ROWS % TILE_ROWS<1> == 0);  // tiles of sums have all their rows

static bool linear_by_rows(const Linear &a) {
    return a.rows <= MOST_FOR_VECTORS ? avx512_path.linear(a) : linear(a);
}

// Nothing else is for tiles.
static void activate(const Activate &a) { avx512_path.activate(a); }
static void norm(const Norm &a) { avx512_path.norm(a); }
static void add(const Add &a) { avx512_path.add(a); }
static bool embed(const Embed &a) { return avx512_path.embed(a); }
static bool attend(const Attend &a) { return avx512_path.attend(a); }
static bool attend_prompt(const AttendPrompt &a) { return avx512_path.attend_prompt(a); }
static bool dense(const Dense &a) { return avx512_path.dense(a); }
static int64_t read_all(const uint8_t *from, int64_t bytes) {
    return avx512_path.read_all(from, bytes);
}

// As in limits.h: adds products in registers; returns how many operations, two for a product.
static int64_t multiply_all(int64_t rounds) {
    int64_t total = 0;
#pragma omp parallel reduction(+ : total)
    {
        Tiles tiles;
        tiles.take_shapes(ROW_BYTES);
        zero_tile<X_TILE>();
        zero_tile<X_TILE + 1>();
        zero_tile<W_TILE>();
        zero_tile<W_TILE + 1>();
        clear_sums<2, 2>();
        for (int64_t round = 0; round < rounds; round++) {
            add_product<0, X_TILE, W_TILE>();
            add_product<1, X_TILE, W_TILE + 1>();
            add_product<2, X_TILE + 1, W_TILE>();
            add_product<3, X_TILE + 1, W_TILE + 1>();
        }
        total += rounds * 4 * SUMS * ROW_BYTES * 2;
    }
    return total;
}

// Whether tiles of blocks of some slabs make the products that plain C++ makes.
static bool products_are_right(int64_t slabs) {
    constexpr int64_t R = TILE_ROWS<1>, PANELS = 2, K = BLOCK_SLABS * SLAB;
    const int8_t some_x[] = {-128, 127, -1, 0, 127, -127, 1};
    const uint8_t some_w[] = {255, 0, 128, 127, 1};
    alignas(64) int8_t x[R * K];
    alignas(64) uint8_t w[PANELS * LANES * K];
    alignas(64) uint32_t out[R * GROUP_LANES];
    alignas(64) int32_t zeros[GROUP_LANES];
    float scales[GROUP_LANES];
    const int64_t steps = slabs * STEPS, panel_bytes = steps * LANES * STEP;
    for (int64_t i = 0; i < R * K; i++) x[i] = some_x[(i + i / 64) % 7];
    for (int64_t i = 0; i < PANELS * LANES * K; i++) w[i] = some_w[(i + i / 64) % 5];
    for (int64_t i = 0; i < GROUP_LANES; i++) zeros[i] = 128;
    for (int64_t i = 0; i < R * GROUP_LANES; i++) out[i] = 0x7FFFFFFF;  // sums wrap
    {
        Tiles tiles;
        Linear a = {};
        a.bits = 8;
        Operands o = {w, panel_bytes, scales, zeros, x, slabs, false, scales, zeros, zeros,
                      reinterpret_cast<float *>(out)};
        tiles.begin(o, a, w, PANELS, slabs);
        tiles.multiply<1>(o, R, PANELS);
        tiles.end<1>();
    }
    for (int64_t r = 0; r < R; r++)
        for (int64_t n = 0; n < PANELS * LANES; n++) {
            uint32_t sum = 0x7FFFFFFF;
            for (int64_t step = 0; step < steps; step++) {
                const int8_t *a = x + place(R, r, step, slabs);
                const uint8_t *b = w + n / LANES * panel_bytes + (step * LANES + n % LANES) * STEP;
                for (int i = 0; i < STEP; i++) sum += uint32_t(a[i] * int8_t(b[i]));  // less zeros
            }
            if (out[r * GROUP_LANES + n] != sum) return false;
        }
    return true;
}

static bool self_test() { return products_are_right(BLOCK_SLABS) && products_are_right(3); }

}  // namespace
}  // namespace qllm

const qllm::Path qllm::amx_path = {"amx", linear_by_rows, pack, unpack, activate, norm,   add,
                 embed,  attend, attend_prompt, dense, read_all, multiply_all, self_test};
