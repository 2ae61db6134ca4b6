//! Scaling of the loss.

use candle_attention::train::{
    AdamW, AdamWConfig, GradScaler, GradScalerConfig, GradientAccumulator, MissingGradients, clip_grad_norm,
};
use candle_attention::{AttentionError, Error};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use serde_json::Value;

use crate::common::{assert_close, assert_same_bits, randn, var};

const CONFIG: GradScalerConfig = GradScalerConfig {
    init_scale: 65536.0,
    growth_factor: 2.0,
    backoff_factor: 0.5,
    growth_interval: 2000,
    min_scale: 1e-4,
};

fn scaler(config: GradScalerConfig) -> GradScaler {
    GradScaler::new(config).unwrap()
}

fn adamw(x: &Var) -> AdamW {
    AdamW::new(&[("x".into(), x.clone())], AdamWConfig::default()).unwrap()
}

fn store(var: &Var, gradient: Tensor) -> GradStore {
    let mut store = GradStore::default();
    store.insert(var, gradient);
    store
}

/// A gradient with this number in its middle.
fn with_number(x: &Var, number: f64) -> GradStore {
    let numbers = Tensor::new(&[1.0, number, 1.0], &Device::Cpu).unwrap();
    store(x, numbers.to_dtype(x.dtype()).unwrap())
}

#[test]
fn the_scales_are_those_of_pytorch() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/grad_scaler.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let config = serde_json::from_value(case["config"].clone()).unwrap();
        let mut scaler = scaler(config);
        let x = Var::zeros(3, DType::F32, &Device::Cpu).unwrap();
        let mut optimizer = adamw(&x);
        for (step, letter) in case["gradients"].as_str().unwrap().chars().enumerate() {
            let number = match letter {
                'i' => f64::NEG_INFINITY,
                'n' => f64::NAN,
                _ => 1.0,
            };
            let (steps, before) = (optimizer.steps(), x.copy().unwrap());
            let stepped = scaler.step(&mut optimizer, &with_number(&x, number)).unwrap();
            assert_eq!(Some(stepped), case["stepped"][step].as_bool(), "{config:?}, step {step}");
            assert_eq!(optimizer.steps(), steps + usize::from(stepped));
            if !stepped {
                assert_same_bits(&x, &before, "after a skipped step");
            }
            assert_eq!(Some(scaler.loss_scale()), case["scales"][step].as_f64(), "{config:?}, step {step}");
        }
    }
}

/// A gradient that f16 can't hold unscaled: 1e-8 of each number of an f32 loss.
#[test]
fn small_gradients_of_f16_are_those_of_f32() {
    let start = randn(1, (5, 4), DType::F16).unwrap();
    let loss = |x: &Tensor| {
        let slope = (randn(2, (5, 4), DType::F32).unwrap().abs().unwrap() + 0.5).unwrap();
        ((x.to_dtype(DType::F32).unwrap() * slope).unwrap() * 1e-8).unwrap().sum_all().unwrap()
    };
    let (half, full) =
        (Var::from_tensor(&start).unwrap(), Var::from_tensor(&start.to_dtype(DType::F32).unwrap()).unwrap());
    assert_close(
        loss(&half).backward().unwrap().get(&half).unwrap(),
        &start.zeros_like().unwrap(),
        1e-7,
        "without a scale",
    );
    let config = AdamWConfig { lr: 1e-3, eps: 1e-10, ..Default::default() };
    let named = |x: &Var| [("x".to_string(), x.clone())];
    let mut ours = AdamW::new(&named(&half), config).unwrap().with_master_weights().unwrap();
    let mut reference = AdamW::new(&named(&full), config).unwrap();
    let mut scaler = scaler(CONFIG);
    for _ in 0..20 {
        let scaled = scaler.scale(&loss(&half)).unwrap();
        assert!(scaler.step(&mut ours, &scaled.backward().unwrap()).unwrap());
        reference.step(&loss(&full).backward().unwrap()).unwrap();
    }
    assert_close(&ours.state().unwrap()["x.master_weight"], &full, 1e-5, "the master copy");
    assert_close(&half, &full.to_dtype(DType::F16).unwrap(), 1e-3, "the parameter");
}

