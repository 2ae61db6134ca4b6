// Kernels with one instruction or one fault each.
#include "cuda_on_cpu.h"

struct Problem {
    float *numbers;
    int64_t count;
};
#define KERNEL(name, threads) EMULATED_KERNEL(name, threads, Problem)
static const unsigned ALL = 0xFFFFFFFF;

// ---- Instructions
// numbers: a (16, 8), b (8, 8), c (16, 8). c += a * b.
KERNEL(tf32, 32) {
    const int lane = threadIdx.x, row = lane / 4, column = lane % 4;
    const float *a = p.numbers, *b = a + 128;
    float *c = p.numbers + 192, sums[4];
    uint32_t x[4];
    for (int i = 0; i < 4; i++) x[i] = __float_as_uint(emulated::load_global(a + (row + i % 2 * 8) * 8 + column + i / 2 * 4));
    for (int i = 0; i < 4; i++) sums[i] = emulated::load_global(c + (row + i / 2 * 8) * 8 + 2 * column + i % 2);
    const float first = emulated::load_global(b + column * 8 + row), second = emulated::load_global(b + (column + 4) * 8 + row);
    emulated::mma_16x8x8_tf32(sums, x, __float_as_uint(first), __float_as_uint(second));
    for (int i = 0; i < 4; i++) emulated::store_global(c + (row + i / 2 * 8) * 8 + 2 * column + i % 2, sums[i]);
}
// Each lane's number becomes a combination of those of the lanes that shuffles bring.
KERNEL(shuffles, 32) {
    const int lane = threadIdx.x;
    const float x = emulated::load_global(p.numbers + lane);
    float y = __shfl_xor_sync(ALL, x, 3) + 100 * __shfl_sync(ALL, x, (lane + 5) % 32);
    y += 10000.0f * __shfl_up_sync(ALL, x, 1) + 1000000.0f * __popc(__ballot_sync(ALL, lane % 3 == 0));
    y += __any_sync(ALL, lane == 7) - __all_sync(ALL, lane == 7) - 1;
    emulated::store_global(p.numbers + lane, y);
}
// Whether any thread of the block has a number over 0.
KERNEL(any_of_a_block, 64) {
    const float x = emulated::load_global(p.numbers + threadIdx.x);
    const int any = __syncthreads_or(x > 0), none = __syncthreads_or(x > 1e6f);
    emulated::store_global(p.numbers + threadIdx.x, float(any + 2 * none));
}
// The order in which the warps ran.
KERNEL(order, 128) {
    if (threadIdx.x % 32) return;
    static int next = 0;
    emulated::store_global(p.numbers + threadIdx.x / 32, float(next++ % 4));
}
// Conversions there and back.
KERNEL(conversions, 32) {
    using namespace emulated;
    for (int i = threadIdx.x; i < p.count; i += 32) {
        const float x = load_global(p.numbers + i);
        store_global(p.numbers + p.count + i, bf16_to_float(float_to_bf16(x)));
        store_global(p.numbers + 2 * p.count + i, f16_to_float(float_to_f16(x)));
    }
}
// The 16-bit halves of a word belong to two threads.
KERNEL(halves_of_a_word, 64) {
    emulated::store_shared<uint16_t>(threadIdx.x * 2, threadIdx.x);
    __syncthreads();
    emulated::store_global(p.numbers + threadIdx.x, float(emulated::load_shared<uint16_t>((63 - threadIdx.x) * 2)));
}

