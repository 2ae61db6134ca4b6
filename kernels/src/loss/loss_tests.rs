use half::{bf16, f16};

use super::*;
use crate::simd::with_every_simd;

fn logits<E: Number>(rows: usize, count: usize) -> Vec<E> {
    let number = |i: usize| f64::from((i as u32).wrapping_mul(2_654_435_761) % 1009) / 100.0 - 5.0;
    (0..rows * count).map(|i| E::narrow(E::Float::from_f64(number(i)))).collect()
}

/// Labels of which every third is ignored.
fn labels(rows: usize, count: usize) -> Vec<u32> {
    (0..rows).map(|row| if row % 3 == 1 { IGNORED } else { (row * 31 % count) as u32 }).collect()
}

/// A row's loss and gradient by the definition, in f64.
fn definition(row: &[f64], label: usize, smoothing: f64) -> (f64, Vec<f64>) {
    let largest = row.iter().copied().fold(f64::MIN, f64::max);
    let log_total = row.iter().map(|x| (x - largest).exp()).sum::<f64>().ln() + largest;
    let goal = |i: usize| smoothing / row.len() as f64 + if i == label { 1.0 - smoothing } else { 0.0 };
    let loss = row.iter().enumerate().map(|(i, x)| goal(i) * (log_total - x)).sum();
    (loss, row.iter().enumerate().map(|(i, x)| (x - log_total).exp() - goal(i)).collect())
}

fn follows_the_definition<E: Number>(tolerance: f64) {
    let sizes: &[[usize; 2]] =
        if cfg!(miri) { &[[2, 40]] } else { &[[1, 1], [5, 33], [40, 7], [3, BLOCK], [4, 2 * BLOCK + 19]] };
    for (&[rows, count], smoothing) in sizes.iter().flat_map(|size| [(size, 0.0), (size, 0.1), (size, 1.0)]) {
        let (logits, labels) = (logits::<E>(rows, count), labels(rows, count));
        let loss = cross_entropy(&logits, [rows, count], &labels, smoothing).unwrap();
        let scale = 0.5;
        let gradient =
            cross_entropy_gradient(&logits, [rows, count], &labels, smoothing, &loss.denominators, scale).unwrap();
        let (mut sum, mut counted) = (0.0, 0);
        for ((row, &label), gradient) in logits.chunks(count).zip(&labels).zip(gradient.chunks(count)) {
            let row: Vec<f64> = row.iter().map(|x| x.widen().to_f64()).collect();
            let (loss, expected) = match label {
                IGNORED => (0.0, vec![0.0; count]),
                label => definition(&row, label as usize, smoothing),
            };
            (sum, counted) = (sum + loss, counted + usize::from(label != IGNORED));
            for (x, expected) in gradient.iter().zip(expected) {
                assert!((x.widen().to_f64() - scale * expected).abs() <= tolerance, "{rows} x {count}, {smoothing}");
            }
        }
        assert_eq!(loss.counted, counted);
        assert!((loss.sum - sum).abs() <= 1e-6 * (1.0 + sum), "{} {sum}", loss.sum);
    }
}

#[test]
fn loss_and_gradient_follow_the_definition() {
    follows_the_definition::<f64>(1e-14);
    follows_the_definition::<f32>(2e-7);
    follows_the_definition::<f16>(3e-4);
    follows_the_definition::<bf16>(2e-3);
}

#[test]
fn every_instruction_set_gives_the_same_numbers() {
    with_every_simd!(|simd| {
        let row = logits::<f32>(1, 77);
        let mut statistics = Statistics::new();
        row.chunks(40).for_each(|logits| statistics.add_with(simd, logits, Some(1.0 / 77.0)));
        let wide: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
        let (loss, expected) = definition(&wide, 70, 0.2);
        assert!((statistics.loss(row[70], 0.2) - loss).abs() < 1e-5);
        let mut gradient = row;
        Gradient::new(statistics.denominator(), 1.0, 0.2, 77).replace_with(simd, &mut gradient, Some(70));
        assert!(gradient.iter().zip(expected).all(|(x, y)| (f64::from(*x) - y).abs() < 2e-7));
    });
}

#[test]
fn extreme_logits_give_no_nan() {
    let inf = f32::INFINITY;
    for (row, label, expected) in [
        ([1e30, -1e30, 0.0], 0, 0.0),
        ([1e30, -1e30, 0.0], 1, 2e30),
        ([3e38, -3e38, 0.0], 1, 6e38),
        ([-inf, 2.0, -inf], 1, 0.0),
        ([-inf, 2.0, 2.0], 1, 2f64.ln()),
        ([-inf, 2.0, -inf], 0, f64::INFINITY),
        ([-inf; 3], 2, f64::INFINITY),
    ] {
        let loss = cross_entropy(&row, [1, 3], &[label], 0.0).unwrap();
        assert!(loss.sum == expected || (loss.sum - expected).abs() <= 1e-6 * expected, "{row:?}: {}", loss.sum);
        let gradient = cross_entropy_gradient(&row, [1, 3], &[label], 0.0, &loss.denominators, 1.0).unwrap();
        assert!(gradient.iter().all(|x| (-1.0..=1.0).contains(x)), "{row:?}: {gradient:?}");
    }
    let smoothed = cross_entropy(&[f32::MAX, f32::MAX, -f32::MAX], [1, 3], &[0], 0.5).unwrap();
    assert!((smoothed.sum / (f64::from(f32::MAX) / 3.0) - 1.0).abs() < 1e-6, "{}", smoothed.sum);
    assert!(cross_entropy(&[1.0, f32::NAN], [1, 2], &[0], 0.0).unwrap().sum.is_nan());
}

#[test]
fn what_does_not_fit_is_refused() {
    let text = |logits: &[f32], labels: &[u32], smoothing| {
        cross_entropy(logits, [2, 2], labels, smoothing).unwrap_err().to_string()
    };
    assert_eq!(text(&[0.0; 3], &[0, 0], 0.0), "the logits: expected 2 x 2, got 3 elements");
    assert_eq!(text(&[0.0; 4], &[0], 0.0), "the labels: expected one for each of 2 rows, got 1 elements");
    assert_eq!(text(&[0.0; 4], &[0, 2], 0.0), "the labels: expected numbers below 2, got 2 at position 1");
    assert_eq!(text(&[0.0; 4], &[0, 0], f64::NAN), "label smoothing: expected a number in [0, 1], got NaN");
    let error = cross_entropy_gradient(&[0f32; 4], [2, 2], &[0, 0], 0.0, &[], 1.0).unwrap_err();
    assert_eq!(error.to_string(), "the denominators: expected one for each of 2 rows, got 0 elements");
}

#[test]
fn no_rows_and_no_logits_are_no_panic() {
    assert_eq!(cross_entropy::<f32>(&[], [0, 5], &[], 0.0).unwrap().counted, 0);
    assert_eq!(cross_entropy::<f32>(&[], [2, 0], &[IGNORED; 2], 0.1).unwrap().sum, 0.0);
    assert!(cross_entropy_gradient::<f32>(&[], [0, 5], &[], 0.0, &[], 1.0).unwrap().is_empty());
}
