//! The backward pass on a machine.

use super::call::{Call, MachineNumbers, MachineView};
use super::forward::{Saved, contiguous};
use super::launches::{FLAGS, Launches, grid, numbers};
use super::machine::{Machine, Memory, Region, Source};
use super::plan::{Parts, Pass};
use super::problem::RawProblem;
use crate::alloc::product;
use crate::error::Error;

/// Rows that a block of `backward_delta` computes: one for each warp.
const DELTA_ROWS: usize = 4;

/// The gradients of a call's results.
#[derive(Clone, Copy, Debug, Default)]
pub struct Incoming<'a> {
    /// The context and its gradient; none is a gradient of zeros.
    pub context: Option<[MachineView<'a>; 2]>,
    /// The gradient of the log-sum-exp, (batch, num_heads, q_len); none is zeros.
    pub logsumexp: Option<MachineNumbers<'a>>,
}

/// Which gradients are wanted beside those of query, key and value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Of the bias.
    pub bias: bool,
    /// Of the slopes.
    pub slopes: bool,
    /// Of the sinks.
    pub sinks: bool,
}

/// The gradients of a call's inputs.
pub struct Gradients {
    /// Of the query, contiguous in the layout of the call. `k` and `v` likewise.
    pub q: Box<dyn Memory>,
    /// Of the key.
    pub k: Box<dyn Memory>,
    /// Of the value.
    pub v: Box<dyn Memory>,
    /// Of the bias, contiguous: f32, if wanted.
    pub bias: Option<Box<dyn Memory>>,
    /// Each row's part of the gradient of its slope, (batch, num_heads, q_len): f32, if wanted.
    pub slope_rows: Option<Box<dyn Memory>>,
    /// Each row's part of the gradient of its sink, likewise.
    pub sink_rows: Option<Box<dyn Memory>>,
}

impl Gradients {
    fn new(machine: &dyn Machine, call: &Call, saved: &Saved, wanted: Wanted) -> Result<Self, Error> {
        let allocate = |what, dims: [usize; 4]| {
            let [batch, heads, len, dim] = dims;
            machine.allocate(what, product(what, &[batch, heads, len, dim, saved.variant.element.bytes()])?)
        };
        let rows = |is_wanted: bool, what| is_wanted.then(|| numbers::<f32>(machine, what, call.rows())).transpose();
        let bias = call.inputs.bias.filter(|_| wanted.bias);
        Ok(Self {
            q: allocate("gradient of the query", call.inputs.q.dims())?,
            k: allocate("gradient of the key", call.inputs.k.dims())?,
            v: allocate("gradient of the value", call.inputs.v.dims())?,
            bias: bias.map(|bias| numbers::<f32>(machine, "gradient of the bias", bias.entries())).transpose()?,
            slope_rows: rows(wanted.slopes && call.inputs.slopes.is_some(), "gradient of the slopes")?,
            sink_rows: rows(wanted.sinks && call.inputs.sinks.is_some(), "gradient of the sinks")?,
        })
    }

    fn memory(&self) -> impl Iterator<Item = &dyn Memory> {
        let more = [&self.bias, &self.slope_rows, &self.sink_rows].into_iter().flatten();
        [&self.q, &self.k, &self.v].into_iter().chain(more).map(|memory| memory.as_ref())
    }
}

