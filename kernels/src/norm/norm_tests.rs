use half::{bf16, f16};

use super::*;

const KINDS: [NormKind; 2] = [NormKind::Rms, NormKind::Layer];

/// Numbers in [-1, 1] that are no multiples of a power of two.
fn numbers<E: Number>(seed: u64, count: usize) -> Vec<E> {
    let numbers = crate::philox::uniform(seed, 1.0, count);
    numbers.map(|x| E::narrow(E::Float::from_f64(x))).collect()
}

fn wide<E: Number>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| x.widen().to_f64()).collect()
}

/// The norm and the gradients of x, weight and bias, by the formulas.
fn by_formula(kind: NormKind, x: &[f64], weight: &[f64], bias: &[f64], eps: f64, grad: &[f64]) -> [Vec<f64>; 4] {
    let n = weight.len();
    let (mut y, mut x_grad) = (vec![], vec![]);
    let (mut weight_grad, mut bias_grad) = (vec![0.0; n], vec![0.0; n]);
    let mean = |row: &dyn Fn(usize) -> f64| (0..n).map(row).sum::<f64>() / n as f64;
    for (x, grad) in x.chunks(n).zip(grad.chunks(n)) {
        let centre = if kind == NormKind::Layer { mean(&|c| x[c]) } else { 0.0 };
        let inverse = 1.0 / (mean(&|c| (x[c] - centre).powi(2)) + eps).sqrt();
        let normal = |c: usize| (x[c] - centre) * inverse;
        let weighted = |c: usize| grad[c] * weight[c];
        let of_mean = if kind == NormKind::Layer { mean(&weighted) } else { 0.0 };
        let of_square = mean(&|c| weighted(c) * normal(c));
        for c in 0..n {
            y.push(normal(c) * weight[c] + bias[c]);
            x_grad.push(inverse * (weighted(c) - of_mean - normal(c) * of_square));
            weight_grad[c] += grad[c] * normal(c);
            bias_grad[c] += grad[c];
        }
    }
    [y, x_grad, weight_grad, bias_grad]
}

fn assert_close(found: &[f64], expected: &[f64], precision: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().fold(0.1f64, |size, x| size.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= precision * size, "{what}, number {i}: {found} {expected}");
    }
}

fn check_formula<E: Number>(rows: usize, n: usize, precision: f64) {
    for kind in KINDS {
        let [x, grad, add]: [Vec<E>; 3] = [1, 2, 3].map(|seed| numbers(seed, rows * n));
        let [weight, bias]: [Vec<E>; 2] = [4, 5].map(|seed| numbers(seed, n));
        for unit_offset in [false, true] {
            let norm = Norm { kind, weight: &weight, bias: Some(&bias), eps: 1e-3, unit_offset };
            let offset = f64::from(u8::from(unit_offset));
            let with_offset: Vec<f64> = wide(&weight).iter().map(|x| x + offset).collect();
            let [y, x_grad, weight_grad, bias_grad] =
                by_formula(kind, &wide(&x), &with_offset, &wide(&bias), 1e-3, &wide(&grad));
            let what = |part: &str| format!("{kind:?}, {rows} x {n}, {part}");
            assert_close(&wide(&norm.forward(&x).unwrap()), &y, precision, &what("output"));
            let found = norm.backward(&x, &grad, None).unwrap();
            assert_close(&wide(&found.x), &x_grad, precision, &what("gradient of x"));
            let added = norm.backward(&x, &grad, Some(&add)).unwrap();
            let sum: Vec<f64> = x_grad.iter().zip(wide(&add)).map(|(x, add)| x + add).collect();
            assert_close(&wide(&added.x), &sum, 2.0 * precision, &what("gradient of x, added to"));
            // Their type is that of the computation, but the inputs are the same.
            let precision = precision.min(1e-6);
            assert_close(&wide(&found.weight), &weight_grad, precision, &what("gradient of the weight"));
            assert_close(&wide(&found.bias.unwrap()), &bias_grad, precision, &what("gradient of the bias"));
        }
    }
}

