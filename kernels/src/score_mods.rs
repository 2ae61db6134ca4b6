//! What happens to the scores of a tile between the dot products and the softmax, and the gradients of it.

use std::ops::Range;

use pulp::Simd;

use crate::gemm::transpose::add_transposed;
use crate::mask::Coverage;
use crate::math::tanh;
use crate::matrix::{Matrix, MatrixMut};
use crate::operands::Operands;
use crate::part::Part;
use crate::problem::BiasView;
use crate::simd::{SimdFloat, as_vectors, as_vectors_mut, load_up_to, store_up_to};

/// A tile of scores \[key\]\[query\]: a row for each key of `keys`, in it a number for each query from `first_query` on. The matrices
/// that its functions are given have exactly these rows, and columns for at least `queries`.
pub(crate) struct Tile {
    /// Sequence and head.
    pub(crate) at: (usize, usize),
    pub(crate) first_query: usize,
    /// Queries of the tile. The columns behind them hold nothing of interest.
    pub(crate) queries: usize,
    pub(crate) keys: Range<usize>,
}

impl Tile {
    /// Softcap, bias, ALiBi and the mask. With a softcap, tanh(s / cap) is left in `tanh`, if given, for the backward pass. If
    /// `is_careful`, a bias of minus infinity hides NaN as well.
    #[inline(always)]
    pub(crate) fn modify<R: SimdFloat, S: Simd>(
        &self,
        simd: S,
        operands: &Operands<R>,
        coverage: Coverage,
        is_careful: bool,
        mut scores: MatrixMut<R>,
        tanh: Option<MatrixMut<R>>,
    ) {
        if let Some(cap) = operands.softcap {
            softcap(simd, R::from_f64(cap), scores.reborrow(), tanh);
        }
        if let Some(bias) = operands.bias {
            self.add_bias(simd, operands, bias, scores.reborrow());
            if is_careful {
                self.hide_by_bias(operands, bias, scores.reborrow(), -R::INFINITY);
            }
        }
        if let Some(slope) = operands.slope(self.at) {
            self.subtract_distances(operands, slope, scores.reborrow());
        }
        if coverage == Coverage::Some {
            self.hide(operands, scores, -R::INFINITY);
        }
    }

    #[inline(always)]
    fn add_bias<R: SimdFloat, S: Simd>(
        &self,
        simd: S,
        operands: &Operands<R>,
        bias: BiasView<R>,
        mut scores: MatrixMut<R>,
    ) {
        let [_, _, si, sj] = bias.strides();
        let (queries, keys) = (self.queries, self.keys.len());
        let from = self.bias_from(operands, bias);
        if si == 0 {
            for j in 0..keys {
                let x = from[j * sj];
                scores.row(j).iter_mut().for_each(|s| *s += x);
            }
        } else if sj == 1 {
            add_transposed(simd, Matrix::new(from, queries, keys, si), scores);
        } else {
            for j in 0..keys {
                scores.row(j)[..queries].iter_mut().enumerate().for_each(|(i, s)| *s += from[i * si + j * sj]);
            }
        }
    }

