//! Attention on the CPU: the work is cut into tasks by the shape alone, so that every number is the same for any number
//! of threads.

mod backward;
mod backward_sums;
mod careful;
mod chains;
mod decode;
mod decode_micro;
mod dropout;
mod element;
mod forward;
mod gradients;
mod micro;
mod pairs;
mod panels;
mod problem;
mod products;
mod real;
mod scores;
mod scratch;
mod softmax;
mod transpose;

use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use pulp::Arch;
use rayon::prelude::*;

use super::room;

use backward::Backward;
use chains::Chains;
use decode::{Decode, FEWEST_KEYS, MOST_QUERIES, Partial, merge};
pub(crate) use element::Element;
use forward::{Forward, QUERIES};
use gradients::{BiasGradient, Gradients, QueryRow};
pub(crate) use problem::{Bias, Dropout, Problem, View};
pub(crate) use real::Real;

/// Below this many multiplications a second thread costs more to wake than it saves: about 10 µs of work.
const SERIAL_BELOW: usize = 500_000;

/// Decoding tasks to aim for, where heads are few, and the fewest keys that are worth a task of their own.
const DECODE_TASKS: usize = 32;
const KEYS_PER_DECODE_TASK: usize = 512;

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

/// What the forward pass gives back.
pub(crate) struct Output<E: Element> {
    /// Heads and places as far apart as asked for.
    pub(crate) context: Vec<E>,
    /// (batch, num_heads, q_len)
    pub(crate) logsumexp: Vec<E::Real>,
}

/// Context and log-sum-exp.
pub(crate) fn forward<E: Element>(
    problem: &Problem<E>,
    (by_head, by_place): Strides,
) -> candle_core::Result<Output<E>> {
    let shape = problem.shape();
    let dv = problem.value_dim();
    let rows = shape.batch * shape.num_heads * shape.q_len;
    let mut context: Vec<E> = room("context", rows * dv)?;
    let mut logsumexp: Vec<E::Real> = room("log-sum-exp", rows)?;
    let (to_context, to_logsumexp) = (Shared(context.as_mut_ptr()), Shared(logsumexp.as_mut_ptr()));
    if shape.q_len <= MOST_QUERIES && shape.kv_len >= FEWEST_KEYS {
        decode(problem, &to_context, (by_head, by_place), &to_logsumexp);
    } else {
        attend(problem, &to_context, (by_head, by_place), &to_logsumexp);
    }
    // SAFETY: the tasks cover all queries of all heads, and each has written all of its rows.
    unsafe {
        context.set_len(rows * dv);
        logsumexp.set_len(rows);
    }
    Ok(Output { context, logsumexp })
}

/// Writes context and log-sum-exp of many queries, some of one head by a task.
fn attend<E: Element>(
    problem: &Problem<E>,
    to_context: &Shared<E>,
    (by_head, by_place): Strides,
    to_logsumexp: &Shared<E::Real>,
) {
    let shape = problem.shape();
    let blocks = shape.q_len.div_ceil(QUERIES);
    run_tasks(problem.work(), shape.batch * shape.num_heads * blocks, |task| {
        let (head, start) = (task / blocks, task % blocks * QUERIES);
        let at = (head / shape.num_heads, head % shape.num_heads);
        // SAFETY: row `start` of this head exists.
        let (context, logsumexp) = unsafe {
            let sequence = at.0 * shape.num_heads * shape.q_len * problem.value_dim();
            let context = to_context.at(sequence + at.1 * by_head + start * by_place);
            (context, to_logsumexp.at(head * shape.q_len + start))
        };
        let queries = start..(start + QUERIES).min(shape.q_len);
        arch().dispatch(Forward { problem, at, queries, context, context_stride: by_place, logsumexp });
    });
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

/// What the backward pass needs of the forward pass.
pub(crate) struct Saved<'a, E: Element> {
    pub(crate) context: View<'a, E>,
    /// (batch, num_heads, q_len)
    pub(crate) logsumexp: &'a [E::Real],
}

/// The gradients of what the forward pass gave.
pub(crate) struct Incoming<'a, E: Element> {
    pub(crate) context: View<'a, E>,
    pub(crate) logsumexp: Option<&'a [E::Real]>,
}

/// What the backward pass gives back: q, k and v with their strides as asked for, and the bias if wanted.
pub(crate) struct Grads<E: Element> {
    pub(crate) q: Vec<E>,
    pub(crate) k: Vec<E>,
    pub(crate) v: Vec<E>,
    pub(crate) bias: Option<Vec<E::Real>>,
}

/// `bias_dims`: the four axes of a bias whose gradient is wanted. `strides` says how heads, len and dim are to be laid out.
pub(crate) fn backward<E: Element>(
    problem: &Problem<E>,
    saved: Saved<E>,
    incoming: Incoming<E>,
    bias_dims: Option<[usize; 4]>,
    strides: impl Fn(usize, usize, usize) -> Strides,
) -> candle_core::Result<Grads<E>> {
    let rows = query_rows(problem, &saved, &incoming);
    let pass = |with_care| backward_pass(problem, &rows, incoming.context, bias_dims, &strides, with_care);
    let (grads, is_finite) = pass(false)?;
    if is_finite || problem.mask.is_full() {
        return Ok(grads);
    }
    // Perhaps it was infinity times a zero of what the mask hides.
    Ok(pass(true)?.0)
}

