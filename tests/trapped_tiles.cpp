// Tiles where there are none: AMX's instructions raise SIGILL on other CPUs, and are carried out
// here as the pseudo-code of Intel's manual has them (Software Developer's Manual, volume 2). So
// what runs is what users have, compiled as it is for them. What the manual says is an exception
// ends the process. The environment variable QLLM_TRAPPED_FAULT makes tiles what a self-test is to
// find: "wrong" products, a "crash", or tiles that "hang"; or the system refuses that test a
// "pipe", a "fork", or to wait for the "answer" of tiles that hang.
//
// Where it can be wrong about real tiles: in which NaN is the result, which no result of a layer
// shows; in whether a number that rounding makes normal counts as subnormal; in loads and stores
// that a missing page interrupts (tiles go on at `start_row`); in time. On a machine with AMX, this
// compares real ones with exact arithmetic, over operands that are hard:
//
//     python3 -m pytest tests/ops/cpu/test_amx.py -k manual
//
// All tests on CPUs with AVX-512, as if they had AMX:
//
//     g++ -O2 -shared -fPIC tests/trapped_tiles.cpp -o tiles.so
//     LD_PRELOAD=$PWD/tiles.so QLLM_CXXFLAGS=-DQLLM_TRAPPED_AMX \
//         python3 -m pytest -p no:faulthandler tests/ops/cpu tests/test_invariance.py
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <ucontext.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <cstdint>
#include <cstring>

namespace {

// To nearest, subnormal operands and results are zeros, exceptions are masked.
constexpr unsigned ARITHMETIC = 0x1F80 | 0x8000 | 0x0040;

struct Tiles {
    uint8_t palette, rows[8];  // palette 0: none
    uint16_t bytes[8];
    uint8_t data[8][16][64];
};

thread_local Tiles tiles;

[[noreturn]] void refuse(const char *what) {
    const char *parts[] = {"trapped tiles: ", what, "\n"};
    for (const char *part : parts)
        if (write(2, part, strlen(part)) < 0) break;
    abort();
}

void demand(bool condition, const char *what) {
    if (!condition) refuse(what);
}

// An instruction with a VEX prefix of 3 bytes.
struct Instruction {
    const uint8_t *code;
    const greg_t *registers;
    int length = 5;  // the prefix, the opcode and ModRM; more with an address

    int prefix() const { return code[2] & 3; }  // 0: none, 1: 66, 2: F3, 3: F2
    int opcode() const { return code[3]; }
    int mod() const { return code[4] >> 6; }
    int reg() const { return (code[4] >> 3 & 7) | (code[1] & 0x80 ? 0 : 8); }
    int rm() const { return (code[4] & 7) | (code[1] & 0x20 ? 0 : 8); }
    int other() const { return ~code[2] >> 3 & 15; }  // vvvv

    int64_t value(int number) const {
        static const int places[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                     REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                     REG_R12, REG_R13, REG_R14, REG_R15};
        return registers[places[number]];
    }

