//! The plain and the NaN-safe kernels against naive loops, over sizes that leave a remainder in every block.

use pulp::Simd;
use pulp::bytemuck::{cast_slice, cast_slice_mut};

use super::*;
use crate::gemm::nan_safe;
use crate::philox::uniform;
use crate::simd::with_every_simd;

/// `count` numbers in [-1, 1).
pub(crate) fn numbers<R: SimdFloat>(seed: u64, count: usize) -> Vec<R> {
    uniform(seed, 1.0, count).map(R::from_f64).collect()
}

/// That nothing but the rows of a matrix was written.
pub(crate) fn check_guard<R: SimdFloat>(now: &[R], before: &[R], rows: usize, columns: usize, stride: usize) {
    for (i, (now, before)) in now.iter().zip(before).enumerate() {
        assert!(i / stride < rows && i % stride < columns || now == before, "element {i} lies outside");
    }
}

pub(crate) fn close<R: SimdFloat>(x: R, expected: f64) -> bool {
    let precision = if R::MANTISSA_BITS == 23 { 1e-4 } else { 1e-12 };
    (x.to_f64() - expected).abs() <= precision
}

/// Sizes (rows, columns) of the tests; miri takes a second for what takes a millisecond.
pub(crate) fn sizes() -> &'static [(usize, usize)] {
    if cfg!(miri) { &[(1, 1), (13, 3)] } else { &[(1, 1), (2, 17), (5, 33), (6, 16), (13, 59), (31, 80)] }
}

fn row_of<R: SimdFloat, S: Simd>(simd: S, numbers: &[R]) -> Row<R, S> {
    let mut row = [R::splat(simd, R::ZERO); VECTORS];
    cast_slice_mut::<R::Vector<S>, R>(&mut row).copy_from_slice(numbers);
    row
}

type Accumulate<R, S> = fn(S, &mut [R], Row<R, S>, Matrix<R>, Matrix<R>);

fn check_dot_products<R: SimdFloat, S: Simd>(simd: S, count: usize, d: usize) {
    let (width, stride) = (panel_width::<R, S>(), d + 5);
    let (panel, rows) = (numbers::<R>(1, d * width), numbers::<R>(2, (count - 1) * stride + d));
    let before = numbers::<R>(3, count * (width + 1));
    let mut scores = before.clone();
    let start = numbers::<R>(4, width);
    let mut largest = row_of::<R, S>(simd, &start);
    let target = MatrixMut::new(&mut scores, count, width, width + 1);
    dot_products::<R, S, true>(simd, &panel, Matrix::new(&rows, count, d, stride), target, &mut largest);
    for w in 0..width {
        let mut greatest = start[w].to_f64();
        for j in 0..count {
            let expected = (0..d).map(|i| rows[j * stride + i].to_f64() * panel[i * width + w].to_f64()).sum();
            greatest = greatest.max(expected);
            assert!(close(scores[j * (width + 1) + w], expected), "{count} x {d}, {j}, {w}");
        }
        assert!(close(cast_slice::<R::Vector<S>, R>(&largest)[w], greatest), "{count} x {d}, {w}");
    }
    check_guard(&scores, &before, count, width, width + 1);
}

fn check_accumulate<R: SimdFloat, S: Simd>(simd: S, count: usize, d: usize) {
    let (width, stride) = (panel_width::<R, S>(), d + 3);
    let (before, factor) = (numbers::<R>(1, d * width), numbers::<R>(2, width));
    let (rows, mut weights) = (numbers::<R>(3, count * stride), numbers::<R>(4, count * (width + 2)));
    weights[0] = R::ZERO;
    let of = |accumulate: Accumulate<R, S>| {
        let mut panel = before.clone();
        let (rows, weights) = (Matrix::new(&rows, count, d, stride), Matrix::new(&weights, count, width, width + 2));
        accumulate(simd, &mut panel, row_of::<R, S>(simd, &factor), rows, weights);
        panel
    };
    let panel = of(accumulate::<R, S>);
    for (i, w) in (0..d).flat_map(|i| (0..width).map(move |w| (i, w))) {
        let sum: f64 = (0..count).map(|j| rows[j * stride + i].to_f64() * weights[j * (width + 2) + w].to_f64()).sum();
        let expected = factor[w].to_f64() * before[i * width + w].to_f64() + sum;
        assert!(close(panel[i * width + w], expected), "{count} x {d}, {i}, {w}");
    }
    assert!(of(nan_safe::accumulate::<R, S>) == panel, "the NaN-safe kernel gives the same bits");
}

