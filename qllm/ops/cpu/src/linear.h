// y = x W^T + b for packed weights, in terms of an instruction set's `isa_*.h` and a `tile.h`.
//
// Activations become integers, block by block of up to BLOCK inputs of one group, with a scale to
// multiply with: a power of two, for int8 the block's largest value over 127, or, in int8 layers,
// the row's or the tensor's. An integer is split into int8 planes, one for every 8 bits; a plane of
// a row is a stream. A block of weights is
// unpacked to bytes in cache, and multiplied with tiles of streams in int32, which is exact.
// Sums over blocks are in float32, one fused multiply-add each, in the order of the inputs. So a
// row's result is the same to the bit whatever else is computed beside it, and on every path.
#pragma once

#include <omp.h>

#include "kernels.h"
#include "layout.h"

namespace qllm {
namespace {

constexpr int64_t BLOCK_SLABS = 4;   // 128 inputs: 128 * 255 * 2^15 is below 2^31
constexpr int64_t CHUNK_ROWS = 192;  // rows whose sums stay in cache: 48 KiB
constexpr int64_t MOST_ROWS = 1536;  // rows whose activations are held at once
constexpr int64_t ROWS_AHEAD = 8;    // to prefetch while activations become integers
constexpr int64_t FEW_ROWS = 16;     // up to here memory is the limit: threads read runs of panels

// |x| from 2^100 on, infinities and NaN are left to float arithmetic.
constexpr int32_t HUGE_BITS = 227 << 23;

struct Block {
    int64_t input, inputs;  // the first input, and how many there are
    int64_t slab, slabs;    // the same in slabs
    int64_t group;
};

struct Activations {
    int64_t rows, blocks, slabs;
    Block *block;      // (blocks,)
    int8_t *q;         // block after block, in it tile after tile
    float *scale;      // (blocks, rows)
    int32_t *sum;      // (blocks, rows): of the first two planes together
    int32_t *low_sum;  // (blocks, rows): of the third and fourth
    uint8_t *huge;     // (rows,): left to float arithmetic
    float *out;        // (threads, CHUNK_ROWS, GROUP_LANES)

