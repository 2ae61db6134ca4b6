//! RMS norm and layer norm: they equal their formulas and candle's, and sum the gradients of their parameters without loss.

use candle_attention::Result;
use candle_attention::block::{layer_norm, rms_norm};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{RmsNorm, ops};

use crate::common::{
    assert_close, assert_finite, assert_same_bits, check_gradients, gradients, max_abs_difference, numbers, randn, var,
};
use crate::layers::assert_error_says;

const EPS: f64 = 1e-3;

/// Both norms of the same input, with the gradients of x, weight and bias for the loss Σ y · c, where the c are numbers near 1
/// that every dtype can hold. RMS norm has no bias.
fn both(x: &Tensor, weight: &Tensor, bias: &Tensor, dtype: DType) -> Result<[Vec<Tensor>; 2]> {
    let vars = [x.to_dtype(dtype)?, weight.to_dtype(dtype)?, bias.to_dtype(dtype)?].map(|x| Var::from_tensor(&x));
    let [x, weight, bias] = vars;
    let (x, weight, bias) = (x?, weight?, bias?);
    let run = |y: Tensor, vars: &[&Var]| -> Result<Vec<Tensor>> {
        let c = randn(9, y.shape(), DType::F64)?.affine(0.5, 1.0)?.to_dtype(DType::BF16)?.to_dtype(DType::F64)?;
        let loss = (y.to_dtype(DType::F64)? * c)?.sum_all()?;
        Ok([vec![y], gradients(&loss, vars)?].concat())
    };
    let rms = run(rms_norm(&x, &weight, EPS)?, &[&x, &weight])?;
    Ok([rms, run(layer_norm(&x, &weight, Some(&bias), EPS)?, &[&x, &weight, &bias])?])
}

#[test]
fn gradients_of_norms_are_summed_without_loss_in_half_types() -> Result<()> {
    for (dtype, roundoff) in [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)] {
        let x = (randn(1, (8, 2048, 16), DType::F64)? * 0.5)?.to_dtype(dtype)?;
        let weight = randn(2, 16, DType::F64)?.affine(0.1, 1.0)?.to_dtype(dtype)?;
        let bias = randn(3, 16, dtype)?;
        let (found, expected) = (both(&x, &weight, &bias, dtype)?, both(&x, &weight, &bias, DType::F64)?);
        for (norm, (found, expected)) in ["RMS norm", "layer norm"].iter().zip(found.iter().zip(&expected)) {
            for (what, (found, expected)) in
                ["output", "gradient of x", "of the weight", "of the bias"].iter().zip(found.iter().zip(expected))
            {
                let largest = numbers(expected)?.into_iter().fold(0f64, |largest, x| largest.max(x.abs()));
                let difference = max_abs_difference(found, expected)? / largest / roundoff;
                assert!(difference < 2.0, "{dtype:?}, {norm}, {what}: off by {difference} roundoffs");
            }
        }
    }
    Ok(())
}

#[test]
fn norms_in_f32_and_f64_are_those_of_candle() -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-14)] {
        let x = randn(1, (3, 7, 37), dtype)?;
        let (weight, bias) = (randn(2, 37, dtype)?, randn(3, 37, dtype)?);
        for x in [x.clone(), x.transpose(0, 1)?, x.narrow(1, 2, 4)?] {
            let candle = RmsNorm::new(weight.clone(), EPS).forward_diff(&x)?;
            assert_close(&rms_norm(&x, &weight, EPS)?, &candle, tolerance, "RMS norm");
            let eps = EPS as f32;
            let candle = ops::layer_norm_slow(&x, &weight, &bias, eps)?;
            assert_close(&layer_norm(&x, &weight, Some(&bias), eps.into())?, &candle, tolerance, "layer norm");
            let without_bias = layer_norm(&x, &weight, None, EPS)?;
            assert_same_bits(&without_bias, &layer_norm(&x, &weight, Some(&bias.zeros_like()?), EPS)?, "no bias");
        }
    }
    Ok(())
}

/// The work is cut by the shape alone.
#[test]
fn norms_have_the_same_bits_for_one_thread_and_two() -> Result<()> {
    let (x, weight, bias) = (randn(1, (500, 300), DType::F32)?, randn(2, 300, DType::F32)?, randn(3, 300, DType::F32)?);
    let with = |threads: usize| -> Vec<Tensor> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| both(&x, &weight, &bias, DType::F32)).unwrap().concat()
    };
    for (one, two) in with(1).iter().zip(&with(2)) {
        assert_same_bits(one, two, "output or gradient");
    }
    Ok(())
}

