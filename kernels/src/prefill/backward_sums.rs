//! The sums of the backward pass: the gradients of keys and values from those of the scores, and what is written of all.

use std::ops::Range;
use std::sync::atomic::Ordering;

use pulp::Simd;

use super::backward::Backward;
use super::backward_pieces::Pieces;
use crate::careful::times_power_of_two;
use crate::gemm::Gemm;
use crate::gemm::microkernel::{pad, panel_width};
use crate::gemm::nan_safe::all_finite;
use crate::gemm::transpose::transpose;
use crate::matrix::{Matrix, MatrixMut};
use crate::simd::SimdFloat;

impl<R: SimdFloat> Backward<'_, R> {
    /// dk and dv of the keys from `key` on, which are the rows `rows` of a block, from the panels `panels`.
    #[inline(always)]
    pub(super) fn add_grad_keys_and_values<S: Simd>(
        &self,
        simd: S,
        gemm: Gemm,
        key: usize,
        rows: Range<usize>,
        panels: Range<usize>,
        pieces: &mut Pieces<R>,
    ) {
        let (operands, block) = (self.operands, &pieces.block);
        let width = gemm.operands(panel_width::<R, S>());
        let weights_stride = self.tiles.panels * width;
        let first_weight = rows.start * weights_stride + panels.start * width;
        let (first, inner) = (panels.start * width, panels.len() * width);
        let (key, count) = (key - self.keys.start, rows.len());
        let scale = R::from_f64(operands.scale);
        let sides = [
            // dv = (p ∘ drop)ᵀ·do
            (operands.value_dim, R::ONE, &*block.weights, &*block.grad_rows, &mut *pieces.grad_values),
            // dk = scale · dsᵀ·q
            (operands.dim, scale, &*block.grad_scores, &*block.query_rows, &mut *pieces.grad_keys),
        ];
        for (dim, factor, weights, rows, out) in sides {
            let (stride, columns) = (pad(dim), dim.next_multiple_of(R::lanes::<S>()));
            for start in (0..inner).step_by(self.tiles.longest_sum) {
                let inner = self.tiles.longest_sum.min(inner - start);
                let weights = Matrix::new(&weights[first_weight + start..], count, inner, weights_stride);
                let rows = Matrix::new(&rows[(first + start) * stride..], inner, columns, stride);
                let out = MatrixMut::new(&mut out[key * stride..], count, columns, stride);
                gemm.outer_products::<R, S>(simd, factor, out, weights, rows);
            }
        }
    }

    pub(super) fn write_grad_keys_and_values(&mut self, pieces: &mut Pieces<R>) {
        let (d, dv, count) = (self.operands.dim, self.operands.value_dim, self.keys.len());
        if let Some(headroom) = self.careful {
            pieces.grad_keys.iter_mut().for_each(|x| *x = times_power_of_two(*x, headroom.grads + headroom.scores));
            pieces.grad_values.iter_mut().for_each(|x| *x = times_power_of_two(*x, headroom.grads));
        }
        self.look_at(pieces.grad_keys);
        self.look_at(pieces.grad_values);
        self.gradients.k.write(0, Matrix::new(pieces.grad_keys, count, d, pad(d)));
        self.gradients.v.write(0, Matrix::new(pieces.grad_values, count, dv, pad(dv)));
    }

    /// Multiplies the gradients of a block of queries by the scale and writes them.
    #[inline(always)]
    pub(super) fn write_grad_queries<S: Simd>(
        &mut self,
        simd: S,
        head: usize,
        queries: &Range<usize>,
        pieces: &Pieces<R>,
    ) {
        let (width, d) = (panel_width::<R, S>(), self.operands.dim);
        let scale = R::from_f64(self.operands.scale);
        self.look_at(pieces.block.grad_queries);
        let mut rows = self.gradients.q.head(head);
        for (panel, start) in queries.clone().step_by(width).enumerate() {
            let count = width.min(queries.end - start);
            let panel = Matrix::new(&pieces.block.grad_queries[panel * d * width..], d, count, width);
            transpose(simd, scale, panel, rows.part(start, count));
        }
    }

    /// Takes note of results that aren't finite.
    #[inline(always)]
    fn look_at(&self, results: &[R]) {
        if !all_finite(results) {
            self.is_not_finite.store(true, Ordering::Relaxed);
        }
    }
}
