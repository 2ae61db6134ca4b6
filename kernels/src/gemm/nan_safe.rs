//! Sums to which a weight of zero adds nothing, even if its row is infinite or NaN: those of the [careful](crate::careful)
//! pass. Comparing each weight with zero is slow. On data that is finite, these give the same bits as the microkernels.

use pulp::Simd;

use crate::gemm::microkernel::{Row, VECTORS};
use crate::matrix::{Matrix, MatrixMut};
use crate::simd::{SimdFloat, as_vectors, as_vectors_mut, load, load_up_to, store_up_to};

/// Whether all numbers are finite.
#[inline(always)]
pub(crate) fn all_finite<R: SimdFloat>(numbers: &[R]) -> bool {
    // No early end: this way vectors compute it.
    numbers.iter().fold(true, |all, x| all & x.is_finite())
}

/// As [`microkernel::accumulate`](crate::gemm::microkernel::accumulate), to the last bit, but a weight of zero adds nothing,
/// even if the row is infinite or NaN.
#[inline(always)]
pub(crate) fn accumulate<R: SimdFloat, S: Simd>(
    simd: S,
    panel: &mut [R],
    factor: Row<R, S>,
    rows: Matrix<R>,
    weights: Matrix<R>,
) {
    let lanes = R::lanes::<S>();
    for (i, panel) in as_vectors_mut::<R, S>(panel).chunks_exact_mut(VECTORS).enumerate().take(rows.columns()) {
        for v in 0..VECTORS {
            let mut sum = R::splat(simd, R::ZERO);
            for j in 0..weights.rows() {
                let x = R::splat(simd, rows.row(j)[i]);
                let weight = load::<R, S>(&weights.row(j)[v * lanes..]);
                sum = R::select_zero(simd, weight, sum, R::mul_add(simd, x, weight, sum));
            }
            panel[v] = R::mul_add(simd, factor[v], panel[v], sum);
        }
    }
}

/// As [`microkernel::outer_products`](crate::gemm::microkernel::outer_products), to the last bit, but a weight of zero adds
/// nothing, even if the row is infinite or NaN.
#[inline(always)]
pub(crate) fn outer_products<R: SimdFloat, S: Simd>(
    simd: S,
    mut out: MatrixMut<R>,
    weights: Matrix<R>,
    rows: Matrix<R>,
) {
    for j in 0..out.rows() {
        for (v, out) in as_vectors_mut::<R, S>(out.row(j)).iter_mut().enumerate() {
            let mut sum = R::splat(simd, R::ZERO);
            for (i, &weight) in weights.row(j).iter().enumerate() {
                if weight != R::ZERO {
                    let x = as_vectors::<R, S>(rows.row(i))[v];
                    sum = R::mul_add(simd, R::splat(simd, weight), x, sum);
                }
            }
            *out = R::vadd(simd, *out, sum);
        }
    }
}

/// sums\[c\] += Σ_j weights\[j\] · rows\[j\]\[c\] for the values of one query. To the last bit as decoding adds them, but a weight
/// of zero adds nothing, even if the row is infinite or NaN.
#[inline(always)]
pub(crate) fn add_rows<R: SimdFloat, S: Simd>(simd: S, sums: &mut [R], weights: &[R], rows: Matrix<R>) {
    let lanes = R::lanes::<S>();
    for (j, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight != R::ZERO) {
        let weight = R::splat(simd, weight);
        for (sums, row) in sums.chunks_mut(lanes).zip(rows.row(j).chunks(lanes)) {
            let (sum, x) = (load_up_to::<R, S>(simd, sums), load_up_to::<R, S>(simd, row));
            store_up_to::<R, S>(sums, R::mul_add(simd, x, weight, sum));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::microkernel::panel_width;
    use crate::simd::with_every_simd;

    fn check<R: SimdFloat, S: Simd>(simd: S) {
        let width = panel_width::<R, S>();
        let nan = R::from_f64(f64::NAN);
        // The second row holds NaN and infinity, and all its weights are zero.
        let rows: Vec<R> = [1.0, 2.0, f64::NAN, f64::INFINITY].map(R::from_f64).to_vec();
        let mut weights = vec![R::ONE; 2 * width];
        weights[width..].fill(R::ZERO);
        let mut panel = vec![R::ONE; 2 * width];
        let (rows_of_2, weights) = (Matrix::new(&rows, 2, 2, 2), Matrix::new(&weights, 2, width, width));
        accumulate(simd, &mut panel, [R::splat(simd, R::ONE); VECTORS], rows_of_2, weights);
        assert!(panel[..width].iter().all(|&x| x.to_f64() == 2.0) && panel[width..].iter().all(|&x| x.to_f64() == 3.0));

        let lanes = R::lanes::<S>();
        let mut rows = vec![R::ONE; 2 * lanes];
        rows[lanes..].fill(nan);
        let mut out = vec![R::ZERO; lanes];
        let weights = [R::ONE, R::ZERO];
        let target = MatrixMut::new(&mut out, 1, lanes, lanes);
        outer_products(simd, target, Matrix::new(&weights, 1, 2, 2), Matrix::new(&rows, 2, lanes, lanes));
        assert!(out.iter().all(|&x| x == R::ONE));
        add_rows(simd, &mut out, &weights, Matrix::new(&rows, 2, lanes, lanes));
        assert!(out.iter().all(|&x| x.to_f64() == 2.0));
        assert!(all_finite(&out) && !all_finite(&rows));
    }

    #[test]
    fn zero_weights_add_nothing() {
        with_every_simd!(|simd| {
            check::<f32, S>(simd);
            check::<f64, S>(simd);
        });
    }
}
