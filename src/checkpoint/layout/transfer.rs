//! Conversion from a checkpoint of any layout to parameters, and back.

use std::collections::HashMap;

use candle_core::{DType, Tensor, Var};
use candle_nn::VarBuilder;

use crate::check::{SUPPORTED, is_supported};
use crate::checkpoint::layout::plan::{Form, Piece, Plan};
use crate::checkpoint::parameter::{PARAMETERS, Refused, cast, check_built};
use crate::checkpoint::weights::Weights;
use crate::checkpoint::{LayoutFile, Parameters, serialise};
use crate::error::{AttentionError, Result};
use crate::layer::config::Parameter;
use crate::memory;

/// The parameters that a `VarBuilder` holds in this layout, in its dtype. They are new variables if the `VarBuilder`
/// holds variables, otherwise constants.
pub(crate) fn from_var_builder(plan: Plan, vb: &VarBuilder) -> Result<Parameters> {
    let plan = plan.named_as_in(|name| vb.contains_tensor(name));
    let prefix = vb.prefix();
    let fetch = |piece: &Piece| {
        if !vb.contains_tensor(&piece.name) {
            return Ok(None);
        }
        // The tensor, in another dtype or not, and the parameters that it is split into.
        let bytes = memory::bytes(&piece.shape(), vb.dtype()).saturating_mul(4);
        memory::ask(PARAMETERS, vb.device(), bytes)?;
        // A `VarMap` needs a shape, so a failed read without one is repeated with the expected shape.
        let unchecked = vb.get_unchecked_dtype(&piece.name, vb.dtype());
        let tensor = unchecked.or_else(|_| vb.get(piece.shape(), &piece.name))?;
        if tensor.dims() == piece.shape() {
            check_built(vb, &piece.name, &tensor)?;
        }
        Ok(Some(tensor))
    };
    let unexpected = plan.unwanted.iter().filter(|name| vb.contains_tensor(name));
    let unexpected = unexpected.map(|name| prefixed(&prefix, name)).collect();
    collect(&plan, &prefix, unexpected, fetch)
}

/// As [`from_var_builder`], from a checkpoint on disk, as variables. No other tensors may be under the file's prefix.
pub(crate) fn from_file(file: &LayoutFile, plan: Plan) -> Result<Parameters> {
    let LayoutFile { path, prefix, dtype, device, .. } = file;
    let weights = Weights::open(path)?;
    let plan = plan.named_as_in(|name| weights.info(&prefixed(prefix, name)).is_some());
    let mut common = None;
    let fetch = |piece: &Piece| -> Result<Option<Tensor>, Refused> {
        let name = prefixed(prefix, &piece.name);
        let Some(info) = weights.info(&name) else { return Ok(None) };
        if info.shape != piece.shape() {
            return Err(format!("expected shape {:?}, got {:?}", piece.shape(), info.shape).into());
        }
        let got = DType::try_from(info.dtype).ok().filter(|&got| is_supported(got));
        let got = got.ok_or_else(|| format!("expected dtype {SUPPORTED}, got {:?}", info.dtype))?;
        let wanted = dtype.unwrap_or(*common.get_or_insert(got));
        if dtype.is_none() && got != wanted {
            return Err(format!("expected dtype {wanted:?} as the others, or one to cast to, got {got:?}").into());
        }
        let tensor = weights.read(&name)?;
        cast(&tensor, wanted, device).map(Some)
    };
    let prefix_and_dot = if prefix.is_empty() { String::new() } else { format!("{prefix}.") };
    let known = |name: &str| {
        name.strip_prefix(&prefix_and_dot).is_none_or(|name| {
            plan.ignored.iter().any(|x| x == name) || plan.pieces.iter().any(|piece| piece.name == name)
        })
    };
    let unexpected = weights.names().filter(|name| !known(name)).map(str::to_string).collect();
    let parameters = collect(&plan, prefix, unexpected, fetch).map_err(|error| error.at(path))?;
    parameters.into_iter().map(|(name, tensor)| Ok((name, Var::from_tensor(&tensor)?.into_inner()))).collect()
}

