//! Rounds and exchanges of messages: what arrived, who is gone, and whether all ranks are at the same call.
//!
//! Every call of a [`Communicator`](super::Communicator) is made of steps. In a *round* every rank sends a message to every other rank,
//! if only to say which call it makes. So every rank sees the calls of all ranks, and all find the same disagreement.
//! In an *exchange* each rank sends to one other rank. A disagreement there is found by some ranks, and they tell the others.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::message::{Fault, Head, Kind, Message, Parcel};
use crate::error::{AttentionError, Error, Result};

/// How long a wait for a message lasts before the rank looks whether it should stop.
const PATIENCE: Duration = Duration::from_millis(20);

/// What carries messages. Those of one rank to one other arrive in their order.
pub(super) trait Transport {
    fn rank(&self) -> usize;

    fn size(&self) -> usize;

    /// Sends messages to other ranks. Nobody needs to be at the same call for that.
    fn send(&mut self, messages: Vec<(usize, Message)>);

    /// The next message that arrives, and who sent it. Waits for `patience` at most.
    fn receive(&mut self, patience: Duration) -> Option<(usize, Message)>;

    /// Comes after the last message. `ended` says of each rank whether its last message has come.
    fn close(&mut self, ended: &[bool]);
}

/// Why a step failed.
pub(super) enum Failure {
    /// All ranks know, and are at the same step. The next call can succeed.
    Everywhere(Error),
    /// The others may be anywhere. No later call can succeed.
    Here(AttentionError),
}

/// One rank's side of all steps. It lives in the rank's thread for communication.
pub(super) struct Engine {
    transport: Box<dyn Transport>,
    step: u64,
    /// Messages that no step has taken, of each rank.
    arrived: Vec<VecDeque<Message>>,
    /// The ranks that have sent their last message.
    ended: Vec<bool>,
    /// What the first rank that failed has told.
    fault: Option<Fault>,
    /// The error of every later call.
    broken: Option<AttentionError>,
    /// Why this rank ends, if it ends with an error.
    stop: Arc<OnceLock<String>>,
    bytes_sent: Arc<AtomicU64>,
}

impl Engine {
    pub(super) fn new(transport: Box<dyn Transport>, stop: Arc<OnceLock<String>>, bytes_sent: Arc<AtomicU64>) -> Self {
        let size = transport.size();
        let arrived = (0..size).map(|_| VecDeque::new()).collect();
        Self { transport, step: 0, arrived, ended: vec![false; size], fault: None, broken: None, stop, bytes_sent }
    }

    pub(super) fn rank(&self) -> usize {
        self.transport.rank()
    }

    pub(super) fn size(&self) -> usize {
        self.transport.size()
    }

    /// Runs the steps of a call. If they fail here only, the others are told.
    pub(super) fn run<R>(&mut self, steps: impl FnOnce(&mut Self) -> Result<R, Failure>) -> Result<R> {
        if let Some(error) = &self.broken {
            return Err(error.clone().into());
        }
        steps(self).map_err(|failure| match failure {
            Failure::Everywhere(error) => error,
            Failure::Here(error) => {
                self.fail(error.clone());
                error.into()
            }
        })
    }

    /// Tells the others of an error, after which this rank can't go on.
    pub(super) fn fail(&mut self, error: AttentionError) {
        if self.broken.is_none() {
            self.tell(Kind::Fault(Fault::of(&error, self.rank())));
            self.broken = Some(error);
        }
    }

    /// Whether no call can succeed any more.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// Takes what arrives, for nobody. After an error others may still send, and wait until somebody takes it.
    pub(super) fn drain(&mut self) {
        while let Some((from, message)) = self.transport.receive(Duration::ZERO) {
            self.sort(from, message);
        }
        self.arrived.iter_mut().for_each(VecDeque::clear);
    }

    /// Every rank sends `parcels[i]` to rank `i`, and gets what came from each rank, in order. Its own is not sent.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Ranks`] on every rank, unless all make the same `call`.
    pub(super) fn round(&mut self, call: &str, mut parcels: Vec<Parcel>) -> Result<Vec<Parcel>, Failure> {
        let (rank, size, step) = (self.rank(), self.size(), self.next_step());
        let own = std::mem::take(&mut parcels[rank]);
        let others = parcels.into_iter().enumerate().filter(|(to, _)| *to != rank);
        let messages = others.map(|(to, parcel)| (to, self.message(Kind::Round, step, call, parcel))).collect();
        self.transport.send(messages);

        let (mut calls, mut received) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for from in 0..size {
            let (their_call, parcel) = match from == rank {
                true => (call.to_string(), own.clone()),
                false => {
                    let wait = Wait { kind: Kind::Round, step, call, from: None };
                    let Message { head, body } = self.next_from(from, &wait)?;
                    (head.call, Parcel { tensors: head.tensors, body })
                }
            };
            calls.push(their_call);
            received.push(parcel);
        }
        match calls.iter().position(|call| *call != calls[0]) {
            None => Ok(received),
            Some(other) => {
                let got = [calls[0].clone(), calls[other].clone()];
                let what = "call of the communicator".to_string();
                Err(Failure::Everywhere(AttentionError::Ranks { what, ranks: [0, other], got }.into()))
            }
        }
    }

