//! The configuration in a model's folder.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_attention::block::Activation;
use serde::Deserialize;
use serde_json::Value;

/// The entries of config.json that describe a BERT.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub vocab_size: usize,
    pub layer_norm_eps: f64,
    /// The most tokens that are read of a sentence, special tokens included.
    #[serde(skip)]
    pub max_seq_length: usize,
}

impl Config {
    /// Reads config.json and, if it is there, sentence_bert_config.json.
    pub fn read(folder: &Path) -> Result<Self> {
        let json = read_json(folder, "config.json")?;
        // First of all: another kind of model may lack the entries below.
        let model_type = json["model_type"].as_str().unwrap_or("none");
        ensure!(model_type == "bert", "config.json, model_type: expected \"bert\", got \"{model_type}\"");
        let positions = json.get("position_embedding_type").and_then(Value::as_str).unwrap_or("absolute");
        ensure!(
            positions == "absolute",
            "config.json, position_embedding_type: expected \"absolute\", got \"{positions}\""
        );
        let mut config: Config = serde_json::from_value(json).context("config.json")?;
        let eps = config.layer_norm_eps;
        ensure!(eps.is_finite() && eps > 0.0, "config.json, layer_norm_eps: expected a number above 0, got {eps}");
        config.max_seq_length = max_seq_length(folder, config.max_position_embeddings)?;
        Ok(config)
    }
}

/// Checks that sentence-transformers too would take the mean of the token states.
pub fn check_pooling(folder: &Path) -> Result<()> {
    let file = "1_Pooling/config.json";
    if folder.join(file).exists() {
        let json = read_json(folder, file)?;
        let is_mean = json["pooling_mode_mean_tokens"] == true || json["pooling_mode"] == "mean";
        ensure!(is_mean, "{file}: expected the mean of the tokens, got {json}");
    }
    Ok(())
}

/// sentence_bert_config.json may ask for fewer tokens than the model has positions, never for more.
fn max_seq_length(folder: &Path, positions: usize) -> Result<usize> {
    let file = "sentence_bert_config.json";
    if !folder.join(file).exists() {
        return Ok(positions);
    }
    let json = read_json(folder, file)?;
    match &json["max_seq_length"] {
        Value::Null => Ok(positions),
        value => match value.as_u64() {
            Some(len) if (1..=positions as u64).contains(&len) => Ok(len as usize),
            _ => anyhow::bail!(
                "{file}, max_seq_length: expected 1 to {positions} (max_position_embeddings), got {value}"
            ),
        },
    }
}

fn read_json(folder: &Path, file: &str) -> Result<Value> {
    let path = folder.join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} isn't JSON", path.display()))
}
