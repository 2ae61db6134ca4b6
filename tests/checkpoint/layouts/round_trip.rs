//! Loaded tensors are saved byte for byte.

use std::path::Path;

use candle_attention::{Layout, LayoutFile, SelfAttention, SelfAttentionConfig, checkpoint};
use candle_core::{DType, Device};

use crate::common::assert_same_bits;
use crate::layers::self_attention;

use super::models::{Model, PREFIX, Tensors, builder, bytes_of, in_a_model, models, write};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

fn at(folder: &tempfile::TempDir, name: &str) -> std::path::PathBuf {
    folder.path().join(name)
}

/// Checks that a file holds these tensors under [`PREFIX`], and nothing else.
#[track_caller]
fn assert_holds(path: &Path, model: &Model, tensors: &Tensors) -> anyhow::Result<()> {
    let expected = tempfile::NamedTempFile::new()?;
    let named = tensors.iter().map(|(name, tensor)| (format!("{PREFIX}.{name}"), tensor.clone())).collect();
    write(expected.path(), &named)?;
    let (found, expected) = (bytes_of(path)?, bytes_of(expected.path())?);
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{}", model.name);
    assert!(found == expected, "{}: other bytes", model.name);
    Ok(())
}

#[test]
fn every_layout_has_a_model() {
    for layout in Layout::ALL {
        assert!(models().iter().any(|model| model.layout == *layout), "{layout}");
    }
}

#[test]
fn loaded_and_saved_tensors_are_byte_equal() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (from, to) = (at(&folder, "from.safetensors"), at(&folder, "to.safetensors"));
    for model in models() {
        for dtype in DTYPES {
            let tensors = model.tensors(dtype)?;
            write(&from, &in_a_model(&tensors)?)?;
            let layer = model.load(&from, PREFIX, None)?;
            assert!(layer.parameters().iter().all(|(_, parameter)| parameter.dtype() == dtype));
            layer.save_layout(model.layout, PREFIX, &to)?;
            assert_holds(&to, &model, &tensors)?;
        }
    }
    Ok(())
}

#[test]
fn widened_and_narrowed_tensors_are_byte_equal() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (from, wide, back) = (at(&folder, "from"), at(&folder, "wide"), at(&folder, "back"));
    for model in models() {
        for (narrow, wider) in
            [(DType::BF16, DType::F32), (DType::F16, DType::F32), (DType::F16, DType::F64), (DType::F32, DType::F64)]
        {
            let tensors = model.tensors(narrow)?;
            write(&from, &in_a_model(&tensors)?)?;
            model.load(&from, PREFIX, Some(wider))?.save_layout(model.layout, PREFIX, &wide)?;
            let layer = model.load(&wide, PREFIX, Some(narrow))?;
            layer.save_layout(model.layout, PREFIX, &back)?;
            assert_holds(&back, &model, &tensors)?;
        }
    }
    Ok(())
}

#[test]
fn tensors_of_a_builder_come_back() -> anyhow::Result<()> {
    for model in models() {
        let tensors = model.tensors(DType::BF16)?;
        let vb = builder(&in_a_model(&tensors)?, DType::F64).pp(PREFIX);
        let layer = model.layer_from(vb)?;
        let given_back = layer.to_layout(model.layout)?;
        assert_eq!(given_back.len(), tensors.len(), "{}", model.name);
        for (name, tensor) in given_back {
            assert_eq!(tensor.dtype(), DType::F64, "{name}");
            assert!(tensor.is_contiguous() && !tensor.track_op(), "{name}");
            assert_same_bits(&tensor.to_dtype(DType::BF16)?, &tensors[&name], &name);
        }
    }
    Ok(())
}

#[test]
fn file_of_one_attention_needs_no_prefix() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = at(&folder, "layer.safetensors");
    for model in models() {
        let tensors = model.tensors(DType::F32)?;
        write(&path, &tensors)?;
        let layer = model.load(&path, "", None)?;
        layer.save_layout(model.layout, "", &path)?;
        assert_eq!(bytes_of(&path)?.keys().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
        let vb = checkpoint::var_builder(&path, DType::F32, &Device::Cpu)?;
        for ((name, a), (_, b)) in model.layer_from(vb)?.parameters().iter().zip(layer.parameters()) {
            assert_same_bits(a, b, name);
        }
    }
    Ok(())
}

/// Every layout that has names for all parameters saves and loads the same numbers.
#[test]
fn layouts_hold_the_same_parameters() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = at(&folder, "layer.safetensors");
    let plain = SelfAttentionConfig::new(8, 2);
    let layer = self_attention(&plain, DType::F32)?;
    for layout in Layout::ALL.iter().filter(|layout| **layout != Layout::T5) {
        layer.save_layout(*layout, PREFIX, &path)?;
        let loaded = SelfAttention::load_layout(&plain, &LayoutFile::new(*layout, &path).prefix(PREFIX))?;
        for ((name, a), (_, b)) in loaded.parameters().iter().zip(layer.parameters()) {
            assert_same_bits(a, b, &format!("{layout}, {name}"));
        }
    }
    Ok(())
}

/// Hugging Face's programs refuse a file without this entry.
#[test]
fn saved_file_says_that_it_is_of_pytorch() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = at(&folder, "layer.safetensors");
    self_attention(&SelfAttentionConfig::new(8, 2), DType::F32)?.save_layout(Layout::Bert, PREFIX, &path)?;
    let bytes = std::fs::read(&path)?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)?;
    assert_eq!(header.metadata().as_ref().expect("metadata")["format"], "pt");
    Ok(())
}

#[test]
fn save_that_fails_leaves_the_earlier_file() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let layer = self_attention(&SelfAttentionConfig { sinks: true, ..SelfAttentionConfig::new(8, 2) }, DType::F32)?;
    let path = at(&folder, "layer.safetensors");
    std::fs::write(&path, "earlier")?;
    let error = layer.save_layout(Layout::Bert, PREFIX, &path).unwrap_err().to_string();
    assert!(error.contains("sinks") && error.contains("bert"), "{error}");
    let error = layer.save_layout(Layout::Llama, PREFIX, at(&folder, "missing/layer")).unwrap_err().to_string();
    assert!(error.contains("can't write"), "{error}");
    assert_eq!(std::fs::read(&path)?, b"earlier");
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 1);
    Ok(())
}
