// The instructions that CUDA C++ has no words for, as inline assembly on a GPU and as calls of the emulator on a CPU, and the
// type of the tensors' elements.
#pragma once
#ifdef CUDA_ON_CPU
#include "cuda_on_cpu.h"
#define DEVICE inline __attribute__((always_inline))
#define SHARED_MEMORY(name) const uint32_t name = 0
#define KERNEL(name, threads) EMULATED_KERNEL(name, threads, Problem)
#else
#ifdef __CUDACC_RTC__  // NVRTC has no headers.
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#else
#include <cmath>
#include <cstdint>
#endif
#define DEVICE __device__ __forceinline__
#define SHARED_MEMORY(name)                              \
    extern __shared__ __align__(1024) uint8_t name##_[]; \
    const uint32_t name = static_cast<uint32_t>(__cvta_generic_to_shared(name##_))
#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Problem p)
#endif

// What tensors hold: 0 f32, 1 bf16, 2 f16.
#ifndef ELEMENT
#define ELEMENT 1
#endif
#if ELEMENT == 0
using Element = float;
#else
using Element = uint16_t;
#endif
// Whether a variant serves only plain attention: aligned inputs whose dims are those of the tiles, a mask of limits, no other option.
#ifndef PLAIN
#define PLAIN 0
#endif
constexpr bool IS_F32 = ELEMENT == 0, IS_BF16 = ELEMENT == 1;
// Elements in 16 bytes, in a row of 128 bytes, and along the sum of one matrix instruction.
constexpr int CHUNK = 16 / sizeof(Element), PANEL_COLUMNS = 8 * CHUNK, K_STEP = 2 * CHUNK;
constexpr float LOWEST = -3.4028234663852886e38f, LOG2E = 1.4426950408889634f;
constexpr double LN2 = 0.6931471805599453;
constexpr uint32_t ALL_LANES = 0xFFFFFFFF;

// ---- Global memory
template <class T> DEVICE T load_global(const T *from) {
#ifdef CUDA_ON_CPU
    return emulated::load_global(from);
#else
    return *from;
#endif
}
template <class T> DEVICE void store_global(T *to, T value) {
#ifdef CUDA_ON_CPU
    emulated::store_global(to, value);
#else
    *to = value;
#endif
}

// ---- Shared memory
template <class T> DEVICE T load_shared(uint32_t address) {
#ifdef CUDA_ON_CPU
    return emulated::load_shared<T>(address);
#else
    return *static_cast<const T *>(__cvta_shared_to_generic(address));
#endif
}
template <class T> DEVICE void store_shared(uint32_t address, T value) {
#ifdef CUDA_ON_CPU
    emulated::store_shared(address, value);
#else
    *static_cast<T *>(__cvta_shared_to_generic(address)) = value;
#endif
}
// 16 bytes to shared memory, asynchronously; zeros where there is nothing to copy.
DEVICE void copy_async(uint32_t to, const void *from, bool there) {
#ifdef CUDA_ON_CPU
    emulated::copy_async(to, from, there);
#else
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
#endif
}
DEVICE void commit_copies() {
#ifdef CUDA_ON_CPU
    emulated::commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most `LEFT` of the committed groups are under way.
template <int LEFT> DEVICE void wait_for_copies() {
#ifdef CUDA_ON_CPU
    emulated::wait_for_copies(LEFT);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// ---- Barriers of some of a block's warps. All lanes of a warp call these together, but for init_barrier, which is one thread's.
// An mbarrier is 8 bytes of shared memory. A phase of it ends with the `count`-th arrival, and the next one begins. __syncthreads must
// follow.
DEVICE void init_barrier(uint32_t barrier, int count) {
#ifdef CUDA_ON_CPU
    emulated::init_barrier(barrier, count);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
#endif
}
// One arrival of the warp.
DEVICE void arrive(uint32_t barrier) {
#ifdef CUDA_ON_CPU
    emulated::arrive(barrier);
#else
    __syncwarp();  // what all lanes did comes before
    if (threadIdx.x % 32 == 0) asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(barrier) : "memory");
#endif
}
// One arrival of each lane, as soon as all the copies are there that it has begun.
DEVICE void arrive_with_copies(uint32_t barrier) {
#ifdef CUDA_ON_CPU
    emulated::arrive_with_copies(barrier);
#else
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}
// Until the phase with this parity has ended. Before the first one, that with parity 1 counts as ended.
DEVICE void wait_for_phase(uint32_t barrier, int parity) {
#ifdef CUDA_ON_CPU
    emulated::wait_for_phase(barrier, parity);
#else
    uint32_t ended;
    do
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(ended) : "r"(barrier), "r"(parity) : "memory");
    while (!ended);
#endif
}
// Until `threads` threads have come to barrier `id` (1 to 15; 0 is that of __syncthreads), here or by `pass_named`.
DEVICE void meet_at_named(int id, int threads) {
#ifdef CUDA_ON_CPU
    emulated::meet_at_named(id, threads);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}
// Counts as having come, and goes on.
DEVICE void pass_named(int id, int threads) {
#ifdef CUDA_ON_CPU
    emulated::pass_named(id, threads);
#else
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- Matrix instructions
// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8. Lane l gets 4 bytes of each: number l % 4
// of row l / 4. Transposed (16-bit numbers only), it gets the numbers 2 (l % 4) and the next of column l / 4.
template <bool TRANSPOSED> DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
#ifdef CUDA_ON_CPU
    emulated::ldmatrix_x4(r, address, TRANSPOSED);
#else
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
#endif
}
#define MMA(shape_and_types, c, a, b0, b1)                                                                                        \
    asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
// c (16 x 8, f32) += a (16 x 16) * b (16 x 8), of bf16 or f16. Lane l has columns 2 (l % 4) and the next of c, in rows l / 4 and that + 8.
DEVICE void mma_half(float *c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef CUDA_ON_CPU
    emulated::mma_16x8x16<IS_F32 ? 1 : ELEMENT>(reinterpret_cast<float (&)[4]>(*c), a, b0, b1);
#else
    if constexpr (IS_BF16) MMA("m16n8k16.row.col.f32.bf16.bf16.f32", c, a, b0, b1);
    else MMA("m16n8k16.row.col.f32.f16.f16.f32", c, a, b0, b1);
#endif
}
// c (16 x 8, f32) += a (16 x 8) * b (8 x 8), of tf32: f32 of which the first 19 bits count.
DEVICE void mma_tf32(float *c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef CUDA_ON_CPU
    emulated::mma_16x8x8_tf32(reinterpret_cast<float (&)[4]>(*c), a, b0, b1);
#else
    MMA("m16n8k8.row.col.f32.tf32.tf32.f32", c, a, b0, b1);
#endif
}

// ---- Numbers
DEVICE uint32_t bits(float x) {
#ifdef CUDA_ON_CPU
    uint32_t y;
    memcpy(&y, &x, 4);
    return y;
#else
    return __float_as_uint(x);
#endif
}
DEVICE float from_bits(uint32_t x) {
#ifdef CUDA_ON_CPU
    float y;
    memcpy(&y, &x, 4);
    return y;
#else
    return __uint_as_float(x);
#endif
}
// x is nearly the sum of two tf32: a rounded one, and the rest, of which the matrix instruction drops the last bits. The error is 2^-21 of x.
// NaN may become a number in the first, and stays NaN in the second.
DEVICE void split(uint32_t x, uint32_t &high, uint32_t &low) {
    high = (x + 0x1000) & 0xFFFFE000;
    low = bits(from_bits(x) - from_bits(high));
}
DEVICE float exp2_fast(float x) {
#ifdef CUDA_ON_CPU
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
// Two numbers, rounded to the type of half precision; the first in the lower half.
DEVICE uint32_t pack(float low, float high) {
#ifdef CUDA_ON_CPU
    return IS_BF16 ? emulated::float_to_bf16(low) | uint32_t(emulated::float_to_bf16(high)) << 16
                   : emulated::float_to_f16(low) | uint32_t(emulated::float_to_f16(high)) << 16;
#else
    uint32_t packed;
    if constexpr (IS_BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#endif
}
DEVICE float widen(float x) { return x; }
DEVICE float widen(uint16_t x) {
#ifdef CUDA_ON_CPU
    return IS_BF16 ? emulated::bf16_to_float(x) : emulated::f16_to_float(x);
#else
    if constexpr (IS_BF16) return __uint_as_float(uint32_t(x) << 16);
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#endif
}
DEVICE Element narrow(float x) {
    if constexpr (IS_F32) return x;
    else return Element(pack(x, 0));
}
// The sum of the four lanes that have the same row of a product. All four get it.
DEVICE float sum_of_row(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
// False for NaN, too.
DEVICE bool is_finite(float x) { return fabsf(x) <= -LOWEST; }
DEVICE float infinity_to_lowest(float x) { return x < LOWEST ? LOWEST : x; }

// Writes columns `column` (even) and the next of a row of a result, as far as they are among the `dim` columns. Returns whether both are
// finite.
DEVICE bool store_pair(Element *row, int column, int dim, float x, float y) {
    const Element first = narrow(x), second = narrow(y);
    const bool has_second = PLAIN || column + 1 < dim;
    if (!PLAIN && column >= dim) return true;
    if constexpr (PLAIN) {
        struct alignas(2 * sizeof(Element)) Pair { Element first, second; };
        store_global(reinterpret_cast<Pair *>(row + column), Pair{first, second});
    } else {
        store_global(row + column, first);
        if (has_second) store_global(row + column + 1, second);
    }
    return is_finite(widen(first)) & (!has_second | is_finite(widen(second)));
}
