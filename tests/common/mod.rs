//! What the integration tests share: seeded random tensors, comparisons, a gradient checker and the golden files.
//!
//! Everything is on the CPU. Numbers are drawn in f64 and rounded to the requested dtype, so that the same seed gives
//! the same numbers in every dtype.

// Each test binary compiles its own copy of this module and uses only a part of it.
#![allow(dead_code)]

use std::collections::HashMap;
use std::path::Path;

use candle_attention::train::backward;
use candle_core::{DType, Device, Result, Shape, Tensor, Var};

/// A small seeded generator (SplitMix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform among 0, 1, ..., `end` - 1.
    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

/// Standard normal numbers. They depend only on the seed, the number of elements and the dtype.
pub fn randn(seed: u64, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    let mut random = Random::new(seed);
    let numbers: Vec<f64> = (0..shape.elem_count()).map(|_| random.normal()).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(dtype)
}

/// [`randn`] as a variable, which gets a gradient.
pub fn var(seed: u64, shape: impl Into<Shape>, dtype: DType) -> Result<Var> {
    Var::from_tensor(&randn(seed, shape, dtype)?)
}

/// All elements in row-major order, as f64.
pub fn numbers(x: &Tensor) -> Result<Vec<f64>> {
    x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// max |a - b| of two tensors of the same shape. Equal infinities differ by 0. A NaN on either side makes the result
/// NaN, so that a comparison with `<` fails. Empty tensors differ by 0.
pub fn max_abs_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    max_difference(a, b, |x, y| (x - y).abs())
}

/// max |a - b| / (1 + |b|): absolute for small numbers, relative for large ones. Special values as in
/// [`max_abs_difference`].
pub fn max_scaled_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    max_difference(a, b, |x, y| (x - y).abs() / (1.0 + y.abs()))
}

fn max_difference(a: &Tensor, b: &Tensor, difference: impl Fn(f64, f64) -> f64) -> Result<f64> {
    assert_eq!(a.dims(), b.dims(), "shapes differ");
    let pairs = numbers(a)?.into_iter().zip(numbers(b)?);
    let differences = pairs.map(|(x, y)| if x == y { 0.0 } else { difference(x, y) });
    Ok(differences.fold(0.0, |largest: f64, d| if d > largest || d.is_nan() { d } else { largest }))
}

/// Panics unless |a - b| / (1 + |b|) < `tolerance` everywhere.
#[track_caller]
pub fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64, what: &str) {
    let difference = max_scaled_difference(a, b).unwrap();
    assert!(difference < tolerance, "{what}: differ by {difference:e} (tolerance {tolerance:e})\n{a}\n{b}");
}

/// Panics unless shape, dtype and every number are the same, bit for bit (so that NaN equals NaN, and 0 is not -0).
#[track_caller]
pub fn assert_same_bits(a: &Tensor, b: &Tensor, what: &str) {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()), "{what}: shape or dtype");
    // Widening to f64 keeps different numbers of every float dtype different.
    let bits = |x: &Tensor| -> Vec<u64> { numbers(x).unwrap().into_iter().map(f64::to_bits).collect() };
    assert!(bits(a) == bits(b), "{what}: differ\n{a}\n{b}");
}

/// Panics unless every number is finite.
#[track_caller]
pub fn assert_finite(x: &Tensor, what: &str) {
    assert!(numbers(x).unwrap().iter().all(|x| x.is_finite()), "{what}: not finite\n{x}");
}

/// The gradient of the sum of `loss` for each variable. Panics if a variable has no gradient, or one of another dtype.
#[track_caller]
pub fn gradients(loss: &Tensor, vars: &[&Var]) -> Result<Vec<Tensor>> {
    let mut grads = loss.backward()?;
    let gradient = |var: &&Var| grads.remove(var.as_tensor()).expect("a gradient for every variable");
    let gradients: Vec<Tensor> = vars.iter().map(gradient).collect();
    for (gradient, var) in gradients.iter().zip(vars) {
        assert_eq!((gradient.dims(), gradient.dtype()), (var.dims(), var.dtype()), "gradient's shape and dtype");
    }
    Ok(gradients)
}

