// A GPU for decode.cu and decode_int8.cu: device.h on the CPU, and the few functions of CUDA's driver that launch it.
//
// The lanes of a cluster's blocks of threads take turns, each with a stack of its own, and one that comes to what
// a warp or a block does together lets the others catch up. What is constant on a GPU is a variable
// here, so that one library does for all kernels: a binary is nothing but its constants.

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct Constants {
    int bits, float16, zeros, offsets, wide, group, warps, depth, tiles, panels, whole;
    int parts, x_ahead, resident, is_int8;
};

static Constants constants;

#define BITS constants.bits
#define FLOAT16 constants.float16
#define ZEROS constants.zeros
#define OFFSETS constants.offsets
#define WIDE constants.wide
#define GROUP constants.group
#define WARPS constants.warps
#define DEPTH constants.depth
#define TILES constants.tiles
#define PANELS constants.panels
#define WHOLE constants.whole
#define PARTS constants.parts
#define X_AHEAD constants.x_ahead
#define OWN_WARPS (WARPS / PARTS)

#define MAX_BITS 8
#define MAX_TILES 4
#define MAX_WARPS 16
#define MAX_DEPTH 4
#define MAX_SCALES 4
#define MAX_PANELS 4

#define DEVICE static inline
#define SHARED static
#define KERNEL static void

// What lanes do together: the last of them to come does it for all.
struct Meeting {
    int here = 0;
    u32 held = 0;  // how often it took place
};

struct Warp {
    Meeting product;
    u32 a[32][4], b[32][2];
    float c[32][4];
    int sums[32][4];
};

struct Fiber {
    ucontext_t context;
    bool done;
    u32 arrivals;  // at the cluster's barrier
};

constexpr int MAX_CLUSTER = 8, MAX_LANES = MAX_CLUSTER * 512;  // of a cluster
constexpr size_t STACK = 128 << 10;

struct Block {
    Meeting meeting;
    std::vector<float> shared;
};

static Fiber fibers[MAX_LANES];
static Warp warps[MAX_LANES / 32];
static Block blocks[MAX_CLUSTER];
static Meeting all_blocks;
static ucontext_t scheduler;
static int current, threads, shared_size, cluster_size, chunk, panel;
static u32 cluster_arrivals;
static bool moved;       // some lane has got on in this round
static bool misaligned;  // a load was not at a multiple of its size
static bool failed;      // something that a GPU does not do

DEVICE u32 thread_index() { return (u32)(current % threads); }
DEVICE int chunk_index() { return chunk + current / threads; }
DEVICE int panel_index() { return panel; }
DEVICE float* shared_numbers() { return blocks[current / threads].shared.data(); }

template <class Act>
static void meet(Meeting& meeting, int all, Act act) {
    moved = true;
    const u32 held = meeting.held;
    if (++meeting.here == all) {
        act();
        meeting.here = 0;
        ++meeting.held;
        return;
    }
    while (meeting.held == held) swapcontext(&fibers[current].context, &scheduler);
    moved = true;
}

DEVICE void barrier() {
    meet(blocks[current / threads].meeting, threads, [] {});
}

// The cluster's barrier, of which all lanes first say that they have come, and later wait for the rest.
static u32 times_complete() { return cluster_arrivals / (cluster_size * threads); }

DEVICE void arrive_in_cluster() {
    moved = true;
    failed |= fibers[current].arrivals++ > times_complete();
    ++cluster_arrivals;
}

DEVICE void wait_for_cluster() {
    while (times_complete() < fibers[current].arrivals)
        swapcontext(&fibers[current].context, &scheduler);
    moved = true;
}

// Behind the barrier's first time, of which all blocks know that the others have begun.
DEVICE void store4_in_block(float* to, int block, const float* from) {
    const size_t at = to - shared_numbers(), size = blocks[current / threads].shared.size();
    const bool inside = at % 4 == 0 && at + 4 <= size && block < cluster_size;
    failed |= !inside || (cluster_size > 1 && !times_complete());
    if (inside) std::memcpy(&blocks[block].shared[at], from, 16);
}

// What the kernel in front writes: until all wait for it, other bytes are there, and nothing is written.
struct Late {
    void* place;
    std::vector<u8> content;
};

static std::vector<Late> late;
static const u8* result;
static std::vector<u8> result_before;
static bool launched_early, waited, wrote_early;

DEVICE void wait_for_previous() {
    meet(all_blocks, cluster_size * threads, [] {
        waited = true;
        for (const Late& part : late) std::memcpy(part.place, part.content.data(), part.content.size());
        wrote_early |= std::memcmp(result, result_before.data(), result_before.size()) != 0;
    });
}

DEVICE void let_next_begin() {}

static void copy_words(u32* to, const void* from, int count) {
    misaligned |= reinterpret_cast<uintptr_t>(from) % (count * sizeof(u32)) != 0;
    std::memcpy(to, from, count * sizeof(u32));
}

