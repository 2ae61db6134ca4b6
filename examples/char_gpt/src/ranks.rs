//! The ranks of a run: processes of `mpirun`, or threads of this process.

use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_attention::parallel::{Communicator, threads};
use candle_attention::{AttentionError, Error};
use candle_core::{Device, Tensor};

/// The variables in which a launcher says how many processes it has started: Open MPI's, and that of MPICH and Intel MPI.
const PROCESSES: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

/// This rank and its way to the others, if there are any.
pub struct Ranks(Option<Arc<dyn Communicator>>);

impl Ranks {
    pub fn communicator(&self) -> Option<&Arc<dyn Communicator>> {
        self.0.as_ref()
    }

    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |ranks| ranks.rank())
    }

    pub fn size(&self) -> usize {
        self.0.as_ref().map_or(1, |ranks| ranks.size())
    }

    /// Whether this rank prints and saves.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// An error unless all ranks say the same of `what`.
    pub fn agree(&self, what: &'static str, ours: &str) -> Result<()> {
        Ok(self.0.as_ref().map_or(Ok(()), |ranks| ranks.agree(what, ours))?)
    }

    /// The sums of these numbers over all ranks.
    pub fn sums<const N: usize>(&self, ours: [f64; N]) -> Result<[f64; N]> {
        let Some(ranks) = &self.0 else { return Ok(ours) };
        let sums = ranks.all_reduce(&Tensor::new(&ours, &Device::Cpu)?)?.to_vec1::<f64>()?;
        Ok(std::array::from_fn(|i| sums[i]))
    }
}

/// Does the work of a run on every rank. `number` is that of `--ranks`.
pub fn run(number: Option<usize>, work: impl Fn(&Ranks) -> Result<()> + Sync) -> Result<()> {
    let work_of = |ranks| work(&Ranks(Some(ranks))).map_err(to_library_error);
    match (processes(), number) {
        (Some(processes), number) => {
            let number = number.unwrap_or(processes);
            ensure!(number == processes, "--ranks: expected {processes}, the processes of mpirun, got {number}");
            of_mpirun(work_of)
        }
        (None, Some(number)) => Ok(threads(number, work_of).map(drop)?),
        (None, None) => work(&Ranks(None)),
    }
}

/// The number of processes, if `mpirun` has started this one.
fn processes() -> Option<usize> {
    PROCESSES.iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}

#[cfg(feature = "mpi")]
fn of_mpirun(work: impl Fn(Arc<dyn Communicator>) -> candle_attention::Result<()>) -> Result<()> {
    Ok(candle_attention::parallel::mpi_ranks(work)?)
}

/// Without MPI, each process would be a run of its own, and all would write the same file.
#[cfg(not(feature = "mpi"))]
fn of_mpirun(_: impl Fn(Arc<dyn Communicator>) -> candle_attention::Result<()>) -> Result<()> {
    anyhow::bail!("expected a program that is built with `--features mpi`, as mpirun has started it")
}

/// An error of a rank that is gone keeps its type: then the cause is another rank's error, which is the one that counts.
fn to_library_error(error: anyhow::Error) -> Error {
    match error.downcast_ref() {
        Some(Error::Attention(error @ (AttentionError::Communication { .. } | AttentionError::Ranks { .. }))) => {
            error.clone().into()
        }
        _ => candle_core::Error::msg(format!("{error:#}")).into(),
    }
}
