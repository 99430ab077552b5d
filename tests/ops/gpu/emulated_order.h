// Which access to shared memory happens before which, for the emulated GPUs.
//
// Lanes take turns there, in one order of the many that a GPU may take, so that what a missing
// barrier allows need not happen. It is found all the same: each lane has a vector clock (Mattern
// 1989), which barriers pass on, and an access that conflicts with one that does not happen before
// it fails, whichever came first; so does a read of what nothing wrote. Accesses of kernels are
// told by the compiler, whose instrumentation for ThreadSanitizer calls the functions of
// emulated_order.cpp.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace order {

typedef std::vector<uint32_t> Clock;

// Something that was done, by whom and at what time of theirs. Beside lanes, others have times:
// what copies and multiplies asynchronously.
struct Event {
    uint32_t who, when;
};

constexpr int NONE = -1;
extern int current;          // number of the lane that runs, or NONE
extern const char* failure;  // what went wrong first, that a GPU does not do; or null

void fail(const char* why);

// A cluster begins: lanes and others that have times, and its shared memory, which nothing has
// written. What is declared as SHARED is shared memory, too.
void begin(int lanes, int others, const void* memory, size_t size);

// The lane that runs passes on what happened before, or learns of it.
void release(Clock& to);
void acquire(const Clock& from);

Event now();                  // of the lane that runs
void tick();                  // what it does next is not at that time
void learn(Event of);         // the lane that runs has waited for something
bool knows(Event of);         // whether it happens before what the lane does next
const Clock& known();         // all that does
void pass_on(Clock& to, Event of);

// Copy what an asynchronous agent reads or writes, at a time of its own, knowing what the
// clock says.
void read(void* to, const void* from, size_t size, Event by, const Clock& clock);
void write(void* to, const void* from, size_t size, Event by, const Clock& clock);

}  // namespace order
