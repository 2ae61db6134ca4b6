//! Steps of AdamW.

use candle_attention::train::{AdamW, AdamWConfig, MissingGradients, Schedule};
use candle_attention::{AttentionError, Error};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use crate::common::{Golden, assert_close, assert_same_bits, randn, var};

const NAMES: [&str; 3] = ["matrix", "vector", "tensor"];

/// The parameters of a golden case, and its loss: a quadratic.
struct Problem {
    vars: Vec<(String, Var)>,
    goals: Vec<Tensor>,
    slopes: Vec<Tensor>,
}

impl Problem {
    fn new(golden: &Golden, case: &str, dtype: DType) -> Self {
        let part = |part: &str, name: &str| golden.expect(case, dtype, &format!("{part}.{name}")).clone();
        let vars = NAMES.map(|name| (name.to_string(), Var::from_tensor(&part("start", name)).unwrap()));
        let [goals, slopes] = ["goal", "slope"].map(|what| NAMES.map(|name| part(what, name)).to_vec());
        Self { vars: vars.to_vec(), goals, slopes }
    }

    fn gradients(&self) -> GradStore {
        let terms = self.vars.iter().zip(&self.goals).zip(&self.slopes);
        let losses = terms.map(|(((_, var), goal), slope)| ((var.as_tensor() - goal)?.sqr()? * slope)?.sum_all());
        losses.reduce(|a, b| a? + b?).unwrap().unwrap().backward().unwrap()
    }
}

#[test]
fn two_hundred_steps_are_those_of_pytorch() {
    const STEPS: usize = 200;
    let golden = Golden::load("training").unwrap();
    for (case, dtype) in ["adamw_all", "adamw_groups"].iter().flat_map(|c| [(c, DType::F32), (c, DType::F64)]) {
        let problem = Problem::new(&golden, case, dtype);
        let config = AdamWConfig { beta2: 0.99, weight_decay: 0.1, ..Default::default() };
        let mut optimizer = AdamW::new(&problem.vars, config).unwrap();
        if *case == "adamw_groups" {
            optimizer = optimizer.without_decay(|_, parameter| parameter.rank() < 2);
            assert_eq!(optimizer.decaying().collect::<Vec<_>>(), ["matrix", "tensor"]);
        }
        let schedule = Schedule::warm_up_cosine(0.05, 0.01, 0, STEPS).unwrap();
        for step in 0..STEPS {
            optimizer.set_learning_rate(schedule.learning_rate(step)).unwrap();
            optimizer.step(&problem.gradients()).unwrap();
        }
        let tolerance = if dtype == DType::F64 { 1e-13 } else { 1e-6 };
        let state = optimizer.state().unwrap();
        for (name, var) in &problem.vars {
            let close = |ours: &Tensor, part: &str| {
                let theirs = golden.expect(case, dtype, &format!("{part}.{name}"));
                assert_close(ours, theirs, tolerance, &format!("{case} {dtype:?} {part}.{name}"));
            };
            close(var, "end");
            close(&state[&format!("{name}.first_moment")], "first");
            close(&state[&format!("{name}.second_moment")], "second");
        }
        assert_eq!(optimizer.steps(), STEPS);
    }
}

/// More parameters than are stepped at once, of every dtype.
#[test]
fn many_parameters_are_each_stepped_as_if_alone() {
    let dtypes = [DType::F32, DType::F16, DType::F64, DType::BF16];
    let vars: Vec<(String, Var)> =
        (0..150).map(|i| (format!("x{i}"), var(i, 1 + i as usize % 7, dtypes[i as usize % 4]).unwrap())).collect();
    let start: Vec<Tensor> = vars.iter().map(|(_, var)| var.copy().unwrap().detach()).collect();
    let gradients = || {
        let mut store = GradStore::default();
        for (i, (_, var)) in vars.iter().enumerate() {
            store.insert(var, randn(1000 + i as u64, var.shape(), var.dtype()).unwrap());
        }
        store
    };
    let mut optimizer = AdamW::new(&vars, AdamWConfig::default()).unwrap();
    for _ in 0..3 {
        optimizer.step(&gradients()).unwrap();
    }
    for ((name, together), start) in vars.iter().zip(&start) {
        let alone = Var::from_tensor(start).unwrap();
        let mut gradients_alone = GradStore::default();
        gradients_alone.insert(&alone, gradients().get(together).unwrap().clone());
        let mut optimizer = AdamW::new(&[(name.clone(), alone.clone())], AdamWConfig::default()).unwrap();
        for _ in 0..3 {
            optimizer.step(&gradients_alone).unwrap();
        }
        assert_same_bits(together, &alone, name);
    }
}

