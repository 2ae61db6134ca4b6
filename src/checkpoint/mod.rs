//! Weights in files: layers as safetensors files with their config, and weights that other programs trained.
//!
//! The file that [`SelfAttention::save`](crate::SelfAttention::save) writes holds the layer's config in its metadata,
//! so that the file alone is enough to load the layer. So does that of a
//! [`TransformerBlock`](crate::block::TransformerBlock::save). For checkpoints of other programs, a [`Layout`] says how the
//! parameters are named and arranged, a [`LayoutFile`] says which file and which prefix belong to one layer, and
//! [`var_builder`] reads a whole model.

mod header;
mod layout;
mod layout_file;
mod parameter;
mod tensors;
mod weights;

use std::collections::HashMap;
use std::fmt::Display;

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor, Var};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use crate::check::{SUPPORTED, is_supported};
use crate::error::{AttentionError, Result};
use crate::layer::config::{Name, Parameter, SelfAttentionConfig};
use crate::memory;
use header::{check_header, sort_header};
pub use layout::Layout;
pub(crate) use layout::{
    Entry, Module, Plan, Table, Wanted, from_file, from_var_builder, prefixed, to_file, to_tensors,
};
pub use layout_file::LayoutFile;
pub(crate) use parameter::Refused;
use parameter::check_finite;
pub(crate) use parameter::{cast, check_built, is_finite};
pub use weights::var_builder;

/// Parameters by their names.
pub(crate) type Parameters = Vec<(Name, Tensor)>;

/// The metadata entry that holds the [`Header`] as JSON.
const METADATA_KEY: &str = "candle_attention";

/// Which layer the parameters belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LayerKind {
    SelfAttention,
    CrossAttention,
    TransformerBlock,
}

impl LayerKind {
    fn name(self) -> &'static str {
        match self {
            LayerKind::SelfAttention => "SelfAttention",
            LayerKind::CrossAttention => "CrossAttention",
            LayerKind::TransformerBlock => "TransformerBlock",
        }
    }
}

/// The config of a layer, as far as its file is concerned.
pub(crate) trait LayerConfig: DeserializeOwned {
    fn check(&self) -> Result<(), AttentionError>;

    /// The parameters of a layer with this config, which must have been checked.
    fn parameters(&self) -> Vec<Parameter>;
}

impl LayerConfig for SelfAttentionConfig {
    fn check(&self) -> Result<(), AttentionError> {
        self.check()
    }

    fn parameters(&self) -> Vec<Parameter> {
        self.parameters()
    }
}

/// The metadata of a checkpoint: the kind of layer, and its config.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Header<C> {
    pub(crate) layer: LayerKind,
    pub(crate) config: C,
}

/// The bytes of a safetensors file with this header and these parameters.
pub(crate) fn to_bytes<C: Serialize, N: Into<Name>>(
    header: &Header<C>,
    parameters: Vec<(N, &Tensor)>,
) -> Result<Vec<u8>> {
    let json = serde_json::to_string(header).map_err(candle_core::Error::wrap)?;
    let metadata = HashMap::from([(METADATA_KEY.to_string(), json)]);
    serialise(parameters.into_iter().map(|(name, tensor)| (name.into().into_owned(), tensor)), metadata)
}

/// The bytes of a safetensors file with these tensors. They must be finite, since no layer could load others.
pub(crate) fn serialise<'a>(
    tensors: impl Iterator<Item = (String, &'a Tensor)>,
    mut metadata: HashMap<String, String>,
) -> Result<Vec<u8>> {
    // Hugging Face's programs refuse a file without this entry.
    metadata.insert("format".into(), "pt".into());
    let tensors = tensors.collect::<Vec<_>>();
    // The copies of tensors that aren't contiguous or on the CPU, and the file.
    let bytes = memory::sum(tensors.iter().map(|(_, x)| memory::bytes(x.dims(), x.dtype()).saturating_mul(2)));
    memory::ask("bytes of a checkpoint", &Device::Cpu, bytes)?;
    // safetensors reads the data through a function that can't fail, so the copies that can fail are made first.
    let on_cpu = |(name, tensor): (String, &Tensor)| Ok((name, tensor.to_device(&Device::Cpu)?.contiguous()?));
    let tensors = tensors.into_iter().map(on_cpu).collect::<candle_core::Result<Vec<_>>>()?;
    check_all(tensors.iter().map(|(name, tensor)| (name.clone(), check_finite(tensor))))?;
    let mut bytes = safetensors::serialize(tensors, Some(metadata)).map_err(candle_core::Error::from)?;
    sort_header(&mut bytes).map_err(candle_core::Error::wrap)?;
    Ok(bytes)
}

