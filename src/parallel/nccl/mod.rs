//! Tensors of CUDA devices over NCCL. Compiled, but not run so far.
//!
//! NCCL carries numbers only. What each rank calls, and with which dtypes and shapes, goes over another [`Communicator`] before, so that a
//! disagreement is an error on every rank instead of a hang in NCCL. Sums are made of point-to-point messages and not of
//! `ncclAllReduce`: so they have this crate's order and precision, and the bits of every other implementation.

mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;

use candle_core::{Device, Tensor};

use super::calls::{Call, Calls};
use super::communicator::{Communicator, Pending, check_count, check_rank};
use super::message::TensorHead;
use crate::error::{Error, Result};
use worker::{Notice, Worker, failed, prepared};

/// A communicator for tensors on `device`, a CUDA device that no other rank uses, between the ranks of `control`.
///
/// Tensors are in f32, f64, bf16 or f16. `control` carries what the ranks say of them, and bytes; this communicator has it to
/// itself. Messages travel in the order of the device's stream, so that they wait for the kernels before them.
///
/// A fault during a transfer isn't found: if a rank or its network fails after all ranks have announced a call, the devices of the others
/// wait for its numbers without end. A fault before that is an error on every rank, as `control` finds it.
///
/// Not run so far: there was no machine with two GPUs.
///
/// # Errors
///
/// [`AttentionError::Communication`](crate::AttentionError::Communication) if NCCL doesn't start; candle's for another device than a CUDA device.
pub fn nccl(control: Arc<dyn Communicator>, device: &Device) -> Result<Arc<dyn Communicator>> {
    let (rank, size) = (control.rank(), control.size());
    let Device::Cuda(cuda) = device else {
        return Err(
            candle_core::Error::Msg(format!("nccl: expected a CUDA device, got {:?}", device.location())).into()
        );
    };
    let (cuda, bytes_sent) = (cuda.clone(), Arc::new(AtomicU64::new(0)));
    let theirs = bytes_sent.clone();
    let make = move || Ok((Worker::new(control, cuda, theirs)?, ()));
    let run = |worker: &mut Worker, queue: &Receiver<Call<Worker>>| {
        queue.iter().for_each(|call| call(worker));
        // Dropping NCCL's handle would break off what the device hasn't done yet.
        let _ = worker.comm.stream().synchronize();
    };
    let (calls, ()) = Calls::start(make, run, |()| rank)?;
    Ok(Arc::new(Nccl { rank, size, calls, bytes_sent }))
}

/// One rank. NCCL's handle stays in a thread of its own, which runs the calls in their order.
struct Nccl {
    rank: usize,
    size: usize,
    calls: Calls<Worker>,
    bytes_sent: Arc<AtomicU64>,
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.calls.finish();
    }
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "rank {} of {} over NCCL", self.rank, self.size)
    }
}

/// The only tensor of rank `rank`.
fn one(call: &str, rank: usize, mut tensors: Vec<Tensor>) -> Result<Tensor> {
    let got = format!("expected one tensor, got {}", tensors.len());
    match (tensors.pop(), tensors.is_empty()) {
        (Some(tensor), true) => Ok(tensor),
        _ => Err(failed(call, rank, got).into()),
    }
}

fn one_of_each(call: &str, received: Vec<Vec<Tensor>>) -> Result<Vec<Tensor>> {
    received.into_iter().enumerate().map(|(rank, tensors)| one(call, rank, tensors)).collect()
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn start_exchange(&self, tensors: &[Tensor], to: usize, from: usize) -> Result<Pending> {
        let call = format!("exchange of {} tensors", tensors.len());
        let size = self.size;
        let checked = check_rank("to", to, size).and_then(|()| check_rank("from", from, size)).map_err(Error::from);
        let sends = checked.and_then(|()| tensors.iter().map(|tensor| Ok((to, prepared(tensor)?))).collect());
        let answer = self.calls.call(move |worker| worker.deliver(&call, Some(from), sends));
        Ok(Pending::new(move || Ok(answer.wait()?.swap_remove(from))))
    }

    fn start_all_reduce(&self, tensor: &Tensor) -> Result<Pending> {
        let (head, tensor) = (TensorHead::of(tensor), prepared(tensor));
        let answer = self.calls.call(move |worker| worker.all_reduce(&head, tensor));
        Ok(Pending::new(move || Ok(vec![answer.wait()?])))
    }

    fn all_to_all(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        let sends = check_count(tensors, self.size).map_err(Error::from);
        let sends =
            sends.and_then(|()| tensors.iter().enumerate().map(|(to, tensor)| Ok((to, prepared(tensor)?))).collect());
        one_of_each("all_to_all", self.calls.call(move |worker| worker.deliver("all_to_all", None, sends)).wait()?)
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        let size = self.size;
        let sends = prepared(tensor).map(|tensor| (0..size).map(|to| (to, tensor.clone())).collect());
        one_of_each("all_gather", self.calls.call(move |worker| worker.deliver("all_gather", None, sends)).wait()?)
    }

    fn broadcast(&self, tensor: Option<&Tensor>, root: usize) -> Result<Tensor> {
        let (rank, size) = (self.rank, self.size);
        let call = format!("broadcast from rank {root}");
        let sends = check_rank("root", root, size).map_err(Error::from).and_then(|()| match tensor {
            Some(tensor) if rank == root => {
                prepared(tensor).map(|tensor| (0..size).map(|to| (to, tensor.clone())).collect())
            }
            None if rank == root => Err(failed(&call, root, "no tensor was given".to_string()).into()),
            _ => Ok(Vec::new()),
        });
        let name = call.clone();
        let mut received = self.calls.call(move |worker| worker.deliver(&name, None, sends)).wait()?;
        one(&call, root, received.swap_remove(root))
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let bytes = bytes.to_vec();
        // Other ranks may be at a call with tensors, which sends a notice.
        self.calls
            .call(move |worker| {
                worker.notices(&Notice {
                    call: "all_gather_bytes".to_string(),
                    refusal: None,
                    sends: Vec::new(),
                    from: None,
                })?;
                worker.control.all_gather_bytes(&bytes)
            })
            .wait()
    }

    fn bytes_sent(&self) -> u64 {
        self.bytes_sent.load(Ordering::Relaxed)
    }
}