    int8_t *tile(int planes, const Block &b, int64_t row) const {
        return q + (b.slab * rows + row * b.slabs) * SLAB * planes;
    }
};

// Whether blocks have scales of their own.
static inline bool is_scaled(const Linear &a) { return a.mode <= WEIGHT_ONLY_INT8; }

static inline float float_of(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// 2^exponent, from -149, where it is subnormal, to 127.
static inline float power_of_two(int exponent) {
    return float_of(exponent >= -126 ? uint32_t(exponent + 127) << 23 : 1u << (exponent + 149));
}

// The largest |x| of a run as bits, which order as the numbers do, with NaN above infinity.
static int32_t largest_bits(const Linear &a, int64_t start, int64_t count) {
    VI best = zero_i();
    for (int64_t i = 0; i < count; i += WIDTH)
        best = max_i(best, bits_of(abs_f(load_as(a.x, start + i, a.x_type, count - i))));
    return max_of_i(best);
}

// The exponent of the power of two in which every |x| up to `largest` is an integer of P planes:
// largest / 2^exponent is 2^14 (2^30 for 4 planes) to twice that, if the top plane holds it.
template <int P> int exponent_of(int32_t largest) {
    constexpr int KEPT = 8 * P - 2;
    constexpr float TOP = P == 2 ? 0x7F7F : 0x7F7F7F00;  // 127 in every plane, as a float has it
    int exponent = (largest >> 23 ? (largest >> 23) - 127 : -126) - KEPT;
    if (exponent < -149) exponent = -149;
    int half = -exponent / 2;
    float scaled = float_of(largest) * power_of_two(half) * power_of_two(-exponent - half);
    return scaled > TOP ? exponent + 1 : exponent;
}

// One row of one block as integers. Blocks that are not scaled have the row's `scale`.
template <int P>
void quantize(const Linear &a, const Activations &x, int64_t row, int64_t b, int64_t start,
              float scale) {
    const Block &block = x.block[b];
    VF up = set_f(1), up_again = set_f(1);
    if (is_scaled(a)) {
        int32_t largest = largest_bits(a, start, block.inputs);
        if (largest >= HUGE_BITS) {
            x.huge[row] = 1;
            largest = 0;
        }
        if (P > 1) {
            int exponent = exponent_of<P>(largest), half = -exponent / 2;
            scale = power_of_two(exponent);
            up = set_f(power_of_two(half));
            up_again = set_f(power_of_two(-exponent - half));
        } else {
            scale = float_of(largest) / 127;
            if (scale == 0) scale = 1;
        }
    }
    const VF step = set_f(scale), lowest = set_f(is_scaled(a) ? -127 : -128);
    int64_t tile_row = row / TILE_ROWS<P> * TILE_ROWS<P>;
    int64_t streams = smaller(TILE_ROWS<P>, x.rows - tile_row) * P;
    int64_t stream = (row - tile_row) * P;
    int8_t *tile = x.tile(P, block, tile_row);
    VI sum = zero_i(), low_sum = zero_i();
    for (int64_t i = 0; i < block.slabs * SLAB; i += LANES) {
        int8_t bytes[P][LANES];
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = i + v * WIDTH;
            VF value = load_as(a.x, start + at, a.x_type, block.inputs - at);
            VI whole;
            if (P > 1) {
                whole = round_i(mul_f(mul_f(value, up), up_again));
            } else {
                whole = round_i(max_f(lowest, min_f(set_f(127), div_f(value, step))));
            }
            VI all = whole, top = whole;
            for (int plane = P - 1; plane >= 0; plane--) {
                if (plane == 1) top = whole;
                store_bytes(bytes[plane] + v * WIDTH, whole);
                VI low = shift_right<24>(shift_left<24>(whole));
                whole = shift_right<8>(sub_i(whole, low));
            }
            sum = add_i(sum, top);
            if (P == 4) low_sum = add_i(low_sum, sub_i(all, shift_left<16>(top)));
        }
        for (int plane = 0; plane < P; plane++)
            for (int64_t t = 0; t < LANES / STEP; t += STEPS_TOGETHER)
                __builtin_memcpy(tile + place(streams, stream + plane, i / STEP + t, block.slabs),
                                 bytes[plane] + t * STEP, STEPS_TOGETHER * STEP);
    }
    int64_t at = b * x.rows + row;
    if (is_scaled(a)) x.scale[at] = scale;  // else one for all blocks, which is there
    x.sum[at] = sum_of_i(sum);
    if (P == 4) x.low_sum[at] = sum_of_i(low_sum);
}

// Of a row of a block, which is too short a run for the machine to see it coming.
static void prefetch(const Linear &a, int64_t start, int64_t count) {
    const int64_t bytes = a.x_type == FLOAT32 ? 4 : 2;
    const char *from = static_cast<const char *>(a.x) + start * bytes;
    for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(from + i);
}

// A thread's share of the activations, `first` being their first row in a.x. It takes whole blocks:
// the rows of a tile lie side by side in cache lines, which threads would take from each other.
template <int P> void quantize_share(const Linear &a, const Activations &x, int64_t first) {
    if (!is_scaled(a)) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < x.rows; row++) {
            float scale = a.input_scale ? *a.input_scale : 0;
            if (a.mode == INT8_DYNAMIC) {
                scale = float_of(largest_bits(a, (first + row) * a.x_stride, a.in)) * 2 / 255;
                if (scale == 0) scale = 1;
            }
            x.scale[row] = scale;
        }
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < x.blocks; b++)
        for (int64_t row = 0; row < x.rows; row++) {
            int64_t start = (first + row) * a.x_stride + x.block[b].input;
            if (row + ROWS_AHEAD < x.rows)
                prefetch(a, start + ROWS_AHEAD * a.x_stride, x.block[b].inputs);
            quantize<P>(a, x, row, b, start, is_scaled(a) ? 1 : x.scale[row]);
        }
}

// The sums of a group of panels to y.
template <int P>
void finish(const Linear &a, const Activations &x, int64_t first, int64_t row, int64_t rows,
            int64_t panel, int64_t panels, const float *sums, const float *scales) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t start = (first + row + r) * a.out;
        for (int64_t lane = 0; lane < panels * LANES; lane += WIDTH) {
            int64_t channel = panel * LANES + lane, count = a.out - channel;
            if (count <= 0) break;
            const float *sum = sums + r * GROUP_LANES + lane;
            VF value;
            if (is_scaled(a)) {
                value = load_f(sum);
            } else {
                value = to_float(load_i(reinterpret_cast<const int32_t *>(sum)));
                value = mul_f(value, set_f(x.scale[row + r]));
                value = mul_f(value, load_f(scales + lane));
            }
            if (a.bias) value = add_f(value, load_as(a.bias, channel, a.x_type, count));
            store_as(a.y, start + channel, a.x_type, count, value);
        }
    }
}

