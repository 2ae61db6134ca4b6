//! What happens to the scores of a panel between the dot products and the exponential.

use std::ops::Range;

use pulp::Simd;

use super::dropout::philox_lanes;
use super::element::Element;
use super::micro::{Rows, load_up_to, store};
use super::problem::Problem;
use super::real::Real;
use super::transpose::transpose;
use crate::mask::Coverage;
use crate::philox::dropout_threshold;

/// A panel's scores: a row for each key of `keys`, in it a number for each query from `first_query` on.
pub(crate) struct Tile {
    pub(crate) at: (usize, usize),
    pub(crate) first_query: usize,
    /// Queries that are there; the lanes behind them hold nothing of interest.
    pub(crate) queries: usize,
    pub(crate) width: usize,
    pub(crate) keys: Range<usize>,
}

impl Tile {
    /// # Safety
    ///
    /// `rows` has a row of `width` numbers for each key; each is borrowed once at a time.
    #[inline(always)]
    unsafe fn row<'x, R>(&self, rows: Rows<*mut R>, j: usize) -> &'x mut [R] {
        // SAFETY: the caller has a row of `width` for each key, and uses one at a time.
        unsafe { std::slice::from_raw_parts_mut(rows.start.add(j * rows.stride), self.width) }
    }

    /// Softcap, bias, ALiBi and the mask. With a softcap, tanh(s / cap) is left in
    /// `tanh`, if given, for the backward pass.
    ///
    /// # Safety
    ///
    /// `scores` and `tanh` have a row of `width` numbers for each key.
    #[inline(always)]
    pub(crate) unsafe fn adjust<E: Element, S: Simd>(
        &self,
        simd: S,
        problem: &Problem<E>,
        coverage: Coverage,
        scores: Rows<*mut E::Real>,
        tanh: Option<Rows<*mut E::Real>>,
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            if let Some(cap) = problem.softcap {
                self.softcap(simd, E::Real::from_f64(cap), scores, tanh);
            }
            if problem.bias.is_some() {
                self.add_bias(simd, problem, scores);
            }
            if let Some(slope) = problem.slope(self.at) {
                self.subtract_distances(problem, slope, scores);
            }
            if coverage == Coverage::Some {
                self.hide(problem, scores, -E::Real::INFINITY);
            }
        }
    }

    /// # Safety
    ///
    /// As [`Tile::adjust`].
    #[inline(always)]
    unsafe fn softcap<R: Real, S: Simd>(&self, simd: S, cap: R, scores: Rows<*mut R>, tanh: Option<Rows<*mut R>>) {
        let lanes = R::lanes::<S>();
        let (per_cap, cap) = (R::splat(simd, R::ONE / cap), R::splat(simd, cap));
        for j in 0..self.keys.len() {
            // SAFETY: as the caller promises.
            let row = unsafe { self.row(scores, j) };
            for (at, scores) in row.chunks_mut(lanes).enumerate() {
                // SAFETY: the chunk has as many numbers as it says; `tanh` has room for as many as `scores`.
                unsafe {
                    let score = load_up_to::<R, S>(simd, scores.as_ptr(), scores.len());
                    let t = bounded_tanh::<R, S>(simd, R::vmul(simd, score, per_cap));
                    if let Some(tanh) = tanh {
                        let place = tanh.start.add(j * tanh.stride + at * lanes);
                        store_up_to::<R, S>(std::slice::from_raw_parts_mut(place, scores.len()), t);
                    }
                    store_up_to::<R, S>(scores, R::vmul(simd, t, cap));
                }
            }
        }
    }

    /// # Safety
    ///
    /// As [`Tile::adjust`].
    #[inline(always)]
    unsafe fn add_bias<E: Element, S: Simd>(&self, simd: S, problem: &Problem<E>, scores: Rows<*mut E::Real>) {
        let Some(bias) = problem.bias else { return };
        let [sb, sh, si, sj] = bias.strides;
        let head = self.at.0 * sb + self.at.1 * sh;
        if si == 0 {
            for (j, key) in self.keys.clone().enumerate() {
                let x = bias.data[head + key * sj];
                // SAFETY: as the caller promises.
                unsafe { self.row(scores, j) }.iter_mut().for_each(|s| *s += x);
            }
            return;
        }
        let first = &bias.data[head + self.first_query * si + self.keys.start * sj..];
        let (queries, keys) = (self.queries, self.keys.len());
        if sj == 1 && (queries - 1) * si + keys <= first.len() {
            let from = Rows { start: first.as_ptr(), stride: si };
            // SAFETY: the rows have just been checked; `queries` is at most `width`.
            unsafe { transpose::<E::Real, S, true>(simd, queries, keys, E::Real::ONE, from, scores) };
            return;
        }
        for i in 0..queries {
            for j in 0..keys {
                // SAFETY: as the caller promises; `queries` is at most `width`.
                unsafe { *scores.start.add(j * scores.stride + i) += first[i * si + j * sj] };
            }
        }
    }

    /// # Safety
    ///
    /// As [`Tile::adjust`].
    #[inline(always)]
    unsafe fn subtract_distances<E: Element>(&self, problem: &Problem<E>, slope: E::Real, scores: Rows<*mut E::Real>) {
        let shape = problem.shape();
        let first = (shape.kv_len + self.first_query) as f64 - shape.q_len as f64;
        for (j, key) in self.keys.clone().enumerate() {
            // SAFETY: as the caller promises.
            let row = unsafe { self.row(scores, j) };
            for (i, s) in row.iter_mut().enumerate() {
                *s -= slope * E::Real::from_f64((first + i as f64 - key as f64).abs());
            }
        }
    }

    /// Replaces the numbers of what the mask hides.
    ///
    /// # Safety
    ///
    /// `numbers` has a row of `width` numbers for each key.
    #[inline(always)]
    pub(crate) unsafe fn hide<E: Element>(&self, problem: &Problem<E>, numbers: Rows<*mut E::Real>, with: E::Real) {
        let queries = self.first_query..self.first_query + self.queries;
        let shape = problem.shape();
        for (j, key) in self.keys.clone().enumerate() {
            // SAFETY: as the caller promises.
            let row = unsafe { self.row(numbers, j) };
            problem.mask.rule().hidden(&shape, self.at, &queries, key, &mut |hidden| {
                let lanes = hidden.start - self.first_query..hidden.end - self.first_query;
                row[lanes].fill(with);
            });
        }
    }

    /// Zeros for what the mask hides and in the lanes behind the last query, whatever an infinite or NaN row made of them.
    ///
    /// # Safety
    ///
    /// `numbers` has a row of `width` numbers for each key.
    pub(crate) unsafe fn zero_nobodys<E: Element>(
        &self,
        problem: &Problem<E>,
        coverage: Coverage,
        numbers: Rows<*mut E::Real>,
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            if coverage == Coverage::Some {
                self.hide(problem, numbers, E::Real::ZERO);
            }
            for j in 0..self.keys.len() {
                self.row(numbers, j)[self.queries..].fill(E::Real::ZERO);
            }
        }
    }

    /// What dropout multiplies each weight by.
    ///
    /// # Safety
    ///
    /// `factors` has a row of `width` numbers for each key.
    #[inline(always)]
    pub(crate) unsafe fn dropout_factors<E: Element, S: Simd>(
        &self,
        simd: S,
        problem: &Problem<E>,
        factors: Rows<*mut E::Real>,
    ) {
        let Some(dropout) = problem.dropout else { return };
        let threshold = dropout_threshold(dropout.p);
        let keep = E::Real::from_f64(1.0 / (1.0 - dropout.p));
        let head = (self.at.0 * problem.shape().num_heads + self.at.1) as u64;
        for block in self.keys.start / 4..self.keys.end.div_ceil(4) {
            for lane in (0..self.width).step_by(S::U32_LANES) {
                let query = (self.first_query + lane) as u32;
                let counter = [block as u32, query, head as u32, (head >> 32) as u32];
                let numbers = philox_lanes(simd, dropout.seed, counter);
                for (key, numbers) in (block * 4..).zip(numbers).filter(|(key, _)| self.keys.contains(key)) {
                    // SAFETY: as the caller promises.
                    let row = unsafe { self.row(factors, key - self.keys.start) };
                    let lanes = lane..(lane + S::U32_LANES).min(self.width);
                    for (factor, number) in row[lanes].iter_mut().zip(numbers) {
                        *factor = if number < threshold { E::Real::ZERO } else { keep };
                    }
                }
            }
        }
    }
}

