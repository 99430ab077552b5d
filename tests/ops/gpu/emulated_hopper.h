// hopper.h on the CPU, for emulated_prefill.cpp, as emulated_decode.cpp has device.h.
//
// What runs on its own on a GPU runs here as late as it may: copies to shared memory when no lane gets
// on without them, products when they are waited for, with what registers and shared memory hold then.
// So what is overwritten too early, or read before it is there, shows. What does not: whether the
// descriptors mean to a GPU what they mean here, the fences between registers or shared memory and what
// runs on its own, and the order in which the matrix units add up 16 products. The self-test on the GPU
// is there for those.

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
constexpr u32 SHARED_BASE = 1024;  // address of a block's shared memory

struct TensorMap {
    u64 address, columns, rows, stride, width, height, size, swizzle;
    u64 others[8];
};

struct MemoryBarrier {
    int expected = 0, pending = 0, bytes = 0;
    u32 parity = 0;  // of the phase that is not complete

    void settle() {
        if (pending || bytes) return;
        pending = expected;
        parity ^= 1;
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
};

struct Exchange {
    Meeting meeting;
    u32 words[2][32];
};

struct Block {
    std::vector<u8> memory;
    std::map<u32, MemoryBarrier> barriers;
    Meeting consumers, products[2];
    Meeting lanes[MAX_THREADS_OF_BLOCK / 32];
    Exchange exchanges[MAX_THREADS_OF_BLOCK / 32];
};

struct Copy {
    int block;
    u32 to, barrier;
    std::vector<u8> bytes;
    bool swizzled;
};

static Lane lanes[MAX_BLOCKS * MAX_THREADS_OF_BLOCK];
static Block blocks[MAX_BLOCKS];
static std::deque<Copy> copies;
static Meeting cluster;

static Block& block() { return blocks[current / threads]; }

DEVICE void consumers_barrier() { meet(block().consumers, MULTIPLYING, [] {}); }
DEVICE void warp_barrier() { meet(block().lanes[thread_index() / 32], 32, [] {}); }
DEVICE void cluster_barrier() { meet(cluster, cluster_size * threads, [] {}); }
DEVICE void cluster_barrier_relaxed() { cluster_barrier(); }
DEVICE void give_up_registers() {}
DEVICE void take_registers() {}

DEVICE u8* shared_memory() { return block().memory.data(); }
DEVICE u32 address_of(const void* shared) {
    return SHARED_BASE + (u32)((const u8*)shared - block().memory.data());
}

static u8* place(int of_block, u32 address, size_t size) {
    const bool inside = address >= SHARED_BASE && address - SHARED_BASE + size <= SHARED_SIZE;
    failed |= !inside;
    return blocks[of_block].memory.data() + (inside ? address - SHARED_BASE : 0);
}

static u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

DEVICE void init_barrier(u32 barrier, u32 arrivals) {
    failed |= barrier % 8 != 0;
    block().barriers[barrier] = MemoryBarrier{(int)arrivals, (int)arrivals, 0, 0};
}
DEVICE void publish_barriers() {}

static MemoryBarrier& barrier_at(int of_block, u32 address) {
    failed |= !blocks[of_block].barriers.count(address);
    return blocks[of_block].barriers[address];
}

DEVICE void arrive_expecting(u32 barrier, u32 bytes) {
    MemoryBarrier& here = barrier_at(current / threads, barrier);
    moved = true;
    here.bytes += bytes;
    failed |= --here.pending < 0;
    here.settle();
}
DEVICE void arrive(u32 barrier) { arrive_expecting(barrier, 0); }

DEVICE void wait(u32 barrier, u32 parity) {
    while (barrier_at(current / threads, barrier).parity == parity) yield();
    moved = true;
}

DEVICE void copy_tile(u32 to, const TensorMap& from, int column, int row, u32 barrier) {
    const auto [address, columns, rows, stride, width, height, size, swizzle, others] = from;
    (void)others;
    failed |= to % (swizzle ? 1024 : 128) != 0;
    std::vector<u8> bytes(width * height * size);
    for (int i = 0; i < (int)height; ++i)
        for (int k = 0; k < (int)width; ++k)
            if (row + i < (int)rows && column + k < (int)columns)
                std::memcpy(
                    &bytes[(i * width + k) * size],
                    (u8*)address + (row + i) * stride + (column + k) * size, size
                );
    copies.push_back({current / threads, to, barrier, bytes, swizzle != 0});
    moved = true;
}

static void do_copy(const Copy& copy) {
    for (size_t i = 0; i < copy.bytes.size(); ++i) {
        const u32 to = copy.to + (u32)i;
        *place(copy.block, copy.swizzled ? swizzled(to) : to, 1) = copy.bytes[i];
    }
    MemoryBarrier& barrier = barrier_at(copy.block, copy.barrier);
    barrier.bytes -= (int)copy.bytes.size();
    barrier.settle();
    moved = true;
}

template <class Number>
DEVICE void load4_of_block(Number* to, u32 address, u32 of_block) {
    failed |= address % 16 || (int)of_block >= cluster_size;
    std::memcpy(to, place(of_block, address, 16), 16);
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
    for (int i = 0; i < cluster_size; ++i) {
        blocks[i] = Block();
        blocks[i].memory.assign(SHARED_SIZE, 0xFF);
    }
    for (int i = 0; i < cluster_size * threads; ++i) lanes[i].committed.clear();
    begin_lanes(lanes);
    while (!failed && run_round(lanes))
        if (!moved) {
            if (copies.empty()) return 719;  // lanes wait for what does not come: launch failure
            do_copy(copies.front());
            copies.pop_front();
        }
    for (int i = 0; i < cluster_size * threads; ++i) failed |= !lanes[i].committed.empty();
    return failed || !copies.empty() ? 719 : misaligned ? 716 : 0;
}

}  // namespace hopper
