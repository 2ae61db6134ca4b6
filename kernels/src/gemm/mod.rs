//! The matrix products of both passes, each computed in the way that suits the data.

pub(crate) mod bf16_dot;
pub(crate) mod microkernel;
pub(crate) mod nan_safe;
pub(crate) mod pack;
pub(crate) mod transpose;

use std::ops::Range;

use pulp::Simd;
use pulp::bytemuck::{cast_slice, cast_slice_mut};

use crate::dtype::Source;
use crate::gemm::bf16_dot::Bf16Dot;
use crate::gemm::microkernel::{Row, pad};
use crate::gemm::pack::{pack, pack_pairs};
use crate::matrix::{Matrix, MatrixMut};
use crate::simd::SimdFloat;

/// How products are computed, which decides how their operands lie in memory: as numbers, or as pairs of bf16, each in the
/// room of a number.
#[derive(Clone, Copy)]
pub(crate) enum Gemm {
    /// With numbers of type f32 or f64.
    Plain,
    /// With pairs of bf16.
    Bf16(Bf16Dot),
    /// Scores as with pairs of bf16, if there are any, else as with numbers: to the last bit as the fast ways compute them. Sums
    /// with numbers, where a weight of zero adds nothing, even if its row is infinite or NaN. Slow: see [`nan_safe`].
    NanSafe(Option<Bf16Dot>),
}

/// Rows of a tensor to multiply with a panel.
#[derive(Clone, Copy)]
pub(crate) enum DotRows<'a, R> {
    /// As numbers to compute with.
    Floats(Matrix<'a, R>),
    /// As the tensor holds them.
    Bf16(Matrix<'a, u16>),
}

impl<'a, R> DotRows<'a, R> {
    /// The `count` rows from `first` on.
    #[inline(always)]
    pub(crate) fn part(self, first: usize, count: usize) -> Self {
        match self {
            Self::Floats(rows) => Self::Floats(rows.skip(first).take(count)),
            Self::Bf16(rows) => Self::Bf16(rows.skip(first).take(count)),
        }
    }
}

impl Gemm {
    /// The fastest way for head dims `d` and `dv`.
    pub(crate) fn new<S: Simd>(is_bf16: bool, d: usize, dv: usize) -> Self {
        let bf16_dot = if is_bf16 { Bf16Dot::new::<S>(d, dv) } else { None };
        bf16_dot.map_or(Gemm::Plain, Gemm::Bf16)
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
    pub(crate) fn dot_in_pairs(self) -> Option<Bf16Dot> {
        match self {
            Gemm::Bf16(dot) => Some(dot),
            Gemm::NanSafe(dot) => dot,
            Gemm::Plain => None,
        }
    }

    /// What sums over rows, if that goes by pairs.
    #[inline(always)]
    pub(crate) fn sum_in_pairs(self) -> Option<Bf16Dot> {
        if let Gemm::Bf16(dot) = self { Some(dot) } else { None }
    }

    /// Rows of a panel for a row of `dim` numbers.
    #[inline(always)]
    pub(crate) fn panel_rows(self, dim: usize) -> usize {
        if self.dot_in_pairs().is_some() { dim.div_ceil(2) } else { dim }
    }

    /// Operands that `count` numbers to sum over are; each takes the room of a number.
    #[inline(always)]
    pub(crate) fn operands(self, count: usize) -> usize {
        if self.sum_in_pairs().is_some() { count.div_ceil(2) } else { count }
    }

    /// Rows as panels \[panel_rows(dim)\]\[W\]. If they are pairs, [`Gemm::dot_products`] multiplies by the factor, not this.
    /// `scratch` has room for the rows of a panel.
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
            Some(_) => pack_pairs::<R, S>(simd, source, at, range, scratch, panels),
            None => pack::<R, S>(simd, source, at, range, factor, scratch, panels),
        }
    }

    /// Rows to multiply with a panel; `scratch` has room for them.
    #[inline(always)]
    pub(crate) fn dot_rows<'m, R: SimdFloat>(
        self,
        source: &'m dyn Source<R>,
        at: (usize, usize),
        range: Range<usize>,
        scratch: &'m mut [R],
    ) -> DotRows<'m, R> {
        match self.dot_in_pairs() {
            Some(_) => DotRows::Bf16(source.bf16_rows(at, range).expect("a tensor of bf16")),
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
        match (self.dot_in_pairs(), rows) {
            (Some(dot), DotRows::Bf16(rows)) => {
                let largest = cast_slice_mut::<R::Vector<S>, f32>(largest);
                dot.dot_products::<MAX>(factor.to_f64() as f32, cast_slice(panel), rows, scores.cast(), largest);
            }
            (None, DotRows::Floats(rows)) => {
                microkernel::dot_products::<R, S, MAX>(simd, panel, rows, scores, largest);
            }
            _ => unreachable!("rows and products of the same kind"),
        }
    }

    /// Rows to sum over; `scratch` has room for as many of pad(dim).
    ///
    /// A pair is two rows. Sums that start with the second row of a pair need rows of another *phase*:
    /// [`Gemm::phase`] says how far `range` has to be shifted for them.
    #[inline(always)]
    pub(crate) fn sum_rows<'m, R: SimdFloat>(
        self,
        source: &'m dyn Source<R>,
        at: (usize, usize),
        range: Range<usize>,
        scratch: &'m mut [R],
    ) -> Matrix<'m, R> {
        let Some(dot) = self.sum_in_pairs() else { return source.rows(at, range, scratch) };
        let rows = source.bf16_rows(at, range).expect("a tensor of bf16");
        let (pairs, dim, stride) = (rows.rows().div_ceil(2), rows.columns(), pad(rows.columns()));
        dot.interleave(rows, MatrixMut::new(&mut *scratch, pairs, stride, stride).cast());
        Matrix::new(scratch, pairs, dim, stride)
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
        if let Some(dot) = self.sum_in_pairs() {
            let from = source.bf16_rows(at, range.clone()).expect("a tensor of bf16");
            return dot.interleave(from, MatrixMut::new(rows, count, stride, stride).cast());
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
        if self.sum_in_pairs().is_some() { skip % 2 } else { 0 }
    }

    /// panel\[c\]\[W\] = factor\[W\] · panel\[c\]\[W\] + Σ_j rows\[j\]\[c\] · weights\[j\]\[W\]. Overwrites the weights.
    #[inline(always)]
    pub(crate) fn accumulate<R: SimdFloat, S: Simd>(
        self,
        simd: S,
        panel: &mut [R],
        factor: Row<R, S>,
        rows: Matrix<R>,
        weights: MatrixMut<R>,
    ) {
        match self {
            Gemm::Plain => microkernel::accumulate::<R, S>(simd, panel, factor, rows, weights.as_ref()),
            Gemm::NanSafe(_) => nan_safe::accumulate::<R, S>(simd, panel, factor, rows, weights.as_ref()),
            Gemm::Bf16(dot) => {
                let weights = dot.narrow_down(weights.cast());
                let factor = cast_slice::<R::Vector<S>, f32>(&factor);
                dot.accumulate(cast_slice_mut(panel), factor, rows.cast(), weights.as_ref());
            }
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
            Gemm::Bf16(dot) => {
                dot.outer_products(factor.to_f64() as f32, out.cast(), weights.cast(), rows.cast());
            }
        }
    }
}
