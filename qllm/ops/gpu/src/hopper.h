// What prefill.cu asks of a GPU beside device.h: what compute capability 9.0 has and no other, so
// that its target is sm_90a. emulated_prefill.cpp has the same for the CPU.

typedef unsigned long long u64;

#ifndef MULTIPLYING
#define MULTIPLYING 256                // threads
#define THREADS (MULTIPLYING + 128)  // behind them is a warpgroup that copies
#define BLOCKS 1                       // of a multiprocessor
#endif
#define MAX_ROWS ROWS

#undef KERNEL
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#define PARAMETER const __grid_constant__

// A tensor's description for copies by tiles, as cuTensorMapEncodeTiled makes it.
struct alignas(64) TensorMap {
    u64 words[16];
};

// Shared memory of a block of threads, from a multiple of 1024 bytes on.
extern __shared__ __align__(1024) u8 dynamic_shared[];
DEVICE u8* shared_memory() { return dynamic_shared; }

DEVICE u32 address_of(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }

// Barriers in shared memory (mbarrier), by their address.
DEVICE void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// What initialized barriers is there for other blocks of a cluster and for copies.
DEVICE void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DEVICE void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

DEVICE void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Wait until the phase of this parity is complete.
DEVICE void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

// Of three warpgroups, what one gives up two others take: 168 registers are what each begins with.
DEVICE void give_up_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }
DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); }

// Copy a tile of a tensor, whose first element is (row, column), to shared memory, zeros where the
// tensor ends; it arrives at a barrier with its bytes.
DEVICE void copy_tile(u32 to, const TensorMap& from, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(&from), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// Of the threads that multiply.
DEVICE void consumers_barrier() {
    asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLYING) : "memory");
}

