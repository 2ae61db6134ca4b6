//! A thread that runs the calls of a rank in their order, while the rank computes.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use crate::error::{AttentionError, Result};

/// A call, with what the thread has.
pub(super) type Call<S> = Box<dyn FnOnce(&mut S) + Send>;

/// The thread, and the queue to it.
pub(super) struct Calls<S> {
    rank: usize,
    /// `None` after the end.
    queue: Mutex<Option<Sender<Call<S>>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl<S: 'static> Calls<S> {
    /// Starts the thread, in which `make` makes what the calls work on, together with the rank, and `run` takes calls from the queue
    /// until there can be no more.
    pub(super) fn start<M: Send + 'static>(
        make: impl FnOnce() -> Result<(S, M)> + Send + 'static,
        run: impl FnOnce(&mut S, &Receiver<Call<S>>) + Send + 'static,
        rank: impl FnOnce(&M) -> usize,
    ) -> Result<(Self, M)> {
        let (queue, calls) = channel();
        let (made, wait) = channel();
        let body = move || match make() {
            Ok((mut state, about)) => {
                // Whoever starts the thread waits for this.
                let _ = made.send(Ok(about));
                run(&mut state, &calls);
            }
            Err(error) => drop(made.send(Err(error))),
        };
        // What fails here is this rank, which may not know its number yet.
        let failed = |got: &str| candle_core::Error::msg(format!("thread for communication: {got}"));
        let thread = Builder::new().name("communication".to_string()).spawn(body);
        let thread = thread.map_err(|error| failed(&error.to_string()))?;
        let about = wait.recv().map_err(|_| failed("a panic at its start"))??;
        let (queue, thread) = (Mutex::new(Some(queue)), Mutex::new(Some(thread)));
        Ok((Self { rank: rank(&about), queue, thread }, about))
    }

    /// Queues a call.
    pub(super) fn call<R: Send + 'static>(&self, call: impl FnOnce(&mut S) -> Result<R> + Send + 'static) -> Answer<R> {
        let (answer, answered) = channel();
        // Nobody may wait for the answer: then it is dropped.
        let call: Call<S> = Box::new(move |state| drop(answer.send(call(state))));
        if let Some(queue) = &*lock(&self.queue) {
            // If the thread is gone the answer says so.
            let _ = queue.send(call);
        }
        Answer { rank: self.rank, answered }
    }

    /// Waits for the end of all calls, and of the thread.
    pub(super) fn finish(&self) {
        drop(lock(&self.queue).take());
        if let Some(thread) = lock(&self.thread).take() {
            // A panic there was the answer to the calls that it ended.
            let _ = thread.join();
        }
    }
}

/// A lock that a panic elsewhere doesn't take away.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a call will return.
pub(super) struct Answer<R> {
    rank: usize,
    answered: Receiver<Result<R>>,
}

impl<R> Answer<R> {
    pub(super) fn wait(self) -> Result<R> {
        self.answered.recv().unwrap_or_else(|_| {
            let (what, got) = ("call of the communicator".to_string(), "its work has ended".to_string());
            Err(AttentionError::Communication { what, rank: self.rank, got }.into())
        })
    }
}
