// Attention: context = softmax(scores) · v, with an online softmax over tiles of keys. A block of threads has ROWS queries of a head and
// goes through the keys from the last to the first; a warp has WARP_ROWS of the queries.
//
// Source: Dao, "FlashAttention-2" (ICLR 2024), section 3.1; Shah et al., "FlashAttention-3" (NeurIPS 2024) for wgmma.
#include "scores.cuh"
#include "softmax.cuh"

using Queries = Tile<ROWS, HEAD_DIM>;
using Keys = Tile<KEYS, HEAD_DIM>;
using Values = Tile<KEYS, VALUE_DIM>;

// Softcap, bias, ALiBi and mask.
DEVICE void modify(const Scores &scores, float (&s)[TILES][NUMBERS], int first_query, int first_key) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < NUMBERS; i++) {
            const int query = first_query + m * 16 + i / 2 % 2 * 8 + lane / 4, key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (!PLAIN) s[m][i] = scores.visible(query, key) ? scores.modified(s[m][i], query, key) : -INFINITY;
            else s[m][i] = (key < scores.p.kv_len) & scores.limits.allow(query, key) ? s[m][i] : -INFINITY;
        }
}

// Weights that are dropped become zero. The others are divided by what is kept in the end.
DEVICE void drop(const Scores &scores, float (&s)[TILES][NUMBERS], int first_query, int first_key) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
            float factors[4];
            dropout_of_queries(scores.p, scores.batch, scores.head, first_query + m * 16 + lane / 4, first_key + j * 8 + lane % 4 * 2, factors);
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][4 * j + e] = factors[e] == 0 ? 0 : s[m][4 * j + e];
        }
}

// Writes the results of the lane's rows. Returns whether one of them needs the careful pass.
template <int M> DEVICE bool store(const Problem &p, const Place &place, int first_query, const float (&o)[TILES][M], const Softmax &softmax) {
    const int lane = threadIdx.x % 32;
    bool careful = false;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float total = sum_of_row(softmax.sum[m][half]);
            const int query = first_query + m * 16 + half * 8 + lane / 4;
            if (query >= p.q_len) continue;
            const float largest = softmax.largest[m][half];
            const bool empty = largest == -INFINITY;
            const float inverse = empty ? 0.0f : p.dropout_keep / total;
            Element *to = static_cast<Element *>(p.o.data) + place.batch * p.o.batch + place.head * p.o.head + query * p.o.row;
#pragma unroll
            for (int j = 0; j < M / 4; j++) {
                const float x = o[m][4 * j + 2 * half], y = o[m][4 * j + 2 * half + 1];
                careful |= !store_pair(to, j * 8 + lane % 4 * 2, p.value_dim, empty ? 0.0f : x * inverse, empty ? 0.0f : y * inverse);
            }
            // Without visible keys the row is empty; but scores that all overflowed look the same.
            careful |= empty || !is_fine(p, largest);
            if (lane % 4 == 0) store_statistics(p, first_row(p, place.batch, place.head) + query, largest, total);
        }
    return careful;
}

