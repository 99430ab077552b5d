// hopper.h on the CPU, for emulated_prefill.cpp, as emulated_decode.cpp has device.h.
//
// What runs on its own on a GPU runs here as late as it may: copies to shared memory when no lane
// gets on without them, products when a warp waits for its own, with what registers and shared
// memory hold then. So registers that are overwritten too early show. Of shared memory,
// emulated_order.h says what is read or overwritten without an order, copies and products being
// agents that know what the lane knew that started them. Other rules are checked where they apply:
// a product is behind a fence for its registers, whole warps come to barriers together, barriers
// are initialized and published before they are used, registers are given up before others take
// them, and no block reads what one that has ended had. test_order.py leaves out each call that
// orders something, all of which are found.
//
// What does not show, since it is below the functions of this file: whether these mean to a GPU
// what they mean here. That is, which registers a compiler keeps for products that run (what it
// does is read in test_hopper.py), whether the qualifiers of an instruction (release, acquire,
// relaxed) and what it says of memory to the compiler are right, what descriptors mean, fences
// between accesses of lanes and those of copies and products to the same memory (there are none:
// what lanes write is read by lanes alone), and the order in which the matrix units add up 16
// products. The self-test on the GPU is for those.

struct Constants {
    int bits, float16, zeros, offsets, wide, group, rows, x_stages, w_stages, outputs;
    int stages, multiplying, threads, blocks;
    bool is_int8;
};

static Constants constants;

#include "emulated_gpu.h"

#include <deque>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

namespace hopper {

#define ROWS constants.rows
#define X_STAGES constants.x_stages
#define W_STAGES constants.w_stages
#define OUTPUTS constants.outputs
#define STAGES constants.stages
#define MULTIPLYING constants.multiplying
#define MAX_ROWS 256
#define PARAMETER const

constexpr int MAX_THREADS_OF_BLOCK = 384, MAX_BLOCKS = 8;
static_assert(MAX_BLOCKS * MAX_THREADS_OF_BLOCK <= MAX_LANES);
constexpr size_t SHARED_SIZE = 227 << 10;
constexpr u32 MAX_BARRIERS = 32;
constexpr u32 SHARED_BASE = 1024;  // address of a block's shared memory

struct TensorMap {
    u64 address, columns, rows, stride, width, height, size, swizzle;
    u64 others[8];
};

struct MemoryBarrier {
    int expected, pending, bytes;
    u32 parity;          // of the phase that is not complete
    order::Event made;   // its initialization
    bool published;      // that, for copies
    order::Event phase;  // how many are complete, which is the time of the copies that come here
    order::Clock coming, passed;  // what its phases are behind, with the one that is not complete

