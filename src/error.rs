//! Every way an input can be wrong, each with what was expected and what came.
//!
//! The crate's functions return [`candle_core::Result`], as candle's own do, with an [`AttentionError`] carried inside
//! by [`candle_core::Error::wrap`].

use std::path::PathBuf;

use candle_core::{DType, DeviceLocation};

/// What was wrong with an input. Its text names what was expected and what came.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttentionError {
    /// A tensor with too many or too few axes.
    #[error("{tensor}: expected {expected}, got rank {} with shape {shape:?}", shape.len())]
    Rank {
        /// Which tensor.
        tensor: &'static str,
        /// The axes it should have.
        expected: &'static str,
        /// The shape that came.
        shape: Vec<usize>,
    },
    /// A tensor whose sizes disagree with those of the others.
    #[error("{tensor}: expected shape {expected}, got {shape:?}")]
    Shape {
        /// Which tensor.
        tensor: &'static str,
        /// The shape it should have, and where that comes from.
        expected: String,
        /// The shape that came.
        shape: Vec<usize>,
    },
    /// A tensor of a dtype that can't serve, or that differs from the others'.
    #[error("{tensor}: expected dtype {expected}, got {got:?}")]
    DType {
        /// Which tensor.
        tensor: &'static str,
        /// The dtypes that can serve.
        expected: String,
        /// The dtype that came.
        got: DType,
    },
    /// A tensor on another device than the others.
    #[error("{tensor}: expected device {expected:?}, got {got:?}")]
    Device {
        /// Which tensor.
        tensor: &'static str,
        /// The device of the other tensors.
        expected: DeviceLocation,
        /// The device that came.
        got: DeviceLocation,
    },
    /// Query heads that can't be shared out evenly over the key and value heads.
    #[error(
        "num_heads: expected a multiple of num_kv_heads, got num_heads {num_heads} and num_kv_heads {num_kv_heads}"
    )]
    Heads {
        /// Heads of the query.
        num_heads: usize,
        /// Heads of key and value.
        num_kv_heads: usize,
    },
    /// A number outside its range.
    #[error("{name}: expected {expected}, got {got}")]
    Number {
        /// Which option.
        name: &'static str,
        /// The range it should be in.
        expected: &'static str,
        /// The number that came.
        got: f64,
    },
    /// A mask that doesn't fit the scores it is to be laid over.
    #[error("mask, {part}: expected {expected}, got {got}")]
    Mask {
        /// Which part of the mask.
        part: &'static str,
        /// The size it should have.
        expected: String,
        /// The size it has.
        got: String,
    },
    /// A backend that can't do what was asked of it.
    #[error("backend Fused: expected {expected}, got {got}")]
    Backend {
        /// What it can do.
        expected: &'static str,
        /// What was asked.
        got: &'static str,
    },
    /// A cache that doesn't fit the layer, or can't do what was asked of it.
    #[error("cache, {part}: expected {expected}, got {got}")]
    Cache {
        /// Which of its properties.
        part: &'static str,
        /// What it should be.
        expected: String,
        /// What it is, or what was asked.
        got: String,
    },
    /// More numbers than memory can address.
    #[error("a tensor of shape {shape:?}: expected at most {} bytes, got more", isize::MAX)]
    TooLarge {
        /// The shape of the scores (batch, num_heads, q_len, kv_len), or of an input.
        shape: [usize; 4],
    },
    /// Less memory than a result takes.
    #[error("the {what}: expected {bytes} bytes of memory, got none")]
    Memory {
        /// What the memory is for.
        what: &'static str,
        /// How much it takes.
        bytes: usize,
    },
    /// A configuration field that can't serve.
    #[error("config, {field}: expected {expected}, got {got}")]
    Config {
        /// Which field.
        field: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A file that can't be read or written.
    #[error("{}: can't {action}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried: "read" or "write".
        action: &'static str,
        /// What the system says.
        cause: String,
    },
    /// Files that are no checkpoint, or not of the kind that was asked for.
    #[error("checkpoint: expected {expected}, got {got}")]
    Checkpoint {
        /// What a checkpoint holds there.
        expected: String,
        /// What was found.
        got: String,
    },
    /// A checkpoint whose tensors aren't those that the config asks for.
    #[error("checkpoint: tensors that don't fit the config: {}", .problems.join("; "))]
    CheckpointTensors {
        /// Every missing, unexpected or misshapen tensor, one line each.
        problems: Vec<String>,
    },
}

impl From<AttentionError> for candle_core::Error {
    fn from(error: AttentionError) -> Self {
        candle_core::Error::wrap(error)
    }
}

/// That a number, if there is one, is in its range.
pub(crate) fn check_number(
    name: &'static str,
    number: Option<f64>,
    expected: &'static str,
    allowed: impl Fn(f64) -> bool,
) -> Result<(), AttentionError> {
    match number {
        Some(got) if !allowed(got) => Err(AttentionError::Number { name, expected, got }),
        _ => Ok(()),
    }
}
