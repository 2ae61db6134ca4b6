// What the kernels of the backward pass share: weights and gradients of a tile of scores, computed again as the forward pass did.
#pragma once
#include "engine.cuh"
#include "scores.cuh"

using Own = Tile<ROWS, HEAD_DIM>;
using OwnValues = Tile<ROWS, VALUE_DIM>;
using Other = Tile<OTHERS, HEAD_DIM>;
using OtherValues = Tile<OTHERS, VALUE_DIM>;
constexpr int NUMBERS = OTHERS / 2;      // of a lane, for each of its row tiles
constexpr float TINY = 1.1754944e-38f;   // above zero, so that what a visible key holds shows

// What the forward pass has left of a query. Behind the last query, and without visible keys, the weights become zero.
struct Row {
    float largest, log_total, delta;
    // `ALL`: the query is one of the q_len.
    template <bool ALL> static DEVICE Row of(const Problem &p, int64_t first, int query) {
        Row row;
        row.read<ALL>(p, first, query);
        return row;
    }
    template <bool ALL> DEVICE void read(const Problem &p, int64_t first, int query) {
        largest = INFINITY, log_total = 0, delta = 0;
        if (ALL || query < p.q_len) largest = load_global(p.largest + first + query), log_total = load_global(p.log_total + first + query), delta = load_global(p.delta + first + query);
    }
};

// Weights and gradients of a tile of scores, of which a lane has rows `first_row` + 0 and 8 and so on. The gradients are those of the
// products q · k, or those of the scores behind the softcap, which are those of a bias.
template <bool ROWS_ARE_KEYS, bool OF_PRODUCTS = true> struct Tiles {
    const Scores &scores;
    int first_row, first_column;  // of this lane
    float s[TILES][NUMBERS], ds[TILES][NUMBERS];
    float p[PLAIN ? 1 : TILES][PLAIN ? 1 : NUMBERS];  // the weights before dropout, times the slope of the softcap if OF_PRODUCTS

    DEVICE Tiles(const Scores &scores, int row, int column) : scores(scores), first_row(row + threadIdx.x % 32 / 4), first_column(column + threadIdx.x % 4 * 2) {}

    // f(m, number, query, key, statistics of the query) for every number.
    template <bool MASKED, class Stats, class F> DEVICE void for_each(Stats stats, F f) {
#pragma unroll
        for (int j = 0; j < OTHERS / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int column = first_column + j * 8 + e;
                const Row of_column = stats.template of_column<!MASKED>(column);
#pragma unroll
                for (int m = 0; m < TILES; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int row = first_row + m * 16 + half * 8;
                        f(m, 4 * j + 2 * half + e, ROWS_ARE_KEYS ? column : row, ROWS_ARE_KEYS ? row : column, ROWS_ARE_KEYS ? of_column : stats.of_row(m, half));
                    }
            }
    }
    // Weights, after dropout, in place of the products in `s`.
    template <bool MASKED, class Stats> DEVICE void weights(Stats stats, float scale_log2) {
        for_each<MASKED>(stats, [&](int m, int i, int query, int key, const Row &row) {
            float &x = s[m][i];
            if constexpr (PLAIN) {
                x = exp2_fast((x * scale_log2 - row.largest) - row.log_total);
                if (MASKED) x = (key < scores.p.kv_len) & scores.limits.allow(query, key) ? (x < TINY ? TINY : x) : 0;
            } else {
                const bool visible = row.largest != INFINITY && scores.visible(query, key);
                float weight = visible ? exp2_fast((scores.modified(x, query, key) - row.largest) * LOG2E - row.log_total) : 0;
                if (visible && weight < TINY) weight = TINY;
                p[m][i] = OF_PRODUCTS && visible && scores.p.softcap > 0 ? weight * scores.softcap_slope(x) : weight;
                x = weight;
            }
        });
        if (!PLAIN && scores.p.dropout_threshold) drop();
    }
    DEVICE void drop() {
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int j = 0; j < OTHERS / 8; j++) {
                float factors[4];
                const int row = first_row + m * 16, column = first_column + j * 8;
                if (ROWS_ARE_KEYS) dropout_of_keys(scores.p, scores.batch, scores.head, column, row, factors);
                else dropout_of_queries(scores.p, scores.batch, scores.head, row, column, factors);
#pragma unroll
                for (int e = 0; e < 4; e++) s[m][4 * j + e] = factors[e] == 0 ? 0 : s[m][4 * j + e] * factors[e];
            }
    }
    // Gradients of the scores in place of those of the weights in `ds`. What is hidden has none, whatever its key holds.
    template <bool MASKED, class Stats> DEVICE void gradients(Stats stats) {
        for_each<MASKED>(stats, [&](int m, int i, int, int, const Row &row) {
            float &x = ds[m][i];
            if constexpr (PLAIN) {
                x = MASKED && s[m][i] == 0 ? 0 : s[m][i] * (x - row.delta);
            } else {
                const float dp = scores.p.dropout_threshold ? (s[m][i] == 0 ? 0 : x * scores.p.dropout_keep) : x;
                x = p[m][i] == 0 ? 0 : p[m][i] * (dp - row.delta);
            }
        });
    }
};

// Writes a warp's rows. Returns whether one of their numbers isn't finite.
template <int M> DEVICE bool store(const Strided &tensor, int batch, int head, int first, int len, int dim, const float (&acc)[TILES][M], float factor) {
    const int lane = threadIdx.x % 32;
    bool careful = false;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first + m * 16 + half * 8 + lane / 4;
            if (row >= len) continue;
            Element *to = static_cast<Element *>(tensor.data) + batch * tensor.batch + head * tensor.head + row * tensor.row;
#pragma unroll
            for (int j = 0; j < M / 4; j++) {
                careful |= !store_pair(to, j * 8 + lane % 4 * 2, dim, acc[m][4 * j + 2 * half] * factor, acc[m][4 * j + 2 * half + 1] * factor);
            }
        }
    return careful;
}

// The statistics of the lane's own rows.
struct OwnRows {
    Row rows[TILES][2];
    DEVICE OwnRows(const Problem &p, int batch, int head, int first) {
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) rows[m][half].read<false>(p, first_row(p, batch, head), first + m * 16 + half * 8 + threadIdx.x % 32 / 4);
    }
    template <bool ALL> DEVICE Row of_column(int) const { return Row{}; }
    DEVICE const Row &of_row(int m, int half) const { return rows[m][half]; }
};

// The statistics of queries in the columns.
struct ColumnRows {
    const Problem &p;
    int64_t first;
    template <bool ALL> DEVICE Row of_column(int query) const { return Row::of<ALL>(p, first, query); }
    DEVICE Row of_row(int, int) const { return Row{}; }
};
