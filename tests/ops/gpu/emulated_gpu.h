// What the emulated GPUs of emulated_decode.cpp and emulated_prefill.cpp share: lanes that take
// turns, numbers, loads, and how CUDA's driver launches a grid.
//
// Each lane of a cluster's blocks of threads has a stack of its own, and one that comes to what a
// warp or a block does together lets the others catch up. What is constant on a GPU is a variable
// here, so that one library does for all kernels: a binary is nothing but its constants. The struct
// of them, of which is_int8 comes last, and the variable `constants` are in front of this file.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "emulated_order.h"

using order::current;

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define BITS constants.bits
#define FLOAT16 constants.float16
#define ZEROS constants.zeros
#define OFFSETS constants.offsets
#define WIDE constants.wide
#define GROUP constants.group

#define DEVICE static inline
#define SHARED static __attribute__((section("shared_memory")))
#define KERNEL static void
#define UNTOLD __attribute__((no_sanitize_thread))  // of whose accesses the compiler does not tell

// Lanes

constexpr int MAX_LANES = 8 * 512;  // of a cluster
constexpr size_t STACK = 128 << 10;

struct Fiber {
    ucontext_t context;  // which it begins with
    jmp_buf env;         // where it goes on
    bool started, done;
    const u32* awaited;  // it does not go on while this is `last`, if it is one
    u32 last;
};

// What lanes do together: the last of them to come does it for all.
struct Meeting {
    int here = 0;
    u32 held = 0;  // how often it took place
    // Of what a barrier passes on: of those who have come, and came last time.
    order::Clock coming, passed;
};

static void (*kernel)();
static jmp_buf scheduler;
static Fiber* running;
static int threads, cluster_size, chunk, panel;
static bool moved;       // some lane has got on in this round
static bool misaligned;  // a load was not at a multiple of its size
extern "C" i64 prefetched_bytes;
i64 prefetched_bytes;  // of all launches

DEVICE u32 thread_index() { return (u32)(current % threads); }
DEVICE int chunk_index() { return chunk + current / threads; }
DEVICE int panel_index() { return panel; }

// Contexts are swapped by the system, which takes much longer than a jump.
static void yield() {
    if (!_setjmp(running->env)) _longjmp(scheduler, 1);
}

// Let a lane run until it waits or ends.
static void resume(Fiber& lane) {
    running = &lane;
    if (_setjmp(scheduler)) return;
    if (lane.started) _longjmp(lane.env, 1);
    lane.started = true;
    setcontext(&lane.context);
}

// Wait until a word has changed.
static void yield_while(const u32& word, u32 last) {
    running->last = last;
    running->awaited = &word;
    if (word == last) yield();
    running->awaited = nullptr;
}

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
    yield_while(meeting.held, held);
    moved = true;
}

// A barrier: behind it each knows what all did before it.
template <class Act>
static void meet_in_order(Meeting& meeting, int all, Act act) {
    order::release(meeting.coming);
    meet(meeting, all, [&meeting, act] {
        act();
        meeting.passed = meeting.coming;
    });
    order::acquire(meeting.passed);
}

static void require(bool holds, const char* otherwise) {
    if (!holds) order::fail(otherwise);
}

static void run_lane() {
    kernel();
    moved = running->done = true;
    _longjmp(scheduler, 1);
}

// Let all lanes of a cluster begin.
template <class Lane>
static void begin_lanes(Lane* lanes) {
    // Of which only what is used takes memory.
    static char* const stacks = static_cast<char*>(std::calloc(MAX_LANES, STACK));
    for (int i = 0; i < cluster_size * threads; ++i) {
        ucontext_t& context = lanes[i].context;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks + i * STACK;
        context.uc_stack.ss_size = STACK;
        context.uc_link = nullptr;  // a lane ends with a jump
        lanes[i].started = lanes[i].done = false;
        lanes[i].awaited = nullptr;
        makecontext(&context, run_lane, 0);
    }
}

