// Gradients of attention, without atomics and so the same every time. `backward_keys` has a tile of keys and goes through the queries;
// `backward_queries` has a tile of queries and goes through the keys; both compute the weights again, as the forward pass did.
//
//   delta = Σ o ∘ do - dlse        dp = do · vᵀ
//   dv = pᵀ · do                   ds = p ∘ (dp - delta)
//   dq = scale · ds · k            dk = scale · dsᵀ · q
//
// Source: Dao, "FlashAttention-2" (ICLR 2024), algorithm 2.
#include "gradients.cuh"

// Which gradients backward_keys computes: 1 of the values, 2 of the keys. Both need more registers than there are where heads are large.
#ifndef PARTS
#define PARTS 3
#endif
constexpr bool OF_VALUES = PARTS & 1, OF_KEYS = PARTS & 2;

// A warp for each row: delta, and the row's part of the gradient of its sink.
KERNEL(backward_delta, 128) {
    const int64_t row = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
    if (row >= int64_t(p.batch) * p.heads * p.q_len) return;
    const int lane = threadIdx.x % 32, query = int(row % p.q_len), head = int(row / p.q_len % p.heads), batch = int(row / p.q_len / p.heads);
    float sum = 0;
    if (p.d_o.data) {
        const Element *o = static_cast<const Element *>(p.o.data) + batch * p.o.batch + head * p.o.head + query * p.o.row;
        const Element *d_o = static_cast<const Element *>(p.d_o.data) + batch * p.d_o.batch + head * p.d_o.head + query * p.d_o.row;
        for (int i = lane; i < p.value_dim; i += 32) sum += widen(load_global(o + i)) * widen(load_global(d_o + i));
    }
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (lane != 0) return;
    if (p.d_lse) sum -= load_global(p.d_lse + row);
    store_global(p.delta + row, sum);
    if (p.sink_rows) {
        const float share = float(weight_of(p, row, load_global(p.sinks + head)));
        store_global(p.sink_rows + row, load_global(p.largest + row) == INFINITY ? 0.0f : -share * sum);
    }
}

KERNEL(backward_keys, THREADS) {
    SHARED_MEMORY(shared);
    const Place place(blockIdx.x, p.kv_len, ROWS, p.kv_heads, false);
    const int own = threadIdx.x / 32 * WARP_ROWS, heads = p.heads / p.kv_heads;
    const Own k_tile{shared};
    const OwnValues v_tile{shared + Own::BYTES};
    const uint32_t others = v_tile.address + OwnValues::BYTES;
    auto q_tile = [&](int stage) { return Other{others + stage * (Other::BYTES + OtherValues::BYTES)}; };
    auto do_tile = [&](int stage) { return OtherValues{q_tile(stage).address + Other::BYTES}; };
    Source<HEAD_DIM>(p.k, place.batch, place.head, p.head_dim).template copy<false>(k_tile, place.first, p.kv_len);
    Source<VALUE_DIM>(p.v, place.batch, place.head, p.value_dim).template copy<false>(v_tile, place.first, p.kv_len);
    float dk[TILES][HEAD_DIM / 2] = {}, dv[TILES][VALUE_DIM / 2] = {};
    const float scale_log2 = p.scale * LOG2E;

    for (int head = place.head * heads; head < (place.head + 1) * heads; head++) {
        const Scores scores(p, place.batch, head);
        const Range range = scores.limits.queries_of(place.first, ROWS);
        const Source<HEAD_DIM> q(p.q, place.batch, head, p.head_dim);
        const Source<VALUE_DIM> d_o(p.d_o, place.batch, head, p.value_dim);
        const int end = range.begin < range.end ? (range.end - 1) / OTHERS + 1 : 0;
        // The next tile, from this one up, of which something is visible.
        auto seek = [&](int tile) {
            if (!PLAIN) while (tile < end && !map_shows(p, place.batch, head, tile * OTHERS, OTHERS, place.first, ROWS)) tile++;
            return tile;
        };
        auto load = [&](int tile, int stage) {
            if (tile < end) q.template copy<false>(q_tile(stage), tile * OTHERS, p.q_len), d_o.template copy<false>(do_tile(stage), tile * OTHERS, p.d_o.data ? p.q_len : 0);
            commit_copies();
        };
        const ColumnRows stats{p, first_row(p, place.batch, head)};
        int tile = seek(range.begin / OTHERS), stage = 0;
        load(tile, stage);
        auto step = [&](auto masked) {
            constexpr bool MASKED = decltype(masked)::value;
            const int next = seek(tile + 1);
            wait_for_copies<0>();
            publish();
            if (STAGES == 2) load(next, stage ^ 1);
            Tiles<true> t(scores, place.first + own, tile * OTHERS);
            dot(t.s, k_tile, own, q_tile(stage));
            // wgmma goes on while the weights are computed; mma.sync does not, and needs the registers.
            if (OF_KEYS && IS_ASYNC) dot(t.ds, v_tile, own, do_tile(stage));
            wait_for_products<OF_KEYS>();
            done(t.s);
            t.template weights<MASKED>(stats, scale_log2);
            if constexpr (OF_VALUES) accumulate<OTHERS, VALUE_DIM>(dv, t.s, do_tile(stage));
            if constexpr (OF_KEYS) {
                if (!IS_ASYNC) dot(t.ds, v_tile, own, do_tile(stage));
                wait_for_products<OF_VALUES>();
                done(t.ds);
                t.template gradients<MASKED>(stats);
                accumulate<OTHERS, HEAD_DIM>(dk, t.ds, q_tile(stage));
            }
            wait_for_products<0>();
            if constexpr (OF_VALUES) done(dv);
            if constexpr (OF_KEYS) done(dk);
            if (STAGES == 1) __syncthreads(), load(next, stage);
            else stage ^= 1;
            tile = next;
        };
        for (;;) {
            if (PLAIN) while (tile < end && tile * OTHERS >= range.full_begin && (tile + 1) * OTHERS <= range.full_end) step(No{});
            if (tile >= end) break;
            step(Yes{});
        }
        wait_for_copies<0>();
        __syncthreads();
    }
    bool careful = false;
    if constexpr (OF_KEYS) careful |= store(p.dk, place.batch, place.head, place.first + own, p.kv_len, p.head_dim, dk, p.scale);
    if constexpr (OF_VALUES) careful |= store(p.dv, place.batch, place.head, place.first + own, p.kv_len, p.value_dim, dv, 1.0f);
    careful = __syncthreads_or(careful);
    // If there are two passes, the second adds its rows to those of the first.
    if (threadIdx.x == 0) store_global(p.careful + blockIdx.x, uint8_t(careful || (PARTS == 2 && load_global(p.careful + blockIdx.x))));
}

