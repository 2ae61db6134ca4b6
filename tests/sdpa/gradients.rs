//! Gradients of every input that can train, compared with central finite differences in f64.
//!
//! The loss is sum(context · c1) + sum(weights · c2) + sum(logsumexp · c3) with random c's: all three together, and
//! each alone.

use candle_attention::{AttentionOptions, Backend, Mask, scaled_dot_product_attention};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::common::{check_gradients, randn, var};

/// The bound on |analytic - numeric| / (1 + |numeric|). The finite differences themselves are precise to about 1e-9.
const TOLERANCE: f64 = 1e-6;

/// Sizes that all differ, so that a mix-up of two axes is noticed.
const BATCH: usize = 2;
const HEADS: usize = 4;
const Q_LEN: usize = 3;
const KV_LEN: usize = 5;
const HEAD_DIM: usize = 6;
const VALUE_DIM: usize = 7;

/// Which of the trained extras a case has.
#[derive(Default)]
struct Extras {
    bias: Option<&'static [usize]>,
    slopes: Option<&'static [usize]>,
    sinks: bool,
}

/// The variables of a case, with their names.
struct Inputs {
    query: Var,
    key: Var,
    value: Var,
    bias: Option<Var>,
    slopes: Option<Var>,
    sinks: Option<Var>,
}

impl Inputs {
    fn new(kv_heads: usize, extras: &Extras) -> Result<Self> {
        let optional = |seed, shape: Option<&[usize]>| shape.map(|shape| var(seed, shape, DType::F64)).transpose();
        Ok(Self {
            query: var(1, (BATCH, HEADS, Q_LEN, HEAD_DIM), DType::F64)?,
            key: var(2, (BATCH, kv_heads, KV_LEN, HEAD_DIM), DType::F64)?,
            value: var(3, (BATCH, kv_heads, KV_LEN, VALUE_DIM), DType::F64)?,
            bias: optional(4, extras.bias)?,
            slopes: optional(5, extras.slopes)?,
            sinks: optional(6, extras.sinks.then_some(&[HEADS]))?,
        })
    }

    fn named(&self) -> Vec<(&'static str, &Var)> {
        let mut named = vec![("query", &self.query), ("key", &self.key), ("value", &self.value)];
        named.extend(self.bias.as_ref().map(|var| ("attn_bias", var)));
        named.extend(self.slopes.as_ref().map(|var| ("alibi_slopes", var)));
        named.extend(self.sinks.as_ref().map(|var| ("sinks", var)));
        named
    }
}

/// The results from which the loss is computed.
#[derive(Debug)]
struct Terms {
    context: bool,
    weights: bool,
    logsumexp: bool,
}

impl Terms {
    /// All together, and each alone.
    fn choices() -> [Self; 4] {
        [[true; 3], [true, false, false], [false, true, false], [false, false, true]]
            .map(|[context, weights, logsumexp]| Self { context, weights, logsumexp })
    }
}

fn loss(inputs: &Inputs, options: &AttentionOptions, terms: &Terms) -> Result<Tensor> {
    let extra = |var: &Option<Var>| var.as_ref().map(|var| var.as_tensor().clone());
    let options = AttentionOptions {
        attn_bias: extra(&inputs.bias),
        alibi_slopes: extra(&inputs.slopes),
        sinks: extra(&inputs.sinks),
        return_weights: terms.weights,
        return_logsumexp: terms.logsumexp,
        ..options.clone()
    };
    let output = scaled_dot_product_attention(&inputs.query, &inputs.key, &inputs.value, &options)?;
    let term = |x: &Tensor, seed| (x * randn(seed, x.shape(), DType::F64)?)?.sum_all();
    let mut loss = Tensor::new(0f64, &Device::Cpu)?;
    if terms.context {
        loss = (loss + term(&output.context, 11)?)?;
    }
    if let Some(weights) = &output.weights {
        loss = (loss + term(weights, 12)?)?;
    }
    if let Some(logsumexp) = &output.logsumexp {
        // Minus infinity, for a query without keys, counts as 0.
        let finite = logsumexp.ge(f64::MIN)?;
        let logsumexp = finite.where_cond(logsumexp, &logsumexp.zeros_like()?)?;
        loss = (loss + term(&logsumexp, 13)?)?;
    }
    Ok(loss)
}

