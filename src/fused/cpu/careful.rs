//! The inner loops once more, for data that holds something infinite or NaN behind a mask: zero times that is NaN, and a
//! weight of zero has to mean nothing at all.

use pulp::Simd;

use super::micro::{Rows, VECTORS, load, store};
use super::real::Real;

/// As [`micro::accumulate`](super::micro::accumulate), to the last bit, but a weight of zero adds nothing, be the row infinite
/// or NaN.
///
/// # Safety
///
/// As there.
#[inline(always)]
pub(crate) unsafe fn accumulate<R: Real, S: Simd>(
    simd: S,
    d: usize,
    panel: *mut R,
    factor: [R::Vector<S>; VECTORS],
    rows: Rows<*const R>,
    count: usize,
    weights: Rows<*const R>,
) {
    let lanes = R::lanes::<S>();
    for i in 0..d {
        for (v, factor) in factor.into_iter().enumerate() {
            // SAFETY: as the caller promises.
            unsafe {
                let place = panel.add((i * VECTORS + v) * lanes);
                let mut sum = R::splat(simd, R::ZERO);
                for j in 0..count {
                    let x = R::splat(simd, *rows.start.add(j * rows.stride + i));
                    let weight = load::<R, S>(weights.start.add(j * weights.stride + v * lanes));
                    sum = R::if_zero(simd, weight, sum, R::mul_add(simd, x, weight, sum));
                }
                store::<R, S>(place, R::mul_add(simd, factor, load::<R, S>(place), sum));
            }
        }
    }
}

/// As [`micro::outer_products`](super::micro::outer_products), to the last bit, but a weight of zero adds nothing, be the row
/// infinite or NaN.
///
/// # Safety
///
/// As there.
#[inline(always)]
pub(crate) unsafe fn outer_products<R: Real, S: Simd>(
    simd: S,
    columns: usize,
    out: Rows<*mut R>,
    count: usize,
    weights: Rows<*const R>,
    inner: usize,
    rows: Rows<*const R>,
) {
    for j in 0..count {
        for column in (0..columns).step_by(R::lanes::<S>()) {
            // SAFETY: as the caller promises.
            unsafe {
                let mut sum = R::splat(simd, R::ZERO);
                for i in 0..inner {
                    let weight = *weights.start.add(j * weights.stride + i);
                    if weight != R::ZERO {
                        let x = load::<R, S>(rows.start.add(i * rows.stride + column));
                        sum = R::mul_add(simd, R::splat(simd, weight), x, sum);
                    }
                }
                let place = out.start.add(j * out.stride + column);
                store::<R, S>(place, R::vadd(simd, load::<R, S>(place), sum));
            }
        }
    }
}
