use half::{bf16, f16};

use super::*;

/// Some numbers, never the same twice.
fn numbers<E: Number>(count: usize, seed: u32) -> Vec<E> {
    let number =
        |i: usize| f64::from((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed * 97) % 1009) / 504.0 - 1.0;
    (0..count).map(|i| E::narrow(E::Float::from_f64(number(i)))).collect()
}

/// The formula in f64, number by number.
fn expected(constants: AdamWConstants, step: i32, (rate, decay): (f64, f64), [x, g, m, v]: [f64; 4]) -> [f64; 3] {
    let AdamWConstants { beta1, beta2, eps } = constants;
    let m = beta1 * m + (1.0 - beta1) * g;
    let v = beta2 * v + (1.0 - beta2) * g * g;
    let unbiased = |moment: f64, beta: f64| moment / (1.0 - beta.powi(step));
    let update = rate * unbiased(m, beta1) / (unbiased(v, beta2).sqrt() + eps);
    [x - rate * decay * x - update, m, v]
}

fn follows_the_formula<E: Number>(beta1: f64, tolerance: f64) {
    let sizes = if cfg!(miri) { vec![1, 33, 600] } else { vec![0, 1, 33, PIECE - 1, PIECE + 5, 3 * PIECE] };
    let mut state: Vec<_> = sizes
        .iter()
        .map(|&n| (numbers::<E>(n, 1), numbers::<E>(n, 2), numbers::<E::Float>(n, 3), numbers::<E::Float>(n, 4)))
        .collect();
    state.iter_mut().for_each(|(.., second)| second.iter_mut().for_each(|x| *x = *x * *x));
    let before = state.clone();
    let constants = AdamWConstants { beta1, beta2: 0.99, eps: 1e-3 };
    let step = |i: usize| i as u64 + 1;
    let rates = |i: usize| (0.01 * (i + 1) as f64, if i.is_multiple_of(2) { 0.1 } else { 0.0 });
    let parameters = state.iter_mut().enumerate().map(|(i, (values, gradient, first_moment, second_moment))| {
        let (learning_rate, weight_decay) = rates(i);
        AdamWParameter {
            values,
            gradient,
            master: None,
            first_moment,
            second_moment,
            step: step(i),
            learning_rate,
            weight_decay,
        }
    });
    adamw(constants, parameters.collect()).unwrap();
    for (i, ((x, g, m, v), (x0, _, m0, v0))) in state.iter().zip(&before).enumerate() {
        for j in 0..x.len() {
            let numbers = [x0[j].widen().to_f64(), g[j].widen().to_f64(), m0[j].to_f64(), v0[j].to_f64()];
            let want = expected(constants, step(i) as i32, rates(i), numbers);
            assert!((x[j].widen().to_f64() - want[0]).abs() <= tolerance, "{i}, {j}");
            assert!((m[j].to_f64() - want[1]).abs() <= 1e-6 && (v[j].to_f64() - want[2]).abs() <= 1e-6, "{i}, {j}");
        }
    }
}

#[test]
fn a_step_follows_the_formula() {
    for beta1 in [0.9, 0.2, 0.0] {
        follows_the_formula::<f64>(beta1, 1e-14);
        follows_the_formula::<f32>(beta1, 1e-6);
        follows_the_formula::<f16>(beta1, 6e-4);
        follows_the_formula::<bf16>(beta1, 5e-3);
    }
}

#[test]
fn numbers_have_the_same_bits_wherever_they_stand() {
    let count = if cfg!(miri) { 70 } else { 2 * PIECE + 70 };
    let [mut all, mut first, mut second] = [1, 2, 3].map(|seed| numbers::<f32>(count, seed));
    second.iter_mut().for_each(|x| *x = x.abs());
    let (gradient, constants) = (numbers::<f32>(count, 4), AdamWConstants { beta1: 0.9, beta2: 0.99, eps: 1e-8 });
    let [x, m, v] = [&all, &first, &second].map(|x| x[count - 3..count - 2].to_vec());
    let run = |values: &mut [f32], gradient: &[f32], first_moment: &mut [f32], second_moment: &mut [f32]| {
        let (step, learning_rate, weight_decay) = (1, 0.1, 0.1);
        let parameter = AdamWParameter {
            values,
            gradient,
            master: None,
            first_moment,
            second_moment,
            step,
            learning_rate,
            weight_decay,
        };
        adamw(constants, vec![parameter]).unwrap();
    };
    run(&mut all, &gradient, &mut first, &mut second);
    let mut alone = [x, m, v];
    let [x, m, v] = &mut alone;
    run(x, &gradient[count - 3..count - 2], m, v);
    assert_eq!([all[count - 3], first[count - 3], second[count - 3]], alone.map(|x| x[0]));
}

/// The parameter's numbers and those of its master copy after a step without decay.
fn master_step<E: Number, G: Number<Float = E::Float>>(
    values: &mut [E],
    gradient: &[G],
    master: Option<&mut [E::Float]>,
) -> Result<(), Error> {
    let (mut first, mut second) = (vec![E::Float::ZERO; values.len()], vec![E::Float::ZERO; values.len()]);
    let parameter = AdamWParameter {
        values,
        gradient,
        master,
        first_moment: &mut first,
        second_moment: &mut second,
        step: 1,
        learning_rate: 1e-4,
        weight_decay: 0.0,
    };
    adamw(AdamWConstants { beta1: 0.9, beta2: 0.99, eps: 1e-8 }, vec![parameter])
}

