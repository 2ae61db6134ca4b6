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
use super::communicator::{Communicator, Pending, check_count, check_rank};
use super::engine::{Engine, Failure, Transport};
use super::message::{Body, Parcel, own, tensor_of};
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

    /// One round in which this rank sends parcels, or says why it has none. What it keeps comes back beside those of the others.
    fn round<K: Send + 'static>(&self, call: &str, given: Result<(Vec<Parcel>, K)>) -> Result<(Vec<Parcel>, K)> {
        let call = call.to_string();
        self.calls.call(move |engine| engine.run(|engine| round(engine, &call, given))).wait()
    }

    /// The tensors of a round in which every rank gets one of each. This rank's own is what it keeps.
    fn tensors(&self, call: &str, given: Result<(Vec<Parcel>, Tensor)>) -> Result<Vec<Tensor>> {
        let (parcels, own) = self.round(call, given)?;
        let tensor = |(from, parcel)| if from == self.rank { Ok(own.clone()) } else { one(parcel, from, call) };
        parcels.iter().enumerate().map(tensor).collect()
    }

    /// The parcels that bring a tensor to all other ranks.
    fn to_all(&self, tensor: &Tensor) -> Result<Vec<Parcel>> {
        let parcel = if self.size == 1 { Parcel::default() } else { Parcel::pack(std::slice::from_ref(tensor))? };
        Ok(vec![parcel; self.size])
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
fn round<K>(engine: &mut Engine, call: &str, given: Result<(Vec<Parcel>, K)>) -> Result<(Vec<Parcel>, K), Failure> {
    match given {
        Ok((parcels, kept)) => Ok((engine.round(call, parcels)?, kept)),
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
    let parcels = body.map(|body| ((0..size).map(|rank| parcel(body.slice(part(rank)))).collect(), ()));
    let (parts, ()) = round(engine, call, parcels)?;
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
            let got = format!("expected {} bytes, got {size}", expected(rank));
            Err(Failure::Here(AttentionError::Communication { what: call.to_string(), rank, got }))
        }
    }
}

/// The only tensor of a parcel of rank `rank`.
fn one(parcel: &Parcel, rank: usize, call: &str) -> Result<Tensor> {
    let mut tensors = parcel.unpack()?;
    let got = format!("expected one tensor, got {}", tensors.len());
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
        let (rank, size) = (self.rank, self.size);
        let call = format!("exchange of {} tensors", tensors.len());
        let checked = check_rank("to", to, size).and_then(|()| check_rank("from", from, size)).map_err(Error::from);
        let given = checked.and_then(|()| match (to, from) == (rank, rank) {
            true => Ok((Parcel::default(), Some(tensors.iter().map(own).collect::<Result<Vec<_>>>()?))),
            false => Ok((Parcel::pack(tensors)?, None)),
        });
        let answer = self.calls.call(move |engine| match given {
            // A rank that exchanges with itself sends nothing. The step counts, so that it keeps step with those that do.
            Ok((parcel, own)) => Ok((engine.run(|engine| engine.exchange(&call, parcel, to, from))?, own)),
            Err(error) => {
                let got = format!("its error: {error}");
                engine.fail(AttentionError::Communication { what: call, rank, got });
                Err(error)
            }
        });
        Ok(Pending::new(move || {
            let (parcel, own) = answer.wait()?;
            own.map_or_else(|| parcel.unpack(), Ok)
        }))
    }

    fn start_all_reduce(&self, tensor: &Tensor) -> Result<Pending> {
        let (dtype, shape, count) = (tensor.dtype(), tensor.dims().to_vec(), tensor.elem_count());
        let checked = sum::check(dtype).map_err(Error::from);
        if self.size == 1 {
            let sum = checked.and_then(|()| own(tensor));
            return Ok(Pending::new(move || Ok(vec![sum?])));
        }
        let body = checked.and_then(|()| Ok(Parcel::pack(std::slice::from_ref(tensor))?.body));
        let call = format!("all_reduce of {} {shape:?}", dtype.as_str());
        let device = tensor.device().clone();
        let answer = self.calls.call(move |engine| {
            let bytes = engine.run(|engine| sum_over_ranks(engine, &call, body, (dtype, count)))?;
            Ok(vec![tensor_of(&bytes, dtype, &shape)?.to_device(&device)?])
        });
        Ok(Pending::new(move || answer.wait()))
    }

    fn all_to_all(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        let parcel = |(to, tensor)| match to == self.rank {
            true => Ok(Parcel::default()),
            false => Parcel::pack(std::slice::from_ref(tensor)),
        };
        let given = check_count(tensors, self.size).map_err(Error::from).and_then(|()| {
            Ok((tensors.iter().enumerate().map(parcel).collect::<Result<Vec<_>>>()?, own(&tensors[self.rank])?))
        });
        self.tensors("all_to_all", given)
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        self.tensors("all_gather", self.to_all(tensor).and_then(|parcels| Ok((parcels, own(tensor)?))))
    }

    fn broadcast(&self, tensor: Option<&Tensor>, root: usize) -> Result<Tensor> {
        let (rank, size) = (self.rank, self.size);
        let call = format!("broadcast from rank {root}");
        let given = check_rank("root", root, size).map_err(Error::from).and_then(|()| match tensor {
            Some(tensor) if rank == root => Ok((self.to_all(tensor)?, Some(own(tensor)?))),
            None if rank == root => {
                let got = "no tensor was given".to_string();
                Err(AttentionError::Communication { what: call.clone(), rank, got }.into())
            }
            _ => Ok((vec![Parcel::default(); size], None)),
        });
        let (parcels, own) = self.round(&call, given)?;
        own.map_or_else(|| one(&parcels[root], root, &call), Ok)
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let parcel = Parcel { tensors: Vec::new(), body: Body::new(bytes.to_vec()) };
        let (parcels, ()) = self.round("all_gather_bytes", Ok((vec![parcel; self.size], ())))?;
        Ok(parcels.into_iter().map(|parcel| parcel.body.into_vec()).collect())
    }

    fn bytes_sent(&self) -> u64 {
        self.bytes_sent.load(Ordering::Relaxed)
    }
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
