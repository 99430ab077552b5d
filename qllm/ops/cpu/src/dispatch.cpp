// The C interface, and the choice of the path.
#include <cpuid.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "machine.h"
#include "threads.h"

namespace {

using namespace qllm;

// Whether tiles are taken to be there although the CPU has none: tests carry out what it refuses
// (tests/trapped_tiles.cpp).
#ifdef QLLM_TRAPPED_AMX
constexpr bool TRAPPED = true;
#else
constexpr bool TRAPPED = false;
#endif

enum Feature : int64_t {
    AVX2 = 1,
    AVX_VNNI = 2,
    AVX512 = 4,
    AMX = 8,
    BF16 = 16,
    AMD = 32,  // no path needs it
};

uint64_t enabled_state() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

// What became of AMX, in words.
const char *amx_state = "absent";

// Asks Linux for room for tiles in what it saves of a thread; without it they raise SIGILL. Signals
// save them, too: where a thread has a stack for these that is too small, it is for the user to
// have a larger one.
bool tiles_are_permitted() {
    const long request_permission = 0x1023, tile_data = 18;
    if (!syscall(SYS_arch_prctl, request_permission, tile_data)) return true;
    amx_state = errno == ENOSPC ? "a thread's signal stack is too small" : "no permission";
    return false;
}

// Runs the self-test in a child: tiles that crash or hang, under some hypervisor, take only that
// with them. The answer is a byte, since a process may have its children waited for by others.
bool tiles_pass_test() {
    const int patience_ms = 5000;
    int ends[2];
    if (pipe2(ends, O_CLOEXEC)) {
        amx_state = "no pipe for the self-test";
        return false;
    }
    const pid_t child = fork();
    if (!child) {
        // No core is left, be it a file or what a program gets through a pipe, whatever its size.
        const struct rlimit none = {0, 0};
        setrlimit(RLIMIT_CORE, &none);
        prctl(PR_SET_DUMPABLE, 0);
        for (int number = 1; number < NSIG; number++)
            if (!TRAPPED || number != SIGILL) signal(number, SIG_DFL);  // no traceback
        if (amx_path.self_test() && write(ends[1], "1", 1) != 1) _exit(2);
        _exit(0);
    }
    close(ends[1]);
    char answer;
    bool passed = false;
    if (child > 0) {
        pollfd from = {ends[0], POLLIN, 0};
        int ready;
        while ((ready = poll(&from, 1, patience_ms)) < 0 && errno == EINTR) {}
        passed = ready > 0 && read(ends[0], &answer, 1) == 1;
        if (ready <= 0) kill(child, SIGKILL);  // or it might be waited for in vain
        while (waitpid(child, nullptr, 0) < 0 && errno == EINTR) {}
    }
    close(ends[0]);
    amx_state = passed ? "used" : child > 0 ? "self-test failed" : "no process for the self-test";
    return passed;
}

// Whether tiles, which this CPU and system have, may and do work.
bool tiles_are_usable() { return (TRAPPED || tiles_are_permitted()) && tiles_pass_test(); }

// What the CPU can do and the system lets it.
int64_t features() {
    uint32_t a, b, c, d, b7, c7, d7, a71 = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    const uint32_t needed = fma | osxsave | avx | f16c;
    if ((c & needed) != needed || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return 0;
    uint32_t max_subleaf = a;
    if (max_subleaf >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
    uint64_t state = enabled_state();
    const uint32_t avx2 = 1u << 5, bmi2 = 1u << 8;
    if ((state & 0x6) != 0x6 || !(b7 & avx2) || !(b7 & bmi2)) return 0;
    int64_t found = AVX2;
    if (a71 & 1u << 4) found |= AVX_VNNI;
    uint32_t ebx, ecx, edx;
    __get_cpuid(0, &a, &ebx, &ecx, &edx);
    if (ebx == signature_AMD_ebx && ecx == signature_AMD_ecx) found |= AMD;
    const uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11;
    const uint32_t wide = f | dq | bw | vl;
    if ((state & 0xE6) != 0xE6 || (b7 & wide) != wide || !(c7 & vnni)) return found;
    found |= AVX512;
    if (a71 & 1u << 5) found |= BF16;
    const uint32_t bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, products = bf16 | tile | int8;
    bool tiles = (state & 0x60000) == 0x60000 && (d7 & products) == products;
    if ((tiles || TRAPPED) && &amx_path && tiles_are_usable()) found |= AMX;
    return found;
}

struct Choice {
    const Path *path;
    int64_t needs;
};

// The best one first.
const Choice CHOICES[] = {{&amx_path, AVX512 | BF16 | AMX},
                          {&avx512bf16_path, AVX512 | BF16},
                          {&avx512_path, AVX512},
                          {&avxvnni_path, AVX2 | AVX_VNNI},
                          {&avx2_path, AVX2},
                          {&scalar_path, 0}};

const Path *current = nullptr;  // until one is taken

// A function of the current path, or of the one that it is based on.
template <typename Function> Function of_current(Function Path::*member) {
    const Path *path = current;
    while (!(path->*member)) path = path->base;
    return path->*member;
}

constexpr size_t HUGE_PAGE = 2 << 20;

struct Scratch {
    void *memory = nullptr;
    size_t size = 0;
    ~Scratch() { free(memory); }
};

thread_local Scratch own;

}  // namespace

qllm::Machine qllm::machine = OTHER_MACHINE;

void *qllm::scratch(size_t bytes) {
    if (own.size < bytes) {
        const size_t page = bytes < HUGE_PAGE ? 4096 : HUGE_PAGE;
        const size_t size = (bytes + page - 1) / page * page;
        free(own.memory);
        own.memory = aligned_alloc(page, size);
        own.size = own.memory ? size : 0;
        if (own.memory && page == HUGE_PAGE) madvise(own.memory, size, MADV_HUGEPAGE);
    }
    return own.memory;
}

#define PUBLIC extern "C" __attribute__((visibility("default")))

// A bit for everything that paths need and that this machine has.
PUBLIC int64_t qllm_features() {
    static const int64_t found = features();
    return found;
}

// What became of AMX, once the features are known.
PUBLIC const char *qllm_amx_state() { return amx_state; }

// Takes a path from now on; false, and no change, where none of this name was compiled or the
// features are not there. No op may be called before a path was taken.
PUBLIC bool qllm_use(const char *name, int64_t with) {
    for (const Choice &choice : CHOICES)
        if (choice.path && !strcmp(choice.path->name, name) &&
            (choice.needs & with) == choice.needs) {
            current = choice.path;
            machine = with & AMD ? AMD_MACHINE : OTHER_MACHINE;
            return true;
        }
    return false;
}

// All ops have one form, so that calls can be kept and repeated; they return a Status.
#define QLLM_EXPORT(op, Arguments)                                          \
    PUBLIC int64_t qllm_##op(const void *arguments) {                       \
        const auto function = of_current(&Path::op);                        \
        return int64_t(function(*static_cast<const Arguments *>(arguments))); \
    }
QLLM_OPS(QLLM_EXPORT)

// The name of op i and the size of its arguments, -1 behind the last.
PUBLIC int64_t qllm_op(int64_t i, const char **name) {
    struct Op {
        const char *name;
        int64_t size;
    };
#define QLLM_SIZE(op, Arguments) {#op, int64_t(sizeof(Arguments))},
    static const Op ops[] = {QLLM_OPS(QLLM_SIZE)};
    if (i < 0 || i >= int64_t(sizeof(ops) / sizeof(*ops))) return -1;
    *name = ops[i].name;
    return ops[i].size;
}

PUBLIC void qllm_idle(int64_t exclusive) { qllm::idle(exclusive); }

// What a status means, in words.
PUBLIC const char *qllm_message(int64_t status) {
    switch (Status(status)) {
        case Status::OK: return "done";
        case Status::NO_MEMORY: return "no memory";
        case Status::BAD_INDEX: return "an index is outside its table";
    }
    return "an unknown status";
}

// Asks for huge pages under memory that begins with one.
PUBLIC void qllm_huge_pages(void *memory, int64_t bytes) {
    madvise(memory, size_t(bytes), MADV_HUGEPAGE);
}

// Makes calls again that were made before, up to the first that cannot; returns its status.
PUBLIC int64_t qllm_replay(const Call *calls, int64_t count) {
    int64_t status = int64_t(Status::OK);
    for (int64_t i = 0; i < count && status == int64_t(Status::OK); i++)
        status = calls[i].function(calls[i].arguments);
    return status;
}

PUBLIC int64_t qllm_read_all(const uint8_t *from, int64_t bytes) {
    return of_current(&Path::read_all)(from, bytes);
}
PUBLIC int64_t qllm_multiply_all(int64_t rounds) {
    return of_current(&Path::multiply_all)(rounds);
}
