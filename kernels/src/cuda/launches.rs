//! What the launches of a pass have in common: the variant, the grid, the memory that kernels touch.

use super::machine::{Launch, Machine, Memory, Region, Source};
use super::plan::{Parts, Pass, Tiles, Variant};
use super::problem::RawProblem;
use crate::alloc::product;
use crate::error::Error;

/// What the numbers that ask for the careful pass are in errors.
pub(super) const FLAGS: &str = "tiles that aren't finite";
/// The most blocks of a careful kernel. They share the flags, few of which are set, so that most end at once.
const CAREFUL_BLOCKS: u32 = 512;
/// Threads of a block of the kernels without tiles of their own.
pub(super) const SMALL_BLOCK: u32 = 128;

/// Launches with the same arguments.
pub(super) struct Launches<'a> {
    pub(super) machine: &'a dyn Machine,
    pub(super) variant: Variant,
    pub(super) problem: RawProblem,
    pub(super) regions: Vec<Region<'a>>,
}

impl<'a> Launches<'a> {
    /// The same with other arguments and more memory.
    pub(super) fn with<'b>(&self, problem: RawProblem, memory: &[&'b dyn Memory]) -> Launches<'b>
    where
        'a: 'b,
    {
        let more = memory.iter().map(|memory| Region::of_memory(*memory));
        let regions = self.regions.iter().copied().chain(more).collect();
        Launches { machine: self.machine, variant: self.variant, problem, regions }
    }

    fn start(&self, launch: Launch) -> Result<(), Error> {
        let launch = Launch { regions: self.regions.clone(), ..launch };
        // SAFETY: the addresses are those of the tensors of a `Call`, whose views have checked their bounds, and of results that `forward`
        // and `backward` have allocated for its sizes. `backward` has checked that what was saved and what comes in have these sizes.
        unsafe { self.machine.launch(&launch, &self.problem) }
    }

    /// A kernel of this variant without shared memory. It is compiled together with one that has these tiles.
    fn small(&self, kernel: (Source, &'static str), tiles: Tiles, parts: Option<Parts>, grid: u32) -> Launch<'static> {
        Launch {
            source: kernel.0,
            kernel: kernel.1,
            defines: self.variant.defines(tiles, parts),
            hopper: self.variant.hopper,
            grid,
            threads: SMALL_BLOCK,
            shared_bytes: 0,
            regions: Vec::new(),
        }
    }

    /// Starts a kernel that works on tiles.
    pub(super) fn tiled(
        &self,
        kernel: (Source, &'static str),
        (pass, tiles): (Pass, Tiles),
        parts: Option<Parts>,
        grid: u32,
    ) -> Result<(), Error> {
        let (threads, shared_bytes) = (tiles.threads(), tiles.shared_bytes(self.variant, pass));
        self.start(Launch { threads, shared_bytes, ..self.small(kernel, tiles, parts, grid) })
    }

    /// Starts a kernel without shared memory.
    pub(super) fn untiled(
        &self,
        kernel: (Source, &'static str),
        tiles: Tiles,
        parts: Option<Parts>,
        grid: u32,
    ) -> Result<(), Error> {
        self.start(self.small(kernel, tiles, parts, grid))
    }

    /// The gradient of the bias.
    pub(super) fn bias(&self, tiles: Tiles) -> Result<(), Error> {
        let [batch, heads, rows, columns] = self.problem.bias_dims.map(|dim| dim as usize);
        let (of_rows, of_columns) = (tiles.rows() as usize, tiles.others as usize);
        let blocks = grid(&[batch, heads, rows.div_ceil(of_rows), columns.div_ceil(of_columns)])?;
        let flags = self.machine.allocate(FLAGS, blocks as usize)?;
        let problem = RawProblem {
            careful: flags.address(),
            careful_queries: tiles.rows() as i32,
            careful_keys: tiles.others as i32,
            ..self.problem
        };
        let launches = self.with(problem, &[flags.as_ref()]);
        launches.tiled((Source::Bias, "backward_bias"), (Pass::Queries, tiles), None, blocks)?;
        launches.careful("careful_bias", blocks)
    }

    /// Starts a kernel that computes again what isn't finite, of a pass that had `blocks` blocks.
    pub(super) fn careful(&self, kernel: &'static str, blocks: u32) -> Result<(), Error> {
        self.start(Launch {
            source: Source::Careful,
            kernel,
            defines: self.variant.careful_defines(),
            hopper: false,
            grid: blocks.min(CAREFUL_BLOCKS),
            threads: SMALL_BLOCK,
            shared_bytes: 0,
            regions: Vec::new(),
        })
    }
}

/// The product of some sizes as the number of blocks of a grid.
pub(super) fn grid(sizes: &[usize]) -> Result<u32, Error> {
    let blocks = product("grid", sizes)?;
    // A grid has at most 2^31 - 1 blocks along its first dimension.
    let unsupported = Error::Unsupported { what: "blocks of a launch", expected: "less than 2^31", got: blocks };
    i32::try_from(blocks).map(|blocks| blocks as u32).map_err(|_| unsupported)
}

/// Memory for `count` numbers.
pub(super) fn numbers<T>(machine: &dyn Machine, what: &'static str, count: usize) -> Result<Box<dyn Memory>, Error> {
    machine.allocate(what, product(what, &[count, size_of::<T>()])?)
}
