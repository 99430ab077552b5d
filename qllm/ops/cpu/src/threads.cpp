// The threads, and how they wait.
//
// On a busy machine a thread that waits must not use up the time that the one it waits for would
// run in. So threads spin for some tens of microseconds, which is longer than the gaps within a
// step of decode, and then sleep. Nor does a call wait for threads to begin: they enter its work
// while there is some, and only those that did are waited for.
//
// They are OpenMP threads, of a team of their own that never ends. So torch's OpenMP library knows
// that there are more of them than processors; its own threads then spin as shortly, where they
// would for some ten milliseconds, and take the time of ours.
#include "threads.h"

#include <linux/futex.h>
#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <strings.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace {

using namespace qllm;

constexpr int64_t MAX_THREADS = 1024;

// How long a thread spins: as OMP_WAIT_POLICY wants, if it says anything.
int64_t spin_nanoseconds() {
    const char *policy = getenv("OMP_WAIT_POLICY");
    if (policy && !strcasecmp(policy, "passive")) return 0;
    return policy && !strcasecmp(policy, "active") ? 10000000 : 50000;
}

const int64_t spin_time = spin_nanoseconds();

// `entered` counts the threads that are at the work; these are bits on top of it.
constexpr uint32_t OPEN = 1u << 31, WAITED_FOR = 1u << 30;

struct Work {
    void (*body)(const void *, const Share &);
    const void *context;
    int64_t threads, part;
};

Work current;  // of one call at a time; others meanwhile do theirs alone
Run runs[MAX_THREADS];
alignas(64) bool taken;
alignas(64) uint32_t generation;  // changes with every work
alignas(64) uint32_t entered;
alignas(64) uint32_t asleep;  // whether any thread sleeps until the generation changes
uint32_t idling;  // whether there will be no work for a while: IDLE, or EXCLUSIVE
int64_t started;  // threads besides the callers
int64_t numbered;
pid_t serving[MAX_THREADS];  // the threads besides the callers, by number
int excluded_cpu = -1;       // the processor that they may not run on, if any

constexpr uint32_t IDLE = 1, EXCLUSIVE = 2;

