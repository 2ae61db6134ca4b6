//! [`ModelFile`]: the parameters of a small model, its config, and what it computed.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Linear, VarBuilder};
use serde_json::Value;

/// A file of tests/golden/transformers.
pub struct ModelFile {
    pub tensors: HashMap<String, Tensor>,
    /// The model's `config.json`.
    pub config: Value,
    /// The names of the attention layers whose inputs and outputs it has.
    pub layers: Vec<String>,
}

impl ModelFile {
    /// `kind` is a name without folder and suffix, such as `llama`.
    pub fn load(kind: &str) -> anyhow::Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/transformers/{kind}.safetensors"));
        let bytes = std::fs::read(path)?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)?;
        let metadata = header.metadata().as_ref().expect("metadata");
        Ok(Self {
            tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?,
            config: serde_json::from_str(&metadata["config"])?,
            layers: serde_json::from_str(&metadata["layers"])?,
        })
    }

    /// The tensor of this name, if there is one.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// As [`ModelFile::get`], for a tensor that must be there.
    #[track_caller]
    pub fn expect(&self, name: &str) -> &Tensor {
        self.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// An input or a result of the attention layer of this name: `input`, `memory`, `output`, `weights`.
    pub fn golden(&self, layer: &str, part: &str) -> Option<&Tensor> {
        self.get(&format!("golden.{layer}.{part}"))
    }

    /// The parameters, as from a checkpoint of the whole model.
    pub fn var_builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_tensors(self.tensors.clone(), DType::F32, &Device::Cpu)
    }

    /// The linear layer of this name, with a bias if there is one.
    pub fn linear(&self, name: &str) -> Linear {
        Linear::new(self.expect(&format!("{name}.weight")).clone(), self.get(&format!("{name}.bias")).cloned())
    }

    /// As [`ModelFile::linear`], for weights that are stored as (in, out).
    pub fn linear_transposed(&self, name: &str) -> Result<Linear> {
        let stored = self.linear(name);
        Ok(Linear::new(stored.weight().t()?.contiguous()?, stored.bias().cloned()))
    }

    #[track_caller]
    pub fn size(&self, field: &str) -> usize {
        self.config[field].as_u64().unwrap_or_else(|| panic!("{field} in the config")) as usize
    }

    #[track_caller]
    pub fn number(&self, field: &str) -> f64 {
        self.config[field].as_f64().unwrap_or_else(|| panic!("{field} in the config"))
    }

    #[track_caller]
    pub fn flag(&self, field: &str) -> bool {
        self.config[field].as_bool().unwrap_or_else(|| panic!("{field} in the config"))
    }

    #[track_caller]
    pub fn kind(&self) -> &str {
        self.config["model_type"].as_str().expect("model_type in the config")
    }
}