KERNEL(backward_queries, THREADS) {
    SHARED_MEMORY(shared);
    const Place place(blockIdx.x, p.q_len, ROWS, p.heads, true);
    const int own = threadIdx.x / 32 * WARP_ROWS, kv_head = place.head / (p.heads / p.kv_heads);
    const Own q_tile{shared};
    const OwnValues do_tile{shared + Own::BYTES};
    const uint32_t others = do_tile.address + OwnValues::BYTES;
    auto k_tile = [&](int stage) { return Other{others + stage * (Other::BYTES + OtherValues::BYTES)}; };
    auto v_tile = [&](int stage) { return OtherValues{k_tile(stage).address + Other::BYTES}; };
    Source<HEAD_DIM>(p.q, place.batch, place.head, p.head_dim).template copy<false>(q_tile, place.first, p.q_len);
    Source<VALUE_DIM>(p.d_o, place.batch, place.head, p.value_dim).template copy<false>(do_tile, place.first, p.d_o.data ? p.q_len : 0);
    const Source<HEAD_DIM> k(p.k, place.batch, kv_head, p.head_dim);
    const Source<VALUE_DIM> v(p.v, place.batch, kv_head, p.value_dim);
    const Scores scores(p, place.batch, place.head);
    const Range range = scores.limits.keys_of(place.first, ROWS);
    const int end = range.begin < range.end ? (range.end - 1) / OTHERS + 1 : 0;
    auto seek = [&](int tile) {
        if (!PLAIN) while (tile < end && !map_shows(p, place.batch, place.head, place.first, ROWS, tile * OTHERS, OTHERS)) tile++;
        return tile;
    };
    auto load = [&](int tile, int stage) {
        if (tile < end) k.template copy<false>(k_tile(stage), tile * OTHERS, p.kv_len), v.template copy<false>(v_tile(stage), tile * OTHERS, p.kv_len);
        commit_copies();
    };
    const OwnRows stats(p, place.batch, place.head, place.first + own);
    float dq[TILES][HEAD_DIM / 2] = {};
    const float scale_log2 = p.scale * LOG2E;
    int tile = seek(range.begin / OTHERS), stage = 0;
    load(tile, stage);
    auto step = [&](auto masked) {
        constexpr bool MASKED = decltype(masked)::value;
        const int next = seek(tile + 1);
        wait_for_copies<0>();
        publish();
        if (STAGES == 2) load(next, stage ^ 1);
        Tiles<false> t(scores, place.first + own, tile * OTHERS);
        dot(t.s, q_tile, own, k_tile(stage));
        if (IS_ASYNC) dot(t.ds, do_tile, own, v_tile(stage));
        wait_for_products<1>();
        done(t.s);
        t.template weights<MASKED>(stats, scale_log2);
        if (!IS_ASYNC) dot(t.ds, do_tile, own, v_tile(stage));
        wait_for_products<0>();
        done(t.ds);
        t.template gradients<MASKED>(stats);
        accumulate<OTHERS, HEAD_DIM>(dq, t.ds, k_tile(stage));
        wait_for_products<0>();
        done(dq);
        if (STAGES == 1) __syncthreads(), load(next, stage);
        else stage ^= 1;
        tile = next;
    };
    for (;;) {
        if (PLAIN) while (tile < end && tile * OTHERS >= range.full_begin && (tile + 1) * OTHERS <= range.full_end) step(No{});
        if (tile >= end) break;
        step(Yes{});
    }
    wait_for_copies<0>();
    const bool careful = __syncthreads_or(store(p.dq, place.batch, place.head, place.first + own, p.q_len, p.head_dim, dq, p.scale));
    if (threadIdx.x == 0) store_global(p.careful + blockIdx.x, uint8_t(careful));
}