    /// Sends a parcel to rank `to` and receives one from rank `from`.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Ranks`] if rank `from` makes another `call` or sends to another rank.
    pub(super) fn exchange(&mut self, call: &str, parcel: Parcel, to: usize, from: usize) -> Result<Parcel, Failure> {
        let (rank, step) = (self.rank(), self.next_step());
        if (to, from) == (rank, rank) {
            return Ok(parcel);
        }
        if to == rank || from == rank {
            let got = [format!("{call}, to rank {to}"), format!("{call}, from rank {from}")];
            return Err(disagree([rank, rank], got));
        }
        let message = self.message(Kind::Exchange, step, call, parcel);
        self.transport.send(vec![(to, message)]);
        let wait = Wait { kind: Kind::Exchange, step, call, from: Some(from) };
        let Message { head, body } = self.next_from(from, &wait)?;
        match head.call == call {
            true => Ok(Parcel { tensors: head.tensors, body }),
            false => Err(disagree([from, rank], [head.call, call.to_string()])),
        }
    }

    fn next_step(&mut self) -> u64 {
        self.step += 1;
        self.step
    }

    fn message(&self, kind: Kind, step: u64, call: &str, parcel: Parcel) -> Message {
        self.bytes_sent.fetch_add(parcel.body.bytes().len() as u64, Ordering::Relaxed);
        Message { head: Head { kind, step, call: call.to_string(), tensors: parcel.tensors }, body: parcel.body }
    }

    /// The same message without bytes to every other rank. Also to those that have sent their last message: they wait for everyone's.
    fn tell(&mut self, kind: Kind) {
        let rank = self.rank();
        let others = (0..self.size()).filter(|to| *to != rank);
        let messages = others.map(|to| (to, self.message(kind.clone(), self.step, "", Parcel::default()))).collect();
        self.transport.send(messages);
    }

    /// The message of rank `from` in this step.
    fn next_from(&mut self, from: usize, wait: &Wait<'_>) -> Result<Message, Failure> {
        loop {
            self.check_order(from, wait)?;
            if let Some(message) = self.arrived[from].pop_front() {
                return Ok(message);
            }
            // What has come is used before a fault counts: a rank that fails later takes nothing from this step.
            if let Some(fault) = &self.fault {
                return Err(Failure::Here(fault.clone().error(wait.call)));
            }
            let gone = |rank: usize, got: &str| {
                let (what, got) = (wait.call.to_string(), got.to_string());
                Err(Failure::Here(AttentionError::Communication { what, rank, got }))
            };
            if self.ended[from] {
                return gone(from, "its work has ended");
            }
            if let Some(reason) = self.stop.get() {
                return gone(self.rank(), reason);
            }
            if let Some((from, message)) = self.transport.receive(PATIENCE) {
                self.sort(from, message);
            }
        }
    }

    fn sort(&mut self, from: usize, message: Message) {
        match message.head.kind {
            Kind::Fault(fault) => {
                self.fault.get_or_insert(fault);
            }
            Kind::End => self.ended[from] = true,
            Kind::Round | Kind::Exchange => self.arrived[from].push_back(message),
        }
    }

    /// Checks that nothing has arrived that no rank sends if all make the same calls. The message of rank `awaited` is next.
    fn check_order(&self, awaited: usize, wait: &Wait<'_>) -> Result<(), Failure> {
        let first = self.arrived.iter().map(|messages| messages.front().map(|message| &message.head)).enumerate();
        for (sender, head) in first.filter_map(|(sender, head)| Some((sender, head?))) {
            // The sender may be ahead, after its message of this step has been taken.
            let is_expected = match head.step == wait.step {
                true => head.kind == wait.kind && wait.from.is_none_or(|from| from == sender),
                false => head.step > wait.step && sender != awaited,
            };
            if !is_expected {
                let theirs = match head.kind {
                    Kind::Exchange => format!("{}, to rank {} (step {})", head.call, self.rank(), head.step),
                    _ => format!("{} (step {})", head.call, head.step),
                };
                let ours = match wait.from {
                    Some(from) => format!("{}, from rank {from} (step {})", wait.call, wait.step),
                    None => format!("{} (step {})", wait.call, wait.step),
                };
                return Err(disagree([sender, self.rank()], [theirs, ours]));
            }
        }
        Ok(())
    }
}

/// What a rank waits for.
struct Wait<'a> {
    kind: Kind,
    step: u64,
    call: &'a str,
    /// The one rank that sends in an exchange.
    from: Option<usize>,
}

fn disagree(ranks: [usize; 2], got: [String; 2]) -> Failure {
    Failure::Here(AttentionError::Ranks { what: "call of the communicator".to_string(), ranks, got })
}

/// The last message, whatever ends this rank.
impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(got) = self.stop.get().cloned() {
            let what = "the work of a rank".to_string();
            self.fail(AttentionError::Communication { what, rank: self.rank(), got });
        }
        self.tell(Kind::End);
        self.transport.close(&self.ended);
    }
}
