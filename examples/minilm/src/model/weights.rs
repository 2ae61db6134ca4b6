//! The weights in model.safetensors, checked against config.json.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};

use super::Config;

/// Every tensor that the model needs, in f32.
///
/// # Errors
///
/// One error names all tensors that are missing, misshapen or not finite.
pub fn load(folder: &Path, config: &Config, device: &Device) -> Result<HashMap<String, Tensor>> {
    let path = folder.join("model.safetensors");
    let mut tensors =
        candle_core::safetensors::load(&path, device).with_context(|| format!("can't read {}", path.display()))?;
    check_layers(&tensors, config)?;
    let mut wanted = HashMap::new();
    let mut problems = Vec::new();
    for (name, shape) in parameters(config) {
        match tensors.remove(&name) {
            None => problems.push(format!("`{name}` is missing, expected {shape:?}")),
            Some(tensor) if tensor.dims() != shape => {
                problems.push(format!("`{name}`: expected {shape:?}, got {:?}", tensor.dims()));
            }
            Some(tensor) => {
                let tensor = tensor.to_dtype(DType::F32)?;
                if !is_finite(&tensor)? {
                    problems.push(format!("`{name}` holds NaN or infinity"));
                }
                wanted.insert(name, tensor);
            }
        }
    }
    ensure!(problems.is_empty(), "{}: {}", path.display(), problems.join("; "));
    Ok(wanted)
}

/// Checks the number of layers. Without this check, layers beyond those of the config would be ignored.
fn check_layers(tensors: &HashMap<String, Tensor>, config: &Config) -> Result<()> {
    let number = |name: &String| name.strip_prefix("encoder.layer.")?.split('.').next()?.parse::<usize>().ok();
    let layers = tensors.keys().filter_map(number).max().map_or(0, |last| last.saturating_add(1));
    ensure!(
        layers == config.num_hidden_layers,
        "model.safetensors: expected {} layers (num_hidden_layers in config.json), got {layers}",
        config.num_hidden_layers
    );
    Ok(())
}

/// Whether all numbers are finite: x · 0 is 0 unless x is NaN or infinite.
fn is_finite(tensor: &Tensor) -> Result<bool> {
    Ok((tensor * 0.0)?.sum_all()?.to_scalar::<f32>()? == 0.0)
}

/// The names and shapes of a BERT's parameters. Its pooler, which sentence embeddings don't use, isn't among them.
fn parameters(config: &Config) -> Vec<(String, Vec<usize>)> {
    let (width, wide) = (config.hidden_size, config.intermediate_size);
    let linear = |name: String, inputs, outputs| {
        [(format!("{name}.weight"), vec![outputs, inputs]), (format!("{name}.bias"), vec![outputs])]
    };
    let norm = |name: String| ["weight", "bias"].map(|part| (format!("{name}.LayerNorm.{part}"), vec![width]));
    let table = |name: &str, rows| (format!("embeddings.{name}_embeddings.weight"), vec![rows, width]);
    let mut parameters = vec![
        table("word", config.vocab_size),
        table("position", config.max_position_embeddings),
        table("token_type", config.type_vocab_size),
    ];
    parameters.extend(norm("embeddings".into()));
    for layer in (0..config.num_hidden_layers).map(|i| format!("encoder.layer.{i}")) {
        for projection in ["self.query", "self.key", "self.value", "output.dense"] {
            parameters.extend(linear(format!("{layer}.attention.{projection}"), width, width));
        }
        parameters.extend(norm(format!("{layer}.attention.output")));
        parameters.extend(linear(format!("{layer}.intermediate.dense"), width, wide));
        parameters.extend(linear(format!("{layer}.output.dense"), wide, width));
        parameters.extend(norm(format!("{layer}.output")));
    }
    parameters
}