    // Where the operand in memory begins, and by how much the next row is further.
    uint8_t *address(int64_t *stride) {
        int64_t base = 0;
        bool displaced = mod() == 2, relative = false;
        if ((code[4] & 7) == 4) {
            const int index = (code[5] >> 3 & 7) | (code[1] & 0x40 ? 0 : 8);
            const int number = (code[5] & 7) | (code[1] & 0x20 ? 0 : 8);
            length++;
            *stride = index == 4 ? 0 : int64_t(uint64_t(value(index)) << (code[5] >> 6));
            if ((code[5] & 7) == 5 && mod() == 0)
                displaced = true;
            else
                base = value(number);
        } else if (mod() == 0 && (code[4] & 7) == 5) {
            displaced = relative = true;
        } else {
            base = value(rm());
        }
        if (displaced) {
            int32_t offset;
            memcpy(&offset, code + length, 4);
            length += 4;
            base += offset;
        } else if (mod() == 1) {
            base += int8_t(code[length++]);
        }
        if (relative) base += reinterpret_cast<int64_t>(code) + length;
        return reinterpret_cast<uint8_t *>(base);
    }
};

char fault() {
    const char *found = getenv("QLLM_TRAPPED_FAULT");
    return found ? *found : 0;
}

void configure(const uint8_t *from) {
    if (fault() == 'c') raise(SIGKILL);
    while (fault() == 'h' || fault() == 'a') usleep(1000);
    tiles = {};
    demand(from[0] == 1, "LDTILECFG: not palette 1");
    demand(from[1] == 0, "LDTILECFG: a start_row");
    for (int i = 2; i < 64; i++)
        if (i < 16 || (i >= 32 && i < 48) || i >= 56)
            demand(!from[i], "LDTILECFG: a reserved byte");
    for (int t = 0; t < 8; t++) {
        memcpy(&tiles.bytes[t], from + 16 + 2 * t, 2);
        tiles.rows[t] = from[48 + t];
        demand(tiles.bytes[t] <= 64 && tiles.rows[t] <= 16, "LDTILECFG: a tile that is too large");
        demand(!tiles.bytes[t] == !tiles.rows[t], "LDTILECFG: rows without bytes");
    }
    tiles.palette = 1;
}

int checked(int tile) {
    demand(tile < 8 && tiles.palette && tiles.rows[tile], "a tile that is not there");
    demand(tiles.bytes[tile] % 4 == 0, "a tile of parts of 4 bytes");
    return tile;
}

void move(Instruction &at, bool store) {
    int64_t stride;
    demand((at.code[4] & 7) == 4 && at.mod() != 3, "rows without a stride");
    uint8_t *memory = at.address(&stride);
    const int tile = checked(at.reg());
    if (!store) memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
    for (int row = 0; row < tiles.rows[tile]; row++) {
        uint8_t *own = tiles.data[tile][row], *far = memory + row * stride;
        memcpy(store ? far : own, store ? own : far, tiles.bytes[tile]);
    }
}

float half(const uint8_t *from) {
    const uint8_t bytes[4] = {0, 0, from[0], from[1]};
    float value;
    memcpy(&value, bytes, 4);
    return value;
}

// Even and odd inputs have sums of their own, which are added to each other and then to the tile.
// x86 of any make rounds and flushes as tiles do with the bits that ARITHMETIC has in its MXCSR.
__attribute__((target("fma"))) float with_pairs(float sum, const uint8_t *x,
                                                const uint8_t (*w)[64], int lane, int steps) {
    float even = 0, odd = 0;
    for (int k = 0; k < steps; k++) {
        even = __builtin_fmaf(half(x + 4 * k), half(w[k] + 4 * lane), even);
        odd = __builtin_fmaf(half(x + 4 * k + 2), half(w[k] + 4 * lane + 2), odd);
    }
    return sum + (even + odd);
}

template <typename W>
uint32_t with_bytes(uint32_t sum, const uint8_t *x, const uint8_t (*w)[64], int lane, int steps) {
    for (int k = 0; k < steps; k++)
        for (int i = 0; i < 4; i++)
            sum += uint32_t(int8_t(x[4 * k + i]) * W(w[k][4 * lane + i]));
    return sum;
}

template <typename Sum> void multiply(const Instruction &at, Sum (*with)(Sum, const uint8_t *,
                                      const uint8_t (*)[64], int, int)) {
    const int to = checked(at.reg()), x = checked(at.rm()), w = checked(at.other());
    demand(at.mod() == 3 && to != x && to != w && x != w, "a tile twice in a product");
    demand(tiles.rows[to] == tiles.rows[x] && tiles.bytes[to] == tiles.bytes[w] &&
               tiles.bytes[x] / 4 == tiles.rows[w],
           "a product of tiles that do not fit");
    const bool wrong = fault() == 'w';
    for (int row = 0; row < tiles.rows[to]; row++)
        for (int lane = 0; lane < tiles.bytes[to] / 4; lane++) {
            Sum sum;
            uint8_t *element = tiles.data[to][row] + 4 * lane;
            memcpy(&sum, element, 4);
            sum = with(sum, tiles.data[x][row], tiles.data[w], lane, tiles.rows[w]);
            memcpy(element, &sum, 4);
            if (wrong && lane == row) element[0] ^= 1;
        }
}

void on_illegal(int, siginfo_t *, void *given) {
    _mm_setcsr(ARITHMETIC);  // whatever the thread had, which it has again behind this
    greg_t *registers = static_cast<ucontext_t *>(given)->uc_mcontext.gregs;
    Instruction at = {reinterpret_cast<const uint8_t *>(registers[REG_RIP]), registers};
    const uint8_t *code = at.code;
    demand(code[0] == 0xC4 && (code[1] & 31) == 2 && !(code[2] & 0x84),
           "an instruction that is none of AMX's");
    int64_t unused;
    switch (at.opcode() << 4 | at.prefix()) {
    case 0x490:
        if (at.mod() == 3) {
            demand(code[4] == 0xC0, "an unknown instruction");
            tiles = {};
        } else {
            demand((at.reg() & 7) == 0, "an unknown instruction");
            configure(at.address(&unused));
        }
        break;
    case 0x493:
        demand(at.mod() == 3, "an unknown instruction");
        memset(tiles.data[checked(at.reg())], 0, sizeof tiles.data[0]);
        break;
    case 0x4B3:
    case 0x4B1: move(at, false); break;  // the latter is not to stay in the first cache
    case 0x4B2: move(at, true); break;
    case 0x5E3: multiply(at, with_bytes<int8_t>); break;
    case 0x5E2: multiply(at, with_bytes<uint8_t>); break;
    case 0x5C2: multiply(at, with_pairs); break;
    default: refuse("an unknown instruction");
    }
    registers[REG_RIP] += at.length;
}

__attribute__((constructor)) void begin() {
    struct sigaction action = {};
    action.sa_sigaction = on_illegal;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
}

}  // namespace

#ifdef QLLM_TRAPPED_AMX
// What the library that this is compiled into, whose symbols are hidden, calls in the place of the
// system's.
#define REFUSED(found, number, result, name, parameters, arguments)                       \
    extern "C" result name parameters {                                                   \
        if (fault() == found) return errno = number, -1;                                  \
        return reinterpret_cast<result(*) parameters>(dlsym(RTLD_NEXT, #name)) arguments; \
    }
REFUSED('p', EMFILE, int, pipe2, (int *ends, int flags) noexcept, (ends, flags))
REFUSED('f', EAGAIN, pid_t, fork, () noexcept, ())
REFUSED('a', ENOMEM, int, poll, (pollfd *of, nfds_t count, int ms), (of, count, ms))
#endif