/// The gradients of the inputs of a call from those of its results.
///
/// # Errors
///
/// As [`forward`](super::forward()), and an incoming gradient of another size.
pub fn backward(
    machine: &dyn Machine,
    call: &Call,
    saved: &Saved,
    incoming: Incoming,
    wanted: Wanted,
) -> Result<Gradients, Error> {
    check(call, saved, &incoming)?;
    let (limits, variant, shape) = (machine.limits(), saved.variant, call.shape());
    let (key_tiles, query_tiles) = (variant.tiles(Pass::Keys, limits)?, variant.tiles(Pass::Queries, limits)?);
    let kv_heads = call.inputs.k.dims()[1];
    let key_grid = grid(&[shape.kv_len.div_ceil(key_tiles.rows() as usize), kv_heads, shape.batch])?;
    let query_grid = grid(&[shape.q_len.div_ceil(query_tiles.rows() as usize), shape.num_heads, shape.batch])?;

    let gradients = Gradients::new(machine, call, saved, wanted)?;
    let delta = numbers::<f32>(machine, "gradient of the sums", call.rows())?;
    let careful = machine.allocate(FLAGS, key_grid as usize + query_grid as usize)?;
    let address = |memory: &Option<Box<dyn Memory>>| memory.as_ref().map_or(0, |memory| memory.address());
    let problem = RawProblem {
        o: incoming.context.map(|[context, _]| context.raw()).unwrap_or_default(),
        d_o: incoming.context.map(|[_, gradient]| gradient.raw()).unwrap_or_default(),
        dq: contiguous(gradients.q.as_ref(), call, call.inputs.q.dims()),
        dk: contiguous(gradients.k.as_ref(), call, call.inputs.k.dims()),
        dv: contiguous(gradients.v.as_ref(), call, call.inputs.v.dims()),
        delta: delta.address(),
        d_lse: incoming.logsumexp.map_or(0, |numbers| numbers.address),
        d_bias: address(&gradients.bias),
        slope_rows: address(&gradients.slope_rows),
        sink_rows: address(&gradients.sink_rows),
        careful: careful.address(),
        careful_queries: query_tiles.rows() as i32,
        careful_keys: key_tiles.rows() as i32,
        ..saved.add_to(call.raw())
    };
    let regions = call.regions().into_iter().chain(saved.regions()).chain(gradients.memory().map(Region::of_memory));
    let regions = regions.chain([delta.as_ref(), careful.as_ref()].map(Region::of_memory)).chain(incoming.regions());
    let mut launches = Launches { machine, variant, problem, regions: regions.collect() };

    let blocks = grid(&[call.rows().div_ceil(DELTA_ROWS)])?;
    launches.untiled((Source::Backward, "backward_delta"), query_tiles, Some(Parts::Both), blocks)?;
    for parts in variant.key_parts() {
        let kernel = (Source::Backward, "backward_keys");
        launches.tiled(kernel, (Pass::Keys, key_tiles), Some(*parts), key_grid)?;
    }
    launches.careful("careful_keys", key_grid)?;
    // The pass over queries has its own bytes, behind those of the pass over keys.
    launches.problem.careful += u64::from(key_grid);
    let kernel = (Source::Backward, "backward_queries");
    launches.tiled(kernel, (Pass::Queries, query_tiles), Some(Parts::Both), query_grid)?;
    if gradients.slope_rows.is_some() {
        // A slope is a bias of every query: the grid is that of the pass over queries.
        let kernel = (Source::Bias, "backward_slopes");
        launches.tiled(kernel, (Pass::Queries, query_tiles), None, query_grid)?;
    }
    launches.careful("careful_queries", query_grid)?;
    if gradients.bias.is_some() {
        launches.bias(query_tiles)?;
    }
    drop(launches);
    Ok(gradients)
}

impl<'a> Incoming<'a> {
    fn regions(&self) -> impl Iterator<Item = Region<'a>> {
        let context = self.context.into_iter().flatten().map(|view| view.region());
        context.chain(self.logsumexp.map(|numbers| numbers.region))
    }
}

fn check(call: &Call, saved: &Saved, incoming: &Incoming) -> Result<(), Error> {
    let dims = call.context_dims();
    for (what, got, saved) in [
        ("query", call.dims()[0], saved.dims[0]),
        ("key", call.dims()[1], saved.dims[1]),
        ("value", call.dims()[2], saved.dims[2]),
    ] {
        if got != saved {
            return Err(Error::Dims { what, expected: format!("{saved:?}, as in the forward pass"), got });
        }
    }
    if saved.variant.plain && !call.is_plain(saved.variant) {
        let (expected, got) = ("those of the forward pass, which had none", "some".to_string());
        return Err(Error::Option { what: "options", expected, got });
    }
    for view in incoming.context.iter().flatten() {
        if [view.element(), call.inputs.q.element()] != [saved.variant.element; 2] {
            let expected = "the elements of the forward pass";
            return Err(Error::Option { what: "gradient", expected, got: format!("{:?}", view.element()) });
        }
        if view.dims() != dims {
            let expected = format!("{dims:?}, as the context");
            return Err(Error::Dims { what: "gradient of the context", expected, got: view.dims() });
        }
        if saved.variant.plain && !view.is_aligned() {
            let expected = "an address and strides of multiples of 16 bytes".to_string();
            return Err(Error::Dims { what: "gradient of the context", expected, got: view.dims() });
        }
    }
    match incoming.logsumexp {
        Some(numbers) if numbers.len != call.rows() => {
            let expected = format!("{} elements", call.rows());
            Err(Error::Length { what: "gradient of the log-sum-exp", expected, got: numbers.len })
        }
        _ => Ok(()),
    }
}