/// Rows with and without a part of a vector at the end, with an odd number of vectors, of one and of several pieces and tasks.
fn shapes() -> Vec<(usize, usize)> {
    let small = vec![(0, 4), (1, 1), (3, 5), (2, 16), (5, 24), (3, 56), (70, 37), (1, 1030)];
    let large = vec![(1, 40_000), (3000, 33), (300, 256)];
    if cfg!(miri) { small } else { [small, large].concat() }
}

#[test]
fn norms_and_their_gradients_are_those_of_the_formulas() {
    for (rows, n) in shapes() {
        check_formula::<f64>(rows, n, 1e-13);
        check_formula::<f32>(rows, n, 1e-6);
        check_formula::<f16>(rows, n, 1.0 / 1024.0);
        check_formula::<bf16>(rows, n, 1.0 / 128.0);
    }
}

#[test]
fn norm_without_bias_is_that_with_a_bias_of_zero() {
    let (x, weight): (Vec<f32>, Vec<f32>) = (numbers(1, 5 * 21), numbers(2, 21));
    for kind in KINDS {
        let norm = Norm { kind, weight: &weight, bias: None, eps: 1e-5, unit_offset: false };
        let zeros = Norm { bias: Some(&[0.0; 21]), ..norm };
        assert_eq!(norm.forward(&x).unwrap(), zeros.forward(&x).unwrap());
        let [without, with] = [norm, zeros].map(|norm| norm.backward(&x, &x, None).unwrap());
        assert_eq!((without.x, without.weight), (with.x, with.weight));
        assert!(without.bias.is_none() && with.bias.is_some());
    }
}

#[test]
fn sum_with_the_residual_is_rounded_before_it_is_normalised() {
    fn check<E: Number + PartialEq + std::fmt::Debug>() {
        let [x, residual]: [Vec<E>; 2] = [1, 2].map(|seed| numbers(seed, 90 * 37));
        let weight: Vec<E> = numbers(3, 37);
        for kind in KINDS {
            let norm = Norm { kind, weight: &weight, bias: None, eps: 1e-5, unit_offset: false };
            let (sum, y) = norm.forward_added(&x, &residual).unwrap();
            let expected: Vec<E> = x.iter().zip(&residual).map(|(x, y)| E::narrow(x.widen() + y.widen())).collect();
            assert_eq!(sum, expected);
            assert_eq!(y, norm.forward(&sum).unwrap());
        }
    }
    check::<f32>();
    check::<bf16>();
}

/// A norm doesn't depend on the size of a row, up to the largest numbers; nor does a row beside it.
#[test]
fn rows_of_huge_numbers_have_the_norm_of_their_direction() {
    fn check<R: SimdFloat + Number<Float = R>>(huge: f64, precision: f64) {
        let n = 37;
        let direction: Vec<f64> = numbers::<f64>(1, n);
        let rows = |size: f64| -> Vec<R> {
            let sizes = [size, 1.0, -size];
            let rows = sizes.iter().flat_map(|size| direction.iter().map(move |x| R::from_f64(x * size)));
            rows.chain((0..n).map(|_| R::from_f64(size))).collect()
        };
        let (weight, grad): (Vec<R>, Vec<R>) = (numbers(2, n), numbers(3, 4 * n));
        for kind in KINDS {
            let norm = Norm { kind, weight: &weight, bias: None, eps: 1e-5, unit_offset: false };
            let (ordinary, large) = (rows(1e4), rows(huge));
            let what = format!("{kind:?}, {huge:e}");
            assert_close(
                &wide(&norm.forward(&large).unwrap()),
                &wide(&norm.forward(&ordinary).unwrap()),
                precision,
                &what,
            );
            let gradients = norm.backward(&large, &grad, None).unwrap();
            let expected = norm.backward(&ordinary, &grad, None).unwrap();
            assert_close(&wide(&gradients.weight), &wide(&expected.weight), precision, &what);
            assert!(wide(&gradients.x).iter().all(|x| x.is_finite()));
            // The gradient of x falls as the row grows.
            let scaled: Vec<f64> = wide(&gradients.x)[..n].iter().map(|x| x * (huge / 1e4)).collect();
            assert_close(&scaled, &wide(&expected.x)[..n], 1e-4, &what);
        }
    }
    check::<f32>(1e30, 1e-5);
    check::<f32>(1e38, 1e-5);
    check::<f64>(1e300, 1e-11);
}