#[test]
fn a_master_copy_takes_the_step_of_its_own_type_and_the_parameter_is_its_rounding() {
    fn check<E: Number + PartialEq + std::fmt::Debug>() {
        for count in if cfg!(miri) { vec![1, 600] } else { vec![0, 1, 600, PIECE + 3, 3 * PIECE] } {
            let start: Vec<E> = numbers(count, 1);
            let gradient: Vec<E> = numbers(count, 2);
            let wide: Vec<E::Float> = start.iter().map(|x| x.widen()).collect();
            let wide_gradient: Vec<E::Float> = gradient.iter().map(|x| x.widen()).collect();
            let mut alone = wide.clone();
            master_step(&mut alone, &wide_gradient, None).unwrap();
            // A gradient in the type that is computed in gives the same bits.
            let [mut narrow, mut also_narrow] = [start.clone(), start];
            let [mut master, mut also_master] = [wide.clone(), wide];
            master_step(&mut narrow, &gradient, Some(&mut master)).unwrap();
            master_step(&mut also_narrow, &wide_gradient, Some(&mut also_master)).unwrap();
            assert!(master == alone && also_master == alone, "{count}");
            assert!(narrow == alone.iter().map(|x| E::narrow(*x)).collect::<Vec<_>>(), "{count}");
            assert_eq!(narrow, also_narrow);
        }
    }
    check::<f16>();
    check::<bf16>();
    check::<f32>();
    check::<f64>();
}

#[test]
fn a_number_that_was_changed_from_outside_is_taken_by_the_master_copy() {
    let one = bf16::from_f32(1.0);
    // The second number is the rounded master and keeps its digits; the others were changed, one of them to NaN.
    let mut values = [bf16::from_f32(-3.0), one, bf16::NAN];
    let mut master = [7.0f32, 1.0 + 1e-3, 5.0];
    master_step(&mut values, &[bf16::ZERO; 3], Some(&mut master)).unwrap();
    assert_eq!(master[..2], [-3.0, 1.0 + 1e-3]);
    assert!(master[2].is_nan() && values[2].is_nan());
    assert_eq!(values[..2], [bf16::from_f32(-3.0), one]);
    let error = master_step(&mut values, &[bf16::ZERO; 3], Some(&mut master[..2])).unwrap_err();
    assert_eq!(error.to_string(), "the master copy of a parameter: expected the parameter's 3, got 2 elements");
}

#[test]
fn slices_of_other_lengths_and_step_zero_are_refused() {
    let mut numbers = [[0f32; 3]; 3];
    let [values, first_moment, second_moment] = &mut numbers;
    let mut run = |gradient: &[f32], step| {
        let parameter = AdamWParameter {
            values: &mut values[..],
            gradient,
            master: None,
            first_moment: &mut first_moment[..],
            second_moment: &mut second_moment[..],
            step,
            learning_rate: 0.1,
            weight_decay: 0.1,
        };
        adamw(AdamWConstants { beta1: 0.9, beta2: 0.99, eps: 1e-8 }, vec![parameter])
    };
    let error = run(&[1.0; 2], 1).unwrap_err();
    assert_eq!(error.to_string(), "the gradient of a parameter: expected the parameter's 3, got 2 elements");
    assert_eq!(run(&[1.0; 3], 0).unwrap_err().to_string(), "step of AdamW: expected at least 1, got 0");
    assert_eq!(numbers, [[0.0; 3]; 3]);
}

#[test]
fn sums_of_squares_are_those_of_f64() {
    fn check<E: Number>() {
        let sizes = if cfg!(miri) { vec![0, 5, 50, 64, 700] } else { vec![0, 5, 50, 64, 700, 3 * PIECE + 1] };
        let slices: Vec<Vec<E>> = sizes.iter().map(|&count| numbers(count, 5)).collect();
        let sums = sums_of_squares(&slices.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
        for (sum, slice) in sums.iter().zip(&slices) {
            let expected: f64 = slice.iter().map(|x| x.widen().to_f64().powi(2)).sum();
            assert!((sum - expected).abs() <= 1e-12 * expected, "{sum} {expected}");
        }
    }
    check::<f16>();
    check::<bf16>();
    check::<f32>();
    check::<f64>();
    assert!(sums_of_squares(&[&[1f32, f32::NAN][..]]).unwrap()[0].is_nan());
    assert_eq!(sums_of_squares(&[&[f16::MAX, f16::INFINITY][..]]).unwrap(), [f64::INFINITY]);
    assert!(sums_of_squares(&[&[f32::MAX; 1000][..]]).unwrap()[0].is_finite());
}

#[test]
fn scaled_numbers_are_rounded_once() {
    fn check<E: Number + PartialEq + std::fmt::Debug>() {
        let count = if cfg!(miri) { 600 } else { 3 * PIECE };
        let mut scaled = [numbers::<E>(count, 7), numbers(3, 8)];
        let factor = E::Float::from_f64(0.3);
        let expected =
            scaled.clone().map(|slice| slice.iter().map(|x| E::narrow(x.widen() * factor)).collect::<Vec<_>>());
        scale(scaled.iter_mut().map(Vec::as_mut_slice).collect(), 0.3).unwrap();
        assert_eq!(scaled, expected);
    }
    check::<f16>();
    check::<bf16>();
    check::<f32>();
    check::<f64>();
}
