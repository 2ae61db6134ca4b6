// Hopper's products of a warp group: 4 warps with 64 rows. Operands lie in shared memory, as descriptors say, or the first in registers.
#pragma once
#include "primitives.cuh"

// An operand of rows of 128 bytes, whose 16-byte chunks are permuted within groups of 8 rows (the 128-byte swizzle). `leading` is the
// distance of panels of 64 columns, if the operand is transposed.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Matrix Descriptor Format".
DEVICE uint64_t descriptor(uint32_t address, uint32_t leading = 16) {
    return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(leading >> 4) << 16 | (address & 0x3FFFF) >> 4;
}
DEVICE void wgmma_begin() {
#ifdef CUDA_ON_CPU
    emulated::wgmma_begin();
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
DEVICE void wgmma_commit() {
#ifdef CUDA_ON_CPU
    emulated::wgmma_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most `LEFT` of the committed groups are under way.
template <int LEFT> DEVICE void wgmma_wait() {
#ifdef CUDA_ON_CPU
    emulated::wgmma_wait<ELEMENT>(LEFT);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#endif
}
// What this thread wrote to shared memory is seen by wgmma.
DEVICE void publish_to_wgmma() {
#ifdef CUDA_ON_CPU
    emulated::fence_async();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// The registers of each thread of the warp group from here on: fewer than before, or more, which others must have given back.
template <int COUNT> DEVICE void give_registers_back() {
#ifndef CUDA_ON_CPU
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT> DEVICE void take_registers() {
#ifndef CUDA_ON_CPU
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
// So that the compiler moves no use of the registers across.
template <int N> DEVICE void keep(float (&d)[N]) {
#ifndef CUDA_ON_CPU
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}
// So that the assembler, too, computes x before what follows: for it, `keep` is nothing. x is never negative, which it can't know.
DEVICE void compute_before(float x) {
#ifndef CUDA_ON_CPU
    asm volatile("{.reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p trap;}" ::"f"(x) : "memory");
#endif
}

#ifndef CUDA_ON_CPU
// Assembly needs its registers listed one by one.
#define TYPES_BF16 "bf16.bf16"
#define TYPES_F16 "f16.f16"
#define NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OPERANDS_32 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define NAMES_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OPERANDS_64 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define WGMMA_64(TYPES)                                                                                                  \
    template <bool TRANSPOSED> DEVICE void wgmma_asm(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {                \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " {" NAMES_32        \
                     "}, %32, %33, p, 1, 1, 0, %35;}"                                                                       \
                     : OPERANDS_32 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(TRANSPOSED)));                             \
    }                                                                                                                         \
    template <bool TRANSPOSED> DEVICE void wgmma_asm(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {   \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " {" NAMES_32        \
                     "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;}"                                                         \
                     : OPERANDS_32 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(TRANSPOSED))); \
    }
#define WGMMA_128(TYPES)                                                                                                  \
    template <bool TRANSPOSED> DEVICE void wgmma_asm(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {                \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " {" NAMES_64        \
                     "}, %64, %65, p, 1, 1, 0, %67;}"                                                                       \
                     : OPERANDS_64 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(TRANSPOSED)));                             \
    }                                                                                                                         \
    template <bool TRANSPOSED> DEVICE void wgmma_asm(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {   \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " {" NAMES_64        \
                     "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;}"                                                         \
                     : OPERANDS_64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(TRANSPOSED))); \
    }
#if ELEMENT == 1
WGMMA_64(TYPES_BF16)
WGMMA_128(TYPES_BF16)
#else
WGMMA_64(TYPES_F16)
WGMMA_128(TYPES_F16)
#endif
#endif

// d (64 x N, f32) = a * b, or that added to d, where a (64 x 16) and b (16 x N) lie in shared memory.
template <bool TRANSPOSED, int M> DEVICE void wgmma(float (&d)[M], uint64_t a, uint64_t b, bool accumulate) {
#ifdef CUDA_ON_CPU
    emulated::wgmma<ELEMENT>(d, 2 * M, accumulate, TRANSPOSED, nullptr, a, b);
#else
    wgmma_asm<TRANSPOSED>(d, a, b, accumulate);
#endif
}
// Likewise, with a in registers.
template <bool TRANSPOSED, int M> DEVICE void wgmma(float (&d)[M], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
#ifdef CUDA_ON_CPU
    emulated::wgmma<ELEMENT>(d, 2 * M, accumulate, TRANSPOSED, a, 0, b);
#else
    wgmma_asm<TRANSPOSED>(d, a, b, accumulate);
#endif
}
