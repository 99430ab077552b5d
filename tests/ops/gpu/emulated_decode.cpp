// A GPU for decode.cu and decode_int8.cu: device.h on the CPU, and the few functions of CUDA's
// driver that launch it.
//
// What does not show is whether device.h's instructions order what its functions say, and that a
// next kernel which is let begin finds room; all else that is left out does (test_order.py).

struct Constants {
    int bits, float16, zeros, offsets, wide, group, warps, depth, tiles, panels, whole;
    int parts, x_ahead, resident, is_int8;
};

static Constants constants;

#include "emulated_gpu.h"

#include <utility>
#include <vector>

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

struct Warp {
    Meeting product;
    u32 a[32][4], b[32][2];
    float c[32][4];
    int sums[32][4];
};

struct Lane : Fiber {
    u32 arrivals;  // at the cluster's barrier
};

constexpr int MAX_CLUSTER = 8;


static Lane lanes[MAX_LANES];
static Warp warps[MAX_LANES / 32];
static Meeting meetings[MAX_CLUSTER], all_blocks, cluster;  // of each block, and of all of them
static std::vector<float> shared;                          // of all blocks
static int shared_size;                                    // numbers of a block
static u32 cluster_arrivals;

DEVICE float* shared_numbers() { return &shared[current / threads * shared_size]; }

DEVICE void barrier() {
    meet_in_order(meetings[current / threads], threads, [] {});
}

// The cluster's barrier, of which all lanes first say that they have come, and later wait for
// the rest.
static u32 times_complete() { return cluster_arrivals / (cluster_size * threads); }

DEVICE void arrive_in_cluster() {
    moved = true;
    require(
        lanes[current].arrivals++ == times_complete(),
        "a lane comes to a barrier that it has not left"
    );
    order::release(cluster.coming);
    if (++cluster_arrivals % (cluster_size * threads) == 0) cluster.passed = cluster.coming;
}

DEVICE void wait_for_cluster() {
    while (times_complete() < lanes[current].arrivals) yield();
    order::acquire(cluster.passed);
    moved = true;
}

DEVICE void store4_in_block(float* to, int block, const float* from) {
    const int at = (int)(to - shared_numbers());
    const bool inside = at >= 0 && at % 4 == 0 && at + 4 <= shared_size && block < cluster_size;
    require(inside, "a store is outside of shared memory");
    const bool begun = block == current / threads || order::knows({(u32)(block * threads), 1});
    require(begun, "a store is to a block that may not have begun");
    for (int i = 0; i < 4 && inside; ++i) shared[block * shared_size + at + i] = from[i];
}

// What the kernel in front writes: until all wait for it, other bytes are there, and nothing
// is written.
struct Late {
    void* address;
    std::vector<u8> content;
};

static std::vector<Late> late;
static const u8* result;
static std::vector<u8> result_before;
static bool launched_early, waited, wrote_early, let_begin;

DEVICE void wait_for_previous() {
    meet(all_blocks, cluster_size * threads, [] {
        waited = true;
        for (const Late& part : late)
            std::memcpy(part.address, part.content.data(), part.content.size());
        wrote_early |= std::memcmp(result, result_before.data(), result_before.size()) != 0;
    });
}

DEVICE void let_next_begin() { let_begin = true; }

// Element (row, k) of operand A or (k, column) of operand B, by its lane, register and half: see
// the figures of mma.m16n8k16 in NVIDIA's description of PTX.
static float element_of_a(const Warp& warp, int row, int k) {
    const u32 word = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
    return widen(k % 2 ? word >> 16 : word & 0xFFFF);
}

static float element_of_b(const Warp& warp, int k, int column) {
    const u32 word = warp.b[column * 4 + k % 8 / 2][k / 8];
    return widen(k % 2 ? word >> 16 : word & 0xFFFF);
}

UNTOLD static void multiply_all(Warp& warp) {
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
UNTOLD static void multiply_all_int8(Warp& warp) {
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

#define barrier UNLESS_LEFT_OUT barrier
#define arrive_in_cluster UNLESS_LEFT_OUT arrive_in_cluster
#define wait_for_cluster UNLESS_LEFT_OUT wait_for_cluster
#define wait_for_previous UNLESS_LEFT_OUT wait_for_previous
#define let_next_begin UNLESS_LEFT_OUT let_next_begin

namespace packed {
#include "decode.cu"
}
namespace int8 {
#include "decode_int8.cu"
}

static packed::Arguments arguments;
static int8::Arguments int8_arguments;

static int run_cluster() {
    for (Warp& warp : warps) warp.product = {};
    for (Meeting& meeting : meetings) meeting = {};
    for (int i = 0; i < cluster_size * threads; ++i) lanes[i].arrivals = 0;
    all_blocks = cluster = {};
    cluster_arrivals = 0;
    waited = let_begin = false;
    shared.assign(cluster_size * shared_size, NAN);
    order::begin(cluster_size * threads, 0, shared.data(), shared.size() * sizeof(float));
    result_before.assign(result, result + result_before.size());
    if (launched_early)
        for (const Late& part : late) std::memset(part.address, 0x7F, part.content.size());
    begin_lanes(lanes);
    while (run_round(lanes))
        if (!moved) return 719;  // lanes wait for others that do not come: launch failure
    require(!launched_early || (waited && !wrote_early), "the kernel in front was not waited for");
    require(let_begin, "the next kernel never begins early");
    return order::failure ? 719 : misaligned ? 716 : 0;  // misaligned address
}

// x, its scales and y of the arguments of either kernel.
template <class Of>
static void watch(const Of& given, const void* x, size_t size, const void* scales, size_t count) {
    late.clear();
    for (auto [at, bytes] : {std::pair(x, size), std::pair(scales, count)})
        late.push_back({(void*)at, std::vector<u8>((const u8*)at, (const u8*)at + bytes)});
    result = (const u8*)given.y;
    result_before.resize(sizeof(u16) * given.rows * given.outputs);
}

extern "C" {

int launches_that_began_early;

int cuCtxGetCurrent(void** context) {
    *context = &lanes;
    return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    return cuCtxGetCurrent(context);
}

int cuCtxSetCurrent(void*) {
    return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    return find_function(function, module, name, "decode", "decode_int8");
}

int cuLaunchKernelEx(const LaunchConfig* config, const void* function, void** parameters, void**) {
    std::memcpy(&constants, function, sizeof constants);
    threads = config->block[0];
    cluster_size = config->attribute(CLUSTER_DIMENSION, 1);
    launched_early = config->attribute(PROGRAMMATIC_SERIALIZATION, false);
    wrote_early = false;
    if (threads != WARPS * 32 / cluster_size || (!constants.is_int8 && cluster_size != PARTS) ||
        cluster_size > MAX_CLUSTER || config->grid[0] % cluster_size ||
        cluster_size * threads > MAX_LANES)
        return 1;
    shared_size = (int)(config->shared_bytes / sizeof(float));
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
    kernel = [] {
        constants.is_int8 ? int8::decode_int8(int8_arguments) : packed::decode(arguments);
    };
    return run_grid(*config, run_cluster);
}
}
