//! The tasks of the backward pass.

use std::mem::MaybeUninit;
use std::sync::atomic::AtomicBool;

use super::{BackwardOptions, Gradients, Incoming, Saved};
use crate::alloc::{filled, product, reserve};
use crate::dtype::{Number, Source};
use crate::error::Error;
use crate::gemm::nan_safe::must_repeat;
use crate::layout::Layout;
use crate::matrix::Shared;
use crate::operands::Operands;
use crate::prefill::backward::Backward;
use crate::prefill::gradients::{BiasGradient, Gradients as TaskGradients, QueryGradient, QueryRow};
use crate::problem::Problem;
use crate::schedule::{AccumulationGroups, Splits, for_each_chunk, run_tasks};
use crate::simd::{SimdFloat, instruction_set};
use crate::tiles::TileSizes;

/// Query rows of a parallel piece of work.
const ROWS_PER_CHUNK: usize = 256;

pub(super) fn backward<E: Number>(
    problem: &Problem<E>,
    saved: Saved<E>,
    incoming: Incoming<E>,
    options: BackwardOptions,
) -> Result<Gradients<E>, Error> {
    check(problem, &saved, &incoming, options)?;
    let rows = query_rows(problem, &saved, &incoming)?;
    let bias_dims = problem.options().bias.filter(|_| options.bias).map(|bias| bias.dims());
    let operands = problem.operands();
    let pass = Pass { operands: &operands, grad_context: &incoming.context, rows: &rows, bias_dims };
    let (gradients, is_finite) = pass.run::<E>(options.layout, false)?;
    if !must_repeat(operands.mask, is_finite) {
        return Ok(gradients);
    }
    drop(gradients);
    Ok(pass.run::<E>(options.layout, true)?.0)
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
    let lengths = [("log-sum-exp", Some(saved.logsumexp)), ("gradient of the log-sum-exp", incoming.logsumexp)];
    for (what, slice) in lengths {
        if let Some(slice) = slice
            && slice.len() != rows
        {
            return Err(Error::Length { what, expected: format!("one for each of {rows} queries"), got: slice.len() });
        }
    }
    if options.bias && problem.options().bias.is_none() {
        let (what, expected) = ("gradient of the bias", "a problem with a bias");
        return Err(Error::Option { what, expected, got: "none".to_owned() });
    }
    Ok(())
}

/// What each query brings to the backward pass.
fn query_rows<E: Number>(
    problem: &Problem<E>,
    saved: &Saved<E>,
    incoming: &Incoming<E>,
) -> Result<Vec<QueryRow<E::Float>>, Error> {
    let shape = problem.shape();
    let row = |index: usize| {
        let (head, i) = (index / shape.q_len, index % shape.q_len);
        let (b, h) = (head / shape.num_heads, head % shape.num_heads);
        let mut delta = E::Float::ZERO;
        for (o, grad) in saved.context.row(b, h, i).iter().zip(incoming.context.row(b, h, i)) {
            delta += o.widen() * grad.widen();
        }
        if let Some(grads) = incoming.logsumexp {
            delta -= grads[index];
        }
        let logsumexp = saved.logsumexp[index];
        let logsumexp = if logsumexp == -E::Float::INFINITY { E::Float::INFINITY } else { logsumexp };
        QueryRow { logsumexp, delta }
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

/// One pass over all tasks.
struct Pass<'a, R> {
    operands: &'a Operands<'a, R>,
    grad_context: &'a dyn Source<R>,
    rows: &'a [QueryRow<R>],
    /// The bias's dims, if its gradient is wanted.
    bias_dims: Option<[usize; 4]>,
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
    fn run<E: Number<Float = R>>(&self, layout: Layout, nan_safe: bool) -> Result<(Gradients<E>, bool), Error> {
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
            self.task::<E>(&groups, &splits, task, layout, nan_safe, &results)
        })?;
        let is_finite = !results.is_not_finite.into_inner();
        // SAFETY: every task has succeeded. Together they have all keys of all heads, and for each split all queries, and each
        // writes all of its rows.
        unsafe {
            q.set_len(splits.count * q_size);
            k.set_len(k_size);
            v.set_len(v_size);
        }
        let q = E::from_floats("gradient of the query", sum_of_parts(q, q_size))?;
        let bias = self.bias_dims.map(|_| sum_of_parts(bias, bias_size));
        Ok((Gradients { q, k, v, bias }, is_finite))
    }

    /// Split `task % splits.count` of the keys of each head of group `task / splits.count`.
    fn task<E: Number<Float = R>>(
        &self,
        groups: &AccumulationGroups,
        splits: &Splits,
        task: usize,
        layout: Layout,
        nan_safe: bool,
        results: &Results<E>,
    ) -> Result<(), Error> {
        let operands = self.operands;
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
                tiles: TileSizes::new().backward,
                grad_context: self.grad_context,
                rows: self.rows,
                sequence,
                kv_head,
                keys: keys.clone(),
                nan_safe,
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
