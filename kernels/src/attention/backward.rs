//! The tasks of the backward pass.

use std::mem::MaybeUninit;
use std::sync::atomic::AtomicBool;

use super::{BackwardOptions, Gradients, Incoming, Saved};
use pulp::{Simd, WithSimd};

use crate::alloc::{filled, product, reserve};
use crate::careful::{Headroom, exponent_above, keep_finite, times_power_of_two};
use crate::dtype::{Number, Source};
use crate::error::Error;
use crate::layout::Layout;
use crate::matrix::Shared;
use crate::operands::Operands;
use crate::prefill::backward::Backward;
use crate::prefill::gradients::{BiasGradient, Gradients as TaskGradients, QueryGradient, QueryRow};
use crate::problem::{Problem, View};
use crate::schedule::{AccumulationGroups, Splits, for_each_chunk, run_tasks};
use crate::simd::{MAX_LANES, SimdFloat, as_vectors, instruction_set};
use crate::softmax::LogSumExp;
use crate::tiles::TileSizes;

/// Query rows of a parallel piece of work.
const ROWS_PER_CHUNK: usize = 256;

/// The gradients in `T`: the type of the tensors, or the one that is computed in.
pub(super) fn backward<E: Number, T: Number<Float = E::Float>>(
    problem: &Problem<E>,
    saved: Saved<E>,
    incoming: Incoming<E>,
    options: BackwardOptions,
) -> Result<Gradients<T>, Error> {
    check(problem, &saved, &incoming, options)?;
    let bias_dims = problem.options().bias.filter(|_| options.bias).map(|bias| bias.dims());
    let operands = problem.operands();
    let rows = query_rows(problem, &saved, &incoming, 0)?;
    let pass = Pass { operands: &operands, grad_context: &incoming.context, rows: &rows, bias_dims, careful: None };
    let (fast, is_finite) = pass.run::<T>(options.layout)?;
    if is_finite {
        return Ok(fast);
    }
    let headroom = headroom(problem, &saved, &incoming, bias_dims.is_some());
    let rows = query_rows(problem, &saved, &incoming, headroom.grads)?;
    let mut careful = Pass { rows: &rows, careful: Some(headroom), ..pass }.run::<T>(options.layout)?.0;
    for (fast, careful) in [(fast.q, &mut careful.q), (fast.k, &mut careful.k), (fast.v, &mut careful.v)] {
        keep_finite(&fast, careful, |x| x.widen().is_finite());
    }
    if let (Some(fast), Some(careful)) = (fast.bias, &mut careful.bias) {
        keep_finite(&fast, careful, SimdFloat::is_finite);
    }
    Ok(careful)
}

/// By how much the careful pass makes its numbers smaller. The bounds are those of sums of as many terms as there are, each as
/// large as the largest numbers make it; weights sum to 1.
fn headroom<E: Number>(problem: &Problem<E>, saved: &Saved<E>, incoming: &Incoming<E>, wants_bias: bool) -> Headroom {
    let [q, k, v] = problem.views().map(exponent_of);
    let (grad, scale) = (exponent_of(&incoming.context), exponent_above(problem.scale().abs()));
    let shape = problem.shape();
    let count = |count: usize| exponent_above(count as f64);
    let queries = count(shape.num_heads * shape.q_len);
    let all_queries = queries + if wants_bias { count(shape.batch) } else { 0 };
    let dropout = problem.options().dropout.map_or(0, |dropout| exponent_above(1.0 / (1.0 - dropout.p)));
    // One less than the largest exponent, for rounding.
    let largest = E::Float::MAX_EXPONENT - 1;
    // dp - δ, summed over queries by the gradient of a bias; and dv. The context in δ may be that of more keys than those of a part.
    let of_logsumexp = exponent_of_all(incoming.logsumexp.into_iter().flatten().copied());
    let values = (v + dropout).max(exponent_of(&saved.context));
    let scores = (grad + values + count(problem.v_dims()[3])).max(of_logsumexp) + 1;
    let grads = (scores + all_queries).max(grad + dropout + queries) - largest;
    let grads = grads.max(0);
    // dq, and dk.
    let scores = scores - grads + k.max(q + scale + queries) - largest;
    Headroom { grads, scores: scores.max(0) }
}

/// The exponent of a power of two that no finite number of a tensor is above.
fn exponent_of<E: Number>(view: &View<E>) -> i32 {
    let [batch, heads, len, _] = view.dims();
    let rows = (0..batch * heads * len).map(|row| (row / (heads * len), row / len % heads, row % len));
    exponent_of_all(rows.flat_map(|(b, h, i)| view.row(b, h, i)).map(|x| x.widen()))
}

fn exponent_of_all<R: SimdFloat>(numbers: impl Iterator<Item = R>) -> i32 {
    let finite = numbers.map(|x| x.to_f64().abs()).filter(|x| x.is_finite());
    exponent_above(finite.fold(0.0, f64::max))
}

