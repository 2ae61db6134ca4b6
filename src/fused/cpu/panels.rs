//! Rows of a tensor as panels, and panels as rows.

use std::ops::Range;

use pulp::Simd;

use super::element::Element;
use super::micro::{Rows, panel_width};
use super::problem::View;
use super::real::Real;
use super::transpose::transpose;

/// The places `range` as panels [dim][W], multiplied by `factor`; zeros in the lanes behind the last.
///
/// # Safety
///
/// `panels` has room for the panels, and `scratch`, if the element has to be widened, for a panel.
#[inline(always)]
pub(crate) unsafe fn pack<E: Element, S: Simd>(
    simd: S,
    view: &View<E>,
    at: (usize, usize),
    range: &Range<usize>,
    factor: E::Real,
    scratch: &mut [E::Real],
    panels: *mut E::Real,
) {
    let width = panel_width::<E::Real, S>();
    let dim = view.dims()[3];
    for (panel, start) in range.clone().step_by(width).enumerate() {
        let places = start..(start + width).min(range.end);
        let count = places.len();
        let rows = view.rows(at, places, scratch);
        // SAFETY: as the caller promises; the view has the rows.
        unsafe {
            let to = Rows { start: panels.add(panel * dim * width), stride: width };
            transpose::<E::Real, S, false>(simd, count, dim, factor, rows, to);
            zero_behind(count, dim, width, to);
        }
    }
}

/// As [`pack`], for rows of half numbers as they are: panels [dim / 2][W] of pairs.
///
/// # Safety
///
/// The element has 16 bits, dim is even, `panels` has room for the panels and `scratch` for a panel.
#[inline(always)]
pub(crate) unsafe fn pack_pairs<E: Element, S: Simd>(
    simd: S,
    view: &View<E>,
    (b, h): (usize, usize),
    range: &Range<usize>,
    scratch: &mut [E::Real],
    panels: *mut E::Real,
) {
    let width = panel_width::<E::Real, S>();
    let pairs = view.dims()[3] / 2;
    for (panel, start) in range.clone().step_by(width).enumerate() {
        let count = width.min(range.end - start);
        // SAFETY: as the caller promises; a pair takes the room of a number to compute with.
        unsafe {
            for (i, to) in scratch.chunks_exact_mut(pairs).enumerate().take(count) {
                to.as_mut_ptr().cast::<E>().copy_from_nonoverlapping(view.row(b, h, start + i).as_ptr(), 2 * pairs);
            }
            let rows = Rows { start: scratch.as_ptr(), stride: pairs };
            let to = Rows { start: panels.add(panel * pairs * width), stride: width };
            transpose::<E::Real, S, false>(simd, count, pairs, E::Real::ONE, rows, to);
            zero_behind(count, pairs, width, to);
        }
    }
}

/// Zeros in the lanes of a panel behind the first `count`.
///
/// # Safety
///
/// `panel` has `rows` rows of `width`.
#[inline(always)]
unsafe fn zero_behind<R: Real>(count: usize, rows: usize, width: usize, panel: Rows<*mut R>) {
    for row in 0..rows {
        // SAFETY: as the caller promises.
        unsafe {
            std::slice::from_raw_parts_mut(panel.start.add(row * panel.stride + count), width - count).fill(R::ZERO)
        };
    }
}

/// The first `count` lanes of a panel [dim][W] as rows, multiplied by `factor`.
///
/// # Safety
///
/// `panel` has dim · W numbers, `rows` `count` rows of dim, and `scratch`, if the element has to be narrowed, room for as
/// many.
#[inline(always)]
pub(crate) unsafe fn unpack<E: Element, S: Simd>(
    simd: S,
    panel: *const E::Real,
    dim: usize,
    count: usize,
    factor: E::Real,
    scratch: &mut [E::Real],
    rows: Rows<*mut E>,
) {
    let panel = Rows { start: panel, stride: panel_width::<E::Real, S>() };
    // SAFETY: as the caller promises.
    unsafe {
        if let Some(start) = E::as_real_mut(rows.start) {
            transpose::<E::Real, S, false>(simd, dim, count, factor, panel, Rows { start, stride: rows.stride });
            return;
        }
        transpose::<E::Real, S, false>(
            simd,
            dim,
            count,
            factor,
            panel,
            Rows { start: scratch.as_mut_ptr(), stride: dim },
        );
        for (i, row) in scratch.chunks_exact(dim).enumerate().take(count) {
            E::narrow_all(row, rows.start.add(i * rows.stride));
        }
    }
}
