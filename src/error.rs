//! The errors of this crate: every way an input can be wrong, with what was expected and what was found.
//!
//! The public functions return [`Result`], whose [`Error`] is either an [`AttentionError`] to match on or an error of
//! candle. Both convert to [`candle_core::Error`] and back without loss, so that `?` works in functions of either kind.

use std::path::{Path, PathBuf};

use attention_files::FileError;
use attention_kernels::mask::MaskError;
use candle_core::{DType, DeviceLocation};

/// What the functions of this crate return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a function of this crate failed.
///
/// # Examples
///
/// ```
/// use candle_attention::{AttentionError, Error, SelfAttentionConfig};
///
/// let config = SelfAttentionConfig::new(10, 4);
/// match config.validate() {
///     Err(Error::Attention(AttentionError::Config { field, .. })) => assert_eq!(field, "embed_dim"),
///     other => panic!("{other:?}"),
/// }
///
/// // `?` in a function that returns candle's `Result` keeps the error, which can be converted back.
/// let candle = |config: &SelfAttentionConfig| -> candle_core::Result<()> { Ok(config.validate()?) };
/// assert!(matches!(Error::from(candle(&config).unwrap_err()), Error::Attention(AttentionError::Config { .. })));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An input that this crate can't use.
    #[error(transparent)]
    Attention(AttentionError),
    /// An error of candle's tensor operations.
    #[error(transparent)]
    Candle(candle_core::Error),
}

