//! Parameters: their initial values, their names, and where they come from.

use std::collections::HashMap;

use candle_attention::rotary::RotaryConfig;
use candle_attention::{CrossAttention, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::common::{assert_same_bits, max_abs_difference, numbers, randn};
use crate::layers::{AttentionLayer, assert_candle_error_says, everything, parameter};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

fn builder(varmap: &VarMap, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_varmap(varmap, dtype, &Device::Cpu)
}

fn layer(config: &SelfAttentionConfig, prefix: &str) -> Result<SelfAttention> {
    SelfAttention::new(config, builder(&VarMap::new(), DType::F32).pp(prefix))
}

fn weight_names() -> [&'static str; 4] {
    ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
}

/// For each weight, whether it is the same in two layers.
fn same_weights(a: &dyn AttentionLayer, b: &dyn AttentionLayer) -> Result<Vec<bool>> {
    let same = |name| -> Result<bool> {
        let (a, b) = (parameter(a, name).expect("a weight"), parameter(b, name).expect("a weight"));
        Ok(max_abs_difference(&a, &b)? == 0.0)
    };
    weight_names().into_iter().map(same).collect()
}

#[test]
fn same_seed_and_place_give_the_same_parameters() -> Result<()> {
    let config = everything();
    for _ in 0..3 {
        let (a, b) = (layer(&config, "model.layer")?, layer(&config, "model.layer")?);
        for ((name, a), (_, b)) in a.parameters().into_iter().zip(b.parameters()) {
            assert_same_bits(a, b, name);
        }
    }
    Ok(())
}

#[test]
fn another_seed_or_place_gives_other_weights() -> Result<()> {
    let config = SelfAttentionConfig::new(8, 2);
    let first = layer(&config, "layer.0")?;
    assert_eq!(same_weights(&first, &layer(&config, "layer.1")?)?, [false; 4]);
    assert_eq!(same_weights(&first, &layer(&config, "")?)?, [false; 4]);
    let other = SelfAttentionConfig { seed: 1, ..config };
    assert_eq!(same_weights(&first, &layer(&other, "layer.0")?)?, [false; 4]);
    Ok(())
}

#[test]
fn trainable_copy_shares_nothing_with_the_layer() -> Result<()> {
    let layer = layer(&everything(), "layer")?;
    let copy = layer.trainable()?;
    assert_eq!(copy.vars().len(), layer.parameters().len());
    for var in copy.vars() {
        var.set(&var.zeros_like()?)?;
    }
    for ((name, a), (_, b)) in layer.parameters().into_iter().zip(copy.parameters()) {
        assert!(numbers(b)?.iter().all(|x| *x == 0.0), "{name}");
        // A bias may be zero from the start.
        assert!(!name.ends_with("_proj.weight") || numbers(a)?.iter().any(|x| *x != 0.0), "{name}");
    }
    Ok(())
}

#[test]
fn weights_of_one_layer_differ() -> Result<()> {
    let layer = layer(&SelfAttentionConfig::new(8, 2), "")?;
    for (i, a) in weight_names().into_iter().enumerate() {
        for b in &weight_names()[..i] {
            let (x, y) = (parameter(&layer, a).unwrap(), parameter(&layer, b).unwrap());
            assert!(max_abs_difference(&x, &y)? > 1e-3, "{a}, {b}");
        }
    }
    Ok(())
}

#[test]
fn dtypes_start_from_the_same_numbers() -> Result<()> {
    let config = SelfAttentionConfig::new(8, 2);
    let exact = SelfAttention::new(&config, builder(&VarMap::new(), DType::F64))?;
    for dtype in DTYPES {
        let layer = SelfAttention::new(&config, builder(&VarMap::new(), dtype))?;
        for ((name, tensor), (_, exact)) in layer.parameters().into_iter().zip(exact.parameters()) {
            assert_same_bits(tensor, &exact.to_dtype(dtype)?, name);
        }
    }
    Ok(())
}

/// Uniform in ±sqrt(6 / (in + out)): within the bound and close to it, with mean 0 and variance bound² / 3.
#[test]
fn weights_start_xavier_uniform() -> Result<()> {
    let config = SelfAttentionConfig {
        num_kv_heads: Some(2),
        head_dim: Some(16),
        value_dim: Some(24),
        ..SelfAttentionConfig::new(96, 8)
    };
    let layer = layer(&config, "")?;
    let shapes = [(128, 96), (32, 96), (48, 96), (96, 192)];
    for (name, (outputs, inputs)) in weight_names().into_iter().zip(shapes) {
        let weight = parameter(&layer, name).expect("a weight");
        assert_eq!(weight.dims(), [outputs, inputs], "{name}");
        let weights = numbers(&weight)?;
        let count = weights.len() as f64;
        let bound = (6.0 / (inputs + outputs) as f64).sqrt();
        let largest = weights.iter().fold(0f64, |largest, x| largest.max(x.abs()));
        assert!(largest <= bound * (1.0 + 1e-6) && largest > 0.99 * bound, "{name}: {largest}, bound {bound}");
        let mean = weights.iter().sum::<f64>() / count;
        let variance = weights.iter().map(|x| x * x).sum::<f64>() / count;
        // Five standard errors of each.
        assert!(mean.abs() < 5.0 * bound / (3.0 * count).sqrt(), "{name}: mean {mean}");
        let relative = variance / (bound * bound / 3.0) - 1.0;
        assert!(relative.abs() < 5.0 * (0.8 / count).sqrt(), "{name}: variance off by {relative}");
    }
    Ok(())
}

#[test]
fn biases_and_sinks_start_at_zero_and_norms_at_one() -> Result<()> {
    let config = everything();
    for dtype in DTYPES {
        let layer = SelfAttention::new(&config, builder(&VarMap::new(), dtype))?;
        for (name, tensor) in layer.parameters() {
            let start = match name {
                "q_norm.weight" | "k_norm.weight" => 1.0,
                "sinks" => 0.0,
                _ if name.ends_with(".bias") => 0.0,
                _ => continue,
            };
            assert_eq!(numbers(tensor)?, vec![start; tensor.elem_count()], "{name}");
        }
    }
    Ok(())
}

#[test]
fn parameters_have_the_names_and_shapes_of_most_checkpoints() -> Result<()> {
    let layer = layer(&everything(), "")?;
    let parameters = layer.parameters();
    let found: HashMap<&str, &[usize]> = parameters.iter().map(|(name, tensor)| (*name, tensor.dims())).collect();
    let expected: HashMap<&str, &[usize]> = HashMap::from([
        ("q_proj.weight", &[24, 10][..]),
        ("k_proj.weight", &[12, 10]),
        ("v_proj.weight", &[6, 10]),
        ("o_proj.weight", &[10, 12]),
        ("q_proj.bias", &[24]),
        ("k_proj.bias", &[12]),
        ("v_proj.bias", &[6]),
        ("o_proj.bias", &[10]),
        ("q_norm.weight", &[6]),
        ("k_norm.weight", &[6]),
        ("sinks", &[4]),
    ]);
    assert_eq!(found, expected);
    assert_eq!(found.len(), parameters.len());
    Ok(())
}

#[test]
fn two_layers_of_a_model_have_parameters_of_their_own() -> Result<()> {
    let varmap = VarMap::new();
    let vb = builder(&varmap, DType::F32);
    let config = SelfAttentionConfig::new(8, 2);
    let first = SelfAttention::new(&config, vb.pp("layers.0.attention"))?;
    let second = CrossAttention::new(&config, vb.pp("layers").pp(1).pp("attention"))?;
    let data = varmap.data().lock().unwrap();
    assert_eq!(data.len(), 16);
    for (prefix, layer) in [("layers.0.attention", &first as &dyn AttentionLayer), ("layers.1.attention", &second)] {
        for ((name, tensor), var) in layer.parameters().into_iter().zip(layer.vars()) {
            let stored = data.get(&format!("{prefix}.{name}")).expect("the parameter under its prefix");
            assert_eq!(stored.as_tensor().id(), tensor.id(), "{name}");
            assert_eq!(var.as_tensor().id(), tensor.id(), "{name}");
        }
    }
    assert_eq!(same_weights(&first, &second)?, [false; 4]);
    Ok(())
}

/// A second layer with the same prefix has the same parameters, with what the first layer has learned.
#[test]
fn parameters_that_are_there_are_taken_as_they_are() -> Result<()> {
    let varmap = VarMap::new();
    let config = everything();
    let first = SelfAttention::new(&config, builder(&varmap, DType::F32))?;
    crate::layers::randomise(&first, 5)?;
    let learned: Vec<Tensor> =
        first.parameters().iter().map(|(_, tensor)| tensor.copy()).collect::<candle_core::Result<_>>()?;
    let other_seed = SelfAttentionConfig { seed: 99, ..config };
    let second = SelfAttention::new(&other_seed, builder(&varmap, DType::F32))?;
    for ((name, tensor), learned) in second.parameters().into_iter().zip(&learned) {
        assert_same_bits(tensor, learned, name);
    }
    Ok(())
}

fn tensors(config: &SelfAttentionConfig) -> Result<HashMap<String, Tensor>> {
    let layer = layer(config, "")?;
    let parameters = layer.parameters().into_iter();
    parameters.map(|(name, tensor)| Ok((name.to_string(), tensor.copy()?))).collect()
}

#[test]
fn tensor_that_a_builder_lacks_is_named() -> Result<()> {
    let config = everything();
    let all = tensors(&config)?;
    assert_eq!(all.len(), 11);
    for name in all.keys() {
        let mut some = all.clone();
        some.remove(name);
        let vb = VarBuilder::from_tensors(some, DType::F32, &Device::Cpu);
        assert_candle_error_says(SelfAttention::new(&config, vb), &[name]);
    }
    Ok(())
}

#[test]
fn tensor_of_another_shape_is_named() -> Result<()> {
    let config = everything();
    let all = tensors(&config)?;
    for name in all.keys() {
        let mut some = all.clone();
        some.insert(name.clone(), randn(1, (3, 5), DType::F32)?);
        let vb = VarBuilder::from_tensors(some, DType::F32, &Device::Cpu);
        assert_candle_error_says(SelfAttention::new(&config, vb), &[name, "[3, 5]"]);
    }
    Ok(())
}

#[test]
fn layer_on_a_read_only_builder_infers_but_has_nothing_to_train() -> Result<()> {
    let config = everything();
    let all = tensors(&config)?;
    let read_only = SelfAttention::new(&config, VarBuilder::from_tensors(all, DType::F32, &Device::Cpu))?;
    assert!(read_only.vars().is_empty());
    assert_eq!(read_only.parameters().len(), 11);
    let x = randn(1, (5, config.embed_dim), DType::F32)?;
    assert_same_bits(&read_only.forward(&x)?, &layer(&config, "")?.forward(&x)?, "output");
    Ok(())
}

fn in_var_map(varmap: &VarMap) -> Vec<String> {
    varmap.data().lock().unwrap().keys().cloned().collect()
}

/// Parameters of a refused layer would be found by the next layer with the same prefix.
#[test]
fn refused_config_leaves_no_parameters_behind() {
    let varmap = VarMap::new();
    let config = SelfAttentionConfig { num_heads: 3, ..SelfAttentionConfig::new(8, 2) };
    assert!(SelfAttention::new(&config, builder(&varmap, DType::F32)).is_err());
    assert_eq!(in_var_map(&varmap), [""; 0], "heads that don't divide embed_dim");
    let config = SelfAttentionConfig { kv_dim: Some(6), ..SelfAttentionConfig::new(8, 2) };
    assert!(SelfAttention::new(&config, builder(&varmap, DType::F32)).is_err());
    assert_eq!(in_var_map(&varmap), [""; 0], "kv_dim in self-attention");
}

/// The same for cross-attention.
#[test]
fn refused_rotary_embedding_leaves_no_parameters_behind() {
    let varmap = VarMap::new();
    let config = SelfAttentionConfig { rotary: Some(RotaryConfig::default()), ..SelfAttentionConfig::new(8, 2) };
    assert!(CrossAttention::new(&config, builder(&varmap, DType::F32)).is_err());
    assert_eq!(in_var_map(&varmap), [""; 0]);
}
