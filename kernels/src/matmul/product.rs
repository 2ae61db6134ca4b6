//! A product cut into tiles.

use std::mem::MaybeUninit;

use crate::alloc::{product, reserve};
use crate::dtype::Number;
use crate::error::Error;
use crate::gemm::amx::BLOCK;
use crate::gemm::bf16_tiles::are_available;
use crate::matmul::pack::packs_all_rows;
use crate::matmul::tile::Tile;
use crate::matmul::{Epilogue, Operand, few_rows};
use crate::matrix::{MatrixMut, Shared};
use crate::schedule::run_tasks;

mod sealed {
    use crate::error::Error;
    use crate::matmul::product::Product;

    pub trait Compute: Sized {
        fn compute(product: &Product<Self>) -> Result<Vec<Self>, Error>
        where
            Self: crate::dtype::Number;
    }
}

/// A type of number that matrices can be multiplied of: f16, bf16, f32 or f64.
pub trait MatmulElement: Number + sealed::Compute {}

macro_rules! element {
    ($($element:ty => $way:expr),*) => {$(
        impl MatmulElement for $element {}

        // Not generic, so that the kernels are compiled here, once, and not in each package that calls them.
        impl sealed::Compute for $element {
            #[inline(never)]
            fn compute(product: &Product<Self>) -> Result<Vec<Self>, Error> {
                product.compute(&$way)
            }
        }
    )*};
}

element!(
    half::f16 => Way::by_vectors(),
    half::bf16 => if are_available() { Way::by_tile_registers() } else { Way::by_vectors() },
    f32 => Way::by_vectors(),
    f64 => Way::by_vectors()
);

/// Computes a tile and writes it to its part of the result.
type ComputeTile<E> = fn(&Tile<E>, MatrixMut<MaybeUninit<E>>) -> Result<(), Error>;

/// How tiles are computed, and how large they are.
struct Way<E: Number> {
    compute: ComputeTile<E>,
    /// The most rows and columns of a tile.
    tile: [usize; 2],
    /// The same where all rows of the left operand are packed at once: see [`packs_all_rows`].
    tile_of_packed: [usize; 2],
    /// Rows and columns of a tile are multiples of these, but for the last ones: of a block's rows and a panel's columns.
    units: [usize; 2],
    /// What is packed for a tile costs as much time as it takes to multiply with this many rows or columns.
    read_cost: [usize; 2],
    /// What a task costs on its own, in multiplications.
    task_cost: usize,
    /// How many times as fast multiplications are as with vectors.
    speed: usize,
}

impl<E: Number> Way<E> {
    fn by_vectors() -> Self {
        Self {
            compute: |tile, result| tile.compute(result),
            // A block of the right operand, 384 columns of `K_BLOCK` numbers (576 KB in f32), stays in a second-level cache. It is
            // packed once for each tile, which the rows pay for: with 512 rows the products of a transformer's layers took 3% to
            // 10% longer.
            tile: [1024, 384],
            // The packed rows stay in the cache too (576 KB). More columns pay for packing them: with 256 columns such products
            // took up to 14% longer.
            tile_of_packed: [384, 512],
            // Of any instruction set.
            units: [12, 32],
            // Half a cycle for a number of the left operand, 1 cycle for a number of the right one, and 32 multiplications in a
            // cycle.
            read_cost: [16, 32],
            // 2 µs.
            task_cost: 1 << 18,
            speed: 1,
        }
    }
}

impl Way<half::bf16> {
    fn by_tile_registers() -> Self {
        Self {
            compute: |tile, result| tile.compute_by_tile_registers(result),
            // A block of the right operand takes 512 KB, the sums of a tile at most 2 MB.
            tile: [1024, 512],
            tile_of_packed: [1024, 512],
            units: [BLOCK, BLOCK],
            // Estimates: a quarter of a cycle for a number of each operand, and 256 multiplications in a cycle.
            read_cost: [64, 64],
            task_cost: 1 << 21,
            speed: 8,
        }
    }
}

/// Into how many parts rows and columns may be cut, as multiples of the fewest parts.
const MULTIPLES: [usize; 10] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32];

/// Columns of a result: the sum of the products of these pairs.
pub struct Group<'a, E> {
    pub(super) pairs: &'a [(Operand<'a, E>, Operand<'a, E>)],
    pub(super) first_column: usize,
}

impl<E: Number> Group<'_, E> {
    pub(super) fn columns(&self) -> usize {
        self.pairs.first().map_or(0, |(_, b)| b.dims()[1])
    }
}

/// A row-major result, group by group.
pub struct Product<'a, E: Number> {
    pub(super) dims: [usize; 2],
    pub(super) groups: &'a [Group<'a, E>],
    pub(super) epilogue: &'a dyn Epilogue<E>,
}

impl<E: MatmulElement> Product<'_, E> {
    pub(super) fn result(&self) -> Result<Vec<E>, Error> {
        E::compute(self)
    }
}

