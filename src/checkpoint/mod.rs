//! Weights in files: layers as safetensors that carry their config, and weights that others trained.
//!
//! What [`save`](crate::MultiHead::save) writes has the layer's config in its metadata, so that the file alone is enough.
//! For checkpoints of other programs [`Layout`] says how they name and arrange the parameters, and [`var_builder`] reads a
//! whole model's.

mod layout;
mod tensors;
mod weights;

use std::collections::HashMap;

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor, Var};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};

use crate::config::{Parameter, SelfAttentionConfig};
use crate::error::AttentionError;
pub use layout::Layout;
pub(crate) use layout::{from_file, from_var_builder, to_file, to_tensors};
pub use weights::var_builder;

/// The metadata entry that holds the [`Header`] as JSON.
const METADATA_KEY: &str = "candle_attention";

/// Which layer the parameters belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LayerKind {
    SelfAttention,
    CrossAttention,
}

/// What a checkpoint says of itself.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Header {
    pub(crate) layer: LayerKind,
    pub(crate) config: SelfAttentionConfig,
}

/// A layer as it came out of a file. Every parameter is trainable.
pub(crate) struct Checkpoint {
    pub(crate) config: SelfAttentionConfig,
    pub(crate) parameters: HashMap<String, Tensor>,
    pub(crate) dtype: DType,
}

/// The bytes of a safetensors file.
pub(crate) fn to_bytes(header: &Header, parameters: &[(&'static str, &Tensor)]) -> candle_core::Result<Vec<u8>> {
    let json = serde_json::to_string(header).map_err(candle_core::Error::wrap)?;
    let metadata = HashMap::from([(METADATA_KEY.to_string(), json)]);
    serialise(parameters.iter().map(|&(name, tensor)| (name.to_string(), tensor)), metadata)
}

fn serialise<'a>(
    tensors: impl Iterator<Item = (String, &'a Tensor)>,
    metadata: HashMap<String, String>,
) -> candle_core::Result<Vec<u8>> {
    // safetensors takes the data through a function that can't fail: whatever can go wrong must do so before.
    let on_cpu = |(name, tensor): (String, &Tensor)| Ok((name, tensor.to_device(&Device::Cpu)?.contiguous()?));
    let tensors = tensors.map(on_cpu).collect::<candle_core::Result<Vec<_>>>()?;
    safetensors::serialize(tensors, Some(metadata)).map_err(candle_core::Error::from)
}

/// Reads what [`to_bytes`] wrote, for a layer of this kind.
pub(crate) fn from_bytes(bytes: &[u8], layer: LayerKind, device: &Device) -> candle_core::Result<Checkpoint> {
    let config = read_header(bytes, layer)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| not_safetensors(bytes, &error))?;
    let dtype = check_tensors(&config, &tensors)?;
    // Only now is anything allocated, and only what is there.
    let mut parameters = HashMap::new();
    for (name, view) in tensors.iter() {
        let var = Var::from_tensor(&view.load(device)?)?;
        parameters.insert(name.to_string(), var.into_inner());
    }
    Ok(Checkpoint { config, parameters, dtype })
}

fn not_safetensors(bytes: &[u8], error: &safetensors::SafeTensorError) -> AttentionError {
    AttentionError::Checkpoint {
        expected: "a safetensors file".into(),
        got: format!("{} bytes that aren't one: {error}", bytes.len()),
    }
}

/// That no tensor is to end behind the file, so that no sum that safetensors makes of the header's numbers overflows.
fn check_offsets(bytes: &[u8]) -> Result<(), AttentionError> {
    #[derive(Deserialize)]
    struct Place {
        data_offsets: (usize, usize),
    }
    let header = bytes.split_first_chunk().and_then(|(len, rest)| {
        let len = usize::try_from(u64::from_le_bytes(*len)).ok()?;
        serde_json::from_slice::<HashMap<String, serde_json::Value>>(rest.get(..len)?).ok()
    });
    // What can't be read here is refused, with its reason, by safetensors.
    for (name, entry) in header.unwrap_or_default() {
        let end = Place::deserialize(&entry).map_or(0, |place| place.data_offsets.1);
        if end > bytes.len() {
            return Err(AttentionError::Checkpoint {
                expected: "a safetensors file".into(),
                got: format!("{} bytes, where `{name}` is to end at byte {end} of the data", bytes.len()),
            });
        }
    }
    Ok(())
}

fn read_header(bytes: &[u8], layer: LayerKind) -> Result<SelfAttentionConfig, AttentionError> {
    check_offsets(bytes)?;
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| not_safetensors(bytes, &error))?;
    let entry = metadata.metadata().as_ref().and_then(|entries| entries.get(METADATA_KEY));
    let json = entry.ok_or_else(|| AttentionError::Checkpoint {
        expected: format!("a config in the metadata entry `{METADATA_KEY}`"),
        got: "none: this file was not saved by a layer of this crate".into(),
    })?;
    let header: Header = serde_json::from_str(json).map_err(|error| AttentionError::Checkpoint {
        expected: format!("a config in the metadata entry `{METADATA_KEY}`"),
        got: format!("{}, which can't be read: {error}", json.chars().take(80).collect::<String>()),
    })?;
    if header.layer != layer {
        let name = |kind| {
            if kind == LayerKind::SelfAttention { "SelfAttention" } else { "CrossAttention" }
        };
        let (expected, got) = (format!("a {}", name(layer)), format!("a {}", name(header.layer)));
        return Err(AttentionError::Checkpoint { expected, got });
    }
    header.config.check()?;
    Ok(header.config)
}

/// That the file holds just what its config asks for, all in one float dtype, which is returned.
fn check_tensors(config: &SelfAttentionConfig, tensors: &SafeTensors) -> Result<DType, AttentionError> {
    let wanted = config.parameters();
    let mut problems = Vec::new();
    let mut dtype = None;
    for parameter in &wanted {
        match tensors.tensor(parameter.name) {
            Ok(view) => problems.extend(misfit(parameter, &view, &mut dtype)),
            Err(_) => problems.push(format!("`{}` is missing, expected {:?}", parameter.name, parameter.shape)),
        }
    }
    let mut unexpected = tensors.names();
    unexpected.retain(|name| wanted.iter().all(|parameter| parameter.name != *name));
    unexpected.sort_unstable();
    problems.extend(unexpected.iter().map(|name| format!("`{name}` is unexpected")));
    match dtype {
        Some(dtype) if problems.is_empty() => Ok(dtype),
        _ => Err(AttentionError::CheckpointTensors { problems }),
    }
}

/// What is wrong with a tensor, if anything. The first dtype found is what the others are held to.
fn misfit(parameter: &Parameter, view: &TensorView, dtype: &mut Option<DType>) -> Option<String> {
    let Parameter { name, shape, .. } = parameter;
    if view.shape() != shape {
        return Some(format!("`{name}`: expected shape {shape:?}, got {:?}", view.shape()));
    }
    let got = DType::try_from(view.dtype()).ok();
    let expected = match *dtype {
        Some(first) => format!("{first:?} as the others"),
        None => "F16, BF16, F32 or F64".to_string(),
    };
    let fits = |got| is_served(got) && dtype.is_none_or(|x| x == got);
    match got.filter(|&got| fits(got)) {
        Some(got) => {
            *dtype = Some(got);
            None
        }
        None => Some(format!("`{name}`: expected dtype {expected}, got {:?}", view.dtype())),
    }
}

/// Whether parameters may have this dtype.
pub(crate) fn is_served(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
}
