// Tiles in shared memory and their products, by mma.sync (Ampere on) or by wgmma (HOPPER, half types). Both leave the same numbers in the
// same lanes: lane l has columns 8 j + 2 (l % 4) and the next, of rows l / 4 and that + 8 of its warp's. So number i of a row of
// results is in column 8 (i / 4) + 2 (l % 4) + i % 2 of row l / 4 + 8 (i / 2 % 2).
#pragma once
#include "problem.cuh"
#include "wgmma.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
#ifndef VALUE_DIM
#define VALUE_DIM HEAD_DIM
#endif
#ifndef WARPS
#define WARPS 4
#endif
// Rows of the tiles that a block of threads goes through.
#ifndef OTHERS
#define OTHERS 64
#endif
#ifndef STAGES
#define STAGES 1
#endif
// Times 16: rows of a warp.
#ifndef ROW_TILES
#define ROW_TILES 1
#endif
constexpr int THREADS = WARPS * 32, TILES = ROW_TILES, WARP_ROWS = 16 * TILES, ROWS = WARPS * WARP_ROWS;
#ifdef HOPPER
constexpr bool IS_ASYNC = true;
static_assert(TILES == 1 && WARPS % 4 == 0 && !IS_F32, "a group of 4 warps has 64 rows of half type");
#else
constexpr bool IS_ASYNC = false;
#endif

// Arguments of a step that is compiled twice: with a mask and without.
struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };

// A tile is one panel of PANEL_COLUMNS after another, with rows of 128 bytes. The 16-byte chunks of a row are permuted, so that no two of
// 8 rows have a chunk in the same banks.
template <int LEN, int N> struct Tile {
    uint32_t address;
    static constexpr int BYTES = LEN * N * int(sizeof(Element)), PANEL = LEN * 128;
};

// A thread's part of the copies of one tensor's rows to tiles, which WORKERS threads make: all, or each group of so many for itself.
template <int N, int WORKERS = THREADS> struct Source {
    const Element *from;
    int64_t step;
    int row, chunk, dim;
    uint32_t to;
    bool aligned;
    static constexpr int AT_ONCE = WORKERS / 8;

    DEVICE Source(const Strided &tensor, int batch, int head, int dim) : dim(dim) {
        row = threadIdx.x % WORKERS / 8, chunk = threadIdx.x % 8, step = tensor.row;
        from = static_cast<const Element *>(tensor.data) + batch * tensor.batch + head * tensor.head + row * step + chunk * CHUNK;
        to = row * 128 + ((chunk ^ (row % 8)) * 16);
        const int64_t strides = tensor.batch | tensor.head | tensor.row | dim;
        aligned = PLAIN || (strides % CHUNK == 0 && reinterpret_cast<uint64_t>(tensor.data) % 16 == 0);
    }
    // Rows `first` to `first` + LEN, with zeros behind row `len` and behind column `dim`. The copies may be under way until
    // wait_for_copies.
    template <bool ALL, int LEN> DEVICE void copy(Tile<LEN, N> tile, int first, int len) const {
        static_assert(LEN % AT_ONCE == 0 && AT_ONCE % 8 == 0, "rows that the threads copy at once");
        const Element *at = from + first * step;
#pragma unroll
        for (int i = 0; i < LEN / AT_ONCE; i++) {
            const bool there = ALL || first + row + i * AT_ONCE < len;
            const Element *source = at + i * AT_ONCE * step;
#pragma unroll
            for (int panel = 0; panel < N / PANEL_COLUMNS; panel++) {
                const uint32_t target = tile.address + to + panel * tile.PANEL + i * AT_ONCE * 128;
                if constexpr (PLAIN) copy_async(target, there ? source + panel * PANEL_COLUMNS : from, there);
                else copy_chunk(target, source + panel * PANEL_COLUMNS, there ? dim - panel * PANEL_COLUMNS - chunk * CHUNK : 0);
            }
        }
    }
    // The first `count` elements of a chunk, and zeros.
    DEVICE void copy_chunk(uint32_t target, const Element *source, int count) const {
        if (aligned || count <= 0) return copy_async(target, count > 0 ? source : from, count > 0);
        struct alignas(16) Chunk { Element elements[CHUNK]; } chunk;
#pragma unroll
        for (int e = 0; e < CHUNK; e++) chunk.elements[e] = e < count ? load_global(source + e) : Element(0);
        store_shared(target, chunk);
    }
};

