//! The products of both passes, computed in the way that suits the data.

use std::ops::Range;

use pulp::Simd;

use super::careful;
use super::element::Element;
use super::micro::{self, Rows, VECTORS};
use super::pairs::Pairs;
use super::panels::{pack, pack_pairs};
use super::problem::View;
use super::real::Real;

/// How products are computed, which decides how their operands lie in memory: as numbers, or as pairs of bf16, each in the
/// room of a number.
#[derive(Clone, Copy)]
pub(crate) enum Products {
    Plain,
    ByPairs(Pairs),
    /// A weight of zero adds nothing, be its row infinite or NaN. Slow: this is for data that is.
    Careful,
}

/// Rows of a tensor to multiply with a panel.
#[derive(Clone, Copy)]
pub(crate) enum RowsToDot<E: Element> {
    Numbers(Rows<*const E::Real>),
    /// As the tensor holds them.
    Raw(Rows<*const E>),
}

impl<E: Element> RowsToDot<E> {
    /// The rows behind the first few.
    ///
    /// # Safety
    ///
    /// There are as many.
    #[inline(always)]
    pub(crate) unsafe fn skip(self, count: usize) -> Self {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Self::Numbers(rows) => Self::Numbers(rows.skip(count)),
                Self::Raw(rows) => Self::Raw(rows.skip(count)),
            }
        }
    }
}

impl Products {
    pub(crate) fn new<E: Element, S: Simd>(d: usize, dv: usize) -> Self {
        Pairs::new::<E, S>(d, dv).map_or(Products::Plain, Products::ByPairs)
    }

    pub(crate) fn by_pairs(self) -> Option<Pairs> {
        if let Products::ByPairs(pairs) = self { Some(pairs) } else { None }
    }

    /// Operands that `count` numbers of a row are, of which each takes the room of a number.
    #[inline(always)]
    pub(crate) fn operands(self, count: usize) -> usize {
        if self.by_pairs().is_some() { count.div_ceil(2) } else { count }
    }