#[test]
fn gradients_of_norms_are_those_of_finite_differences() -> Result<()> {
    let (x, weight, bias) = (var(1, (2, 3, 5), DType::F64)?, var(2, 5, DType::F64)?, var(3, 5, DType::F64)?);
    let vars = [("x", &x), ("weight", &weight), ("bias", &bias)];
    check_gradients(&vars[..2], || rms_norm(&x, &weight, EPS)?.sin(), 1e-8, "RMS norm");
    check_gradients(&vars, || layer_norm(&x, &weight, Some(&bias), EPS)?.sin(), 1e-8, "layer norm");
    Ok(())
}

/// Parameters in f32 beside activations in a half type, as in mixed precision.
#[test]
fn result_has_the_dtype_of_the_input_and_gradients_that_of_their_tensors() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let (x, weight, bias) = (var(1, (4, 5), dtype)?, var(2, 5, DType::F32)?, var(3, 5, DType::F32)?);
        let y = layer_norm(&x, &weight, Some(&bias), EPS)?;
        assert_eq!(y.dtype(), dtype);
        gradients(&y.sum_all()?, &[&x, &weight, &bias])?;
        let y = rms_norm(&x, &weight, EPS)?;
        assert_eq!(y.dtype(), dtype);
        gradients(&y.sum_all()?, &[&x, &weight])?;
    }
    Ok(())
}

/// A norm doesn't depend on the size of a row, up to the largest numbers; a row beside it keeps its own.
#[test]
fn rows_of_huge_numbers_have_the_norm_of_their_direction() -> Result<()> {
    let row = [1.0, -1.0, 0.5, 2.0, 0.25];
    for (dtype, huge) in [(DType::F32, 1e38), (DType::BF16, 1e38), (DType::F64, 8e307)] {
        let tolerance = if dtype == DType::BF16 { 2e-2 } else { 1e-5 };
        let tensor = |rows: [[f64; 5]; 3]| Tensor::new(&rows, &Device::Cpu)?.to_dtype(dtype);
        let (weight, bias) = (var(1, 5, dtype)?, var(2, 5, dtype)?);
        // The epsilon is nothing beside 1e4².
        let with = |size: f64| tensor([row.map(|x| x * size), row.map(|x| x * 1e-3), [size; 5]]);
        let expected = both(&with(1e4)?, &weight, &bias, dtype)?;
        let got = both(&with(huge)?, &weight, &bias, dtype)?;
        for (expected, got) in expected.iter().zip(&got) {
            // The first of each is the output; the others are gradients.
            assert_close(&got[0], &expected[0], tolerance, &format!("{dtype:?}"));
            got.iter().for_each(|x| assert_finite(x, "output and gradients"));
        }
    }
    Ok(())
}

#[test]
fn rows_of_zeros_and_empty_inputs_have_finite_gradients() -> Result<()> {
    for dims in [&[3, 5][..], &[5], &[0, 5], &[2, 0, 5]] {
        for dtype in [DType::BF16, DType::F32] {
            let x = Tensor::zeros(dims, dtype, &Device::Cpu)?;
            let (weight, bias) = (randn(2, 5, dtype)?, randn(3, 5, dtype)?);
            for results in both(&x, &weight, &bias, dtype)? {
                assert_eq!(results[0].dims(), dims);
                assert!(results.iter().all(|x| numbers(x).unwrap().iter().all(|x| x.is_finite())), "{dims:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn norms_refuse_bad_input() -> Result<()> {
    let x = randn(1, (2, 5), DType::F32)?;
    let (weight, wrong) = (randn(2, 5, DType::F32)?, randn(2, 4, DType::F32)?);
    let integers = Tensor::zeros((2, 5), DType::U32, &Device::Cpu)?;
    let shape = ["expected shape (dim) = [5]", "got [4]"];
    assert_error_says(rms_norm(&x, &wrong, EPS), &[&["weight"][..], &shape].concat());
    assert_error_says(layer_norm(&x, &weight, Some(&wrong), EPS), &[&["bias"][..], &shape].concat());
    assert_error_says(rms_norm(&integers, &weight, EPS), &["x", "F16, BF16, F32 or F64", "U32"]);
    assert_error_says(rms_norm(&x, &integers.get(0)?, EPS), &["weight", "F16, BF16, F32 or F64", "U32"]);
    assert_error_says(rms_norm(&Tensor::new(1f32, x.device())?, &weight, EPS), &["x", "at least 1 axis", "rank 0"]);
    for eps in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-50] {
        assert_error_says(rms_norm(&x, &weight, eps), &["eps", "above 0"]);
        assert_error_says(layer_norm(&x, &weight, None, eps), &["eps", "above 0"]);
    }
    assert!(rms_norm(&x.to_dtype(DType::F64)?, &weight, 1e-50).is_ok());
    Ok(())
}