// Of the blocks of a cluster: all have come here, and what they wrote is there for the others.
DEVICE void cluster_barrier() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same where nothing that they wrote has to be there: that is not waited for.
DEVICE void cluster_barrier_relaxed() {
    asm volatile(
        "barrier.cluster.arrive.relaxed.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Four numbers of the shared memory of another block of the cluster, by their address in one's own.
DEVICE void load4_of_block(float* to, u32 address, u32 block) {
    asm volatile(
        "{\n"
        ".reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
        "}\n"
        : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "r"(address), "r"(block) : "memory");
}

DEVICE void load4_of_block(int* to, u32 address, u32 block) {
    asm volatile(
        "{\n"
        ".reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [there];\n"
        "}\n"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address), "r"(block) : "memory");
}

DEVICE void load_shared(u32* to, const u8* from, int count) {
    if (count == 4) {
        const uint4 words = *(const uint4*)from;
        to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
    } else {
        const uint2 words = *(const uint2*)from;
        to[0] = words.x, to[1] = words.y;
    }
}

DEVICE void store2(void* to, u32 a, u32 b) { *(uint2*)to = make_uint2(a, b); }

DEVICE void warp_barrier() { __syncwarp(); }

// A lane's word for the lane whose number differs in one bit.
DEVICE u32 exchange(u32 word, u32 bit) { return __shfl_xor_sync(0xFFFFFFFF, word, bit); }

DEVICE u32 rotate_left(u32 word, u32 count) { return __funnelshift_l(word, word, count); }
DEVICE u32 select_bytes(u32 a, u32 b, u32 which) { return __byte_perm(a, b, which); }

// Pairs of 16-bit numbers of the type of x: a b, and a b + c rounded once.
DEVICE u32 multiply_pairs(u32 a, u32 b) {
    u32 result;
#if FLOAT16
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
#else
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
#endif
    return result;
}

DEVICE u32 multiply_add_pairs(u32 a, u32 b, u32 c) {
    u32 result;
#if FLOAT16
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
#endif
    return result;
}

// Products of a warpgroup (wgmma), which run while its threads go on. What they take from
// registers, and these themselves, are not to be touched until they are waited for.
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT>
DEVICE void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Operand B of such a product: 16 numbers each of rows in shared memory, 64 of a row side by side
// in pieces of 16 bytes whose place in the row's 128 is XORed with the row's last three bits, which
// is how tensor maps with a swizzle of 128 bytes have them copied.
DEVICE u64 describe(u32 address) {
    const u64 eight_rows = 1024 >> 4, swizzle_128 = 1;
    return (address & 0x3FFFF) >> 4 | (u64)1 << 16 | eight_rows << 32 | swizzle_128 << 62;
}

// Registers that a product adds to, as operands of assembly of some kind ("+f" or "+r").
#define SUMS_4(kind, c, i) kind(c[i]), kind(c[i + 1]), kind(c[i + 2]), kind(c[i + 3])
#define SUMS_16(kind, c, i) \
    SUMS_4(kind, c, i), SUMS_4(kind, c, i + 4), SUMS_4(kind, c, i + 8), SUMS_4(kind, c, i + 12)
#define SUMS_32(kind, c, i) SUMS_16(kind, c, i), SUMS_16(kind, c, i + 16)
#if FLOAT16
#define TYPES ".f32.f16.f16 "
#else
#define TYPES ".f32.bf16.bf16 "
#endif

// Operands of products by their numbers, of which the sums are the first.
#if ROWS == 64
#define WIDTH_OF_B "n64"
#define ALL_SUMS(kind, c) SUMS_32(kind, c, 0)
#define OPERANDS "{%32, %33, %34, %35}, %36"
#define ADDS "%37"
#define OPERANDS_INT8 "%32, %33"
#define ADDS_INT8 "%34"
#define SUMS \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#elif ROWS == 128
#define WIDTH_OF_B "n128"
#define ALL_SUMS(kind, c) SUMS_32(kind, c, 0), SUMS_32(kind, c, 32)
#define OPERANDS "{%64, %65, %66, %67}, %68"
#define ADDS "%69"
#define OPERANDS_INT8 "%64, %65"
#define ADDS_INT8 "%66"
#define SUMS \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#elif ROWS == 192
#define WIDTH_OF_B "n192"
#define ALL_SUMS(kind, c) SUMS_32(kind, c, 0), SUMS_32(kind, c, 32), SUMS_32(kind, c, 64)
#define OPERANDS "{%96, %97, %98, %99}, %100"
#define ADDS "%101"
#define OPERANDS_INT8 "%96, %97"
#define ADDS_INT8 "%98"
#define SUMS \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
#else
#define WIDTH_OF_B "n256"
#define ALL_SUMS(kind, c) \
    SUMS_32(kind, c, 0), SUMS_32(kind, c, 32), SUMS_32(kind, c, 64), SUMS_32(kind, c, 96)
#define OPERANDS "{%128, %129, %130, %131}, %132"
#define ADDS "%133"
#define OPERANDS_INT8 "%128, %129"
#define ADDS_INT8 "%130"
#define SUMS \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
    "%127}, "
#endif

#define PRODUCT(kind, operands, adds, end)                                       \
    "{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds ", 0;\n"                       \
    "wgmma.mma_async.sync.aligned.m64" WIDTH_OF_B kind SUMS operands ", adds" end ";\n}"

// c += A B for A (64, 16), of which each warp of four holds 16 rows as mma.m16n8k16 wants them, and
// B (16, ROWS) in shared memory; or c = A B.
DEVICE void multiply_group(float* c, const u32* a, u64 b, bool adds) {
    asm volatile(PRODUCT("k16" TYPES, OPERANDS, ADDS, ", 1, 1, 0")
                 : ALL_SUMS("+f", c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)adds));
}

// The same of int8, A (64, 32) and B (32, ROWS) both in shared memory, into int32.
DEVICE void multiply_group_int8(int* c, u64 a, u64 b, bool adds) {
    asm volatile(PRODUCT("k32.s32.s8.s8 ", OPERANDS_INT8, ADDS_INT8, "")
                 : ALL_SUMS("+r", c)
                 : "l"(a), "l"(b), "r"((int)adds));
}