    void settle() {
        if (pending || bytes) return;
        pending = expected;
        parity ^= 1;
        ++phase.when;
        order::pass_on(coming, phase);
        passed = coming;
        moved = true;
    }
};

struct Product {
    float* c;  // or where they are int8
    int* sums;
    const u32* a;
    u64 described_a, b;
    bool adds;
};

struct Lane : Fiber {
    std::deque<std::vector<Product>> committed;
    std::vector<Product> begun;
    bool fenced;             // the registers that the next product takes are there for it
    u32 multiplied;          // groups of products that are done
    int registers;
    int apart;               // how often it did what it may without its warp, since that met
    order::Event published;  // its initialization of barriers
};

struct Exchange {
    Meeting meeting;
    u32 words[2][32];
};

struct Block {
    std::map<u32, MemoryBarrier> barriers;
    int registers;  // that were given up
    std::vector<Product> products[2];  // of each warpgroup, whose warps begin the same ones
    Meeting consumers;
    Meeting multiplying[MAX_THREADS_OF_BLOCK / 32];
    Meeting lanes[MAX_THREADS_OF_BLOCK / 32];
    Exchange exchanges[MAX_THREADS_OF_BLOCK / 32];
};

struct Copy {
    int block;
    u32 to, barrier;
    std::vector<u8> bytes;
    bool swizzled;
    order::Clock known;  // to what started it
};

alignas(1024) static u8 memory[MAX_BLOCKS][SHARED_SIZE];
static u32 shared_size;  // of a block, of this launch
static Lane lanes[MAX_BLOCKS * MAX_THREADS_OF_BLOCK];
static Block blocks[MAX_BLOCKS];
static std::deque<Copy> copies;
static Meeting cluster;

static Block& block() { return blocks[current / threads]; }

// Who has times beside lanes: the products of each warp, then barriers of each block.
static u32 products_of(int lane) { return cluster_size * threads + lane / 32; }
static u32 barriers_begin() { return products_of(cluster_size * threads); }

DEVICE void warp_barrier() {
    meet_in_order(block().lanes[thread_index() / 32], 32, [] {});
    lanes[current].apart = 0;
}

// Barriers of whole warps (.aligned), whose lanes have to come to it together.
static void come_together(int first, int end) {
    for (int lane = first; lane < end; ++lane)
        require(
            lanes[lane].apart == lanes[lane / 32 * 32].apart,
            "a warp comes to a barrier lane by lane"
        );
    for (int lane = first; lane < end; ++lane) lanes[lane].apart = 0;
}

DEVICE void consumers_barrier() {
    const int first = current / threads * threads;
    meet_in_order(block().consumers, MULTIPLYING, [first] {
        come_together(first, first + MULTIPLYING);
    });
}

static void meet_cluster() {
    const int all = cluster_size * threads;
    meet(cluster, all, [all] {
        come_together(0, all);
        cluster.passed = cluster.coming;
    });
    order::acquire(cluster.passed);
}

DEVICE void cluster_barrier() {
    order::release(cluster.coming);
    meet_cluster();
}

// What is passed on is the initialization of barriers alone, if that was published.
DEVICE void cluster_barrier_relaxed() {
    if (lanes[current].published.when) order::pass_on(cluster.coming, lanes[current].published);
    meet_cluster();
}

constexpr int REGISTERS = 168;  // that a lane begins with
DEVICE void give_up_registers() {
    block().registers += REGISTERS - 24;
    lanes[current].registers = 24;
    moved = true;
}
DEVICE void take_registers() {
    while (block().registers < 240 - REGISTERS) yield();
    block().registers -= 240 - REGISTERS;
    lanes[current].registers = 240;
    moved = true;
}

DEVICE u8* shared_memory() { return memory[current / threads]; }
DEVICE u32 address_of(const void* shared) {
    return SHARED_BASE + (u32)((const u8*)shared - shared_memory());
}

static u8* shared_at(int of_block, u32 address, size_t size) {
    const bool inside = address >= SHARED_BASE && address - SHARED_BASE + size <= shared_size;
    require(inside, "an address is outside of shared memory");
    return memory[of_block] + (inside ? address - SHARED_BASE : 0);
}

static u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

DEVICE void init_barrier(u32 barrier, u32 arrivals) {
    auto& others = block().barriers;
    require(barrier % 8 == 0 && others.size() < MAX_BARRIERS, "a barrier is nowhere");
    const u32 who = barriers_begin() + current / threads * MAX_BARRIERS + (u32)others.size();
    others[barrier] = {(int)arrivals, (int)arrivals, 0, 0, order::now(), false, {who, 0}, {}, {}};
}
DEVICE void publish_barriers() {
    for (auto& [address, barrier] : block().barriers) barrier.published = true;
    lanes[current].published = order::now();
    order::tick();
}

static MemoryBarrier& barrier_at(int of_block, u32 address) {
    MemoryBarrier& found = blocks[of_block].barriers[address];
    require(found.expected, "there is no barrier");
    return found;
}

// A barrier of one's own block.
static MemoryBarrier& own_barrier(u32 address) {
    MemoryBarrier& found = barrier_at(current / threads, address);
    require(order::knows(found.made), "a barrier may not be initialized yet");
    return found;
}

DEVICE void arrive_expecting(u32 barrier, u32 bytes) {
    MemoryBarrier& here = own_barrier(barrier);
    moved = true;
    order::release(here.coming);
    here.bytes += bytes;
    require(--here.pending >= 0, "more come to a barrier than are expected");
    here.settle();
}
DEVICE void arrive(u32 barrier) { arrive_expecting(barrier, 0); }

DEVICE void wait(u32 barrier, u32 parity) {
    const MemoryBarrier& here = own_barrier(barrier);
    yield_while(here.parity, parity);
    order::acquire(here.passed);
    ++lanes[current].apart;
    moved = true;
}

DEVICE void copy_tile(u32 to, const TensorMap& from, int column, int row, u32 barrier) {
    const auto [address, columns, rows, stride, width, height, size, swizzle, others] = from;
    (void)others;
    require(to % (swizzle ? 1024 : 128) == 0, "a copy is to where none can be");
    require(own_barrier(barrier).published, "a copy may not find its barrier initialized");
    std::vector<u8> bytes(width * height * size);
    for (int i = 0; i < (int)height; ++i)
        for (int k = 0; k < (int)width; ++k)
            if (row + i < (int)rows && column + k < (int)columns)
                std::memcpy(
                    &bytes[(i * width + k) * size],
                    (u8*)address + (row + i) * stride + (column + k) * size, size
                );
    copies.push_back({current / threads, to, barrier, bytes, swizzle != 0, order::known()});
    moved = true;
}

static void do_copy(const Copy& copy) {
    MemoryBarrier& barrier = barrier_at(copy.block, copy.barrier);
    const order::Event by = {barrier.phase.who, barrier.phase.when + 1};
    for (size_t i = 0; i < copy.bytes.size(); i += 16) {
        const u32 to = copy.to + (u32)i;
        u8* const there = shared_at(copy.block, copy.swizzled ? swizzled(to) : to, 16);
        order::write(there, &copy.bytes[i], 16, by, copy.known);
    }
    barrier.bytes -= (int)copy.bytes.size();
    barrier.settle();
    moved = true;
}

template <class Number>
DEVICE void load4_of_block(Number* to, u32 address, u32 of_block) {
    require(
        address % 16 == 0 && (int)of_block < cluster_size, "an address is none of the cluster's"
    );
    const u8* from = shared_at(of_block, address, 16);
    for (int i = 0; i < 4; ++i) to[i] = ((const Number*)from)[i];
    ++lanes[current].apart;
    bool left = false;
    for (int i = 0; i < threads; ++i) left |= !lanes[of_block * threads + i].done;
    require(left, "shared memory of a block that has ended is read");
}

DEVICE void store2(void* to, u32 a, u32 b) {
    misaligned |= (uintptr_t)to % 8 != 0;
    const u32 words[] = {a, b};
    std::memcpy(to, words, 8);
}

DEVICE void load_shared(u32* to, const u8* from, int count) { copy_words(to, from, count); }

DEVICE u32 exchange(u32 word, u32 bit) {
    Exchange& here = block().exchanges[thread_index() / 32];
    u32* words = here.words[here.meeting.held % 2];
    words[thread_index() % 32] = word;
    meet(here.meeting, 32, [] {});
    return words[thread_index() % 32 ^ bit];
}

DEVICE u32 rotate_left(u32 word, u32 count) {
    return word << count % 32 | word >> (32 - count) % 32;
}
DEVICE u32 select_bytes(u32 a, u32 b, u32 which) {
    const u64 both = a | (u64)b << 32;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) result |= (u32)(both >> (which >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return result;
}

// A product of two numbers of 16 bits is exact in a double, and its sum with a third one too, but
// for bits that do not count, unless the one is a zero's sum away from a tie.
static u16 narrow_exact(double value) {
    const float near = (float)value;
    u32 bits = bits_of(near);
    if ((double)near != value && near == near && std::fabs(near) < INFINITY) {  // to odd
        const bool above = std::fabs((double)near) > std::fabs(value);
        bits = (above ? bits - 1 : bits) | 1;
    }
    return narrow(of_bits(bits));
}

DEVICE u32 multiply_add_pairs(u32 a, u32 b, u32 c) {
    u32 result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const double exact = (double)widen(a >> shift & 0xFFFF) * widen(b >> shift & 0xFFFF);
        result |= (u32)narrow_exact(exact + widen(c >> shift & 0xFFFF)) << shift;
    }
    return result;
}
DEVICE u32 multiply_pairs(u32 a, u32 b) { return multiply_add_pairs(a, b, 0x80008000); }

// A cluster of blocks of threads.
static int run_cluster() {
    copies.clear();
    cluster = {};
    for (int i = 0; i < cluster_size; ++i) blocks[i] = Block();
    std::memset(memory, 0xFF, cluster_size * SHARED_SIZE);
    for (int i = 0; i < cluster_size * threads; ++i) {
        lanes[i].committed.clear();
        lanes[i].begun.clear();
        lanes[i].fenced = false;
        lanes[i].multiplied = lanes[i].apart = 0;
        lanes[i].registers = REGISTERS;
        lanes[i].published = {0, 0};
    }
    const u32 end = barriers_begin() + cluster_size * MAX_BARRIERS;
    order::begin(cluster_size * threads, end - cluster_size * threads, memory, sizeof memory);
    begin_lanes(lanes);
    while (!order::failure && run_round(lanes))
        if (!moved) {
            if (copies.empty()) return 719;  // lanes wait for what does not come: launch failure
            do_copy(copies.front());
            copies.pop_front();
        }
    for (int i = 0; i < cluster_size * threads; ++i)
        require(
            lanes[i].committed.empty() && lanes[i].begun.empty(), "products are not waited for"
        );
    require(copies.empty(), "copies are not waited for");
    return order::failure ? 719 : misaligned ? 716 : 0;
}

}  // namespace hopper