#ifdef SPECIALISED
#include "forward_specialised.cuh"
#else
KERNEL(attention_forward, THREADS) {
    SHARED_MEMORY(shared);
    const Place place(blockIdx.x, p.q_len, ROWS, p.heads, true);
    const int kv_head = place.head / (p.heads / p.kv_heads), own = threadIdx.x / 32 * WARP_ROWS;
    const Scores scores(p, place.batch, place.head);
    const Range range = scores.limits.keys_of(place.first, ROWS);
    const Queries q_tile{shared};
    const uint32_t others = shared + Queries::BYTES;
    auto k_tile = [&](int stage) { return Keys{others + stage * Keys::BYTES}; };
    auto v_tile = [&](int stage) { return Values{others + STAGES * Keys::BYTES + stage * Values::BYTES}; };
    const Source<HEAD_DIM> q(p.q, place.batch, place.head, p.head_dim), k(p.k, place.batch, kv_head, p.head_dim);
    const Source<VALUE_DIM> v(p.v, place.batch, kv_head, p.value_dim);

    const int first = range.begin / KEYS;
    // The next tile, from this one down, of which something is visible.
    auto seek = [&](int tile) {
        if (!PLAIN) while (tile >= first && !map_shows(p, place.batch, place.head, place.first, ROWS, tile * KEYS, KEYS)) tile--;
        return tile;
    };
    int tile = range.begin < range.end ? seek((range.end - 1) / KEYS) : first - 1;
    if (tile >= first) {
        q.copy<false>(q_tile, place.first, p.q_len);
        k.copy<false>(k_tile(0), tile * KEYS, p.kv_len);
        commit_copies();
    }
    float o[TILES][VALUE_DIM / 2] = {};
    Softmax softmax(!PLAIN && p.sinks ? load_global(p.sinks + place.head) : -INFINITY);
    const float scale_log2 = p.scale * LOG2E;

#ifdef HOPPER
    static_assert(!PLAIN && STAGES == 2, "without options the specialised kernel serves");
    // The products for the scores of a tile begin together with those for the context of the tile before, and a tile has one barrier. K of
    // two tiles ahead and V of one ahead are on their way. (ptxas puts the exponentials behind the wait for the context. To hold them
    // before it didn't pay as long as all warps meet for each tile: docs/gpu.md.)
    uint32_t weights[TILES][KEYS / 16][4];
    auto weigh = [&](float (&s)[TILES][NUMBERS], float (&shrink)[TILES][2], int key) {
        modify(scores, s, place.first + own, key);
        softmax.update<true>(s, shrink, scale_log2);
        if (p.dropout_threshold) drop(scores, s, place.first + own, key);
    };
    if (tile >= first) {
        v.copy<false>(v_tile(0), tile * KEYS, p.kv_len);
        commit_copies();
        int next = seek(tile - 1), stage = 0;
        if (next >= first) k.copy<true>(k_tile(1), next * KEYS, p.kv_len);
        commit_copies();
        wait_for_copies<2>();
        publish();
        {
            float s[TILES][NUMBERS], shrink[TILES][2];
            dot(s, q_tile, own, k_tile(0));
            wait_for_products<0>();
            done(s);
            weigh(s, shrink, tile * KEYS);
            as_operand<KEYS>(weights, s);
        }
        // Before a step, the tile before `next` has weights.
        while (next >= first) {
            const int second = seek(next - 1);
            wait_for_copies<0>();
            publish();
            if (second >= first) k.copy<true>(k_tile(stage), second * KEYS, p.kv_len);
            v.copy<true>(v_tile(stage ^ 1), next * KEYS, p.kv_len);
            commit_copies();
            float s[TILES][NUMBERS], shrink[TILES][2];
            dot(s, q_tile, own, k_tile(stage ^ 1));
            accumulate<KEYS, VALUE_DIM>(o, weights, v_tile(stage));
            wait_for_products<1>();
            done(s);
            weigh(s, shrink, next * KEYS);
            wait_for_products<0>();
            done(o);
            multiply_rows(o, shrink);
            as_operand<KEYS>(weights, s);
            next = second, stage ^= 1;
        }
        wait_for_copies<0>();
        publish();
        accumulate<KEYS, VALUE_DIM>(o, weights, v_tile(stage));
        wait_for_products<0>();
        done(o);
    }
#else
    static_assert(STAGES == 1, "K of the next tile takes the place of K as soon as the scores are there");
    auto step = [&](auto masked) {
        constexpr bool MASKED = decltype(masked)::value;
        const int next = seek(tile - 1), key = tile * KEYS;
        wait_for_copies<0>();
        publish();
        v.copy<!MASKED>(v_tile(0), key, p.kv_len);
        commit_copies();
        float s[TILES][NUMBERS];
        dot(s, q_tile, own, k_tile(0));
        wait_for_copies<0>();
        publish();
        if (next >= first) k.copy<true>(k_tile(0), next * KEYS, p.kv_len);
        commit_copies();
        if (MASKED) modify(scores, s, place.first + own, key);
        float shrink[TILES][2];
        softmax.update<MASKED>(s, shrink, scale_log2);
        multiply_rows(o, shrink);
        if (!PLAIN && p.dropout_threshold) drop(scores, s, place.first + own, key);
        accumulate<KEYS, VALUE_DIM>(o, s, v_tile(0));
        tile = next;
    };
    for (;;) {
        if (PLAIN) while (tile >= first && tile * KEYS >= range.full_begin && (tile + 1) * KEYS <= range.full_end) step(No{});
        if (tile < first) break;
        step(Yes{});
    }
#endif
    wait_for_copies<0>();
    const bool careful = __syncthreads_or(store(p, place, place.first + own, o, softmax));
    if (threadIdx.x == 0) store_global(p.careful + blockIdx.x, uint8_t(careful));
}
#endif
