//! A message between ranks, and tensors in it as bytes.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, DeviceLocation, Tensor};
use safetensors::tensor::View;
use serde::{Deserialize, Serialize};

use crate::error::{AttentionError, Result};
use crate::memory;

/// What a message is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kind {
    /// A part of a call in which every rank sends to every other.
    Round,
    /// A part of an exchange, in which each rank sends to one other.
    Exchange,
    /// The sender has failed. The receiver's wait for anyone ends.
    Fault(Fault),
    /// The sender's last message.
    End,
}

/// Why a rank can't go on, for the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Fault {
    /// Two ranks disagree: [`AttentionError::Ranks`].
    Ranks { what: String, ranks: [usize; 2], got: [String; 2] },
    /// A rank is gone, or has failed on its own.
    Rank { rank: usize, got: String },
}

impl Fault {
    /// What `rank` tells the others about its error.
    pub(super) fn of(error: &AttentionError, rank: usize) -> Self {
        match error.clone() {
            AttentionError::Ranks { what, ranks, got } => Self::Ranks { what, ranks, got },
            AttentionError::Communication { rank, got, .. } => Self::Rank { rank, got },
            other => Self::Rank { rank, got: format!("its error: {other}") },
        }
    }

    /// The error of a rank that waits in `call`.
    pub(super) fn error(self, call: &str) -> AttentionError {
        match self {
            Self::Ranks { what, ranks, got } => AttentionError::Ranks { what, ranks, got },
            Self::Rank { rank, got } => AttentionError::Communication { what: call.to_string(), rank, got },
        }
    }
}

/// What a message says before its bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Head {
    pub kind: Kind,
    /// The number of rounds and exchanges before this one. The same on every rank.
    pub step: u64,
    /// The call that the sender makes, with what has to be the same on every rank.
    pub call: String,
    /// The tensors in the body.
    pub tensors: Vec<TensorHead>,
}

/// The dtype and the shape of a tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TensorHead {
    pub dtype: String,
    pub shape: Vec<usize>,
}

/// Bytes that several messages may share.
#[derive(Debug, Clone, Default)]
pub(super) struct Body {
    bytes: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl Body {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { range: 0..bytes.len(), bytes: Arc::new(bytes) }
    }

    /// A range of the bytes, without a copy.
    pub(super) fn slice(&self, range: Range<usize>) -> Self {
        debug_assert!(range.end <= self.range.len());
        let range = self.range.start + range.start..self.range.start + range.end;
        Self { bytes: self.bytes.clone(), range }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }

    /// The bytes as a vector; a copy if others still share them.
    pub(super) fn into_vec(self) -> Vec<u8> {
        if self.range != (0..self.bytes.len()) {
            return self.bytes().to_vec();
        }
        Arc::try_unwrap(self.bytes).unwrap_or_else(|shared| shared.to_vec())
    }
}

/// What one rank sends to another in one call.
#[derive(Debug, Clone, Default)]
pub(super) struct Parcel {
    pub tensors: Vec<TensorHead>,
    pub body: Body,
}

#[derive(Debug)]
pub(super) struct Message {
    pub head: Head,
    pub body: Body,
}

impl Parcel {
    /// The tensors' bytes, one after the other.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Device`] for a tensor that isn't on the CPU, [`AttentionError::DType`] for a dtype without whole bytes.
    pub(super) fn pack(tensors: &[Tensor]) -> Result<Self> {
        for tensor in tensors {
            check(tensor)?;
        }
        let heads = tensors.iter().map(TensorHead::of).collect();
        let size = memory::sum(tensors.iter().map(|tensor| memory::bytes(tensor.dims(), tensor.dtype())));
        memory::ask("tensors of a message", &Device::Cpu, size)?;
        let body = match tensors {
            [tensor] => bytes(tensor),
            _ => {
                let mut all = Vec::with_capacity(size);
                for tensor in tensors {
                    all.extend(bytes(tensor));
                }
                all
            }
        };
        Ok(Self { tensors: heads, body: Body::new(body) })
    }

    /// The tensors again.
    ///
    /// # Errors
    ///
    /// An error of candle for bytes that aren't those of the heads.
    pub(super) fn unpack(&self) -> Result<Vec<Tensor>> {
        let mut rest = self.body.bytes();
        let mut tensors = Vec::with_capacity(self.tensors.len());
        for head in &self.tensors {
            let dtype = head.dtype()?;
            let size = memory::bytes(&head.shape, dtype);
            let (bytes, after) = rest.split_at_checked(size).ok_or_else(|| {
                candle_core::Error::Msg(format!("a message of {} bytes for a tensor of {size}", rest.len()))
            })?;
            tensors.push(tensor_of(bytes, dtype, &head.shape)?);
            rest = after;
        }
        Ok(tensors)
    }
}

/// The tensor of a shape with these bytes.
pub(super) fn tensor_of(bytes: &[u8], dtype: DType, shape: &[usize]) -> Result<Tensor> {
    memory::ask("a received tensor", &Device::Cpu, bytes.len())?;
    if bytes.is_empty() {
        return Ok(Tensor::zeros(shape, dtype, &Device::Cpu)?);
    }
    Ok(Tensor::from_raw_buffer(bytes, dtype, shape, &Device::Cpu)?)
}

impl TensorHead {
    pub(super) fn of(tensor: &Tensor) -> Self {
        Self { dtype: tensor.dtype().as_str().to_string(), shape: tensor.dims().to_vec() }
    }

    pub(super) fn dtype(&self) -> Result<DType> {
        Ok(self.dtype.parse::<DType>().map_err(candle_core::Error::wrap)?)
    }
}

/// A rank's own tensor as its result: without a gradient. A variable is copied, since it may be set later.
pub(super) fn own(tensor: &Tensor) -> Result<Tensor> {
    if !tensor.is_variable() {
        return Ok(tensor.detach());
    }
    memory::ask_for("own tensor of a rank", 1, tensor, tensor.dtype())?;
    Ok(tensor.detach().copy()?)
}

fn check(tensor: &Tensor) -> Result<()> {
    const TENSOR: &str = "tensor of a message";
    if !tensor.device().is_cpu() {
        let (expected, got) = (DeviceLocation::Cpu, tensor.device().location());
        return Err(AttentionError::Device { tensor: TENSOR, expected, got }.into());
    }
    if matches!(tensor.dtype(), DType::F6E2M3 | DType::F6E3M2 | DType::F4 | DType::F8E8M0) {
        let expected = "with a whole number of bytes to each entry, and a conversion in candle".to_string();
        return Err(AttentionError::DType { tensor: TENSOR, expected, got: tensor.dtype() }.into());
    }
    memory::check_countable(TENSOR, tensor)?;
    Ok(())
}

/// A tensor's bytes in row-major order. [`check`] has let it pass.
fn bytes(tensor: &Tensor) -> Vec<u8> {
    // candle can't read every view without entries.
    match tensor.elem_count() {
        0 => Vec::new(),
        _ => tensor.data().into_owned(),
    }
}
