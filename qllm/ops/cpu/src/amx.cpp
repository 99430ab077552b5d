// AMX. Compilers do not agree on what they define where they have it.
#define HAS_TILES 1
#include "dense_decode_amx.h"
#include "isa.h"
#include "kernels.h"
#include "linear.h"
#include "prefill_amx.h"
#include "prefill_attention_amx.h"
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
    if (a.rows <= max_vector_rows(a)) return avx512_path.linear(a);
    return is_scaled(a) ? linear(a) : BY_TYPE(a.x_type, int8_passes, a);
}

static_assert(PASS_ROWS % DENSE_TILE_ROWS == 0);

// Only bfloat16 is for tiles. Few rows have a way of their own, which gives the same bits.
static Status dense_by_type(const Dense &a) {
    if (a.type != BFLOAT16) return avx512_path.dense(a);
    return a.rows <= FEW_ROWS ? dense_few(a) : dense_prefill(a);
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

// Whether tiles of blocks of some steps make the products that plain C++ makes: of bytes, whose
// sums wrap, or of pairs of whole numbers as bfloat16, whose sums no order changes.
template <bool BYTES> bool products_are_right(int64_t steps) {
    constexpr int64_t R = 2 * ROWS, N = PAIR * LANES, IN = BYTES ? STEP : 2;
    const uint32_t some_bytes[] = {0x80, 127, 255, 0, 129, 1, 64};
    const uint32_t some_pairs[] = {0x3F80, 0xC000, 0x4040, 0x0000, 0xC1C8, 0x4000, 0x3F80};
    const int64_t together = BYTES ? tile_inputs(steps) / STEP : TILE_STEPS;
    alignas(64) static uint32_t x[R * PASS_STEPS], w[PASS_BLOCK], out[2 * R * N];
    const auto element = [&](int64_t i, int64_t of) {
        return (BYTES ? some_bytes : some_pairs)[(i + i / 64 + of) % 7];
    };
    for (int64_t i = 0; i < steps * LANES * PAIR; i++) x[i] = w[i] = 0;
    for (int64_t i = 0; i < steps * R; i++)
        for (int64_t of = 0; of < IN; of++) {
            x[i] |= element(i, of) << of * (32 / IN);
            w[i] |= element(i + 5, of) << of * (32 / IN);
        }
    const uint32_t begin = BYTES ? 0x7FFFFFFF : 0x40E00000;  // 7.0
    for (uint32_t &sum : out) sum = begin;
    const auto *tiles_x = reinterpret_cast<const float *>(x);
    {
        Tiles tiles(nullptr);
        tiles.take_shapes(together * STEP);
        ComingOperands nothing;
        const Panels panels = {reinterpret_cast<const float *>(w), steps * LANES};
        multiply_pass<BYTES>({tiles_x, panels, steps, together, false,
                              reinterpret_cast<float *>(out)}, R, PAIR, nothing);
    }
    for (int64_t r = 0; r < R; r++)
        for (int64_t n = 0; n < N; n++) {
            uint32_t sum = begin;
            float number = float_of(begin);
            for (int64_t step = 0; step < steps; step++) {
                const int64_t at = step / together * together * R + r * together + step % together;
                const uint32_t a = x[at], b = w[(n / LANES * steps + step) * LANES + n % LANES];
                for (int i = 0; i < 4; i++)
                    sum += uint32_t(int8_t(a >> 8 * i) * uint8_t(b >> 8 * i));
                for (int i = 0; i < 2; i++)
                    number += float_of(a >> 16 * i << 16) * float_of(b >> 16 * i << 16);
            }
            const uint32_t got = out[sum_place(r, n / LANES) + n % LANES];
            if (BYTES ? got != sum : float_of(got) != number) return false;
        }
    return true;
}

// The same where the weight is the first operand, of tiles that are not all of one shape.
static bool few_products_are_right(int64_t rows) {
    constexpr int64_t IN = 2 * TILE_INPUTS, OUT = 2 * LANES;
    alignas(64) static uint16_t w[OUT * IN], of_x[FEW_ROWS * IN];
    alignas(64) static float x[FEW_ROWS * IN / 2], sums[2 * OUT * ROWS];
    const uint16_t some[] = {0x3F80, 0xC000, 0x4040, 0x0000, 0xC1C8};  // 1, -2, 3, 0 and -25
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
    return products_are_right<true>(PASS_STEPS) && products_are_right<true>(3 * STEPS) &&
           products_are_right<true>(STEPS / 2) && products_are_right<false>(2 * TILE_STEPS) &&
           few_products_are_right(1) && few_products_are_right(21);
}

constexpr Path path() {
    Path path = {"amx", &avx512_path};
    path.linear = linear_by_phase;
    path.pack = pack;
    path.unpack = unpack;
    path.dense = dense_by_type;
    path.attend_prefill = attend_prefill_in_tiles;
    path.attend_sequences = attend_sequences;  // in pairs of bfloat16
    path.attend_sequences_backward = attend_sequences_backward;
    path.multiply_all = multiply_all;
    path.self_test = self_test;
    return path;
}

}  // namespace
}  // namespace qllm

const qllm::Path qllm::amx_path = path();