static float one(const void *p, int64_t i, int64_t type) {
    alignas(64) float value[WIDTH];
    store_f(value, load_as(p, i, type, 1));
    return value[0];
}

// A row with numbers that integers cannot stand for: the products as they are.
static void multiply_huge(const Linear &a, int64_t row, int64_t panel, int64_t panels) {
    int64_t slabs = row_slabs(a.in, a.group), groups = (a.in + a.group - 1) / a.group;
    for (int64_t n = panel * LANES; n < smaller(a.out, (panel + panels) * LANES); n++) {
        double sum = 0;  // K products one by one: in float32 their roundings would add up
        for (int64_t k = 0; k < a.in; k++) {
            int64_t slab = k / a.group * slabs_of(a.group) + k % a.group / SLAB;
            int64_t group = (n / LANES * groups + k / a.group) * LANES + n % LANES;
            int value = value_at(a.q + (n / LANES * slabs + slab) * 64 * a.bits, int(a.bits),
                                 n % LANES, k % a.group % SLAB);
            value -= a.zeros ? a.zeros[group] : 1 << (a.bits - 1);
            sum += one(a.x, row * a.x_stride + k, a.x_type) *
                   (float(value) * one(a.scales, group, a.scale_type));
        }
        if (a.bias) sum += one(a.bias, n, a.x_type);
        store_as(a.y, row * a.out + n, a.x_type, 1, set_f(float(sum)));
    }
}

// The scales and zeros of a group of inputs, for some panels.
struct Grid {
    alignas(64) float scales[GROUP_LANES];
    alignas(64) int32_t zeros[GROUP_LANES];

    void load(const Linear &a, int64_t panel, int64_t panels, int64_t group) {
        int64_t groups = (a.in + a.group - 1) / a.group;
        for (int64_t p = 0; p < panels; p++) {
            int64_t from = ((panel + p) * groups + group) * LANES, to = p * LANES;
            for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
                VF scale = load_as(a.scales, from + lane, a.scale_type, WIDTH);
                store_f(scales + to + lane, scale);
                VI zero = a.zeros ? load_bytes(a.zeros + from + lane) : set_i(1 << (a.bits - 1));
                store_i(zeros + to + lane, zero);
            }
        }
    }
};

// What a tile needs of the activations of `row` and those below it.
static void point_at(Operands &o, const Activations &x, int planes, int64_t b, int64_t row) {
    int64_t at = b * x.rows + row;
    o.x = x.tile(planes, x.block[b], row);
    o.slabs = x.block[b].slabs;
    o.x_scale = x.scale + at;
    o.sum = x.sum + at;
    o.low_sum = x.low_sum + at;
}

// `panels` panels, up to GROUP_PANELS, times all rows: unpacked to cache for many rows.
template <int P>
void multiply_group(const Linear &a, const Activations &x, int64_t first, int64_t panel,
                    int64_t panels, float *sums, Tiles &tiles) {
    alignas(64) uint8_t bytes[GROUP_LANES * BLOCK_SLABS * SLAB];
    Grid grid;
    const UnpackSlab unpack = UNPACK_SLAB[a.bits];
    for (int64_t row = 0; row < x.rows; row += CHUNK_ROWS) {
        int64_t rows = smaller(CHUNK_ROWS, x.rows - row), group = -1;
        for (int64_t i = 0; i < rows * GROUP_LANES; i += WIDTH) store_f(sums + i, set_f(0));
        for (int64_t b = 0; b < x.blocks; b++) {
            const Block &block = x.block[b];
            Operands o;
            o.w = bytes;
            o.w_stride = block.slabs * SLAB * LANES;
            o.scales = grid.scales;
            o.zeros = grid.zeros;
            o.scaled = is_scaled(a);
            for (int64_t p = 0; p < panels; p++) {
                const uint8_t *q = a.q + ((panel + p) * x.slabs + block.slab) * 64 * a.bits;
                for (int64_t s = 0; s < block.slabs; s++)
                    unpack(q + s * 64 * a.bits, bytes + p * o.w_stride + s * SLAB * LANES);
            }
            if (block.group != group) grid.load(a, panel, panels, group = block.group);
            tiles.begin(o, a, bytes, panels, block.slabs);
            for (int64_t r = 0; r < rows; r += TILE_ROWS<P>) {
                point_at(o, x, P, b, row + r);
                o.out = sums + r * GROUP_LANES;
                tiles.multiply<P>(o, smaller(TILE_ROWS<P>, rows - r), panels);
            }
        }
        tiles.end<P>();
        finish<P>(a, x, first, row, rows, panel, panels, sums, grid.scales);
        for (int64_t r = row; r < row + rows; r++)
            if (x.huge[r]) multiply_huge(a, first + r, panel, panels);
    }
}

