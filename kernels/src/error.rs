//! Everything that can be wrong with a call, one variant for each kind.

/// Why a call can't be computed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is not enough memory.
    #[error("the {what}: expected {bytes} bytes of memory, got none")]
    Memory {
        /// What the memory is for.
        what: &'static str,
        /// How many bytes it takes; `usize::MAX` if they can't be counted.
        bytes: usize,
    },
    /// A view's last element lies outside its slice.
    #[error("the {what}: expected a slice that holds dims {dims:?} with strides {strides:?}, got {len} elements")]
    OutOfBounds {
        /// Which view.
        what: &'static str,
        /// The view's sizes.
        dims: [usize; 4],
        /// Elements between two neighbours along each axis.
        strides: [usize; 4],
        /// The slice's length.
        len: usize,
    },
    /// A tensor has no elements.
    #[error("the {what}: expected dims above 0, got {dims:?}")]
    Empty {
        /// Which tensor.
        what: &'static str,
        /// Its sizes.
        dims: [usize; 4],
    },
    /// A tensor's sizes don't fit the others'.
    #[error("the {what}: expected {expected}, got dims {got:?}")]
    Dims {
        /// Which tensor.
        what: &'static str,
        /// The sizes that fit.
        expected: String,
        /// The sizes it has.
        got: [usize; 4],
    },
    /// A slice has another length than the problem asks for.
    #[error("the {what}: expected {expected}, got {got} elements")]
    Length {
        /// Which slice.
        what: &'static str,
        /// The length that fits.
        expected: String,
        /// The length it has.
        got: usize,
    },
    /// A token or a label that isn't below the number of them.
    #[error("the {what}: expected numbers below {limit}, got {got} at position {position}")]
    Id {
        /// Which list.
        what: &'static str,
        /// How many there are.
        limit: usize,
        /// The number.
        got: u32,
        /// Its place in the list.
        position: usize,
    },
    /// An option is out of its range.
    #[error("{what}: expected {expected}, got {got}")]
    Option {
        /// Which option.
        what: &'static str,
        /// The range.
        expected: &'static str,
        /// The value.
        got: String,
    },
    /// The mask doesn't fit the scores.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// A GPU can't be used.
    #[error("CUDA, {what}: expected {expected}, got {got}")]
    Gpu {
        /// Which part of it: the driver, the compiler, the compute capability.
        what: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        got: String,
    },
    /// The kernels for a GPU don't serve such a call.
    #[error("CUDA kernels, {what}: expected {expected}, got {got}")]
    Unsupported {
        /// Which property of the call.
        what: &'static str,
        /// What they serve.
        expected: &'static str,
        /// What the call has.
        got: usize,
    },
    /// A kernel for a GPU that isn't compiled or doesn't run.
    #[error("CUDA kernel {kernel}: {reason}")]
    Kernel {
        /// Which kernel.
        kernel: &'static str,
        /// What the compiler or the driver says.
        reason: String,
    },
}

/// A mask that doesn't fit the scores.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("mask, {part}: expected {expected}, got {got}")]
pub struct MaskError {
    /// Which part of the mask.
    pub part: &'static str,
    /// The size it should have.
    pub expected: String,
    /// The size it has.
    pub got: String,
}