#[test]
fn unscaled_gradients_are_those_of_the_loss_in_every_dtype() {
    for (dtype, wide, tolerance) in [
        (DType::F64, DType::F64, 1e-15),
        (DType::F32, DType::F32, 1e-6),
        (DType::F16, DType::F32, 2e-3),
        (DType::BF16, DType::F32, 2e-2),
    ] {
        let x = var(1, (30, 20), dtype).unwrap();
        let loss = || x.to_dtype(wide).unwrap().sqr().unwrap().sum_all().unwrap();
        let mut scaler = scaler(GradScalerConfig { init_scale: 1000.0, ..CONFIG });
        let mut gradients = scaler.scale(&loss()).unwrap().backward().unwrap();
        let scaled = gradients.get(&x).unwrap().copy().unwrap();
        let kept = gradients.get(&x).unwrap().clone();
        assert!(scaler.unscale(&adamw(&x), &mut gradients).unwrap());
        let unscaled = gradients.get(&x).unwrap();
        assert_eq!(unscaled.dtype(), wide);
        let expected = loss().backward().unwrap().get(&x).unwrap().to_dtype(wide).unwrap();
        assert_close(unscaled, &expected, tolerance, &format!("{dtype:?}"));
        assert_same_bits(&kept, &scaled, "the tensor that was in the store");
    }
}

/// The gradient of a loss in f16 is the scale, which f16 can hold up to 65504.
#[test]
fn a_loss_in_f16_is_scaled_in_f32_and_fits_after_one_skipped_step() {
    let x = Var::ones(3, DType::F16, &Device::Cpu).unwrap();
    let (mut scaler, mut optimizer) = (scaler(CONFIG), adamw(&x));
    let loss = || (x.as_tensor() * 3.0).unwrap().mean_all().unwrap();
    let scaled = scaler.scale(&loss()).unwrap();
    assert_eq!((scaled.dtype(), scaled.to_scalar::<f32>().unwrap()), (DType::F32, 3.0 * 65536.0));
    assert!(!scaler.step(&mut optimizer, &scaled.backward().unwrap()).unwrap());
    assert_eq!(scaler.loss_scale(), 32768.0);
    let mut gradients = scaler.scale(&loss()).unwrap().backward().unwrap();
    assert!(scaler.unscale(&optimizer, &mut gradients).unwrap());
    assert_close(gradients.get(&x).unwrap(), &Tensor::ones(3, DType::F32, &Device::Cpu).unwrap(), 1e-3, "gradient");
    assert!(scaler.step(&mut optimizer, &gradients).unwrap());
    let whole = Tensor::new(1u32, &Device::Cpu).unwrap();
    assert_eq!(scaler.scale(&whole).unwrap_err().to_string(), "loss: expected dtype F16, BF16, F32 or F64, got U32");
}

#[test]
fn clipping_between_unscale_and_step_sees_the_gradients_of_the_loss() {
    for dtype in [DType::F16, DType::F32] {
        let [ours, theirs] = [0, 1].map(|_| Var::ones(3, dtype, &Device::Cpu).unwrap());
        let slope = Tensor::new(&[3f32, 4.0, 12.0], &Device::Cpu).unwrap();
        let loss = |x: &Var| (x.to_dtype(DType::F32).unwrap() * &slope).unwrap().sum_all().unwrap();
        let mut scaler = scaler(GradScalerConfig { init_scale: 1024.0, ..CONFIG });
        let (mut optimizer, mut reference) = (adamw(&ours), adamw(&theirs));
        let mut gradients = scaler.scale(&loss(&ours)).unwrap().backward().unwrap();
        assert!(scaler.unscale(&optimizer, &mut gradients).unwrap());
        assert_eq!(clip_grad_norm(&mut gradients, &[("x".into(), ours.clone())], 1.0).unwrap(), 13.0);
        assert!(scaler.step(&mut optimizer, &gradients).unwrap());

        let mut gradients = store(&theirs, slope.clone().to_dtype(dtype).unwrap());
        clip_grad_norm(&mut gradients, &[("x".into(), theirs.clone())], 1.0).unwrap();
        reference.step(&gradients).unwrap();
        assert_close(&ours, &theirs, 1e-3, "the parameter");
        let first = |optimizer: &AdamW| optimizer.state().unwrap()["x.first_moment"].clone();
        assert_close(&first(&optimizer), &first(&reference), 1e-4, "the clipped gradient");
    }
}

