//! What happens to the scores of a panel between the dot products and the exponential.

use std::ops::Range;

use super::element::Element;
use super::micro::Rows;
use super::problem::Problem;
use super::real::Real;
use crate::mask::Coverage;
use crate::philox::{dropout_threshold, philox};

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
    pub(crate) unsafe fn adjust<E: Element>(
        &self,
        problem: &Problem<E>,
        coverage: Coverage,
        scores: Rows<*mut E::Real>,
        tanh: Option<Rows<*mut E::Real>>,
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            if let Some(cap) = problem.softcap {
                self.softcap(E::Real::from_f64(cap), scores, tanh);
            }
            if problem.bias.is_some() {
                self.add_bias(problem, scores);
            }
            if let Some(slope) = problem.slope(self.at) {
                self.subtract_distances(problem, slope, scores);
            }
            if coverage == Coverage::Some {
                self.hide(problem, scores);
            }
        }
    }

    /// # Safety
    ///
    /// As [`Tile::adjust`].
    #[inline(always)]
    unsafe fn softcap<R: Real>(&self, cap: R, scores: Rows<*mut R>, tanh: Option<Rows<*mut R>>) {
        for j in 0..self.keys.len() {
            // SAFETY: as the caller promises.
            let row = unsafe { self.row(scores, j) };
            for (i, s) in row.iter_mut().enumerate() {
                let t = R::from_f64((*s / cap).to_f64().tanh());
                if let Some(tanh) = tanh {
                    // SAFETY: as the caller promises.
                    unsafe { *tanh.start.add(j * tanh.stride + i) = t };
                }
                *s = t * cap;
            }
        }
    }

    /// # Safety
    ///
    /// As [`Tile::adjust`].
    #[inline(always)]
    unsafe fn add_bias<E: Element>(&self, problem: &Problem<E>, scores: Rows<*mut E::Real>) {
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
        for i in 0..self.queries {
            let from = head + (self.first_query + i) * si;
            for (j, key) in self.keys.clone().enumerate() {
                // SAFETY: as the caller promises; `queries` is at most `width`.
                unsafe { *scores.start.add(j * scores.stride + i) += bias.data[from + key * sj] };
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

    /// # Safety
    ///
    /// As [`Tile::adjust`].
    #[inline(always)]
    unsafe fn hide<E: Element>(&self, problem: &Problem<E>, scores: Rows<*mut E::Real>) {
        let queries = self.first_query..self.first_query + self.queries;
        let shape = problem.shape();
        for (j, key) in self.keys.clone().enumerate() {
            // SAFETY: as the caller promises.
            let row = unsafe { self.row(scores, j) };
            problem.mask.rule().hidden(&shape, self.at, &queries, key, &mut |hidden| {
                let lanes = hidden.start - self.first_query..hidden.end - self.first_query;
                row[lanes].fill(-E::Real::INFINITY);
            });
        }
    }

    /// What dropout multiplies each weight by.
    ///
    /// # Safety
    ///
    /// `factors` has a row of `width` numbers for each key.
    #[inline(always)]
    pub(crate) unsafe fn dropout_factors<E: Element>(&self, problem: &Problem<E>, factors: Rows<*mut E::Real>) {
        let Some(dropout) = problem.dropout else { return };
        let threshold = dropout_threshold(dropout.p);
        let keep = E::Real::from_f64(1.0 / (1.0 - dropout.p));
        let head = (self.at.0 * problem.shape().num_heads + self.at.1) as u64;
        let blocks = self.keys.start / 4..self.keys.end.div_ceil(4);
        for i in 0..self.width {
            let query = (self.first_query + i) as u32;
            for block in blocks.clone() {
                let numbers = philox(dropout.seed, [block as u32, query, head as u32, (head >> 32) as u32]);
                for (key, number) in (block * 4..).zip(numbers) {
                    if self.keys.contains(&key) {
                        let factor = if number < threshold { E::Real::ZERO } else { keep };
                        // SAFETY: as the caller promises; `i` is less than `width`.
                        unsafe { *factors.start.add((key - self.keys.start) * factors.stride + i) = factor };
                    }
                }
            }
        }
    }
}
