// What happens to a score between the product and the softmax, and which scores there are: softcap, bias, ALiBi, mask, dropout. As
// kernels/src/score_mods.rs, mask/ and dropout.rs.
#pragma once
#include "problem.cuh"

// The part of the results of block `block` of threads: rows `first` on of a head of a sequence.
struct Place {
    int first, head, batch;
    // The last rows come first: a causal mask gives them the most work.
    DEVICE Place(int block, int len, int rows, int heads, bool last_first) {
        const int tiles = (len + rows - 1) / rows, tile = block % tiles, rest = block / tiles;
        first = (last_first ? tiles - 1 - tile : tile) * rows, head = rest % heads, batch = rest / heads;
    }
};

// The first query of a head, where a number for each query is kept: (batch, heads, q_len).
DEVICE int64_t first_row(const Problem &p, int batch, int head) { return (int64_t(batch) * p.heads + head) * p.q_len; }

// What the backward pass needs of a row: its greatest score, minus infinity without visible keys, and the sum of the exponentials.
DEVICE void store_statistics(const Problem &p, int64_t row, float largest, float total) {
    const bool empty = largest == -INFINITY;
    const float log_total = empty ? 0.0f : log2f(total);
    store_global(p.largest + row, empty ? INFINITY : largest);
    store_global(p.log_total + row, log_total);
    store_global(p.lse + row, empty ? -double(INFINITY) : largest * (PLAIN ? LN2 : 1.0) + log_total * LN2);
}

// Whether f32 is fine enough for a row whose greatest score is this: from 2^24 on, numbers next to each other are more than 1 apart, and
// what is rounded off would multiply a weight by e. The careful pass computes such a row in f64. With a bias all passes round the
// scores to f32: where it makes all of a row's scores low, as a mask of low numbers does, nothing would be gained.
DEVICE bool is_fine(const Problem &p, float largest) { return fabsf(largest) < 16777216.0f || (p.bias && largest < 0 && largest >= LOWEST); }

// The weight of a score, in f64. A score of f64 may be above the greatest one as f32 rounded it, and a weight is at most 1.
DEVICE double weight_of(const Problem &p, int64_t row, double score) {
    const float largest = load_global(p.largest + row);
    const double base = is_finite(largest) ? largest * (PLAIN ? LN2 : 1.0) : load_global(p.lse + row);
    const double weight = exp(score - base - load_global(p.log_total + row) * LN2);
    return weight > 1 ? 1 : weight;
}

// The scores that a block of threads sums up for a tile of a result (dims), each of whose axes is that of the scores or has length 1: of each
// axis the first index, and behind the last.
struct Part {
    int from[4], to[4];
    int count = 1;  // of all parts
    DEVICE Part(const Problem &p, int block, const int (&dims)[4], int rows, int columns) {
        const int lens[4] = {p.batch, p.heads, p.q_len, p.kv_len}, steps[4] = {1, 1, rows, columns};
        int rest = block;
#pragma unroll
        for (int axis = 3; axis >= 0; axis--) {
            const bool all = dims[axis] == 1;
            const int parts = all ? 1 : (lens[axis] + steps[axis] - 1) / steps[axis];
            from[axis] = all ? 0 : rest % parts * steps[axis], to[axis] = all ? lens[axis] : min(from[axis] + steps[axis], lens[axis]);
            rest /= parts, count *= parts;
        }
    }
};

// A range of keys or of queries, and inside it the part that needs no mask.
struct Range { int begin, end, full_begin, full_end; };

DEVICE int clamp_index(int64_t x, int end) { return x < 0 ? 0 : x > end ? end : int(x); }

// The limits of the mask for one sequence.
struct Limits {
    int offset, below, above, keys, always, q_len, kv_len;

