//! Ranks as threads of one process.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, ScopedJoinHandle, scope};
use std::time::Duration;

use super::communicator::Communicator;
use super::engine::Transport;
use super::host::Host;
use super::message::{Head, Kind, Message, Parcel};
use super::rank::{Failed, run};
use crate::error::{AttentionError, Error, Result};

/// Runs `work` on `size` ranks, each in a thread of its own, and returns their results in order.
///
/// A rank that ends, by an error, a panic or early, hangs nobody: the others' calls return
/// [`AttentionError::Communication`](crate::AttentionError::Communication). Each rank computes in its own thread, and
/// all use the same pool of threads beside it.
///
/// # Errors
///
/// The error of the lowest rank that failed on its own, and not because another rank was gone. A panic is an error:
/// [`AttentionError::Communication`](crate::AttentionError::Communication). [`AttentionError::Number`](crate::AttentionError::Number) for
/// no ranks.
///
/// # Examples
///
/// ```
/// use candle_attention::parallel::threads;
/// use candle_core::{Device, Tensor};
///
/// let sums = threads(4, |communicator| {
///     let ours = Tensor::new(&[1f32, communicator.rank() as f32], &Device::Cpu)?;
///     Ok(communicator.all_reduce(&ours)?.to_vec1::<f32>()?)
/// })?;
/// assert_eq!(sums, vec![vec![4.0, 6.0]; 4]);
/// # Ok::<(), candle_attention::Error>(())
/// ```
pub fn threads<T: Send>(size: usize, work: impl Fn(Arc<dyn Communicator>) -> Result<T> + Sync) -> Result<Vec<T>> {
    if size == 0 {
        return Err(AttentionError::Number { name: "number of ranks", expected: "at least 1", got: 0.0 }.into());
    }
    let outcomes = scope(|scope| {
        let start = |mailbox: Mailbox| {
            let work = &work;
            let rank = Builder::new().name(format!("rank {}", mailbox.rank));
            rank.spawn_scoped(scope, move || run(Host::start(|_| Ok(Box::new(mailbox)))?, work))
        };
        // All ranks run before the first is waited for.
        let ranks = mailboxes(size).into_iter().map(start).collect::<Vec<_>>();
        let join = |(rank, thread): (usize, std::io::Result<ScopedJoinHandle<'_, _>>)| match thread {
            // The work's panics are its outcome. This would be one of the crate.
            Ok(thread) => thread.join().unwrap_or_else(|_| Err(no_rank(rank, "a panic"))),
            Err(error) => Err(no_rank(rank, &format!("no thread: {error}"))),
        };
        ranks.into_iter().enumerate().map(join).collect::<Vec<Result<T, Box<Failed>>>>()
    });
    let (mut results, mut first): (_, Option<Box<Failed>>) = (Vec::with_capacity(size), None);
    for outcome in outcomes {
        match outcome {
            Ok(result) => results.push(result),
            Err(failed) if first.as_ref().is_none_or(|first| failed.is_own && !first.is_own) => first = Some(failed),
            Err(_) => {}
        }
    }
    first.map_or(Ok(results), |failed| Err(failed.error))
}

/// The failure of a rank that couldn't start.
fn no_rank(rank: usize, got: &str) -> Box<Failed> {
    let (what, got) = ("start of a rank".to_string(), got.to_string());
    let error = Error::from(AttentionError::Communication { what, rank, got });
    Box::new(Failed { error, is_own: true })
}

/// A rank's own mailbox, and the slots of all.
struct Mailbox {
    rank: usize,
    arrived: Receiver<(usize, Message)>,
    slots: Vec<Sender<(usize, Message)>>,
}

fn mailboxes(size: usize) -> Vec<Mailbox> {
    let (slots, arrived): (Vec<_>, Vec<_>) = (0..size).map(|_| channel()).unzip();
    let mailbox = |(rank, arrived)| Mailbox { rank, arrived, slots: slots.clone() };
    arrived.into_iter().enumerate().map(mailbox).collect()
}

impl Transport for Mailbox {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.slots.len()
    }

    fn send(&mut self, messages: Vec<(usize, Message)>) {
        for (to, message) in messages {
            // A rank that is gone has said so.
            let _ = self.slots[to].send((self.rank, message));
        }
    }

    fn receive(&mut self, patience: Duration) -> Option<(usize, Message)> {
        self.arrived.recv_timeout(patience).ok()
    }

    fn close(&mut self, _ended: &[bool]) {}
}

/// Also a rank that never started sends a last message.
impl Drop for Mailbox {
    fn drop(&mut self) {
        let head = || Head { kind: Kind::End, step: 0, call: String::new(), tensors: Vec::new() };
        let others = (0..self.size()).filter(|to| *to != self.rank);
        let messages = others.map(|to| (to, Message { head: head(), body: Parcel::default().body })).collect();
        self.send(messages);
    }
}
