// The careful pass: rows whose results aren't finite are computed again, in f64 and key by key. Nothing that is hidden is read, and no
// sum overflows. A result that is still not finite comes from what a visible key or query holds. As kernels/src/careful.rs.
//
// A block of threads looks at the flags of a few blocks of the fast pass and has the rows of those that have set one. A warp has one row
// at a time. Most often no flag is set, and then these launches are short: they have few blocks, however many the fast pass has.
#include "scores.cuh"

constexpr int WARPS = 4, COLUMNS = 256 / 32;  // of a lane, at most
constexpr double SMALLEST = 2.2250738585072014e-308;

template <class T> DEVICE T sum_of_lanes(T x) {
#pragma unroll
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}
DEVICE const Element *row_of(const Strided &tensor, int batch, int head, int row) {
    return static_cast<const Element *>(tensor.data) + batch * tensor.batch + head * tensor.head + row * tensor.row;
}
DEVICE double number(const Element *row, int column) { return widen(load_global(row + column)); }
DEVICE double dot(const Element *a, const Element *b, int dim) {
    double sum = 0;
    for (int c = 0; c < dim; c++) sum += number(a, c) * number(b, c);
    return sum;
}
// Whether a row has a number that isn't finite. All lanes get the answer.
DEVICE bool has_non_finite(const Element *row, int dim) {
    bool found = false;
    for (int c = threadIdx.x % 32; c < dim; c += 32) found |= !is_finite(widen(load_global(row + c)));
    return __any_sync(ALL_LANES, found);
}
// Writes sums in the place of numbers that aren't finite, or of all.
DEVICE void replace(const Element *row, int dim, const double (&sums)[COLUMNS], bool all) {
    for (int i = 0; i < COLUMNS; i++) {
        const int c = threadIdx.x % 32 + 32 * i;
        if (c < dim && (all || !is_finite(widen(load_global(row + c))))) store_global(const_cast<Element *>(row) + c, narrow(float(sums[i])));
    }
}
// sums += weight * row of each lane that has one, in the order of the lanes.
DEVICE void add_rows(double (&sums)[COLUMNS], double weight, bool has_row, const Strided &tensor, int batch, int head, int first, int dim) {
    uint32_t rows = __ballot_sync(ALL_LANES, has_row);
    for (int i = 0; i < 32; i++) {
        const double w = __shfl_sync(ALL_LANES, weight, i);
        if (!(rows >> i & 1)) continue;
        const Element *row = row_of(tensor, batch, head, first + i);
        for (int k = 0; k < COLUMNS; k++) {
            const int c = threadIdx.x % 32 + 32 * k;
            if (c < dim) sums[k] += w * number(row, c);
        }
    }
}

// One score of the backward pass: its weight, its gradient, and that of its product q · k.
struct Score { double weight, gradient, of_product; bool visible, kept; };
DEVICE Score score_of(const Scores &scores, int query, int key, int kv_head, double delta) {
    const Problem &p = scores.p;
    Score s{0, 0, 0, scores.visible(query, key), true};
    if (!s.visible) return s;
    const double product = dot(row_of(p.q, scores.batch, scores.head, query), row_of(p.k, scores.batch, kv_head, key), p.head_dim);
    s.weight = weight_of(p, first_row(p, scores.batch, scores.head) + query, scores.modified(product, query, key));
    if (s.weight < SMALLEST) s.weight = SMALLEST;
    s.kept = !p.dropout_threshold || is_kept(p, scores.batch, scores.head, query, key);
    const double dp = s.kept && p.d_o.data ? p.dropout_keep * dot(row_of(p.d_o, scores.batch, scores.head, query), row_of(p.v, scores.batch, kv_head, key), p.value_dim) : 0;
    s.gradient = s.weight * (dp - delta);
    // Beyond f32 a score no longer follows its product.
    if (!scores.overflows(product * p.scale)) s.of_product = s.gradient * (p.softcap > 0 ? scores.softcap_slope(product) : 1.0);
    return s;
}
DEVICE double delta_of(const Problem &p, int batch, int head, int query) {
    const double d_lse = p.d_lse ? load_global(p.d_lse + first_row(p, batch, head) + query) : 0.0f;
    return (p.d_o.data ? dot(row_of(p.o, batch, head, query), row_of(p.d_o, batch, head, query), p.value_dim) : 0) - d_lse;
}

// The greatest score and the sum of exponentials, so far.
struct Total {
    double largest, sum;
    DEVICE void add(double score, double weight) {
        if (score > largest) sum = sum * exp(largest - score), largest = score;
        sum += score == -INFINITY ? 0 : weight * exp(score - largest);
    }
};

