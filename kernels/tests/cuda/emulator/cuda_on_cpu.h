// Runs CUDA C++ on a CPU, to test what kernels compute where there is no GPU. This header is what the kernels include; the
// emulator itself (emulator.cpp and its headers) is compiled once and linked into each library of kernels.
//
// Every CUDA thread is a fiber. An instruction of a warp (ldmatrix, mma, wgmma, shuffle, __syncwarp) happens once, for all 32
// lanes, when the last of them has come to it. A seed draws the order of blocks, warps and lanes; seed 0 keeps the natural order.
// Asynchronous copies land when they are waited for, and hold NaN until then; with `eager` they land at once.
//
// A kernel:          KERNEL(name, threads)(const Problem p) { ... }
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
//   void fence_async();                                               fence.proxy.async: what this thread wrote is seen by wgmma
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
//   copies or wgmmas that are not waited for at the end; a wgmma without wgmma_begin; registers written while a wgmma owns them
