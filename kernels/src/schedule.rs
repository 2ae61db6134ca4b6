//! How the work of attention is cut into tasks: by the shape alone, so that every number is the same for any number of threads. And
//! how tasks run.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::Error;
use crate::matrix::Shared;

/// Below this many multiplications a second thread costs more to wake than it saves: about 10 µs of work. (Less for
/// miri, so that a small test goes to several threads.)
const SERIAL_BELOW: usize = if cfg!(miri) { 20_000 } else { 500_000 };

/// Tasks of the backward pass to aim for, where heads are few, and the fewest keys that are worth a task of their own.
const BACKWARD_TASKS: usize = 8;
const KEYS_PER_BACKWARD_TASK: usize = 384;

/// The same for decoding.
pub(crate) const DECODE_TASKS: usize = 32;
const KEYS_PER_DECODE_TASK: usize = 512;

/// Runs tasks 0 to `tasks`, in parallel if there is enough `work` (multiplications). The error of any task that fails is the
/// result; some of the others may not have run then.
pub(crate) fn run_tasks(
    work: usize,
    tasks: usize,
    task: impl Fn(usize) -> Result<(), Error> + Send + Sync,
) -> Result<(), Error> {
    in_parallel(work / SERIAL_BELOW + 1, tasks, task)
}

/// Calls `f` with the number of each chunk of `size` elements and the chunk, in parallel.
pub(crate) fn for_each_chunk<T: Send>(data: &mut [T], size: usize, f: impl Fn(usize, &mut [T]) + Send + Sync) {
    let len = data.len();
    let shared = Shared::new(data);
    let max_threads = if cfg!(miri) { 1 } else { usize::MAX };
    let done = in_parallel(max_threads, len.div_ceil(size), |chunk| {
        let first = chunk * size;
        let count = size.min(len - first);
        // SAFETY: chunks don't overlap, and each is given to one thread.
        f(chunk, unsafe { shared.rows(first, 1, count, count) }.into_row(0));
        Ok::<(), Infallible>(())
    });
    let Ok(()) = done;
}

/// Runs tasks 0 to `tasks` on at most `max_threads` threads: each takes the next task when it has done one. The calling thread is one
/// of them: to hand all tasks to other threads and wait takes 20 to 45 µs (on Zen 3), longer than many operations do.
///
/// Under miri the second thread is one of the standard library, as rayon's queues break Stacked Borrows.
fn in_parallel<E: Send>(
    max_threads: usize,
    tasks: usize,
    task: impl Fn(usize) -> Result<(), E> + Send + Sync,
) -> Result<(), E> {
    if max_threads <= 1 || tasks <= 1 {
        return (0..tasks).try_for_each(task);
    }
    // Relaxed: the counter orders no memory accesses, so it hides no race between two tasks from miri.
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                break;
            }
            if let Err(error) = task(index) {
                next.store(tasks, Ordering::Relaxed);
                *failed.lock().expect("no thread panics while it writes an error") = Some(error);
            }
        }
    };
    #[cfg(miri)]
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
    #[cfg(not(miri))]
    match max_threads.min(tasks).min(rayon::current_num_threads()) {
        1 => work(),
        threads => rayon::in_place_scope(|scope| on_threads(scope, threads, &work)),
    }
    failed.into_inner().expect("no thread panics while it writes an error").map_or(Ok(()), Err)
}

/// Runs `work` on `threads` threads, this one included. Half of them are woken by the first thread that is woken, and so on, so that
/// this one wakes only a few before it works.
#[cfg(not(miri))]
fn on_threads<'scope>(scope: &rayon::Scope<'scope>, mut threads: usize, work: &'scope (impl Fn() + Sync)) {
    while threads > 1 {
        let half = threads / 2;
        scope.spawn(move |scope| on_threads(scope, half, work));
        threads -= half;
    }
    work();
}

/// Keys cut into `count` splits of equal length, but for the last ones.
#[derive(Clone, Copy)]
pub(crate) struct Splits {
    kv_len: usize,
    pub(crate) count: usize,
    keys_per_split: usize,
}

impl Splits {
    fn new(kv_len: usize, count: usize) -> Self {
        Self { kv_len, count, keys_per_split: kv_len.div_ceil(count) }
    }

