//! The [`Communicator`] for tensors on the CPU, whatever carries the messages.
//!
//! Each rank has a thread for its communication, which runs the calls in their order. So a call that was started goes on while the
//! rank computes. The rank's own thread only copies the tensors into a message.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use candle_core::{DType, Tensor};

use super::calls::{Call, Calls};
use super::communicator::{Communicator, Pending};
use super::engine::{Engine, Failure, Transport};
use super::message::{Body, Parcel, tensor_of};
use super::sum;
use crate::error::{AttentionError, Error, Result};

/// How often a rank whose calls can't succeed any more takes what others send.
const DRAIN: Duration = Duration::from_millis(20);

/// One rank, with its thread for communication.
pub(super) struct Host {
    rank: usize,
    size: usize,
    /// Why the rank ends, if it ends with an error.
    stop: Arc<OnceLock<String>>,
    bytes_sent: Arc<AtomicU64>,
    calls: Calls<Engine>,
}

impl Host {
    /// Starts the thread for communication. `connect` runs there, and gets the reason for which the rank ends, as soon as there is one.
    pub(super) fn start(
        connect: impl FnOnce(Arc<OnceLock<String>>) -> Result<Box<dyn Transport>> + Send + 'static,
    ) -> Result<Self> {
        let (stop, bytes_sent) = (Arc::new(OnceLock::new()), Arc::new(AtomicU64::new(0)));
        let theirs = (stop.clone(), bytes_sent.clone());
        let make = move || {
            let engine = Engine::new(connect(theirs.0.clone())?, theirs.0, theirs.1);
            let about = (engine.rank(), engine.size());
            Ok((engine, about))
        };
        let (calls, (rank, size)) = Calls::start(make, work_off, |(rank, _)| *rank)?;
        Ok(Self { rank, size, stop, bytes_sent, calls })
    }

    /// Ends the rank's part in all communication, after what was started. `error` is why, if the rank has failed: then it waits for
    /// nobody, and the others get an error that holds the text.
    pub(super) fn finish(&self, error: Option<String>) {
        if let Some(error) = error {
            // A first reason stays.
            let _ = self.stop.set(error);
        }
        self.calls.finish();
    }

    /// One round in which this rank sends `parcels`, or says why it has none.
    fn round(&self, call: String, parcels: Result<Vec<Parcel>>) -> Result<Vec<Parcel>> {
        self.calls.call(move |engine| engine.run(|engine| round(engine, &call, parcels))).wait()
    }

    fn check_rank(&self, name: &'static str, rank: usize) -> Result<()> {
        match rank < self.size {
            true => Ok(()),
            false => {
                let expected = "a rank, which is less than the number of ranks";
                Err(AttentionError::Number { name, expected, got: rank as f64 }.into())
            }
        }
    }
}

