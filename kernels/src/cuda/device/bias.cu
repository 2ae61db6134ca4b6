// The gradients of a bias and of ALiBi slopes: sums of the gradients of the scores. A number of a bias has the sum over all scores that it was
// added to; a query's part of the gradient of its slope is the sum over its scores, each times its distance. A block of threads has a tile
// of the result, and goes through the scores that it is the sum of.
#include "gradients.cuh"

using Sums = float[TILES][NUMBERS];

// A result (dims), each of whose axes is that of the scores or has length 1.
struct Result { float *data; int dims[4]; };

// Writes the sums of a tile, over queries and over keys where the result has length 1. `to` is where the tile's head of its sequence begins.
// Returns whether one of them isn't finite.
DEVICE bool store_sums(const Problem &p, const Result &result, float *to, int query, int key, Sums &acc, uint32_t shared) {
    const bool over_queries = result.dims[2] == 1, over_keys = result.dims[3] == 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = query + warp * WARP_ROWS + lane / 4;
    bool careful = false;
    if (over_keys)
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float sum = 0;
#pragma unroll
                for (int i = 0; i < NUMBERS / 2; i++) sum += acc[m][i / 2 * 4 + 2 * half + i % 2];
                acc[m][2 * half] = sum_of_row(sum);
            }
    if (!over_queries) {
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < NUMBERS; i++) {
                const int row = own + m * 16 + i / 2 % 2 * 8, column = key + i / 4 * 8 + lane % 4 * 2 + i % 2;
                const bool is_mine = over_keys ? i % 2 == 0 && i < 4 && lane % 4 == 0 : column < p.kv_len;
                if (is_mine && row < p.q_len) store_global(to + int64_t(row) * result.dims[3] + (over_keys ? 0 : column), acc[m][i]), careful |= !is_finite(acc[m][i]);
            }
        return careful;
    }
    // Sums over this warp's rows, and then over the warps.
    __syncthreads();
#pragma unroll
    for (int j = 0; j < OTHERS / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float sum = 0;
#pragma unroll
            for (int m = 0; m < TILES; m++) sum += acc[m][4 * j + e] + acc[m][4 * j + 2 + e];
#pragma unroll
            for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
            if (lane < 4) store_shared(shared + (warp * OTHERS + j * 8 + lane * 2 + e) * 4, sum);
        }
    __syncthreads();
    for (int column = threadIdx.x; column < (over_keys ? 1 : OTHERS); column += THREADS) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += load_shared<float>(shared + (w * OTHERS + column) * 4);
        if (over_keys || key + column < p.kv_len) store_global(to + (over_keys ? 0 : key + column), sum), careful |= !is_finite(sum);
    }
    return careful;
}

template <bool TIMES_DISTANCE> DEVICE void add_up(const Problem &p, const Result &result, uint32_t shared) {
    const Own q_tile{shared};
    const OwnValues do_tile{shared + Own::BYTES};
    const Other k_tile{do_tile.address + OwnValues::BYTES};
    const OtherValues v_tile{k_tile.address + Other::BYTES};
    const int own = threadIdx.x / 32 * WARP_ROWS;
    const Part part(p, blockIdx.x, result.dims, ROWS, OTHERS);
    const int (&from)[4] = part.from, (&to)[4] = part.to;
    Sums acc = {};
    for (int batch = from[0]; batch < to[0]; batch++)
        for (int head = from[1]; head < to[1]; head++) {
            const int kv_head = head / (p.heads / p.kv_heads);
            const Scores scores(p, batch, head);
            const Source<HEAD_DIM> q(p.q, batch, head, p.head_dim), k(p.k, batch, kv_head, p.head_dim);
            const Source<VALUE_DIM> d_o(p.d_o, batch, head, p.value_dim), v(p.v, batch, kv_head, p.value_dim);
            for (int query = from[2]; query < to[2]; query += ROWS) {
                const Range range = scores.limits.keys_of(query, ROWS);
                const OwnRows stats(p, batch, head, query + own);
                for (int key = from[3]; key < to[3]; key += OTHERS) {
                    if (key >= range.end || key + OTHERS <= range.begin || !map_shows(p, batch, head, query, ROWS, key, OTHERS)) continue;
                    __syncthreads();
                    q.template copy<false>(q_tile, query, p.q_len);
                    d_o.template copy<false>(do_tile, query, p.d_o.data ? p.q_len : 0);
                    k.template copy<false>(k_tile, key, p.kv_len);
                    v.template copy<false>(v_tile, key, p.kv_len);
                    commit_copies();
                    wait_for_copies<0>();
                    publish();
                    Tiles<false, false> t(scores, query + own, key);
                    dot(t.s, q_tile, own, k_tile);
                    dot(t.ds, do_tile, own, v_tile);
                    wait_for_products<0>();
                    done(t.s);
                    done(t.ds);
                    t.template weights<true>(stats, p.scale * LOG2E);
                    t.template gradients<true>(stats);
                    t.template for_each<true>(stats, [&](int m, int i, int query, int key, const Row &) {
                        if (!TIMES_DISTANCE) acc[m][i] += t.ds[m][i];
                        else if (t.ds[m][i] != 0) acc[m][i] -= t.ds[m][i] * scores.distance(query, key);
                    });
                }
            }
        }
    const int batch = result.dims[0] == 1 ? 0 : from[0], head = result.dims[1] == 1 ? 0 : from[1];
    float *data = result.data + (int64_t(batch) * result.dims[1] + head) * result.dims[2] * result.dims[3];
    const bool careful = __syncthreads_or(store_sums(p, result, data, from[2], from[3], acc, shared));
    // The slopes share the flags of the pass over queries.
    if (threadIdx.x == 0) store_global(p.careful + blockIdx.x, uint8_t(careful || (TIMES_DISTANCE && load_global(p.careful + blockIdx.x))));
}

KERNEL(backward_bias, THREADS) {
    SHARED_MEMORY(shared);
    add_up<false>(p, {p.d_bias, {p.bias_dims[0], p.bias_dims[1], p.bias_dims[2], p.bias_dims[3]}}, shared);
}

KERNEL(backward_slopes, THREADS) {
    SHARED_MEMORY(shared);
    add_up<true>(p, {p.slope_rows, {p.batch, p.heads, p.q_len, 1}}, shared);
}
