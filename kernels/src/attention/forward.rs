//! The tasks of the forward pass.

use std::mem::MaybeUninit;

use super::Output;
use crate::alloc::{filled, reserve};
use crate::decode::Decode;
use crate::dtype::{Number, Sink};
use crate::error::Error;
use crate::layout::Layout;
use crate::matrix::{Matrix, Shared};
use crate::operands::Operands;
use crate::prefill::forward::Forward;
use crate::problem::Problem;
use crate::schedule::{Splits, run_tasks};
use crate::simd::{SimdFloat, instruction_set};
use crate::softmax::{LogSumExp, Partial, merge};
use crate::tiles::{DecodeTiles, ForwardTiles, TileSizes};

/// The results, while tasks write them.
struct Results<'a, T: Number> {
    context: Shared<'a, MaybeUninit<T>>,
    /// Strides of batch, heads and len.
    strides: [usize; 3],
    logsumexp: Shared<'a, MaybeUninit<LogSumExp<T::Float>>>,
}

/// The results in `T`: the type of the tensors, or the one that is computed in.
pub(super) fn forward<E: Number, T: Number<Float = E::Float>>(
    problem: &Problem<E>,
    layout: Layout,
) -> Result<Output<T>, Error> {
    let dims = problem.context_dims();
    let rows = dims[0] * dims[1] * dims[2];
    let mut context: Vec<T> = reserve("context", rows * dims[3])?;
    let mut logsumexp: Vec<LogSumExp<T::Float>> = reserve("log-sum-exp", rows)?;
    let results = Results {
        context: Shared::new(&mut context.spare_capacity_mut()[..rows * dims[3]]),
        strides: layout.strides(dims),
        logsumexp: Shared::new(&mut logsumexp.spare_capacity_mut()[..rows]),
    };
    let operands = problem.operands();
    let tiles = TileSizes::new(operands.is_by_tile_registers());
    if tiles.decode.suit(operands.shape.q_len, operands.shape.kv_len) {
        decode::<T>(&operands, tiles.decode, &results)?;
    } else {
        prefill::<T>(&operands, tiles.forward, &results)?;
    }
    // SAFETY: every task has succeeded. Together they have all queries of all heads, and each writes all of its rows.
    unsafe {
        context.set_len(rows * dims[3]);
        logsumexp.set_len(rows);
    }
    Ok(Output { context, logsumexp })
}

/// Many queries: each task computes some of one head.
fn prefill<T: Number>(operands: &Operands<T::Float>, tiles: ForwardTiles, results: &Results<T>) -> Result<(), Error> {
    let (shape, dv, [sb, sh, si]) = (operands.shape, operands.value_dim, results.strides);
    let blocks = shape.q_len.div_ceil(tiles.queries);
    run_tasks(operands.work(), shape.batch * shape.num_heads * blocks, |task| {
        let (head, start) = (task / blocks, task % blocks * tiles.queries);
        let (b, h) = (head / shape.num_heads, head % shape.num_heads);
        let queries = start..(start + tiles.queries).min(shape.q_len);
        let count = queries.len();
        // SAFETY: each task has another head or other queries of it, so that no two have a row in common.
        let (mut context, mut logsumexp) = unsafe {
            let context = results.context.rows(b * sb + h * sh + start * si, count, dv, si);
            (context, results.logsumexp.rows(head * shape.q_len + start, 1, count, count))
        };
        let (context, logsumexp) = (&mut context, logsumexp.row(0));
        instruction_set().dispatch(Forward { operands, tiles, at: (b, h), queries, context, logsumexp })
    })
}

/// A few queries: each task computes a split of the keys of one key head; then each row is merged from its splits, in their
/// order.
fn decode<T: Number>(operands: &Operands<T::Float>, tiles: DecodeTiles, results: &Results<T>) -> Result<(), Error> {
    let (shape, kv_heads, dv) = (operands.shape, operands.kv_heads, operands.value_dim);
    let ([sb, sh, si], heads, rows) = (results.strides, shape.batch * kv_heads, operands.group * shape.q_len);
    let splits = Splits::of_decode(shape.kv_len, heads);
    let size = rows * Partial::<T::Float>::size(dv);
    let mut partials = filled("partial results of decoding", heads * splits.count * size, T::Float::ZERO)?;
    let shared = Shared::new(&mut partials);
    run_tasks(operands.work(), heads * splits.count, |task| {
        let (head, split) = (task / splits.count, task % splits.count);
        // SAFETY: each task has partial results of its own.
        let mut partials = unsafe { shared.rows(task * size, 1, size, size) };
        let (sequence, kv_head, partials) = (head / kv_heads, head % kv_heads, partials.row(0));
        instruction_set().dispatch(Decode { operands, tiles, sequence, kv_head, keys: splits.keys(split), partials })
    })?;
    let mut row_context = filled("context of a row", dv, T::Float::ZERO)?;
    for (head, partials) in partials.chunks_exact(splits.count * size).enumerate() {
        for row in 0..rows {
            let (b, h) = (head / kv_heads, head % kv_heads * operands.group + row / shape.q_len);
            let partials = partials.chunks_exact(Partial::<T::Float>::size(dv)).skip(row).step_by(rows);
            let logsumexp = merge(partials.map(Partial::read), &mut row_context);
            let i = row % shape.q_len;
            // SAFETY: the tasks are done, and each row is written alone.
            let (mut to_context, mut to_logsumexp) = unsafe {
                let context = results.context.rows(b * sb + h * sh + i * si, 1, dv, si);
                (context, results.logsumexp.rows((b * shape.num_heads + h) * shape.q_len + i, 1, 1, 1))
            };
            to_context.write(0, Matrix::new(&row_context, 1, dv, dv));
            to_logsumexp.row(0)[0].write(logsumexp);
        }
    }
    Ok(())
}
