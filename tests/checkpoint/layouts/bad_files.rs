//! Files that aren't safetensors, and headers with false claims. No memory is allocated for what a header only claims.

use std::fs;
use std::path::Path;

use candle_attention::checkpoint;
use candle_core::{DType, Device, Result, Tensor};

use crate::layers::{assert_candle_error_says, assert_error_says};

use super::models::{PREFIX, Tensors, in_a_model, model, write};

/// A safetensors file: the length of the header, the header, the data.
fn assemble(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    assert_error_says(model("Llama").load(file.path(), PREFIX, None), parts);
    assert_error_says(checkpoint::var_builder(file.path(), DType::F32, &Device::Cpu).map(|_| ()), parts);
}

#[test]
fn truncated_file_is_refused_wherever_it_ends() -> anyhow::Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    write(file.path(), &in_a_model(&model("Phi-3").tensors(DType::F32)?)?)?;
    let bytes = fs::read(file.path())?;
    for len in (0..64).chain((64..bytes.len()).step_by(61)).chain([bytes.len() - 1]) {
        refused(&bytes[..len], &["expected a safetensors file", &format!("got {len} bytes")]);
    }
    refused(&[bytes.as_slice(), &[0]].concat(), &["expected a safetensors file"]);
    Ok(())
}

#[test]
fn headers_that_lie_are_refused() {
    for len in [1u64, 8, 100_000_001, 1 << 40, i64::MAX as u64, u64::MAX - 7, u64::MAX] {
        refused(&[&len.to_le_bytes()[..], b"{}"].concat(), &["expected a safetensors file", "got 10 bytes"]);
    }
    let max = u64::MAX;
    for tensor in [
        r#"{"dtype":"F32","shape":[1],"data_offsets":[0,8]}"#.to_string(),
        r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#.to_string(),
        r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#.to_string(),
        r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#.to_string(),
        r#"{"dtype":"F23","shape":[1],"data_offsets":[0,4]}"#.to_string(),
        r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}"#.to_string(),
        format!(r#"{{"dtype":"U8","shape":[{max}],"data_offsets":[0,{max}]}}"#),
        format!(r#"{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}}"#, 1u64 << 45),
    ] {
        refused(&assemble(&format!(r#"{{"t":{tensor}}}"#), &[0; 4]), &["expected a safetensors file"]);
    }
    for header in ["", "null", "[]", "{", "{]", &"[".repeat(100_000)] {
        refused(&assemble(header, &[]), &["expected a safetensors file"]);
    }
    refused("This is no tensor, nor is it a header of one.".as_bytes(), &["expected a safetensors file"]);
}

#[test]
fn file_that_cannot_be_read_is_named() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    for name in ["nowhere.safetensors", "nowhere.index.json", "no/where"] {
        let path = folder.path().join(name);
        assert_error_says(model("Llama").load(&path, PREFIX, None), &[&path.display().to_string(), "can't read"]);
    }
    assert_error_says(model("Llama").load(Path::new(""), PREFIX, None), &["can't read"]);
    Ok(())
}

/// A safetensors file without tensors is valid, but all tensors are missing.
#[test]
fn file_without_tensors_misses_them_all() -> anyhow::Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    write(file.path(), &Tensors::new())?;
    assert_error_says(model("Phi-3").load(file.path(), PREFIX, None), &["qkv_proj.weight", "o_proj.weight", "missing"]);
    Ok(())
}

#[test]
fn builder_casts_what_it_is_asked_for_and_names_what_it_lacks() -> anyhow::Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    let ids = Tensor::arange(0i64, 6, &Device::Cpu)?.reshape((2, 3))?;
    write(file.path(), &Tensors::from([("ids".to_string(), ids), ("a.b".into(), Tensor::new(1.5f64, &Device::Cpu)?)]))?;
    let vb = checkpoint::var_builder(file.path(), DType::F16, &Device::Cpu)?;
    let numbers = vb.get((2, 3), "ids")?;
    assert_eq!(numbers.dtype(), DType::F16);
    assert_eq!(numbers.to_dtype(DType::F32)?.to_vec2::<f32>()?, [[0., 1., 2.], [3., 4., 5.]]);
    assert_eq!(vb.pp("a").get((), "b")?.to_dtype(DType::F32)?.to_scalar::<f32>()?, 1.5);
    assert!(vb.contains_tensor("ids") && !vb.contains_tensor("a") && vb.pp("a").contains_tensor("b"));
    assert_candle_error_says(vb.get((3, 2), "ids"), &["ids", "[3, 2]", "[2, 3]"]);
    assert_candle_error_says(vb.get(1, "c"), &["c"]);
    Ok(())
}

/// An open file keeps its contents when a save replaces it by another file of the same name.
#[test]
fn file_replaced_after_it_was_opened_is_read_as_it_was() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    let tensors = |x: f32| Ok(Tensors::from([("x".to_string(), Tensor::new(x, &Device::Cpu)?)]));
    let put = |tensors: Result<Tensors>| -> Result<()> {
        let another = folder.path().join("another");
        write(&another, &tensors?).map_err(candle_core::Error::wrap)?;
        Ok(fs::rename(&another, &path)?)
    };
    put(tensors(1.0))?;
    let vb = checkpoint::var_builder(&path, DType::F32, &Device::Cpu)?;
    put(tensors(2.0))?;
    assert_eq!(vb.get((), "x")?.to_scalar::<f32>()?, 1.0);
    Ok(())
}

#[test]
fn name_that_stands_twice_is_told() {
    let tensor = |from: usize| format!(r#"{{"dtype":"F32","shape":[1],"data_offsets":[{from},{}]}}"#, from + 4);
    let header = format!(r#"{{"a":{},"b":{},"a":{}}}"#, tensor(0), tensor(4), tensor(8));
    refused(&assemble(&header, &[0; 12]), &["expected a safetensors file", "`a` twice"]);
}
