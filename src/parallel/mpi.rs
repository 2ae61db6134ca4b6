//! Ranks as processes of `mpirun`.
//!
//! All calls of MPI are made by the thread for communication, which also starts and ends MPI. No call blocks: the thread asks again and
//! again, and sleeps in between, since there may be as many ranks as processors. While it waits for anything it takes whatever arrives.
//! So a send ends as soon as the receiver waits for anything, and a disagreement leaves no rank in a send that nobody receives.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::environment::Universe;
use mpi::point_to_point::{Message as Incoming, Status};
use mpi::request::Request;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator as _, Destination, Equivalence, Source};

use super::communicator::Communicator;
use super::engine::Transport;
use super::host::Host;
use super::message::{Body, Head, Kind, Message};
use super::rank;
use crate::error::Result;

/// The most bytes in one message of MPI, which counts them in a C `int`. Also a multiple of every dtype's size.
const CHUNK: usize = 64 << 20;
/// How long a rank that has failed waits for the others to end, before it ends them.
const GRACE: Duration = Duration::from_secs(2);

/// The tags of MPI's messages.
const HEAD: i32 = 1;
const BODY: i32 = 2;

/// This process as a rank of `mpirun`; the only rank if it was started without.
///
/// The first call starts MPI. MPI ends when the last clone is dropped, after the last rank has dropped its own. So drop it before
/// the process ends: a static or a leaked one makes `mpirun` report a rank that didn't end. It can't start again after that.
/// [`mpi_ranks`] does this, and ends the other ranks if this one fails.
///
/// `mpirun` binds each of its processes to a few processors. `--bind-to none` gives a rank's pool of threads all of them.
///
/// # Errors
///
/// candle's, if MPI has been started by someone else, or has ended.
pub fn mpi() -> Result<Arc<dyn Communicator>> {
    static COMMUNICATOR: Mutex<Weak<Host>> = Mutex::new(Weak::new());
    let mut communicator = COMMUNICATOR.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(host) = communicator.upgrade() {
        return Ok(host);
    }
    let host = Arc::new(start()?);
    *communicator = Arc::downgrade(&host);
    Ok(host)
}

/// Runs `work` as a rank of `mpirun`, and returns what it returns. [`threads`](super::threads()) does the same in one process.
///
/// If this rank fails or panics, the calls of the others return an error with its text. If one of them hasn't ended 2 seconds later,
/// the rank prints its error and ends all ranks by `MPI_Abort`. If a process is killed, `mpirun` ends the others.
///
/// # Errors
///
/// The rank's own. [`AttentionError::Communication`](crate::AttentionError::Communication) for a panic. candle's, if MPI has been started
/// before.
///
/// # Examples
///
/// ```no_run
/// use candle_attention::parallel::mpi_ranks;
/// use candle_core::{Device, Tensor};
///
/// fn main() -> candle_attention::Result<()> {
///     mpi_ranks(|communicator| {
///         let ours = Tensor::new(&[1f32, communicator.rank() as f32], &Device::Cpu)?;
///         assert_eq!(communicator.all_reduce(&ours)?.to_vec1::<f32>()?[0], communicator.size() as f32);
///         Ok(())
///     })
/// }
/// ```
pub fn mpi_ranks<T>(work: impl FnOnce(Arc<dyn Communicator>) -> Result<T>) -> Result<T> {
    rank::run(start()?, work).map_err(|failed| failed.error)
}

fn start() -> Result<Host> {
    Host::start(|stop| {
        // MPI's main thread is the one that starts it: this one.
        let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
            return Err(
                candle_core::Error::msg("start of MPI: expected the first, got one that was started before").into()
            );
        };
        let world = universe.world();
        let inbox = Inbox { partial: (0..world.size()).map(|_| None).collect(), arrived: VecDeque::new() };
        Ok(Box::new(Mpi { stop, stopped: None, idle: Idle::default(), inbox, world, _universe: universe }))
    })
}

/// MPI's world, seen from one rank.
struct Mpi {
    /// Why this rank ends, if it has failed.
    stop: Arc<OnceLock<String>>,
    /// When that was first seen.
    stopped: Option<Instant>,
    idle: Idle,
    inbox: Inbox,
    world: SimpleCommunicator,
    /// Ends MPI when it is dropped, after the world.
    _universe: Universe,
}

