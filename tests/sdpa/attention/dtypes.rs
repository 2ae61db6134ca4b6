//! Every float dtype forward and backward, and how far the half types are from f64.

use candle_attention::AttentionOptions;
use candle_core::{DType, Result, Tensor, Var};

use crate::common::{assert_close, assert_same_bits, gradients, max_abs_difference, randn};

use super::setup::{SIZES, Sizes, all_results, attend_vars, everything, logsumexp, random_sum, weights};

/// (dtype, bound on |Δ| / (1 + |x|) compared with f64 on the same rounded input). Half types accumulate in f32, so that
/// only the results are rounded: by half a unit in the last place, 2^-8 or 2^-11. There is some room for gradients that
/// are computed from rounded gradients.
const BOUNDS: [(DType, f64); 3] = [(DType::BF16, 1e-2), (DType::F16, 1e-3), (DType::F32, 1e-5)];

/// Everything that has a gradient, as variables.
struct Inputs {
    vars: [Var; 3],
    extras: [Var; 3],
    options: AttentionOptions,
}

impl Inputs {
    /// Numbers that bf16 and f16 hold exactly, so that every dtype computes the same problem.
    fn new(dtype: DType) -> Result<Self> {
        let rounded = |x: &Tensor| Var::from_tensor(&x.to_dtype(DType::BF16)?.to_dtype(dtype)?);
        let [query, key, value] = SIZES.tensors(1, DType::F64).map(|x| rounded(&x).unwrap());
        let options = everything(&SIZES, 2, DType::F64);
        let extras = [&options.attn_bias, &options.alibi_slopes, &options.sinks];
        let extras = extras.map(|x| rounded(x.as_ref().unwrap()).unwrap());
        let [bias, slopes, sinks] = extras.each_ref().map(|var| Some(var.as_tensor().clone()));
        let options = AttentionOptions { attn_bias: bias, alibi_slopes: slopes, sinks, ..options };
        Ok(Self { vars: [query, key, value], extras, options })
    }

    /// Context, weights, log-sum-exp, then the gradients of all six inputs.
    fn results(&self) -> Result<Vec<Tensor>> {
        let output = attend_vars(&self.vars, &self.options)?;
        let cotangent = randn(3, output.context.shape(), DType::BF16)?.to_dtype(output.context.dtype())?;
        let all: Vec<&Var> = self.vars.iter().chain(&self.extras).collect();
        let grads = gradients(&(&output.context * cotangent)?, &all)?;
        let results = [output.context.clone(), weights(&output).clone(), logsumexp(&output).clone()];
        Ok(results.into_iter().chain(grads).collect())
    }
}

#[test]
fn every_dtype_agrees_with_f64_forward_and_backward() -> Result<()> {
    let expected = Inputs::new(DType::F64)?.results()?;
    for (dtype, bound) in BOUNDS {
        // `gradients` asserts that each has its input's dtype.
        let results = Inputs::new(dtype)?.results()?;
        let names = ["context", "weights", "log-sum-exp", "query", "key", "value", "bias", "slopes", "sinks"];
        for ((result, expected), name) in results.iter().zip(&expected).zip(names) {
            let finite = expected.clamp(-1e30, 1e30)?;
            let result = result.to_dtype(DType::F64)?.clamp(-1e30, 1e30)?;
            assert_close(&result, &finite, bound, &format!("{dtype:?}, {name}"));
        }
    }
    Ok(())
}

#[test]
fn half_types_accumulate_in_f32() -> Result<()> {
    // 3,000 equal weights: in half precision the sum of exponentials would stop growing at 2^8 (bf16) or 2^11 (f16).
    let sizes = Sizes { kv_len: 3000, q_len: 1, ..SIZES };
    for dtype in [DType::BF16, DType::F16] {
        let [query, key, value] = sizes.tensors(4, dtype);
        let zero = Var::from_tensor(&query.zeros_like()?)?;
        let ones = Var::from_tensor(&value.ones_like()?)?;
        let output = attend_vars(&[zero, Var::from_tensor(&key)?, ones], &all_results())?;
        assert_same_bits(&output.context, &output.context.ones_like()?, "mean of ones");
        let ln = (logsumexp(&output).ones_like()? * 3000f64.ln())?;
        assert_close(logsumexp(&output), &ln, 1e-5, "log-sum-exp");
    }
    Ok(())
}

/// Bias, slopes and sinks that are the same for 4,096 sequences of four queries: on the fused path, which can't train the
/// slopes, and on the reference.
#[test]
fn gradients_of_extras_are_summed_without_loss_in_half_types() -> Result<()> {
    let sizes = Sizes { batch: 4096, heads: 2, kv_heads: 1, q_len: 4, kv_len: 3, head_dim: 4, value_dim: 2 };
    for (dtype, roundoff) in [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)] {
        for with_slopes in [false, true] {
            let inputs = sizes.tensors(1, dtype);
            let (bias, heads) = (randn(4, (2, 1, 3), dtype)?, [randn(5, 2, dtype)?, randn(6, 2, dtype)?]);
            let run = |dtype: DType| -> Result<Vec<Tensor>> {
                let var = |x: &Tensor| Var::from_tensor(&x.to_dtype(dtype)?);
                let [q, k, v] = inputs.each_ref().map(var);
                let (bias, sinks, slopes) = (var(&bias)?, var(&heads[0])?, var(&heads[1])?);
                let options = AttentionOptions {
                    attn_bias: Some(bias.as_tensor().clone()),
                    sinks: Some(sinks.as_tensor().clone()),
                    alibi_slopes: with_slopes.then(|| slopes.as_tensor().clone()),
                    ..Default::default()
                };
                let context = attend_vars(&[q?, k?, v?], &options)?.context.to_dtype(DType::F64)?;
                let extras = [&bias, &sinks, &slopes];
                gradients(&context.sqr()?.sum_all()?, if with_slopes { &extras } else { &extras[..2] })
            };
            for ((what, found), exact) in ["bias", "sinks", "slopes"].iter().zip(run(dtype)?).zip(run(DType::F64)?) {
                let largest = exact.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
                let difference = max_abs_difference(&found, &exact)? / largest / roundoff;
                assert!(difference < 2.0, "{dtype:?}, {what}: off by {difference} roundoffs");
            }
        }
    }
    Ok(())
}

#[test]
fn extras_may_have_a_float_dtype_of_their_own() -> Result<()> {
    let inputs = Inputs::new(DType::F32)?;
    let expected = attend_vars(&inputs.vars, &inputs.options)?;
    for dtype in [DType::BF16, DType::F16, DType::F64] {
        let extras = Inputs::new(dtype)?;
        let options = AttentionOptions { attn_mask: inputs.options.attn_mask.clone(), ..extras.options.clone() };
        // The numbers are exact in every dtype, so the results are the same.
        let output = attend_vars(&inputs.vars, &options)?;
        assert_same_bits(&output.context, &expected.context, "context");
        let all: Vec<&Var> = inputs.vars.iter().chain(&extras.extras).collect();
        // `gradients` asserts that each has its own dtype.
        gradients(&random_sum(&output.context, 5)?, &all)?;
    }
    Ok(())
}
