//! Dropout: what it drops, its gradient, and errors.

use candle_attention::Result;
use candle_attention::block::{add_dropped, dropout};
use candle_core::{DType, Device, Tensor};

use crate::common::{assert_same_bits, check_gradients, gradients, numbers, randn, var};
use crate::layers::assert_error_says;

#[test]
fn gradients_of_dropout_are_those_of_finite_differences() -> Result<()> {
    let (x, branch) = (var(1, (5, 30), DType::F64)?, var(2, (5, 30), DType::F64)?);
    for p in [0.0, 0.3] {
        check_gradients(&[("x", &x)], || dropout(&x, p, 7)?.sin(), 1e-8, "dropout");
        let both = [("residual", &x), ("branch", &branch)];
        check_gradients(&both, || add_dropped(&x, &branch, p, 7)?.sin(), 1e-8, "with residual");
    }
    Ok(())
}

#[test]
fn what_is_kept_is_divided_by_its_probability() -> Result<()> {
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let y = numbers(&dropout(&Tensor::ones((50, 200), dtype, &Device::Cpu)?, 0.75, 3)?)?;
        assert!(y.iter().all(|&y| y == 0.0 || y == 4.0));
        let kept = y.iter().filter(|&&y| y != 0.0).count() as f64 / y.len() as f64;
        assert!((kept - 0.25).abs() < 0.02, "{kept}");
    }
    Ok(())
}

#[test]
fn what_is_dropped_depends_on_the_seed_and_the_position_alone() -> Result<()> {
    let ones = Tensor::ones((40, 40), DType::F32, &Device::Cpu)?;
    let y = dropout(&ones, 0.5, 1)?;
    assert_same_bits(&y, &dropout(&ones.t()?, 0.5, 1)?, "the same seed");
    assert_ne!(numbers(&y)?, numbers(&dropout(&ones, 0.5, 2)?)?);
    let start = dropout(&ones.narrow(0, 0, 3)?, 0.5, 1)?;
    assert_same_bits(&y.narrow(0, 0, 3)?, &start, "a shorter tensor");
    Ok(())
}

#[test]
fn sum_with_the_residual_is_that_of_two_operations() -> Result<()> {
    let (x, branch) = (randn(1, (40, 50), DType::F64)?, randn(2, (50, 40), DType::F64)?.t()?);
    for p in [0.0, 0.4] {
        assert_same_bits(&add_dropped(&x, &branch, p, 9)?, &(&x + dropout(&branch, p, 9)?)?, "sum");
    }
    Ok(())
}

#[test]
fn dropout_of_zero_is_the_input() -> Result<()> {
    let x = randn(1, (4, 5), DType::F32)?;
    assert_same_bits(&dropout(&x, 0.0, 1)?, &x, "p = 0");
    Ok(())
}

#[test]
fn empty_input_has_an_empty_gradient() -> Result<()> {
    let x = var(1, (3, 0), DType::F32)?;
    gradients(&dropout(&x, 0.5, 1)?.sum_all()?, &[&x])?;
    gradients(&add_dropped(&x, &x, 0.5, 1)?.sum_all()?, &[&x])?;
    Ok(())
}

#[test]
fn probabilities_outside_their_range_are_refused() -> Result<()> {
    let x = randn(1, (2, 4), DType::F32)?;
    for p in [1.0, -0.1, f64::NAN] {
        assert_error_says(dropout(&x, p, 1), &["p", "a probability in [0, 1)"]);
        assert_error_says(add_dropped(&x, &x, p, 1), &["p", "a probability in [0, 1)"]);
    }
    Ok(())
}

#[test]
fn integers_are_refused() -> Result<()> {
    let integers = Tensor::zeros((2, 4), DType::U32, &Device::Cpu)?;
    assert_error_says(dropout(&integers, 0.5, 1), &["x", "F16, BF16, F32 or F64", "U32"]);
    assert_error_says(add_dropped(&integers, &integers, 0.5, 1), &["residual", "U32"]);
    Ok(())
}

#[test]
fn residual_and_branch_of_two_shapes_or_dtypes_are_refused() -> Result<()> {
    let x = randn(1, (2, 4), DType::F32)?;
    assert_error_says(add_dropped(&x, &x.t()?, 0.5, 1), &["branch", "[2, 4], as the residual has", "[4, 2]"]);
    assert_error_says(
        add_dropped(&x, &x.to_dtype(DType::F64)?, 0.5, 1),
        &["branch", "F32, as the residual has", "F64"],
    );
    Ok(())
}