/// The gradients, and whether all of them are finite.
fn backward_pass<E: Element>(
    problem: &Problem<E>,
    rows: &[QueryRow<E::Real>],
    grad_context: View<E>,
    bias_dims: Option<[usize; 4]>,
    strides: impl Fn(usize, usize, usize) -> Strides,
    with_care: bool,
) -> candle_core::Result<(Grads<E>, bool)> {
    let shape = problem.shape();
    let (kv_heads, d, dv) = (problem.kv_heads(), problem.dim(), problem.value_dim());
    let chains = Chains::new(shape.batch, kv_heads, bias_dims);
    let splits = chains.splits(shape.kv_len);
    let keys_per_split = shape.kv_len.div_ceil(splits);

    let q_size = shape.batch * shape.num_heads * shape.q_len * d;
    let kv_rows = shape.batch * kv_heads * shape.kv_len;
    let (q_strides, k_strides) = (strides(shape.num_heads, shape.q_len, d), strides(kv_heads, shape.kv_len, d));
    let v_strides = strides(kv_heads, shape.kv_len, dv);
    let mut grad_q: Vec<E::Real> = room("gradient of the query", splits * q_size)?;
    let mut grad_k: Vec<E> = room("gradient of the key", kv_rows * d)?;
    let mut grad_v: Vec<E> = room("gradient of the value", kv_rows * dv)?;
    let bias_size = bias_dims.map_or(0, |dims| dims.iter().product());
    let mut grad_bias: Vec<E::Real> = room("gradient of the bias", chains.side_by_side * bias_size)?;
    grad_bias.resize(chains.side_by_side * bias_size, E::Real::ZERO);
    let (q, k, v) = (Shared(grad_q.as_mut_ptr()), Shared(grad_k.as_mut_ptr()), Shared(grad_v.as_mut_ptr()));
    let bias = Shared(grad_bias.as_mut_ptr());
    let is_strange = AtomicBool::new(false);
    run_tasks(problem.work(), chains.count() * splits, |task| {
        let (chain, split) = (task / splits, task % splits);
        let start = (split * keys_per_split).min(shape.kv_len);
        let keys = start..(start + keys_per_split).min(shape.kv_len);
        for (sequence, kv_head) in chains.members(chain) {
            // SAFETY: the sequence, head, share and chain of this task exist.
            let gradients = unsafe {
                Gradients {
                    q: q.at(split * q_size + sequence * shape.num_heads * shape.q_len * d),
                    q_strides,
                    k: k.at(sequence * kv_heads * shape.kv_len * d + kv_head * k_strides.0),
                    k_by_place: k_strides.1,
                    v: v.at(sequence * kv_heads * shape.kv_len * dv + kv_head * v_strides.0),
                    v_by_place: v_strides.1,
                    bias: bias_dims.map(|dims| BiasGradient::new(bias.at(chains.side(chain) * bias_size), dims)),
                }
            };
            let (keys, is_strange) = (keys.clone(), &is_strange);
            arch().dispatch(Backward {
                problem,
                grad_context,
                rows,
                sequence,
                kv_head,
                keys,
                with_care,
                gradients,
                is_strange,
            });
        }
    });
    // SAFETY: the tasks cover all keys of all heads, and for each share of the keys all queries, and each has written
    // all of its rows.
    unsafe {
        grad_q.set_len(splits * q_size);
        grad_k.set_len(kv_rows * d);
        grad_v.set_len(kv_rows * dv);
    }
    let grad_q = sum_of_parts(grad_q, q_size);
    let bias = bias_dims.map(|_| sum_of_parts(grad_bias, bias_size));
    let is_finite = !is_strange.load(Ordering::Relaxed);
    Ok((Grads { q: E::from_real(grad_q), k: grad_k, v: grad_v, bias }, is_finite))
}

/// Parts of the same size, one behind the other, added up in their order.
fn sum_of_parts<R: Real>(mut parts: Vec<R>, size: usize) -> Vec<R> {
    let (first, others) = parts.split_at_mut(size);
    for other in others.chunks_exact(size.max(1)) {
        first.iter_mut().zip(other).for_each(|(sum, x)| *sum += *x);
    }
    parts.truncate(size);
    parts
}

/// What each query brings to the backward pass.
fn query_rows<E: Element>(problem: &Problem<E>, saved: &Saved<E>, incoming: &Incoming<E>) -> Vec<QueryRow<E::Real>> {
    let shape = problem.shape();
    let row = |place: usize| {
        let (head, i) = (place / shape.q_len, place % shape.q_len);
        let (b, h) = (head / shape.num_heads, head % shape.num_heads);
        let mut delta = E::Real::ZERO;
        for (o, grad) in saved.context.row(b, h, i).iter().zip(incoming.context.row(b, h, i)) {
            delta += o.widen() * grad.widen();
        }
        if let Some(grads) = incoming.logsumexp {
            delta -= grads[place];
        }
        let logsumexp = saved.logsumexp[place];
        let logsumexp = if logsumexp == -E::Real::INFINITY { E::Real::INFINITY } else { logsumexp };
        QueryRow { logsumexp, delta }
    };
    (0..saved.logsumexp.len()).into_par_iter().with_min_len(256).map(row).collect()
}
