//! Attention on the CPU: the work is cut into tasks by the shape alone, so that every number is the same for any number
//! of threads.

mod backward;
mod decode;
mod dropout;
mod element;
mod forward;
mod micro;
mod panels;
mod problem;
mod real;
mod scores;
mod scratch;
mod softmax;
mod transpose;

use std::mem::MaybeUninit;
use std::sync::OnceLock;

use pulp::Arch;
use rayon::prelude::*;

use backward::{Backward, Gradients, QueryRow};
use decode::{Decode, MOST_QUERIES, Partial, merge};
pub(crate) use element::Element;
use forward::{Forward, QUERIES};
pub(crate) use problem::{Bias, Dropout, Problem, View};
pub(crate) use real::Real;

/// Below this many multiplications a second thread costs more to wake than it saves: about 10 µs of work.
const SERIAL_BELOW: usize = 500_000;

/// Decoding tasks to aim for, where heads are few, and the fewest keys that are worth a task of their own.
const DECODE_TASKS: usize = 32;
const KEYS_PER_DECODE_TASK: usize = 512;

/// Backward tasks to aim for, where heads are few, and the fewest keys that are worth a task of their own.
const BACKWARD_TASKS: usize = 8;
const KEYS_PER_TASK: usize = 384;

/// The instruction set: the best that this processor has, unless the environment variable `CANDLE_ATTENTION_SIMD` asks for
/// less, `scalar` or (on x86-64, where the processor has it) `avx2`.
fn arch() -> Arch {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    *ARCH.get_or_init(|| match std::env::var("CANDLE_ATTENTION_SIMD") {
        Ok(name) if name == "scalar" => Arch::Scalar,
        #[cfg(target_arch = "x86_64")]
        Ok(name) if name == "avx2" => pulp::x86::V3::try_new().map_or(Arch::new(), Arch::V3),
        _ => Arch::new(),
    })
}

/// A place that several tasks write to, each its own part.
struct Shared<T>(*mut T);

// SAFETY: tasks write disjoint parts and nobody reads before all are done.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// # Safety
    ///
    /// `offset` lies inside what the pointer points to.
    unsafe fn at(&self, offset: usize) -> *mut T {
        // SAFETY: as the caller promises.
        unsafe { self.0.add(offset) }
    }
}

fn run_tasks(work: usize, tasks: usize, task: impl Fn(usize) + Send + Sync) {
    if work < SERIAL_BELOW || tasks == 1 {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().for_each(task);
    }
}

impl<E: Element> Problem<'_, E> {
    /// Multiplications of the forward pass, as far as the mask lets all through.
    fn work(&self) -> usize {
        let shape = self.shape();
        let scores = shape.batch * shape.num_heads * shape.q_len * shape.kv_len;
        scores.saturating_mul(self.dim() + self.value_dim())
    }
}

/// How far apart the heads of a sequence and the places of a head are, in a result.
type Strides = (usize, usize);

/// The context, heads and places as far apart as asked for, and the log-sum-exp (batch, num_heads, q_len).
pub(crate) fn forward<E: Element>(problem: &Problem<E>, (by_head, by_place): Strides) -> (Vec<E>, Vec<E::Real>) {
    let shape = problem.shape();
    let dv = problem.value_dim();
    let rows = shape.batch * shape.num_heads * shape.q_len;
    let mut context: Vec<E> = Vec::with_capacity(rows * dv);
    let mut logsumexp: Vec<E::Real> = Vec::with_capacity(rows);
    let (to_context, to_logsumexp) = (Shared(context.as_mut_ptr()), Shared(logsumexp.as_mut_ptr()));
    let blocks = shape.q_len.div_ceil(QUERIES);
    if shape.q_len <= MOST_QUERIES {
        decode(problem, &to_context, (by_head, by_place), &to_logsumexp);
        // SAFETY: each row has been written.
        unsafe {
            context.set_len(rows * dv);
            logsumexp.set_len(rows);
        }
        return (context, logsumexp);
    }
    run_tasks(problem.work(), shape.batch * shape.num_heads * blocks, |task| {
        let (head, start) = (task / blocks, task % blocks * QUERIES);
        let at = (head / shape.num_heads, head % shape.num_heads);
        // SAFETY: row `start` of this head exists.
        let (context, logsumexp) = unsafe {
            let sequence = at.0 * shape.num_heads * shape.q_len * dv;
            let context = to_context.at(sequence + at.1 * by_head + start * by_place);
            (context, to_logsumexp.at(head * shape.q_len + start))
        };
        arch().dispatch(Forward {
            problem,
            at,
            queries: start..(start + QUERIES).min(shape.q_len),
            context,
            context_stride: by_place,
            logsumexp,
        });
    });
    // SAFETY: the tasks cover all queries of all heads, and each has written all of its rows.
    unsafe {
        context.set_len(rows * dv);
        logsumexp.set_len(rows);
    }
    (context, logsumexp)
}