/// One error for the problems of all tensors.
pub(crate) fn check_all(checks: impl Iterator<Item = (String, Result<(), Refused>)>) -> Result<(), AttentionError> {
    let mut problems = Vec::new();
    for (name, check) in checks {
        match check {
            Ok(()) => {}
            Err(Refused::Tensor(problem)) => problems.push(format!("`{name}`: {problem}")),
            Err(Refused::Memory(error)) => return Err(error),
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(AttentionError::CheckpointTensors { path: None, problems }) }
}

/// Reads what [`to_bytes`] wrote, for a layer of this kind: its config, its parameters as variables, and their dtype.
pub(crate) fn from_bytes<C: LayerConfig>(
    bytes: &[u8],
    layer: LayerKind,
    device: &Device,
) -> Result<(C, Parameters, DType)> {
    let config: C = read_header(bytes, layer)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| not_safetensors(bytes, &error))?;
    let dtype = check_tensors(&config, &tensors)?;
    // Memory is allocated only after the checks, and only for what the file holds: a tensor, and a variable of it.
    memory::ask("parameters of a checkpoint", device, bytes.len().saturating_mul(2))?;
    let mut parameters = Vec::new();
    for Parameter { name, .. } in config.parameters() {
        let view = tensors.tensor(&name).map_err(candle_core::Error::from)?;
        parameters.push((name, Var::from_tensor(&view.load(device)?)?.into_inner()));
    }
    check_all(parameters.iter().map(|(name, tensor)| (name.to_string(), check_finite(tensor))))?;
    Ok((config, parameters, dtype))
}

pub(crate) fn not_safetensors(bytes: &[u8], error: &dyn Display) -> AttentionError {
    AttentionError::Checkpoint {
        path: None,
        expected: "a safetensors file".into(),
        got: format!("{} bytes that aren't one: {error}", bytes.len()),
    }
}

/// The metadata entry `key` of a safetensors file, which `wanted` describes; `whose` says what saves such files.
pub(crate) fn metadata_entry(bytes: &[u8], key: &str, wanted: &str, whose: &str) -> Result<String, AttentionError> {
    let header = bytes.split_first_chunk().and_then(|(len, rest)| {
        let len = usize::try_from(u64::from_le_bytes(*len)).ok()?;
        rest.get(..len)
    });
    // If the header isn't as long as it says, the safetensors crate tells the reason.
    header
        .map_or(Ok(()), |header| check_header(header, bytes.len() as u64))
        .map_err(|error| not_safetensors(bytes, &error))?;
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| not_safetensors(bytes, &error))?;
    let entry = metadata.metadata().as_ref().and_then(|entries| entries.get(key));
    entry.cloned().ok_or_else(|| AttentionError::Checkpoint {
        path: None,
        expected: format!("{wanted} in the metadata entry `{key}`"),
        got: format!("none: this file was not saved by {whose} of this crate"),
    })
}

fn read_header<C: LayerConfig>(bytes: &[u8], layer: LayerKind) -> Result<C, AttentionError> {
    let json = metadata_entry(bytes, METADATA_KEY, "a config", "a layer")?;
    let unreadable = |error: serde_json::Error| AttentionError::Checkpoint {
        path: None,
        expected: format!("a config in the metadata entry `{METADATA_KEY}`"),
        got: format!("{}, which can't be read: {error}", json.chars().take(80).collect::<String>()),
    };
    // The kind first, since a config of another kind has other fields.
    let Header { layer: got, .. } = serde_json::from_str::<Header<IgnoredAny>>(&json).map_err(unreadable)?;
    if got != layer {
        let (expected, got) = (format!("a {}", layer.name()), format!("a {}", got.name()));
        return Err(AttentionError::Checkpoint { path: None, expected, got });
    }
    let header: Header<C> = serde_json::from_str(&json).map_err(unreadable)?;
    let expected = "a valid config".to_string();
    let bad_config =
        |error: AttentionError| AttentionError::Checkpoint { path: None, expected, got: error.to_string() };
    header.config.check().map_err(bad_config)?;
    Ok(header.config)
}

/// Checks that the file holds exactly the tensors of its config, all in one float dtype, and returns that dtype.
fn check_tensors(config: &impl LayerConfig, tensors: &SafeTensors) -> Result<DType, AttentionError> {
    let wanted = config.parameters();
    let mut problems = Vec::new();
    let mut dtype = None;
    for parameter in &wanted {
        match tensors.tensor(&parameter.name) {
            Ok(view) => problems.extend(problem_with(parameter, &view, &mut dtype)),
            Err(_) => problems.push(format!("`{}` is missing, expected {:?}", parameter.name, parameter.shape)),
        }
    }
    let mut unexpected = tensors.names();
    unexpected.retain(|name| wanted.iter().all(|parameter| parameter.name != *name));
    unexpected.sort_unstable();
    problems.extend(unexpected.iter().map(|name| format!("`{name}` is unexpected")));
    match dtype {
        Some(dtype) if problems.is_empty() => Ok(dtype),
        _ => Err(AttentionError::CheckpointTensors { path: None, problems }),
    }
}

/// What is wrong with a tensor, if anything. All tensors must have the dtype of the first.
fn problem_with(parameter: &Parameter, view: &TensorView, dtype: &mut Option<DType>) -> Option<String> {
    let Parameter { name, shape, .. } = parameter;
    if view.shape() != shape {
        return Some(format!("`{name}`: expected shape {shape:?}, got {:?}", view.shape()));
    }
    let got = DType::try_from(view.dtype()).ok();
    let expected = match *dtype {
        Some(first) => format!("{first:?} as the others"),
        None => SUPPORTED.to_string(),
    };
    let fits = |got| is_supported(got) && dtype.is_none_or(|x| x == got);
    match got.filter(|&got| fits(got)) {
        Some(got) => {
            *dtype = Some(got);
            None
        }
        None => Some(format!("`{name}`: expected dtype {expected}, got {:?}", view.dtype())),
    }
}
