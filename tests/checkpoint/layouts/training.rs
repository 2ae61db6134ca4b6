//! Weights of other programs can be trained further.

use candle_attention::{Layout, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Init, Optimizer, ParamsAdamW, VarBuilder, VarMap};

use crate::common::{assert_finite, assert_same_bits, max_abs_difference, randn};

use super::models::{Layer, PREFIX, builder, in_a_model, model, models, write};

/// Checks that every parameter is a variable with a gradient, and that a step of an optimiser changes it.
fn check_trains(what: &str, layer: &Layer, dtype: DType) -> Result<()> {
    let vars = layer.vars();
    assert_eq!(vars.len(), layer.parameters().len(), "{what}: variables");
    let before = vars.iter().map(|var| var.copy()).collect::<candle_core::Result<Vec<Tensor>>>()?;
    let output = layer.forward(&randn(7, (2, 5, layer.config().embed_dim), dtype)?)?;
    let grads = (&output * randn(8, output.shape(), dtype)?)?.sum_all()?.backward()?;
    for ((name, _), var) in layer.parameters().iter().zip(&vars) {
        let grad = grads.get(var).unwrap_or_else(|| panic!("{what}: {name} has no gradient"));
        assert_eq!((grad.dims(), grad.dtype()), (var.dims(), dtype), "{what}: {name}");
        assert_finite(grad, &format!("{what}: gradient of {name}"));
    }
    let params = ParamsAdamW { lr: 0.1, eps: 1e-3, weight_decay: 0.1, ..Default::default() };
    AdamW::new(vars.clone(), params)?.step(&grads)?;
    for (((name, _), var), before) in layer.parameters().iter().zip(&vars).zip(&before) {
        assert!(max_abs_difference(var, before)? > 0.0, "{what}: {name} didn't move");
    }
    Ok(())
}

#[test]
fn every_parameter_from_a_builder_trains() -> Result<()> {
    for model in models() {
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            let tensors = model.tensors(DType::F32)?;
            let layer = model.layer_from(builder(&tensors, dtype))?.trainable()?;
            check_trains(&format!("{}, {dtype:?}", model.name), &layer, dtype)?;
        }
    }
    Ok(())
}

/// Inference with constants records no graph.
#[test]
fn parameters_from_a_builder_of_constants_are_constants() -> Result<()> {
    for model in models() {
        let layer = model.layer_from(builder(&model.tensors(DType::F32)?, DType::F32))?;
        assert!(layer.vars().is_empty() && !layer.parameters().is_empty(), "{}", model.name);
        let x = randn(7, (2, 5, layer.config().embed_dim), DType::F32)?;
        let output = layer.forward(&x)?;
        assert!(!output.track_op(), "{}", model.name);
        let trainable = layer.trainable()?;
        assert_eq!(trainable.vars().len(), layer.parameters().len(), "{}", model.name);
        assert_same_bits(&trainable.forward(&x)?, &output, model.name);
    }
    Ok(())
}

#[test]
fn every_parameter_from_a_file_trains() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    for model in models() {
        write(&path, &in_a_model(&model.tensors(DType::F16)?)?)?;
        check_trains(model.name, &model.load(&path, PREFIX, Some(DType::F32))?, DType::F32)?;
    }
    Ok(())
}

/// Training must change neither the original tensors nor another layer that was made from them.
#[test]
fn parameters_share_nothing_with_what_they_came_from() -> Result<()> {
    for name in ["Llama", "GPT-2", "MultiheadAttention", "own"] {
        let model = model(name);
        let tensors = model.tensors(DType::F32)?;
        let before: Vec<Tensor> = tensors.values().map(Tensor::copy).collect::<candle_core::Result<_>>()?;
        let vb = builder(&tensors, DType::F32);
        let (first, second) = (model.layer_from(vb.clone())?.trainable()?, model.layer_from(vb)?);
        let given = first.to_layout(model.layout)?;
        check_trains(name, &first, DType::F32)?;
        for ((name, tensor), before) in tensors.iter().zip(&before) {
            assert_same_bits(tensor, before, name);
        }
        for ((name, a), (_, b)) in second.to_layout(model.layout)?.iter().zip(&given) {
            assert_same_bits(a, b, name);
        }
    }
    Ok(())
}

/// The variables of a `VarMap` are copied, both for separate and for packed tensors.
#[test]
fn variables_of_a_var_map_are_copied() -> Result<()> {
    for name in ["Llama", "GPT-2"] {
        let model = model(name);
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        for (name, shape) in &model.shapes {
            vb.get_with_hints(shape.as_slice(), name, Init::Randn { mean: 0.0, stdev: 1.0 })?;
        }
        let layer = model.layer_from(vb)?;
        let before: Vec<_> = varmap.all_vars().iter().map(|var| var.copy()).collect::<candle_core::Result<_>>()?;
        check_trains(name, &layer, DType::F32)?;
        for (var, before) in varmap.all_vars().iter().zip(&before) {
            assert_same_bits(var, before, name);
        }
    }
    Ok(())
}

/// Each layer of a model drops other weights.
#[test]
fn dropout_depends_on_the_place_in_the_model() -> Result<()> {
    let config = SelfAttentionConfig { dropout_p: 0.5, ..SelfAttentionConfig::new(8, 2) };
    let tensors = model("MultiheadAttention").tensors(DType::F32)?;
    let named =
        |prefix: &str| tensors.iter().map(|(name, tensor)| (format!("{prefix}.{name}"), tensor.clone())).collect();
    let output = |prefix: &str| -> Result<Tensor> {
        let vb = builder(&named(prefix), DType::F32).pp(prefix);
        SelfAttention::from_layout(Layout::Torch, &config, vb)?.forward_t(&randn(7, (6, 8), DType::F32)?, true)
    };
    assert_same_bits(&output("layers.0")?, &output("layers.0")?, "one prefix");
    assert!(max_abs_difference(&output("layers.0")?, &output("layers.1")?)? > 1e-3);
    Ok(())
}
