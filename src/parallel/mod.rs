//! Work over several ranks: processes on MPI, or threads of one process.
//!
//! A [`Communicator`] is one rank's way to the others. [`threads`](threads()) makes the ranks of one process. With the feature `mpi`, `mpi_ranks`
//! makes those of `mpirun`, from the same function. With the feature `nccl`, `nccl` takes tensors of CUDA devices.
//! [`DataParallel`] splits the batches of a training among ranks, [`ContextParallel`] a sequence, and
//! [`TransformerBlock::shard`](crate::block::TransformerBlock::shard) the heads and hidden numbers of a block.

mod calls;
pub(crate) mod communicator;
pub(crate) mod context;
mod data;
mod engine;
pub(crate) mod hash;
mod host;
mod message;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod rank;
mod share;
mod sum;
pub(crate) mod tensor;
mod threads;

pub use communicator::{Communicator, Pending};
pub use context::{ContextParallel, Order, Scheme, Split};
pub use data::{Averaging, DataParallel, backward_from};
#[cfg(feature = "mpi")]
pub use mpi::{mpi, mpi_ranks};
#[cfg(feature = "nccl")]
pub use nccl::nccl;
pub use threads::threads;