#[test]
fn the_mean_of_scaled_gradients_is_unscaled_once() {
    let x = Var::ones(3, DType::F16, &Device::Cpu).unwrap();
    let (mut scaler, mut optimizer) = (scaler(CONFIG), adamw(&x));
    let mut accumulator = GradientAccumulator::new(&[("x".into(), x.clone())]);
    let mut run = |factors: [f64; 2]| {
        for factor in factors {
            let loss = (x.to_dtype(DType::F32).unwrap().sum_all().unwrap() * factor).unwrap();
            accumulator.add(&scaler.scale(&loss).unwrap().backward().unwrap(), 1.0).unwrap();
        }
        let mut mean = accumulator.finish().unwrap();
        let is_finite = scaler.unscale(&optimizer, &mut mean).unwrap();
        assert_eq!(scaler.step(&mut optimizer, &mean).unwrap(), is_finite);
        (is_finite, mean.get(&x).unwrap().clone(), scaler.loss_scale())
    };
    let (is_finite, mean, scale) = run([1e-7, 3e-7]);
    assert!(is_finite && scale == 65536.0);
    let expected = Tensor::full(2f32, 3, &Device::Cpu).unwrap();
    assert_close(&(mean * 1e7).unwrap(), &expected, 1e-3, "the mean");
    // One part that overflows is enough to skip the step.
    let (is_finite, _, scale) = run([1.0, 1e-7]);
    assert!(!is_finite && scale == 32768.0);
    let (is_finite, ..) = run([1e-7, 1e-7]);
    assert!(is_finite);
}

#[test]
fn gradients_are_divided_once_between_two_steps() {
    let x = Var::zeros(3, DType::F32, &Device::Cpu).unwrap();
    let (mut scaler, mut optimizer) = (scaler(CONFIG), adamw(&x));
    let mut gradients = with_number(&x, 2.0);
    assert!(scaler.unscale(&optimizer, &mut gradients).unwrap());
    let divided = gradients.get(&x).unwrap().copy().unwrap();
    let text = scaler.unscale(&optimizer, &mut gradients).unwrap_err().to_string();
    assert_eq!(
        text,
        "gradient of all parameters: expected gradients of a scaled loss, got those that `unscale` has already divided: call `step` or `discard` first"
    );
    assert_same_bits(gradients.get(&x).unwrap(), &divided, "after an error");
    assert!(scaler.step(&mut optimizer, &gradients).unwrap());
    let moment = (&optimizer.state().unwrap()["x.first_moment"] * (65536.0 * 10.0)).unwrap();
    assert_close(&moment, &Tensor::new(&[1f32, 2.0, 1.0], &Device::Cpu).unwrap(), 1e-6, "the first moment");

    // What isn't finite stays, and the step is skipped.
    let mut gradients = with_number(&x, f64::NAN);
    assert!(!scaler.unscale(&optimizer, &mut gradients).unwrap());
    assert_same_bits(gradients.get(&x).unwrap(), with_number(&x, f64::NAN).get(&x).unwrap(), "not finite");
    assert!(!scaler.step(&mut optimizer, &gradients).unwrap());
    assert_eq!(scaler.loss_scale(), 32768.0);

    // A batch that is given up.
    assert!(!scaler.unscale(&optimizer, &mut gradients).unwrap());
    scaler.discard();
    assert!(scaler.unscale(&optimizer, &mut with_number(&x, 1.0)).unwrap());
    assert_eq!(scaler.loss_scale(), 32768.0);
}

