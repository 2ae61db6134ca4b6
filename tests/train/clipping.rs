//! Clipping by norm.

use candle_attention::train::clip_grad_norm;
use candle_attention::{AttentionError, Error};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use crate::common::{Golden, assert_close, assert_same_bits, randn};

fn named(gradients: &[Tensor]) -> (Vec<(String, Var)>, GradStore) {
    let mut store = GradStore::default();
    let var = |gradient: &Tensor| Var::zeros(gradient.shape(), gradient.dtype(), &Device::Cpu).unwrap();
    let vars: Vec<_> = gradients.iter().enumerate().map(|(i, gradient)| (format!("x{i}"), var(gradient))).collect();
    for ((_, var), gradient) in vars.iter().zip(gradients) {
        store.insert(var, gradient.clone());
    }
    (vars, store)
}

#[test]
fn clipped_gradients_are_those_of_pytorch() {
    let golden = Golden::load("training").unwrap();
    for (case, max_norm) in [("clip_0", 0.5), ("clip_1", 100.0)] {
        let part = |part: &str| [0, 1].map(|i| golden.expect(case, DType::F32, &format!("{part}.{i}")).clone());
        let (vars, mut store) = named(&part("grad"));
        let norm = clip_grad_norm(&mut store, &vars, max_norm).unwrap();
        let theirs = golden.expect(case, DType::F32, "norm").to_scalar::<f32>().unwrap();
        assert!((norm - f64::from(theirs)).abs() < 1e-6 * norm);
        for ((name, var), clipped) in vars.iter().zip(part("clipped")) {
            assert_close(store.get(var).unwrap(), &clipped, 1e-7, name);
        }
    }
}

#[test]
fn the_norm_after_clipping_is_the_largest_allowed_in_every_dtype() {
    for (dtype, tolerance) in [(DType::F64, 1e-5), (DType::F32, 1e-5), (DType::F16, 1e-3), (DType::BF16, 4e-3)] {
        let gradients = [randn(1, (30, 20), dtype).unwrap(), randn(2, 7, dtype).unwrap()];
        let (vars, mut store) = named(&gradients);
        let before = clip_grad_norm(&mut store, &vars, f64::INFINITY).unwrap();
        vars.iter().zip(&gradients).for_each(|((_, var), x)| assert_same_bits(store.get(var).unwrap(), x, "measured"));
        assert_eq!(clip_grad_norm(&mut store, &vars, 2.0).unwrap(), before);
        let after = clip_grad_norm(&mut store, &vars, 3.0).unwrap();
        assert!((after / 2.0 - 1.0).abs() < tolerance, "{dtype:?}: {after}");
        // The tensors that were in the store are as they were.
        assert_same_bits(&gradients[0], &randn(1, (30, 20), dtype).unwrap(), "the given gradient");
    }
}

#[test]
fn gradients_that_are_not_finite_are_refused_and_nothing_is_changed() {
    let gradients = [
        Tensor::new(&[3f32, 4.0], &Device::Cpu).unwrap(),
        Tensor::new(&[1f32, f32::NAN], &Device::Cpu).unwrap(),
        Tensor::new(&[f32::INFINITY], &Device::Cpu).unwrap(),
    ];
    let (vars, mut store) = named(&gradients);
    let error = clip_grad_norm(&mut store, &vars, 1.0).unwrap_err();
    assert_eq!(error.to_string(), "gradient of x1: expected finite numbers, got NaN or infinity");
    assert_same_bits(store.get(&vars[0].1).unwrap(), &gradients[0], "after an error");
}

#[test]
fn parameters_without_gradients_count_nothing() {
    let (vars, _) = named(&[Tensor::new(&[3f32, 4.0], &Device::Cpu).unwrap()]);
    assert_eq!(clip_grad_norm(&mut GradStore::default(), &vars, 1.0).unwrap(), 0.0);
    assert_eq!(clip_grad_norm(&mut GradStore::default(), &[], 1.0).unwrap(), 0.0);
    for max_norm in [0.0, -1.0, f64::NAN] {
        let error = clip_grad_norm(&mut GradStore::default(), &vars, max_norm).unwrap_err();
        assert!(matches!(error, Error::Attention(AttentionError::Number { name: "max_norm", .. })), "{error}");
    }
}