/// What was wrong with an input. The text names what was expected and what was found.
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
        /// The shape it has.
        shape: Vec<usize>,
    },
    /// A tensor whose sizes disagree with those of the other tensors.
    #[error("{tensor}: expected shape {expected}, got {shape:?}")]
    Shape {
        /// Which tensor.
        tensor: &'static str,
        /// The shape it should have, and the sizes from which that follows.
        expected: String,
        /// The shape it has.
        shape: Vec<usize>,
    },
    /// A tensor of an unsupported dtype, or of another dtype than the other tensors.
    #[error("{tensor}: expected dtype {expected}, got {got:?}")]
    DType {
        /// Which tensor.
        tensor: &'static str,
        /// The supported dtypes.
        expected: String,
        /// The dtype it has.
        got: DType,
    },
    /// A tensor on another device than the other tensors.
    #[error("{tensor}: expected device {expected:?}, got {got:?}")]
    Device {
        /// Which tensor.
        tensor: &'static str,
        /// The device of the other tensors.
        expected: DeviceLocation,
        /// The device it is on.
        got: DeviceLocation,
    },
    /// A number of query heads that isn't a multiple of the number of key and value heads.
    #[error(
        "num_heads: expected a multiple of num_kv_heads, got num_heads {num_heads} and num_kv_heads {num_kv_heads}"
    )]
    Heads {
        /// Number of query heads.
        num_heads: usize,
        /// Number of key and value heads.
        num_kv_heads: usize,
    },
    /// A number outside its range.
    #[error("{name}: expected {expected}, got {got}")]
    Number {
        /// Which option.
        name: &'static str,
        /// The range it should be in.
        expected: &'static str,
        /// The number that was given.
        got: f64,
    },
    /// A token or a label that isn't one of those that there are.
    #[error("{tensor}: expected {expected}, got {got} at position {position}")]
    Id {
        /// Which tensor.
        tensor: &'static str,
        /// The range it should be in, and the size from which that follows.
        expected: String,
        /// The number that was given.
        got: i64,
        /// Its place in the tensor, in row-major order.
        position: usize,
    },
    /// A parameter that can't be trained.
    #[error("parameter {name}: expected {expected}, got {got}")]
    Parameter {
        /// The parameter's name.
        name: String,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A gradient that can't be used for a step.
    #[error("gradient of {name}: expected {expected}, got {got}")]
    Gradient {
        /// The parameter's name.
        name: String,
        /// What the gradient should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A position that a rotary embedding can't use.
    #[error("position: expected {expected}, got {got}")]
    Position {
        /// The range it should be in.
        expected: String,
        /// The position that was given.
        got: String,
    },
    /// A mask that doesn't fit the scores.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// A call that the backend can't serve.
    #[error("backend Fused: expected {expected}, got {got}")]
    Backend {
        /// What the backend serves.
        expected: &'static str,
        /// What the call needs.
        got: &'static str,
    },
    /// A cache that doesn't fit the layer, or a call that a cache can't serve.
    #[error("cache, {part}: expected {expected}, got {got}")]
    Cache {
        /// Which property of the cache or of the call.
        part: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A tensor of more bytes than memory can address.
    #[error("a tensor of shape {shape:?}: expected at most {} bytes, got more", isize::MAX)]
    TooLarge {
        /// The shape of the scores (batch, num_heads, q_len, kv_len), or of an input.
        shape: [usize; 4],
    },
    /// An allocation that failed.
    #[error("the {what}: expected {bytes} bytes of memory, got none")]
    Memory {
        /// What the memory is for.
        what: &'static str,
        /// The size of the allocation.
        bytes: usize,
    },
    /// A problem that the kernels refuse. The checks before the kernels should have found it, so this is a bug.
    #[error(transparent)]
    Kernel(attention_kernels::Error),
    /// CUDA kernels that can't run: without a compiler, on too old a GPU.
    #[error(transparent)]
    Gpu(attention_kernels::Error),
    /// A config field whose value can't be used.
    #[error("config, {field}: expected {expected}, got {got}")]
    Config {
        /// Which field.
        field: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// An adapter that doesn't fit its layer, or a call that can't use it.
    #[error("adapter {name}: expected {expected}, got {got}")]
    Adapter {
        /// The adapter's name.
        name: String,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// Ranks that disagree. Every rank gets this error.
    #[error("{what}: expected the same on every rank, got {} on rank {} and {} on rank {}", .got[0], .ranks[0], .got[1], .ranks[1])]
    Ranks {
        /// What they disagree about.
        what: String,
        /// Two ranks that differ.
        ranks: [usize; 2],
        /// What each of them has.
        got: [String; 2],
    },
    /// A message that didn't arrive.
    #[error("{what}: nothing from rank {rank}: {got}")]
    Communication {
        /// What the ranks were doing.
        what: String,
        /// The rank that should have sent.
        rank: usize,
        /// Why there is none.
        got: String,
    },
    /// A file that can't be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file that isn't a checkpoint, or isn't one of the requested kind.
    #[error("{}: expected {expected}, got {got}", name_of(path))]
    Checkpoint {
        /// The file or folder; `None` if the checkpoint was given as bytes.
        path: Option<PathBuf>,
        /// What the file should hold.
        expected: String,
        /// What was found.
        got: String,
    },
    /// A checkpoint whose tensors aren't those of the config.
    #[error("{}: tensors that don't fit the config: {}", name_of(path), .problems.join("; "))]
    CheckpointTensors {
        /// The file or folder; `None` if the checkpoint was given as bytes or as a `VarBuilder`.
        path: Option<PathBuf>,
        /// Every tensor that is missing or unexpected, or has a wrong shape, dtype or number, one line each.
        problems: Vec<String>,
    },
    /// The state of an optimizer of other parameters.
    #[error("{}: state that doesn't fit the parameters: {}", name_of(path), .problems.join("; "))]
    OptimizerState {
        /// The file; `None` if the state was given as bytes.
        path: Option<PathBuf>,
        /// Every tensor that is missing or unexpected, or has a wrong shape, dtype or number, one line each.
        problems: Vec<String>,
    },
}

impl AttentionError {
    /// The same error, with the path of the file that holds the wrong input.
    pub(crate) fn at(self, file: &Path) -> Self {
        let path = Some(file.to_path_buf());
        match self {
            Self::Checkpoint { expected, got, .. } => Self::Checkpoint { path, expected, got },
            Self::CheckpointTensors { problems, .. } => Self::CheckpointTensors { path, problems },
            Self::OptimizerState { problems, .. } => Self::OptimizerState { path, problems },
            other => other,
        }
    }
}

impl Error {
    /// The same error, with the path of the file that holds the wrong input.
    pub(crate) fn at(self, file: &Path) -> Self {
        match self {
            Self::Attention(error) => Self::Attention(error.at(file)),
            Self::Candle(error) => Self::Candle(error.with_path(file)),
        }
    }
}

/// The name of a checkpoint in the text of an error.
fn name_of(path: &Option<PathBuf>) -> String {
    path.as_ref().map_or("checkpoint".to_string(), |path| format!("checkpoint {}", path.display()))
}

impl From<AttentionError> for Error {
    fn from(error: AttentionError) -> Self {
        Self::Attention(error)
    }
}

impl From<FileError> for Error {
    fn from(error: FileError) -> Self {
        Self::Attention(error.into())
    }
}

impl From<MaskError> for Error {
    fn from(error: MaskError) -> Self {
        Self::Attention(error.into())
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        match attention_error_in(&error) {
            Some(found) => Self::Attention(found.clone()),
            None => Self::Candle(error),
        }
    }
}

/// Finds the [`AttentionError`] inside candle's error, under any context that candle may have added.
fn attention_error_in(error: &candle_core::Error) -> Option<&AttentionError> {
    use candle_core::Error::{Context, Io, WithBacktrace, WithPath};
    match error {
        Io(error) => error.get_ref()?.downcast_ref(),
        Context { inner, .. } | WithPath { inner, .. } | WithBacktrace { inner, .. } => attention_error_in(inner),
        _ => None,
    }
}

impl From<AttentionError> for candle_core::Error {
    /// Wraps the error in an `io::Error`, which keeps its type and its text. candle's `Error::wrap` would lose the
    /// type.
    fn from(error: AttentionError) -> Self {
        candle_core::Error::Io(std::io::Error::other(error)).bt()
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Attention(error) => error.into(),
            Error::Candle(error) => error,
        }
    }
}

impl From<attention_kernels::Error> for AttentionError {
    fn from(error: attention_kernels::Error) -> Self {
        match error {
            attention_kernels::Error::Memory { what, bytes } => Self::Memory { what, bytes },
            error @ (attention_kernels::Error::Gpu { .. }
            | attention_kernels::Error::Unsupported { .. }
            | attention_kernels::Error::Kernel { .. }) => Self::Gpu(error),
            other => Self::Kernel(other),
        }
    }
}

impl From<attention_kernels::Error> for Error {
    fn from(error: attention_kernels::Error) -> Self {
        Self::Attention(error.into())
    }
}
