//! Weights that come through a `VarBuilder` obey the rule of those from a file: floats of a supported dtype, all of them
//! finite, which the dtype of the `VarBuilder` can hold.

use std::path::Path;

use candle_attention::{Layout, Result, SelfAttention, SelfAttentionConfig, checkpoint};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarBuilder, VarMap};

use crate::layers::assert_error_says;

use super::models::{PREFIX, Tensors, builder, in_a_model, model, write};

/// A `VarBuilder` of every kind with these tensors under [`PREFIX`]. Its file is in `folder`.
fn builders(
    tensors: &Tensors,
    dtype: DType,
    folder: &Path,
) -> anyhow::Result<Vec<(&'static str, VarBuilder<'static>)>> {
    let all = in_a_model(tensors)?;
    let path = folder.join("model.safetensors");
    write(&path, &all)?;
    let index = folder.join("model.index.json");
    let weight_map: serde_json::Map<_, _> = all.keys().map(|name| (name.clone(), "model.safetensors".into())).collect();
    std::fs::write(&index, serde_json::json!({ "weight_map": weight_map }).to_string())?;
    let buffered = VarBuilder::from_buffered_safetensors(std::fs::read(&path)?, dtype, &Device::Cpu)?;
    let builders = [
        ("tensors", builder(&all, dtype)),
        ("buffer", buffered.clone()),
        ("renamed buffer", buffered.rename_f(|name| name.to_string())),
        ("file", checkpoint::var_builder(&path, dtype, &Device::Cpu)?),
        ("shards", checkpoint::var_builder(&index, dtype, &Device::Cpu)?),
    ];
    Ok(builders.map(|(kind, vb)| (kind, vb.pp(PREFIX))).into())
}

/// Checks that no layer can be made, with all these parts in the text, whatever the kind of `VarBuilder`, by `new` and by
/// `from_layout`.
#[track_caller]
fn refused(tensors: &Tensors, dtype: DType, parts: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let config = SelfAttentionConfig::new(4, 2);
    for (_, vb) in builders(tensors, dtype, folder.path()).unwrap() {
        assert_error_says(SelfAttention::new(&config, vb.clone()), parts);
        assert_error_says(SelfAttention::from_layout(Layout::Own, &config, vb), parts);
    }
}

/// The tensors of `SelfAttentionConfig::new(4, 2)`, where one is replaced.
fn with(name: &str, tensor: Tensor) -> Result<Tensors> {
    let mut tensors = Tensors::new();
    for proj in ["q_proj", "k_proj", "v_proj", "o_proj"] {
        tensors.insert(format!("{proj}.weight"), crate::common::randn(1, (4, 4), DType::F32)?);
        tensors.insert(format!("{proj}.bias"), crate::common::randn(2, 4, DType::F32)?);
    }
    assert!(tensors.insert(name.to_string(), tensor).is_some());
    Ok(tensors)
}

fn filled(numbers: [f64; 4], dtype: DType) -> Result<Tensor> {
    Ok(Tensor::new(&numbers, &Device::Cpu)?.to_dtype(dtype)?)
}

#[test]
fn numbers_that_are_not_finite_are_refused() -> Result<()> {
    for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for stored in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            for dtype in [DType::F32, DType::F16] {
                let tensors = with("k_proj.bias", filled([0.5, 1.0, 2.0, number], stored)?)?;
                refused(&tensors, dtype, &[&format!("`{PREFIX}.k_proj.bias`: expected finite numbers, got NaN")]);
            }
        }
    }
    Ok(())
}

#[test]
fn numbers_too_large_for_the_builder_are_refused() -> Result<()> {
    for (number, stored, dtype) in
        [(65536.0, DType::F32, DType::F16), (1e39, DType::F64, DType::F32), (-1e30, DType::BF16, DType::F16)]
    {
        let tensors = with("v_proj.bias", filled([0.5, 1.0, 2.0, number], stored)?)?;
        let parts = [format!("`{PREFIX}.v_proj.bias`: expected "), format!("numbers that {dtype:?} can")];
        refused(&tensors, dtype, &[&parts[0], &parts[1]]);
    }
    Ok(())
}

/// Where candle reads the file, floats of eight bits can't be told from wider ones, and it doesn't return from a cast of
/// them to F64.
#[test]
fn floats_of_eight_bits_are_refused_or_read() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    for number in [1.0, 0.0625, f64::NAN] {
        let eight_bits = Tensor::full(number as f32, (4, 4), &Device::Cpu)?.to_dtype(DType::F8E4M3)?;
        for dtype in [DType::F32, DType::BF16] {
            for (kind, vb) in builders(&with("q_proj.weight", eight_bits.clone())?, dtype, folder.path())? {
                let layer = SelfAttention::from_layout(Layout::Own, &SelfAttentionConfig::new(4, 2), vb);
                assert!(layer.is_err() || (kind.ends_with("buffer") && number.is_finite()), "{kind}, {number}");
            }
        }
    }
    Ok(())
}

