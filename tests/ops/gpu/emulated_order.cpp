// See emulated_order.h. This file is not instrumented itself.

#include "emulated_order.h"

#include <algorithm>
#include <cstring>

namespace order {

int current = NONE;
const char* failure;

namespace {

// Four bytes of shared memory: who wrote them, and who has read them since.
struct Cell {
    uint64_t cluster = 0;  // of which the rest is
    Event written;
    std::vector<Event> read;
};

struct Region {
    uintptr_t start, size;
    std::vector<Cell> cells;
};

// What is declared as SHARED, between two symbols of the linker's, where something is.
extern "C" __attribute__((weak)) unsigned char __start_shared_memory[], __stop_shared_memory[];

std::vector<Clock> clocks;
Region regions[2];
uint64_t cluster;

void join(Clock& to, const Clock& from) {
    if (to.size() < from.size()) to.resize(from.size());
    const uint32_t* source = from.data();
    uint32_t* target = to.data();
    for (size_t i = 0, count = from.size(); i < count; ++i)
        target[i] = std::max(target[i], source[i]);
}

bool is_before(Event event, const Clock& clock) { return clock[event.who] >= event.when; }

void access(Cell& cell, bool writes, Event by, const Clock& clock) {
    if (cell.cluster != cluster) {
        cell.cluster = cluster;
        cell.written = {by.who, 0};
        cell.read.clear();
    }
    if (!writes && !cell.written.when) return fail("what nothing has written is read");
    if (!is_before(cell.written, clock))
        return fail(
            writes ? "two write without an order" : "what is written without an order is read"
        );
    if (!writes) {
        if (cell.read.empty() || cell.read.back().who != by.who) cell.read.push_back(by);
        cell.read.back().when = by.when;
        return;
    }
    for (const Event& event : cell.read)
        if (!is_before(event, clock)) return fail("what is read without an order is overwritten");
    cell.written = by;
    cell.read.clear();
}

void access(const void* at, size_t size, bool writes, Event by, const Clock& clock) {
    for (Region& region : regions) {
        const uintptr_t first = (uintptr_t)at - region.start;
        if (first >= region.size) continue;
        for (uintptr_t i = first / 4; i <= (first + size - 1) / 4; ++i)
            access(region.cells[i], writes, by, clock);
    }
}

void access(const void* at, size_t size, bool writes) {
    const bool shared = (uintptr_t)at - regions[0].start < regions[0].size ||
                        (uintptr_t)at - regions[1].start < regions[1].size;
    if (shared && current != NONE) access(at, size, writes, now(), clocks[current]);
}

void set(Region& region, const void* start, size_t size) {
    region.start = (uintptr_t)start;
    region.size = size;
    if (region.cells.size() < size / 4 + 1) region.cells.resize(size / 4 + 1);
}

}  // namespace

void fail(const char* why) {
    if (!failure) failure = why;
}

void begin(int lanes, int others, const void* memory, size_t size) {
    ++cluster;
    clocks.resize(lanes);
    for (int i = 0; i < lanes; ++i) {
        clocks[i].assign(lanes + others, 0);
        clocks[i][i] = 1;
    }
    set(regions[0], memory, size);
    set(regions[1], __start_shared_memory, __stop_shared_memory - __start_shared_memory);
}

void release(Clock& to) {
    join(to, clocks[current]);
    tick();
}

void acquire(const Clock& from) { join(clocks[current], from); }

Event now() { return {(uint32_t)current, clocks[current][current]}; }
void tick() { ++clocks[current][current]; }
void learn(Event of) { pass_on(clocks[current], of); }
bool knows(Event of) { return is_before(of, clocks[current]); }
const Clock& known() { return clocks[current]; }

void pass_on(Clock& to, Event of) {
    if (to.size() <= of.who) to.resize(of.who + 1);
    to[of.who] = std::max(to[of.who], of.when);
}

void read(void* to, const void* from, size_t size, Event by, const Clock& clock) {
    access(from, size, false, by, clock);
    std::memcpy(to, from, size);
}

void write(void* to, const void* from, size_t size, Event by, const Clock& clock) {
    access(to, size, true, by, clock);
    std::memcpy(to, from, size);
}

}  // namespace order

// What the instrumentation calls.

#define OF_SIZE(size)                                                                            \
    void __tsan_read##size(void* at) { order::access(at, size, false); }                         \
    void __tsan_write##size(void* at) { order::access(at, size, true); }                         \
    void __tsan_unaligned_read##size(void* at) { order::access(at, size, false); }               \
    void __tsan_unaligned_write##size(void* at) { order::access(at, size, true); }

extern "C" {
OF_SIZE(1)
OF_SIZE(2)
OF_SIZE(4)
OF_SIZE(8)
OF_SIZE(16)
void __tsan_read_range(void* at, size_t size) { order::access(at, size, false); }
void __tsan_write_range(void* at, size_t size) { order::access(at, size, true); }
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
