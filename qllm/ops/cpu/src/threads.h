// How threads share a call's work: each takes parts of a run of its own, which it reads without a
// pause, and then what slower threads have not come to. A thread that is not there, because the
// machine is busy or it sleeps, is not waited for: the others do its run.
#pragma once

#include "kernels.h"

namespace qllm {

constexpr int64_t RUN_PARTS = 8;  // of a thread's run, that another thread may take

// What is left of a thread's run.
struct Run {
    alignas(64) int64_t next;
    int64_t end;
};

// What a thread sees of the work.
struct Share {
    int64_t thread, threads;  // its number, below what `max_threads` said
    int64_t part;             // what is taken at once, at most
    Run *runs;                // (threads,)
};

// How many threads a call of this thread may use: what torch.set_num_threads set.
int64_t max_threads();

// There will be no work for a while: other threads sleep at once, as others have their processors.
// Where they take turns with this one, which then has all processors to itself, threads wake on
// others than the one that wakes them. The system would have some wait behind it where the process
// whose turn it was has theirs for an instant more, and leave them there for tens of milliseconds.
void idle(bool exclusive);

// body(context, share) in this thread and in others that are there, which all end before this does.
// Their shares are of 0 to `count`, in parts of up to `part`.
void share_work(int64_t count, int64_t part, void (*body)(const void *, const Share &),
                const void *context);

namespace {

// body(share) in every thread, which has to take what there is with `take_parts`.
template <typename Body> void in_threads(int64_t count, int64_t part, const Body &body) {
    auto call = [](const void *context, const Share &share) {
        (*static_cast<const Body *>(context))(share);
    };
    share_work(count, part, call, &body);
}

// work(from, end) for parts, as long as there are any.
template <typename Work> void take_parts(const Share &share, const Work &work) {
    for (int64_t i = 0; i < share.threads; i++) {
        Run &run = share.runs[(share.thread + i) % share.threads];
        while (__atomic_load_n(&run.next, __ATOMIC_RELAXED) < run.end) {
            const int64_t from = __atomic_fetch_add(&run.next, share.part, __ATOMIC_RELAXED);
            if (from >= run.end) break;
            work(from, smaller(from + share.part, run.end));
        }
    }
}

// work(i, thread) for every i below `count`; in this thread alone where threads are not worth it.
template <typename Work> void for_each(int64_t count, bool worth, const Work &work) {
    const int64_t threads = worth ? max_threads() : 1;
    in_threads(count, threads > 1 ? count / threads / RUN_PARTS + 1 : count,
               [&](const Share &share) {
                   take_parts(share, [&](int64_t from, int64_t end) {
                       for (; from < end; from++) work(from, share.thread);
                   });
               });
}

}  // namespace
}  // namespace qllm
