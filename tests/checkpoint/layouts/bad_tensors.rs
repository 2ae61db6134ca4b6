//! Checkpoints whose tensors aren't those of the config: one error lists all problems, with full names.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::layers::assert_error_says;

use super::models::{Layer, Model, PREFIX, Tensors, builder, in_a_model, model, models, write};

fn zeros(dims: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::zeros(dims, dtype, &Device::Cpu)
}

/// Loads a layer from a file with these tensors.
fn load(model: &Model, tensors: &Tensors, dtype: Option<DType>) -> Result<Layer> {
    let file = tempfile::NamedTempFile::new()?;
    write(file.path(), &in_a_model(tensors)?).map_err(candle_core::Error::wrap)?;
    Ok(model.load(file.path(), PREFIX, dtype)?)
}

fn from_builder(model: &Model, tensors: &Tensors) -> Result<Layer> {
    Ok(model.layer_from(builder(&in_a_model(tensors)?, DType::F32).pp(PREFIX))?)
}

#[test]
fn missing_tensors_are_named_with_their_shapes() -> Result<()> {
    for model in models() {
        for (name, shape) in &model.shapes {
            let mut tensors = model.tensors(DType::F32)?;
            tensors.remove(*name);
            let expected = format!("`{PREFIX}.{name}` is missing, expected {shape:?}");
            assert_error_says(load(&model, &tensors, None), &[&expected]);
            assert_error_says(from_builder(&model, &tensors), &[&expected]);
        }
    }
    Ok(())
}

#[test]
fn tensors_of_another_shape_are_named_with_both_shapes() -> Result<()> {
    for model in models() {
        for (name, shape) in &model.shapes {
            for got in [[shape.as_slice(), &[1]].concat(), vec![shape.iter().product::<usize>() + 1], vec![]] {
                let mut tensors = model.tensors(DType::F32)?;
                tensors.insert(name.to_string(), zeros(&got, DType::F32)?);
                let expected = format!("`{PREFIX}.{name}`: expected shape {shape:?}, got {got:?}");
                assert_error_says(load(&model, &tensors, None), &[&expected]);
                assert_error_says(from_builder(&model, &tensors), &[&expected]);
            }
        }
    }
    Ok(())
}

#[test]
fn unexpected_tensors_under_the_prefix_are_named() -> Result<()> {
    for model in models() {
        let mut tensors = model.tensors(DType::F32)?;
        for name in ["q_proj.qweight", "lora.weight", "Q_PROJ.weight", "🦀"] {
            tensors.insert(name.into(), zeros(&[2], DType::F32)?);
        }
        let names = tensors.keys().filter(|name| model.shapes.iter().all(|(known, _)| known != name));
        let expected: Vec<String> = names.map(|name| format!("`{PREFIX}.{name}` is unexpected")).collect();
        assert_eq!(expected.len(), 4);
        assert_error_says(load(&model, &tensors, None), &expected.iter().map(String::as_str).collect::<Vec<_>>());
    }
    Ok(())
}

/// A `VarBuilder` can't list its tensors, but it can be asked for each name of the layout.
#[test]
fn parameters_that_the_config_leaves_out_are_unexpected() -> Result<()> {
    for (name, more) in [
        ("Llama", "q_proj.bias"),
        ("Llama", "k_norm.weight"),
        ("Llama", "sinks"),
        ("Whisper", "k_proj.bias"),
        ("MPT", "Wqkv.bias"),
        ("add_bias_kv", "in_proj_bias"),
        ("MultiheadAttention", "bias_k"),
    ] {
        let model = model(name);
        let mut tensors = model.tensors(DType::F32)?;
        tensors.insert(more.into(), zeros(&[8], DType::F32)?);
        let expected = format!("`{PREFIX}.{more}` is unexpected");
        assert_error_says(load(&model, &tensors, None), &[&expected]);
        assert_error_says(from_builder(&model, &tensors), &[&expected]);
    }
    Ok(())
}

#[test]
fn what_stands_beside_the_attention_is_left_alone() -> Result<()> {
    for (name, others) in [
        ("BERT", &["output.LayerNorm.weight", "output.LayerNorm.bias"][..]),
        ("BERT", &["output.LayerNorm.gamma", "output.LayerNorm.beta"]),
        ("GPT-2", &["bias", "masked_bias"]),
        ("Llama", &["rotary_emb.inv_freq"]),
        ("T5", &["relative_attention_bias.weight"]),
    ] {
        let model = model(name);
        let mut tensors = model.tensors(DType::F32)?;
        for other in others {
            // These tensors may have any dtype and shape.
            tensors.insert(other.to_string(), zeros(&[3, 2], DType::U8)?);
        }
        load(&model, &tensors, None)?;
        from_builder(&model, &tensors)?;
    }
    Ok(())
}

