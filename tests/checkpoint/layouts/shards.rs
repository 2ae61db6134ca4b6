//! Checkpoints in several files with an index, and checkpoints that are given as a folder.

use std::fs;
use std::path::Path;

use candle_attention::{Result, checkpoint};
use candle_core::{DType, Device};
use candle_nn::VarBuilder;

use crate::common::assert_same_bits;
use crate::layers::assert_error_says;

use super::models::{Model, PREFIX, Tensors, in_a_model, model, write};

const INDEX: &str = "model.safetensors.index.json";

fn shard(i: usize) -> String {
    format!("model-{i:05}-of-00003.safetensors")
}

/// Distributes the tensors over three shards, and writes the index.
fn write_shards(folder: &Path, tensors: &Tensors) -> anyhow::Result<()> {
    let mut shards = vec![Tensors::new(); 3];
    let mut weight_map = serde_json::Map::new();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        shards[i % 3].insert(name.clone(), tensor.clone());
        weight_map.insert(name.clone(), shard(i % 3 + 1).into());
    }
    for (i, tensors) in shards.iter().enumerate() {
        write(&folder.join(shard(i + 1)), tensors)?;
    }
    let index = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": weight_map });
    Ok(fs::write(folder.join(INDEX), index.to_string())?)
}

fn sharded() -> anyhow::Result<(tempfile::TempDir, Model, Tensors)> {
    let (folder, model) = (tempfile::tempdir()?, model("gpt-oss"));
    let tensors = model.tensors(DType::F32)?;
    write_shards(folder.path(), &in_a_model(&tensors)?)?;
    Ok((folder, model, tensors))
}

fn whole_model(path: &Path) -> Result<VarBuilder<'static>> {
    checkpoint::var_builder(path, DType::F32, &Device::Cpu)
}

/// Checks that neither a layer nor a `VarBuilder` for the whole model can be loaded.
#[track_caller]
fn refused(path: &Path, parts: &[&str]) {
    assert_error_says(model("gpt-oss").load(path, PREFIX, None), parts);
    assert_error_says(whole_model(path).map(|_| ()), parts);
}

#[test]
fn shards_hold_what_one_file_holds() -> anyhow::Result<()> {
    let (folder, model, tensors) = sharded()?;
    for path in [folder.path().to_path_buf(), folder.path().join(INDEX)] {
        let vb = whole_model(&path)?;
        for layer in [model.load(&path, PREFIX, None)?, model.layer_from(vb.pp(PREFIX))?] {
            for (name, tensor) in layer.to_layout(model.layout)? {
                assert_same_bits(&tensor, &tensors[&name], &name);
            }
        }
        assert_eq!(vb.get((3, 2), "model.embed.weight")?.dims(), [3, 2]);
    }
    Ok(())
}

#[test]
fn missing_shard_is_named() -> anyhow::Result<()> {
    let (folder, ..) = sharded()?;
    fs::remove_file(folder.path().join(shard(2)))?;
    fs::remove_file(folder.path().join(shard(3)))?;
    refused(folder.path(), &[INDEX, "the shards that the index names", &shard(2), &shard(3)]);
    // A folder isn't a shard.
    fs::create_dir(folder.path().join(shard(2)))?;
    refused(folder.path(), &[INDEX, "the shards that the index names", &shard(2)]);
    Ok(())
}

#[test]
fn broken_shard_is_named() -> anyhow::Result<()> {
    let (folder, ..) = sharded()?;
    fs::write(folder.path().join(shard(2)), "no tensors")?;
    refused(folder.path(), &[&shard(2), "expected a safetensors file", "got 10 bytes"]);
    Ok(())
}

#[test]
fn tensor_that_is_not_in_its_shard_is_named() -> anyhow::Result<()> {
    let (folder, _, tensors) = sharded()?;
    write(&folder.path().join(shard(1)), &Tensors::new())?;
    let lost: Vec<String> = in_a_model(&tensors)?.keys().step_by(3).map(|name| format!("`{name}` isn't in")).collect();
    let parts: Vec<&str> = lost.iter().map(String::as_str).chain([INDEX]).collect();
    refused(folder.path(), &parts);
    Ok(())
}