DEVICE void load4(u32* to, const u32* from) { copy_words(to, from, 4); }
DEVICE void load2(u32* to, const u32* from) { copy_words(to, from, 2); }
DEVICE void load4_cached(u32* to, const void* from) { copy_words(to, from, 4); }

DEVICE u32 multiply_high(u32 a, u32 b) { return (u32)((uint64_t)a * b >> 32); }

DEVICE u32 and_or(u32 a, u32 mask, u32 c) { return (a & mask) | c; }

DEVICE u32 bits_of(float value) {
    u32 bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

DEVICE float of_bits(u32 bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

DEVICE float from_float16(u16 bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value;
    if (exponent == 31)
        value = fraction ? NAN : INFINITY;
    else if (exponent)
        value = std::ldexp(1024 + fraction, exponent - 25);
    else
        value = std::ldexp(fraction, -24);
    return bits >> 15 ? -value : value;
}

DEVICE float widen(u16 bits) { return FLOAT16 ? from_float16(bits) : of_bits((u32)bits << 16); }

DEVICE u16 narrow(float value) {
    const u16 sign = bits_of(value) >> 16 & 0x8000;
    if (value != value) return 0x7FFF;
    if (!FLOAT16) {
        const u32 bits = bits_of(value);
        return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
    const float size = std::fabs(value);
    if (size >= 65520) return sign | 0x7C00;
    int exponent;
    std::frexp(size, &exponent);  // size < 2^exponent
    exponent = size && exponent > -13 ? exponent : -13;
    // In units of the last of eleven bits, the next exponent's first where it rounds up to that.
    const int units = (int)std::nearbyint(std::ldexp(size, 11 - exponent));
    return sign | (units + ((exponent + 13) << 10));
}

DEVICE u32 byte_of(u32 word, int byte, u32 upper) { return (word >> 8 * byte & 0xFF) | upper; }

DEVICE u32 narrow_pair(float low, float high) { return narrow(low) | (u32)narrow(high) << 16; }

DEVICE u32 add_pairs(u32 a, u32 b) {
    const u32 low = narrow(widen(a & 0xFFFF) + widen(b & 0xFFFF));
    return low | (u32)narrow(widen(a >> 16) + widen(b >> 16)) << 16;
}

DEVICE float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

// Element (row, k) of operand A or (k, column) of operand B, by its lane, register and half: see the
// figures of mma.m16n8k16 in NVIDIA's description of PTX.
static float element_of_a(const Warp& warp, int row, int k) {
    const u32 word = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
    return widen(k % 2 ? word >> 16 : word & 0xFFFF);
}

static float element_of_b(const Warp& warp, int k, int column) {
    const u32 word = warp.b[column * 4 + k % 8 / 2][k / 8];
    return widen(k % 2 ? word >> 16 : word & 0xFFFF);
}

static void multiply_all(Warp& warp) {
    float a[16][16], b[16][8];
    for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 16; ++row) a[row][k] = element_of_a(warp, row, k);
        for (int column = 0; column < 8; ++column) b[k][column] = element_of_b(warp, k, column);
    }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = warp.c[lane][i];
            for (int k = 0; k < 16; ++k) sum += (double)a[row][k] * b[k][column];
            warp.c[lane][i] = (float)sum;
        }
}

DEVICE void multiply(float* c, const u32* a, u32 b0, u32 b1) {
    const int lane = current % 32;
    Warp& warp = warps[current / 32];
    std::memcpy(warp.a[lane], a, sizeof warp.a[lane]);
    std::memcpy(warp.c[lane], c, sizeof warp.c[lane]);
    warp.b[lane][0] = b0;
    warp.b[lane][1] = b1;
    meet(warp.product, 32, [&warp] { multiply_all(warp); });
    std::memcpy(c, warp.c[lane], sizeof warp.c[lane]);
}

// Byte k of a row of operand A and of a column of operand B: see the figures of mma.m16n8k32.
static void multiply_all_int8(Warp& warp) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            int sum = warp.sums[lane][i];
            for (int k = 0; k < 32; ++k) {
                const u32 a = warp.a[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2];
                const u32 b = warp.b[column * 4 + k % 16 / 4][k / 16];
                sum += (int8_t)(a >> k % 4 * 8) * (int8_t)(b >> k % 4 * 8);
            }
            warp.sums[lane][i] = sum;
        }
}

DEVICE void multiply_int8(int* c, const u32* a, u32 b0, u32 b1) {
    const int lane = current % 32;
    Warp& warp = warps[current / 32];
    std::memcpy(warp.a[lane], a, sizeof warp.a[lane]);
    std::memcpy(warp.sums[lane], c, sizeof warp.sums[lane]);
    warp.b[lane][0] = b0;
    warp.b[lane][1] = b1;
    meet(warp.product, 32, [&warp] { multiply_all_int8(warp); });
    std::memcpy(c, warp.sums[lane], sizeof warp.sums[lane]);
}

