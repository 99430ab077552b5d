// AMX. Compilers do not agree on what they define where they have it.
#define HAS_TILES 1
#include "dense.h"
#include "dense_decode_amx.h"
#include "isa.h"
#include "kernels.h"
#include "linear.h"
#include "prefill_amx.h"
#include "sequence_attention.h"
#include "threads.h"
#include "tiles.h"

namespace qllm {
namespace {

// Up to so many rows memory is the limit of vectors, or tiles would be half empty. A row of float32
// is four planes, for which vectors unpack weights to cache as tiles do, and multiply for longer.
static int64_t max_vector_rows(const Linear &a) {
    return a.mode == WEIGHT_ONLY && a.x_type == FLOAT32 ? 3 : 8;
}

static_assert(CHUNK_ROWS % TILE_ROWS<1> == 0);  // tiles of sums have all their rows

// All of a prefill in bfloat16, or steps of decode, which are the same on all paths.
static Status linear_by_phase(const Linear &a) {
    if (is_bf16_prefill(a))
        return a.x_type == BFLOAT16 ? bf16_prefill<BFLOAT16>(a) : bf16_prefill<FLOAT16>(a);
    return a.rows <= max_vector_rows(a) ? avx512_path.linear(a) : linear(a);
}

static_assert(DENSE_ROWS % DENSE_TILE_ROWS == 0);

// Only bfloat16 is for tiles. Few rows have a way of their own, which gives the same bits.
static Status dense_by_type(const Dense &a) {
    if (a.type != BFLOAT16) return avx512_path.dense(a);
    return a.rows <= FEW_ROWS ? dense_few(a) : dense_of<BFLOAT16>(a);
}

// As in limits.h: adds products in registers; returns how many operations, two for a product.
static int64_t multiply_all(int64_t rounds) {
    const int64_t all_rounds = rounds * max_threads();
    in_threads(all_rounds, rounds / RUN_PARTS + 1, [&](const Share &share) {
        Tiles tiles(nullptr);
        tiles.take_shapes(ROW_BYTES);
        zero_tile<X_TILE>();
        zero_tile<X_TILE + 1>();
        zero_tile<W_TILE>();
        zero_tile<W_TILE + 1>();
        clear_sums<2, 2>();
        take_parts(share, [&](int64_t round, int64_t end) {
            for (; round < end; round++) {
                add_product<0, X_TILE, W_TILE>();
                add_product<1, X_TILE, W_TILE + 1>();
                add_product<2, X_TILE + 1, W_TILE>();
                add_product<3, X_TILE + 1, W_TILE + 1>();
            }
        });
    });
    return all_rounds * 4 * SUMS * ROW_BYTES * 2;
}

// Whether tiles of blocks of some steps make the products that plain C++ makes.
static bool products_are_right(int64_t steps) {
    constexpr int64_t R = TILE_ROWS<1>, PANELS = 2, K = MAX_K_BLOCKS * K_BLOCK;
    const int8_t some_x[] = {-128, 127, -1, 0, 127, -127, 1};
    const uint8_t some_w[] = {255, 0, 128, 127, 1};
    alignas(64) static int8_t x[R * K];
    alignas(64) static uint8_t w[PANELS * LANES * K];
    alignas(64) static uint32_t out[R * GROUP_LANES];
    alignas(64) static int32_t sums[TILE_SUMS];
    alignas(64) int32_t zeros[GROUP_LANES];
    float scales[GROUP_LANES];
    const int64_t panel_bytes = steps * LANES * STEP;
    for (int64_t i = 0; i < R * K; i++) x[i] = some_x[(i + i / 64) % 7];
    for (int64_t i = 0; i < PANELS * LANES * K; i++) w[i] = some_w[(i + i / 64) % 5];
    for (int64_t i = 0; i < GROUP_LANES; i++) zeros[i] = 128;
    for (int64_t i = 0; i < R * GROUP_LANES; i++) out[i] = 0x7FFFFFFF;  // sums wrap
    {
        Tiles tiles(sums);
        Linear a = {};
        a.bits = 8;
        Operands o = {w, panel_bytes, scales, zeros, 0, x, steps, false, scales, zeros, zeros,
                      scales, reinterpret_cast<float *>(out)};
        tiles.begin(o, a, w, PANELS, steps);
        tiles.multiply<1>(o, R, PANELS);
        tiles.end<1>();
    }
    for (int64_t r = 0; r < R; r++)
        for (int64_t n = 0; n < PANELS * LANES; n++) {
            uint32_t sum = 0x7FFFFFFF;
            for (int64_t step = 0; step < steps; step++) {
                const int8_t *a = x + tile_offset(R, r, step, steps);
                const uint8_t *b = w + n / LANES * panel_bytes + (step * LANES + n % LANES) * STEP;
                for (int i = 0; i < STEP; i++) sum += uint32_t(a[i] * int8_t(b[i]));  // less zeros
            }
            if (out[r * GROUP_LANES + n] != sum) return false;
        }
    return true;
}

// The same of dense tiles: sums of whole numbers, which no order of theirs changes.
static bool dense_products_are_right() {
    constexpr int64_t R = DENSE_TILE_ROWS, PANELS = 2, S = 2 * TILE_STEPS;
    alignas(64) static float x[R * S], w[PANELS * S * LANES], out[R * GROUP_LANES];
    auto pair = [](int64_t i, uint32_t (&of)[2]) {  // 1, -2, 3, 0 and so on, as bfloat16
        const uint32_t some[] = {0x3F80, 0xC000, 0x4040, 0x0000, 0xC1C8};
        of[0] = some[(i + i / 64) % 5];
        of[1] = some[(i + i / 16 + 3) % 5];
    };
    auto fill = [&](float *to, int64_t count) {
        for (int64_t i = 0; i < count; i++) {
            uint32_t two[2];
            pair(i, two);
            to[i] = float_of(two[0] | two[1] << 16);
        }
    };
    fill(x, R * S);
    fill(w, PANELS * S * LANES);
    for (float &sum : out) sum = 7;
    {
        DenseTiles tiles;
        tiles.multiply<true>({w, x, S, S, out}, R, PANELS);
    }
    for (int64_t r = 0; r < R; r++)
        for (int64_t n = 0; n < PANELS * LANES; n++) {
            float sum = 7;
            for (int64_t step = 0; step < S; step++) {
                uint32_t a[2], b[2];
                pair(dense_offset(R, r, step), a);
                pair(n / LANES * S * LANES + step * LANES + n % LANES, b);
                for (int i = 0; i < 2; i++) sum += float_of(a[i] << 16) * float_of(b[i] << 16);
            }
            if (out[r * GROUP_LANES + n] != sum) return false;
        }
    return true;
}

// The same where the weight is the first operand, of tiles that are not all of one shape.
static bool few_products_are_right(int64_t rows) {
    constexpr int64_t IN = 2 * TILE_INPUTS, OUT = 2 * LANES;
    alignas(64) static uint16_t w[OUT * IN], of_x[FEW_ROWS * IN];
    alignas(64) static float x[FEW_ROWS * IN / 2], sums[2 * OUT * ROWS];
    const uint16_t some[] = {0x3F80, 0xC000, 0x4040, 0x0000, 0xC1C8};  // as above
    for (int64_t i = 0; i < OUT * IN; i++) w[i] = some[(i + i / IN) % 5];
    for (int64_t i = 0; i < rows * IN; i++) of_x[i] = some[(i + i / 16 + 3) % 5];
    const Dense a = {rows, IN, OUT, IN, BFLOAT16, 1, of_x, w, nullptr, nullptr};
    const FewRows few = {rows, IN / 2, x};
    for (int64_t step = 0; step < few.steps; step += TILE_STEPS) lay_out_few(a, few, step);
    {
        FewTiles tiles(few);
        if (rows > ROWS) {
            multiply_few<2, 2>(a, few, 0, sums);
        } else {
            multiply_few<1, 2>(a, few, 0, sums);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t n = 0; n < OUT; n++) {
            float sum = 0;
            for (int64_t i = 0; i < IN; i++)
                sum += float_of(of_x[r * IN + i] << 16) * float_of(w[n * IN + i] << 16);
            if (sums[(r / ROWS * OUT + n) * ROWS + r % ROWS] != sum) return false;
        }
    return true;
}

static bool self_test() {
    return products_are_right(MAX_K_BLOCKS * STEPS) && products_are_right(3 * STEPS) &&
           products_are_right(STEPS / 2) && dense_products_are_right() &&
           few_products_are_right(1) && few_products_are_right(21);
}

constexpr Path path() {
    Path path = {"amx", &avx512_path};
    path.linear = linear_by_phase;
    path.pack = pack;
    path.unpack = unpack;
    path.dense = dense_by_type;
    path.attend_sequences = attend_sequences;  // in pairs of bfloat16
    path.attend_sequences_backward = attend_sequences_backward;
    path.multiply_all = multiply_all;
    path.self_test = self_test;
    return path;
}

}  // namespace
}  // namespace qllm

const qllm::Path qllm::amx_path = path();
