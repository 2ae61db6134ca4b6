//! The sums of the backward pass: the gradients of keys and values from those of the scores, and what is written of all.

use std::ops::Range;
use std::sync::atomic::Ordering;

use pulp::Simd;

use super::backward::{Backward, LONGEST_SUM, PANELS, Pieces};
use super::element::Element;
use super::gradients::Gradients;
use super::micro::{Rows, pad, panel_width};
use super::panels::unpack;
use super::products::Products;
use super::real::Real;

impl<E: Element> Backward<'_, E> {
    /// dk and dv of the rows `rows` of a block, from the panels `span`.
    ///
    /// # Safety
    ///
    /// `rows` lie inside the block that starts at the task's key `key - rows.start`, `span` inside its panels.
    #[inline(always)]
    pub(super) unsafe fn grad_keys_and_values<S: Simd>(
        &self,
        simd: S,
        products: Products,
        key: usize,
        rows: Range<usize>,
        span: Range<usize>,
        pieces: &mut Pieces<E::Real>,
    ) {
        let (problem, width) = (self.problem, products.operands(panel_width::<E::Real, S>()));
        let place = (rows.start * PANELS + span.start) * width;
        let (first, inner) = (span.start * width, span.len() * width);
        let (key, count) = (key - self.keys.start, rows.len());
        let sides = [
            (problem.value_dim(), E::Real::ONE, &pieces.weights, &pieces.grad_rows, &mut pieces.grad_values),
            (
                problem.dim(),
                E::Real::from_f64(problem.scale),
                &pieces.grad_scores,
                &pieces.query_rows,
                &mut pieces.grad_keys,
            ),
        ];
        for (dim, factor, weights, rows, out) in sides {
            let (stride, columns) = (pad(dim), dim.next_multiple_of(E::Real::lanes::<S>()));
            for start in (0..inner).step_by(LONGEST_SUM) {
                let inner = LONGEST_SUM.min(inner - start);
                // SAFETY: as the caller promises.
                unsafe {
                    let weights = Rows { start: weights.as_ptr().add(place + start), stride: PANELS * width };
                    let rows = Rows { start: rows.as_ptr().add((first + start) * stride), stride };
                    let out = Rows { start: out.as_mut_ptr().add(key * stride), stride };
                    products.outer_products::<E::Real, S>(simd, columns, factor, out, count, weights, inner, rows);
                }
            }
        }
    }

    pub(super) fn write_grad_keys_and_values(&self, pieces: &Pieces<E::Real>) {
        let Gradients { k, k_by_place, v, v_by_place, .. } = self.gradients;
        let (d, dv) = (self.problem.dim(), self.problem.value_dim());
        self.look_at(pieces.grad_keys);
        self.look_at(pieces.grad_values);
        for (j, key) in self.keys.clone().enumerate() {
            // SAFETY: the gradients have a row for each key of this head, and no other task writes those of this one.
            unsafe {
                E::narrow_all(&pieces.grad_keys[j * pad(d)..][..d], k.add(key * k_by_place));
                E::narrow_all(&pieces.grad_values[j * pad(dv)..][..dv], v.add(key * v_by_place));
            }
        }
    }

    #[inline(always)]
    pub(super) fn write_grad_queries<S: Simd>(
        &self,
        simd: S,
        head: usize,
        queries: &Range<usize>,
        pieces: &mut Pieces<E::Real>,
    ) {
        let width = panel_width::<E::Real, S>();
        let d = self.problem.dim();
        let scale = E::Real::from_f64(self.problem.scale);
        let (by_head, stride) = self.gradients.q_strides;
        self.look_at(pieces.grad_queries);
        for (panel, start) in queries.clone().step_by(width).enumerate() {
            let count = width.min(queries.end - start);
            let columns = pieces.grad_queries[panel * d * width..].as_ptr();
            // SAFETY: the gradients have a row for each query of the sequence, and no other task writes it.
            unsafe {
                let rows = Rows { start: self.gradients.q.add(head * by_head + start * stride), stride };
                unpack::<E::Real, S>(simd, columns, d, count, scale, pieces.keys, rows);
            }
        }
    }

    /// Takes note of results that aren't finite.
    #[inline(always)]
    fn look_at(&self, results: &[E::Real]) {
        // No early end: this way it is done by vectors.
        if !results.iter().fold(true, |all, x| all & x.is_finite()) {
            self.is_strange.store(true, Ordering::Relaxed);
        }
    }
}