#if FEW_STREAMS
template <int BITS, int N, int T, int I = 0>
INLINE inline void load_step(VI (&w)[N], const uint8_t *q, int64_t stride) {
    w[I] = (VI)step_of<BITS, T>(reinterpret_cast<const Bytes *>(q + I * stride));
    if constexpr (I + 1 < N) load_step<BITS, N, T, I + 1>(w, q, stride);
}

// Adds the steps of a slab of N panels, to each of the sums in turn.
template <int BITS, int P, int R, int N, int SETS, int T = 0>
INLINE inline void add_slab(Sums<P, R, N> (&sums)[SETS], const uint8_t *q, int64_t stride,
                            const int8_t *x) {
    VI w[N];
    load_step<BITS, N, T>(w, q, stride);
    sums[T % SETS].add(w, x + T * P * R * STEP);
    if constexpr (T + 1 < STEPS) add_slab<BITS, P, R, N, SETS, T + 1>(sums, q, stride, x);
}

// N panels times R rows, all there are, each step unpacked in registers: where weights are used
// once or twice, memory has to be read without a pause, and the way through the cache costs more
// than it saves. It is slower in several streams, where it is slow: no more panels go together than
// the units need to be busy, for which one panel has several sets of sums.
template <int BITS, int P, int R, int N>
__attribute__((noinline)) void multiply_few(const Linear &a, const Activations &x, int64_t panel,
                                            Grid &grid, float *out) {
    const int64_t stride = x.slabs * 64 * BITS;
    const uint8_t *q = a.q + panel * stride, *end = q + stride;
    int64_t group = -1;
    Operands o;
    o.out = out;
    o.scales = grid.scales;
    o.zeros = grid.zeros;
    o.scaled = is_scaled(a);
    constexpr int SETS = P * R * N > 4 ? 1 : P * R * N > 2 ? 2 : 4;
    for (int64_t b = 0; b < x.blocks; b++) {
        if (x.block[b].group != group) grid.load(a, panel, N, group = x.block[b].group);
        point_at(o, x, P, b, 0);
        Sums<P, R, N> sums[SETS];
        for (auto &set : sums) set.clear();
        for (int64_t s = 0; s < o.slabs; s++, q += 64 * BITS) {
            // Behind the end of these panels come the next ones.
            const uint8_t *ahead = q + AHEAD + (q + AHEAD < end ? 0 : (N - 1) * stride);
            for (int n = 0; n < N; n++)
                for (int v = 0; v < BITS; v++) __builtin_prefetch(ahead + n * stride + v * 64);
            add_slab<BITS>(sums, q, stride, o.x + s * (SLAB * P * R));
        }
        for (int i = 1; i < SETS; i++) sums[0].join(sums[i]);
        sums[0].finish(o, 0);
    }
}

// What multiplies so many panels at once, and one; null where there are too many rows.
struct Few {
    void (*many)(const Linear &, const Activations &, int64_t, Grid &, float *) = nullptr;
    void (*one)(const Linear &, const Activations &, int64_t, Grid &, float *) = nullptr;
    int64_t panels = 0;
};

// For int8 activations of other than 8 bits rows are too many earlier: the compiler takes long.
template <int BITS, int P, int R = 1> Few few_of(int64_t rows) {
    if constexpr (P * R <= (P == 1 && BITS < 8 ? FEW_STREAMS / 4 : FEW_STREAMS)) {
        if (rows != R) return few_of<BITS, P, R + 1>(rows);
        constexpr int N = P * R <= 2 ? 1 : 2;
        return {multiply_few<BITS, P, R, N>, multiply_few<BITS, P, R, 1>, N};
    } else {
        return {};
    }
}

template <int P, int BITS = 8> Few few_of_bits(int64_t bits, int64_t rows) {
    // float32 goes through the cache, which spares a third of the functions.
    if constexpr (P <= 2) {
        if (bits == BITS) return few_of<BITS, P>(rows);
        if constexpr (BITS > 1) return few_of_bits<P, BITS - 1>(bits, rows);
    }
    return {};
}