/// An integer shows in files that candle reads if it is outside of 0 to 255.
#[test]
fn integers_are_refused() -> Result<()> {
    for (stored, number) in [(DType::I16, -3.0), (DType::I32, 300.0), (DType::I64, -1.0), (DType::U32, 1000.0)] {
        let tensors = with("o_proj.bias", filled([0.0, 1.0, 2.0, number], stored)?)?;
        refused(&tensors, DType::F32, &[&format!("`{PREFIX}.o_proj.bias`: expected dtype F16, BF16, F32 or F64, got")]);
    }
    Ok(())
}

/// A tensor in memory, and a file that this crate reads, show their dtype whatever the numbers.
#[test]
fn every_dtype_that_is_no_float_is_named() -> anyhow::Result<()> {
    let (config, folder) = (SelfAttentionConfig::new(4, 2), tempfile::tempdir()?);
    for stored in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64, DType::F8E4M3] {
        let tensors = with("q_proj.weight", Tensor::ones((4, 4), DType::F32, &Device::Cpu)?.to_dtype(stored)?)?;
        let expected = format!("`{PREFIX}.q_proj.weight`: expected dtype F16, BF16, F32 or F64, got {stored:?}");
        for (kind, vb) in builders(&tensors, DType::F32, folder.path())? {
            if !kind.contains("buffer") {
                assert_error_says(SelfAttention::new(&config, vb.clone()), &[&expected]);
                assert_error_says(SelfAttention::from_layout(Layout::Own, &config, vb), &[&expected]);
            }
        }
    }
    Ok(())
}

#[test]
fn quantised_weights_with_a_scale_are_refused() -> Result<()> {
    let ones = Tensor::ones((4, 4), DType::F32, &Device::Cpu)?.to_dtype(DType::F8E4M3)?;
    for scale in ["weight_scale", "weight_scale_inv", "weight.absmax", "SCB", "scales", "scale_weight"] {
        let mut tensors = with("q_proj.weight", ones.clone())?;
        tensors.insert(format!("q_proj.{scale}"), Tensor::new(&[0.5f32], &Device::Cpu)?);
        refused(&tensors, DType::F32, &[&format!("`{PREFIX}.q_proj.weight`: expected"), &format!("q_proj.{scale}")]);
    }
    Ok(())
}

/// Whole numbers and numbers of few bits are weights if their dtype is that of weights.
#[test]
fn floats_that_look_like_integers_are_weights() -> anyhow::Result<()> {
    let (config, folder) = (SelfAttentionConfig::new(4, 2), tempfile::tempdir()?);
    for numbers in [[0.0; 4], [1.0; 4], [-3.0, -0.0, 300.0, 1024.0], [-0.5, 2.5, 0.25, -448.0]] {
        for stored in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
                let tensors = with("v_proj.bias", filled(numbers, stored)?)?;
                for (_, vb) in builders(&tensors, dtype, folder.path())? {
                    let layer = SelfAttention::new(&config, vb.clone())?;
                    let got = layer.v_proj().bias().expect("a bias").to_dtype(DType::F64)?;
                    assert_eq!(got.to_vec1::<f64>()?, numbers);
                    SelfAttention::from_layout(Layout::Own, &config, vb)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn builder_of_zeros_makes_a_layer() -> Result<()> {
    let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
    let layer = SelfAttention::new(&SelfAttentionConfig::new(4, 2), vb)?;
    assert_eq!(layer.q_proj().weight().sum_all()?.to_scalar::<f32>()?, 0.0);
    Ok(())
}

/// A `VarMap` hands out its variables whatever the dtype of the `VarBuilder`. A layer of two dtypes could not compute, and
/// its file could not be loaded.
#[test]
fn variables_of_another_dtype_are_refused_and_nothing_is_created() -> Result<()> {
    let config = SelfAttentionConfig::new(4, 2);
    for other in [DType::F64, DType::BF16, DType::U32] {
        let varmap = VarMap::new();
        let vb = |dtype| VarBuilder::from_varmap(&varmap, dtype, &Device::Cpu).pp("attn");
        vb(other).get_with_hints((4, 4), "k_proj.weight", Init::Const(0.0))?;
        let expected = format!("`attn.k_proj.weight`: expected dtype F32, that of the VarBuilder, got {other:?}");
        assert_error_says(SelfAttention::new(&config, vb(DType::F32)), &[&expected]);
        assert_error_says(SelfAttention::from_layout(Layout::Own, &config, vb(DType::F32)), &[&expected]);
        assert_eq!(varmap.all_vars().len(), 1);
    }
    Ok(())
}

#[test]
fn packed_variables_of_two_dtypes_are_refused() -> Result<()> {
    let model = model("GPT-2");
    let varmap = VarMap::new();
    let vb = |dtype| VarBuilder::from_varmap(&varmap, dtype, &Device::Cpu);
    for ((name, shape), dtype) in model.shapes.iter().zip([DType::F32, DType::F64].into_iter().cycle()) {
        vb(dtype).get_with_hints(shape.as_slice(), name, Init::Const(0.5))?;
    }
    for (dtype, other) in [(DType::F32, DType::F64), (DType::F64, DType::F32)] {
        let expected = format!("expected dtype {dtype:?}, that of the VarBuilder, got {other:?}");
        assert_error_says(model.layer_from(vb(dtype)), &[&expected]);
    }
    Ok(())
}
