//! Which tokens attend to which: the masks of the config, and those of one call.

use candle_attention::{ForwardOptions, Mask, Result, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor, Var};

use crate::common::{assert_close, assert_same_bits, gradients, max_abs_difference, numbers, randn};
use crate::layers::{Formula, cross_attention, everything, self_attention};

fn causal() -> SelfAttentionConfig {
    SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(8, 2) }
}

fn masked(attn_mask: Mask) -> ForwardOptions {
    ForwardOptions { attn_mask, return_weights: true, ..Default::default() }
}

/// Six tokens, with other numbers from token `first` on.
fn with_another_future(x: &Tensor, first: usize) -> Result<Tensor> {
    let others = randn(99, x.shape(), x.dtype())?;
    Ok(Tensor::cat(&[x.narrow(1, 0, first)?, others.narrow(1, first, 6 - first)?], 1)?)
}

#[test]
fn causal_layer_ignores_the_future() -> Result<()> {
    for config in [causal(), everything()] {
        let layer = self_attention(&config, DType::F32)?;
        let x = randn(1, (2, 6, config.embed_dim), DType::F32)?;
        let output = layer.forward(&x)?;
        for first in 1..6 {
            let changed = layer.forward(&with_another_future(&x, first)?)?;
            let past = |y: &Tensor| y.narrow(1, 0, first);
            assert_same_bits(&past(&changed)?, &past(&output)?, &format!("tokens before {first}"));
            assert!(max_abs_difference(&changed.narrow(1, first, 1)?, &output.narrow(1, first, 1)?)? > 1e-3);
        }
    }
    Ok(())
}

#[test]
fn no_gradient_reaches_the_future() -> Result<()> {
    let layer = self_attention(&causal(), DType::F64)?;
    let x = Var::from_tensor(&randn(1, (6, 8), DType::F64)?)?;
    for i in 0..6 {
        let grad = gradients(&layer.forward(&x)?.get(i)?.sum_all()?, &[&x])?.remove(0);
        let sizes: Vec<f64> = grad.abs()?.sum(1)?.to_vec1()?;
        assert!(sizes[..=i].iter().all(|&size| size > 0.0), "token {i}: {sizes:?}");
        assert!(sizes[i + 1..].iter().all(|&size| size == 0.0), "token {i}: {sizes:?}");
    }
    Ok(())
}

#[test]
fn layer_that_is_not_causal_sees_the_future() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    let x = randn(1, (2, 6, 8), DType::F32)?;
    let changed = layer.forward(&with_another_future(&x, 5)?)?;
    assert!(max_abs_difference(&changed.narrow(1, 0, 1)?, &layer.forward(&x)?.narrow(1, 0, 1)?)? > 1e-3);
    Ok(())
}

#[test]
fn sliding_window_counts_the_token_itself() -> Result<()> {
    for width in [1, 2, 3, 6, usize::MAX] {
        for is_causal in [true, false] {
            let config =
                SelfAttentionConfig { sliding_window: Some(width), is_causal, ..SelfAttentionConfig::new(8, 2) };
            let layer = self_attention(&config, DType::F64)?;
            let x = randn(1, (6, 8), DType::F64)?;
            let (output, weights) = layer.forward_with_weights(&x)?;
            let formula =
                Formula { allowed: &|i, j| i.abs_diff(j) < width && (!is_causal || j <= i), ..Formula::of(&layer) };
            let (expected, expected_weights) = formula.compute(&x, &x)?;
            let what = format!("width {width}, causal {is_causal}");
            assert_close(&weights, &expected_weights, 1e-12, &what);
            assert_close(&output, &expected, 1e-12, &what);
        }
    }
    Ok(())
}

#[test]
fn window_of_one_sees_its_own_value_alone() -> Result<()> {
    let config = SelfAttentionConfig { sliding_window: Some(1), out_proj: false, ..SelfAttentionConfig::new(8, 2) };
    let layer = self_attention(&config, DType::F64)?;
    let x = randn(1, (6, 8), DType::F64)?;
    let value = x.matmul(&layer.v_proj().weight().t()?)?;
    let value = value.broadcast_add(layer.v_proj().bias().expect("a bias"))?;
    assert_close(&layer.forward(&x)?, &value, 1e-13, "output");
    Ok(())
}

/// In a batch of padded sequences that is masked by their lengths, each sequence has the outputs that it has alone.
#[test]
fn padded_sequences_are_as_they_are_alone() -> Result<()> {
    let lengths = [6, 1, 4];
    for config in [SelfAttentionConfig::new(8, 2), causal(), everything()] {
        let layer = self_attention(&config, DType::F64)?;
        let x = randn(1, (3, 6, config.embed_dim), DType::F64)?;
        let result = layer.forward_with(&x, &masked(Mask::key_lengths(&lengths)))?;
        let (output, weights) = (result.output, result.weights.expect("weights"));
        for (b, len) in lengths.into_iter().enumerate() {
            let (alone, alone_weights) = layer.forward_with_weights(&x.get(b)?.narrow(0, 0, len)?)?;
            assert_close(&output.get(b)?.narrow(0, 0, len)?, &alone, 1e-13, &format!("sequence {b}"));
            let weights = weights.get(b)?.narrow(1, 0, len)?;
            assert_close(&weights.narrow(2, 0, len)?, &alone_weights, 1e-13, &format!("weights of {b}"));
            assert_eq!(numbers(&weights.narrow(2, len, 6 - len)?)?, vec![0.0; config.num_heads * len * (6 - len)]);
        }
    }
    Ok(())
}

