// A few queries and many keys: the keys are split, so that every multiprocessor has work, and the partial results are merged. The rows of a
// block of threads are the queries of all heads that share a head of keys: row r is query r % q_len of head r / q_len of these.
//
// Source: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference" (2023).
#include "scores.cuh"
#include "softmax.cuh"

using Queries = Tile<ROWS, HEAD_DIM>;
using Keys = Tile<KEYS, HEAD_DIM>;
using Values = Tile<KEYS, VALUE_DIM>;
static_assert(STAGES == 2, "keys and values of the next tile are copied while this one is computed");

// The rows of one head of keys.
struct Packed {
    int kv_head, q_len, heads;
    DEVICE Packed(const Problem &p, int kv_head) : kv_head(kv_head), q_len(p.q_len), heads(p.heads / p.kv_heads) {}
    DEVICE int count() const { return heads * q_len; }
    DEVICE int head(int row) const { return kv_head * heads + row / q_len; }
    DEVICE int query(int row) const { return row % q_len; }
};

// This thread's part of the copy of the queries.
DEVICE void copy_queries(const Problem &p, int batch, const Packed &rows, Queries tile, int first) {
    const Source<HEAD_DIM> source(p.q, batch, 0, p.head_dim);
    for (int row = threadIdx.x / 8; row < ROWS; row += THREADS / 8) {
        const int r = first + row, chunk = threadIdx.x % 8;
        const bool there = r < rows.count();
        const Element *from = static_cast<const Element *>(p.q.data) + batch * p.q.batch + (there ? rows.head(r) * p.q.head + rows.query(r) * p.q.row : 0) + chunk * CHUNK;
#pragma unroll
        for (int panel = 0; panel < HEAD_DIM / PANEL_COLUMNS; panel++)
            source.copy_chunk(tile.address + panel * tile.PANEL + row * 128 + (chunk ^ row % 8) * 16, from + panel * PANEL_COLUMNS, there ? p.head_dim - panel * PANEL_COLUMNS - chunk * CHUNK : 0);
    }
}

// Grid: tiles of rows, then splits, heads of keys, sequences. Writes the context that isn't divided by its sum yet, the greatest score and
// the sum of each row of each split: (splits, batch, heads, q_len, VALUE_DIM + 2).
KERNEL(decode_split, THREADS) {
    SHARED_MEMORY(shared);
    const int tiles = (p.heads / p.kv_heads * p.q_len + ROWS - 1) / ROWS;
    const int first_row = blockIdx.x % tiles * ROWS, split = blockIdx.x / tiles % p.splits, kv_head = blockIdx.x / tiles / p.splits % p.kv_heads, batch = blockIdx.x / tiles / p.splits / p.kv_heads;
    const int own = threadIdx.x / 32 * WARP_ROWS, lane = threadIdx.x % 32;
    const Packed rows(p, kv_head);
    // The keys that some query sees, in as many parts as there are splits.
    const Range range = Limits(p, batch).keys_of(0, p.q_len);
    const int first = range.begin / KEYS, count = range.begin < range.end ? (range.end - 1) / KEYS + 1 - first : 0;
    const int begin = first + int(int64_t(count) * split / p.splits), end = first + int(int64_t(count) * (split + 1) / p.splits);

    const Queries q_tile{shared};
    const uint32_t others = shared + Queries::BYTES;
    auto k_tile = [&](int stage) { return Keys{others + stage * Keys::BYTES}; };
    auto v_tile = [&](int stage) { return Values{others + 2 * Keys::BYTES + stage * Values::BYTES}; };
    const Source<HEAD_DIM> k(p.k, batch, kv_head, p.head_dim);
    const Source<VALUE_DIM> v(p.v, batch, kv_head, p.value_dim);
    auto load = [&](int tile) {
        if (tile < end) k.template copy<false>(k_tile(tile % 2), tile * KEYS, p.kv_len), v.template copy<false>(v_tile(tile % 2), tile * KEYS, p.kv_len);
        commit_copies();
    };
    if (begin < end) copy_queries(p, batch, rows, q_tile, first_row);
    load(begin);
    float o[TILES][VALUE_DIM / 2] = {};
    Softmax softmax;
    for (int tile = begin; tile < end; tile++) {
        wait_for_copies<0>();
        publish();
        load(tile + 1);
        float s[TILES][NUMBERS];
        dot(s, q_tile, own, k_tile(tile % 2));
        wait_for_products<0>();
        done(s);
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = first_row + own + m * 16 + half * 8 + lane / 4;
                const Scores scores(p, batch, row < rows.count() ? rows.head(row) : 0);
                const int query = row < rows.count() ? rows.query(row) : p.q_len;
#pragma unroll
                for (int i = 0; i < NUMBERS / 2; i++) {
                    float &x = s[m][i / 2 * 4 + 2 * half + i % 2];
                    const int key = tile * KEYS + i / 2 * 8 + lane % 4 * 2 + i % 2;
                    if (PLAIN) x = (query < p.q_len) & (key < p.kv_len) & scores.limits.allow(query, key) ? x : -INFINITY;
                    else x = scores.visible(query, key) ? scores.modified(x, query, key) : -INFINITY;
                }
            }
        float shrink[TILES][2];
        softmax.template update<true>(s, shrink, p.scale * LOG2E);
        multiply_rows(o, shrink);
        if (!PLAIN && p.dropout_threshold)
#pragma unroll
            for (int m = 0; m < TILES; m++)
#pragma unroll
                for (int i = 0; i < NUMBERS; i++) {
                    const int row = first_row + own + m * 16 + i / 2 % 2 * 8 + lane / 4, key = tile * KEYS + i / 4 * 8 + lane % 4 * 2 + i % 2;
                    if (row < rows.count() && !is_kept(p, batch, rows.head(row), rows.query(row), key)) s[m][i] = 0;
                }
        accumulate<KEYS, VALUE_DIM>(o, s, v_tile(tile % 2));
        wait_for_products<0>();
        done(o);
    }
    wait_for_copies<0>();
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = sum_of_row(softmax.sum[m][half]);
            const int row = first_row + own + m * 16 + half * 8 + lane / 4;
            if (row >= rows.count()) continue;
            float *to = p.partial + (((int64_t(split) * p.batch + batch) * p.heads + rows.head(row)) * p.q_len + rows.query(row)) * (VALUE_DIM + 2);