#[test]
fn rows_of_equal_numbers_are_zero_after_the_mean_is_subtracted() {
    for size in [1e-30f32, 0.1, 12345.678, 3e38] {
        let (x, weight) = (vec![size; 2 * 37], vec![1.0; 37]);
        let norm = Norm { kind: NormKind::Layer, weight: &weight, bias: None, eps: 1e-5, unit_offset: false };
        let y = norm.forward(&x).unwrap();
        assert!(y.iter().all(|y| y.abs() < 1e-3), "{size}: {y:?}");
    }
}

/// Two squares that a difference of E[x²] and E[x]² would lose.
#[test]
fn small_variance_beside_a_large_mean_keeps_its_digits() {
    let x: Vec<f32> = (0..64).map(|i| 4096.0 + (i % 2) as f32 / 128.0).collect();
    let norm = Norm { kind: NormKind::Layer, weight: &[1.0; 64], bias: None, eps: 1e-12, unit_offset: false };
    let y = norm.forward(&x).unwrap();
    assert!(y.iter().all(|y| (y.abs() - 1.0).abs() < 1e-5), "{y:?}");
}

#[test]
fn rows_that_are_not_finite_leave_the_others_as_they_are() {
    let x: Vec<f32> = numbers(1, 4 * 37);
    let weight: Vec<f32> = numbers(2, 37);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for kind in KINDS {
            let norm = Norm { kind, weight: &weight, bias: None, eps: 1e-5, unit_offset: false };
            let (mut with, clean) = (x.clone(), norm.forward(&x).unwrap());
            with[37 + 3] = bad;
            let y = norm.forward(&with).unwrap();
            assert!(y[37 + 3].is_nan(), "{bad} {kind:?}");
            assert_eq!(y[..37], clean[..37]);
            assert_eq!(y[2 * 37..], clean[2 * 37..]);
            let grad = norm.backward(&with, &x, None).unwrap();
            assert!(grad.x[37..2 * 37].iter().any(|x| x.is_nan()));
            assert!(grad.x[..37].iter().chain(&grad.x[2 * 37..]).all(|x| x.is_finite()));
        }
    }
}

/// A sum of two million numbers in f32 would stop growing, or lose its last digits.
#[test]
#[cfg_attr(miri, ignore = "many numbers")]
fn gradients_of_parameters_are_summed_without_loss() {
    let rows = 2_000_000;
    let x: Vec<f32> = (0..rows * 2).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let grad = vec![0.1f32; rows * 2];
    let norm =
        Norm { kind: NormKind::Layer, weight: &[1.0, 1.0], bias: Some(&[0.0; 2]), eps: 1e-12, unit_offset: false };
    let gradients = norm.backward(&x, &grad, None).unwrap();
    let expected = rows as f64 * f64::from(0.1f32);
    for (found, expected) in gradients.weight.iter().chain(&gradients.bias.unwrap()).zip([1.0, -1.0, 1.0, 1.0]) {
        let relative = f64::from(*found) / (expected * rows as f64 * f64::from(0.1f32)) - 1.0;
        assert!(relative.abs() < 1e-6, "{found}: {relative:e}");
    }
    assert!(expected > 0.0);
}

#[test]
fn bad_input_is_an_error() {
    let norm = Norm { kind: NormKind::Rms, weight: &[1f32; 4], bias: None, eps: 1e-5, unit_offset: false };
    let x = [1f32; 8];
    let length = |result: Result<(), Error>| assert!(matches!(result, Err(Error::Length { got: 7, .. })), "{result:?}");
    length(norm.forward(&x[..7]).map(drop));
    length(norm.forward_added(&x, &x[..7]).map(drop));
    length(norm.backward(&x, &x[..7], None).map(drop));
    length(norm.backward(&x, &x, Some(&x[..7])).map(drop));
    length(Norm { bias: Some(&x[..7]), ..norm }.forward(&x).map(drop));
    length(Norm { weight: &[], ..norm }.forward(&x[..7]).map(drop));
    for eps in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-50] {
        assert!(matches!(Norm { eps, ..norm }.forward(&x), Err(Error::Option { what: "eps", .. })), "{eps}");
    }
    assert!(Norm { weight: &[], ..norm }.backward(&[], &[], None).is_ok());
}