#[test]
fn padded_memories_are_as_they_are_alone() -> Result<()> {
    let layer = cross_attention(&SelfAttentionConfig::new(8, 2), DType::F64)?;
    let (x, memory) = (randn(1, (2, 3, 8), DType::F64)?, randn(2, (2, 5, 8), DType::F64)?);
    let output = layer.forward_with(&x, &memory, &masked(Mask::key_lengths(&[5, 2])))?.output;
    for (b, len) in [5, 2].into_iter().enumerate() {
        let alone = layer.forward(&x.get(b)?, &memory.get(b)?.narrow(0, 0, len)?)?;
        assert_close(&output.get(b)?, &alone, 1e-13, &format!("memory {b}"));
    }
    Ok(())
}

#[test]
fn padding_gets_no_gradient() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F64)?;
    let x = Var::from_tensor(&randn(1, (2, 5, 8), DType::F64)?)?;
    let output = layer.forward_with(&x, &masked(Mask::key_lengths(&[5, 3])))?.output;
    // The loss of all tokens that are not padding.
    let loss = (output.narrow(0, 0, 1)?.sum_all()? + output.narrow(0, 1, 1)?.narrow(1, 0, 3)?.sum_all()?)?;
    let grad = gradients(&loss, &[&x])?.remove(0);
    assert_eq!(numbers(&grad.get(1)?.narrow(0, 3, 2)?)?, [0.0; 16]);
    assert!(numbers(&grad.get(1)?.narrow(0, 0, 3)?)?.iter().all(|&x| x != 0.0));
    Ok(())
}

/// A mask of one call can only hide more keys than the mask of the config.
#[test]
fn mask_of_a_call_is_met_by_that_of_the_config() -> Result<()> {
    let layer = self_attention(&causal(), DType::F64)?;
    let x = randn(1, (5, 8), DType::F64)?;
    let result = layer.forward_with(&x, &masked(Mask::documents(&[2, 3])))?;
    let formula = Formula { allowed: &|i, j| j <= i && (i < 2) == (j < 2), ..Formula::of(&layer) };
    let (output, weights) = formula.compute(&x, &x)?;
    assert_close(&result.output, &output, 1e-12, "output");
    assert_close(&result.weights.expect("weights"), &weights, 1e-12, "weights");
    let result = layer.forward_with(&x, &masked(Mask::full()))?;
    assert_same_bits(&result.output, &layer.forward(&x)?, "a full mask");
    Ok(())
}

/// If all keys are hidden the context is zero, and W_O adds its bias.
#[test]
fn token_that_sees_nothing_becomes_the_bias_of_w_o() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F64)?;
    let x = randn(1, (1, 3, 8), DType::F64)?;
    let result = layer.forward_with(&x, &masked(Mask::key_lengths(&[0])))?;
    let bias = layer.o_proj().expect("W_O").bias().expect("a bias");
    assert_same_bits(&result.output, &bias.broadcast_as((1, 3, 8))?, "output");
    assert_eq!(numbers(&result.weights.expect("weights"))?, [0.0; 18]);
    Ok(())
}

#[test]
fn bias_of_minus_infinity_hides_a_key_and_another_adds_to_its_scores() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F64)?;
    let x = randn(1, (3, 8), DType::F64)?;
    let biased = |bias: [f64; 3]| -> Result<Tensor> {
        let options = ForwardOptions {
            attn_bias: Some(Tensor::new(&bias, &Device::Cpu)?),
            return_weights: true,
            ..Default::default()
        };
        Ok(layer.forward_with(&x, &options)?.weights.expect("weights"))
    };
    let hidden = layer.forward_with(&x, &masked(Mask::key_lengths(&[2])))?;
    assert_close(&biased([0.0, 0.0, f64::NEG_INFINITY])?, &hidden.weights.expect("weights"), 1e-13, "hidden");
    // ln 3 more makes a key's exponential three times as large.
    let (_, weights) = layer.forward_with_weights(&x)?;
    let factors = Tensor::new(&[1.0, 3.0, 1.0], &Device::Cpu)?;
    let products = weights.broadcast_mul(&factors)?;
    let expected = products.broadcast_div(&products.sum_keepdim(2)?)?;
    assert_close(&biased([0.0, 3f64.ln(), 0.0])?, &expected, 1e-13, "ln 3");
    Ok(())
}