DEVICE float product(float a, float b) { return a * b; }
DEVICE float sum_of(float a, float b) { return a + b; }

namespace packed {
#include "decode.cu"
}
namespace int8 {
#include "decode_int8.cu"
}

static packed::Arguments arguments;
static int8::Arguments int8_arguments;

static void run_lane() {
    constants.is_int8 ? int8::decode_int8(int8_arguments) : packed::decode(arguments);
    moved = true;
    fibers[current].done = true;
}

static int run_blocks() {
    // Of which only what is used takes memory.
    static char* const stacks = static_cast<char*>(std::calloc(MAX_LANES, STACK));
    const int count = cluster_size * threads;
    for (Warp& warp : warps) warp.product = {};
    for (int i = 0; i < cluster_size; ++i) {
        blocks[i].meeting = {};
        blocks[i].shared.assign(shared_size / sizeof(float), NAN);
    }
    all_blocks = {};
    cluster_arrivals = 0;
    waited = false;
    result_before.assign(result, result + result_before.size());
    if (launched_early)
        for (const Late& part : late) std::memset(part.place, 0x7F, part.content.size());
    for (int i = 0; i < count; ++i) {
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = stacks + i * STACK;
        fibers[i].context.uc_stack.ss_size = STACK;
        fibers[i].context.uc_link = &scheduler;
        fibers[i].done = false;
        fibers[i].arrivals = 0;
        makecontext(&fibers[i].context, run_lane, 0);
    }
    for (bool left = true; left;) {
        left = moved = false;
        for (current = 0; current < count; ++current)
            if (!fibers[current].done) {
                left = true;
                swapcontext(&scheduler, &fibers[current].context);
            }
        if (left && !moved) return 719;  // lanes wait for others that do not come: launch failure
    }
    if (failed || (launched_early && (!waited || wrote_early))) return 719;
    return misaligned ? 716 : 0;  // misaligned address
}

// x, its scales and y of the arguments of either kernel.
template <class Of>
static void watch(const Of& given, const void* x, size_t size, const void* scales, size_t count) {
    late.clear();
    for (auto [place, bytes] : {std::pair(x, size), std::pair(scales, count)})
        late.push_back({(void*)place, std::vector<u8>((const u8*)place, (const u8*)place + bytes)});
    result = (const u8*)given.y;
    result_before.resize(sizeof(u16) * given.rows * given.outputs);
}

extern "C" {

struct Config {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    const struct {
        int id, pad, value[16];
    }* attributes;
    unsigned attribute_count;
};

int launches_that_began_early;

int cuCtxGetCurrent(void** context) {
    *context = &fibers;
    return 0;
}

int cuModuleLoadData(void** module, const void* image) {
    auto copy = new Constants;
    std::memcpy(copy, image, offsetof(Constants, is_int8));
    *module = copy;
    return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = module;
    const int is_int8 = !std::strcmp(name, "decode_int8");
    static_cast<Constants*>(module)->is_int8 = is_int8;
    return is_int8 || !std::strcmp(name, "decode") ? 0 : 500;  // not found
}

int cuLaunchKernelEx(const Config* config, const void* function, void** parameters, void**) {
    std::memcpy(&constants, function, sizeof constants);
    threads = config->block[0];
    cluster_size = 1;
    launched_early = wrote_early = misaligned = failed = false;
    for (unsigned i = 0; i < config->attribute_count; ++i)
        if (config->attributes[i].id == 6)
            launched_early = config->attributes[i].value[0];
        else if (config->attributes[i].id == 4)
            cluster_size = config->attributes[i].value[0];
    if (threads != WARPS * 32 / cluster_size || (!constants.is_int8 && cluster_size != PARTS) || cluster_size > MAX_CLUSTER ||
        config->grid[0] % cluster_size || cluster_size * threads > MAX_LANES)
        return 1;
    shared_size = config->shared_bytes;
    launches_that_began_early += launched_early;
    if (constants.is_int8) {
        const auto& to = int8_arguments;
        std::memcpy(&int8_arguments, parameters[0], sizeof to);
        const size_t scales = to.x_scales_stride ? to.rows : 1;
        watch(to, to.x, (size_t)to.rows * to.inputs, to.x_scales, scales * sizeof(float));
    } else {
        const auto& to = arguments;
        std::memcpy(&arguments, parameters[0], sizeof to);
        const size_t values = (to.rows - 1) * to.x_stride + to.inputs;
        watch(to, to.x, values * sizeof(u16), nullptr, 0);
    }
    for (panel = 0; panel < (int)config->grid[1]; ++panel)
        for (chunk = 0; chunk < (int)config->grid[0]; chunk += cluster_size)
            if (const int error = run_blocks()) return error;
    return 0;
}
}