#pragma unroll
            for (int i = 0; i < VALUE_DIM / 4; i++) store_global(to + i / 2 * 8 + lane % 4 * 2 + i % 2, o[m][i / 2 * 4 + 2 * half + i % 2]);
            // A maximum passes over NaN, which is in the sum. Infinity makes the merge leave the row to the careful pass.
            if (lane % 4 == 0) store_global(to + VALUE_DIM, sum == sum ? softmax.largest[m][half] : INFINITY), store_global(to + VALUE_DIM + 1, sum);
        }
}

// A block of threads merges the splits of the queries of a head. `careful` has a number for each head of each sequence.
KERNEL(decode_merge, 128) {
    const int head = blockIdx.x % p.heads, batch = blockIdx.x / p.heads;
    const float unit = PLAIN ? 1.0f : LOG2E;
    bool careful = false;
    for (int query = 0; query < p.q_len; query++) {
        const int64_t row = first_row(p, batch, head) + query, stride = int64_t(p.batch) * p.heads * p.q_len * (VALUE_DIM + 2);
        const float *from = p.partial + row * (VALUE_DIM + 2);
        const float sink = !PLAIN && p.sinks ? load_global(p.sinks + head) : -INFINITY;
        float largest = sink;
        for (int split = 0; split < p.splits; split++) largest = fmaxf(largest, load_global(from + split * stride + VALUE_DIM));
        const bool empty = largest == -INFINITY;
        float total = sink == -INFINITY ? 0 : exp2_fast((sink - largest) * unit);
        for (int split = 0; split < p.splits; split++) {
            const float of_split = load_global(from + split * stride + VALUE_DIM);
            total += of_split == -INFINITY ? 0 : exp2_fast((of_split - largest) * unit) * load_global(from + split * stride + VALUE_DIM + 1);
        }
        Element *to = static_cast<Element *>(p.o.data) + batch * p.o.batch + head * p.o.head + query * p.o.row;
        for (int column = threadIdx.x; column < p.value_dim; column += 128) {
            float sum = 0;
            for (int split = 0; split < p.splits; split++) {
                const float of_split = load_global(from + split * stride + VALUE_DIM);
                if (of_split != -INFINITY) sum += exp2_fast((of_split - largest) * unit) * load_global(from + split * stride + column);
            }
            const Element rounded = narrow(empty ? 0.0f : sum * (p.dropout_keep / total));
            store_global(to + column, rounded);
            careful |= !is_finite(widen(rounded));
        }
        careful |= empty || !is_fine(p, largest);
        if (threadIdx.x == 0) store_statistics(p, row, largest, total);
    }
    careful = __syncthreads_or(careful);
    if (threadIdx.x == 0) store_global(p.careful + blockIdx.x, uint8_t(careful));
}