void wait_at(uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_at(uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000 + now.tv_nsec;
}

// Waits for a condition, for a while; whether it came true.
template <typename Condition> bool spin(const Condition &condition) {
    for (int64_t end = 0;;) {
        for (int i = 0; i < 32; i++) {
            if (condition()) return true;
            __builtin_ia32_pause();
        }
        const int64_t now = nanoseconds();
        if (!end) end = now + spin_time;
        if (now >= end) return false;
    }
}

uint32_t next_generation(uint32_t last) {
    auto changed = [last] { return __atomic_load_n(&generation, __ATOMIC_ACQUIRE) != last; };
    spin([&] { return changed() || __atomic_load_n(&idling, __ATOMIC_RELAXED); });
    if (!changed()) {
        __atomic_store_n(&asleep, 1, __ATOMIC_SEQ_CST);
        while (!changed()) wait_at(&generation, last);
    }
    return __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
}

bool enter() {
    uint32_t found = __atomic_load_n(&entered, __ATOMIC_RELAXED);
    while (found & OPEN)
        if (__atomic_compare_exchange_n(&entered, &found, found + 1, true, __ATOMIC_ACQUIRE,
                                        __ATOMIC_RELAXED))
            return true;
    return false;
}

void leave() {
    if (__atomic_sub_fetch(&entered, 1, __ATOMIC_RELEASE) == WAITED_FOR) wake_at(&entered);
}

// Keeps others from entering, and waits for those that did.
void close_work() {
    uint32_t found = __atomic_and_fetch(&entered, ~OPEN, __ATOMIC_ACQUIRE);
    if (!found || spin([] { return !__atomic_load_n(&entered, __ATOMIC_ACQUIRE); })) return;
    found = __atomic_or_fetch(&entered, WAITED_FOR, __ATOMIC_ACQUIRE);
    while (found != WAITED_FOR) {
        wait_at(&entered, found);
        found = __atomic_load_n(&entered, __ATOMIC_ACQUIRE);
    }
    __atomic_store_n(&entered, 0, __ATOMIC_RELAXED);
}

[[noreturn]] void serve() {
    const int64_t number = __atomic_add_fetch(&numbered, 1, __ATOMIC_RELAXED);
    const auto thread = pid_t(syscall(SYS_gettid));  // of which older libraries have no function
    if (number < MAX_THREADS) __atomic_store_n(&serving[number], thread, __ATOMIC_RELAXED);
    for (uint32_t last = 0;;) {
        last = next_generation(last);
        if (!enter()) continue;
        if (number < current.threads)
            current.body(current.context, {number, current.threads, current.part, runs});
        leave();
    }
}

void *begin_team(void *count) {
    omp_set_dynamic(false);
#pragma omp parallel num_threads(int(reinterpret_cast<intptr_t>(count)) + 1)
    {
        if (omp_get_thread_num()) serve();
        for (;;) pause();  // it has the team; OpenMP counts one thread of it less than there are
    }
    return nullptr;
}

// More threads, up to `count`; where the system has none, there are fewer.
void start(int64_t count) {
    sigset_t all, before;
    sigfillset(&all);
    // Signals are for other threads; a fault is its own thread's, and kills where it is blocked.
    const int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
    for (int fault : faults) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // which threads inherit
    pthread_t thread;
    void *more = reinterpret_cast<void *>(intptr_t(count - started));
    if (!pthread_create(&thread, nullptr, begin_team, more)) pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    started = count;
}

// The threads besides this one may run where it may, but for one processor, if there is any other.
void exclude_cpu(int processor) {
    cpu_set_t processors;
    if (processor == excluded_cpu || sched_getaffinity(0, sizeof(processors), &processors)) return;
    if (processor >= 0) CPU_CLR(processor, &processors);
    if (!CPU_COUNT(&processors)) return;
    bool all = true;
    for (int64_t i = 1; i <= started && i < MAX_THREADS; i++) {
        const pid_t thread = __atomic_load_n(&serving[i], __ATOMIC_RELAXED);
        if (!thread || sched_setaffinity(thread, sizeof(processors), &processors)) all = false;
    }
    if (all) excluded_cpu = processor;  // else threads are to come, for the next time
}

// A forked process has the forking thread alone.
void forget_threads() {
    taken = false;
    entered = asleep = idling = 0;
    generation = 0;
    started = numbered = 0;
    for (pid_t &thread : serving) thread = 0;
    excluded_cpu = -1;
}

[[maybe_unused]] const int forks = pthread_atfork(nullptr, nullptr, forget_threads);

}  // namespace

void qllm::idle(bool exclusive) {
    __atomic_store_n(&idling, exclusive ? EXCLUSIVE : IDLE, __ATOMIC_RELAXED);
}

int64_t qllm::max_threads() { return smaller(omp_get_max_threads(), MAX_THREADS); }

void qllm::share_work(int64_t count, int64_t part, void (*body)(const void *, const Share &),
                      const void *context) {
    const int64_t threads = count > part ? smaller(max_threads(), (count + part - 1) / part) : 1;
    if (threads < 2 || __atomic_exchange_n(&taken, true, __ATOMIC_ACQUIRE)) {
        Run run = {0, count};
        return body(context, {0, 1, part, &run});
    }
    if (started < threads - 1) start(threads - 1);
    for (int64_t i = 0; i < threads; i++)
        runs[i] = {count * i / threads, count * (i + 1) / threads};
    current = {body, context, threads, part};
    if (const uint32_t idled = __atomic_exchange_n(&idling, 0, __ATOMIC_RELAXED))
        exclude_cpu(idled == EXCLUSIVE ? sched_getcpu() : -1);
    __atomic_store_n(&entered, OPEN, __ATOMIC_RELEASE);
    __atomic_add_fetch(&generation, 1, __ATOMIC_SEQ_CST);
    if (__atomic_exchange_n(&asleep, 0, __ATOMIC_SEQ_CST)) wake_at(&generation);
    body(context, {0, threads, part, runs});
    close_work();
    __atomic_store_n(&taken, false, __ATOMIC_RELEASE);
}