    /// The elements of the bias from the tile's first query and key on.
    #[inline(always)]
    fn bias_from<'b, R>(&self, operands: &Operands<R>, bias: BiasView<'b, R>) -> &'b [R] {
        let [_, _, first_query, first_key] = operands.part.first;
        bias.from(operands.part.at(self.at), first_query + self.first_query, first_key + self.keys.start)
    }

    /// Replaces the numbers that a bias of minus infinity hides.
    fn hide_by_bias<R: SimdFloat>(
        &self,
        operands: &Operands<R>,
        bias: BiasView<R>,
        mut numbers: MatrixMut<R>,
        with: R,
    ) {
        let [_, _, si, sj] = bias.strides();
        let from = self.bias_from(operands, bias);
        for j in 0..self.keys.len() {
            let row = numbers.row(j)[..self.queries].iter_mut().enumerate();
            row.filter(|(i, _)| from[i * si + j * sj] == -R::INFINITY).for_each(|(_, x)| *x = with);
        }
    }

    #[inline(always)]
    fn subtract_distances<R: SimdFloat>(&self, operands: &Operands<R>, slope: R, mut scores: MatrixMut<R>) {
        let Part { whole, first: [_, _, first_query, first_key] } = operands.part;
        // The position of the first query among the keys of the part.
        let first = (whole.kv_len + first_query + self.first_query) as f64 - (whole.q_len + first_key) as f64;
        for (j, key) in self.keys.clone().enumerate() {
            for (i, s) in scores.row(j).iter_mut().enumerate() {
                *s -= slope * R::from_f64((first + i as f64 - key as f64).abs());
            }
        }
    }

    /// Replaces the numbers that the mask hides.
    #[inline(always)]
    fn hide<R: SimdFloat>(&self, operands: &Operands<R>, mut numbers: MatrixMut<R>, with: R) {
        let queries = self.first_query..self.first_query + self.queries;
        for (j, key) in self.keys.clone().enumerate() {
            let row = numbers.row(j);
            operands.hidden(self.at, &queries, key, |hidden| {
                row[hidden.start - self.first_query..hidden.end - self.first_query].fill(with);
            });
        }
    }

    /// Zeros for what the mask or the bias hides and in the columns behind the last query, whatever an infinite or NaN row made of them.
    pub(crate) fn zero_hidden<R: SimdFloat>(
        &self,
        operands: &Operands<R>,
        coverage: Coverage,
        mut numbers: MatrixMut<R>,
    ) {
        if coverage == Coverage::Some {
            self.hide(operands, numbers.reborrow(), R::ZERO);
        }
        if let Some(bias) = operands.bias {
            self.hide_by_bias(operands, bias, numbers.reborrow(), R::ZERO);
        }
        for j in 0..self.keys.len() {
            numbers.row(j)[self.queries..].fill(R::ZERO);
        }
    }

    /// What dropout multiplies each weight by, if there is dropout.
    #[inline(always)]
    pub(crate) fn dropout_factors<R: SimdFloat, S: Simd>(
        &self,
        simd: S,
        operands: &Operands<R>,
        factors: MatrixMut<R>,
    ) {
        let (part, queries) = (&operands.part, self.first_query..self.first_query + self.queries);
        if let Some(dropout) = operands.dropout {
            let (head, first_query) = (operands.head_number(self.at) as u64, part.queries(&queries).start);
            dropout.factors(simd, head, first_query, &part.keys(&self.keys), factors);
        }
    }
}

/// cap · tanh(s / cap) in place of s; tanh(s / cap) is left in `tanhs`, if given.
#[inline(always)]
fn softcap<R: SimdFloat, S: Simd>(simd: S, cap: R, mut scores: MatrixMut<R>, mut tanhs: Option<MatrixMut<R>>) {
    let (lanes, columns) = (R::lanes::<S>(), scores.columns());
    let (per_cap, cap) = (R::splat(simd, R::ONE / cap), R::splat(simd, cap));
    for j in 0..scores.rows() {
        for (v, scores) in scores.row(j).chunks_mut(lanes).enumerate() {
            let score = load_up_to::<R, S>(simd, scores);
            let t = tanh::<R, S>(simd, R::vmul(simd, score, per_cap));
            if let Some(tanhs) = &mut tanhs {
                store_up_to::<R, S>(&mut tanhs.row(j)[v * lanes..(v * lanes + lanes).min(columns)], t);
            }
            store_up_to::<R, S>(scores, R::vmul(simd, t, cap));
        }
    }
}

