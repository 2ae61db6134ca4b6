//! The forward pass on a machine.

use super::call::Call;
use super::launches::{FLAGS, Launches, grid, numbers};
use super::machine::{Machine, Memory, Region, Source};
use super::mask::{Lowered, Uploaded};
use super::plan::{Pass, Tiles, Variant, decode_row_tiles, decode_splits};
use super::problem::{RawProblem, RawStrided};
use crate::alloc::product;
use crate::error::Error;
use crate::mask::Rule;

/// What the backward pass needs of the forward pass, beside the context.
pub struct Saved {
    pub(super) mask: Uploaded,
    pub(super) variant: Variant,
    /// Of query, key and value.
    pub(super) dims: [[usize; 4]; 3],
    pub(super) largest: Box<dyn Memory>,
    pub(super) log_total: Box<dyn Memory>,
    logsumexp: Box<dyn Memory>,
}

impl Saved {
    /// f64 (batch, num_heads, q_len): the logarithm of the sum of the exponentials of each row's scores.
    pub fn logsumexp(&self) -> &dyn Memory {
        self.logsumexp.as_ref()
    }

    /// The arguments that hold what was saved.
    pub(super) fn add_to(&self, problem: RawProblem) -> RawProblem {
        RawProblem {
            mask: self.mask.raw,
            largest: self.largest.address(),
            log_total: self.log_total.address(),
            lse: self.logsumexp.address(),
            ..problem
        }
    }

    pub(super) fn regions(&self) -> impl Iterator<Item = Region<'_>> {
        let memory = [&self.largest, &self.log_total, &self.logsumexp];
        memory.into_iter().map(|memory| Region::of_memory(memory.as_ref())).chain(self.mask.regions())
    }
}

/// The context, contiguous in the layout of the call, and what the backward pass needs.
///
/// # Errors
///
/// Too little memory, sizes that the kernels don't serve, or a kernel that can't be compiled or started.
pub fn forward(machine: &dyn Machine, call: &Call) -> Result<(Box<dyn Memory>, Saved), Error> {
    let limits = machine.limits();
    let lowered = Lowered::new(call.inputs.mask, &call.shape())?;
    let variant = call.variant(&lowered, limits)?;
    let dims = call.context_dims();
    let bytes = product("context", &[dims[0], dims[1], dims[2], dims[3], variant.element.bytes()])?;
    let context = machine.allocate("context", bytes)?;
    let saved = Saved {
        mask: lowered.upload(machine)?,
        dims: call.dims(),
        variant,
        largest: numbers::<f32>(machine, "greatest scores", call.rows())?,
        log_total: numbers::<f32>(machine, "sums of exponentials", call.rows())?,
        logsumexp: numbers::<f64>(machine, "log-sum-exp", call.rows())?,
    };
    let problem = RawProblem { o: contiguous(context.as_ref(), call, dims), ..saved.add_to(call.raw()) };
    let regions = call.regions().into_iter().chain([Region::of_memory(context.as_ref())]).chain(saved.regions());
    let launches = Launches { machine, variant, problem, regions: regions.collect() };
    let decoding = Variant { hopper: false, ..variant };
    let decode_tiles = decoding.tiles(Pass::Decode, limits)?;
    match decode_splits(&call.shape(), call.inputs.k.dims()[1], decode_tiles) {
        Some(splits) => decode(&launches, call, splits, decode_tiles)?,
        None => prefill(&launches, call, variant.tiles(Pass::Forward, limits)?)?,
    }
    drop(launches);
    Ok((context, saved))
}

/// Tiles of queries, each of which goes through the keys.
fn prefill(launches: &Launches, call: &Call, tiles: Tiles) -> Result<(), Error> {
    let (shape, rows) = (call.shape(), tiles.rows() as usize);
    let blocks = grid(&[shape.q_len.div_ceil(rows), shape.num_heads, shape.batch])?;
    let careful = launches.machine.allocate(FLAGS, blocks as usize)?;
    let flags = RawProblem { careful: careful.address(), careful_queries: rows as i32, ..launches.problem };
    let launches = launches.with(flags, &[careful.as_ref()]);
    // A block of threads of the specialised kernel does any number of blocks of queries. With equal work for all it is faster to have as
    // many as there are multiprocessors: 1.06 to 1.17 times at 1,024 and 2,048 tokens on an H200. With a causal mask it is slower.
    let is_even = tiles.specialised && matches!(call.inputs.mask, Rule::Full);
    let launched = if is_even { blocks.min(launches.machine.limits().multiprocessors) } else { blocks };
    launches.tiled((Source::Forward, "attention_forward"), (Pass::Forward, tiles), None, launched)?;
    launches.careful("careful_forward", blocks)
}

/// The queries of all heads that share a head of keys, with the keys in parts.
fn decode(launches: &Launches, call: &Call, splits: usize, tiles: Tiles) -> Result<(), Error> {
    let (shape, machine, kv_heads) = (call.shape(), launches.machine, call.inputs.k.dims()[1]);
    let blocks = grid(&[decode_row_tiles(&shape, kv_heads, tiles), splits, kv_heads, shape.batch])?;
    let heads = grid(&[shape.num_heads, shape.batch])?;
    let careful = machine.allocate(FLAGS, heads as usize)?;
    let columns = launches.variant.value_dim as usize + 2;
    let partial = product("parts of a decoding", &[splits, call.rows(), columns])?;
    let partial = numbers::<f32>(machine, "parts of a decoding", partial)?;
    let parts = RawProblem {
        partial: partial.address(),
        splits: splits as i32,
        careful: careful.address(),
        careful_queries: shape.q_len as i32,
        ..launches.problem
    };
    let of_mma = Variant { hopper: false, ..launches.variant };
    let launches = Launches { variant: of_mma, ..launches.with(parts, &[careful.as_ref(), partial.as_ref()]) };
    launches.tiled((Source::Decode, "decode_split"), (Pass::Decode, tiles), None, blocks)?;
    launches.untiled((Source::Decode, "decode_merge"), tiles, None, heads)?;
    launches.careful("careful_forward", heads)
}

/// The tensor that fills the memory, in the layout of the call.
pub(super) fn contiguous(memory: &dyn Memory, call: &Call, dims: [usize; 4]) -> RawStrided {
    let [batch, head, row] = call.inputs.layout.strides(dims).map(|stride| stride as i64);
    RawStrided { data: memory.address(), batch, head, row }
}