    /// The splits of decoding for `heads` key heads of all sequences: at most [`DECODE_TASKS`].
    pub(crate) fn of_decode(kv_len: usize, heads: usize) -> Self {
        Self::new(kv_len, DECODE_TASKS.div_ceil(heads).min(kv_len.div_ceil(KEYS_PER_DECODE_TASK)).max(1))
    }

    /// The keys of a split.
    pub(crate) fn keys(&self, split: usize) -> Range<usize> {
        let start = (split * self.keys_per_split).min(self.kv_len);
        start..(start + self.keys_per_split).min(self.kv_len)
    }
}

/// The heads of the backward pass, cut into groups whose gradients of a bias are added up in one matrix.
///
/// The gradient of a bias that heads or sequences share is a sum over them, and a sum has an order: the heads of an
/// *accumulation group* are computed one after the other. Few groups would leave threads idle, so there are several for
/// one part of the bias, each with a matrix of its own, a *copy*; the copies are added up at the end.
pub(crate) struct AccumulationGroups {
    batch: usize,
    kv_heads: usize,
    /// Whether each sequence, and each head, has a bias of its own.
    own: (bool, bool),
    /// Parts of the bias that are sums of their own.
    parts: usize,
    /// Matrices of the bias's size.
    pub(crate) copies: usize,
    by_key: bool,
}

impl AccumulationGroups {
    /// `bias_dims`: the four axes of a bias whose gradient is wanted; an axis of length 1 is shared.
    pub(crate) fn new(batch: usize, kv_heads: usize, bias_dims: Option<[usize; 4]>) -> Self {
        let own = bias_dims.map_or((true, true), |dims| (dims[0] == batch, dims[1] != 1 || kv_heads == 1));
        let parts = if own.0 { batch } else { 1 } * if own.1 { kv_heads } else { 1 };
        let copies = (batch * kv_heads / parts).min(BACKWARD_TASKS.div_ceil(parts));
        Self { batch, kv_heads, own, parts, copies, by_key: bias_dims.is_none_or(|dims| dims[3] != 1) }
    }

    pub(crate) fn count(&self) -> usize {
        self.parts * self.copies
    }

    /// The splits of the keys of each group: only one if all keys share an element of the bias.
    pub(crate) fn splits(&self, kv_len: usize) -> Splits {
        let worthwhile = BACKWARD_TASKS.div_ceil(self.count()).min(kv_len.div_ceil(KEYS_PER_BACKWARD_TASK)).max(1);
        Splits::new(kv_len, if self.by_key { worthwhile } else { 1 })
    }

    /// The copy of the bias's gradient that a group adds to.
    pub(crate) fn copy(&self, group: usize) -> usize {
        group % self.copies
    }