/// Writes context and log-sum-exp of a few queries: shares of the keys side by side, then each row from its shares in
/// their order.
fn decode<E: Element>(
    problem: &Problem<E>,
    to_context: &Shared<E>,
    (by_head, by_place): Strides,
    to_logsumexp: &Shared<E::Real>,
) {
    let shape = problem.shape();
    let (kv_heads, dv) = (problem.kv_heads(), problem.value_dim());
    let (heads, rows) = (shape.batch * kv_heads, problem.group() * shape.q_len);
    let splits = DECODE_TASKS.div_ceil(heads).min(shape.kv_len.div_ceil(KEYS_PER_DECODE_TASK)).max(1);
    let keys_per_split = shape.kv_len.div_ceil(splits);
    let size = Partial::<E::Real>::size(dv);
    let mut partials = vec![E::Real::ZERO; heads * splits * rows * size];
    let to_partials = Shared(partials.as_mut_ptr());
    run_tasks(problem.work(), heads * splits, |task| {
        let (head, split) = (task / splits, task % splits);
        let start = (split * keys_per_split).min(shape.kv_len);
        arch().dispatch(Decode {
            problem,
            sequence: head / kv_heads,
            kv_head: head % kv_heads,
            keys: start..(start + keys_per_split).min(shape.kv_len),
            // SAFETY: there are `rows` partial results for each task.
            partial: unsafe { to_partials.at(task * rows * size) },
        });
    });
    for (head, partials) in partials.chunks_exact(splits * rows * size).enumerate() {
        let (sequence, kv_head) = (head / kv_heads, head % kv_heads);
        for row in 0..rows {
            let (query_head, query) = (kv_head * problem.group() + row / shape.q_len, row % shape.q_len);
            let partials = partials.chunks_exact(size).skip(row).step_by(rows).map(Partial::of);
            let place = sequence * shape.num_heads * shape.q_len * dv + query_head * by_head + query * by_place;
            // SAFETY: the row exists, and nobody else writes here any more.
            unsafe {
                let context = std::slice::from_raw_parts_mut(to_context.at(place).cast::<MaybeUninit<E>>(), dv);
                let logsumexp = merge(partials, context);
                let head = sequence * shape.num_heads + query_head;
                to_logsumexp.at(head * shape.q_len + query).write(logsumexp);
            }
        }
    }
}

/// What the backward pass gives back: q, k and v with their strides as asked for, and the scores (batch, num_heads,
/// q_len, kv_len) if wanted.
pub(crate) struct Grads<E: Element> {
    pub(crate) q: Vec<E>,
    pub(crate) k: Vec<E>,
    pub(crate) v: Vec<E>,
    pub(crate) scores: Option<Vec<E::Real>>,
}

