//! The matrix products of both passes, each computed in the way that suits the data.

pub(crate) mod amx;
pub(crate) mod bf16_dot;
pub(crate) mod bf16_tiles;
pub(crate) mod microkernel;
pub(crate) mod nan_safe;
pub(crate) mod pack;
pub(crate) mod transpose;

use std::ops::Range;

use pulp::Simd;
use pulp::bytemuck::{cast_slice, cast_slice_mut};

use crate::dtype::Source;
use crate::gemm::amx::TileRegisters;
use crate::gemm::bf16_dot::Bf16Dot;
use crate::gemm::bf16_tiles::{Bf16Tiles, Transposed};
use crate::gemm::microkernel::{Row, pad};
use crate::gemm::pack::{pack, pack_pairs};
use crate::matrix::{Matrix, MatrixMut};
use crate::operands::Operands;
use crate::simd::SimdFloat;

/// How products of bf16 are computed. Their operands are pairs of bf16, each in the room of a number.
#[derive(Clone, Copy)]
pub(crate) enum Bf16<'t> {
    /// With vectors of pairs.
    Pairs(Bf16Dot),
    /// With tiles of them.
    Tiles(Bf16Tiles<'t>),
}

impl Bf16<'_> {
    /// What rounds numbers to pairs, and interleaves rows.
    #[inline(always)]
    pub(crate) fn dot(self) -> Bf16Dot {
        match self {
            Self::Pairs(dot) => dot,
            Self::Tiles(tiles) => tiles.dot(),
        }
    }

    /// Numbers of a row, as far as products read it.
    #[inline(always)]
    fn depth(self, dim: usize) -> usize {
        match self {
            Self::Pairs(_) => dim,
            Self::Tiles(_) => bf16_tiles::padded_depth(dim),
        }
    }
}

