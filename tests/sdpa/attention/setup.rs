//! Sizes, inputs and options that several tests share.

use candle_attention::{AttentionOptions, AttentionOutput, Mask, scaled_dot_product_attention};
use candle_core::{DType, Result, Tensor, Var};
use proptest::prelude::*;

use crate::common::{Random, assert_same_bits, randn, var};

/// The tolerance for f64 results that are mathematically equal.
pub const F64: f64 = 1e-12;

/// The sizes of a problem.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub head_dim: usize,
    pub value_dim: usize,
}

/// Two sequences, four heads in two groups, 5 queries, 7 keys.
pub const SIZES: Sizes = Sizes { batch: 2, heads: 4, kv_heads: 2, q_len: 5, kv_len: 7, head_dim: 6, value_dim: 3 };

impl Sizes {
    pub fn query(&self) -> [usize; 4] {
        [self.batch, self.heads, self.q_len, self.head_dim]
    }

    pub fn key(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.kv_len, self.head_dim]
    }

    pub fn value(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.kv_len, self.value_dim]
    }

    pub fn scores(&self) -> [usize; 4] {
        [self.batch, self.heads, self.q_len, self.kv_len]
    }

    /// Random query, key and value.
    pub fn tensors(&self, seed: u64, dtype: DType) -> [Tensor; 3] {
        let shapes = [(seed, self.query()), (seed + 1000, self.key()), (seed + 2000, self.value())];
        shapes.map(|(seed, shape)| randn(seed, &shape, dtype).unwrap())
    }

    /// The same numbers as variables.
    pub fn vars(&self, seed: u64, dtype: DType) -> [Var; 3] {
        self.tensors(seed, dtype).map(|x| Var::from_tensor(&x).unwrap())
    }
}

/// Small random sizes, none of them 0.
pub fn sizes() -> impl Strategy<Value = Sizes> {
    let counts = (1..=3usize, 1..=3usize, 1..=2usize);
    let lengths = (1..=6usize, 1..=7usize, 1..=5usize, 1..=5usize);
    (counts, lengths).prop_map(|((batch, kv_heads, group), (q_len, kv_len, head_dim, value_dim))| Sizes {
        batch,
        heads: kv_heads * group,
        kv_heads,
        q_len,
        kv_len,
        head_dim,
        value_dim,
    })
}

/// Fewer cases than proptest's 256, since each computes attention several times. Failures are not stored in files.
pub fn few() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) }
}

/// Options that request every result.
pub fn all_results() -> AttentionOptions {
    AttentionOptions { return_weights: true, return_logsumexp: true, ..Default::default() }
}

/// Options with everything at once, for these sizes.
pub fn everything(sizes: &Sizes, seed: u64, dtype: DType) -> AttentionOptions {
    let mut random = Random::new(seed);
    let lengths: Vec<usize> = (0..sizes.batch).map(|_| random.below(sizes.kv_len + 1)).collect();
    AttentionOptions {
        scale: Some(0.8),
        softcap: Some(2.5),
        attn_mask: Mask::causal() & Mask::key_lengths(&lengths),
        attn_bias: Some(randn(seed + 1, &[sizes.heads, 1, sizes.kv_len], dtype).unwrap()),
        alibi_slopes: Some(randn(seed + 2, sizes.heads, dtype).unwrap()),
        sinks: Some(randn(seed + 3, sizes.heads, dtype).unwrap()),
        dropout_p: 0.3,
        dropout_seed: seed,
        ..all_results()
    }
}

pub fn attend(inputs: &[Tensor; 3], options: &AttentionOptions) -> Result<AttentionOutput> {
    Ok(scaled_dot_product_attention(&inputs[0], &inputs[1], &inputs[2], options)?)
}

pub fn attend_vars(vars: &[Var; 3], options: &AttentionOptions) -> Result<AttentionOutput> {
    Ok(scaled_dot_product_attention(&vars[0], &vars[1], &vars[2], options)?)
}

pub fn weights(output: &AttentionOutput) -> &Tensor {
    output.weights.as_ref().expect("weights")
}

pub fn logsumexp(output: &AttentionOutput) -> &Tensor {
    output.logsumexp.as_ref().expect("log-sum-exp")
}

/// sum(x · c) for random c: a loss that depends on every element of x.
pub fn random_sum(x: &Tensor, seed: u64) -> Result<Tensor> {
    (x * randn(seed, x.shape(), x.dtype())?)?.sum_all()
}

/// Panics unless context, weights and log-sum-exp have the same bits. Weights and log-sum-exp may be missing.
#[track_caller]
pub fn assert_same_output(a: &AttentionOutput, b: &AttentionOutput) {
    assert_same_bits(&a.context, &b.context, "context");
    for (a, b, what) in [(&a.weights, &b.weights, "weights"), (&a.logsumexp, &b.logsumexp, "log-sum-exp")] {
        if let (Some(a), Some(b)) = (a, b) {
            assert_same_bits(a, b, what);
        }
    }
}

/// A variable of the given shape in f64.
pub fn var64(seed: u64, shape: &[usize]) -> Var {
    var(seed, shape, DType::F64).unwrap()
}