// Panels up to `end`; false where there are too many rows.
template <int P>
bool multiply_if_few(const Linear &a, const Activations &x, int64_t first, int64_t panel,
                     int64_t end, float *sums) {
    const Few few = few_of_bits<P>(a.bits, x.rows);
    if (!few.many) return false;
    Grid grid;
    while (panel < end) {
        int64_t panels = end - panel < few.panels ? 1 : few.panels;
        for (int64_t i = 0; i < x.rows * GROUP_LANES; i += WIDTH) store_f(sums + i, set_f(0));
        (panels == 1 ? few.one : few.many)(a, x, panel, grid, sums);
        finish<P>(a, x, first, 0, x.rows, panel, panels, sums, grid.scales);
        for (int64_t r = 0; r < x.rows; r++)
            if (x.huge[r]) multiply_huge(a, first + r, panel, panels);
        panel += panels;
    }
    return true;
}
#else
template <int P>
bool multiply_if_few(const Linear &, const Activations &, int64_t, int64_t, int64_t, float *) {
    return false;
}
#endif

// Memory for the activations of `rows` rows; false where there is none.
static bool prepare(Activations &x, const Linear &a, int64_t rows, int planes) {
    x.rows = rows;
    x.slabs = row_slabs(a.in, a.group);
    x.blocks = 0;
    int64_t per_group = (slabs_of(a.group) + BLOCK_SLABS - 1) / BLOCK_SLABS;
    int64_t most_blocks = (a.in / a.group + 1) * per_group;
    int64_t sizes[] = {most_blocks * int64_t(sizeof(Block)),
                       x.slabs * SLAB * rows * planes,  // AMX reads up to 4 KiB behind them
                       most_blocks * rows * 4,
                       most_blocks * rows * 4,
                       most_blocks * rows * 4,
                       rows,
                       omp_get_max_threads() * CHUNK_ROWS * GROUP_LANES * 4};
    char *parts[7];
    int64_t total = 0;
    for (int64_t size : sizes) total += (size + 63) / 64 * 64;
    char *memory = static_cast<char *>(scratch(total));
    if (!memory) return false;
    for (int i = 0; i < 7; i++) {
        parts[i] = memory;
        memory += (sizes[i] + 63) / 64 * 64;
    }
    x.block = reinterpret_cast<Block *>(parts[0]);
    x.q = reinterpret_cast<int8_t *>(parts[1]);
    x.scale = reinterpret_cast<float *>(parts[2]);
    x.sum = reinterpret_cast<int32_t *>(parts[3]);
    x.low_sum = reinterpret_cast<int32_t *>(parts[4]);
    x.huge = reinterpret_cast<uint8_t *>(parts[5]);
    x.out = reinterpret_cast<float *>(parts[6]);
    for (int64_t start = 0, slab = 0, group = 0; start < a.in; start += a.group, group++) {
        int64_t end = smaller(a.in, start + a.group);
        for (int64_t input = start; input < end; input += BLOCK_SLABS * SLAB) {
            int64_t inputs = smaller(BLOCK_SLABS * SLAB, end - input);
            x.block[x.blocks++] = {input, inputs, slab, slabs_of(inputs), group};
            slab += slabs_of(inputs);
        }
    }
    return true;
}

template <int P> bool linear_of(const Linear &a) {
    int64_t panels = (a.out + LANES - 1) / LANES;
    for (int64_t first = 0; first < a.rows; first += MOST_ROWS) {
        Activations x;
        if (!prepare(x, a, smaller(MOST_ROWS, a.rows - first), P)) return false;
        for (int64_t row = 0; row < x.rows; row++) x.huge[row] = 0;
#pragma omp parallel
        {
            [[maybe_unused]] Tiles tiles;
            quantize_share<P>(a, x, first);
            int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            float *sums = x.out + thread * CHUNK_ROWS * GROUP_LANES;
            if (x.rows <= FEW_ROWS) {
                int64_t p = panels * thread / threads, end = panels * (thread + 1) / threads;
                if (multiply_if_few<P>(a, x, first, p, end, sums)) p = end;
                for (; p < end; p += GROUP_PANELS)
                    multiply_group<P>(a, x, first, p, smaller(GROUP_PANELS, end - p), sums, tiles);
            } else {
#pragma omp for schedule(dynamic) nowait
                for (int64_t p = 0; p < panels; p += GROUP_PANELS)
                    multiply_group<P>(a, x, first, p, smaller(GROUP_PANELS, panels - p), sums,
                                      tiles);
            }
        }
    }
    return true;
}

static bool linear(const Linear &a) {
    if (a.mode != WEIGHT_ONLY) return linear_of<1>(a);
    return a.x_type == FLOAT32 ? linear_of<4>(a) : linear_of<2>(a);
}

}  // namespace
}  // namespace qllm