DEVICE void forward_row(const Scores &scores, int query, int kv_head) {
    const Problem &p = scores.p;
    const int lane = threadIdx.x % 32;
    const Element *o = row_of(p.o, scores.batch, scores.head, query), *q = row_of(p.q, scores.batch, scores.head, query);
    const int64_t row = first_row(p, scores.batch, scores.head) + query;
    const float base = load_global(p.largest + row);
    const bool bad_statistics = !is_fine(p, base) || !is_finite(load_global(p.log_total + row));
    __syncwarp();
    if (!bad_statistics && !has_non_finite(o, p.value_dim)) return;
    const Range range = scores.limits.keys_of(query, 1);
    Total total{-INFINITY, 0};
    for (int key = range.begin + lane; key < range.end; key += 32)
        if (scores.visible(query, key)) total.add(scores.modified(dot(q, row_of(p.k, scores.batch, kv_head, key), p.head_dim), query, key), 1);
    for (int step = 16; step; step /= 2) {
        // Both lanes of a pair add in the same order.
        const Total other{__shfl_xor_sync(ALL_LANES, total.largest, step), __shfl_xor_sync(ALL_LANES, total.sum, step)};
        Total low = lane & step ? other : total;
        const Total high = lane & step ? total : other;
        low.add(high.largest, high.sum);
        total = low;
    }
    if (p.sinks) total.add(load_global(p.sinks + scores.head), 1);
    if (total.largest == -INFINITY && total.sum == 0) return;  // no visible key: the fast pass has written zeros

    double sums[COLUMNS] = {};
    for (int first = range.begin; first < range.end; first += 32) {
        const int key = first + lane;
        bool counts = key < range.end && scores.visible(query, key);
        double weight = 0;
        if (counts) {
            weight = exp(scores.modified(dot(q, row_of(p.k, scores.batch, kv_head, key), p.head_dim), query, key) - total.largest) / total.sum;
            if (weight < SMALLEST) weight = SMALLEST;
            if (p.dropout_threshold) counts = is_kept(p, scores.batch, scores.head, query, key), weight *= p.dropout_keep;
        }
        add_rows(sums, weight, counts, p.v, scores.batch, kv_head, first, p.value_dim);
    }
    replace(o, p.value_dim, sums, bad_statistics);
    __syncwarp();
    if (!bad_statistics || lane != 0) return;
    const double unit = PLAIN ? LN2 : 1.0, log_sum = log(total.sum), lse = total.largest + log_sum;
    const float largest = float(total.largest / unit);
    const bool fine = is_fine(p, largest);
    store_global(p.lse + row, lse);
    // NaN makes the backward pass compute the row carefully, too. Beside a score of 1e20 the logarithm of the sum is lost in `lse`.
    store_global(p.largest + row, fine ? largest : NAN);
    store_global(p.log_total + row, float((total.largest - (fine ? largest * unit : lse) + log_sum) / LN2));
}

// f(block) for every block of the fast pass that has set its flag; all blocks of this launch share them.
template <class F> DEVICE void for_flagged(const Problem &p, int blocks, F f) {
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x)
        if (load_global(p.careful + block)) f(int(block));
}
DEVICE int tiles_of(int len, int rows) { return (len + rows - 1) / rows; }

// f(scores, query, head of its keys) for every query of a flagged block.
template <class F> DEVICE void for_flagged_queries(const Problem &p, F f) {
    for_flagged(p, tiles_of(p.q_len, p.careful_queries) * p.heads * p.batch, [&](int block) {
        const Place place(block, p.q_len, p.careful_queries, p.heads, true);
        const Scores scores(p, place.batch, place.head);
        const int end = min(place.first + p.careful_queries, p.q_len);
        for (int query = place.first + threadIdx.x / 32; query < end; query += WARPS) f(scores, query, place.head / (p.heads / p.kv_heads));
    });
}

KERNEL(careful_forward, 128) {
    for_flagged_queries(p, [&](const Scores &scores, int query, int kv_head) { forward_row(scores, query, kv_head); });
}

DEVICE void gradients_of_query(const Scores &scores, int query, int kv_head) {
    const Problem &p = scores.p;
    const int lane = threadIdx.x % 32;
    const Element *dq = row_of(p.dq, scores.batch, scores.head, query);
    const int64_t row = first_row(p, scores.batch, scores.head) + query;
    const bool bad_slope = p.slope_rows && !is_finite(load_global(p.slope_rows + row));
    const bool bad_sink = p.sink_rows && !is_finite(load_global(p.sink_rows + row));
    __syncwarp();
    if (!bad_slope && !bad_sink && !has_non_finite(dq, p.head_dim)) return;
    const double delta = delta_of(p, scores.batch, scores.head, query);
    const Range range = scores.limits.keys_of(query, 1);
    double sums[COLUMNS] = {}, of_slope = 0;
    for (int first = range.begin; first < range.end; first += 32) {
        Score s{0, 0, 0, false, false};
        if (first + lane < range.end) s = score_of(scores, query, first + lane, kv_head, delta);
        if (s.visible) of_slope -= s.gradient * scores.distance(query, first + lane);
        add_rows(sums, s.of_product * p.scale, s.visible, p.k, scores.batch, kv_head, first, p.head_dim);
    }
    replace(dq, p.head_dim, sums, false);
    of_slope = sum_of_lanes(of_slope);
    if (lane == 0 && bad_slope) store_global(p.slope_rows + row, float(of_slope));
    if (lane == 0 && bad_sink) store_global(p.sink_rows + row, float(-weight_of(p, row, load_global(p.sinks + scores.head)) * delta));
}