/// Gradients, given those of the context and (batch, num_heads, q_len) of the log-sum-exp. `strides` says how heads, len
/// and dim are to be laid out.
pub(crate) fn backward<E: Element>(
    problem: &Problem<E>,
    context: View<E>,
    logsumexp: &[E::Real],
    grad_context: View<E>,
    grad_logsumexp: Option<&[E::Real]>,
    want_scores: bool,
    strides: impl Fn(usize, usize, usize) -> Strides,
) -> Grads<E> {
    let shape = problem.shape();
    let (kv_heads, d, dv) = (problem.kv_heads(), problem.dim(), problem.value_dim());
    let rows = query_rows(problem, context, logsumexp, grad_context, grad_logsumexp);
    let splits = BACKWARD_TASKS.div_ceil(shape.batch * kv_heads).min(shape.kv_len.div_ceil(KEYS_PER_TASK)).max(1);
    let keys_per_split = shape.kv_len.div_ceil(splits);

    let q_size = shape.batch * shape.num_heads * shape.q_len * d;
    let kv_rows = shape.batch * kv_heads * shape.kv_len;
    let scores_of_sequence = shape.num_heads * shape.q_len * shape.kv_len;
    let (q_strides, k_strides) = (strides(shape.num_heads, shape.q_len, d), strides(kv_heads, shape.kv_len, d));
    let v_strides = strides(kv_heads, shape.kv_len, dv);
    let mut grad_q: Vec<E::Real> = Vec::with_capacity(splits * q_size);
    let mut grad_k: Vec<E> = Vec::with_capacity(kv_rows * d);
    let mut grad_v: Vec<E> = Vec::with_capacity(kv_rows * dv);
    let mut grad_scores = want_scores.then(|| vec![E::Real::ZERO; shape.batch * scores_of_sequence]);
    let (q, k, v) = (Shared(grad_q.as_mut_ptr()), Shared(grad_k.as_mut_ptr()), Shared(grad_v.as_mut_ptr()));
    let scores = grad_scores.as_mut().map(|scores| Shared(scores.as_mut_ptr()));
    run_tasks(problem.work(), shape.batch * kv_heads * splits, |task| {
        let (head, split) = (task / splits, task % splits);
        let (sequence, kv_head) = (head / kv_heads, head % kv_heads);
        let start = (split * keys_per_split).min(shape.kv_len);
        let keys = start..(start + keys_per_split).min(shape.kv_len);
        // SAFETY: the sequence, head and share of this task exist.
        let gradients = unsafe {
            Gradients {
                q: q.at(split * q_size + sequence * shape.num_heads * shape.q_len * d),
                q_strides,
                k: k.at(sequence * kv_heads * shape.kv_len * d + kv_head * k_strides.0),
                k_by_place: k_strides.1,
                v: v.at(sequence * kv_heads * shape.kv_len * dv + kv_head * v_strides.0),
                v_by_place: v_strides.1,
                scores: match &scores {
                    Some(scores) => scores.at(sequence * scores_of_sequence),
                    None => std::ptr::null_mut(),
                },
            }
        };
        arch().dispatch(Backward { problem, grad_context, rows: &rows, sequence, kv_head, keys, gradients });
    });
    // SAFETY: the tasks cover all keys of all heads, and for each share of the keys all queries, and each has written
    // all of its rows.
    unsafe {
        grad_q.set_len(splits * q_size);
        grad_k.set_len(kv_rows * d);
        grad_v.set_len(kv_rows * dv);
    }
    let (first, others) = grad_q.split_at_mut(q_size);
    for other in others.chunks_exact(q_size) {
        first.iter_mut().zip(other).for_each(|(sum, x)| *sum += *x);
    }
    grad_q.truncate(q_size);
    Grads { q: E::from_real(grad_q), k: grad_k, v: grad_v, scores: grad_scores }
}

/// What each query brings to the backward pass.
fn query_rows<E: Element>(
    problem: &Problem<E>,
    context: View<E>,
    logsumexp: &[E::Real],
    grad_context: View<E>,
    grad_logsumexp: Option<&[E::Real]>,
) -> Vec<QueryRow<E::Real>> {
    let shape = problem.shape();
    let row = |place: usize| {
        let (head, i) = (place / shape.q_len, place % shape.q_len);
        let (b, h) = (head / shape.num_heads, head % shape.num_heads);
        let mut delta = E::Real::ZERO;
        for (o, grad) in context.row(b, h, i).iter().zip(grad_context.row(b, h, i)) {
            delta += o.widen() * grad.widen();
        }
        if let Some(grads) = grad_logsumexp {
            delta -= grads[place];
        }
        let logsumexp = logsumexp[place];
        let logsumexp = if logsumexp == -E::Real::INFINITY { E::Real::INFINITY } else { logsumexp };
        QueryRow { logsumexp, delta }
    };
    (0..logsumexp.len()).into_par_iter().with_min_len(256).map(row).collect()
}
