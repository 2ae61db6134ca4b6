// The arguments of every kernel. kernels/src/cuda/problem.rs has the same struct: both sides assert its size.
#pragma once
#include "primitives.cuh"

// A tensor (batch, heads, len, dim) whose last axis is contiguous. Strides count elements.
struct Strided {
    void *data;
    int64_t batch, head, row;
};

// Query i of sequence b may attend to key j if j >= always, or if all of these hold: `position - below <= j <= position + above`
// where position = offset + i; j < keys; query and key have the same document; the table holds 1.
struct MaskRule {
    const int *offsets;         // one for each sequence, in place of `offset`; or null
    const int *lengths;         // one for each sequence, in place of `keys`; or null
    const int *query_documents, *key_documents;  // (batch or 1, q_len) and (batch or 1, kv_len); or null
    int64_t documents_batch;    // 0 or 1: whether each sequence has its own
    const uint8_t *table;       // 0 hides; or null
    int64_t table_strides[4];   // of sequence, head, query, key; 0 where the table broadcasts
    // What the rule says of blocks of MAP_BLOCK queries x MAP_BLOCK keys: 0 none visible, 1 some, 2 all. Null: the limits decide.
    const uint8_t *map;         // (batch or 1, heads or 1, blocks of queries, blocks of keys)
    int64_t map_strides[2];     // of sequence and head
    int offset, below, above, keys, always;
    int reserved;
};
constexpr int MAP_BLOCK = 64;

struct Problem {
    Strided q, k, v, o;              // o: the context
    Strided d_o, dq, dk, dv;
    float *largest;                  // (batch, heads, q_len) each: the greatest score and log2 of the sum of the exponentials. PLAIN: in
    float *log_total;                // units of ln 2. Infinity for a row without keys. NaN if the row needs the careful pass: then
    double *lse;                     // `log_total` is what rounding took from `lse`, the log-sum-exp, in units of ln 2
    float *delta;                    // backward: Σ o * d_o - d_lse of each row
    const float *d_lse;              // or null
    const float *bias;               // or null
    int64_t bias_strides[4];         // of sequence, head, query, key; 0 where the bias broadcasts
    float *d_bias;                   // contiguous, (bias_dims); or null
    const float *slopes;             // ALiBi, (heads) or (batch, heads); or null
    int64_t slopes_batch;            // 0 or heads
    float *slope_rows;               // (batch, heads, q_len): each row's part of the gradient of its slope; or null
    const float *sinks;              // (heads); or null
    float *sink_rows;                // (batch, heads, q_len), likewise; or null
    uint8_t *careful;                // one for each tile of a pass: 1 if a result isn't finite
    float *partial;                  // decode: (splits, batch, heads, q_len, VALUE_DIM + 2)
    MaskRule mask;
    uint64_t seed;                   // of dropout
    uint64_t dropout_first;          // heads of all sequences before these
    int bias_dims[4];
    int batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
    float scale, softcap;            // softcap 0 is none
    float dropout_keep;              // 1 / (1 - p)
    uint32_t dropout_threshold;      // 0 is no dropout
    int careful_queries, careful_keys;  // rows of a tile of the passes that set `careful`
    int splits;                      // decode: parts of the keys
};
static_assert(sizeof(Strided) == 32 && sizeof(MaskRule) == 128 && sizeof(Problem) == 616, "problem.rs");