/// How products are computed, which decides how their operands lie in memory.
#[derive(Clone, Copy)]
pub(crate) enum Gemm<'t> {
    /// With numbers of type f32 or f64.
    Plain,
    /// With pairs of bf16.
    Bf16(Bf16<'t>),
    /// Scores as with pairs of bf16, if there are any, else as with numbers: to the last bit as the fast ways compute them. Sums
    /// with numbers, where a weight of zero adds nothing, even if its row is infinite or NaN. Slow: see [`nan_safe`].
    NanSafe(Option<Bf16<'t>>),
}

/// Rows of a tensor to multiply with a panel.
#[derive(Clone, Copy)]
pub(crate) enum DotRows<'a, R> {
    /// As numbers to compute with.
    Floats(Matrix<'a, R>),
    /// As the tensor holds them.
    Bf16(Matrix<'a, u16>),
    /// Copied for tiles: so many of these rows.
    Tiles(Matrix<'a, u16>, usize),
}

impl<'a, R> DotRows<'a, R> {
    /// The `count` rows from `first` on.
    #[inline(always)]
    pub(crate) fn part(self, first: usize, count: usize) -> Self {
        match self {
            Self::Floats(rows) => Self::Floats(rows.skip(first).take(count)),
            Self::Bf16(rows) => Self::Bf16(rows.skip(first).take(count)),
            Self::Tiles(rows, _) => Self::Tiles(rows.skip(first), count),
        }
    }
}

/// Rows of a tensor to sum over.
#[derive(Clone, Copy)]
pub(crate) enum SumRows<'a, R> {
    /// As numbers to compute with.
    Floats(Matrix<'a, R>),
    /// As pairs of rows.
    Pairs(Matrix<'a, R>),
    /// For tiles.
    Tiles(Transposed<'a>),
}

impl<R> SumRows<'_, R> {
    /// Without the first `count` rows: an even number, if they are pairs.
    #[inline(always)]
    pub(crate) fn skip(self, count: usize) -> Self {
        match self {
            Self::Floats(rows) => Self::Floats(rows.skip(count)),
            Self::Pairs(rows) => Self::Pairs(rows.skip(count / 2)),
            Self::Tiles(rows) => Self::Tiles(rows.skip(count)),
        }
    }
}

impl<'t> Gemm<'t> {
    /// The fastest way for head dims `d` and `dv`. If that is with tiles, `registers` keeps this thread's tile registers
    /// configured.
    pub(crate) fn new<S: Simd>(is_bf16: bool, d: usize, dv: usize, registers: &'t mut Option<TileRegisters>) -> Self {
        if !is_bf16 {
            return Gemm::Plain;
        }
        if let Some(tiles) = Bf16Tiles::new::<S>(registers) {
            return Gemm::Bf16(Bf16::Tiles(tiles));
        }
        let is_even = d.is_multiple_of(2) && dv.is_multiple_of(2);
        let dot = if is_even { Bf16Dot::new::<S>() } else { None };
        dot.map_or(Gemm::Plain, |dot| Gemm::Bf16(Bf16::Pairs(dot)))
    }

    /// The same scores, with sums in which a weight of zero adds nothing.
    pub(crate) fn nan_safe(self) -> Self {
        Gemm::NanSafe(self.dot_in_pairs())
    }

    /// What computes dp = do·vᵀ: in the careful pass with numbers, which a sum of pairs could not be kept from overflowing.
    pub(crate) fn of_gradients(self) -> Self {
        if let Gemm::NanSafe(_) = self { Gemm::NanSafe(None) } else { self }
    }

    /// What multiplies rows with panels, if that goes by pairs.
    #[inline(always)]
    pub(crate) fn dot_in_pairs(self) -> Option<Bf16<'t>> {
        match self {
            Gemm::Bf16(bf16) => Some(bf16),
            Gemm::NanSafe(bf16) => bf16,
            Gemm::Plain => None,
        }
    }

    /// What sums over rows, if that goes by pairs.
    #[inline(always)]
    pub(crate) fn sum_in_pairs(self) -> Option<Bf16<'t>> {
        if let Gemm::Bf16(bf16) = self { Some(bf16) } else { None }
    }

    /// What sums over rows by tiles.
    #[inline(always)]
    pub(crate) fn sum_by_tiles(self) -> Option<Bf16Tiles<'t>> {
        if let Gemm::Bf16(Bf16::Tiles(tiles)) = self { Some(tiles) } else { None }
    }

    /// What [`Gemm::dot_products`] multiplies scores by, and what is left to the softmax: the scale, where multiplying would take a
    /// pass of its own over the scores, and nothing else is done to them before. (A mask hides with minus infinity.) The greatest
    /// score is found before it is scaled, so the scale has to be positive.
    #[inline(always)]
    pub(crate) fn factors<R: SimdFloat>(self, operands: &Operands<R>) -> (R, R) {
        let scale = R::from_f64(operands.scale);
        let by_tiles = matches!(self.dot_in_pairs(), Some(Bf16::Tiles(_)));
        // The softmax multiplies it by log2(e).
        let fits = scale > R::ZERO && (scale + scale).is_finite();
        if by_tiles && fits && operands.has_plain_scores() { (R::ONE, scale) } else { (scale, R::ONE) }
    }

    /// Rows of a panel for a row of `dim` numbers.
    #[inline(always)]
    pub(crate) fn panel_rows(self, dim: usize) -> usize {
        self.dot_in_pairs().map_or(dim, |bf16| bf16.depth(dim).div_ceil(2))
    }

    /// Operands that `count` numbers to sum over are; each takes the room of a number.
    #[inline(always)]
    pub(crate) fn operands(self, count: usize) -> usize {
        if self.sum_in_pairs().is_some() { count.div_ceil(2) } else { count }
    }

    /// Numbers of scratch for [`Gemm::dot_rows`], and for [`Gemm::pack`] of no more rows.
    #[inline(always)]
    pub(crate) fn dot_size(self, rows: usize, dim: usize) -> usize {
        match self.dot_in_pairs() {
            Some(Bf16::Tiles(_)) => bf16_tiles::copy_size(rows, dim).max(rows * dim),
            _ => rows * dim,
        }
    }

    /// Numbers of scratch for [`Gemm::sum_rows`].
    #[inline(always)]
    pub(crate) fn sum_size(self, rows: usize, dim: usize) -> usize {
        match self.dot_in_pairs() {
            Some(Bf16::Tiles(_)) => bf16_tiles::transposed_size(rows, dim).max(rows * pad(dim)),
            _ => rows * pad(dim),
        }
    }

    /// Rows as panels \[panel_rows(dim)\]\[W\]. If they are pairs, [`Gemm::dot_products`] multiplies by the factor, not this.
    /// `scratch` has [`Gemm::dot_size`] for the rows of a panel.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // those of `pack`
    pub(crate) fn pack<R: SimdFloat, S: Simd>(
        self,
        simd: S,
        source: &dyn Source<R>,
        at: (usize, usize),
        range: &Range<usize>,
        factor: R,
        scratch: &mut [R],
        panels: &mut [R],
    ) {
        match self.dot_in_pairs() {
            Some(bf16) => {
                let depth = bf16.depth(source.dims()[3]);
                pack_pairs::<R, S>(simd, source, at, range, depth, scratch, panels);
            }
            None => pack::<R, S>(simd, source, at, range, factor, scratch, panels),
        }
    }

    /// Rows to multiply with a panel; `scratch` has [`Gemm::dot_size`] for them.
    #[inline(always)]
    pub(crate) fn dot_rows<'m, R: SimdFloat>(
        self,
        source: &'m dyn Source<R>,
        at: (usize, usize),
        range: Range<usize>,
        scratch: &'m mut [R],
    ) -> DotRows<'m, R> {
        let count = range.len();
        match self.dot_in_pairs() {
            Some(Bf16::Pairs(_)) => DotRows::Bf16(bf16_rows(source, at, range)),
            Some(Bf16::Tiles(tiles)) => {
                DotRows::Tiles(tiles.copy(bf16_rows(source, at, range), cast_slice_mut(scratch)), count)
            }
            None => DotRows::Floats(source.rows(at, range, scratch)),
        }
    }

    /// scores\[j\]\[W\] = factor · Σ_d rows\[j\]\[d\] · panel\[d\]\[W\], where `panel` has been packed with the same factor. With `MAX`,
    /// `largest` becomes the greatest of itself and them, lane by lane.
    #[inline(always)]
    pub(crate) fn dot_products<R: SimdFloat, S: Simd, const MAX: bool>(
        self,
        simd: S,
        factor: R,
        panel: &[R],
        rows: DotRows<R>,
        scores: MatrixMut<R>,
        largest: &mut Row<R, S>,
    ) {
        let factor = factor.to_f64() as f32;
        match (self.dot_in_pairs(), rows) {
            (Some(Bf16::Pairs(dot)), DotRows::Bf16(rows)) => {
                let largest = cast_slice_mut::<R::Vector<S>, f32>(largest);
                dot.dot_products::<MAX>(factor, cast_slice(panel), rows, scores.cast(), largest);
            }
            (Some(Bf16::Tiles(tiles)), DotRows::Tiles(rows, count)) => {
                let (panel, rows) = (cast_slice(panel), (rows, count));
                let largest: &mut Row<f32, S> = row_of_f32::<R, S>(largest);
                tiles.dot_products::<S, MAX>(simd, factor, panel, rows, scores.cast(), largest);
            }
            (None, DotRows::Floats(rows)) => {
                microkernel::dot_products::<R, S, MAX>(simd, panel, rows, scores, largest);
            }
            _ => unreachable!("rows and products of the same kind"),
        }
    }

    /// Rows to sum over; `scratch` has [`Gemm::sum_size`] for them.
    ///
    /// A pair is two rows. Sums that start with the second row of a pair need rows of another *phase*:
    /// [`Gemm::phase`] says how far `range` has to be shifted for them.
    #[inline(always)]
    pub(crate) fn sum_rows<'m, R: SimdFloat, S: Simd>(
        self,
        simd: S,
        source: &'m dyn Source<R>,
        at: (usize, usize),
        range: Range<usize>,
        scratch: &'m mut [R],
    ) -> SumRows<'m, R> {
        match self.sum_in_pairs() {
            None => SumRows::Floats(source.rows(at, range, scratch)),
            Some(Bf16::Pairs(dot)) => {
                let rows = bf16_rows(source, at, range);
                let (pairs, dim, stride) = (rows.rows().div_ceil(2), rows.columns(), pad(rows.columns()));
                dot.interleave(rows, MatrixMut::new(&mut *scratch, pairs, stride, stride).cast());
                SumRows::Pairs(Matrix::new(scratch, pairs, dim, stride))
            }
            Some(Bf16::Tiles(tiles)) => {
                SumRows::Tiles(tiles.transpose(simd, bf16_rows(source, at, range), cast_slice_mut(scratch)))
            }
        }
    }

    /// The rows of a block of queries to sum over, pad(dim) apart and multiplied by the factor; pairs are left as they are. The
    /// rest of `to` becomes zero. `scratch` has room for the rows.
    #[inline(always)]
    pub(crate) fn query_rows<R: SimdFloat>(
        self,
        source: &dyn Source<R>,
        at: (usize, usize),
        range: &Range<usize>,
        factor: R,
        scratch: &mut [R],
        to: &mut [R],
    ) {
        let (dim, stride) = (source.dims()[3], pad(source.dims()[3]));
        let count = self.operands(range.len());
        let (rows, behind) = to.split_at_mut(count * stride);
        behind.fill(R::ZERO);
        if let Some(bf16) = self.sum_in_pairs() {
            let from = bf16_rows(source, at, range.clone());
            return bf16.dot().interleave(from, MatrixMut::new(rows, count, stride, stride).cast());
        }
        let from = source.rows(at, range.clone(), scratch);
        for (i, row) in rows.chunks_exact_mut(stride).enumerate() {
            let (row, behind) = row.split_at_mut(dim);
            row.iter_mut().zip(from.row(i)).for_each(|(to, x)| *to = *x * factor);
            behind.fill(R::ZERO);
        }
    }

    /// How many rows those to sum over have to be shifted by, so that the one that is `skip` behind the first starts a pair.
    #[inline(always)]
    pub(crate) fn phase(self, skip: usize) -> usize {
        if let Some(Bf16::Pairs(_)) = self.sum_in_pairs() { skip % 2 } else { 0 }
    }

    /// panel\[c\]\[W\] = factor\[W\] · panel\[c\]\[W\] + Σ_j rows\[j\]\[c\] · weights\[j\]\[W\]. Overwrites the weights.
    #[inline(always)]
    pub(crate) fn accumulate<R: SimdFloat, S: Simd>(
        self,
        simd: S,
        panel: &mut [R],
        factor: Row<R, S>,
        rows: SumRows<R>,
        weights: MatrixMut<R>,
    ) {
        match (self, rows) {
            (Gemm::Plain, SumRows::Floats(rows)) => {
                microkernel::accumulate::<R, S>(simd, panel, factor, rows, weights.as_ref());
            }
            (Gemm::NanSafe(_), SumRows::Floats(rows)) => {
                nan_safe::accumulate::<R, S>(simd, panel, factor, rows, weights.as_ref());
            }
            (Gemm::Bf16(Bf16::Pairs(dot)), SumRows::Pairs(rows)) => {
                let weights = dot.narrow_down(weights.cast());
                let factor = cast_slice::<R::Vector<S>, f32>(&factor);
                dot.accumulate(cast_slice_mut(panel), factor, rows.cast(), weights.as_ref());
            }
            (Gemm::Bf16(Bf16::Tiles(tiles)), SumRows::Tiles(rows)) => {
                let weights = tiles.dot().narrow_down(weights.cast());
                let mut factor = factor;
                let factor: Row<f32, S> = *row_of_f32::<R, S>(&mut factor);
                tiles.accumulate(simd, cast_slice_mut(panel), factor, rows, weights.as_ref());
            }
            _ => unreachable!("rows and sums of the same kind"),
        }
    }

    /// out\[j\]\[c\] += factor · Σ_i weights\[j\]\[i\] · rows\[i\]\[c\] over operands i, where the factor is for pairs alone. The columns are
    /// a multiple of the lanes.
    #[inline(always)]
    pub(crate) fn outer_products<R: SimdFloat, S: Simd>(
        self,
        simd: S,
        factor: R,
        out: MatrixMut<R>,
        weights: Matrix<R>,
        rows: Matrix<R>,
    ) {
        match self {
            Gemm::Plain => microkernel::outer_products::<R, S>(simd, out, weights, rows),
            Gemm::NanSafe(_) => nan_safe::outer_products::<R, S>(simd, out, weights, rows),
            Gemm::Bf16(Bf16::Pairs(dot)) => {
                dot.outer_products(factor.to_f64() as f32, out.cast(), weights.cast(), rows.cast());
            }
            Gemm::Bf16(Bf16::Tiles(tiles)) => {
                tiles.outer_products(simd, factor.to_f64() as f32, out.cast(), weights.cast(), rows.cast());
            }
        }
    }
}

/// The rows of a tensor that holds bf16: no other has products of bf16.
#[inline(always)]
fn bf16_rows<R>(source: &dyn Source<R>, at: (usize, usize), range: Range<usize>) -> Matrix<'_, u16> {
    source.bf16_rows(at, range).expect("a tensor of bf16")
}

/// The vectors of f32 that those of `R` are: bf16 is computed in f32.
#[inline(always)]
fn row_of_f32<R: SimdFloat, S: Simd>(row: &mut Row<R, S>) -> &mut Row<f32, S> {
    cast_slice_mut::<R::Vector<S>, <f32 as SimdFloat>::Vector<S>>(row).first_chunk_mut().expect("as many vectors")
}