impl Transport for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn send(&mut self, messages: Vec<(usize, Message)>) {
        let packed = messages.into_iter().map(|(to, message)| (to, pack(&message), message.body)).collect::<Vec<_>>();
        mpi::request::scope(|scope| {
            let mut requests = Vec::new();
            for (to, head, body) in &packed {
                let process = self.world.process_at_rank(*to as i32);
                requests.push(process.immediate_send_with_tag(scope, &head[..], HEAD));
                let chunks = body.bytes().chunks(CHUNK);
                requests.extend(chunks.map(|chunk| process.immediate_send_with_tag(scope, chunk, BODY)));
            }
            let mut idle = Idle::default();
            loop {
                requests = requests.into_iter().filter_map(|request| Request::test(request).err()).collect();
                if requests.is_empty() {
                    return;
                }
                match self.inbox.take_one(&self.world) {
                    true => idle = Idle::default(),
                    false => idle.wait(),
                }
                end_all_after_grace(&self.world, &self.stop, &mut self.stopped);
            }
        });
    }

    fn receive(&mut self, patience: Duration) -> Option<(usize, Message)> {
        let start = Instant::now();
        loop {
            while self.inbox.take_one(&self.world) {}
            if let Some(message) = self.inbox.arrived.pop_front() {
                self.idle = Idle::default();
                return Some(message);
            }
            if start.elapsed() >= patience {
                return None;
            }
            self.idle.wait();
        }
    }

    /// MPI ends on all ranks together.
    fn close(&mut self, ended: &[bool]) {
        let mut ended = ended.to_vec();
        ended[self.rank()] = true;
        while ended.contains(&false) {
            if let Some((from, Message { head: Head { kind: Kind::End, .. }, .. })) =
                self.receive(Duration::from_millis(20))
            {
                ended[from] = true;
            }
            end_all_after_grace(&self.world, &self.stop, &mut self.stopped);
        }
    }
}

/// Ends all processes if this rank failed a while ago.
fn end_all_after_grace(world: &SimpleCommunicator, stop: &OnceLock<String>, stopped: &mut Option<Instant>) {
    let Some(reason) = stop.get() else { return };
    if stopped.get_or_insert_with(Instant::now).elapsed() > GRACE {
        eprintln!("rank {} of {} has failed, and ends the others: {reason}", world.rank(), world.size());
        world.abort(1);
    }
}

/// What a message says before its body: the size of the body, then the head as JSON.
fn pack(message: &Message) -> Vec<u8> {
    let mut bytes = (message.body.bytes().len() as u64).to_le_bytes().to_vec();
    bytes.extend(serde_json::to_vec(&message.head).expect("a head of strings and numbers"));
    bytes
}

fn unpack(bytes: &[u8]) -> Option<(Head, usize)> {
    let (size, head) = bytes.split_first_chunk()?;
    Some((serde_json::from_slice(head).ok()?, u64::from_le_bytes(*size) as usize))
}

/// What has arrived.
struct Inbox {
    /// Of each rank, a message whose body isn't whole, and its missing bytes.
    partial: Vec<Option<(Head, Vec<u8>, usize)>>,
    arrived: VecDeque<(usize, Message)>,
}

impl Inbox {
    /// Takes one message of MPI, if there is one.
    fn take_one(&mut self, world: &SimpleCommunicator) -> bool {
        let Some((incoming, status)) = world.any_process().immediate_matched_probe() else { return false };
        let (from, tag) = (status.source_rank() as usize, status.tag());
        let bytes = take(incoming, &status);
        let (head, body, missing) = match (tag, self.partial[from].take()) {
            (HEAD, None) => match unpack(&bytes) {
                Some((head, size)) => (head, Vec::new(), size),
                None => unreadable(world, from),
            },
            (BODY, Some((head, body, missing))) if bytes.len() <= missing => {
                let rest = missing - bytes.len();
                // Nearly every body is one chunk, which needs no copy.
                let body = if body.is_empty() && rest == 0 { bytes } else { append(body, &bytes, missing) };
                (head, body, rest)
            }
            _ => unreadable(world, from),
        };
        match missing {
            0 => self.arrived.push_back((from, Message { head, body: Body::new(body) })),
            _ => self.partial[from] = Some((head, body, missing)),
        }
        true
    }
}

/// A body with its next chunk. `missing` bytes were missing: with the first chunk comes the memory for all.
fn append(mut body: Vec<u8>, chunk: &[u8], missing: usize) -> Vec<u8> {
    body.reserve_exact(missing);
    body.extend_from_slice(chunk);
    body
}

/// Another version of this crate on another rank. There is no way to go on, nor to tell it why.
fn unreadable(world: &SimpleCommunicator, from: usize) -> ! {
    eprintln!("rank {} ends all ranks: rank {from} has sent what it can't read", world.rank());
    world.abort(1)
}

/// The bytes of a message that has been announced.
fn take(incoming: Incoming, status: &Status) -> Vec<u8> {
    let mut bytes = vec![0u8; status.count(u8::equivalent_datatype()) as usize];
    mpi::request::scope(|scope| {
        let mut request = incoming.immediate_matched_receive_into(scope, &mut bytes[..]);
        let mut idle = Idle::default();
        while let Err(waiting) = Request::test(request) {
            request = waiting;
            idle.wait();
        }
    });
    bytes
}

/// Pauses that grow: short while messages come, and hardly any time of a processor during a long computation.
#[derive(Default)]
struct Idle {
    pauses: u32,
}

impl Idle {
    /// So often the thread only lets others run, which takes about a microsecond.
    const YIELDS: u32 = 50;
    const SHORTEST: Duration = Duration::from_micros(20);
    const LONGEST: Duration = Duration::from_millis(1);

    fn wait(&mut self) {
        match self.pauses.checked_sub(Self::YIELDS) {
            None => std::thread::yield_now(),
            // Doubles every 8th time.
            Some(sleeps) => std::thread::sleep((Self::SHORTEST * (1 << (sleeps / 8).min(6))).min(Self::LONGEST)),
        }
        self.pauses = self.pauses.saturating_add(1);
    }
}