/// Fetches the parameters of all pieces. The error lists everything that is wrong with them.
fn collect(
    plan: &Plan,
    prefix: &str,
    unexpected: Vec<String>,
    mut fetch: impl FnMut(&Piece) -> Result<Option<Tensor>, Refused>,
) -> Result<Parameters> {
    let mut parameters = Vec::new();
    let mut problems = Vec::new();
    for piece in &plan.pieces {
        let (name, shape) = (prefixed(prefix, &piece.name), piece.shape());
        match fetch(piece) {
            Ok(Some(tensor)) if tensor.dims() == shape => parameters.extend(split(piece, &tensor)?),
            Ok(Some(tensor)) => problems.push(format!("`{name}`: expected shape {shape:?}, got {:?}", tensor.dims())),
            Ok(None) => problems.push(format!("`{name}` is missing, expected {shape:?}")),
            Err(Refused::Tensor(problem)) => problems.push(format!("`{name}`: {problem}")),
            Err(Refused::Memory(error)) => return Err(error.into()),
        }
    }
    problems.extend(unexpected.iter().map(|name| format!("`{name}` is unexpected")));
    if problems.is_empty() {
        return Ok(parameters);
    }
    Err(AttentionError::CheckpointTensors { path: None, problems }.into())
}

/// Splits a tensor into the parameters that it holds. If it is a variable, each parameter becomes a new variable with a
/// copy of the values.
pub(super) fn split(piece: &Piece, tensor: &Tensor) -> Result<Parameters> {
    // Each part, and a variable or a contiguous copy of it.
    memory::ask_for(PARAMETERS, 2, tensor, tensor.dtype())?;
    let (tensor, trains) = (tensor.detach(), tensor.track_op());
    let rows = match piece.form {
        Form::Plain | Form::ByKeyHeads => tensor,
        Form::Transposed => tensor.t()?,
        Form::WithLeadingAxes => tensor.flatten_all()?,
    };
    let groups = rows.chunk(piece.groups, 0)?;
    let mut start = 0;
    let part = |part: &Parameter| {
        let count = part.shape[0] / piece.groups;
        let rows = groups.iter().map(|group| group.narrow(0, start, count));
        let rows = Tensor::cat(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        start += count;
        Ok((part.name.clone(), if trains { Var::from_tensor(&rows)?.into_inner() } else { rows.contiguous()? }))
    };
    piece.parts.iter().map(part).collect()
}

/// The tensors of a checkpoint with this plan that holds these parameters.
pub(crate) fn to_tensors<N: AsRef<str>>(plan: &Plan, parameters: &[(N, &Tensor)]) -> Result<Vec<(String, Tensor)>> {
    let all = parameters.iter().map(|(_, x)| memory::bytes(x.dims(), x.dtype()).saturating_mul(3));
    if let Some((_, first)) = parameters.first() {
        // The rows of all tensors, and a contiguous copy.
        memory::ask(PARAMETERS, first.device(), memory::sum(all))?;
    }
    let tensor_of = |name: &str| {
        let found = parameters.iter().find(|(other, _)| other.as_ref() == name);
        found
            .map(|(_, tensor)| tensor.detach())
            .ok_or_else(|| candle_core::Error::msg(format!("no parameter {name}")).into())
    };
    let of_piece = |piece: &Piece| {
        let parts = piece.parts.iter().map(|part| tensor_of(&part.name)).collect::<Result<Vec<_>>>()?;
        Ok((piece.name.to_string(), join(piece, &parts)?))
    };
    plan.pieces.iter().map(of_piece).collect()
}

/// Joins the parameters of a tensor: the inverse of [`split`].
pub(super) fn join(piece: &Piece, parts: &[Tensor]) -> Result<Tensor> {
    let groups = parts.iter().map(|part| part.chunk(piece.groups, 0)).collect::<candle_core::Result<Vec<_>>>()?;
    let rows = (0..piece.groups).flat_map(|group| groups.iter().map(move |chunks| &chunks[group]));
    let rows = Tensor::cat(&rows.collect::<Vec<_>>(), 0)?;
    let tensor = match piece.form {
        Form::Transposed => rows.t()?,
        _ => rows.reshape(piece.shape())?,
    };
    Ok(tensor.force_contiguous()?)
}

/// The bytes of a safetensors file with these tensors under `prefix`.
pub(crate) fn to_file(tensors: &[(String, Tensor)], prefix: &str) -> Result<Vec<u8>> {
    serialise(tensors.iter().map(|(name, tensor)| (prefixed(prefix, name), tensor)), HashMap::new())
}

/// The name of a tensor in the model.
pub(crate) fn prefixed(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}
