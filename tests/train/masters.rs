//! Master copies of parameters in half types.

use candle_attention::train::{AdamW, AdamWConfig, GradientAccumulator, clip_grad_norm};
use candle_attention::{AttentionError, Error};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use safetensors::SafeTensors;

use crate::common::{assert_close, assert_same_bits, numbers, randn, var};

const HALF: [DType; 2] = [DType::F16, DType::BF16];
/// Steps of some 1e-5, which neither half type has room for beside numbers around 1.
const SMALL: AdamWConfig = AdamWConfig { lr: 1e-5, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };

fn store(var: &Var, gradient: Tensor) -> GradStore {
    let mut store = GradStore::default();
    store.insert(var, gradient);
    store
}

/// The gradient of a step in a half type: rounded, and of about the same direction at every step.
fn gradient(step: u64, dtype: DType) -> Tensor {
    let (towards, noise) = (randn(100, (7, 9), DType::F64).unwrap(), randn(200 + step, (7, 9), DType::F64).unwrap());
    (towards + (noise * 0.1).unwrap()).unwrap().to_dtype(dtype).unwrap()
}

fn wide(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F32).unwrap().detach()
}

fn adamw(x: &Var, config: AdamWConfig) -> AdamW {
    AdamW::new(&[("x".into(), x.clone())], config).unwrap()
}

/// With master copies 200 small steps are those of f32. Without, each of them is rounded away.
#[test]
fn many_small_steps_with_masters_are_those_of_f32() {
    for dtype in HALF {
        let start = randn(1, (7, 9), dtype).unwrap();
        // Numbers around 1, from which no step of 1e-5 reaches the next number.
        let start = (start.sign().unwrap() + (start * 0.1).unwrap()).unwrap();
        let [with, without] = [0, 1].map(|_| Var::from_tensor(&start).unwrap());
        let in_f32 = Var::from_tensor(&wide(&start)).unwrap();
        let mut optimizer = adamw(&with, SMALL).with_master_weights().unwrap();
        let mut stalled = adamw(&without, SMALL);
        let mut reference = adamw(&in_f32, SMALL);
        for step in 0..200 {
            let gradient = gradient(step, dtype);
            reference.step(&store(&in_f32, wide(&gradient))).unwrap();
            optimizer.step(&store(&with, gradient.clone())).unwrap();
            stalled.step(&store(&without, gradient)).unwrap();
        }
        assert_same_bits(&optimizer.state().unwrap()["x.master_weight"], &in_f32, "the master copy");
        assert_same_bits(&with, &in_f32.to_dtype(dtype).unwrap(), "the rounded parameter");
        assert_same_bits(&without, &start, "the parameter without a master copy");
        let moved = numbers(&(wide(&start) - in_f32.as_tensor()).unwrap()).unwrap();
        assert!(moved.iter().filter(|moved| moved.abs() > 1e-3).count() > 50, "{dtype:?}: {moved:?}");
    }
}

#[test]
fn parameters_in_f32_and_f64_have_no_copy_and_the_same_steps() {
    for dtype in [DType::F32, DType::F64] {
        let start = randn(1, (7, 9), dtype).unwrap();
        let [with, without] = [0, 1].map(|_| Var::from_tensor(&start).unwrap());
        let mut optimizers = [adamw(&with, SMALL).with_master_weights().unwrap(), adamw(&without, SMALL)];
        for step in 0..3 {
            optimizers[0].step(&store(&with, gradient(step, dtype))).unwrap();
            optimizers[1].step(&store(&without, gradient(step, dtype))).unwrap();
        }
        assert_same_bits(&with, &without, "with and without");
        assert_eq!(optimizers[0].to_bytes().unwrap(), optimizers[1].to_bytes().unwrap());
    }
}

/// A copy of every dtype, of which the half types have masters.
fn parameters() -> Vec<(String, Var)> {
    let dtypes = [DType::BF16, DType::F32, DType::F16, DType::F64];
    (0..4).map(|i| (format!("x{i}"), var(i as u64, (7, 9), dtypes[i]).unwrap())).collect()
}

fn gradients(parameters: &[(String, Var)], step: u64) -> GradStore {
    let mut store = GradStore::default();
    parameters.iter().for_each(|(_, var)| drop(store.insert(var, gradient(step, var.dtype()))));
    store
}

