//! The model as a file: safetensors whose metadata describe the model, so that the file alone is enough to load it.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_attention::SelfAttentionConfig;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use crate::grammar;
use crate::model::Model;
use crate::reader::Reader;

/// The metadata entry that holds the [`Header`] as JSON.
const METADATA_KEY: &str = "which_noun";

/// The JSON in the metadata of a file.
#[derive(Serialize, Deserialize)]
struct Header {
    attention: SelfAttentionConfig,
    /// The words of the embedding's rows.
    words: Vec<String>,
    /// The nouns of the head's rows.
    nouns: Vec<String>,
}

/// Saves the model. The file is replaced as a whole or not at all.
pub fn save(model: &Model, reader: &Reader, path: &Path) -> Result<()> {
    let nouns = grammar::nouns().into_iter().map(String::from).collect();
    let header = Header { attention: model.config().clone(), words: reader.vocabulary.clone(), nouns };
    let metadata = HashMap::from([(METADATA_KEY.to_string(), serde_json::to_string(&header)?)]);
    let parameters = model.parameters().into_iter();
    let on_cpu = parameters.map(|(name, tensor)| Ok((name, tensor.to_device(&Device::Cpu)?)));
    let bytes = safetensors::serialize(on_cpu.collect::<Result<Vec<_>>>()?, Some(metadata))?;
    Ok(attention_files::write(path, &bytes)?)
}

/// Loads a model that [`save`] wrote.
pub fn load(path: &Path, reader: &Reader) -> Result<Model> {
    let bytes = attention_files::read(path)?;
    from_bytes(&bytes, reader).with_context(|| format!("{}: expected a model that --out saved", path.display()))
}

fn from_bytes(bytes: &[u8], reader: &Reader) -> Result<Model> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).context("no safetensors file")?;
    let entry = metadata.metadata().as_ref().and_then(|entries| entries.get(METADATA_KEY));
    let json = entry.with_context(|| format!("no entry `{METADATA_KEY}` in its metadata"))?;
    let header = serde_json::from_str::<Header>(json).with_context(|| format!("metadata entry `{METADATA_KEY}`"))?;
    let same_words = header.words == reader.vocabulary && header.nouns == grammar::nouns();
    ensure!(same_words, "its words aren't those of this program's sentences");
    let tensors = candle_core::safetensors::load_buffer(bytes, &reader.device)?;
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &reader.device);
    Ok(Model::build(&header.attention, header.words.len(), header.nouns.len(), vb)?)
}
