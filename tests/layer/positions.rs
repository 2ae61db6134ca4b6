//! Positions: rotary embedding depends only on the relative position of two tokens, and ALiBi has the slopes of its
//! paper.

use candle_attention::rotary::{Pairing, RotaryConfig, RotaryEmbedding};
use candle_attention::{ForwardOptions, Result, SelfAttentionConfig};
use candle_core::{DType, Tensor};

use crate::common::{assert_close, assert_same_bits, max_abs_difference, numbers, randn};
use crate::layers::{Formula, cross_attention, scalings, self_attention};

/// Both pairings, with all or some of the entries rotated, with each scaling and without.
pub fn rotaries() -> Vec<RotaryConfig> {
    let mut configs = Vec::new();
    for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
        for dim in [None, Some(6), Some(4), Some(2)] {
            let plain = RotaryConfig { base: 50.0, dim, pairing, scaling: None };
            let scaled = scalings(dim.unwrap_or(6) / 2).into_iter();
            configs.extend(scaled.map(|scaling| RotaryConfig { scaling: Some(scaling), ..plain.clone() }));
            configs.push(plain);
        }
    }
    configs
}

fn layer_config(rotary: &RotaryConfig) -> SelfAttentionConfig {
    SelfAttentionConfig { rotary: Some(rotary.clone()), num_kv_heads: Some(1), ..SelfAttentionConfig::new(12, 2) }
}

fn at(position_offset: usize) -> ForwardOptions {
    ForwardOptions { position_offset, return_weights: true, ..Default::default() }
}

#[test]
fn rotary_layer_equals_its_formula() -> Result<()> {
    for rotary in rotaries() {
        let layer = self_attention(&layer_config(&rotary), DType::F64)?;
        let x = randn(1, (5, 12), DType::F64)?;
        for position_offset in [0, 3, 1000] {
            let result = layer.forward_with(&x, &at(position_offset))?;
            let formula = Formula { position_offset, ..Formula::of(&layer) };
            let (output, weights) = formula.compute(&x, &x)?;
            let what = format!("{rotary:?} at {position_offset}");
            assert_close(&result.output, &output, 1e-12, &what);
            assert_close(&result.weights.expect("weights"), &weights, 1e-12, &what);
        }
    }
    Ok(())
}

#[test]
fn rotary_scores_depend_on_relative_positions_only() -> Result<()> {
    for rotary in rotaries() {
        let layer = self_attention(&layer_config(&rotary), DType::F64)?;
        let x = randn(1, (2, 5, 12), DType::F64)?;
        let first = layer.forward_with(&x, &at(0))?;
        for offset in [1, 17, 4096, 1_000_000] {
            let later = layer.forward_with(&x, &at(offset))?;
            // The angles near a million are rounded to 1e-10.
            let what = format!("{rotary:?} at {offset}");
            assert_close(&later.output, &first.output, 1e-9, &what);
            assert_close(&later.weights.unwrap(), first.weights.as_ref().unwrap(), 1e-9, &what);
        }
    }
    Ok(())
}

#[test]
fn rotary_layer_knows_the_order_of_its_tokens() -> Result<()> {
    for rotary in rotaries() {
        let layer = self_attention(&layer_config(&rotary), DType::F64)?;
        let x = randn(1, (5, 12), DType::F64)?;
        let flipped = layer.forward(&x.flip(&[0])?)?.flip(&[0])?;
        assert!(max_abs_difference(&flipped, &layer.forward(&x)?)? > 1e-3, "{rotary:?}");
    }
    Ok(())
}

/// Lengths and offsets alternate, so that angles kept from an earlier call would give other results.
#[test]
fn rotary_layer_does_not_depend_on_earlier_calls() -> Result<()> {
    let config = layer_config(&RotaryConfig::default());
    let x = randn(1, (2, 9, 12), DType::F32)?;
    let used = self_attention(&config, DType::F32)?;
    for (len, offset) in [(9, 0), (4, 0), (9, 0), (4, 5), (4, 0), (1, 7), (9, 7)] {
        let x = x.narrow(1, 0, len)?;
        let fresh = self_attention(&config, DType::F32)?;
        let expected = fresh.forward_with(&x, &at(offset))?.output;
        let output = used.forward_with(&x, &at(offset))?.output;
        assert_same_bits(&output, &expected, &format!("{len} tokens at {offset}"));
    }
    Ok(())
}

#[test]
fn sequences_at_places_of_their_own_turn_as_each_alone() -> Result<()> {
    for config in rotaries() {
        let rotary = RotaryEmbedding::new(&config, 6)?;
        let x = randn(1, (3, 2, 4, 6), DType::F64)?;
        for offsets in [[5, 0, 1000], [7, 7, 7], [0, 1, 2]] {
            let each = rotary.apply_each(&x, &offsets)?;
            for (b, offset) in offsets.into_iter().enumerate() {
                let alone = rotary.apply(&x.narrow(0, b, 1)?, offset)?;
                assert_same_bits(&each.narrow(0, b, 1)?, &alone, &format!("{config:?}, {offsets:?}, sequence {b}"));
            }
        }
        assert_same_bits(&rotary.apply_each(&x, &[9])?, &rotary.apply(&x, 9)?, "one offset for all");
    }
    Ok(())
}