    DEVICE Limits(const Problem &p, int batch) : below(p.mask.below), above(p.mask.above), always(p.mask.always), q_len(p.q_len), kv_len(p.kv_len) {
        offset = p.mask.offsets ? load_global(p.mask.offsets + batch) : p.mask.offset;
        keys = p.mask.lengths ? load_global(p.mask.lengths + batch) : p.mask.keys;
    }
    // Sizes and offsets are at most 2^30, so that nothing overflows. Without branches, of which a tile of scores would have hundreds.
    DEVICE bool allow(int query, int key) const {
        const int distance = key - (query + offset);
        return ((distance <= above) & (distance >= -below) & (key < keys)) | (key >= always);
    }
    // The keys that some query of first..first + count may see.
    DEVICE Range keys_of(int first, int count) const {
        const int64_t from = int64_t(first) + offset, to = int64_t(first + count < q_len ? first + count : q_len) - 1 + offset;
        Range r{clamp_index(from - below, kv_len), clamp_index(to + above + 1, keys), clamp_index(to - below, kv_len), clamp_index(from + above + 1, keys)};
        if (always < kv_len) r.begin = r.begin < always ? r.begin : always, r.end = kv_len;
        return r;
    }
    // The queries that may see some key of first..first + count.
    DEVICE Range queries_of(int first, int count) const {
        const int end = first + count < kv_len ? first + count : kv_len;
        const int64_t from = int64_t(first) - offset, to = int64_t(end) - 1 - offset;
        Range r{clamp_index(from - above, q_len), clamp_index(to + below + 1, q_len), clamp_index(to - above, q_len), clamp_index(from + below + 1, q_len)};
        if (first >= keys) r.end = r.begin;
        if (end > keys) r.full_end = r.full_begin;
        if (end > always) r.begin = 0, r.end = q_len;
        return r;
    }
};

// Whether any query of a tile may see any key of it, as the map says.
DEVICE bool map_shows(const Problem &p, int batch, int head, int query, int queries, int key, int keys) {
    if (!p.mask.map) return true;
    const uint8_t *map = p.mask.map + batch * p.mask.map_strides[0] + head * p.mask.map_strides[1];
    const int columns = (p.kv_len + MAP_BLOCK - 1) / MAP_BLOCK;
    const int last_query = min(query + queries, p.q_len), last_key = min(key + keys, p.kv_len);
    for (int i = query / MAP_BLOCK; i * MAP_BLOCK < last_query; i++)
        for (int j = key / MAP_BLOCK; j * MAP_BLOCK < last_key; j++)
            if (load_global(map + int64_t(i) * columns + j)) return true;
    return false;
}

// One head of one sequence: everything that its scores depend on.
struct Scores {
    const Problem &p;
    const Limits limits;
    const int batch, head;
    const float *bias;
    const uint8_t *table;
    const int *query_documents, *key_documents;
    float slope;

    DEVICE Scores(const Problem &p, int batch, int head) : p(p), limits(p, batch), batch(batch), head(head) {
        bias = p.bias ? p.bias + batch * p.bias_strides[0] + head * p.bias_strides[1] : nullptr;
        table = p.mask.table ? p.mask.table + batch * p.mask.table_strides[0] + head * p.mask.table_strides[1] : nullptr;
        query_documents = p.mask.query_documents ? p.mask.query_documents + batch * p.mask.documents_batch * p.q_len : nullptr;
        key_documents = p.mask.key_documents ? p.mask.key_documents + batch * p.mask.documents_batch * p.kv_len : nullptr;
        slope = p.slopes ? load_global(p.slopes + batch * p.slopes_batch + head) : 0;
    }
    DEVICE float bias_at(int query, int key) const { return load_global(bias + query * p.bias_strides[2] + key * p.bias_strides[3]); }
    DEVICE float distance(int query, int key) const { return fabsf(float(query + p.kv_len - p.q_len - key)); }

