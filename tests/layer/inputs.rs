//! The output depends only on the numbers of an input, not on its layout, its rank or the other sequences of the batch.

use candle_attention::{ForwardOptions, Result, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module};

use crate::common::{assert_close, assert_same_bits, max_abs_difference, numbers, randn};
use crate::layers::{cross_attention, everything, self_attention};

/// Views of shape (batch 3, len 5, dim) that aren't contiguous.
fn views(dim: usize) -> Result<Vec<(&'static str, Tensor)>> {
    let random = |shape: &[usize]| randn(5, shape, DType::F32);
    Ok(vec![
        ("transposed tokens", random(&[3, dim, 5])?.transpose(1, 2)?),
        ("transposed batch", random(&[5, 3, dim])?.transpose(0, 1)?),
        ("transposed all over", random(&[dim, 5, 3])?.transpose(0, 2)?),
        ("narrowed batch", random(&[6, 5, dim])?.narrow(0, 2, 3)?),
        ("narrowed tokens", random(&[3, 9, dim])?.narrow(1, 2, 5)?),
        ("narrowed entries", random(&[3, 5, dim + 4])?.narrow(2, 3, dim)?),
        ("broadcast batch", random(&[1, 5, dim])?.broadcast_as((3, 5, dim))?),
        ("broadcast tokens", random(&[3, 1, dim])?.broadcast_as((3, 5, dim))?),
        ("broadcast entries", random(&[3, 5, 1])?.broadcast_as((3, 5, dim))?),
        ("flipped", random(&[3, 5, dim])?.flip(&[1])?.transpose(1, 2)?.contiguous()?.transpose(1, 2)?),
    ])
}

#[test]
fn input_of_any_strides_gives_the_numbers_of_its_copy() -> Result<()> {
    for config in [SelfAttentionConfig::new(8, 2), everything()] {
        let layer = self_attention(&config, DType::F32)?;
        for (what, x) in views(config.embed_dim)? {
            let copy = x.force_contiguous()?;
            assert_same_bits(&layer.forward(&x)?, &layer.forward(&copy)?, what);
            let (x, copy) = (x.get(1)?, copy.get(1)?);
            assert_same_bits(&layer.forward(&x)?, &layer.forward(&copy)?, &format!("{what}, without batch"));
        }
    }
    Ok(())
}

#[test]
fn memory_of_any_strides_gives_the_numbers_of_its_copy() -> Result<()> {
    let layer = cross_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    let x = randn(1, (3, 4, 8), DType::F32)?;
    for (what, memory) in views(8)? {
        let expected = layer.forward(&x, &memory.force_contiguous()?)?;
        assert_same_bits(&layer.forward(&x, &memory)?, &expected, what);
    }
    Ok(())
}

/// This test fails once candle's `Linear` is correct here. The layer then no longer needs to copy its input.
#[test]
fn linear_of_candle_is_still_wrong_on_a_transposed_batch() -> Result<()> {
    let linear = Linear::new(randn(1, (4, 8), DType::F32)?, None);
    let x = randn(2, (3, 8, 5), DType::F32)?.transpose(1, 2)?;
    let difference = max_abs_difference(&linear.forward(&x)?, &linear.forward(&x.contiguous()?)?)?;
    assert!(difference > 0.1, "candle's Linear is right now: differs by {difference:e}");
    Ok(())
}

#[test]
fn tokens_without_a_batch_are_a_batch_of_one() -> Result<()> {
    let options = ForwardOptions { return_weights: true, return_logsumexp: true, ..Default::default() };
    for config in [SelfAttentionConfig::new(8, 2), everything()] {
        let layer = self_attention(&config, DType::F32)?;
        let x = randn(1, (5, config.embed_dim), DType::F32)?;
        let alone = layer.forward_with(&x, &options)?;
        let batch = layer.forward_with(&x.unsqueeze(0)?, &options)?;
        assert_same_bits(&alone.output, &batch.output.squeeze(0)?, "output");
        assert_same_bits(&alone.weights.unwrap(), &batch.weights.unwrap().squeeze(0)?, "weights");
        assert_same_bits(&alone.logsumexp.unwrap(), &batch.logsumexp.unwrap().squeeze(0)?, "logsumexp");
        assert_eq!(alone.output.dims(), [5, config.output_dim()]);
    }
    let layer = cross_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    let (x, memory) = (randn(1, (5, 8), DType::F32)?, randn(2, (3, 8), DType::F32)?);
    let (output, weights) = layer.forward_with_weights(&x, &memory)?;
    let (batch, batch_weights) = layer.forward_with_weights(&x.unsqueeze(0)?, &memory.unsqueeze(0)?)?;
    assert_same_bits(&output, &batch.squeeze(0)?, "cross, output");
    assert_same_bits(&weights, &batch_weights.squeeze(0)?, "cross, weights");
    Ok(())
}