#[test]
fn a_resumed_run_with_masters_has_the_bits_of_an_uninterrupted_one() {
    let with = |parameters: &[(String, Var)]| AdamW::new(parameters, SMALL).unwrap().with_master_weights().unwrap();
    let whole = parameters();
    let mut uninterrupted = with(&whole);
    (0..30).for_each(|step| uninterrupted.step(&gradients(&whole, step)).unwrap());

    let first = parameters();
    let mut optimizer = with(&first);
    (0..13).for_each(|step| optimizer.step(&gradients(&first, step)).unwrap());
    let bytes = optimizer.to_bytes().unwrap();
    // A new process makes its variables first, loads the state, and the values last.
    let zeros = |var: &Var| Var::zeros(var.shape(), var.dtype(), &Device::Cpu).unwrap();
    let second: Vec<_> = first.iter().map(|(name, var)| (name.clone(), zeros(var))).collect();
    let mut resumed = with(&second);
    resumed.load_bytes(&bytes).unwrap();
    for ((_, var), (_, saved)) in second.iter().zip(&first) {
        var.set(&saved.copy().unwrap().detach()).unwrap();
    }
    (13..30).for_each(|step| resumed.step(&gradients(&second, step)).unwrap());
    whole.iter().zip(&second).for_each(|((name, whole), (_, resumed))| assert_same_bits(resumed, whole, name));
    assert_eq!(resumed.to_bytes().unwrap(), uninterrupted.to_bytes().unwrap());
}

