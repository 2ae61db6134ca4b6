//! The forward pass on a machine.

use super::call::Call;
use super::launches::{Launches, grid, numbers};
use super::machine::{Machine, Memory, Region, Source};
use super::mask::{Lowered, Uploaded};
use super::plan::{Pass, Variant};
use super::problem::{RawProblem, RawStrided};
use crate::alloc::product;
use crate::error::Error;

/// What the backward pass needs of the forward pass, beside the context.
pub struct Saved {
    pub(super) mask: Uploaded,
    pub(super) variant: Variant,
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
    let tiles = variant.tiles(Pass::Forward, limits)?;
    let shape = call.shape();
    let rows = tiles.rows() as usize;
    let blocks = grid(&[shape.q_len.div_ceil(rows), shape.num_heads, shape.batch])?;

    let dims = call.context_dims();
    let bytes = product("context", &[dims[0], dims[1], dims[2], dims[3], variant.element.bytes()])?;
    let context = machine.allocate("context", bytes)?;
    let saved = Saved {
        mask: lowered.upload(machine)?,
        variant,
        largest: numbers::<f32>(machine, "greatest scores", call.rows())?,
        log_total: numbers::<f32>(machine, "sums of exponentials", call.rows())?,
        logsumexp: numbers::<f64>(machine, "log-sum-exp", call.rows())?,
    };
    let careful = machine.allocate("tiles that aren't finite", blocks as usize)?;
    let problem = RawProblem {
        o: contiguous(context.as_ref(), call, dims),
        careful: careful.address(),
        careful_queries: rows as i32,
        ..saved.add_to(call.raw())
    };
    let own = [context.as_ref(), careful.as_ref()].map(Region::of_memory);
    let regions = call.regions().into_iter().chain(own).chain(saved.regions()).collect();
    let launches = Launches { machine, variant, problem, regions };
    launches.tiled((Source::Forward, "attention_forward"), (Pass::Forward, tiles), None, blocks)?;
    launches.careful("careful_forward", blocks)?;
    drop(launches);
    Ok((context, saved))
}

/// The tensor that fills the memory, in the layout of the call.
pub(super) fn contiguous(memory: &dyn Memory, call: &Call, dims: [usize; 4]) -> RawStrided {
    let [batch, head, row] = call.inputs.layout.strides(dims).map(|stride| stride as i64);
    RawStrided { data: memory.address(), batch, head, row }
}