/// As much of a vector as there is room for.
#[inline(always)]
fn store_up_to<R: Real, S: Simd>(numbers: &mut [R], x: R::Vector<S>) {
    let mut all = [R::ZERO; 16];
    // SAFETY: a vector has at most 16 numbers.
    unsafe { store::<R, S>(all.as_mut_ptr(), x) };
    let count = numbers.len();
    numbers.copy_from_slice(&all[..count]);
}

/// tanh(x), to within a few units in the last place.
///
/// Source: Moshier, "Methods and Programs for Mathematical Functions" (1989), and its Cephes library: near 0 a rational
/// approximation, elsewhere 1 - 2 / (e^(2|x|) + 1).
#[inline(always)]
fn bounded_tanh<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> R::Vector<S> {
    const NEAR_ZERO: f64 = 0.625;
    // From here on, tanh is 1 to the last bit of an f64.
    const LARGEST: f64 = 20.0;
    const NUMERATOR: [f64; 3] = [-1.614_687_684_417_084_5e3, -9.928_772_310_019_185e1, -9.643_991_794_250_523e-1];
    const DENOMINATOR: [f64; 4] = [4.844_063_053_251_255e3, 2.235_488_390_601_004_5e3, 1.128_116_784_916_329_3e2, 1.0];
    macro_rules! splat {
        ($x:expr) => {
            R::splat(simd, R::from_f64($x))
        };
    }
    let negative = R::vsub(simd, splat!(0.0), x);
    let magnitude = R::if_negative(simd, x, negative, x);
    let beyond = R::vsub(simd, splat!(LARGEST), magnitude);
    let bounded = R::if_negative(simd, beyond, splat!(LARGEST), magnitude);

    let square = R::vmul(simd, bounded, bounded);
    let mut numerator = splat!(NUMERATOR[2]);
    numerator = R::mul_add(simd, numerator, square, splat!(NUMERATOR[1]));
    numerator = R::mul_add(simd, numerator, square, splat!(NUMERATOR[0]));
    let mut denominator = splat!(DENOMINATOR[3]);
    denominator = R::mul_add(simd, denominator, square, splat!(DENOMINATOR[2]));
    denominator = R::mul_add(simd, denominator, square, splat!(DENOMINATOR[1]));
    denominator = R::mul_add(simd, denominator, square, splat!(DENOMINATOR[0]));
    let cube = R::vmul(simd, bounded, square);
    let near_zero = R::mul_add(simd, cube, R::vdiv(simd, numerator, denominator), bounded);

    let power = R::exp(simd, R::vadd(simd, bounded, bounded));
    let share = R::vdiv(simd, splat!(2.0), R::vadd(simd, power, splat!(1.0)));
    let elsewhere = R::vsub(simd, splat!(1.0), share);

    let is_near = R::vsub(simd, bounded, splat!(NEAR_ZERO));
    let result = R::if_negative(simd, is_near, near_zero, elsewhere);
    R::if_negative(simd, x, R::vsub(simd, splat!(0.0), result), result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tanh_is_that_of_the_standard_library() {
        for i in -3000..=3000 {
            let x = f64::from(i) / 100.0;
            let (single, double) =
                (bounded_tanh::<f32, _>(pulp::Scalar, x as f32), bounded_tanh::<f64, _>(pulp::Scalar, x));
            assert!((f64::from(single) - f64::from(x as f32).tanh()).abs() <= 2e-7 * x.tanh().abs(), "{x}: {single}");
            assert!((double - x.tanh()).abs() <= 4e-16 * x.tanh().abs(), "{x}: {double}");
        }
        assert!(bounded_tanh::<f32, _>(pulp::Scalar, f32::NAN).is_nan());
        assert_eq!(bounded_tanh::<f32, _>(pulp::Scalar, f32::NEG_INFINITY), -1.0);
    }
}
