//! The kernels for a few rows with every instruction set that this processor has.

use pulp::Simd;

use super::*;
use crate::gemm::microkernel::tests::{check_guard, close, numbers};
use crate::simd::with_every_simd;

fn check<R: SimdFloat, S: Simd>(simd: S, [rows, k, columns]: [usize; 3]) {
    let gap = 3;
    let (a, weights) = (numbers::<R>(1, rows * (k + gap)), numbers::<R>(2, (k + gap) * (columns + gap)));
    let a_of = Matrix::new(&a, rows, k, k + gap);
    let stride = columns + 2;
    let before = numbers::<R>(3, rows * stride);
    for by_row in [false, true] {
        let mut result = before.clone();
        let sums = MatrixMut::new(&mut result, rows, columns, stride);
        if by_row {
            simd.vectorize(AddRows {
                a: a_of,
                first: 0,
                weights: Matrix::new(&weights, k, columns, columns + gap),
                sums,
            });
        } else {
            simd.vectorize(AddDots {
                is_one_row: rows == 1,
                a: a_of,
                weights: Matrix::new(&weights, columns, k, k + gap),
                sums,
            });
        }
        let at = |i: usize, column: usize| {
            weights[if by_row { i * (columns + gap) + column } else { column * (k + gap) + i }].to_f64()
        };
        for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
            let sum: f64 = (0..k).map(|i| a[row * (k + gap) + i].to_f64() * at(i, column)).sum();
            let expected = before[row * stride + column].to_f64() + sum;
            assert!(close(result[row * stride + column], expected), "{rows} {k} {columns}: {row} {column}");
        }
        check_guard(&result, &before, rows, columns, stride);
    }
}

#[test]
fn kernels_are_naive_sums_with_every_instruction_set() {
    with_every_simd!(|simd| {
        let dims: &[[usize; 3]] = if cfg!(miri) {
            &[[1, 3, 5], [3, 2, 4]]
        } else {
            &[
                [1, 1, 1],
                [1, 17, 200],
                [2, 16, 9],
                [3, 33, 31],
                [4, 20, 64],
                [7, 5, 129],
                [8, 40, 140],
                [7, 1700, 9],
                [33, 800, 6],
                [64, 20, 5],
            ]
        };
        for dims in dims {
            check::<f32, S>(simd, *dims);
            check::<f64, S>(simd, *dims);
        }
    });
}

#[test]
#[should_panic(expected = "sums of the operands' sizes")]
fn sums_of_another_size_are_refused() {
    let (numbers, mut sums) = ([0.0f32; 8], [0.0f32; 8]);
    let (a, weights) = (Matrix::new(&numbers, 1, 4, 4), Matrix::new(&numbers, 2, 4, 4));
    pulp::Simd::vectorize(
        pulp::Scalar,
        AddDots { is_one_row: true, a, weights, sums: MatrixMut::new(&mut sums, 1, 3, 3) },
    );
}