fn check<E: Number>(
    problem: &Problem<E>,
    saved: &Saved<E>,
    incoming: &Incoming<E>,
    options: BackwardOptions,
) -> Result<(), Error> {
    let dims = problem.context_dims();
    for (what, view) in [("context", &saved.context), ("gradient of the context", &incoming.context)] {
        if view.dims() != dims {
            return Err(Error::Dims { what, expected: format!("the context's dims {dims:?}"), got: view.dims() });
        }
    }
    let rows = dims[0] * dims[1] * dims[2];
    let lengths = [
        ("log-sum-exp", Some(saved.logsumexp.len())),
        ("gradient of the log-sum-exp", incoming.logsumexp.map(<[_]>::len)),
    ];
    for (what, len) in lengths {
        if let Some(got) = len.filter(|&len| len != rows) {
            return Err(Error::Length { what, expected: format!("one for each of {rows} queries"), got });
        }
    }
    let got = match problem.options() {
        options if options.bias.is_none() => "none",
        options if options.part.is_some() => "a part of one",
        _ => return Ok(()),
    };
    if options.bias {
        let (what, expected) = ("gradient of the bias", "a whole problem with a bias");
        return Err(Error::Option { what, expected, got: got.to_owned() });
    }
    Ok(())
}

/// What each query brings to the backward pass, whose gradients are divided by 2^exponent.
fn query_rows<E: Number>(
    problem: &Problem<E>,
    saved: &Saved<E>,
    incoming: &Incoming<E>,
    exponent: i32,
) -> Result<Vec<QueryRow<E::Float>>, Error> {
    let shape = problem.shape();
    let of_grads = times_power_of_two(E::Float::ONE, -exponent);
    let row = |index: usize| {
        let (head, i) = (index / shape.q_len, index % shape.q_len);
        let (b, h) = (head / shape.num_heads, head % shape.num_heads);
        let (context, grad) = (saved.context.row(b, h, i), incoming.context.row(b, h, i));
        let mut delta = instruction_set().dispatch(DotProduct { context, grad, factor: of_grads });
        if let Some(grads) = incoming.logsumexp {
            delta -= grads[index] * of_grads;
        }
        let LogSumExp { largest, factor, log_total } = saved.logsumexp[index];
        let largest = if largest == -E::Float::INFINITY { E::Float::INFINITY } else { largest };
        QueryRow { largest, factor, log_total, delta }
    };
    let count = saved.logsumexp.len();
    let mut rows = reserve("sums of the queries", count)?;
    for_each_chunk(&mut rows.spare_capacity_mut()[..count], ROWS_PER_CHUNK, |chunk, rows| {
        for (i, to) in rows.iter_mut().enumerate() {
            to.write(row(chunk * ROWS_PER_CHUNK + i));
        }
    });
    // SAFETY: the chunks are all rows, and each of them has been written.
    unsafe { rows.set_len(count) };
    Ok(rows)
}

/// Σ o · (do · factor) for a row.
struct DotProduct<'a, E: Number> {
    context: &'a [E],
    grad: &'a [E],
    factor: E::Float,
}

impl<E: Number> WithSimd for DotProduct<'_, E> {
    type Output = E::Float;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> E::Float {
        /// Numbers that are widened at a time: whole vectors of any instruction set.
        const BLOCK: usize = 4 * MAX_LANES;
        let factor = E::Float::splat(simd, self.factor);
        let mut sum = E::Float::splat(simd, E::Float::ZERO);
        for (context, grad) in self.context.chunks(BLOCK).zip(self.grad.chunks(BLOCK)) {
            let mut wide = [[E::Float::ZERO; BLOCK]; 2];
            E::widen_all(context, &mut wide[0]);
            E::widen_all(grad, &mut wide[1]);
            let [context, grad] = [&wide[0], &wide[1]].map(|wide| as_vectors::<E::Float, S>(wide));
            for (o, grad) in context.iter().zip(grad) {
                sum = E::Float::mul_add(simd, *o, E::Float::vmul(simd, *grad, factor), sum);
            }
        }
        E::Float::reduce_add(simd, sum)
    }
}

/// One pass over all tasks.
struct Pass<'a, R> {
    operands: &'a Operands<'a, R>,
    grad_context: &'a dyn Source<R>,
    rows: &'a [QueryRow<R>],
    /// The bias's dims, if its gradient is wanted.
    bias_dims: Option<[usize; 4]>,
    careful: Option<Headroom>,
}

/// The results, while tasks write them.
struct Results<'a, E: Number> {
    /// The gradient of the query, once for each split.
    q: Shared<'a, MaybeUninit<E::Float>>,
    k: Shared<'a, MaybeUninit<E>>,
    v: Shared<'a, MaybeUninit<E>>,
    /// The gradient of the bias, once for each copy.
    bias: Shared<'a, E::Float>,
    is_not_finite: AtomicBool,
}