#[test]
fn index_that_leads_out_of_its_folder_is_refused() -> anyhow::Result<()> {
    let outside = tempfile::tempdir()?;
    let folder = outside.path().join("model");
    fs::create_dir(&folder)?;
    write(&outside.path().join("secret.safetensors"), &model("gpt-oss").tensors(DType::F32)?)?;
    let absolute = outside.path().join("secret.safetensors").display().to_string();
    for path in ["../secret.safetensors", "a/../../secret.safetensors", &absolute, "..", ".", "", "/", "./x"] {
        let index = serde_json::json!({ "weight_map": { "q_proj.weight": path } });
        fs::write(folder.join(INDEX), index.to_string())?;
        refused(&folder, &[INDEX, "shards inside the folder", &format!("got `{path}`")]);
    }
    Ok(())
}

#[test]
fn shards_may_lie_in_folders_of_the_folder() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let model = model("Phi-3");
    let tensors = in_a_model(&model.tensors(DType::F32)?)?;
    fs::create_dir(folder.path().join("parts"))?;
    write(&folder.path().join("parts/one.safetensors"), &tensors)?;
    let weight_map: serde_json::Map<_, _> =
        tensors.keys().map(|name| (name.clone(), "parts/one.safetensors".into())).collect();
    let index = folder.path().join("any.index.json");
    fs::write(&index, serde_json::json!({ "weight_map": weight_map }).to_string())?;
    model.load(&index, PREFIX, None)?;
    Ok(())
}

#[test]
fn index_that_cannot_be_parsed_is_refused() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let nested = "[".repeat(100_000);
    for text in ["", "{", "[]", "null", r#"{"weight_map": []}"#, r#"{"weight_map": {"a": 1}}"#, "{}", &nested] {
        fs::write(folder.path().join(INDEX), text)?;
        refused(folder.path(), &[INDEX, "the index of a sharded checkpoint", &format!("got {} bytes", text.len())]);
    }
    fs::write(folder.path().join(INDEX), [0xFF, 0xFE])?;
    refused(folder.path(), &[INDEX, "the index of a sharded checkpoint"]);
    Ok(())
}

#[test]
fn index_without_tensors_misses_them_all() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join(INDEX), r#"{"weight_map": {}}"#)?;
    let error = model("Phi-3").load(folder.path(), PREFIX, None);
    assert_error_says(error.map(|_| ()), &["qkv_proj.weight` is missing", "o_proj.weight` is missing"]);
    Ok(())
}

#[test]
fn folder_with_one_file_is_that_file() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let model = model("Phi-3");
    let path = folder.path().join("adapter.safetensors");
    write(&path, &in_a_model(&model.tensors(DType::F32)?)?)?;
    fs::write(folder.path().join("config.json"), "{}")?;
    model.load(folder.path(), PREFIX, None)?;
    // The usual name takes precedence over others.
    fs::write(folder.path().join("another.safetensors"), "")?;
    fs::rename(&path, folder.path().join("model.safetensors"))?;
    model.load(folder.path(), PREFIX, None)?;
    Ok(())
}

#[test]
fn folder_with_no_checkpoint_or_several_is_refused() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let name = folder.path().display().to_string();
    refused(folder.path(), &[&name, "one safetensors file", "got neither"]);
    fs::write(folder.path().join("config.json"), "{}")?;
    fs::write(folder.path().join("pytorch_model.bin.index.json"), "{}")?;
    refused(folder.path(), &[&name, "one safetensors file", "got neither"]);
    for file in ["a.safetensors", "b.safetensors"] {
        fs::write(folder.path().join(file), "")?;
    }
    refused(folder.path(), &[&name, "one safetensors file", "got a.safetensors, b.safetensors"]);
    Ok(())
}

#[test]
fn tensor_that_an_index_names_twice_is_told() -> anyhow::Result<()> {
    let (folder, ..) = sharded()?;
    let index = format!(r#"{{"weight_map": {{"a": "{}", "a": "{}"}}}}"#, shard(1), shard(2));
    fs::write(folder.path().join(INDEX), index)?;
    refused(folder.path(), &[INDEX, "the index of a sharded checkpoint", "`a` twice"]);
    Ok(())
}