fn problems(result: Result<(), Error>) -> Vec<String> {
    match result {
        Err(Error::Attention(AttentionError::OptimizerState { path: None, problems })) => problems,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_state_with_masters_and_an_optimizer_without_are_one_error_and_change_nothing() {
    let all = parameters();
    let mut with = AdamW::new(&all, SMALL).unwrap().with_master_weights().unwrap();
    with.step(&gradients(&all, 1)).unwrap();
    let mut without = AdamW::new(&all, SMALL).unwrap();
    without.step(&gradients(&all, 2)).unwrap();
    let before = [with.to_bytes().unwrap(), without.to_bytes().unwrap()];
    assert_eq!(
        problems(with.load_bytes(&before[1])),
        ["`x0.master_weight` is missing, expected [7, 9]", "`x2.master_weight` is missing, expected [7, 9]"]
    );
    assert_eq!(
        problems(without.load_bytes(&before[0])),
        [0, 2].map(|i| format!("`x{i}.master_weight` is unexpected, since the parameter has no master copy"))
    );

    let mut state = with.state().unwrap();
    state.insert("x0.master_weight".into(), randn(1, (9, 7), DType::F32).unwrap());
    state.insert("x2.master_weight".into(), randn(1, (7, 9), DType::F16).unwrap());
    assert_eq!(
        problems(with.set_state(&state, 3)),
        ["`x0.master_weight`: expected shape [7, 9], got [9, 7]", "`x2.master_weight`: expected dtype F32, got F16"]
    );
    let mut state = with.state().unwrap();
    state.insert("x0.master_weight".into(), Tensor::full(f32::NAN, (7, 9), &Device::Cpu).unwrap());
    let (_, metadata) = SafeTensors::read_metadata(&before[0]).unwrap();
    let bytes = safetensors::serialize(state, metadata.metadata().clone()).unwrap();
    assert_eq!(problems(with.load_bytes(&bytes)), ["`x0.master_weight`: expected finite numbers, got NaN or infinity"]);
    assert_eq!([with.to_bytes().unwrap(), without.to_bytes().unwrap()], before);
}

#[test]
fn a_state_without_masters_is_loaded_before_they_are_made() {
    let x = var(1, (7, 9), DType::BF16).unwrap();
    let mut without = adamw(&x, SMALL);
    without.step(&store(&x, gradient(1, DType::BF16))).unwrap();
    let mut with = adamw(&x, SMALL);
    with.load_bytes(&without.to_bytes().unwrap()).unwrap();
    let with = with.with_master_weights().unwrap();
    let (mut expected, found) = (without.state().unwrap(), with.state().unwrap());
    expected.insert("x.master_weight".into(), wide(&x));
    assert_eq!((with.steps(), found.len()), (1, 3));
    expected.iter().for_each(|(name, tensor)| assert_same_bits(&found[name], tensor, name));
}

#[test]
fn what_is_changed_from_outside_is_kept_and_the_rest_keeps_its_digits() {
    for dtype in HALF {
        let x = var(1, (7, 9), dtype).unwrap();
        let mut optimizer = adamw(&x, SMALL).with_master_weights().unwrap();
        (0..20).for_each(|step| optimizer.step(&store(&x, gradient(step, dtype))).unwrap());
        let before = optimizer.state().unwrap()["x.master_weight"].clone();
        let row = randn(9, (1, 9), dtype).unwrap();
        x.set(&x.as_detached_tensor().slice_scatter(&row, 0, 4).unwrap()).unwrap();

        // The same moments, from what there should be.
        let expected = Var::from_tensor(&before.slice_scatter(&wide(&row), 0, 4).unwrap()).unwrap();
        let mut reference = adamw(&expected, SMALL);
        let mut state = optimizer.state().unwrap();
        state.remove("x.master_weight");
        reference.set_state(&state, 20).unwrap();
        reference.step(&store(&expected, wide(&gradient(20, dtype)))).unwrap();
        optimizer.step(&store(&x, gradient(20, dtype))).unwrap();
        assert_same_bits(&optimizer.state().unwrap()["x.master_weight"], &expected, "after a change from outside");
        assert_same_bits(&x, &expected.to_dtype(dtype).unwrap(), "rounded");
    }
}

#[test]
fn gradients_that_are_not_finite_change_neither_parameter_nor_master() {
    let all = parameters();
    let mut optimizer = AdamW::new(&all, SMALL).unwrap().with_master_weights().unwrap();
    optimizer.step(&gradients(&all, 1)).unwrap();
    let (before, values) = (optimizer.to_bytes().unwrap(), all[0].1.copy().unwrap());
    let mut bad = gradients(&all, 2);
    bad.insert(&all[2].1, Tensor::full(f32::INFINITY, (7, 9), &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap());
    let text = optimizer.step(&bad).unwrap_err().to_string();
    assert_eq!(text, "gradient of x2: expected finite numbers, got NaN or infinity");
    assert_eq!(optimizer.to_bytes().unwrap(), before);
    assert_same_bits(&all[0].1, &values, "the parameter");
}

#[test]
fn an_empty_parameter_and_a_scalar_have_masters_too() {
    let vars = [((0, 3).into(), "empty"), (candle_core::Shape::from(()), "scalar")];
    let named = vars.map(|(shape, name)| (name.to_string(), Var::ones(shape, DType::BF16, &Device::Cpu).unwrap()));
    let mut optimizer = AdamW::new(&named, SMALL).unwrap().with_master_weights().unwrap();
    let mut gradients = GradStore::default();
    named.iter().for_each(|(_, var)| drop(gradients.insert(var, var.ones_like().unwrap())));
    optimizer.step(&gradients).unwrap();
    let bytes = optimizer.to_bytes().unwrap();
    optimizer.load_bytes(&bytes).unwrap();
    let master = optimizer.state().unwrap()["scalar.master_weight"].to_scalar::<f32>().unwrap();
    assert!((1.0 - master - 1.1e-5).abs() < 1e-6, "{master}");
}

/// A gradient of 1e-9 is 0 in f16, and not in f32.
#[test]
fn parameters_in_half_types_take_gradients_in_f32() {
    for dtype in HALF {
        let x = var(1, (7, 9), dtype).unwrap();
        let small = Tensor::full(1e-9f32, (7, 9), &Device::Cpu).unwrap();
        let mut accumulator = GradientAccumulator::new(&[("x".into(), x.clone())]);
        accumulator.add(&store(&x, small.ones_like().unwrap().to_dtype(dtype).unwrap()), 1.0).unwrap();
        accumulator.add(&store(&x, (&small - 1.0).unwrap()), 1.0).unwrap();
        let mean = accumulator.finish().unwrap();
        assert_eq!(mean.get(&x).unwrap().dtype(), DType::F32);

        let mut gradients = store(&x, small.clone());
        clip_grad_norm(&mut gradients, &[("x".into(), x.clone())], 1e-9).unwrap();
        let clipped = gradients.get(&x).unwrap();
        assert_eq!(clipped.dtype(), DType::F32);

        let mut optimizer = adamw(&x, AdamWConfig { eps: 1e-12, ..SMALL });
        optimizer.step(&store(&x, small)).unwrap();
        let moment = &optimizer.state().unwrap()["x.first_moment"];
        assert_close(&(moment * 1e10).unwrap(), &moment.ones_like().unwrap(), 1e-6, "the first moment");

        let text = optimizer.step(&store(&x, randn(1, (7, 9), DType::F64).unwrap())).unwrap_err().to_string();
        assert_eq!(text, format!("gradient of x: expected dtype {dtype:?} or F32, got F64"));
    }
}