#[test]
fn position_offset_means_nothing_without_rotary_embedding() -> Result<()> {
    let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?;
    let x = randn(1, (2, 5, 8), DType::F32)?;
    let far = layer.forward_with(&x, &at(usize::MAX))?.output;
    assert_same_bits(&far, &layer.forward(&x)?, "at the end of all positions");
    Ok(())
}

fn alibi_config(num_heads: usize) -> SelfAttentionConfig {
    SelfAttentionConfig { alibi: true, ..SelfAttentionConfig::new(2 * num_heads, num_heads) }
}

/// The slope of each head, computed from its weights: for equal tokens the scores differ only by the bias, so that a
/// key at distance d has exp(-slope · d) times the weight of the token itself.
fn slopes_by_weights(num_heads: usize, dtype: DType) -> Result<Vec<f64>> {
    let layer = self_attention(&alibi_config(num_heads), dtype)?;
    let x = randn(1, (1, 2 * num_heads), dtype)?.repeat((4, 1))?;
    let (_, weights) = layer.forward_with_weights(&x)?;
    let weights: Vec<Vec<Vec<f64>>> = weights.to_dtype(DType::F64)?.to_vec3()?;
    Ok(weights.iter().map(|head| (head[3][3] / head[3][2]).ln()).collect())
}

#[test]
fn alibi_slopes_of_eight_heads_are_those_of_the_paper() -> Result<()> {
    let paper = [1.0 / 2.0, 1.0 / 4.0, 1.0 / 8.0, 1.0 / 16.0, 1.0 / 32.0, 1.0 / 64.0, 1.0 / 128.0, 1.0 / 256.0];
    for (slope, expected) in slopes_by_weights(8, DType::F64)?.into_iter().zip(paper) {
        assert!((slope - expected).abs() < 1e-13, "{slope}, expected {expected}");
    }
    Ok(())
}

/// As in the authors' code: the slopes for eight heads, followed by every other slope for sixteen heads.
#[test]
fn alibi_slopes_of_twelve_heads_continue_with_those_of_sixteen() -> Result<()> {
    let exponents = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -0.5, -1.5, -2.5, -3.5];
    let slopes = slopes_by_weights(12, DType::F32)?;
    assert_eq!(slopes.len(), 12);
    for (slope, exponent) in slopes.into_iter().zip(exponents) {
        assert!((slope - 2f64.powf(exponent)).abs() < 1e-6, "{slope}, expected 2^{exponent}");
    }
    Ok(())
}

/// A layer in f64 needs slopes in f64: slopes like 2^(-1/2) lose precision in f32.
#[test]
fn alibi_slopes_of_an_f64_layer_have_the_precision_of_f64() -> Result<()> {
    let exponents = [-4.0, -8.0, -2.0];
    for (slope, exponent) in slopes_by_weights(3, DType::F64)?.into_iter().zip(exponents) {
        assert!((slope - 2f64.powf(exponent)).abs() < 1e-13, "{slope}, expected 2^{exponent}");
    }
    let exponents = [-2.0, -4.0, -6.0, -8.0, -1.0];
    for (slope, exponent) in slopes_by_weights(5, DType::F64)?.into_iter().zip(exponents) {
        assert!((slope - 2f64.powf(exponent)).abs() < 1e-13, "{slope}, expected 2^{exponent}");
    }
    let slope = slopes_by_weights(12, DType::F64)?[8];
    assert!((slope - 0.5f64.sqrt()).abs() < 1e-13, "{slope}, expected 2^-0.5");
    Ok(())
}

#[test]
fn alibi_layer_equals_its_formula() -> Result<()> {
    let slopes = [1.0 / 16.0, 1.0 / 256.0];
    let layer = self_attention(&alibi_config(2), DType::F64)?;
    let x = randn(1, (6, 4), DType::F64)?;
    let (output, weights) = layer.forward_with_weights(&x)?;
    let formula = Formula { slopes: &slopes, ..Formula::of(&layer) };
    let (expected, expected_weights) = formula.compute(&x, &x)?;
    assert_close(&weights, &expected_weights, 1e-12, "weights");
    assert_close(&output, &expected, 1e-12, "output");
    Ok(())
}

/// The last query is aligned with the last key, whichever sequence is longer.
#[test]
fn alibi_of_cross_attention_is_aligned_at_the_last_key() -> Result<()> {
    let slopes = [1.0 / 16.0, 1.0 / 256.0];
    let layer = cross_attention(&alibi_config(2), DType::F64)?;
    for (q_len, kv_len) in [(3, 6), (6, 3), (1, 5)] {
        let x = randn(1, (q_len, 4), DType::F64)?;
        let memory = randn(2, (kv_len, 4), DType::F64)?;
        let formula = Formula { slopes: &slopes, ..Formula::of(&layer) };
        let (expected, _) = formula.compute(&x, &memory)?;
        assert_close(&layer.forward(&x, &memory)?, &expected, 1e-12, &format!("{q_len}, {kv_len}"));
    }
    Ok(())
}

/// Slopes aren't parameters: a layer with ALiBi has the same parameters as one without.
#[test]
fn alibi_adds_no_parameters() -> Result<()> {
    let with = self_attention(&alibi_config(4), DType::F32)?;
    let without = self_attention(&SelfAttentionConfig::new(8, 4), DType::F32)?;
    assert_eq!(with.vars().len(), without.vars().len());
    let x: Tensor = randn(1, (5, 8), DType::F32)?;
    assert_ne!(numbers(&with.forward(&x)?)?, numbers(&without.forward(&x)?)?);
    Ok(())
}
