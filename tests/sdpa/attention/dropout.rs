//! Dropout: weights times factors of 0 or 1 / (1 - p), which depend only on the seed and on the indices of a weight.

use candle_attention::{AttentionOptions, Backend, Mask};
use candle_core::{DType, Device, Result, Tensor};

use crate::common::{assert_close, assert_same_bits, gradients, max_abs_difference, numbers, randn};

use super::setup::{SIZES, Sizes, all_results, assert_same_output, attend, attend_vars, random_sum, weights};

/// The tolerance for the rounding of an f32 quotient.
const F32_FACTORS: f64 = 1e-6;

fn dropping(dropout_p: f64, dropout_seed: u64) -> AttentionOptions {
    AttentionOptions { dropout_p, dropout_seed, ..all_results() }
}

/// The factors of the weights. With one-hot rows as values, the context equals the weights after dropout.
fn factors(sizes: &Sizes, inputs: &[Tensor; 3], options: &AttentionOptions) -> Result<Tensor> {
    let one_hot = Tensor::eye(sizes.kv_len, inputs[0].dtype(), &Device::Cpu)?;
    let one_hot = one_hot.broadcast_as((sizes.batch, sizes.kv_heads, sizes.kv_len, sizes.kv_len))?;
    let output = attend(&[inputs[0].clone(), inputs[1].clone(), one_hot], options)?;
    &output.context / weights(&output)
}

#[test]
fn same_seed_drops_the_same_weights() -> Result<()> {
    let inputs = SIZES.tensors(1, DType::F32);
    assert_same_output(&attend(&inputs, &dropping(0.4, 7))?, &attend(&inputs, &dropping(0.4, 7))?);
    let others = SIZES.tensors(99, DType::F32);
    let [a, b] = [&inputs, &others].map(|inputs| factors(&SIZES, inputs, &dropping(0.4, 7)).unwrap());
    assert_close(&a, &b, F32_FACTORS, "factors");
    Ok(())
}

#[test]
fn same_seed_drops_the_same_weights_in_every_dtype() -> Result<()> {
    let of = |dtype| factors(&SIZES, &SIZES.tensors(1, dtype), &dropping(0.4, 7))?.to_dtype(DType::F64);
    let expected = of(DType::F64)?;
    for (dtype, tolerance) in [(DType::F32, F32_FACTORS), (DType::BF16, 2e-2), (DType::F16, 2e-3)] {
        assert_close(&of(dtype)?, &expected, tolerance, "factors");
    }
    Ok(())
}

#[test]
fn batch_in_parts_drops_the_weights_of_the_whole() -> Result<()> {
    let inputs = SIZES.tensors(1, DType::F32);
    for backend in [Backend::Fused, Backend::Reference] {
        let options = AttentionOptions { backend, ..dropping(0.4, 7) };
        let whole = attend(&inputs, &options)?.context;
        for first_sequence in 0..SIZES.batch {
            let part = inputs.each_ref().map(|x| x.narrow(0, first_sequence, 1).unwrap());
            let part = attend(&part, &AttentionOptions { first_sequence, ..options.clone() })?.context;
            assert_close(&part, &whole.narrow(0, first_sequence, 1)?, F32_FACTORS, "context");
        }
    }
    // A place beyond any batch is no error.
    attend(&inputs, &AttentionOptions { first_sequence: usize::MAX, ..dropping(0.4, 7) })?;
    Ok(())
}

#[test]
fn another_seed_drops_other_weights() -> Result<()> {
    let inputs = SIZES.tensors(1, DType::F32);
    let output = |seed| attend(&inputs, &dropping(0.4, seed));
    for seed in [8, 7 + (1 << 32), u64::MAX] {
        let (a, b) = (output(7)?, output(seed)?);
        assert!(max_abs_difference(&a.context, &b.context)? > 0.1);
    }
    Ok(())
}

#[test]
fn weights_and_logsumexp_are_those_before_dropout() -> Result<()> {
    let inputs = SIZES.tensors(1, DType::F32);
    let (plain, dropped) = (attend(&inputs, &all_results())?, attend(&inputs, &dropping(0.4, 7))?);
    assert_same_bits(weights(&plain), weights(&dropped), "weights");
    assert_same_bits(plain.logsumexp.as_ref().unwrap(), dropped.logsumexp.as_ref().unwrap(), "log-sum-exp");
    Ok(())
}

#[test]
fn probability_of_zero_drops_nothing() -> Result<()> {
    let inputs = SIZES.tensors(1, DType::F32);
    assert_same_output(&attend(&inputs, &dropping(0.0, 7))?, &attend(&inputs, &all_results())?);
    Ok(())
}

