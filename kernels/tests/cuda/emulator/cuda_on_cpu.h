// Runs CUDA C++ on a CPU, to test what kernels compute where there is no GPU. This header is what the kernels include; the
// emulator itself (emulator.cpp and its headers) is compiled once and linked into each library of kernels.
//
// Every CUDA thread is a fiber. An instruction of a warp (ldmatrix, mma, wgmma, shuffle, __syncwarp) happens once, for all 32
// lanes, when the last of them has come to it. A seed draws the order of blocks, warps and lanes; seed 0 keeps the natural order.
// Asynchronous copies land when they are waited for, and hold NaN until then; with `eager` they land at once.
//
// A kernel:          KERNEL(name, threads) { ... }                          its argument is `const Problem p`
// on a CPU, with:    #define KERNEL(name, threads) EMULATED_KERNEL(name, threads, Problem)
//                    #define SHARED_MEMORY(name) const uint32_t name = 0     shared memory has the addresses 0 .. shared_bytes
//                    #define DEVICE inline
// CUDA's own words:  threadIdx.x  blockIdx.x  blockDim.x  gridDim.x  __syncthreads  __syncthreads_or  __syncwarp  __shfl_sync
//                    __shfl_xor_sync  __shfl_up_sync  __shfl_down_sync  __ballot_sync  __any_sync  __all_sync  __fdividef  __umulhi
//                    __float_as_uint  __uint_as_float  __float_as_int  __int_as_float  __popc  __ffs  min  max
//                    __device__ __global__ __forceinline__ __launch_bounds__ __restrict__ __grid_constant__ (all empty or inline)
// Masks of lanes must be 0xFFFFFFFF: every instruction of a warp needs all 32 lanes.
//
// namespace emulated:
//   void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, bool transposed);
//   template <int KIND> void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);     KIND: 1 bf16, 2 f16
//   void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);                     the lower 13 bits are ignored
//   void copy_async(uint32_t to, const void *from, bool there);       16 bytes; zeros if not there (`from` isn't looked at then)
//   void commit_copies();
//   void wait_for_copies(int left);
//   template <class T> T load_shared(uint32_t address);               T of 1, 2, 4, 8 or 16 bytes, aligned to its size
//   template <class T> void store_shared(uint32_t address, T value);
//   template <class T> T load_global(const T *from);                  in one of the launch's regions, aligned to its size
//   template <class T> void store_global(T *to, T value);
//   void fence_async();                                               fence.proxy.async: what this thread wrote, or waited for, is seen by wgmma
//   void init_barrier(uint32_t address, int count);                   an mbarrier; a __syncthreads must follow. By one thread; those below by whole warps
//   void arrive(uint32_t address);                                    one arrival for the warp, after __syncwarp
//   void arrive_with_copies(uint32_t address);                        cp.async.mbarrier.arrive.noinc: one arrival of each lane, when its copies have landed
//   void wait_for_phase(uint32_t address, int parity);
//   void meet_at_named(int id, int threads);                          bar.sync
//   void pass_named(int id, int threads);                             bar.arrive
//   void wgmma_begin();                                               wgmma.fence: needed before the first wgmma of each group
//   template <int KIND> void wgmma(float *d, int n, bool accumulate, bool transposed, const uint32_t *a_or_null, uint64_t a_descriptor, uint64_t b_descriptor);
//        d: n / 2 registers of this lane. a_or_null: four registers; they are read at once. Descriptors: 128-byte swizzle
//        (layout type 1 at bit 62, start address >> 4 at bit 0, leading offset >> 4 at bit 16, stride >> 4 at bit 32).
//        `d` holds NaN until the product is waited for, and must not be touched.
//   void wgmma_commit();
//   template <int KIND> void wgmma_wait(int left);
//   float bf16_to_float(uint16_t); uint16_t float_to_bf16(float); float f16_to_float(uint16_t); uint16_t float_to_f16(float);
//
// What is a fault (it ends the launch with a message; the process goes on):
//   shared memory: out of bounds, unaligned, read before it was written, read or written while a copy to it is under way, written
//     while a wgmma reads it; a race of two warps between two __syncthreads, or of two lanes between two of __syncwarp and
//     __syncthreads (shuffles, ldmatrix and mma order no memory); no fence_async by the writer before a wgmma reads
//   global memory: out of the regions, unaligned; a word that two blocks store, or one stores and another loads
//   lanes of a warp at different instructions, or some of them finished; threads that end while others wait at __syncthreads
//   warps that wait at barriers for ever; an mbarrier that isn't there yet; more arrivals than a phase has; a warp that
//     comes twice to a named barrier, and one that still waits for threads at the end
//   copies or wgmmas that are not waited for at the end; a wgmma without wgmma_begin; registers written while a wgmma owns them
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "numbers.h"

#define __global__
#define __device__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