#[test]
fn all_problems_are_told_at_once() -> Result<()> {
    let model = model("gpt-oss");
    let mut tensors = model.tensors(DType::F32)?;
    tensors.remove("q_proj.weight");
    tensors.remove("sinks");
    tensors.insert("k_proj.weight".into(), zeros(&[12, 6], DType::F32)?);
    tensors.insert("q_norm.weight".into(), zeros(&[3], DType::F32)?);
    let shared = [
        format!("`{PREFIX}.q_proj.weight` is missing, expected [12, 12]"),
        format!("`{PREFIX}.sinks` is missing, expected [4]"),
        format!("`{PREFIX}.k_proj.weight`: expected shape [6, 12], got [12, 6]"),
        format!("`{PREFIX}.q_norm.weight` is unexpected"),
    ];
    let shared: Vec<&str> = shared.iter().map(String::as_str).collect();
    assert_error_says(from_builder(&model, &tensors), &shared);
    tensors.insert("v_proj.weight".into(), zeros(&[6, 12], DType::I64)?);
    tensors.insert("o_proj.weight".into(), (zeros(&[12, 12], DType::F32)? + f64::NAN)?);
    tensors.insert("o_proj.bias".into(), zeros(&[12], DType::F16)?);
    tensors.insert("other".into(), zeros(&[12], DType::F32)?);
    let of_files = [
        format!("`{PREFIX}.v_proj.weight`: expected dtype F16, BF16, F32 or F64, got I64"),
        format!("`{PREFIX}.o_proj.weight`: expected finite numbers"),
        format!("`{PREFIX}.o_proj.bias`: expected dtype F32 as the others"),
        format!("`{PREFIX}.other` is unexpected"),
    ];
    let all = [shared, of_files.iter().map(String::as_str).collect()].concat();
    assert_error_says(load(&model, &tensors, None), &all);
    Ok(())
}

#[test]
fn wrong_prefix_misses_everything_under_it() -> Result<()> {
    let model = model("Phi-3");
    let file = tempfile::NamedTempFile::new()?;
    write(file.path(), &in_a_model(&model.tensors(DType::F32)?)?).map_err(candle_core::Error::wrap)?;
    for prefix in ["model.layers.2.attn", "layers.1.attn", "model.layers.1"] {
        let missing =
            [format!("`{prefix}.qkv_proj.weight` is missing"), format!("`{prefix}.o_proj.weight` is missing")];
        assert_error_says(model.load(file.path(), prefix, None), &missing.each_ref().map(String::as_str));
    }
    // Without a prefix, all tensors of the file are checked.
    assert_error_says(model.load(file.path(), "", None), &["`model.embed.weight` is unexpected"]);
    Ok(())
}

#[test]
fn weights_that_are_not_finite_are_named() -> Result<()> {
    for name in ["GPT-2", "Qwen3", "add_bias_kv"] {
        let model = model(name);
        for (of, shape) in &model.shapes {
            for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
                    let mut tensors = model.tensors(dtype)?;
                    // Only the last number isn't finite.
                    let count = shape.iter().product::<usize>();
                    let numbers: Vec<f64> = (0..count).map(|i| if i + 1 == count { number } else { 0.5 }).collect();
                    let numbers = Tensor::from_vec(numbers, shape.as_slice(), &Device::Cpu)?.to_dtype(dtype)?;
                    tensors.insert(of.to_string(), numbers);
                    let expected = format!("`{PREFIX}.{of}`: expected finite numbers, got NaN or infinity");
                    assert_error_says(load(&model, &tensors, None), &[&expected]);
                    assert_error_says(load(&model, &tensors, Some(DType::F32)), &[&expected]);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn weights_too_large_for_the_dtype_are_named() -> Result<()> {
    let model = model("Llama");
    for (from, number, to) in
        [(DType::F32, 70_000.0, DType::F16), (DType::F64, 1e39, DType::F32), (DType::BF16, -1e5, DType::F16)]
    {
        let mut tensors = model.tensors(from)?;
        tensors.insert("v_proj.weight".into(), (zeros(&[6, 12], from)? + number)?);
        let expected = format!("`{PREFIX}.v_proj.weight`: expected numbers that {to:?} can hold");
        assert_error_says(load(&model, &tensors, Some(to)), &[&expected]);
        load(&model, &tensors, None)?;
    }
    Ok(())
}

#[test]
fn tensors_of_several_dtypes_need_one_to_cast_to() -> Result<()> {
    let model = model("Qwen2");
    let mut tensors = model.tensors(DType::BF16)?;
    tensors.insert("v_proj.bias".into(), zeros(&[6], DType::F32)?);
    let expected = format!("`{PREFIX}.v_proj.bias`: expected dtype BF16 as the others, or one to cast to, got F32");
    assert_error_says(load(&model, &tensors, None), &[&expected]);
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        let layer = load(&model, &tensors, Some(dtype))?;
        assert!(layer.parameters().iter().all(|(_, parameter)| parameter.dtype() == dtype));
    }
    Ok(())
}

/// Quantised weights aren't supported.
#[test]
fn weights_that_are_no_floats_are_refused() -> Result<()> {
    let model = model("Llama");
    for dtype in [DType::U8, DType::U32, DType::I64, DType::F8E4M3] {
        let mut tensors = model.tensors(DType::F32)?;
        tensors.insert("k_proj.weight".into(), zeros(&[6, 12], DType::F32)?.to_dtype(dtype)?);
        let expected = format!("`{PREFIX}.k_proj.weight`: expected dtype F16, BF16, F32 or F64");
        for cast in [None, Some(DType::F32)] {
            assert_error_says(load(&model, &tensors, cast), &[&expected]);
        }
    }
    Ok(())
}

/// A `VarMap` creates a missing tensor when it is asked for it. A layout asks only for tensors that exist.
#[test]
fn var_map_without_the_tensors_stays_as_it_was() -> Result<()> {
    let model = model("GPT-2");
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    assert_error_says(model.layer_from(vb.clone()), &["`c_attn.weight` is missing", "`c_proj.bias` is missing"]);
    assert!(varmap.all_vars().is_empty());
    vb.get((24, 8), "c_attn.weight")?;
    assert_error_says(model.layer_from(vb), &["`c_attn.weight`: ", "[24, 8]", "`c_proj.bias` is missing"]);
    assert_eq!(varmap.all_vars().len(), 1);
    Ok(())
}
