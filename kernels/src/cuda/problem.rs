//! The arguments of every kernel, as `device/problem.cuh` has them. Both sides assert the sizes.

use std::mem::offset_of;

/// A tensor (batch, heads, len, dim) whose last axis is contiguous. Strides count elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawStrided {
    /// The address of the first element.
    pub data: u64,
    /// Elements between two sequences.
    pub batch: i64,
    /// Elements between two heads.
    pub head: i64,
    /// Elements between two rows.
    pub row: i64,
}

/// Which keys a query may attend to: key j if j >= `always`, or if all of these hold: position - `below` <= j <= position + `above`,
/// where position = `offset` + i; j < `keys`; query and key have the same document; the table holds 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawMask {
    /// i32, one for each sequence, in place of `offset`; or 0.
    pub offsets: u64,
    /// i32, one for each sequence, in place of `keys`; or 0.
    pub lengths: u64,
    /// i32 (batch or 1, q_len): the document of each query; or 0.
    pub query_documents: u64,
    /// i32 (batch or 1, kv_len), likewise.
    pub key_documents: u64,
    /// 1 if each sequence has its own documents, else 0.
    pub documents_batch: i64,
    /// u8; 0 hides. Or 0.
    pub table: u64,
    /// Of sequence, head, query and key; 0 where the table broadcasts.
    pub table_strides: [i64; 4],
    /// u8 (batch or 1, heads or 1, blocks of queries, blocks of keys): 0 none visible, 1 some, 2 all. 0: the limits decide.
    pub map: u64,
    /// Of sequence and head.
    pub map_strides: [i64; 2],
    /// The position of the first query among the keys.
    pub offset: i32,
    /// How far before the query's position keys may stand.
    pub below: i32,
    /// How far behind it.
    pub above: i32,
    /// How many keys there are.
    pub keys: i32,
    /// The first key that every query may attend to.
    pub always: i32,
    /// Padding: always 0.
    pub reserved: i32,
}

/// Queries and keys of a block of [`RawMask::map`].
pub const MAP_BLOCK: usize = 64;

/// The arguments of every kernel. An address of 0 is a tensor that isn't there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RawProblem {
    /// The query.
    pub q: RawStrided,
    /// The key.
    pub k: RawStrided,
    /// The value.
    pub v: RawStrided,
    /// The context.
    pub o: RawStrided,
    /// The gradient of the context.
    pub d_o: RawStrided,
    /// The gradient of the query.
    pub dq: RawStrided,
    /// The gradient of the key.
    pub dk: RawStrided,
    /// The gradient of the value.
    pub dv: RawStrided,
    /// f32 (batch, heads, q_len): the greatest score.
    pub largest: u64,
    /// f32, likewise: log2 of the sum of the exponentials.
    pub log_total: u64,
    /// f64, likewise: the log-sum-exp.
    pub lse: u64,
    /// f32, likewise: Σ context · gradient of the context, less the gradient of the log-sum-exp.
    pub delta: u64,
    /// f32, likewise: the gradient of the log-sum-exp; or 0.
    pub d_lse: u64,
    /// f32; or 0.
    pub bias: u64,
    /// Of sequence, head, query and key; 0 where the bias broadcasts.
    pub bias_strides: [i64; 4],
    /// f32, contiguous: the gradient of the bias; or 0.
    pub d_bias: u64,
    /// f32 (heads) or (batch, heads): ALiBi; or 0.
    pub slopes: u64,
    /// 0 or heads.
    pub slopes_batch: i64,
    /// f32 (batch, heads, q_len): each row's part of the gradient of its slope; or 0.
    pub slope_rows: u64,
    /// f32 (heads); or 0.
    pub sinks: u64,
    /// f32 (batch, heads, q_len): each row's part of the gradient of its sink; or 0.
    pub sink_rows: u64,
    /// u8, one for each tile of a pass: 1 if a result isn't finite.
    pub careful: u64,
    /// f32 (splits, batch, heads, q_len, VALUE_DIM + 2), of decoding: the results of each part of the keys.
    pub partial: u64,
    /// Which keys are visible.
    pub mask: RawMask,
    /// Of dropout.
    pub seed: u64,
    /// Of dropout: heads of all sequences before these.
    pub dropout_first: u64,
    /// The sizes of the bias.
    pub bias_dims: [i32; 4],
    /// Sequences.
    pub batch: i32,
    /// Query heads.
    pub heads: i32,
    /// Heads of key and value.
    pub kv_heads: i32,
    /// Queries of a sequence.
    pub q_len: i32,
    /// Keys of a sequence.
    pub kv_len: i32,
    /// Columns of query and key.
    pub head_dim: i32,
    /// Columns of the value.
    pub value_dim: i32,
    /// What the dot products are multiplied by.
    pub scale: f32,
    /// 0 is none.
    pub softcap: f32,
    /// 1 / (1 - p).
    pub dropout_keep: f32,
    /// 0 is no dropout.
    pub dropout_threshold: u32,
    /// Rows of a tile of the pass over queries that sets `careful`.
    pub careful_queries: i32,
    /// Rows of a tile of the pass over keys that sets `careful`.
    pub careful_keys: i32,
    /// Parts of the keys, of decoding.
    pub splits: i32,
}

const _: () = {
    assert!(size_of::<RawStrided>() == 32 && size_of::<RawMask>() == 128 && size_of::<RawProblem>() == 616);
    assert!(offset_of!(RawMask, table_strides) == 48 && offset_of!(RawMask, map) == 80);
    assert!(offset_of!(RawMask, offset) == 104 && offset_of!(RawMask, always) == 120);
    assert!(offset_of!(RawProblem, largest) == 256 && offset_of!(RawProblem, bias) == 296);
    assert!(offset_of!(RawProblem, d_bias) == 336 && offset_of!(RawProblem, careful) == 384);
    assert!(offset_of!(RawProblem, mask) == 400 && offset_of!(RawProblem, seed) == 528);
    assert!(offset_of!(RawProblem, batch) == 560 && offset_of!(RawProblem, scale) == 588);
    assert!(offset_of!(RawProblem, careful_queries) == 604);
};
