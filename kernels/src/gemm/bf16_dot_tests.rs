//! The kernels of pairs against naive loops over numbers rounded to bf16.

use half::bf16;

use super::*;
use crate::gemm::microkernel::tests::{check_guard, numbers};

/// None on processors without the instructions.
fn bf16_dot() -> Option<Bf16Dot> {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    return pulp::x86::V4::try_new().and_then(|_| Bf16Dot::new::<pulp::x86::V4>());
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    None
}

fn rounded(seed: u64, count: usize) -> (Vec<u16>, Vec<f64>) {
    let numbers = numbers::<f32>(seed, count).into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    (numbers.iter().map(|x| x.to_bits()).collect(), numbers.iter().map(|x| x.to_f64()).collect())
}

/// \[rows\]\[columns\] as \[rows / 2\]\[columns\] of pairs.
fn interleaved(bits: &[u16], columns: usize) -> Vec<u32> {
    let pair = |two: &[u16]| {
        (0..columns).map(|c| u32::from(two[c]) | u32::from(*two.get(columns + c).unwrap_or(&0)) << 16).collect()
    };
    bits.chunks(2 * columns).map(pair).collect::<Vec<Vec<u32>>>().concat()
}

fn close(x: f32, expected: f64) -> bool {
    (f64::from(x) - expected).abs() <= 1e-4
}

#[test]
fn lesser_instruction_sets_have_none() {
    assert!(Bf16Dot::new::<pulp::Scalar>().is_none());
}

#[test]
fn dot_products_are_naive_loops() {
    let Some(dot) = bf16_dot() else { return };
    for (count, d) in [(1, 2), (5, 34), (13, 80)] {
        let (stride, columns) = (d + 3, WIDTH);
        let ((rows, x), (panel, y)) = (rounded(1, count * stride), rounded(2, d * columns));
        let before = numbers::<f32>(3, count * (WIDTH + 1));
        let mut scores = before.clone();
        let mut largest = [0.5f32; WIDTH];
        let target = MatrixMut::new(&mut scores, count, WIDTH, WIDTH + 1);
        let rows = Matrix::new(&rows, count, d, stride);
        dot.dot_products::<true>(0.3, &interleaved(&panel, columns), rows, target, &mut largest);
        for w in 0..WIDTH {
            let mut greatest = 0.5f64;
            for j in 0..count {
                let sum: f64 = (0..d).map(|i| x[j * stride + i] * y[i * columns + w]).sum();
                greatest = greatest.max(0.3 * sum);
                assert!(close(scores[j * (WIDTH + 1) + w], 0.3 * sum), "{count} x {d}, {j}, {w}");
            }
            assert!(close(largest[w], greatest));
        }
        check_guard(&scores, &before, count, WIDTH, WIDTH + 1);
    }
}

#[test]
fn accumulate_is_a_naive_loop() {
    let Some(dot) = bf16_dot() else { return };
    for (count, columns) in [(1, 1), (5, 17), (12, 34)] {
        let ((rows, x), weights) = (rounded(1, count * columns), numbers::<f32>(2, count * WIDTH));
        let before = numbers::<f32>(3, columns * WIDTH);
        let (mut panel, mut narrowed) = (before.clone(), weights.clone());
        let narrowed = dot.narrow_down(MatrixMut::new(&mut narrowed, count, WIDTH, WIDTH));
        let rows = interleaved(&rows, columns);
        let rows = Matrix::new(&rows, count.div_ceil(2), columns, columns);
        dot.accumulate(&mut panel, &[0.7; WIDTH], rows, narrowed.as_ref());
        for (c, w) in (0..columns).flat_map(|c| (0..WIDTH).map(move |w| (c, w))) {
            let weight = |j: usize| bf16::from_f32(weights[j * WIDTH + w]).to_f64();
            let sum: f64 = (0..count).map(|j| x[j * columns + c] * weight(j)).sum();
            let expected = 0.7 * f64::from(before[c * WIDTH + w]) + sum;
            assert!(close(panel[c * WIDTH + w], expected), "{count} x {columns}, {c}, {w}");
        }
    }
}

#[test]
fn outer_products_are_naive_loops() {
    let Some(dot) = bf16_dot() else { return };
    for (count, columns) in [(1, 16), (5, 48), (13, 80)] {
        let (inner, stride) = (WIDTH, columns + 16);
        let (weights, (rows, x)) = (numbers::<f32>(1, count * WIDTH), rounded(2, inner * columns));
        let before = numbers::<f32>(3, count * stride);
        let mut out = before.clone();
        let mut narrow = vec![0; count * inner / 2];
        dot.narrow_along(
            Matrix::new(&weights, count, WIDTH, WIDTH),
            MatrixMut::new(&mut narrow, count, inner / 2, inner / 2),
        );
        let rows = interleaved(&rows, columns);
        let (target, weights_of) =
            (MatrixMut::new(&mut out, count, columns, stride), Matrix::new(&narrow, count, inner / 2, inner / 2));
        dot.outer_products(0.3, target, weights_of, Matrix::new(&rows, inner / 2, columns, columns));
        for (j, c) in (0..count).flat_map(|j| (0..columns).map(move |c| (j, c))) {
            let weight = |i: usize| bf16::from_f32(weights[j * WIDTH + i]).to_f64();
            let sum: f64 = (0..inner).map(|i| weight(i) * x[i * columns + c]).sum();
            let expected = f64::from(before[j * stride + c]) + 0.3 * sum;
            assert!(close(out[j * stride + c], expected), "{count} x {columns}, {j}, {c}");
        }
        check_guard(&out, &before, count, columns, stride);
    }
}

#[test]
fn interleaved_rows_end_with_zeros() {
    let Some(dot) = bf16_dot() else { return };
    for (count, columns) in [(1, 3), (2, 16), (5, 33)] {
        let (rows, _) = rounded(1, count * columns);
        let width = columns.next_multiple_of(LANES);
        let mut to = vec![u32::MAX; count.div_ceil(2) * width];
        dot.interleave(
            Matrix::new(&rows, count, columns, columns),
            MatrixMut::new(&mut to, count.div_ceil(2), width, width),
        );
        let expected = interleaved(&rows, columns);
        for (row, expected) in to.chunks_exact(width).zip(expected.chunks_exact(columns)) {
            assert_eq!(&row[..columns], expected);
            assert!(row[columns..].iter().all(|&pair| pair == 0));
        }
    }
}

#[test]
fn numbers_are_rounded_to_the_nearest() {
    let Some(dot) = bf16_dot() else { return };
    for count in [0, 1, 16, 31, 32, 77] {
        let mut from = numbers::<f32>(1, count);
        if let [first, second, ..] = &mut from[..] {
            (*first, *second) = (f32::NAN, f32::INFINITY);
        }
        let mut to = vec![MaybeUninit::new(bf16::ONE); count + 1];
        dot.narrow(&from, &mut to[..count]);
        // SAFETY: they were initialised from the start.
        let to: Vec<u16> = to.into_iter().map(|x| unsafe { x.assume_init() }.to_bits()).collect();
        let expected = from.iter().map(|&x| bf16::from_f32(x)).chain([bf16::ONE]);
        assert_eq!(to, expected.map(bf16::to_bits).collect::<Vec<_>>(), "{count}");
    }
}