    // Whether a query sees a key: false outside the scores, and where the mask or a bias of minus infinity hides the key.
    DEVICE bool visible(int query, int key) const {
        bool seen = (query < p.q_len) & (key < p.kv_len) & limits.allow(query, key);
        const bool is_ruled = seen & (key < limits.always);
        if (query_documents) seen = seen && (!is_ruled || load_global(query_documents + query) == load_global(key_documents + key));
        if (table) seen = seen && (!is_ruled || load_global(table + query * p.mask.table_strides[2] + key * p.mask.table_strides[3]));
        if (bias) seen = seen && bias_at(query, key) != -INFINITY;
        return seen;
    }
    // The score of a visible key, of a product q · k. A product that overflowed becomes NaN, so that the careful pass computes it. A sum
    // with a bias stays a number, as a sum with the lowest number does.
    DEVICE float modified(float s, int query, int key) const {
        s *= p.scale;
        if (s == -INFINITY) return NAN;
        if (p.softcap > 0) s = p.softcap * tanhf(s / p.softcap);
        if (bias) s = infinity_to_lowest(s + bias_at(query, key));
        if (p.slopes) s = infinity_to_lowest(s - slope * distance(query, key));
        return s;
    }
    // Likewise in f64, with the sums rounded as in f32. A product beyond f32 becomes its greatest or lowest number, as on the CPU.
    DEVICE double modified(double s, int query, int key) const {
        s *= double(p.scale);
        if (overflows(s)) s = s > 0 ? -double(LOWEST) : double(LOWEST);
        if (p.softcap > 0) s = p.softcap * tanh(s / p.softcap);
        if (bias) s = rounded(s + bias_at(query, key));
        if (p.slopes) s = rounded(s - double(slope) * distance(query, key));
        return s;
    }
    // Of a finite number.
    static DEVICE bool overflows(double s) { return fabs(s) > -double(LOWEST) && fabs(s) < double(INFINITY); }
    static DEVICE double rounded(double s) {
        if (s < LOWEST) return LOWEST;
        return s <= -LOWEST ? double(float(s)) : s;
    }
    // What the softcap multiplies the gradient of a score by.
    template <class R> DEVICE R softcap_slope(R product) const {
        const R t = sizeof(R) == 8 ? R(tanh(double(product) * p.scale / p.softcap)) : R(tanhf(float(product) * p.scale / p.softcap));
        return 1 - t * t;
    }
};

// ---- Dropout
struct Random { uint32_t x[4]; };
// Philox4x32-10. Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 3.3.
DEVICE Random philox(uint64_t seed, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t first = uint64_t(0xD2511F53u) * a, second = uint64_t(0xCD9E8D57u) * c;
        a = uint32_t(second >> 32) ^ b ^ key0, b = uint32_t(second);
        c = uint32_t(first >> 32) ^ d ^ key1, d = uint32_t(first);
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return {{a, b, c, d}};
}
// The four numbers of the keys from 4 * block on.
DEVICE Random random_of(const Problem &p, int batch, int head, int query, int block) {
    const uint64_t row = p.dropout_first + uint64_t(batch) * p.heads + head;
    return philox(p.seed, uint32_t(block), uint32_t(query), uint32_t(row), uint32_t(row >> 32));
}
DEVICE bool is_kept(const Problem &p, int batch, int head, int query, int key) {
    return random_of(p, batch, head, query, key / 4).x[key % 4] >= p.dropout_threshold;
}

// What dropout multiplies a lane's four weights by: rows `query` and that + 8, columns `key` and the next. Two lanes share their numbers.
DEVICE void dropout_of_queries(const Problem &p, int batch, int head, int query, int key, float (&factors)[4]) {
    const bool odd = key / 2 % 2;
    const Random own = random_of(p, batch, head, query + (odd ? 8 : 0), key / 4);
    const uint32_t other0 = __shfl_xor_sync(ALL_LANES, own.x[odd ? 0 : 2], 1), other1 = __shfl_xor_sync(ALL_LANES, own.x[odd ? 1 : 3], 1);
    const uint32_t numbers[4] = {odd ? other0 : own.x[0], odd ? other1 : own.x[1], odd ? own.x[2] : other0, odd ? own.x[3] : other1};
#pragma unroll
    for (int e = 0; e < 4; e++) factors[e] = numbers[e] < p.dropout_threshold ? 0 : p.dropout_keep;
}
// Likewise where rows are keys: rows `key` and that + 8, columns `query` and the next. Four lanes share their numbers.
DEVICE void dropout_of_keys(const Problem &p, int batch, int head, int query, int key, float (&factors)[4]) {
    const int own = key % 4;
    const Random random = random_of(p, batch, head, query + own % 2, (key + own / 2 * 8) / 4);
    uint32_t numbers[4];
#pragma unroll
    for (int other = 0; other < 4; other++) {
        // Lane `own ^ other` of the four has the numbers of element `own ^ other`, and this lane needs the one of its key.
        uint32_t number = random.x[0];
#pragma unroll
        for (int i = 1; i < 4; i++) number = (own ^ other) == i ? random.x[i] : number;
        const uint32_t received = __shfl_xor_sync(ALL_LANES, number, 4 * other);
#pragma unroll
        for (int i = 0; i < 4; i++) numbers[i] = (own ^ other) == i ? received : numbers[i];
    }
#pragma unroll
    for (int e = 0; e < 4; e++) factors[e] = numbers[e] < p.dropout_threshold ? 0 : p.dropout_keep;
}