impl<E: Number> Product<'_, E> {
    fn check(&self) -> Result<(), Error> {
        for group in self.groups {
            for (a, b) in group.pairs {
                if a.is_quantised() {
                    let (what, expected) = ("left operand of a product", "a matrix of numbers");
                    return Err(Error::Option { what, expected, got: format!("the {} in quantised blocks", a.what()) });
                }
                let expected = [[self.dims[0], a.dims()[1]], [a.dims()[1], group.columns()]];
                for (operand, expected) in [a, b].into_iter().zip(expected) {
                    let [rows, columns] = operand.dims();
                    if [rows, columns] != expected {
                        let expected = format!("{} rows of {}", expected[0], expected[1]);
                        return Err(Error::Dims { what: operand.what(), expected, got: [1, 1, rows, columns] });
                    }
                }
            }
        }
        self.epilogue.check(self.dims[0], self.dims[1])
    }

    fn compute(&self, way: &Way<E>) -> Result<Vec<E>, Error> {
        self.check()?;
        let [rows, columns] = self.dims;
        let elements = product("matrix product", &[rows, columns])?;
        let mut result = reserve("matrix product", elements)?;
        if elements == 0 {
            return Ok(result);
        }
        self.fill(way, &mut result.spare_capacity_mut()[..elements])?;
        // SAFETY: the tiles cover the result, and each has written all of its elements.
        unsafe { result.set_len(elements) };
        Ok(result)
    }

    /// The rows and columns of the tiles: those with which `threads` threads are done first.
    ///
    /// The sums of an element are added in an order that no tile has a part in, so their bits are the same with any tiles.
    fn tile_dims(&self, way: &Way<E>, k: usize, threads: usize) -> [usize; 2] {
        let at_once = self.groups.iter().flat_map(|group| group.pairs).any(|(a, _)| packs_all_rows(a));
        let largest = if at_once { way.tile_of_packed } else { way.tile };
        let [m, n] = self.dims;
        let size = |axis: usize, multiple: usize| {
            let fewest = self.dims[axis].div_ceil(largest[axis]);
            self.dims[axis].div_ceil(way.units[axis]).div_ceil(fewest * multiple) * way.units[axis]
        };
        // A cost that can't be counted is no reason to choose others.
        let mut best = (usize::MAX, [size(0, 1), size(1, 1)]);
        for rows in MULTIPLES.map(|multiple| size(0, multiple)) {
            for columns in MULTIPLES.map(|multiple| size(1, multiple)) {
                let of_columns: usize = self.groups.iter().map(|group| group.columns().div_ceil(columns)).sum();
                let turns = (m.div_ceil(rows) * of_columns).div_ceil(threads);
                let (rows_read, columns_read) = (rows.min(m), columns.min(n.next_multiple_of(way.units[1])));
                let products =
                    rows_read * columns_read + rows_read * way.read_cost[0] + columns_read * way.read_cost[1];
                let cost = turns.saturating_mul(products.saturating_mul(k).saturating_add(way.task_cost));
                if cost < best.0 {
                    best = (cost, [rows, columns]);
                }
            }
        }
        best.1
    }

    fn fill(&self, way: &Way<E>, result: &mut [MaybeUninit<E>]) -> Result<(), Error> {
        let [rows, columns] = self.dims;
        let k_of = |group: &Group<E>| group.pairs.iter().fold(0usize, |sum, (a, _)| sum.saturating_add(a.dims()[1]));
        let k = self.groups.iter().map(k_of).max().unwrap_or(0);
        let work = rows.saturating_mul(columns).saturating_mul(k);
        let has_few_rows = self.groups.iter().all(|group| few_rows::suits(rows, group.pairs));
        let [tile_rows, tile_columns] = self.tile_dims(way, k, rayon::current_num_threads());
        let row_parts = rows.div_ceil(tile_rows);
        let of_group = |group: &Group<E>| group.columns().div_ceil(tile_columns);
        let mut column_parts = reserve("tiles", self.groups.iter().map(of_group).sum())?;
        for group in self.groups {
            let n = group.columns();
            let starts = (0..n).step_by(tile_columns);
            column_parts.extend(starts.map(|start| (group, start..n.min(start + tile_columns))));
        }
        let shared = Shared::new(result);
        run_tasks(work / way.speed, row_parts * column_parts.len(), |task| {
            let (group, of_task) = &column_parts[task / row_parts];
            let start = task % row_parts * tile_rows;
            let of_rows = start..rows.min(start + tile_rows);
            let first = of_rows.start * columns + group.first_column + of_task.start;
            // SAFETY: two tiles have either other rows or other columns.
            let result = unsafe { shared.rows(first, of_rows.len(), of_task.len(), columns) };
            let tile = Tile {
                pairs: group.pairs,
                rows: of_rows,
                columns: of_task.clone(),
                offset: group.first_column,
                epilogue: self.epilogue,
                has_few_rows,
            };
            (way.compute)(&tile, result)
        })
    }
}
