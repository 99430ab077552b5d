// How threads share work that is as long as memory takes: each a run of its own, which it reads
// without a pause, and then what slower threads have not come to.
#pragma once

#include <omp.h>

#include "kernels.h"

namespace qllm {
namespace {

constexpr int64_t RUN_PARTS = 8;  // of a thread's run, that another thread may take

// What is left of a thread's run.
struct Run {
    alignas(64) int64_t next;
    int64_t end;
};

// A thread's run of `count`; all threads have to have come here before one takes any.
static void begin_run(Run *runs, int64_t count) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    runs[thread] = {count * thread / threads, count * (thread + 1) / threads};
}

// Work in parts of up to `part`: work(from, end).
template <typename Work> void take_parts(Run *runs, int64_t part, const Work &work) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    for (int64_t i = 0; i < threads; i++) {
        Run &run = runs[(thread + i) % threads];
        for (;;) {
            const int64_t from = __atomic_fetch_add(&run.next, part, __ATOMIC_RELAXED);
            if (from >= run.end) break;
            work(from, smaller(from + part, run.end));
        }
    }
}

}  // namespace
}  // namespace qllm