#[track_caller]
fn check_with_kv_heads(kv_heads: usize, extras: Extras, options: AttentionOptions) {
    let inputs = Inputs::new(kv_heads, &extras).unwrap();
    for terms in Terms::choices() {
        let mut vars = inputs.named();
        // Weights and log-sum-exp don't depend on the values.
        vars.retain(|(name, _)| terms.context || *name != "value");
        // Auto is the fused path, except for slopes that need a gradient.
        for backend in [Backend::Reference, Backend::Auto] {
            let options = AttentionOptions { backend, ..options.clone() };
            let what = format!("{backend:?}, loss of {terms:?}");
            check_gradients(&vars, || loss(&inputs, &options, &terms), TOLERANCE, &what);
        }
    }
}

#[track_caller]
fn check(extras: Extras, options: AttentionOptions) {
    check_with_kv_heads(HEADS, extras, options);
}

fn masked(attn_mask: Mask) -> AttentionOptions {
    AttentionOptions { attn_mask, ..Default::default() }
}

#[test]
fn gradients_of_plain_attention_match_finite_differences() {
    check(Extras::default(), AttentionOptions::default());
}

#[test]
fn gradients_under_a_causal_mask_match_finite_differences() {
    check(Extras::default(), masked(Mask::causal()));
}

#[test]
fn gradients_under_a_window_match_finite_differences() {
    check(Extras::default(), masked(Mask::window(Some(1), Some(1))));
}

#[test]
fn gradients_under_key_lengths_match_finite_differences() {
    // The second sequence has no keys at all.
    check(Extras::default(), masked(Mask::key_lengths(&[3, 0])));
}

fn scaled(scale: f64) -> AttentionOptions {
    AttentionOptions { scale: Some(scale), ..Default::default() }
}

#[test]
fn gradients_with_a_scale_match_finite_differences() {
    check(Extras::default(), scaled(0.9));
    check(Extras::default(), scaled(-0.4));
}

#[test]
fn gradients_with_a_scale_of_zero_are_zero_and_not_missing() {
    check(Extras::default(), scaled(0.0));
}

#[test]
fn gradients_with_a_softcap_match_finite_differences() {
    let options = AttentionOptions { softcap: Some(0.8), ..Default::default() };
    check(Extras::default(), options);
}

#[test]
fn gradient_of_a_bias_of_every_broadcast_shape_matches_finite_differences() {
    const SHAPES: [&[usize]; 11] = [
        &[BATCH, HEADS, Q_LEN, KV_LEN],
        &[1, HEADS, Q_LEN, KV_LEN],
        &[BATCH, 1, Q_LEN, KV_LEN],
        &[BATCH, HEADS, 1, KV_LEN],
        &[BATCH, HEADS, Q_LEN, 1],
        &[BATCH, 1, 1, KV_LEN],
        &[1, 1, 1, 1],
        &[HEADS, Q_LEN, KV_LEN],
        &[Q_LEN, KV_LEN],
        &[KV_LEN],
        &[],
    ];
    for shape in SHAPES {
        let extras = Extras { bias: Some(shape), ..Default::default() };
        check(extras, AttentionOptions::default());
    }
}

#[test]
fn gradient_of_alibi_slopes_matches_finite_differences() {
    const SHAPES: [&[usize]; 2] = [&[HEADS], &[BATCH, HEADS]];
    for shape in SHAPES {
        let extras = Extras { slopes: Some(shape), ..Default::default() };
        check(extras, AttentionOptions::default());
    }
}

#[test]
fn gradient_of_sinks_matches_finite_differences() {
    let extras = || Extras { sinks: true, ..Default::default() };
    check(extras(), AttentionOptions::default());
    // In a row without visible keys, the sink takes the whole softmax.
    check(extras(), masked(Mask::key_lengths(&[0, 4])));
}

#[test]
fn gradients_under_dropout_match_finite_differences() {
    let options = AttentionOptions { dropout_p: 0.4, dropout_seed: 3, ..Default::default() };
    check(Extras::default(), options);
}

#[test]
fn gradients_of_shared_heads_match_finite_differences() {
    check_with_kv_heads(2, Extras::default(), AttentionOptions::default());
    check_with_kv_heads(1, Extras::default(), AttentionOptions::default());
}

#[test]
fn gradients_with_everything_together_match_finite_differences() {
    let extras = Extras { bias: Some(&[BATCH, 1, Q_LEN, KV_LEN]), slopes: Some(&[HEADS]), sinks: true };
    let options = AttentionOptions {
        scale: Some(0.7),
        softcap: Some(1.3),
        attn_mask: Mask::causal() & Mask::key_lengths(&[5, 4]) & Mask::window(Some(2), None),
        dropout_p: 0.25,
        dropout_seed: 9,
        ..Default::default()
    };
    check_with_kv_heads(2, extras, options);
}