    /// Rows as panels [operands(dim)][W]. The factor is left to [`Products::dot_products`] where they are pairs.
    ///
    /// # Safety
    ///
    /// There is room for the panels, and in `scratch` for one.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // those of `pack`
    pub(crate) unsafe fn pack<E: Element, S: Simd>(
        self,
        simd: S,
        view: &View<E>,
        at: (usize, usize),
        range: &Range<usize>,
        factor: E::Real,
        scratch: &mut [E::Real],
        panels: *mut E::Real,
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Products::ByPairs(_) => pack_pairs::<E, S>(simd, view, at, range, scratch, panels),
                _ => pack::<E, S>(simd, view, at, range, factor, scratch, panels),
            }
        }
    }

    /// Rows to multiply with a panel; `scratch` has room for them.
    #[inline(always)]
    pub(crate) fn rows_to_dot<E: Element>(
        self,
        view: &View<E>,
        at: (usize, usize),
        range: Range<usize>,
        scratch: &mut [E::Real],
    ) -> RowsToDot<E> {
        match self {
            Products::ByPairs(_) => RowsToDot::Raw(view.raw_rows(at, range.start)),
            _ => RowsToDot::Numbers(view.rows(at, range, scratch)),
        }
    }

    /// scores[j][W] = factor · Σ_d rows[j][d] · panel[d][W] for `count` rows. With `MAX`, `largest` becomes the greatest of
    /// itself and them, lane by lane.
    ///
    /// # Safety
    ///
    /// `panel` has been packed from rows of d with the same factor, `rows` has `count` rows of d, `scores` `count` rows of W.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // those of the kernels
    pub(crate) unsafe fn dot_products<E: Element, S: Simd, const MAX: bool>(
        self,
        simd: S,
        d: usize,
        factor: E::Real,
        panel: *const E::Real,
        rows: RowsToDot<E>,
        count: usize,
        scores: Rows<*mut E::Real>,
        largest: &mut [<E::Real as Real>::Vector<S>; VECTORS],
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            match (self, rows) {
                (Products::ByPairs(pairs), RowsToDot::Raw(rows)) => {
                    let (factor, largest) = (factor.to_f64() as f32, largest.as_mut_ptr().cast());
                    pairs.dot_products::<MAX>(d / 2, factor, panel.cast(), rows.cast(), count, scores.cast(), largest);
                }
                (_, RowsToDot::Numbers(rows)) => {
                    micro::dot_products::<E::Real, S, MAX>(simd, d, panel, rows, count, scores, largest);
                }
                _ => unreachable!("rows and products of the same kind"),
            }
        }
    }

    /// Rows to sum over; `scratch` has room for as many of pad(dim).
    ///
    /// A pair is two rows. What starts with the second of two needs rows of another *phase*: those of
    /// [`Products::phase`] serve from `start` on.
    #[inline(always)]
    pub(crate) fn rows_to_sum<E: Element>(
        self,
        view: &View<E>,
        at: (usize, usize),
        range: Range<usize>,
        scratch: &mut [E::Real],
    ) -> Rows<*const E::Real> {
        let Some(pairs) = self.by_pairs() else { return view.rows(at, range, scratch) };
        let (dim, stride) = (view.dims()[3], micro::pad(view.dims()[3]));
        let (from, to) = (view.raw_rows(at, range.start), Rows { start: scratch.as_mut_ptr(), stride });
        // SAFETY: the view has the rows, and half as many of pairs have room.
        unsafe { pairs.interleave(from.cast(), range.len(), dim, to.cast()) };
        Rows { start: scratch.as_ptr(), stride }
    }

    /// The rows of a block of queries, pad(dim) apart, multiplied by the factor, to sum over; pairs are left as they are. Zeros
    /// behind the last.
    ///
    /// # Safety
    ///
    /// `to` has room for the rows, in whole vectors.
    #[inline(always)]
    pub(crate) unsafe fn rows_of_block<E: Element>(
        self,
        view: &View<E>,
        (b, h): (usize, usize),
        range: &Range<usize>,
        factor: E::Real,
        to: &mut [E::Real],
    ) {
        let (dim, stride) = (view.dims()[3], micro::pad(view.dims()[3]));
        let (rows, behind) = to.split_at_mut(self.operands(range.len()) * stride);
        behind.fill(E::Real::ZERO);
        if let Some(pairs) = self.by_pairs() {
            let (from, to) = (view.raw_rows((b, h), range.start), Rows { start: rows.as_mut_ptr(), stride });
            // SAFETY: the view has the rows, and there is room for half as many of pairs.
            unsafe { pairs.interleave(from.cast(), range.len(), dim, to.cast()) };
            return;
        }
        for (i, row) in range.clone().zip(rows.chunks_exact_mut(stride)) {
            let (row, behind) = row.split_at_mut(dim);
            E::widen_all(view.row(b, h, i), row);
            row.iter_mut().for_each(|x| *x *= factor);
            behind.fill(E::Real::ZERO);
        }
    }

    /// How many rows those to sum over have to be shifted by, so that one that is `skip` behind the first starts a pair.
    #[inline(always)]
    pub(crate) fn phase(self, skip: usize) -> usize {
        if self.by_pairs().is_some() { skip % 2 } else { 0 }
    }

    /// panel[c][W] = factor[W] · panel[c][W] + Σ_j rows[j][c] · weights[j][W] over `count` rows. Leaves nothing of the
    /// weights.
    ///
    /// # Safety
    ///
    /// `panel` has columns · W numbers, `rows` are `count` rows to sum over, `weights` has `count` rows of W, which for pairs lie
    /// close together.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // those of the kernels
    pub(crate) unsafe fn accumulate<R: Real, S: Simd>(
        self,
        simd: S,
        columns: usize,
        panel: *mut R,
        factor: [R::Vector<S>; VECTORS],
        rows: Rows<*const R>,
        count: usize,
        weights: Rows<*mut R>,
    ) {
        let numbers = weights.cast_const();
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Products::Plain => micro::accumulate::<R, S>(simd, columns, panel, factor, rows, count, numbers),
                Products::Careful => careful::accumulate::<R, S>(simd, columns, panel, factor, rows, count, numbers),
                Products::ByPairs(pairs) => {
                    pairs.narrow_down(numbers.cast(), count, weights.start.cast());
                    let (factor, weights) = (factor.as_ptr().cast(), numbers.start.cast());
                    pairs.accumulate(columns, panel.cast(), factor, rows.cast(), count.div_ceil(2), weights);
                }
            }
        }
    }

    /// out[j][c] += factor · Σ_i weights[j][i] · rows[i][c] for `count` rows j, `inner` operands i and `columns` columns, a
    /// multiple of the lanes. The factor is for pairs alone.
    ///
    /// # Safety
    ///
    /// `out` has `count` rows of `columns`, `rows` `inner` rows of `columns`, `weights` `count` rows of `inner`.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // those of the kernels
    pub(crate) unsafe fn outer_products<R: Real, S: Simd>(
        self,
        simd: S,
        columns: usize,
        factor: R,
        out: Rows<*mut R>,
        count: usize,
        weights: Rows<*const R>,
        inner: usize,
        rows: Rows<*const R>,
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Products::Plain => micro::outer_products::<R, S>(simd, columns, out, count, weights, inner, rows),
                Products::Careful => careful::outer_products::<R, S>(simd, columns, out, count, weights, inner, rows),
                Products::ByPairs(pairs) => {
                    let factor = factor.to_f64() as f32;
                    pairs.outer_products(columns, factor, out.cast(), count, weights.cast(), inner, rows.cast());
                }
            }
        }
    }
}