// ---- Faults
KERNEL(load_out_of_bounds, 32) { emulated::store_global(p.numbers, emulated::load_global(p.numbers + p.count)); }
KERNEL(store_out_of_bounds, 32) { emulated::store_global(p.numbers + p.count + threadIdx.x, 1.0f); }
KERNEL(null_pointer, 32) { emulated::store_global<float>(nullptr, 1.0f); }
KERNEL(unaligned_load, 32) { emulated::load_global(reinterpret_cast<double *>(p.numbers + 1)); }
KERNEL(copy_from_unaligned, 32) {
    emulated::copy_async(threadIdx.x * 16, p.numbers + 1, true);
    emulated::commit_copies();
    emulated::wait_for_copies(0);
}
KERNEL(copy_to_unaligned, 32) { emulated::copy_async(threadIdx.x * 16 + 8, p.numbers, true); }
KERNEL(copy_from_out_of_bounds, 32) { emulated::copy_async(threadIdx.x * 16, p.numbers + p.count, true); }
KERNEL(copy_not_waited_for, 32) {
    emulated::copy_async(threadIdx.x * 16, p.numbers, true);
    emulated::commit_copies();
}
KERNEL(copy_read_too_early, 32) {
    emulated::copy_async(threadIdx.x * 16, p.numbers, true);
    emulated::commit_copies();
    emulated::load_shared<float>(threadIdx.x * 16);
}
KERNEL(shared_out_of_bounds, 32) { emulated::store_shared(1020 + threadIdx.x * 4, 1.0f); }
KERNEL(read_of_nothing, 32) { emulated::load_shared<float>(threadIdx.x * 4); }
KERNEL(read_of_half_a_word, 32) {
    emulated::store_shared<uint16_t>(threadIdx.x * 4, 1);
    emulated::load_shared<uint32_t>(threadIdx.x * 4);
}
KERNEL(race_in_a_warp, 32) {
    emulated::store_shared(threadIdx.x * 4, 1.0f);
    __shfl_xor_sync(ALL, 1, 1);
    emulated::load_shared<float>((threadIdx.x ^ 1) * 4);
}
KERNEL(no_race_in_a_warp, 32) {
    emulated::store_shared(threadIdx.x * 4, 1.0f);
    __syncwarp();
    emulated::store_global(p.numbers + threadIdx.x, emulated::load_shared<float>((threadIdx.x ^ 1) * 4));
}
KERNEL(race_of_warps, 64) {
    emulated::store_shared(threadIdx.x * 4, 1.0f);
    __syncwarp();
    emulated::load_shared<float>((threadIdx.x ^ 32) * 4);
}
KERNEL(race_of_writes, 64) { emulated::store_shared(threadIdx.x % 32 * 4, 1.0f); }
KERNEL(race_of_a_read, 64) {
    emulated::store_shared(threadIdx.x * 4, 1.0f);
    __syncthreads();
    emulated::load_shared<float>((threadIdx.x ^ 32) * 4);
    emulated::store_shared(threadIdx.x * 4, 2.0f);
}
KERNEL(race_of_ldmatrix, 32) {
    uint32_t r[4];
    for (int i = 0; i < 4; i++) emulated::store_shared(threadIdx.x * 16 + i * 4, 1.0f);
    emulated::ldmatrix_x4(r, threadIdx.x * 16, false);
}
KERNEL(race_of_blocks, 32) {
    if (threadIdx.x == 0) emulated::store_global(p.numbers, float(blockIdx.x));
}
KERNEL(race_of_blocks_in_bytes, 32) {
    if (threadIdx.x == 0) emulated::store_global(reinterpret_cast<uint8_t *>(p.numbers) + blockIdx.x / 2, uint8_t(1));
}
KERNEL(no_race_of_blocks_in_bytes, 32) {
    if (threadIdx.x == 0) emulated::store_global(reinterpret_cast<uint8_t *>(p.numbers) + blockIdx.x, uint8_t(1));
}
KERNEL(read_of_another_block, 32) {
    emulated::store_global(p.numbers + blockIdx.x * 32 + threadIdx.x, 1.0f);
    if (blockIdx.x > 0) emulated::load_global(p.numbers + threadIdx.x);
    if (blockIdx.x == 0) emulated::load_global(p.numbers + 32 + threadIdx.x);
}
KERNEL(different_instructions, 32) {
    if (threadIdx.x < 16)
        __syncwarp();
    else
        __shfl_xor_sync(ALL, 1, 1);
}
KERNEL(some_lanes_only, 32) {
    if (threadIdx.x < 16) __shfl_xor_sync(ALL, 1, 1);
}
KERNEL(some_lanes_at_the_barrier, 32) {
    if (threadIdx.x < 16)
        __syncthreads();
    else
        __syncwarp();
}
KERNEL(some_threads_end, 64) {
    if (threadIdx.x < 32) __syncthreads();
}
KERNEL(deep_recursion, 32) {
    struct Deep {
        static float of(int depth) {
            volatile float room[64];
            room[depth % 64] = depth;
            return depth ? of(depth - 1) + room[depth % 64] : 0;
        }
    };
    emulated::store_global(p.numbers + threadIdx.x, Deep::of(100));
}
KERNEL(endless_recursion, 32) {
    struct Deep {
        static float of(int depth) {
            volatile float room[1024];
            room[depth % 1024] = depth;
            return depth ? of(depth - 1) + room[depth % 1024] : 0;
        }
    };
    emulated::store_global(p.numbers + threadIdx.x, Deep::of(40));
}