#[test]
fn a_loss_that_is_never_finite_is_an_error_that_names_the_parameter() {
    let x = Var::ones(3, DType::F32, &Device::Cpu).unwrap();
    let (mut scaler, mut optimizer) = (scaler(CONFIG), adamw(&x));
    let mut skipped = 0;
    let error = loop {
        let loss = (x.sum_all().unwrap() * f64::INFINITY).unwrap();
        match scaler.step(&mut optimizer, &scaler.scale(&loss).unwrap().backward().unwrap()) {
            Ok(stepped) => assert!(!stepped && skipped < 100),
            Err(error) => break error,
        }
        skipped += 1;
    };
    assert_eq!(skipped, 29); // from 2¹⁶ to 2⁻¹³
    assert!(matches!(error, Error::Attention(AttentionError::Gradient { .. })));
    assert_eq!(
        error.to_string(),
        "gradient of x: expected finite numbers at a loss scale of 0.00012207031, with a min_scale of 0.0001, got NaN or infinity: the loss or a parameter may not be finite"
    );
    // The scaler is as it was: it says so again, and goes on with gradients that are finite.
    assert!(scaler.step(&mut optimizer, &with_number(&x, f64::NAN)).is_err());
    assert_eq!((scaler.loss_scale(), optimizer.steps()), (f64::from(2f32.powi(-13)), 0));
    assert!(scaler.step(&mut optimizer, &with_number(&x, 1.0)).unwrap());
}

#[test]
fn gradients_that_do_not_fit_are_refused_and_change_nothing() {
    let x = Var::ones(3, DType::F32, &Device::Cpu).unwrap();
    let (mut scaler, mut optimizer) = (scaler(CONFIG), adamw(&x));
    let mut bad = store(&x, randn(1, 4, DType::F32).unwrap());
    for error in [scaler.unscale(&optimizer, &mut bad).unwrap_err(), scaler.step(&mut optimizer, &bad).unwrap_err()] {
        assert_eq!(error.to_string(), "gradient of x: expected shape [3], got [4]");
    }
    let error = scaler.step(&mut optimizer, &GradStore::default()).unwrap_err();
    assert!(error.to_string().starts_with("gradient of x: expected one for every parameter, got none"), "{error}");
    assert_eq!((optimizer.steps(), scaler.loss_scale()), (0, 65536.0));
    // A parameter that may be without a gradient counts nothing.
    let named = [("x".to_string(), x.clone()), ("y".to_string(), var(1, 2, DType::F32).unwrap())];
    let mut optimizer =
        AdamW::new(&named, AdamWConfig::default()).unwrap().with_missing_gradients(MissingGradients::Skip);
    assert!(scaler.step(&mut optimizer, &with_number(&x, 1.0)).unwrap());
}

#[test]
fn a_saved_scaler_goes_on_as_if_it_had_never_stopped() {
    let x = Var::zeros(3, DType::F32, &Device::Cpu).unwrap();
    let mut optimizer = adamw(&x);
    let config =
        GradScalerConfig { init_scale: 1000.1, growth_factor: 1.7, backoff_factor: 0.3, growth_interval: 4, ..CONFIG };
    let mut whole = scaler(config);
    let mut numbers = [1.0, f64::NAN].into_iter().chain([1.0; 9]);
    for number in numbers.by_ref().take(5) {
        whole.step(&mut optimizer, &with_number(&x, number)).unwrap();
    }
    let json = serde_json::to_string(&whole).unwrap();
    let mut resumed: GradScaler = serde_json::from_str(&json).unwrap();
    for number in numbers {
        let gradients = with_number(&x, number);
        resumed.step(&mut optimizer, &gradients).unwrap();
        whole.step(&mut optimizer, &gradients).unwrap();
        assert_eq!(resumed.loss_scale(), whole.loss_scale());
    }
    assert!(whole.loss_scale() > 1000.1 * 0.3 * 1.6, "{}", whole.loss_scale());
    assert_eq!(resumed.config(), &config);
}

