//! From a checkpoint of some layout to parameters, and back.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;

use super::Layout;
use super::plan::{Form, Piece, Plan};
use crate::checkpoint::weights::Weights;
use crate::checkpoint::{is_served, serialise};
use crate::config::{Parameter, SelfAttentionConfig};
use crate::error::AttentionError;

type Parameters = Vec<(&'static str, Tensor)>;

/// The parameters that a `VarBuilder` holds in this layout, as variables of their own, in its dtype.
pub(crate) fn from_var_builder(layout: Layout, config: &SelfAttentionConfig, vb: &VarBuilder) -> Result<Parameters> {
    let plan = Plan::new(layout, config)?;
    let prefix = vb.prefix();
    let fetch = |piece: &Piece| {
        if !vb.contains_tensor(piece.name) {
            return Ok(None);
        }
        // A `VarMap` gives nothing without a shape.
        let unchecked = vb.get_unchecked_dtype(piece.name, vb.dtype());
        Ok(Some(unchecked.or_else(|_| vb.get(piece.shape(), piece.name)).map_err(|error| error.to_string())?))
    };
    let unexpected = plan.unwanted.iter().filter(|name| vb.contains_tensor(name));
    let unexpected = unexpected.map(|name| under(&prefix, name)).collect();
    collect(&plan, &prefix, unexpected, fetch)
}

/// As [`from_var_builder`], from a checkpoint on disk, of which nothing else may stand at that place.
pub(crate) fn from_file(
    layout: Layout,
    config: &SelfAttentionConfig,
    (path, prefix): (&Path, &str),
    (dtype, device): (Option<DType>, &Device),
) -> Result<Parameters> {
    let plan = Plan::new(layout, config)?;
    let weights = Weights::open(path)?;
    let mut common = None;
    let fetch = |piece: &Piece| -> std::result::Result<Option<Tensor>, String> {
        let name = under(prefix, piece.name);
        let Some(info) = weights.info(&name) else { return Ok(None) };
        if info.shape != piece.shape() {
            return Err(format!("expected shape {:?}, got {:?}", piece.shape(), info.shape));
        }
        let got = DType::try_from(info.dtype).ok().filter(|&got| is_served(got));
        let got = got.ok_or_else(|| format!("expected dtype F16, BF16, F32 or F64, got {:?}", info.dtype))?;
        let wanted = dtype.unwrap_or(*common.get_or_insert(got));
        if dtype.is_none() && got != wanted {
            return Err(format!("expected dtype {wanted:?} as the others, or one to cast to, got {got:?}"));
        }
        let tensor = weights.read(&name).map_err(|error| error.to_string())?;
        finite(&tensor, wanted, device).map(Some)
    };
    let place = if prefix.is_empty() { String::new() } else { format!("{prefix}.") };
    let known = |name: &str| {
        name.strip_prefix(&place)
            .is_none_or(|name| plan.others.contains(&name) || plan.pieces.iter().any(|piece| piece.name == name))
    };
    let unexpected = weights.names().filter(|name| !known(name)).map(str::to_string).collect();
    collect(&plan, prefix, unexpected, fetch).map_err(|error| error.with_path(path))
}

/// The parameters of all pieces, or all that is wrong with them.
fn collect(
    plan: &Plan,
    prefix: &str,
    unexpected: Vec<String>,
    mut fetch: impl FnMut(&Piece) -> std::result::Result<Option<Tensor>, String>,
) -> Result<Parameters> {
    let mut parameters = Vec::new();
    let mut problems = Vec::new();
    for piece in &plan.pieces {
        let (name, shape) = (under(prefix, piece.name), piece.shape());
        match fetch(piece) {
            Ok(Some(tensor)) if tensor.dims() == shape => parameters.extend(take_apart(piece, &tensor)?),
            Ok(Some(tensor)) => problems.push(format!("`{name}`: expected shape {shape:?}, got {:?}", tensor.dims())),
            Ok(None) => problems.push(format!("`{name}` is missing, expected {shape:?}")),
            Err(problem) => problems.push(format!("`{name}`: {problem}")),
        }
    }
    problems.extend(unexpected.iter().map(|name| format!("`{name}` is unexpected")));
    if problems.is_empty() { Ok(parameters) } else { Err(AttentionError::CheckpointTensors { problems }.into()) }
}

/// The tensor as `dtype` on `device`, if every number is finite, before and after.
fn finite(tensor: &Tensor, dtype: DType, device: &Device) -> std::result::Result<Tensor, String> {
    // Zero times a finite number is zero, and NaN times any other.
    let is_finite = |x: &Tensor| (x * 0.0)?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>().map(|sum| sum == 0.0);
    let text = |error: candle_core::Error| error.to_string();
    if !is_finite(tensor).map_err(text)? {
        return Err("expected finite numbers, got NaN or infinity".into());
    }
    let cast = tensor.to_dtype(dtype).map_err(text)?;
    if !is_finite(&cast).map_err(text)? {
        return Err(format!("expected numbers that {dtype:?} can hold, got larger ones"));
    }
    cast.to_device(device).map_err(text)
}

/// Every parameter becomes a variable that shares nothing with the tensor.
fn take_apart(piece: &Piece, tensor: &Tensor) -> Result<Parameters> {
    let tensor = tensor.detach();
    let rows = match piece.form {
        Form::AsHere | Form::ByKeyHeads => tensor,
        Form::Transposed => tensor.t()?,
        Form::WithLeadingAxes => tensor.flatten_all()?,
    };
    let groups = rows.chunk(piece.groups, 0)?;
    let mut start = 0;
    let part = |part: &Parameter| {
        let count = part.shape[0] / piece.groups;
        let rows = groups.iter().map(|group| group.narrow(0, start, count)).collect::<Result<Vec<_>>>()?;
        start += count;
        Ok((part.name, Var::from_tensor(&Tensor::cat(&rows, 0)?)?.into_inner()))
    };
    piece.parts.iter().map(part).collect()
}

/// The tensors of a checkpoint of this layout that holds these parameters.
pub(crate) fn to_tensors(
    layout: Layout,
    config: &SelfAttentionConfig,
    parameters: &[(&'static str, &Tensor)],
) -> Result<Vec<(String, Tensor)>> {
    let tensor_of = |name: &str| {
        let found = parameters.iter().find(|(other, _)| *other == name);
        found.map(|(_, tensor)| tensor.detach()).ok_or_else(|| candle_core::Error::msg(format!("no parameter {name}")))
    };
    let put_together = |piece: &Piece| {
        let parts = piece.parts.iter().map(|part| tensor_of(part.name)).collect::<Result<Vec<_>>>()?;
        let groups = parts.iter().map(|part| part.chunk(piece.groups, 0)).collect::<Result<Vec<_>>>()?;
        let rows = (0..piece.groups).flat_map(|group| groups.iter().map(move |chunks| &chunks[group]));
        let rows = Tensor::cat(&rows.collect::<Vec<_>>(), 0)?;
        let tensor = match piece.form {
            Form::Transposed => rows.t()?,
            _ => rows.reshape(piece.shape())?,
        };
        Ok((piece.name.to_string(), tensor.force_contiguous()?))
    };
    Plan::new(layout, config)?.pieces.iter().map(put_together).collect()
}

/// The bytes of a safetensors file with these tensors at `prefix`.
pub(crate) fn to_file(tensors: &[(String, Tensor)], prefix: &str) -> Result<Vec<u8>> {
    // Without this entry Hugging Face's programs refuse a file.
    let metadata = [("format".to_string(), "pt".to_string())].into();
    serialise(tensors.iter().map(|(name, tensor)| (under(prefix, name), tensor)), metadata)
}

fn under(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}