KERNEL(careful_queries, 128) {
    for_flagged_queries(p, [&](const Scores &scores, int query, int kv_head) { gradients_of_query(scores, query, kv_head); });
}

DEVICE void gradients_of_key(const Problem &p, int batch, int kv_head, int key) {
    const int lane = threadIdx.x % 32, heads = p.heads / p.kv_heads;
    const Element *dk = row_of(p.dk, batch, kv_head, key), *dv = row_of(p.dv, batch, kv_head, key);
    if (!has_non_finite(dk, p.head_dim) && !has_non_finite(dv, p.value_dim)) return;
    double of_key[COLUMNS] = {}, of_value[COLUMNS] = {};
    for (int head = kv_head * heads; head < (kv_head + 1) * heads; head++) {
        const Scores scores(p, batch, head);
        const Range range = scores.limits.queries_of(key, 1);
        for (int first = range.begin; first < range.end; first += 32) {
            const int query = first + lane;
            Score s{0, 0, 0, false, false};
            if (query < range.end && scores.visible(query, key)) s = score_of(scores, query, key, kv_head, delta_of(p, batch, head, query));
            add_rows(of_key, s.of_product * p.scale, s.visible, p.q, batch, head, first, p.head_dim);
            if (p.d_o.data) add_rows(of_value, s.weight * p.dropout_keep, s.visible && s.kept, p.d_o, batch, head, first, p.value_dim);
        }
    }
    replace(dk, p.head_dim, of_key, false);
    replace(dv, p.value_dim, of_value, false);
}

KERNEL(careful_keys, 128) {
    for_flagged(p, tiles_of(p.kv_len, p.careful_keys) * p.kv_heads * p.batch, [&](int block) {
        const Place place(block, p.kv_len, p.careful_keys, p.kv_heads, false);
        const int end = min(place.first + p.careful_keys, p.kv_len);
        for (int key = place.first + threadIdx.x / 32; key < end; key += WARPS) gradients_of_key(p, place.batch, place.head, key);
    });
}

// The gradient of one number of a bias: the sum over the scores that it was added to, which the lanes share.
DEVICE double gradient_of_bias(const Problem &p, const Part &part, int query, int key) {
    const int queries = p.bias_dims[2] == 1 ? p.q_len : 1, keys = p.bias_dims[3] == 1 ? p.kv_len : 1;
    double sum = 0;
    for (int batch = part.from[0]; batch < part.to[0]; batch++)
        for (int head = part.from[1]; head < part.to[1]; head++) {
            const Scores scores(p, batch, head);
            for (int64_t i = threadIdx.x % 32; i < int64_t(queries) * keys; i += 32) {
                const int of_query = query + int(i / keys), of_key = key + int(i % keys);
                if (scores.visible(of_query, of_key)) sum += score_of(scores, of_query, of_key, head / (p.heads / p.kv_heads), delta_of(p, batch, head, of_query)).gradient;
            }
        }
    return sum_of_lanes(sum);
}

KERNEL(careful_bias, 128) {
    const Part all(p, 0, p.bias_dims, p.careful_queries, p.careful_keys);
    for_flagged(p, all.count, [&](int block) {
        const Part part(p, block, p.bias_dims, p.careful_queries, p.careful_keys);
        const int rows = p.bias_dims[2] == 1 ? 1 : part.to[2] - part.from[2], columns = p.bias_dims[3] == 1 ? 1 : part.to[3] - part.from[3];
        const int batch = p.bias_dims[0] == 1 ? 0 : part.from[0], head = p.bias_dims[1] == 1 ? 0 : part.from[1];
        for (int i = threadIdx.x / 32; i < rows * columns; i += WARPS) {
            const int row = part.from[2] + i / columns, column = part.from[3] + i % columns;
            float *to = p.d_bias + ((int64_t(batch) * p.bias_dims[1] + head) * p.bias_dims[2] + row) * p.bias_dims[3] + column;
            const bool wrong = !is_finite(load_global(to));
            __syncwarp();
            if (!wrong) continue;
            const double sum = gradient_of_bias(p, part, row, column);
            if (threadIdx.x % 32 == 0) store_global(to, float(sum));
        }
    });
}