impl<R: SimdFloat> Pass<'_, R> {
    /// The gradients, and whether all of them are finite.
    fn run<E: Number<Float = R>>(&self, layout: Layout) -> Result<(Gradients<E>, bool), Error> {
        let operands = self.operands;
        let groups = AccumulationGroups::new(operands.shape.batch, operands.kv_heads, self.bias_dims);
        let splits = groups.splits(operands.shape.kv_len);
        let [q_size, k_size, v_size] = [operands.q, operands.k, operands.v].map(|x| x.dims().iter().product::<usize>());
        let bias_size = self.bias_dims.map_or(Ok(0), |dims| product("gradient of the bias", &dims))?;
        let bias_copies = product("gradient of the bias", &[groups.copies, bias_size])?;

        let mut q: Vec<R> = reserve("gradient of the query", splits.count * q_size)?;
        let mut k: Vec<E> = reserve("gradient of the key", k_size)?;
        let mut v: Vec<E> = reserve("gradient of the value", v_size)?;
        let mut bias = filled("gradient of the bias", bias_copies, R::ZERO)?;
        let results = Results {
            q: Shared::new(&mut q.spare_capacity_mut()[..splits.count * q_size]),
            k: Shared::new(&mut k.spare_capacity_mut()[..k_size]),
            v: Shared::new(&mut v.spare_capacity_mut()[..v_size]),
            bias: Shared::new(&mut bias),
            is_not_finite: AtomicBool::new(false),
        };
        run_tasks(operands.work(), groups.count() * splits.count, |task| {
            self.task::<E>(&groups, &splits, task, layout, &results)
        })?;
        let is_finite = !results.is_not_finite.into_inner();
        // SAFETY: every task has succeeded. Together they have all keys of all heads, and for each split all queries, and each
        // writes all of its rows.
        unsafe {
            q.set_len(splits.count * q_size);
            k.set_len(k_size);
            v.set_len(v_size);
        }
        let (mut q, mut bias) = (sum_of_parts(q, q_size), self.bias_dims.map(|_| sum_of_parts(bias, bias_size)));
        if let Some(headroom) = self.careful {
            q.iter_mut().for_each(|x| *x = times_power_of_two(*x, headroom.grads + headroom.scores));
            bias.iter_mut().flatten().for_each(|x| *x = times_power_of_two(*x, headroom.grads));
        }
        let q = E::from_floats("gradient of the query", q)?;
        Ok((Gradients { q, k, v, bias }, is_finite))
    }

    /// Split `task % splits.count` of the keys of each head of group `task / splits.count`.
    fn task<E: Number<Float = R>>(
        &self,
        groups: &AccumulationGroups,
        splits: &Splits,
        task: usize,
        layout: Layout,
        results: &Results<E>,
    ) -> Result<(), Error> {
        let operands = self.operands;
        let tiles = TileSizes::new(operands.is_by_tile_registers());
        let (group, split) = (task / splits.count, task % splits.count);
        let keys = splits.keys(split);
        let [q_dims, k_dims, v_dims] = [operands.q, operands.k, operands.v].map(|x| x.dims());
        let [q, k, v] = [q_dims, k_dims, v_dims].map(|dims| layout.strides(dims));
        let first_q = split * q_dims.iter().product::<usize>();
        let first_bias = groups.copy(group) * self.bias_dims.map_or(0, |dims| dims.iter().product());
        for (sequence, kv_head) in groups.members(group) {
            let heads = kv_head * operands.group..(kv_head + 1) * operands.group;
            let row_of = |[sb, sh, si]: [usize; 3]| sequence * sb + kv_head * sh + keys.start * si;
            // SAFETY: another task has another group or another split. Another group has other heads, and another copy of the
            // bias's gradient or another part of it. Another split has other keys, and another copy of the query's gradient;
            // there are no splits if all keys share an element of the bias.
            let (q_gradient, mut k_rows, mut v_rows, bias) = unsafe {
                let start = first_q + sequence * q[0];
                (
                    QueryGradient::new(&results.q, start, heads, (q_dims[2], q_dims[3]), (q[1], q[2])),
                    results.k.rows(row_of(k), keys.len(), k_dims[3], k[2]),
                    results.v.rows(row_of(v), keys.len(), v_dims[3], v[2]),
                    self.bias_dims.map(|dims| BiasGradient::new(&results.bias, first_bias, dims)),
                )
            };
            instruction_set().dispatch(Backward {
                operands,
                tiles: tiles.backward,
                grad_context: self.grad_context,
                rows: self.rows,
                sequence,
                kv_head,
                keys: keys.clone(),
                is_decoded: tiles.decode.suit(operands.shape.q_len, operands.shape.kv_len),
                careful: self.careful,
                gradients: TaskGradients { q: q_gradient, k: &mut k_rows, v: &mut v_rows, bias },
                is_not_finite: &results.is_not_finite,
            })?;
        }
        Ok(())
    }
}

/// Parts of the same size, one behind the other, added up in their order.
fn sum_of_parts<R: SimdFloat>(mut parts: Vec<R>, size: usize) -> Vec<R> {
    let (first, others) = parts.split_at_mut(size);
    for other in others.chunks_exact(size.max(1)) {
        first.iter_mut().zip(other).for_each(|(sum, x)| *sum += *x);
    }
    parts.truncate(size);
    parts
}