namespace emulated {

struct Index {
    unsigned x, y, z;
};
// Where the thread is that runs now.
struct Place {
    Index thread, block, block_size, grid;
};
extern __thread Place place;

// ---- The emulator's functions (emulator.cpp)
void *shared_memory(uint32_t address, uint32_t bytes, bool write);
void check_global(const void *address, uint32_t bytes, bool write);
void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, bool transposed);
void mma(int kind, float *c, const uint32_t *a, uint32_t b0, uint32_t b1);  // kind 0 is tf32
void copy_async(uint32_t to, const void *from, bool there);
void commit_copies();
void wait_for_copies(int left);
void fence_async();
void init_barrier(uint32_t address, int count);
void arrive(uint32_t address);
void arrive_with_copies(uint32_t address);
void wait_for_phase(uint32_t address, int parity);
void meet_at_named(int id, int threads);
void pass_named(int id, int threads);
void wgmma_begin();
void wgmma(int kind, float *d, int n, bool accumulate, bool transposed, const uint32_t *a, uint64_t a_descriptor, uint64_t b_descriptor);
void wgmma_commit();
void wgmma_wait_for(int left);
void sync_warp();
void sync_block();
bool sync_block_or(bool value);
// The value of lane `from`, of 4 or 8 bytes.
uint64_t shuffle(uint64_t value, unsigned from);
uint32_t ballot(bool value);

template <int Kind> inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(Kind == 1 || Kind == 2, "bf16 or f16");
    mma(Kind, c, a, b0, b1);
}
inline void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma(0, c, a, b0, b1); }
template <int Kind>
inline void wgmma(float *d, int n, bool accumulate, bool transposed, const uint32_t *a, uint64_t a_descriptor, uint64_t b_descriptor) {
    static_assert(Kind == 1 || Kind == 2, "bf16 or f16");
    wgmma(Kind, d, n, accumulate, transposed, a, a_descriptor, b_descriptor);
}
template <int Kind> inline void wgmma_wait(int left) { wgmma_wait_for(left); }

template <class T> inline T load_shared(uint32_t address) {
    T value;
    memcpy(&value, shared_memory(address, sizeof(T), false), sizeof(T));
    return value;
}
template <class T> inline void store_shared(uint32_t address, T value) { memcpy(shared_memory(address, sizeof(T), true), &value, sizeof(T)); }
template <class T> inline T load_global(const T *from) {
    check_global(from, sizeof(T), false);
    return *from;
}
template <class T> inline void store_global(T *to, T value) {
    check_global(to, sizeof(T), true);
    *to = value;
}

template <class To, class From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}
template <class T> inline T shuffle_value(T value, unsigned from) {
    static_assert(sizeof(T) <= 8, "");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = shuffle(bits, from);
    memcpy(&value, &bits, sizeof(T));
    return value;
}
inline unsigned lane() { return place.thread.x % 32; }

// ---- The table of kernels
using Entry = void (*)(const void *problem);
struct Register {
    Register(const char *name, uint32_t threads, uint64_t problem_bytes, Entry entry);
};
template <class Problem, void (*KERNEL)(Problem)> void run_with(const void *problem) { KERNEL(*static_cast<const Problem *>(problem)); }

}  // namespace emulated

#define EMULATED_KERNEL(name, threads, Problem)                                                                            \
    static void name(const Problem);                                                                                       \
    static const emulated::Register name##_registered(#name, threads, sizeof(Problem), emulated::run_with<Problem, name>); \
    static void name(const Problem p)

#define threadIdx (emulated::place.thread)
#define blockIdx (emulated::place.block)
#define blockDim (emulated::place.block_size)
#define gridDim (emulated::place.grid)

inline void __syncthreads() { emulated::sync_block(); }
inline int __syncthreads_or(int value) { return emulated::sync_block_or(value != 0); }
inline void __syncwarp(unsigned = 0xFFFFFFFF) { emulated::sync_warp(); }
template <class T> inline T __shfl_sync(unsigned, T value, int from) { return emulated::shuffle_value(value, from & 31); }
template <class T> inline T __shfl_xor_sync(unsigned, T value, int mask) { return emulated::shuffle_value(value, (emulated::lane() ^ mask) & 31); }
template <class T> inline T __shfl_up_sync(unsigned, T value, unsigned by) {
    const unsigned lane = emulated::lane();
    return emulated::shuffle_value(value, lane < by ? lane : lane - by);
}
template <class T> inline T __shfl_down_sync(unsigned, T value, unsigned by) {
    const unsigned lane = emulated::lane();
    return emulated::shuffle_value(value, lane + by > 31 ? lane : lane + by);
}
inline unsigned __ballot_sync(unsigned, int value) { return emulated::ballot(value != 0); }
inline int __any_sync(unsigned, int value) { return emulated::ballot(value != 0) != 0; }
inline int __all_sync(unsigned, int value) { return emulated::ballot(value != 0) == 0xFFFFFFFF; }

inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline unsigned __float_as_uint(float x) { return emulated::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulated::bits_as<float>(x); }
inline int __float_as_int(float x) { return emulated::bits_as<int>(x); }
inline float __int_as_float(int x) { return emulated::bits_as<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
