// What decode.cu and decode_int8.cu ask of a GPU. emulated_decode.cpp has the same for the CPU.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define SHARED __shared__
#define KERNEL extern "C" __global__ void __launch_bounds__(OWN_WARPS * 32, RESIDENT)

#ifndef PARTS
#define PARTS 1
#define RESIDENT 0
#endif
#define OWN_WARPS (WARPS / PARTS)  // of a block of threads

// Sizes of arrays, which the emulation, whose constants are variables, has to have for the largest.
#define MAX_BITS BITS
#define MAX_TILES TILES
#define MAX_WARPS WARPS
#define MAX_DEPTH DEPTH
#define MAX_SCALES (128 / GROUP)
#define MAX_PANELS PANELS

DEVICE u32 thread_index() { return threadIdx.x; }
DEVICE int chunk_index() { return blockIdx.x; }
DEVICE int panel_index() { return blockIdx.y; }
DEVICE void barrier() { __syncthreads(); }

// Shared memory of a block of threads whose size is the launch's.
extern __shared__ __align__(16) float dynamic_numbers[];
DEVICE float* shared_numbers() { return dynamic_numbers; }

// Of the blocks of a cluster: a lane has come to their barrier; and all have, and what they wrote
// before is there for the others.
DEVICE void arrive_in_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

DEVICE void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Kernels that are launched with programmatic stream serialization begin while the one in front
// still runs: what that one writes is there behind the wait.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Ask for memory that will be read, into the L2: from a multiple of 16 on as many bytes, a multiple
// of 16 too; and what a cache line at an address holds.
DEVICE void prefetch_range(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#endif
}

DEVICE void prefetch_line(const void* at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// Words that are read once: they need no place in the L1.
DEVICE void load4(u32* to, const u32* from) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from));
}

DEVICE void load2(u32* to, const u32* from) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "l"(from));
}

// Words that other blocks of threads read as well, and that the kernel in front may have written.
DEVICE void load4_cached(u32* to, const void* from) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from)
                 : "memory");
}

// Four numbers to shared memory: of the block of the cluster with this number, to where `to` is in
// one's own.
DEVICE void store4_in_block(float* to, int block, const float* from) {
#if PARTS > 1
    asm volatile(
        "{\n"
        ".reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "st.shared::cluster.v4.f32 [there], {%2, %3, %4, %5};\n"
        "}\n" ::"r"((u32)__cvta_generic_to_shared(to)),
        "r"(block), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3])
        : "memory");
#else
    *(float4*)to = make_float4(from[0], from[1], from[2], from[3]);
#endif
}

// The upper half of a product.
DEVICE u32 multiply_high(u32 a, u32 b) { return __umulhi(a, b); }

// (a & mask) | c: one lop3.
DEVICE u32 and_or(u32 a, u32 mask, u32 c) { return (a & mask) | c; }

// The bits of a that a mask has, and those of b that it has not: one lop3, where the compiler would
// take two for a mask that it knows.
DEVICE u32 choose(u32 a, u32 b, u32 mask) {
    u32 chosen;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(chosen) : "r"(a), "r"(b), "r"(mask));
    return chosen;
}

// A byte of a word, with the upper three of another.
DEVICE u32 byte_of(u32 word, int byte, u32 upper) {
    return __byte_perm(word, upper, 0x7650 | byte);
}

// Two numbers in the type of x, to nearest even, the first one in the lower half.
DEVICE u32 narrow_pair(float low, float high) {
    u32 pair;
#if FLOAT16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

// Sums of two pairs of 16-bit numbers.
DEVICE u32 add_pairs(u32 a, u32 b) {
    u32 sum;
#if FLOAT16
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3C003C00), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80), "r"(b));
#endif
    return sum;
}

// c += A B for A (16, 16) and B (16, 8), of which each lane of a warp holds its part.
DEVICE void multiply(float* c, const u32* a, u32 b0, u32 b1) {
#if FLOAT16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of int8, A (16, 32) and B (32, 8), into int32.
DEVICE void multiply_int8(int* c, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Both rounded, which the compiler may not join.
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
DEVICE float sum_of(float a, float b) { return __fadd_rn(a, b); }

DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
DEVICE float of_bits(u32 bits) { return __uint_as_float(bits); }

DEVICE float from_float16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// A number of the type of x from its bits, and the bits of one, to nearest even.
DEVICE float widen(u16 bits) { return FLOAT16 ? from_float16(bits) : of_bits((u32)bits << 16); }

DEVICE u16 narrow(float value) {
    u16 bits;
#if FLOAT16
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}