/// d loss / d var by central differences: `loss` is evaluated with each element increased and decreased by a small
/// step.
///
/// In f64 with a step of 1e-5 both the truncation (step²) and the rounding (1e-16 / step) stay near 1e-10.
pub fn numeric_gradient(var: &Var, loss: impl Fn() -> Result<Tensor>) -> Result<Tensor> {
    const STEP: f64 = 1e-5;
    assert_eq!(var.dtype(), DType::F64, "finite differences need f64");
    let (kept, shape) = (numbers(var)?, var.shape().clone());
    let set = |values: Vec<f64>| var.set(&Tensor::from_vec(values, &shape, &Device::Cpu)?);
    let mut slopes = Vec::with_capacity(kept.len());
    for i in 0..kept.len() {
        let loss_at = |x: f64| -> Result<f64> {
            let mut values = kept.clone();
            values[i] = x;
            set(values)?;
            loss()?.sum_all()?.to_scalar()
        };
        slopes.push((loss_at(kept[i] + STEP)? - loss_at(kept[i] - STEP)?) / (2.0 * STEP));
    }
    set(kept)?;
    Tensor::from_vec(slopes, &shape, &Device::Cpu)
}

/// Panics unless backpropagation gives every variable the gradient that finite differences give, within `tolerance` of
/// |a - b| / (1 + |b|).
#[track_caller]
pub fn check_gradients(vars: &[(&str, &Var)], loss: impl Fn() -> Result<Tensor>, tolerance: f64, what: &str) {
    let at_vars = loss().unwrap();
    let by_graph = gradients(&at_vars, &vars.iter().map(|(_, var)| *var).collect::<Vec<_>>()).unwrap();
    let collected = backward(&at_vars).unwrap();
    for ((name, var), gradient) in vars.iter().zip(by_graph) {
        let collected = collected.get(var).expect("a gradient for every variable");
        assert_close(collected, &gradient, 1e-13, &format!("{what}: collected gradient of {name}"));
        let expected = numeric_gradient(var, &loss).unwrap();
        assert_close(&gradient, &expected, tolerance, &format!("{what}: gradient of {name}"));
    }
}

/// A file of tests/golden: tensors computed by PyTorch, and the parameters of each case.
pub struct Golden {
    tensors: HashMap<String, Tensor>,
    /// The JSON of the metadata entry `cases`: one object with a `name` for each case.
    pub cases: Vec<serde_json::Value>,
}

impl Golden {
    /// `file` is a name without folder and suffix, such as `sdpa`.
    pub fn load(file: &str) -> anyhow::Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{file}.safetensors"));
        let bytes = std::fs::read(path)?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)?;
        let cases = header.metadata().as_ref().and_then(|metadata| metadata.get("cases"));
        let cases = serde_json::from_str(cases.expect("a metadata entry `cases`"))?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        Ok(Self { tensors, cases })
    }

    /// The tensor `<case>.<f32|f64>.<name>`, if the case has it.
    pub fn get(&self, case: &str, dtype: DType, name: &str) -> Option<&Tensor> {
        self.tensors.get(&format!("{case}.{}.{name}", dtype.as_str()))
    }

    /// The tensor of this whole name.
    #[track_caller]
    pub fn raw(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// The names of a case's tensors that begin with `start`, in order.
    pub fn names(&self, case: &str, dtype: DType, start: &str) -> Vec<&str> {
        let prefix = format!("{case}.{}.", dtype.as_str());
        let names = self.tensors.keys().filter_map(|name| name.strip_prefix(&prefix));
        let mut names: Vec<&str> = names.filter(|name| name.starts_with(start)).collect();
        names.sort_unstable();
        names
    }

    /// As [`Golden::get`], for a tensor that every case has.
    #[track_caller]
    pub fn expect(&self, case: &str, dtype: DType, name: &str) -> &Tensor {
        self.get(case, dtype, name).unwrap_or_else(|| panic!("no tensor {name} in case {case}, {dtype:?}"))
    }
}