#ifndef HOPPER
// c += a * b. f32 numbers are sums of two tf32: three products, the small ones first.
DEVICE void multiply(float *c, const uint32_t (&a)[4], const uint32_t (&a_low)[4], uint32_t b0, uint32_t b1) {
    if constexpr (IS_F32) {
        uint32_t high0, high1, low0, low1;
        split(b0, high0, low0);
        split(b1, high1, low1);
        mma_tf32(c, a_low, high0, high1);
        mma_tf32(c, a, low0, low1);
        mma_tf32(c, a, high0, high1);
    } else {
        mma_half(c, a, b0, b1);
    }
}
#endif

// acc = a * b transposed, of this warp's rows of a; `row` is the first.
template <int LEN, int COLUMNS, int N> DEVICE void dot(float (&acc)[TILES][COLUMNS / 2], Tile<LEN, N> a, int row, Tile<COLUMNS, N> b) {
#ifdef HOPPER
    keep(acc[0]);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < N / K_STEP; i++)
        wgmma<false>(acc[0], descriptor(a.address + row / 64 * 64 * 128 + i / 4 * a.PANEL + i % 4 * 32), descriptor(b.address + i / 4 * b.PANEL + i % 4 * 32), i > 0);
    wgmma_commit();
#else
    const int lane = threadIdx.x % 32;
    const uint32_t a_lane = a.address + (row + lane % 16) * 128 + ((lane / 16 ^ lane % 8) * 16);
    const uint32_t b_lane = b.address + (lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 % 2 ^ lane % 8) * 16);
    // In f32 the products of each panel are summed from zero, since tensor cores round sums towards zero.
    float of_panel[TILES][COLUMNS / 2] = {};
    auto &sums = IS_F32 ? of_panel : acc;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++) acc[m][i] = 0;
#pragma unroll
    for (int i = 0; i < N / K_STEP; i++) {
        uint32_t x[TILES][4], x_low[TILES][4];
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            ldmatrix_x4<false>(x[m], (a_lane ^ (i % 4 * 32)) + i / 4 * a.PANEL + m * 16 * 128);
            if constexpr (IS_F32)
                for (int e = 0; e < 4; e++) split(x[m][e], x[m][e], x_low[m][e]);
        }
#pragma unroll
        for (int j = 0; j < COLUMNS / 16; j++) {
            uint32_t y[4];
            ldmatrix_x4<false>(y, (b_lane ^ (i % 4 * 32)) + i / 4 * b.PANEL + j * 16 * 128);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                multiply(&sums[m][8 * j], x[m], x_low[m], y[0], y[1]);
                multiply(&sums[m][8 * j + 4], x[m], x_low[m], y[2], y[3]);
            }
        }
        if (IS_F32 && i % 4 == 3)
#pragma unroll
            for (int m = 0; m < TILES; m++)
#pragma unroll
                for (int e = 0; e < COLUMNS / 2; e++) acc[m][e] += of_panel[m][e], of_panel[m][e] = 0;
    }
#endif
}