fn check_outer_products<R: SimdFloat, S: Simd>(simd: S, count: usize, inner: usize) {
    let columns = 3 * R::lanes::<S>();
    let stride = columns + 1;
    let (before, mut weights) = (numbers::<R>(1, count * stride), numbers::<R>(2, count * (inner + 1)));
    let rows = numbers::<R>(3, inner * (columns + 2));
    weights[0] = R::ZERO;
    let of = |outer_products: fn(S, MatrixMut<R>, Matrix<R>, Matrix<R>)| {
        let mut out = before.clone();
        let target = MatrixMut::new(&mut out, count, columns, stride);
        let weights = Matrix::new(&weights, count, inner, inner + 1);
        outer_products(simd, target, weights, Matrix::new(&rows, inner, columns, columns + 2));
        out
    };
    let out = of(outer_products::<R, S>);
    for (j, c) in (0..count).flat_map(|j| (0..columns).map(move |c| (j, c))) {
        let sum: f64 =
            (0..inner).map(|i| weights[j * (inner + 1) + i].to_f64() * rows[i * (columns + 2) + c].to_f64()).sum();
        assert!(close(out[j * stride + c], before[j * stride + c].to_f64() + sum), "{count} x {inner}, {j}, {c}");
    }
    check_guard(&out, &before, count, columns, stride);
    assert!(of(nan_safe::outer_products::<R, S>) == out, "the NaN-safe kernel gives the same bits");
}

#[test]
fn kernels_are_naive_loops() {
    with_every_simd!(|simd| {
        for &(count, d) in sizes() {
            check_dot_products::<f32, S>(simd, count, d);
            check_dot_products::<f64, S>(simd, count, d);
            check_accumulate::<f32, S>(simd, count, d);
            check_accumulate::<f64, S>(simd, count, d);
            check_outer_products::<f32, S>(simd, count, d);
            check_outer_products::<f64, S>(simd, count, d);
        }
    });
}

#[test]
#[should_panic(expected = "the panel has a row")]
fn short_panel_is_refused() {
    let (simd, rows) = (pulp::Scalar, [0.0f32; 4]);
    let mut largest = row_of::<f32, _>(simd, &[0.0; 2]);
    let mut scores = [0.0; 2];
    let scores = MatrixMut::new(&mut scores, 1, 2, 2);
    dot_products::<f32, _, false>(simd, &[0.0; 7], Matrix::new(&rows, 1, 4, 4), scores, &mut largest);
}

#[test]
#[should_panic(expected = "a row for each row of weights")]
fn more_weights_than_rows_are_refused() {
    let (simd, rows, weights) = (pulp::Scalar, [0.0f64; 4], [0.0; 4]);
    let factor = row_of::<f64, _>(simd, &[0.0; 2]);
    accumulate(simd, &mut [0.0; 8], factor, Matrix::new(&rows, 1, 4, 4), Matrix::new(&weights, 2, 2, 2));
}

#[test]
#[should_panic(expected = "a weight for each row")]
fn weights_of_another_size_are_refused() {
    let (rows, weights) = ([0.0f64; 4], [0.0; 4]);
    let mut out = [0.0; 4];
    let out = MatrixMut::new(&mut out, 1, 4, 4);
    outer_products(pulp::Scalar, out, Matrix::new(&weights, 1, 2, 2), Matrix::new(&rows, 1, 4, 4));
}