/// Runs calls in their order until there can be no more.
fn work_off(engine: &mut Engine, queue: &Receiver<Call<Engine>>) {
    loop {
        let call = match engine.is_broken() {
            false => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            true => queue.recv_timeout(DRAIN),
        };
        match call {
            Ok(call) => call(engine),
            Err(RecvTimeoutError::Timeout) => engine.drain(),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// A round. A rank without parcels takes part in it, and tells the others why it has none.
fn round(engine: &mut Engine, call: &str, parcels: Result<Vec<Parcel>>) -> Result<Vec<Parcel>, Failure> {
    match parcels {
        Ok(parcels) => engine.round(call, parcels),
        Err(error) => {
            let nothing = vec![Parcel::default(); engine.size()];
            engine.round(&format!("{call} ({error})"), nothing)?;
            Err(Failure::Everywhere(error))
        }
    }
}

/// The sum of everyone's `body`: rank `i` sums part `i`, then every rank gets all parts. Each part travels to n - 1 ranks twice, so that
/// a rank sends 2 (n - 1) / n of the tensor's bytes.
fn sum_over_ranks(
    engine: &mut Engine,
    call: &str,
    body: Result<Body>,
    (dtype, count): (DType, usize),
) -> Result<Vec<u8>, Failure> {
    let (rank, size) = (engine.rank(), engine.size());
    let part = |rank: usize| sum::part(rank, size, count, dtype);
    let parcel = |body: Body| Parcel { tensors: Vec::new(), body };
    let parcels = body.map(|body| (0..size).map(|rank| parcel(body.slice(part(rank)))).collect());
    let parts = round(engine, call, parcels)?;
    check_sizes(&parts, call, |_| part(rank).len())?;
    let parts = parts.iter().map(|parcel| parcel.body.bytes()).collect::<Vec<_>>();
    let sums = vec![parcel(Body::new(sum::sum(dtype, &parts))); size];
    let sums = engine.round(&format!("{call}, its parts"), sums)?;
    check_sizes(&sums, call, |rank| part(rank).len())?;
    Ok(sums.iter().map(|parcel| parcel.body.bytes()).collect::<Vec<_>>().concat())
}

fn check_sizes(parcels: &[Parcel], call: &str, expected: impl Fn(usize) -> usize) -> Result<(), Failure> {
    let mut sizes = parcels.iter().map(|parcel| parcel.body.bytes().len()).enumerate();
    match sizes.find(|(rank, size)| *size != expected(*rank)) {
        None => Ok(()),
        Some((rank, size)) => {
            let got = format!("{size} bytes instead of {}", expected(rank));
            Err(Failure::Here(AttentionError::Communication { what: call.to_string(), rank, got }))
        }
    }
}

/// The only tensor of a parcel of rank `rank`.
fn one(parcel: &Parcel, rank: usize, call: &str) -> Result<Tensor> {
    let mut tensors = parcel.unpack()?;
    let got = format!("{} tensors", tensors.len());
    match (tensors.pop(), tensors.is_empty()) {
        (Some(tensor), true) => Ok(tensor),
        _ => Err(AttentionError::Communication { what: call.to_string(), rank, got }.into()),
    }
}

impl Communicator for Host {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn start_exchange(&self, tensors: &[Tensor], to: usize, from: usize) -> Result<Pending> {
        if (to, from) == (self.rank, self.rank) {
            // The step counts, so that a rank that exchanges with itself keeps step with those that don't.
            let tensors = tensors.iter().map(Tensor::detach).collect::<Vec<_>>();
            let call = format!("exchange of {} tensors", tensors.len());
            let rank = self.rank;
            let answer = self.calls.call(move |engine| {
                engine.run(|engine| engine.exchange(&call, Parcel::default(), rank, rank)).map(|_| tensors)
            });
            return Ok(Pending::new(move || answer.wait()));
        }
        let call = format!("exchange of {} tensors", tensors.len());
        let parcel = self.check_rank("to", to).and_then(|()| self.check_rank("from", from));
        let parcel = parcel.and_then(|()| Parcel::pack(tensors));
        let rank = self.rank;
        let answer = self.calls.call(move |engine| match parcel {
            Ok(parcel) => engine.run(|engine| engine.exchange(&call, parcel, to, from)),
            Err(error) => {
                let got = format!("its error: {error}");
                engine.fail(AttentionError::Communication { what: call, rank, got });
                Err(error)
            }
        });
        Ok(Pending::new(move || answer.wait()?.unpack()))
    }

    fn start_all_reduce(&self, tensor: &Tensor) -> Result<Pending> {
        let (dtype, shape, count) = (tensor.dtype(), tensor.dims().to_vec(), tensor.elem_count());
        let call = format!("all_reduce of {} {shape:?}", dtype.as_str());
        let body = sum::check(dtype).map_err(Error::from).and_then(|()| match self.size {
            1 => Ok(Body::default()),
            _ => Ok(Parcel::pack(std::slice::from_ref(tensor))?.body),
        });
        if self.size == 1 {
            let tensor = tensor.detach();
            return Ok(Pending::new(move || body.map(|_| vec![tensor])));
        }
        let device = tensor.device().clone();
        let answer = self.calls.call(move |engine| {
            let bytes = engine.run(|engine| sum_over_ranks(engine, &call, body, (dtype, count)))?;
            Ok(vec![tensor_of(&bytes, dtype, &shape)?.to_device(&device)?])
        });
        Ok(Pending::new(move || answer.wait()))
    }

    fn all_to_all(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        const CALL: &str = "all_to_all";
        let (rank, size) = (self.rank, self.size);
        let parcels = match tensors.len() == size {
            true => tensors.iter().enumerate().map(|(to, tensor)| self.parcel_unless(to == rank, tensor)).collect(),
            false => {
                let (name, expected) = ("tensors of all_to_all", "as many as ranks");
                Err(AttentionError::Number { name, expected, got: tensors.len() as f64 }.into())
            }
        };
        let own = tensors.get(rank).map(Tensor::detach);
        received(&self.round(CALL.to_string(), parcels)?, rank, own.as_ref(), CALL)
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        const CALL: &str = "all_gather";
        let (rank, size) = (self.rank, self.size);
        let parcels = self.parcel_unless(size == 1, tensor).map(|parcel| vec![parcel; size]);
        let own = tensor.detach();
        received(&self.round(CALL.to_string(), parcels)?, rank, Some(&own), CALL)
    }

    fn broadcast(&self, tensor: Option<&Tensor>, root: usize) -> Result<Tensor> {
        let (rank, size) = (self.rank, self.size);
        let call = format!("broadcast from rank {root}");
        let own = tensor.filter(|_| rank == root);
        let parcel = self.check_rank("root", root).and_then(|()| match own {
            Some(tensor) => self.parcel_unless(size == 1, tensor),
            None if rank == root => {
                let got = "no tensor".to_string();
                Err(AttentionError::Communication { what: call.clone(), rank, got }.into())
            }
            None => Ok(Parcel::default()),
        });
        let parcels = self.round(call.clone(), parcel.map(|parcel| vec![parcel; size]))?;
        own.map_or_else(|| one(&parcels[root], root, &call), |own| Ok(own.detach()))
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let parcel = Parcel { tensors: Vec::new(), body: Body::new(bytes.to_vec()) };
        let parcels = self.round("all_gather_bytes".to_string(), Ok(vec![parcel; self.size]))?;
        Ok(parcels.into_iter().map(|parcel| parcel.body.into_vec()).collect())
    }

    fn bytes_sent(&self) -> u64 {
        self.bytes_sent.load(Ordering::Relaxed)
    }
}

impl Host {
    /// The parcel of a tensor, or an empty one for what isn't sent.
    fn parcel_unless(&self, is_own: bool, tensor: &Tensor) -> Result<Parcel> {
        match is_own {
            true => Ok(Parcel::default()),
            false => Parcel::pack(std::slice::from_ref(tensor)),
        }
    }
}

/// The tensor of every rank; this rank's own is `own`.
fn received(parcels: &[Parcel], rank: usize, own: Option<&Tensor>, call: &str) -> Result<Vec<Tensor>> {
    let tensor = |(from, parcel)| match own {
        Some(own) if from == rank => Ok(own.clone()),
        _ => one(parcel, from, call),
    };
    parcels.iter().enumerate().map(tensor).collect()
}

/// A rank that is dropped by a panic has failed.
impl Drop for Host {
    fn drop(&mut self) {
        self.finish(std::thread::panicking().then(|| "a panic".to_string()));
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "rank {} of {}", self.rank, self.size)
    }
}