#[test]
fn each_sequence_of_a_batch_is_as_it_is_alone() -> Result<()> {
    for config in [SelfAttentionConfig::new(8, 2), everything()] {
        let layer = self_attention(&config, DType::F64)?;
        let x = randn(1, (4, 6, config.embed_dim), DType::F64)?;
        let batch = layer.forward(&x)?;
        for b in 0..4 {
            assert_close(&batch.get(b)?, &layer.forward(&x.get(b)?)?, 1e-13, &format!("sequence {b}"));
        }
    }
    Ok(())
}

#[test]
fn order_of_the_tokens_does_not_matter_without_positions() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F64)?;
    let x = randn(1, (6, 8), DType::F64)?;
    let flipped = layer.forward(&x.flip(&[0])?)?.flip(&[0])?;
    assert_close(&flipped, &layer.forward(&x)?, 1e-13, "flipped there and back");
    Ok(())
}

/// The results agree with those in f64 to the precision of each dtype: a few ulps of numbers near 1.
#[test]
fn layer_works_in_every_float_dtype() -> Result<()> {
    for config in [SelfAttentionConfig::new(8, 2), everything()] {
        let x = randn(3, (2, 6, config.embed_dim), DType::BF16)?;
        for (dtype, tolerance) in [(DType::F64, 1e-14), (DType::F32, 1e-5), (DType::F16, 1e-2), (DType::BF16, 6e-2)] {
            let layer = self_attention(&config, dtype)?;
            let exact = self_attention(&config, DType::F64)?;
            for (rounded, exact) in layer.vars().iter().zip(exact.vars()) {
                exact.set(&rounded.to_dtype(DType::F64)?)?;
            }
            let (output, weights) = layer.forward_with_weights(&x.to_dtype(dtype)?)?;
            let (expected, expected_weights) = exact.forward_with_weights(&x.to_dtype(DType::F64)?)?;
            assert_eq!((output.dtype(), weights.dtype()), (dtype, dtype));
            assert_close(&weights.to_dtype(DType::F64)?, &expected_weights, tolerance, &format!("{dtype:?}, weights"));
            assert_close(&output.to_dtype(DType::F64)?, &expected, tolerance, &format!("{dtype:?}, output"));
        }
    }
    Ok(())
}

fn empty(shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?)
}

#[test]
fn empty_batch_gives_an_empty_output() -> Result<()> {
    for config in [SelfAttentionConfig::new(8, 2), everything()] {
        let layer = self_attention(&config, DType::F32)?;
        let (output, weights) = layer.forward_with_weights(&empty(&[0, 5, config.embed_dim])?)?;
        assert_eq!(output.dims(), [0, 5, config.output_dim()]);
        assert_eq!(weights.dims(), [0, config.num_heads, 5, 5]);
    }
    let layer = cross_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    assert_eq!(layer.forward(&empty(&[0, 5, 8])?, &empty(&[0, 3, 8])?)?.dims(), [0, 5, 8]);
    Ok(())
}

#[test]
fn no_tokens_give_an_empty_output() -> Result<()> {
    for config in [SelfAttentionConfig::new(8, 2), everything()] {
        let layer = self_attention(&config, DType::F32)?;
        for batch in [0, 1, 2] {
            let output = layer.forward(&empty(&[batch, 0, config.embed_dim])?)?;
            assert_eq!(output.dims(), [batch, 0, config.output_dim()]);
        }
        assert_eq!(layer.forward(&empty(&[0, config.embed_dim])?)?.dims(), [0, config.output_dim()]);
    }
    let layer = cross_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    assert_eq!(layer.forward(&empty(&[2, 0, 8])?, &randn(1, (2, 3, 8), DType::F32)?)?.dims(), [2, 0, 8]);
    Ok(())
}

/// With an empty input every parameter has a gradient of zeros.
#[test]
fn training_on_nothing_is_no_error() -> Result<()> {
    for config in [SelfAttentionConfig::new(8, 2), everything()] {
        for dims in [[0, 5, config.embed_dim], [2, 0, config.embed_dim]] {
            let layer = self_attention(&config, DType::F32)?;
            let grads = layer.forward_t(&empty(&dims)?, true)?.sum_all()?.backward()?;
            for ((name, _), var) in layer.parameters().into_iter().zip(layer.vars()) {
                let grad = grads.get(&var).unwrap_or_else(|| panic!("{dims:?}: no gradient of {name}"));
                assert_eq!(numbers(grad)?, vec![0.0; grad.elem_count()], "{name}");
            }
        }
    }
    Ok(())
}

/// Without keys the context is zero, and W_O adds its bias.
#[test]
fn empty_memory_leaves_the_bias_of_w_o() -> Result<()> {
    let layer = cross_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    let (output, weights) = layer.forward_with_weights(&randn(1, (2, 5, 8), DType::F32)?, &empty(&[2, 0, 8])?)?;
    let bias = layer.o_proj().expect("W_O").bias().expect("a bias").broadcast_as((2, 5, 8))?;
    assert_same_bits(&output, &bias, "output");
    assert_eq!(weights.dims(), [2, 2, 5, 0]);
    Ok(())
}
