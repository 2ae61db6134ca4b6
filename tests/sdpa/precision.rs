//! The error is at most twice that of PyTorch's kernel of the same dtype.

use candle_core::DType;

use crate::pytorch_precision::check_all;

/// The largest ratio to PyTorch's error that the crate promises.
const MAX_RATIO: f64 = 2.0;

#[test]
fn f32_errs_at_most_twice_as_much_as_pytorch() -> anyhow::Result<()> {
    check_all(DType::F32, MAX_RATIO)
}

#[test]
fn f16_errs_at_most_twice_as_much_as_pytorch() -> anyhow::Result<()> {
    check_all(DType::F16, MAX_RATIO)
}

#[test]
fn bf16_errs_at_most_twice_as_much_as_pytorch() -> anyhow::Result<()> {
    check_all(DType::BF16, MAX_RATIO)
}