    /// Sequence and key head of each of a group's members, in their order.
    pub(crate) fn members(&self, group: usize) -> impl Iterator<Item = (usize, usize)> {
        let part = group / self.copies;
        let (batch, kv_heads, own) = (self.batch, self.kv_heads, self.own);
        let member = move |m: usize| match own {
            (true, true) => (part / kv_heads, part % kv_heads),
            (true, false) => (part, m),
            (false, true) => (m, part),
            (false, false) => (m / kv_heads, m % kv_heads),
        };
        (self.copy(group)..batch * kv_heads / self.parts).step_by(self.copies).map(member)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "no unsafe code, many cases")]
    fn accumulation_groups_cover_every_head_once() {
        for (batch, kv_heads) in [(1, 1), (1, 8), (3, 1), (3, 4), (16, 2), (1, 100)] {
            for bias_dims in
                [None, Some([1, 1, 5, 5]), Some([batch, 1, 5, 5]), Some([1, 9, 5, 1]), Some([batch, 9, 1, 5])]
            {
                let groups = AccumulationGroups::new(batch, kv_heads, bias_dims);
                let mut all: Vec<_> = (0..groups.count()).flat_map(|group| groups.members(group)).collect();
                all.sort();
                let expected: Vec<_> = (0..batch).flat_map(|b| (0..kv_heads).map(move |h| (b, h))).collect();
                assert_eq!(all, expected, "{batch} {kv_heads} {bias_dims:?}");
            }
        }
    }

    /// Two groups that run at the same time never add to the same element of the bias's gradient.
    #[test]
    #[cfg_attr(miri, ignore = "no unsafe code, many cases")]
    fn groups_that_share_a_copy_have_other_parts_of_the_bias() {
        for (batch, kv_heads) in [(1, 1), (1, 8), (3, 1), (3, 4), (16, 2)] {
            for dims in [[1, 1, 5, 5], [batch, 1, 5, 5], [1, kv_heads * 2, 5, 1], [batch, kv_heads * 2, 1, 5]] {
                let groups = AccumulationGroups::new(batch, kv_heads, Some(dims));
                // Two query heads share a key head.
                let elements = |group: usize| {
                    let heads = groups.members(group).flat_map(|(b, h)| [(b, 2 * h), (b, 2 * h + 1)]);
                    let own = |axis: usize, index: usize| if dims[axis] == 1 { 0 } else { index };
                    heads.map(|(b, h)| (groups.copy(group), own(0, b), own(1, h))).collect::<Vec<_>>()
                };
                for one in 0..groups.count() {
                    for other in 0..one {
                        let (a, b) = (elements(one), elements(other));
                        assert!(a.iter().all(|x| !b.contains(x)), "{batch} {kv_heads} {dims:?}: {one} and {other}");
                    }
                }
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "no unsafe code, many cases")]
    fn splits_cover_every_key_once() {
        for kv_len in [1, 2, 383, 385, 512, 1025, 4096, 5000] {
            for splits in [1, 3, 8].map(|heads| Splits::of_decode(kv_len, heads)) {
                assert!(splits.count <= DECODE_TASKS);
                let all: Vec<_> = (0..splits.count).flat_map(|split| splits.keys(split)).collect();
                assert!(all.iter().copied().eq(0..kv_len));
            }
            let splits = AccumulationGroups::new(1, 1, None).splits(kv_len);
            let all: Vec<_> = (0..splits.count).flat_map(|split| splits.keys(split)).collect();
            assert!(all.iter().copied().eq(0..kv_len));
        }
    }

    /// Runs a test outside of rayon's pools and, but for miri, in pools of several sizes.
    fn everywhere(test: impl Fn() + Send + Sync) {
        test();
        for threads in if cfg!(miri) { [].as_slice() } else { &[1, 2, 5] } {
            rayon::ThreadPoolBuilder::new().num_threads(*threads).build().unwrap().install(&test);
        }
    }

    #[test]
    fn every_task_runs_once() {
        everywhere(|| {
            for work in [0, SERIAL_BELOW, 20 * SERIAL_BELOW] {
                let done = Mutex::new(vec![0; 9]);
                run_tasks(work, 9, |task| {
                    done.lock().unwrap()[task] += 1;
                    Ok(())
                })
                .unwrap();
                assert_eq!(done.into_inner().unwrap(), [1; 9]);
            }
        });
    }

    #[test]
    #[cfg_attr(miri, ignore = "rayon's queues break Stacked Borrows")]
    fn tasks_may_have_tasks() {
        everywhere(|| {
            let done = AtomicUsize::new(0);
            let inner = |_| {
                done.fetch_add(1, Ordering::Relaxed);
                Ok(())
            };
            run_tasks(20 * SERIAL_BELOW, 7, |_| run_tasks(20 * SERIAL_BELOW, 5, inner)).unwrap();
            assert_eq!(done.into_inner(), 35);
        });
    }

    #[test]
    #[cfg_attr(miri, ignore = "rayon's queues break Stacked Borrows")]
    fn panic_of_a_task_goes_on_when_the_others_are_done() {
        everywhere(|| {
            let done = AtomicUsize::new(0);
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                run_tasks(20 * SERIAL_BELOW, 9, |task| {
                    assert!(task != 8, "the last task panics");
                    done.fetch_add(1, Ordering::Relaxed);
                    Ok(())
                })
            }));
            assert!(result.is_err() && done.into_inner() == 8);
        });
    }

    #[test]
    fn error_of_a_task_is_the_result() {
        everywhere(|| {
            for work in [0, SERIAL_BELOW] {
                let error = Error::Memory { what: "test", bytes: 5 };
                let result = run_tasks(work, 9, |task| if task >= 7 { Err(error.clone()) } else { Ok(()) });
                assert_eq!(result, Err(error));
            }
        });
    }

    #[test]
    fn chunks_cover_the_slice() {
        let mut data = [0; 10];
        for_each_chunk(&mut data, 4, |chunk, data| data.fill(chunk));
        assert_eq!(data, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]);
    }
}
