//! Dropout: it is on only in training, drops other weights at each call, and drops the same ones again for the same
//! seed.

use candle_attention::{ForwardOptions, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::common::{assert_close, assert_same_bits, max_abs_difference, numbers, randn};
use crate::layers::{cross_attention, self_attention};

fn config() -> SelfAttentionConfig {
    SelfAttentionConfig { dropout_p: 0.4, seed: 3, ..SelfAttentionConfig::new(8, 2) }
}

fn input() -> Result<Tensor> {
    Ok(randn(1, (2, 5, 8), DType::F32)?)
}

fn differ(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(max_abs_difference(a, b)? > 1e-3)
}

#[test]
fn dropout_is_there_in_training_alone() -> Result<()> {
    let (layer, x) = (self_attention(&config(), DType::F32)?, input()?);
    let plain = self_attention(&SelfAttentionConfig { dropout_p: 0.0, ..config() }, DType::F32)?;
    let expected = plain.forward(&x)?;
    assert_same_bits(&layer.forward(&x)?, &expected, "forward");
    assert_same_bits(&layer.forward_t(&x, false)?, &expected, "forward_t(false)");
    assert_same_bits(&layer.forward_with_weights(&x)?.0, &expected, "forward_with_weights");
    let default = layer.forward_with(&x, &ForwardOptions::default())?;
    assert_same_bits(&default.output, &expected, "forward_with");
    assert_eq!(layer.dropout_calls(), 0);
    assert!(differ(&layer.forward_t(&x, true)?, &expected)?);
    let options = ForwardOptions { train: true, ..Default::default() };
    assert!(differ(&layer.forward_with(&x, &options)?.output, &expected)?);
    assert_eq!(layer.dropout_calls(), 2);
    Ok(())
}

#[test]
fn layer_without_dropout_trains_as_it_infers() -> Result<()> {
    let config = SelfAttentionConfig { dropout_p: 0.0, ..config() };
    let (layer, x) = (self_attention(&config, DType::F32)?, input()?);
    assert_same_bits(&layer.forward_t(&x, true)?, &layer.forward(&x)?, "output");
    assert_eq!(layer.dropout_calls(), 0);
    Ok(())
}

#[test]
fn each_training_pass_drops_anew() -> Result<()> {
    let (layer, x) = (self_attention(&config(), DType::F32)?, input()?);
    let passes = (0..5).map(|_| layer.forward_t(&x, true)).collect::<Result<Vec<_>>>()?;
    for (i, a) in passes.iter().enumerate() {
        for b in &passes[..i] {
            assert!(differ(a, b)?);
        }
    }
    Ok(())
}

#[test]
fn dropout_goes_on_where_a_run_stopped() -> Result<()> {
    let (layer, x) = (self_attention(&config(), DType::F32)?, input()?);
    let passes = (0..4).map(|_| layer.forward_t(&x, true)).collect::<Result<Vec<_>>>()?;
    let again = self_attention(&config(), DType::F32)?;
    again.set_dropout_calls(2);
    assert_same_bits(&again.forward_t(&x, true)?, &passes[2], "third pass");
    assert_same_bits(&again.forward_t(&x, true)?, &passes[3], "fourth pass");
    assert_eq!(again.dropout_calls(), 4);
    layer.set_dropout_calls(0);
    assert_same_bits(&layer.forward_t(&x, true)?, &passes[0], "first pass");
    layer.set_dropout_calls(u64::MAX);
    layer.forward_t(&x, true)?;
    Ok(())
}

#[test]
fn clones_share_their_draws() -> Result<()> {
    let (layer, x) = (self_attention(&config(), DType::F32)?, input()?);
    let clone = layer.clone();
    assert!(differ(&layer.forward_t(&x, true)?, &clone.forward_t(&x, true)?)?);
    assert_eq!((layer.dropout_calls(), clone.dropout_calls()), (2, 2));
    Ok(())
}

/// All layers have the same parameters, so that only the dropout differs.
#[test]
fn draws_come_from_the_seed_and_the_place_in_the_model() -> Result<()> {
    let x = input()?;
    let output = |seed, prefix: &str| -> Result<Tensor> {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
        let layer = SelfAttention::new(&SelfAttentionConfig { seed, ..config() }, vb.pp(prefix))?;
        crate::layers::randomise(&layer, 1)?;
        layer.forward_t(&x, true)
    };
    assert_same_bits(&output(3, "a")?, &output(3, "a")?, "same seed and prefix");
    assert!(differ(&output(3, "a")?, &output(4, "a")?)?, "another seed");
    assert!(differ(&output(3, "a")?, &output(3, "b")?)?, "another prefix");
    Ok(())
}

/// The kept weights compensate for the dropped ones: over many passes the mean is the output without dropout.
#[test]
fn mean_over_many_passes_is_the_output_without_dropout() -> Result<()> {
    const PASSES: usize = 4000;
    let layer = self_attention(&config(), DType::F32)?;
    let x = randn(1, (1, 5, 8), DType::F32)?.repeat((PASSES, 1, 1))?;
    let outputs = layer.forward_t(&x, true)?;
    let expected = layer.forward(&x.narrow(0, 0, 1)?)?.squeeze(0)?;
    // The standard deviation of each output is below 2, and that of a mean over 4,000 outputs below 2 / 63. The
    // tolerance is five times that.
    assert_close(&outputs.mean(0)?, &expected, 0.16, "mean");
    let spread = outputs.broadcast_sub(&expected)?.sqr()?.mean(0)?.sqrt()?;
    assert!(numbers(&spread)?.iter().all(|&spread| (0.01..2.0).contains(&spread)), "{spread}");
    Ok(())
}

#[test]
fn weights_are_told_before_dropout() -> Result<()> {
    let (layer, x) = (self_attention(&config(), DType::F32)?, input()?);
    let options = ForwardOptions { train: true, return_weights: true, ..Default::default() };
    let weights = layer.forward_with(&x, &options)?.weights.expect("weights");
    assert_same_bits(&weights, &layer.forward_with_weights(&x)?.1, "weights");
    Ok(())
}

#[test]
fn cross_attention_drops_in_training_alone() -> Result<()> {
    let layer = cross_attention(&config(), DType::F32)?;
    let (x, memory) = (input()?, randn(2, (2, 7, 8), DType::F32)?);
    let expected = layer.forward(&x, &memory)?;
    assert_same_bits(&layer.forward_t(&x, &memory, false)?, &expected, "forward_t(false)");
    let first = layer.forward_t(&x, &memory, true)?;
    assert!(differ(&first, &expected)?);
    assert!(differ(&first, &layer.forward_t(&x, &memory, true)?)?);
    layer.set_dropout_calls(0);
    assert_same_bits(&layer.forward_t(&x, &memory, true)?, &first, "first pass again");
    Ok(())
}
