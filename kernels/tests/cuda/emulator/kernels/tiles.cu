// c = the sum over tiles of a * b transposed (or a * b, if B_TRANSPOSED), of 64 x 64 numbers each, and the sums of c's rows. It has
// what the attention kernels are made of: copies in two stages, ldmatrix and mma or wgmma, shuffles and an exchange in shared memory.
#include "cuda_on_cpu.h"

#ifndef KIND
#define KIND 1
#endif
#define SHARED_MEMORY(name) const uint32_t name = 0
#define DEVICE static inline

struct Problem {
    const uint16_t *a, *b;  // (blocks, tiles, 64, 64)
    float *c;               // (blocks, 64, 64)
    float *sums;            // (blocks, 64)
    int64_t tiles;
};
constexpr int THREADS = 128, SIDE = 64, ROW_BYTES = 128, TILE_BYTES = SIDE * ROW_BYTES;
constexpr uint32_t STAGES = 0, SUMS = 4 * TILE_BYTES;

// A row's chunks of 16 bytes are permuted, as wgmma's 128-byte swizzle does.
DEVICE uint32_t place(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ (row % 8)) * 16); }

DEVICE void load_tile(uint32_t to, const uint16_t *from) {
    for (int i = threadIdx.x; i < SIDE * 8; i += THREADS) emulated::copy_async(to + place(i / 8, i % 8), from + i * 8, true);
}

#ifdef HOPPER
DEVICE uint64_t descriptor(uint32_t address) {
    return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(TILE_BYTES >> 4) << 16 | (address & 0x3FFFF) >> 4;
}
DEVICE void multiply(float (&c)[32], uint32_t a_tile, uint32_t b_tile) {
    emulated::wgmma_begin();
    for (int k = 0; k < 4; k++) {
#ifdef B_TRANSPOSED
        emulated::wgmma<KIND>(c, SIDE, true, true, nullptr, descriptor(a_tile + k * 32), descriptor(b_tile + k * 16 * ROW_BYTES));
#else
        emulated::wgmma<KIND>(c, SIDE, true, false, nullptr, descriptor(a_tile + k * 32), descriptor(b_tile + k * 32));
#endif
    }
    emulated::wgmma_commit();
    emulated::wgmma_wait<KIND>(0);
}
#else
DEVICE void multiply(float (&c)[32], uint32_t a_tile, uint32_t b_tile) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    for (int k = 0; k < 4; k++) {
        uint32_t a[4], b[4];
        emulated::ldmatrix_x4(a, a_tile + place(row + lane % 16, 2 * k + lane / 16), false);
        for (int j = 0; j < 4; j++) {
#ifdef B_TRANSPOSED
            emulated::ldmatrix_x4(b, b_tile + place(16 * k + lane % 16, 2 * j + lane / 16), true);
#else
            emulated::ldmatrix_x4(b, b_tile + place(16 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2), false);
#endif
            emulated::mma_16x8x16<KIND>(reinterpret_cast<float (&)[4]>(c[8 * j]), a, b[0], b[1]);
            emulated::mma_16x8x16<KIND>(reinterpret_cast<float (&)[4]>(c[8 * j + 4]), a, b[2], b[3]);
        }
    }
}
#endif

// Sums of the rows: first of the lanes that share a row, then through shared memory to the threads that store them.
DEVICE void store_sums(const float (&c)[32], float *to) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    for (int half = 0; half < 2; half++) {
        float sum = 0;
        for (int j = 0; j < 8; j++) sum += c[4 * j + 2 * half] + c[4 * j + 2 * half + 1];
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
        if (lane % 4 == 0) emulated::store_shared(SUMS + (row + half * 8) * 4, sum);
    }
    __syncthreads();  // before the sums are read
    if (threadIdx.x < SIDE) emulated::store_global(to + threadIdx.x, emulated::load_shared<float>(SUMS + threadIdx.x * 4));
}

EMULATED_KERNEL(sum_of_products, THREADS, Problem) {
    SHARED_MEMORY(shared);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    const uint16_t *a = p.a + blockIdx.x * p.tiles * SIDE * SIDE, *b = p.b + blockIdx.x * p.tiles * SIDE * SIDE;
    float c[32] = {};
    load_tile(shared + STAGES, a);
    load_tile(shared + STAGES + TILE_BYTES, b);
    emulated::commit_copies();
    for (int tile = 0; tile < p.tiles; tile++) {
        const uint32_t stage = shared + STAGES + tile % 2 * 2 * TILE_BYTES, next = shared + STAGES + (tile + 1) % 2 * 2 * TILE_BYTES;
        if (tile + 1 < p.tiles) {
            load_tile(next, a + (tile + 1) * SIDE * SIDE);
            load_tile(next + TILE_BYTES, b + (tile + 1) * SIDE * SIDE);
        }
        emulated::commit_copies();
        emulated::wait_for_copies(1);
        emulated::fence_async();
        __syncthreads();  // after the copies
        multiply(c, stage, stage + TILE_BYTES);
        __syncthreads();  // before the stage is filled again
    }
    float *to = p.c + blockIdx.x * SIDE * SIDE;
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 4; i++) emulated::store_global(to + (row + i / 2 * 8) * SIDE + 8 * j + lane % 4 * 2 + i % 2, c[4 * j + i]);
    store_sums(c, p.sums + blockIdx.x * SIDE);
}
