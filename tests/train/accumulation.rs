//! Gradients of several batches.

use candle_attention::train::GradientAccumulator;
use candle_attention::{AttentionError, Error};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use crate::common::{assert_close, assert_same_bits, randn, var};

#[test]
fn the_mean_over_parts_is_the_gradient_of_the_whole_batch() {
    let weight = var(1, (5, 3), DType::F64).unwrap();
    let x = randn(2, (7, 5), DType::F64).unwrap();
    let loss = |x: &Tensor| x.matmul(&weight).unwrap().sqr().unwrap().mean_all().unwrap();
    let whole = loss(&x).backward().unwrap();
    let mut accumulator = GradientAccumulator::new(&named(&[&weight]));
    for (start, len) in [(0, 4), (4, 1), (5, 2)] {
        let gradients = loss(&x.narrow(0, start, len).unwrap()).backward().unwrap();
        accumulator.add(&gradients, len as f64).unwrap();
    }
    let mean = accumulator.finish().unwrap();
    // candle's store also holds the gradient of x, which is a constant.
    assert_eq!(mean.get_ids().count(), 1);
    assert_close(mean.get(&weight).unwrap(), whole.get(&weight).unwrap(), 1e-14, "three parts");
}

fn named(vars: &[&Var]) -> Vec<(String, Var)> {
    vars.iter().enumerate().map(|(n, var)| (format!("{n}"), (*var).clone())).collect()
}

fn store(var: &Var, gradient: Tensor) -> GradStore {
    let mut store = GradStore::default();
    store.insert(var, gradient);
    store
}

/// In bf16 the sum of 4096 ones stops at 256.
#[test]
fn half_types_are_summed_in_f32() {
    let x = Var::zeros(3, DType::BF16, &Device::Cpu).unwrap();
    let ones = Tensor::ones(3, DType::BF16, &Device::Cpu).unwrap();
    let mut accumulator = GradientAccumulator::new(&named(&[&x]));
    for _ in 0..1000 {
        accumulator.add(&store(&x, ones.clone()), 1.0).unwrap();
    }
    assert_same_bits(accumulator.finish().unwrap().get(&x).unwrap(), &ones, "the mean of ones");
}

#[test]
fn a_variable_without_a_gradient_has_zeros_in_that_batch() {
    let [x, y] = [1, 2].map(|seed| var(seed, 2, DType::F32).unwrap());
    let mut accumulator = GradientAccumulator::new(&named(&[&x, &y]));
    accumulator.add(&store(&x, Tensor::new(&[2f32, 4.0], &Device::Cpu).unwrap()), 1.0).unwrap();
    accumulator.add(&store(&y, Tensor::new(&[6f32, 8.0], &Device::Cpu).unwrap()), 1.0).unwrap();
    let mean = accumulator.finish().unwrap();
    assert_eq!(mean.get(&x).unwrap().to_vec1::<f32>().unwrap(), [1.0, 2.0]);
    assert_eq!(mean.get(&y).unwrap().to_vec1::<f32>().unwrap(), [3.0, 4.0]);
    // It starts anew.
    accumulator.add(&store(&x, Tensor::new(&[5f32, 5.0], &Device::Cpu).unwrap()), 1.0).unwrap();
    let mean = accumulator.finish().unwrap();
    assert_eq!(mean.get(&x).unwrap().to_vec1::<f32>().unwrap(), [5.0, 5.0]);
    assert!(mean.get(&y).is_none());
}

#[test]
fn what_does_not_fit_is_refused_and_adds_nothing() {
    let x = var(1, 2, DType::F32).unwrap();
    let ones = Tensor::ones(2, DType::F32, &Device::Cpu).unwrap();
    let mut accumulator = GradientAccumulator::new(&named(&[&x]));
    let error = accumulator.finish().unwrap_err();
    assert_eq!(error.to_string(), "weight of all batches: expected a finite number above 0, got 0");
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e39] {
        let error = accumulator.add(&store(&x, ones.clone()), weight).unwrap_err();
        assert!(matches!(error, Error::Attention(AttentionError::Number { name: "weight", .. })), "{error}");
    }
    accumulator.add(&store(&x, ones.clone()), 1.0).unwrap();
    for (bad, text) in [
        (Tensor::ones(3, DType::F32, &Device::Cpu).unwrap(), "shape [2]"),
        (Tensor::ones(2, DType::F64, &Device::Cpu).unwrap(), "dtype F32"),
    ] {
        let error = accumulator.add(&store(&x, bad), 1.0).unwrap_err();
        assert!(matches!(error, Error::Attention(AttentionError::Gradient { .. })), "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    assert_same_bits(accumulator.finish().unwrap().get(&x).unwrap(), &ones, "what was added before");
}