/// Half parameters have moments in f32: their steps are those of f32, but for the rounding of the parameters.
#[test]
fn moments_of_half_types_are_in_f32() {
    for dtype in [DType::F16, DType::BF16] {
        let half = var(3, (4, 5), dtype).unwrap();
        let mut optimizer = AdamW::new(&[("x".into(), half.clone())], AdamWConfig::default()).unwrap();
        // The squares of such gradients are below the least number that f16 can hold.
        let mut gradients = GradStore::default();
        gradients.insert(&half, (half.ones_like().unwrap() * 1e-4).unwrap());
        let before = half.copy().unwrap().detach();
        optimizer.step(&gradients).unwrap();
        let moved = (before - half.as_tensor()).unwrap().to_dtype(DType::F32).unwrap();
        assert!(moved.min_all().unwrap().to_scalar::<f32>().unwrap() >= 0.0);
        assert!(moved.max_all().unwrap().to_scalar::<f32>().unwrap() > 5e-4, "{dtype:?}");
        let state = optimizer.state().unwrap();
        assert!(state.values().all(|moment| moment.dtype() == DType::F32));
    }
}

fn error(result: Result<(), Error>) -> AttentionError {
    match result {
        Err(Error::Attention(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_missing_gradient_is_refused_or_skipped() {
    let (a, b) = (var(1, 3, DType::F32).unwrap(), var(2, 2, DType::F32).unwrap());
    let parameters = [("a".to_string(), a.clone()), ("b".to_string(), b.clone())];
    let gradients = a.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let before = [a.copy().unwrap(), b.copy().unwrap()];
    let mut strict = AdamW::new(&parameters, AdamWConfig::default()).unwrap();
    let text = error(strict.step(&gradients)).to_string();
    assert_eq!(text, "gradient of b: expected one for every parameter, got none: the loss doesn't depend on it");
    assert_same_bits(&a, &before[0], "a after a refused step");
    assert_eq!(strict.steps(), 0);

    let mut lenient =
        AdamW::new(&parameters, AdamWConfig::default()).unwrap().with_missing_gradients(MissingGradients::Skip);
    lenient.step(&gradients).unwrap();
    assert_same_bits(&b, &before[1], "b without a gradient");
    // The first step of `b` is corrected as a first step, though it is the second of the optimizer.
    lenient.step(&b.sum_all().unwrap().backward().unwrap()).unwrap();
    let moved = (&before[1] * (1.0 - 1e-3 * 0.01)).unwrap() - b.as_tensor();
    assert_close(&moved.unwrap(), &Tensor::full(1e-3f32, 2, &Device::Cpu).unwrap(), 1e-6, "first step of b");
}

#[test]
fn gradients_that_are_not_finite_are_refused_with_the_parameters_name() {
    for (dtype, bad, got) in [
        (DType::F32, f64::NAN, "expected finite numbers, got NaN or infinity"),
        (DType::BF16, f64::NEG_INFINITY, "expected finite numbers, got NaN or infinity"),
        (DType::F64, 1e200, "expected finite numbers, got a norm that overflows"),
        (DType::F32, 1e30, "expected a norm of at most 1.8446743"),
    ] {
        let vars = [var(1, 3, dtype).unwrap(), var(2, 70, dtype).unwrap()];
        let before = vars.each_ref().map(|var| var.copy().unwrap());
        let mut gradients = GradStore::default();
        gradients.insert(&vars[0], vars[0].ones_like().unwrap());
        let bad = Tensor::full(bad, 70, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        gradients.insert(&vars[1], bad);
        let named = [("fine".to_string(), vars[0].clone()), ("spoilt".to_string(), vars[1].clone())];
        let mut optimizer = AdamW::new(&named, AdamWConfig::default()).unwrap();
        let text = error(optimizer.step(&gradients)).to_string();
        assert!(text.starts_with(&format!("gradient of spoilt: {got}")), "{text}");
        vars.iter().zip(before).for_each(|(var, before)| assert_same_bits(var, &before, "after a refused step"));
    }
}

#[test]
fn gradients_that_do_not_fit_are_refused() {
    let x = var(1, (2, 3), DType::F32).unwrap();
    let mut optimizer = AdamW::new(&[("x".into(), x.clone())], AdamWConfig::default()).unwrap();
    for (gradient, expected) in [
        (randn(1, (3, 2), DType::F32).unwrap(), "gradient of x: expected shape [2, 3], got [3, 2]"),
        (randn(1, (2, 3), DType::F64).unwrap(), "gradient of x: expected dtype F32, got F64"),
    ] {
        let mut gradients = GradStore::default();
        gradients.insert(&x, gradient);
        assert_eq!(error(optimizer.step(&gradients)).to_string(), expected);
    }
}

/// A gradient with strides, and one that is the parameter itself: reading it while it is written would wait forever.
#[test]
fn gradients_may_be_views_and_may_share_the_parameters_memory() {
    let start = randn(1, (3, 3), DType::F32).unwrap();
    let ends = [true, false].map(|shares| {
        let x = Var::from_tensor(&start).unwrap();
        let gradient = if shares { x.as_detached_tensor() } else { start.clone() };
        let mut gradients = GradStore::default();
        gradients.insert(&x, gradient.t().unwrap().t().unwrap());
        AdamW::new(&[("x".into(), x.clone())], AdamWConfig::default()).unwrap().step(&gradients).unwrap();
        x
    });
    assert_same_bits(&ends[0], &ends[1], "shared and copied");
    let x = Var::from_tensor(&start).unwrap();
    let mut gradients = GradStore::default();
    gradients.insert(&x, start.t().unwrap());
    AdamW::new(&[("x".into(), x.clone())], AdamWConfig::default()).unwrap().step(&gradients).unwrap();
    let copy = Var::from_tensor(&start).unwrap();
    gradients.insert(&copy, start.t().unwrap().contiguous().unwrap());
    AdamW::new(&[("x".into(), copy.clone())], AdamWConfig::default()).unwrap().step(&gradients).unwrap();
    assert_same_bits(&x, &copy, "a transposed gradient");
}

#[test]
fn parameters_and_settings_that_can_not_be_used_are_refused() {
    let x = var(1, 3, DType::F32).unwrap();
    let new = |parameters: &[(&str, &Var)], config| {
        let parameters: Vec<_> = parameters.iter().map(|(name, var)| (name.to_string(), (*var).clone())).collect();
        error(AdamW::new(&parameters, config).map(drop)).to_string()
    };
    let y = var(2, 3, DType::F32).unwrap();
    let default = AdamWConfig::default();
    assert_eq!(
        new(&[("a", &x), ("a", &y)], default),
        "parameter a: expected a name of its own, got the same name twice"
    );
    assert_eq!(new(&[("a", &x), ("b", &x)], default), "parameter b: expected a variable of its own, got that of `a`");
    let whole = Var::zeros(3, DType::U32, &Device::Cpu).unwrap();
    assert_eq!(new(&[("n", &whole)], default), "parameter n: expected dtype F16, BF16, F32 or F64, got U32");
    for (config, text) in [
        (
            AdamWConfig { lr: f64::NAN, ..default },
            "config, lr: expected a number of at least 0 whose steps f32 can hold, got NaN",
        ),
        (
            AdamWConfig { lr: -1.0, ..default },
            "config, lr: expected a number of at least 0 whose steps f32 can hold, got -1",
        ),
        (
            AdamWConfig { lr: 1e38, weight_decay: 0.0, ..default },
            "config, lr: expected a number of at least 0 whose steps f32 can hold, got 100000000000000000000000000000000000000",
        ),
        (AdamWConfig { beta1: 1.0, ..default }, "config, beta1: expected a number in [0, 1), got 1"),
        (AdamWConfig { beta2: -0.1, ..default }, "config, beta2: expected a number in [0, 1), got -0.1"),
        (AdamWConfig { eps: 0.0, ..default }, "config, eps: expected a finite number above 0, also in f32, got 0"),
        (
            AdamWConfig { weight_decay: f64::INFINITY, ..default },
            "config, weight_decay: expected a number of at least 0 whose product with lr f32 can hold, got inf",
        ),
    ] {
        assert_eq!(new(&[("x", &x)], config), text);
    }
    let mut optimizer = AdamW::new(&[("x".into(), x)], default).unwrap();
    assert!(optimizer.set_learning_rate(f64::INFINITY).is_err());
    assert_eq!(optimizer.config(), &default);
}

/// The root of a negative number would be NaN.
#[test]
fn state_that_no_optimizer_has_is_refused_and_changes_nothing() {
    let x = var(1, 2, DType::F32).unwrap();
    let parameters = [("x".to_string(), x.clone()), ("y".to_string(), var(2, 2, DType::F32).unwrap())];
    let mut optimizer = AdamW::new(&parameters, AdamWConfig::default()).unwrap();
    let (ones, minus) =
        (Tensor::new(&[1f32, 1.0], &Device::Cpu).unwrap(), Tensor::new(&[-1f32, 1.0], &Device::Cpu).unwrap());
    let state = |second: &Tensor| {
        let both = ["x", "y"].map(|name| {
            [(format!("{name}.first_moment"), minus.clone()), (format!("{name}.second_moment"), second.clone())]
        });
        std::collections::HashMap::from_iter(both.concat())
    };
    let text = error(optimizer.set_state(&state(&minus), 3)).to_string();
    for name in ["x", "y"] {
        assert!(text.contains(&format!("`{name}.second_moment`: expected numbers of at least 0, got less")), "{text}");
    }
    let text = error(optimizer.set_state(&state(&ones), usize::MAX)).to_string();
    assert!(text.contains("steps, got 18446744073709551615"), "{text}");
    assert_eq!(optimizer.steps(), 0);
    optimizer.set_state(&state(&ones), 3).unwrap();
    assert_eq!(optimizer.steps(), 3);
}

#[test]
fn an_optimizer_of_a_varmap_has_its_variables_in_order() {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    for name in ["b", "c", "a"] {
        vb.get(2, name).unwrap();
    }
    let optimizer = AdamW::from_varmap(&varmap, AdamWConfig::default()).unwrap();
    assert_eq!(optimizer.parameters().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "b", "c"]);
}