/// 2 · 2 · 50 · 50 = 10,000 weights.
const MANY: Sizes = Sizes { heads: 2, q_len: 50, kv_len: 50, ..SIZES };

#[test]
fn weight_is_dropped_with_probability_p_or_scaled_up() -> Result<()> {
    for p in [0.1, 0.5, 0.9] {
        let factors = numbers(&factors(&MANY, &MANY.tensors(2, DType::F64), &dropping(p, 3))?)?;
        let dropped = factors.iter().filter(|&&factor| factor == 0.0).count();
        let kept = factors.iter().filter(|&&factor| (factor * (1.0 - p) - 1.0).abs() < F32_FACTORS);
        assert_eq!(dropped + kept.count(), factors.len(), "a factor is neither 0 nor 1 / (1 - {p})");
        // Four standard deviations of a binomial: 4 · sqrt(p · (1 - p) / 10,000) <= 0.02.
        let fraction = dropped as f64 / factors.len() as f64;
        assert!((fraction - p).abs() < 0.02, "{fraction} dropped instead of {p}");
    }
    Ok(())
}

#[test]
fn neighbours_are_dropped_independently() -> Result<()> {
    let factors = factors(&MANY, &MANY.tensors(2, DType::F64), &dropping(0.5, 3))?;
    let signs = (factors.to_dtype(DType::F64)? - 1.0)?;
    // The mean of the product of two independent fair signs: within four standard deviations of 0.
    for axis in 0..4 {
        let len = signs.dim(axis)? - 1;
        let products = (signs.narrow(axis, 0, len)? * signs.narrow(axis, 1, len)?)?;
        let bound = 4.0 / (products.elem_count() as f64).sqrt();
        let mean = products.mean_all()?.to_scalar::<f64>()?;
        assert!(mean.abs() < bound, "axis {axis}: {mean}, bound {bound}");
    }
    Ok(())
}

#[test]
fn expectation_over_seeds_is_the_context_without_dropout() -> Result<()> {
    const SEEDS: u64 = 2000;
    let sizes = Sizes { batch: 1, q_len: 2, ..SIZES };
    let inputs = sizes.tensors(4, DType::F64);
    let plain = attend(&inputs, &all_results())?.context;
    let mut sum = plain.zeros_like()?;
    for seed in 0..SEEDS {
        sum = (sum + attend(&inputs, &dropping(0.3, seed))?.context)?;
    }
    // One context deviates by about sqrt(p / (1 - p) · Σ (w·v)²) <= 1; 2,000 of them by 0.023.
    let difference = max_abs_difference(&(sum / SEEDS as f64)?, &plain)?;
    assert!(difference < 0.1, "{difference}");
    Ok(())
}

#[test]
fn dropped_context_is_factors_times_weights_times_value() -> Result<()> {
    let sizes = Sizes { kv_heads: SIZES.heads, ..SIZES };
    let vars = sizes.vars(5, DType::F64);
    let tensors = vars.each_ref().map(|var| var.as_tensor().clone());
    for attn_mask in [Mask::full(), Mask::prefix(5) & Mask::window(Some(3), Some(9))] {
        // The weight of a hidden key is zero and shows no factor, so the factors are taken from a run without a mask.
        let factors = factors(&sizes, &tensors, &dropping(0.4, 6))?.detach();
        let options = AttentionOptions { attn_mask, ..dropping(0.4, 6) };
        let output = attend_vars(&vars, &options)?;
        let by_hand = (weights(&output) * &factors)?.matmul(&vars[2])?;
        assert_close(&output.context, &by_hand, F32_FACTORS, "context");
        let gradients_of = |context: &Tensor| gradients(&random_sum(context, 7).unwrap(), &vars.each_ref());
        for (a, b) in gradients_of(&output.context)?.iter().zip(gradients_of(&by_hand)?) {
            assert_close(a, &b, F32_FACTORS, "gradient");
        }
    }
    Ok(())
}

#[test]
fn sink_is_never_dropped() -> Result<()> {
    // The share of the sink is missing from the weights, with dropout and without.
    let inputs = SIZES.tensors(8, DType::F64);
    let sinks = Some(randn(9, SIZES.heads, DType::F64)?);
    let plain = attend(&inputs, &AttentionOptions { sinks: sinks.clone(), ..all_results() })?;
    let options = AttentionOptions { sinks, ..dropping(0.4, 6) };
    let dropped = attend(&inputs, &options)?;
    assert_same_bits(weights(&plain), weights(&dropped), "weights");
    let (with_sink, without) = (factors(&SIZES, &inputs, &options)?, factors(&SIZES, &inputs, &dropping(0.4, 6))?);
    assert_close(&with_sink, &without, F32_FACTORS, "factors");
    Ok(())
}