#[test]
fn settings_and_states_that_can_not_be_used_are_refused() {
    for (config, text) in [
        (
            GradScalerConfig { init_scale: 0.0, ..CONFIG },
            "init_scale: expected a finite number of at least min_scale, also in f32, got 0",
        ),
        (
            GradScalerConfig { init_scale: f64::NAN, ..CONFIG },
            "init_scale: expected a finite number of at least min_scale, also in f32, got NaN",
        ),
        (GradScalerConfig { init_scale: 1e40, ..CONFIG }, "init_scale: expected a finite number of at least min_scale"),
        (GradScalerConfig { init_scale: 1e-5, ..CONFIG }, "init_scale: expected a finite number of at least min_scale"),
        (
            GradScalerConfig { growth_factor: 1.0, ..CONFIG },
            "growth_factor: expected a finite number above 1, also in f32, got 1",
        ),
        (
            GradScalerConfig { growth_factor: f64::INFINITY, ..CONFIG },
            "growth_factor: expected a finite number above 1",
        ),
        (
            GradScalerConfig { backoff_factor: 1.0, ..CONFIG },
            "backoff_factor: expected a number above 0 and below 1, also in f32, got 1",
        ),
        (
            GradScalerConfig { backoff_factor: 1.0 - 1e-9, ..CONFIG },
            "backoff_factor: expected a number above 0 and below 1",
        ),
        (GradScalerConfig { backoff_factor: 0.0, ..CONFIG }, "backoff_factor: expected a number above 0 and below 1"),
        (GradScalerConfig { growth_interval: 0, ..CONFIG }, "growth_interval: expected at least 1, got 0"),
        (
            GradScalerConfig { min_scale: 0.0, ..CONFIG },
            "min_scale: expected a finite number above 0, also in f32, got 0",
        ),
    ] {
        let error = GradScaler::new(config).unwrap_err();
        assert!(matches!(error, Error::Attention(AttentionError::Config { .. })));
        assert!(error.to_string().starts_with(&format!("config, {text}")), "{error}");
    }
    for (json, text) in [
        (
            r#"{"scale":0.0,"finite_steps":0,"config":{}}"#,
            "config, scale: expected a finite number of at least min_scale",
        ),
        (r#"{"scale":1e39,"finite_steps":0,"config":{}}"#, ""),
        (
            r#"{"scale":2.0,"finite_steps":2000,"config":{}}"#,
            "config, finite_steps: expected fewer than growth_interval",
        ),
        (
            r#"{"scale":2.0,"finite_steps":0,"config":{"growth_interval":0}}"#,
            "config, growth_interval: expected at least 1",
        ),
        (r#"{"scale":2.0,"finite_steps":0,"config":{"growth":2}}"#, "unknown field `growth`"),
    ] {
        let error = serde_json::from_str::<GradScaler>(json).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error}");
    }
    assert_eq!(GradScalerConfig::default(), CONFIG);
}

/// A gradient is finite, but divided by a scale below 1 it isn't.
#[test]
fn quotient_that_overflows_is_skipped() {
    let x = var(1, 3, DType::F32).unwrap();
    let (mut scaler, mut optimizer) = (scaler(GradScalerConfig { init_scale: 0.5, ..CONFIG }), adamw(&x));
    assert!(!scaler.step(&mut optimizer, &with_number(&x, 3e38)).unwrap());
    assert_eq!((scaler.loss_scale(), optimizer.steps()), (0.25, 0));
    assert!(scaler.step(&mut optimizer, &with_number(&x, 3.0)).unwrap());
}