/// ds ∘ (1 - tanh²) in place of ds: the gradient of the softcap, for matrices of whole vectors. If `NAN_SAFE`, a ds of zero stays
/// zero, whatever tanh is.
#[inline(always)]
pub(crate) fn softcap_gradient<R: SimdFloat, S: Simd, const NAN_SAFE: bool>(
    simd: S,
    tanhs: Matrix<R>,
    mut grads: MatrixMut<R>,
) {
    let one = R::splat(simd, R::ONE);
    for j in 0..grads.rows() {
        let tanhs = as_vectors::<R, S>(tanhs.row(j));
        for (grad, tanh) in as_vectors_mut::<R, S>(grads.row(j)).iter_mut().zip(tanhs) {
            let slope = R::vsub(simd, one, R::vmul(simd, *tanh, *tanh));
            let product = R::vmul(simd, *grad, slope);
            *grad = if NAN_SAFE { R::select_zero(simd, *grad, *grad, product) } else { product };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::microkernel::tests::{close, numbers};
    use crate::mask::Rule;
    use crate::problem::{Problem, ProblemOptions, View};
    use crate::simd::with_every_simd;

    /// Scores of a tile after the modifications, with their tanh.
    fn modified<S: Simd>(simd: S, options: ProblemOptions<f64>, before: &[f64], width: usize) -> (Vec<f64>, Vec<f64>) {
        let data = [1.0; 64];
        let [q, k] = [10, 12].map(|len| View::new("test", &data, [0, 0, 1], [2, 2, len, 1]).unwrap());
        let problem = Problem::new(q, k, k, options).unwrap();
        let tile = Tile { at: (1, 1), first_query: 3, queries: 5, keys: 2..9 };
        let (mut scores, mut tanhs) = (before.to_vec(), vec![0.0; before.len()]);
        let matrix = |data| MatrixMut::new(data, 7, width, width);
        let (scores_of, tanhs_of) = (matrix(&mut scores), matrix(&mut tanhs));
        tile.modify(simd, &problem.operands(), Coverage::Some, false, scores_of, Some(tanhs_of));
        (scores, tanhs)
    }

    #[test]
    fn modifications_are_their_definitions() {
        with_every_simd!(|simd| {
            // A panel wider than the queries, and decoding's columns, which are fewer than a vector.
            for width in [16, 5] {
                let before = numbers::<f64>(1, 7 * width);
                let bias = numbers::<f64>(2, 2 * 10 * 12);
                let causal = Rule::Band { below: None, above: Some(0), offset: None };
                for (dims, softcap, slope, mask) in [
                    ([1, 2, 10, 12], None, 0.0, &Rule::Full),
                    ([1, 2, 1, 12], Some(0.7), 0.0, &Rule::Full),
                    ([1, 2, 10, 1], None, 0.3, &causal),
                    ([1, 1, 1, 1], Some(2.0), 0.3, &causal),
                ] {
                    let strides = [0, dims[2] * dims[3], dims[3], 1];
                    let bias_of = BiasView::new(&bias, dims, strides).unwrap();
                    let slopes = [0.0, slope];
                    let (bias_of, slopes) = (Some(bias_of), (slope > 0.0).then_some(&slopes[..]));
                    let options = ProblemOptions { softcap, mask, bias: bias_of, slopes, ..Default::default() };
                    let (scores, tanhs) = modified(simd, options, &before, width);
                    for (j, i) in (0..7).flat_map(|j| (0..5).map(move |i| (j, i))) {
                        let (key, query, index) = (2 + j, 3 + i, j * width + i);
                        let mut s = before[index];
                        if let Some(cap) = softcap {
                            assert!(close(tanhs[index], (s / cap).tanh()));
                            s = cap * (s / cap).tanh();
                        }
                        let along = |axis: usize, at: usize| if dims[axis] == 1 { 0 } else { at * strides[axis] };
                        s += bias[along(1, 1) + along(2, query) + along(3, key)];
                        let distance = (query + 2) as f64 - key as f64;
                        s -= slope * distance.abs();
                        let is_hidden = !mask.is_full() && distance < 0.0;
                        let s = if is_hidden { f64::NEG_INFINITY } else { s };
                        assert!(scores[index] == s || close(scores[index], s), "{dims:?}, {width}, {key}, {query}");
                    }
                }
            }
        });
    }

    #[test]
    fn gradient_of_the_softcap_is_its_derivative() {
        with_every_simd!(|simd| {
            let (tanhs, before) = (numbers::<f64>(1, 3 * 16), numbers::<f64>(2, 3 * 16));
            let mut grads = before.clone();
            let matrix = MatrixMut::new(&mut grads, 3, 16, 16);
            softcap_gradient::<f64, S, false>(simd, Matrix::new(&tanhs, 3, 16, 16), matrix);
            for i in 0..3 * 16 {
                assert!(close(grads[i], before[i] * (1.0 - tanhs[i] * tanhs[i])));
            }
        });
    }
}
