use half::{bf16, f16};

use super::*;
use crate::simd::with_every_simd;

const ALL: [Activation; 5] =
    [Activation::Relu, Activation::SquaredRelu, Activation::Gelu, Activation::GeluTanh, Activation::Silu];

/// f(x) and f'(x) to about the precision of an f64, by the formulas; Φ by its series, or far from 0 its continued fraction.
fn expected(activation: Activation, x: f64) -> (f64, f64) {
    let sigmoid = |y: f64| if y < 0.0 { y.exp() / (1.0 + y.exp()) } else { 1.0 / (1.0 + (-y).exp()) };
    match activation {
        Activation::Relu => (x.max(0.0), f64::from(x > 0.0)),
        Activation::SquaredRelu => (x.max(0.0).powi(2), 2.0 * x.max(0.0)),
        Activation::Silu => {
            let share = sigmoid(x);
            (x * share, share * (1.0 + x * sigmoid(-x)))
        }
        Activation::GeluTanh => {
            let scale = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
            let inner = scale * (x + 0.044715 * x.powi(3));
            let share = sigmoid(inner);
            (x * share, share + x * share * sigmoid(-inner) * scale * (1.0 + 3.0 * 0.044715 * x * x))
        }
        Activation::Gelu => {
            let density = (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt();
            // Near zero the rounding errors of the fraction add up.
            let share = if -1.0 < x && x < 2.5 { 0.5 + density * series(x) } else { tail(x, density) };
            (x * share, share + x * density)
        }
    }
}

/// (Φ(x) - 1/2) / φ(x) = x + x³ / 3 + x⁵ / 15 + ... (Abramowitz, Stegun, 26.2.11)
fn series(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for i in 1..100 {
        term *= x * x / f64::from(2 * i + 1);
        sum += term;
    }
    sum
}

/// Φ(x) by the continued fraction of its tail (26.2.14).
fn tail(x: f64, density: f64) -> f64 {
    let mut fraction = x.abs();
    for i in (1..400).rev() {
        fraction = x.abs() + f64::from(i) / fraction;
    }
    let tail = density / fraction;
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// The error of each number beside the exact one. The argument of an exponential is rounded, which shows in the tails.
fn check<R: SimdFloat, S: Simd>(simd: S, precision: f64) {
    for activation in ALL {
        for i in (-4000..=4000).step_by(if cfg!(miri) { 997 } else { 1 }) {
            let x = R::from_f64(f64::from(i) / 300.0);
            let (y, slope) = with_function!(activation, f => Function::<R>::both(f, simd, R::splat(simd, x)));
            let number = |y: R::Vector<S>| pulp::bytemuck::cast_slice::<_, R>(std::slice::from_ref(&y))[0].to_f64();
            let (x, y, slope) = (x.to_f64(), number(y), number(slope));
            let expected = expected(activation, x);
            // Exponentials below the smallest normal number are 0.
            let denormal = 100.0 * R::TINY.to_f64();
            let precision = precision * (1.0 + x * x / 2.0);
            assert!(
                (y - expected.0).abs() <= precision * expected.0.abs() + denormal,
                "{activation:?} {x}: {y} {expected:?}"
            );
            // Near its zero a derivative has the error of the larger numbers that it is the difference of.
            let size = expected.1.abs().max(0.1 * (-x * x / 2.0).exp());
            assert!(
                (slope - expected.1).abs() <= 4.0 * precision * size + denormal,
                "{activation:?}' {x}: {slope} {expected:?}"
            );
        }
    }
}

#[test]
fn functions_and_their_derivatives_have_all_digits() {
    with_every_simd!(|simd| {
        // Three units in the last place.
        check::<f32, S>(simd, 3.6e-7);
        check::<f64, S>(simd, 3e-15);
    });
}

#[test]
fn finite_numbers_give_no_nan() {
    fn check<E: Number + std::fmt::Debug>(largest: f64) {
        let sizes = [0.0, 1e-40, 1e-3, 1.0, 12.0, 13.5, 30.0, 38.0, 90.0, 750.0, 1e4, 1e20, 1e30, 1e308]
            .map(|x: f64| x.min(largest));
        let x: Vec<E> = sizes.iter().flat_map(|&x| [x, -x]).map(|x| E::narrow(E::Float::from_f64(x))).collect();
        let ones = vec![E::narrow(E::Float::ONE); x.len()];
        for activation in ALL {
            let mut results = vec![activation.forward(&x).unwrap(), activation.backward(&x, &ones).unwrap()];
            results.push(activation.gated_forward(&x, &ones).unwrap());
            results.extend(activation.gated_backward(&x, &ones, &ones).unwrap());
            for result in results {
                let is_nan = |y: &E| y.widen().to_f64().is_nan();
                assert!(!result.iter().any(is_nan), "{activation:?} of {x:?}: {result:?}");
            }
            let y = activation.forward(&x).unwrap();
            let slopes = activation.backward(&x, &ones).unwrap();
            let pairs = y.chunks(2).zip(slopes.chunks(2)).zip(sizes).filter(|(_, size)| *size >= 1e4);
            for ((y, slope), size) in pairs {
                // The largest numbers pass, and the lowest don't.
                assert_eq!([y[1], slope[1]].map(|x| x.widen().to_f64()), [0.0; 2], "{activation:?} of -{size}");
                let [y, slope] = [y[0], slope[0]].map(|x| x.widen().to_f64());
                if activation != Activation::SquaredRelu {
                    assert!((y / size - 1.0).abs() < 0.01 && slope == 1.0, "{activation:?} of {size}: {y} {slope}");
                }
            }
        }
    }
    check::<f32>(1e30);
    check::<f64>(1e300);
    check::<bf16>(1e30);
    check::<f16>(6e4);
}

#[test]
fn nan_stays_nan_and_in_its_place() {
    let x = [1f32, f32::NAN, -1.0];
    for activation in ALL {
        let y = activation.forward(&x).unwrap();
        let slope = activation.backward(&x, &[1.0, f32::NAN, 1.0]).unwrap();
        for y in [y, slope] {
            assert!(y[1].is_nan() && !y[0].is_nan() && !y[2].is_nan(), "{activation:?}: {y:?}");
        }
    }
}

/// Lengths with and without a part of a vector at the end, of one and of several tasks.
const LENGTHS: [usize; 6] = if cfg!(miri) { [0, 1, 16, 21, 300, 301] } else { [0, 1, 16, 300, 16384, 16384 * 2 + 77] };

/// Numbers that are no multiples of a power of two.
fn numbers<E: Number>(seed: usize, count: usize) -> Vec<E> {
    (0..count).map(|i| E::narrow(E::Float::from_f64(((i * 37 + seed * 11) % 101) as f64 / 13.0 - 3.7))).collect()
}

fn check_lengths<E: Number + PartialEq + std::fmt::Debug>() {
    for count in LENGTHS {
        let [x, up, grad]: [Vec<E>; 3] = [1, 2, 3].map(|seed| numbers(seed, count));
        for activation in ALL {
            let one = |i: usize| {
                let [x, up, grad] = [x[i], up[i], grad[i]].map(|x| [x]);
                let [of_gate, of_up] = activation.gated_backward(&x, &up, &grad).unwrap();
                let y = activation.forward(&x).unwrap()[0];
                let gated = activation.gated_forward(&x, &up).unwrap()[0];
                [y, activation.backward(&x, &grad).unwrap()[0], gated, of_gate[0], of_up[0]]
            };
            let [of_gate, of_up] = activation.gated_backward(&x, &up, &grad).unwrap();
            let y = activation.forward(&x).unwrap();
            let all = [
                y,
                activation.backward(&x, &grad).unwrap(),
                activation.gated_forward(&x, &up).unwrap(),
                of_gate,
                of_up,
            ];
            assert!(all.iter().all(|y| y.len() == count));
            for i in (0..count).step_by(count / 300 + 1).chain(count.checked_sub(1)) {
                assert_eq!(all.each_ref().map(|y| y[i]), one(i), "{activation:?}, number {i} of {count}");
            }
        }
    }
}

#[test]
fn every_number_is_computed_as_it_is_alone() {
    check_lengths::<f32>();
    check_lengths::<f64>();
    check_lengths::<bf16>();
    check_lengths::<f16>();
}

#[test]
fn rows_of_gates_and_others_are_gated_as_two_tensors() {
    fn check<E: Number + PartialEq + std::fmt::Debug>() {
        for (rows, n) in [(0, 3), (3, 0), (1, 1), (5, 16), (7, 21), (2, if cfg!(miri) { 50 } else { 20_000 })] {
            let (gate_up, grad): (Vec<E>, Vec<E>) = (numbers(1, rows * 2 * n), numbers(2, rows * n));
            let half = |first: usize| -> Vec<E> {
                (0..rows).flat_map(|r| gate_up[(2 * r + first) * n..][..n].iter().copied()).collect()
            };
            let (gate, up) = (half(0), half(1));
            for activation in ALL {
                let y = activation.gated_rows_forward(rows, n, &gate_up).unwrap();
                assert_eq!(y, activation.gated_forward(&gate, &up).unwrap());
                let found = activation.gated_rows_backward(rows, n, &gate_up, &grad).unwrap();
                let [of_gate, of_up] = activation.gated_backward(&gate, &up, &grad).unwrap();
                let row = |r: usize| [&of_gate[r * n..][..n], &of_up[r * n..][..n]].concat();
                assert_eq!(found, (0..rows).flat_map(row).collect::<Vec<_>>());
            }
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn slices_in_place_are_those_of_tensors() {
    for count in [0, 5, 16, 77] {
        let (x, grad): (Vec<f32>, Vec<f32>) = (numbers(1, count), numbers(2, count));
        for activation in ALL {
            let (mut y, mut x_grad) = (x.clone(), grad.clone());
            activation.apply(&mut y);
            activation.apply_derivative(&x, &mut x_grad);
            assert_eq!(y, activation.forward(&x).unwrap());
            assert_eq!(x_grad, activation.backward(&x, &grad).unwrap());
        }
    }
}

#[test]
fn gradients_in_place_are_those_of_tensors() {
    fn check<E: Number + PartialEq + std::fmt::Debug>() {
        for count in LENGTHS {
            let (x, grad): (Vec<E>, Vec<E>) = (numbers(1, count), numbers(2, count));
            for activation in ALL {
                let mut found = grad.clone();
                activation.backward_in_place(&x, &mut found).unwrap();
                assert_eq!(found, activation.backward(&x, &grad).unwrap(), "{activation:?} of {count} numbers");
            }
        }
    }
    check::<f32>();
    check::<f64>();
    check::<bf16>();
    check::<f16>();
}

#[test]
fn slices_of_two_lengths_are_an_error() {
    let (x, long) = ([1f32; 4], [1f32; 5]);
    let activation = Activation::Silu;
    for error in [
        activation.backward(&x, &long).unwrap_err(),
        activation.backward_in_place(&x, &mut long.clone()).unwrap_err(),
        activation.gated_forward(&x, &long).unwrap_err(),
        activation.gated_backward(&x, &long, &x).unwrap_err(),
        activation.gated_backward(&x, &x, &long).unwrap_err(),
        activation.gated_rows_forward(2, 2, &long).unwrap_err(),
        activation.gated_rows_forward(usize::MAX, 2, &long).unwrap_err(),
        activation.gated_rows_backward(1, 2, &x, &long).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Length { got: 5, .. }), "{error}");
    }
}