// Let each lane run until it waits; whether there was one that had not come to its end.
template <class Lane>
static bool run_round(Lane* lanes) {
    bool left = moved = false;
    for (current = 0; current < cluster_size * threads; ++current)
        if (!lanes[current].done) {
            left = true;
            if (lanes[current].awaited && *lanes[current].awaited == lanes[current].last) continue;
            resume(lanes[current]);
        }
    current = order::NONE;
    return left;
}

// Numbers and loads

static void copy_words(u32* to, const void* from, int count) {
    misaligned |= reinterpret_cast<uintptr_t>(from) % (count * sizeof(u32)) != 0;
    for (int i = 0; i < count; ++i) to[i] = static_cast<const u32*>(from)[i];
}

DEVICE void load4(u32* to, const u32* from) { copy_words(to, from, 4); }
DEVICE void load2(u32* to, const u32* from) { copy_words(to, from, 2); }
DEVICE void load4_cached(u32* to, const void* from) { copy_words(to, from, 4); }

// What is asked for into the L2 is read here, so that what does not belong to a tensor is met.
DEVICE void prefetch_line(const void* at) { (void)*static_cast<const volatile u8*>(at); }

DEVICE void prefetch_range(const void* from, u32 bytes) {
    misaligned |= (reinterpret_cast<uintptr_t>(from) | bytes) % 16 != 0;
    prefetched_bytes += bytes;
    for (u32 i = 0; i < bytes; i += 16) prefetch_line(static_cast<const u8*>(from) + i);
    prefetch_line(static_cast<const u8*>(from) + bytes - 1);
}

DEVICE u32 multiply_high(u32 a, u32 b) { return (u32)((uint64_t)a * b >> 32); }

DEVICE u32 and_or(u32 a, u32 mask, u32 c) { return (a & mask) | c; }

DEVICE u32 choose(u32 a, u32 b, u32 mask) { return (a & mask) | (b & ~mask); }

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

DEVICE float product(float a, float b) { return a * b; }
DEVICE float sum_of(float a, float b) { return a + b; }

// What a test leaves out

static std::string left_out_of;  // a file, and the line of it where a call is
static int left_out_line;

static bool is_left_out(const char* path, int line) {
    if (line != left_out_line) return false;
    const char* name = std::strrchr(path, '/');
    return left_out_of == (name ? name + 1 : path);
}

// In front of a call that orders something.
#define UNLESS_LEFT_OUT is_left_out(__FILE__, __LINE__) ? void() :

extern "C" void leave_out(const char* file, int line) {
    left_out_of = file;
    left_out_line = line;
}

// The driver

struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    const struct {
        int id, pad, value[16];
    }* attributes;
    unsigned attribute_count;

    int attribute(int id, int otherwise) const {
        for (unsigned i = 0; i < attribute_count; ++i)
            if (attributes[i].id == id) return attributes[i].value[0];
        return otherwise;
    }
};

constexpr int CLUSTER_DIMENSION = 4, PROGRAMMATIC_SERIALIZATION = 6;  // ids of attributes

// Run a grid, cluster by cluster, up to the first error.
static int run_grid(const LaunchConfig& config, int (*run_cluster)()) {
    misaligned = false;
    order::failure = nullptr;
    for (panel = 0; panel < (int)config.grid[1]; ++panel)
        for (chunk = 0; chunk < (int)config.grid[0]; chunk += cluster_size)
            if (const int error = run_cluster()) {
                if (order::failure) std::fprintf(stderr, "emulated GPU: %s\n", order::failure);
                return error;
            }
    return 0;
}

// The function of a module with this name, or with the other one, whose weights are int8.
static int find_function(
    void** function, void* module, const char* wanted, const char* name, const char* int8_name
) {
    *function = module;
    const bool is_int8 = !std::strcmp(wanted, int8_name);
    static_cast<Constants*>(module)->is_int8 = is_int8;
    return is_int8 || !std::strcmp(wanted, name) ? 0 : 500;  // not found
}

extern "C" int cuModuleLoadData(void** module, const void* image) {
    auto copy = new Constants;
    std::memcpy(copy, image, offsetof(Constants, is_int8));
    *module = copy;
    return 0;
}