#ifndef HOPPER
// acc += a * b, in f32. The products of a tile are summed from zero, as in `dot`.
template <int LEN, int N> DEVICE void accumulate_f32(float (&acc)[TILES][N / 2], const float (&a)[TILES][LEN / 2], Tile<LEN, N> b) {
    // Along the sum, numbers t and t + 4 of an operand are keys 2 t and 2 t + 1 of a result: any order serves, if both operands have it.
    const int lane = threadIdx.x % 32, row = 2 * (lane % 4), column = lane / 4;
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
        float sum[TILES][4] = {};
#pragma unroll
        for (int j = 0; j < LEN / 8; j++) {
            const uint32_t panel = b.address + i / 4 * b.PANEL + j * 8 * 128, chunk = i % 4 * 2 + column / 4;
            const uint32_t b0 = load_shared<uint32_t>(panel + row * 128 + (chunk ^ row) * 16 + column % 4 * 4);
            const uint32_t b1 = load_shared<uint32_t>(panel + (row + 1) * 128 + (chunk ^ (row + 1)) * 16 + column % 4 * 4);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                uint32_t x[4] = {bits(a[m][4 * j]), bits(a[m][4 * j + 2]), bits(a[m][4 * j + 1]), bits(a[m][4 * j + 3])}, x_low[4];
                for (int e = 0; e < 4; e++) split(x[e], x[e], x_low[e]);
                multiply(sum[m], x, x_low, b0, b1);
            }
        }
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[m][4 * i + e] += sum[m][e];
    }
}
#endif

// A result as the first operand of products of half type.
template <int LEN> DEVICE void as_operand(uint32_t (&operand)[TILES][LEN / 16][4], const float (&a)[TILES][LEN / 2]) {
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int j = 0; j < LEN / 16; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) operand[m][j][i] = pack(a[m][8 * j + 2 * i], a[m][8 * j + 2 * i + 1]);
}

// acc (this warp's rows x N) += a * b, where `a` is a result of this warp as an operand.
template <int LEN, int N> DEVICE void accumulate(float (&acc)[TILES][N / 2], const uint32_t (&a)[TILES][LEN / 16][4], Tile<LEN, N> b) {
#ifdef HOPPER
    constexpr int PART = N < 128 ? N : 128;  // columns of an instruction
    keep(acc[0]);
    wgmma_begin();
#pragma unroll
    for (int part = 0; part < N / PART; part++)
#pragma unroll
        for (int j = 0; j < LEN / 16; j++)
            wgmma<true>(reinterpret_cast<float (&)[PART / 2]>(acc[0][part * PART / 2]), a[0][j], descriptor(b.address + part * (PART / 64) * b.PANEL + j * 16 * 128, b.PANEL), true);
    wgmma_commit();
#else
    const int lane = threadIdx.x % 32;
    const uint32_t b_lane = b.address + lane % 16 * 128 + ((lane / 16 ^ lane % 8) * 16);
#pragma unroll
    for (int j = 0; j < LEN / 16; j++) {
#pragma unroll
        for (int i = 0; i < N / 16; i++) {
            uint32_t y[4];
            ldmatrix_x4<true>(y, (b_lane ^ (i % 4 * 32)) + i / 4 * b.PANEL + j * 16 * 128);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                mma_half(&acc[m][8 * i], a[m][j], y[0], y[1]);
                mma_half(&acc[m][8 * i + 4], a[m][j], y[2], y[3]);
            }
        }
    }
#endif
}
// Likewise, of the result itself.
template <int LEN, int N> DEVICE void accumulate(float (&acc)[TILES][N / 2], const float (&a)[TILES][LEN / 2], Tile<LEN, N> b) {
#ifndef HOPPER
    if constexpr (IS_F32) return accumulate_f32<LEN, N>(acc, a, b);
    else
#endif
    {
        uint32_t x[TILES][LEN / 16][4];
        as_operand<LEN>(x, a);
        accumulate<LEN, N>(acc, x, b);
    }
}

// Until at most the last `LEFT` products are under way.
template <int LEFT> DEVICE void wait_for_products() {
#ifdef HOPPER
    wgmma_wait<LEFT>();
#endif
}
// The results are used from here on.
template <int M> DEVICE void done(float (&acc)[TILES][M]) {
#ifdef HOPPER
    keep(acc[0]);
#endif
}
// What was copied is there for all threads and for wgmma.
DEVICE void publish() {
#ifdef HOPPER
    publish_to_wgmma();
#endif
    __syncthreads();
}
