//! Finite settings that a layer's dtype can't hold, or that give angles which no number can hold.

use candle_attention::rotary::{RotaryConfig, RotaryEmbedding, RotaryScaling, Yarn};
use candle_attention::{CrossAttention, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::common::assert_finite;
use crate::layers::assert_error_says;

fn builder(dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_varmap(&VarMap::new(), dtype, &Device::Cpu)
}

const COMPUTED_IN_F32: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

#[test]
fn epsilon_that_f32_cannot_hold_is_refused_unless_in_f64() -> Result<()> {
    for eps in [1e-46, 1e-40, 1e300] {
        let config = SelfAttentionConfig { qk_norm_eps: Some(eps), ..SelfAttentionConfig::new(8, 2) };
        for dtype in COMPUTED_IN_F32 {
            let expected = ["qk_norm_eps", "above 0, also in f32", &format!("got {eps}")];
            assert_error_says(SelfAttention::new(&config, builder(dtype)), &expected);
            assert_error_says(CrossAttention::new(&config, builder(dtype)), &expected);
        }
        let zeros = Tensor::zeros((3, 8), DType::F64, &Device::Cpu)?;
        assert_finite(&SelfAttention::new(&config, builder(DType::F64))?.forward(&zeros)?, "layer in f64");
    }
    Ok(())
}

#[test]
fn smallest_epsilon_that_is_accepted_gives_numbers() -> Result<()> {
    for dtype in COMPUTED_IN_F32 {
        let eps = f64::from(f32::MIN_POSITIVE);
        let config = SelfAttentionConfig { qk_norm_eps: Some(eps), ..SelfAttentionConfig::new(8, 2) };
        let layer = SelfAttention::new(&config, builder(dtype))?;
        let x = Tensor::zeros((3, 8), dtype, &Device::Cpu)?;
        let output = layer.forward(&x)?;
        assert_finite(&output, "output");
        let grads = output.sqr()?.sum_all()?.backward()?;
        for (name, parameter) in layer.parameters() {
            assert_finite(grads.get(parameter).expect(name), name);
        }
    }
    Ok(())
}

#[test]
fn scale_and_softcap_that_f32_cannot_hold_are_refused_unless_in_f64() -> Result<()> {
    for number in [1e-46, 1e300] {
        let plain = SelfAttentionConfig::new(8, 2);
        let scaled = SelfAttentionConfig { scale: Some(number), ..plain.clone() };
        let capped = SelfAttentionConfig { softcap: Some(number), ..plain };
        for (field, config) in [("scale", scaled), ("softcap", capped)] {
            for dtype in COMPUTED_IN_F32 {
                let expected = [field, "a number that F32 can hold", &format!("got {number}")];
                assert_error_says(SelfAttention::new(&config, builder(dtype)), &expected);
            }
            SelfAttention::new(&config, builder(DType::F64))?;
        }
    }
    Ok(())
}

#[test]
fn rotary_base_whose_angles_overflow_is_refused() {
    for base in [1e-300, 5e-324] {
        let rotary = RotaryConfig { base, ..Default::default() };
        let expected = ["rotary.base", "a number that gives every position a finite angle", &format!("got {base}")];
        assert_error_says(RotaryEmbedding::new(&rotary, 64), &expected);
        let config = SelfAttentionConfig { rotary: Some(rotary), ..SelfAttentionConfig::new(64, 1) };
        assert_error_says(config.validate(), &expected);
        assert_error_says(SelfAttention::new(&config, builder(DType::F32)), &expected);
    }
}

#[test]
fn longrope_factors_whose_angles_overflow_are_refused() {
    for factor in [5e-324, 1e-300] {
        let scaling = RotaryScaling::LongRope {
            factors: vec![1.0, factor],
            factor: 4.0,
            original_max_position_embeddings: 4096,
            attention_factor: None,
        };
        let rotary = RotaryConfig { scaling: Some(scaling), ..Default::default() };
        let got = format!("got {factor}");
        let expected = ["rotary.scaling.factors", "numbers that give every position a finite angle", &got];
        assert_error_says(RotaryEmbedding::new(&rotary, 4), &expected);
        let config = SelfAttentionConfig { rotary: Some(rotary), ..SelfAttentionConfig::new(8, 2) };
        assert_error_says(config.validate(), &expected);
    }
}

/// Frequencies that are only just accepted have angles at the last position that can be counted.
#[test]
fn positions_are_finite_up_to_the_last() -> Result<()> {
    for (base, factor) in [(1e-280, 1.0), (1e-4, 1e-280), (f64::MAX, 1.0)] {
        let scaling = RotaryScaling::LongRope {
            factors: vec![factor, factor],
            factor: 4.0,
            original_max_position_embeddings: 4096,
            attention_factor: None,
        };
        let rotary = RotaryConfig { base, scaling: Some(scaling), ..Default::default() };
        let x = Tensor::ones((1, 1, 2, 4), DType::F32, &Device::Cpu)?;
        assert_finite(&RotaryEmbedding::new(&rotary, 4)?.apply(&x, usize::MAX - 2)?, &format!("{rotary:?}"));
    }
    Ok(())
}

#[test]
fn attention_factor_that_the_dtype_cannot_hold_is_refused() -> Result<()> {
    let yarn = |factor| Yarn { attention_factor: Some(factor), ..Yarn::new(4.0, 4096) };
    let dtypes = [(DType::F16, [7e4, 1e-8]), (DType::BF16, [1e300, 1e-60]), (DType::F32, [1e300, 1e-60])];
    for (dtype, factors) in dtypes {
        for factor in factors {
            let rotary = RotaryConfig { scaling: Some(RotaryScaling::Yarn(yarn(factor))), ..Default::default() };
            let (field, got) = ("rotary.scaling.attention_factor", format!("got {factor}"));
            let expected = [field, &format!("a number that {dtype:?} can hold"), &got];
            let embedding = RotaryEmbedding::new(&rotary, 4)?;
            let ones = |dtype| Tensor::ones((1, 1, 2, 4), dtype, &Device::Cpu);
            assert_error_says(embedding.apply(&ones(dtype)?, 0), &expected);
            assert_finite(&embedding.apply(&ones(DType::F64)?, 0)?, "f64");
            let config = SelfAttentionConfig { rotary: Some(rotary), ..SelfAttentionConfig::new(8, 2) };
            assert_error_says(SelfAttention::new(&config, builder(dtype)), &expected);
            SelfAttention::new(&config, builder(DType::F64))?;
        }
    }
    Ok(())
}
