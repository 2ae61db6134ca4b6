//! AdamW: steps in place, with a state that can be saved.

mod config;
mod moments;
mod state;
mod step;

use std::collections::{BTreeMap, HashMap};

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_nn::VarMap;

pub use config::AdamWConfig;
use moments::Moments;

use crate::check::{SUPPORTED, is_supported};
use crate::error::{AttentionError, Result};
use crate::train::gradients::{error, finite_squares, named_variables, of, place};

/// What a step does about a parameter without a gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MissingGradients {
    /// It is an error that names every such parameter. Some of candle's operations drop gradients in silence, and a parameter that
    /// they cut off would never learn.
    #[default]
    Refuse,
    /// The parameter and its moments stay as they are, as in PyTorch. Its own count of steps doesn't go on.
    Skip,
}

/// AdamW, with PyTorch's formula and its order of operations.
///
/// θ ← θ - lr · λ · θ, m ← β₁ m + (1 - β₁) g, v ← β₂ v + (1 - β₂) g²,
/// θ ← θ - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)
///
/// The moments m and v are in f32, also for parameters in half types, and in f64 for f64. On the CPU a step goes over all
/// parameters once and writes them in place; on other devices it uses candle's operations.
///
/// Parameters in half types lose steps that are smaller than their rounding. [`AdamW::with_master_weights`] keeps them.
///
/// A step writes to the storage of the variables, as `Var::set` does. Tensors that share it (`detach`, views) change with it,
/// and a graph that was built before the step computes wrong gradients after it.
///
/// Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019), algorithm 2.
///
/// # Examples
///
/// ```
/// use candle_attention::train::{AdamW, AdamWConfig};
/// use candle_core::{Device, Var};
///
/// let x = Var::new(&[1f32, -2.0], &Device::Cpu)?;
/// let mut optimizer = AdamW::new(&[("x".into(), x.clone())], AdamWConfig { lr: 0.1, ..Default::default() })?
///     .without_decay(|_, parameter| parameter.rank() < 2);
/// optimizer.step(&x.sqr()?.sum_all()?.backward()?)?;
/// // The first step has the length of the learning rate.
/// let moved = x.to_vec1::<f32>()?;
/// assert!((moved[0] - 0.9).abs() < 1e-6 && (moved[1] + 1.9).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct AdamW {
    parameters: Vec<Trained>,
    config: AdamWConfig,
    missing: MissingGradients,
    steps: usize,
}

/// A parameter with its state.
#[derive(Debug)]
struct Trained {
    name: String,
    var: Var,
    decays: bool,
    /// Steps with a gradient.
    steps: usize,
    moments: Moments,
}

impl AdamW {
    /// An optimizer of some named parameters, which has taken no step. All of them decay, as in PyTorch;
    /// [`AdamW::without_decay`] names those that don't.
    ///
    /// # Errors
    ///
    /// A config out of range; two parameters of the same name or of the same variable; a dtype that isn't a float; too little
    /// memory for the moments.
    pub fn new(parameters: &[(String, Var)], config: AdamWConfig) -> Result<Self> {
        config.check()?;
        let (mut names, mut places) = (HashMap::new(), HashMap::new());
        let mut trained = Vec::with_capacity(parameters.len());
        for (name, var) in parameters {
            let wrong = |expected: &str, got: String| AttentionError::Parameter {
                name: name.clone(),
                expected: expected.into(),
                got,
            };
            if names.insert(name, ()).is_some() {
                return Err(wrong("a name of its own", "the same name twice".into()).into());
            }
            if let Some(other) = places.insert(place(var), name) {
                return Err(wrong("a variable of its own", format!("that of `{other}`")).into());
            }
            if !is_supported(var.dtype()) {
                return Err(wrong(&format!("dtype {SUPPORTED}"), format!("{:?}", var.dtype())).into());
            }
            let moments = Moments::zeros(var)?;
            trained.push(Trained { name: name.clone(), var: var.clone(), decays: true, steps: 0, moments });
        }
        Ok(Self { parameters: trained, config, missing: MissingGradients::default(), steps: 0 })
    }

    /// As [`AdamW::new`], for all variables of a `VarMap`.
    ///
    /// # Errors
    ///
    /// As [`AdamW::new`].
    pub fn from_varmap(varmap: &VarMap, config: AdamWConfig) -> Result<Self> {
        Self::new(&named_variables(varmap), config)
    }

    /// The same optimizer, in which the parameters for which `rule` is true don't decay. In a transformer these are the norms and the
    /// biases: `|_, parameter| parameter.rank() < 2`.
    pub fn without_decay(mut self, rule: impl Fn(&str, &Tensor) -> bool) -> Self {
        for parameter in &mut self.parameters {
            parameter.decays &= !rule(&parameter.name, &parameter.var);
        }
        self
    }

    /// The same optimizer, with this answer to parameters without a gradient.
    pub fn with_missing_gradients(self, missing: MissingGradients) -> Self {
        Self { missing, ..self }
    }

    /// The same optimizer, with a copy in f32 of each parameter in f16 or bf16. A step changes the copy and writes it, rounded, to the
    /// variable, so that many steps that are smaller than the variable's rounding add up. Parameters in f32 and f64 have no copy. The
    /// copies are a part of the [`state`](Self::state).
    ///
    /// A variable may be changed between steps, by `Var::set` or from a checkpoint. The next step compares it with the rounded copy,
    /// number by number, and goes on from the variable's number where they differ. Where they are equal, the copy keeps its digits. So
    /// it does no harm to load a variable's saved values and the saved state in either order.
    ///
    /// Call it before [`AdamW::load`] if the state has copies. To go on with copies from a state without them, call it after.
    ///
    /// Source: Micikevicius et al., "Mixed Precision Training" (ICLR 2018), section 3.1.
    ///
    /// # Errors
    ///
    /// Too little memory for the copies.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::train::{AdamW, AdamWConfig};
    /// use candle_core::{DType, Device, Tensor, Var};
    ///
    /// // Between 1 and 2 the numbers of bf16 are 1/128 apart: a step of 0.001 is rounded away.
    /// let ends = [false, true].map(|with_masters| {
    ///     let x = Var::ones(1, DType::BF16, &Device::Cpu)?;
    ///     let config = AdamWConfig { lr: 1e-3, weight_decay: 0.0, ..Default::default() };
    ///     let mut optimizer = AdamW::new(&[("x".into(), x.clone())], config)?;
    ///     if with_masters {
    ///         optimizer = optimizer.with_master_weights()?;
    ///     }
    ///     for _ in 0..250 {
    ///         optimizer.step(&x.neg()?.sum_all()?.backward()?)?;
    ///     }
    ///     x.to_dtype(DType::F32)?.to_vec1::<f32>()
    /// });
    /// let [without, with] = ends;
    /// assert_eq!((without?, with?), (vec![1.0], vec![1.25]));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn with_master_weights(mut self) -> Result<Self> {
        for parameter in &mut self.parameters {
            parameter.moments.copy_master(&parameter.var)?;
        }
        Ok(self)
    }

    /// The settings.
    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// The number of steps taken.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The parameters with their names, in the order that they were given in.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.parameters.iter().map(|parameter| (parameter.name.as_str(), &parameter.var))
    }

    /// The names of the parameters that decay.
    pub fn decaying(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().filter(|parameter| parameter.decays).map(|parameter| parameter.name.as_str())
    }

    /// Sets the learning rate of the next steps.
    ///
    /// # Errors
    ///
    /// A rate that is negative or not finite.
    pub fn set_learning_rate(&mut self, lr: f64) -> Result<()> {
        let config = AdamWConfig { lr, ..self.config };
        config.check()?;
        self.config = config;
        Ok(())
    }

    /// Takes a step with the gradients of a backward pass. The gradient of a parameter in a half type may be in f32.
    ///
    /// # Errors
    ///
    /// A parameter without a gradient, unless [`MissingGradients::Skip`] is set; a gradient of another shape, dtype or device than its
    /// parameter; NaN or infinity in a gradient, or one whose square is too large for the second moment, with the name of the
    /// parameter. Then nothing has changed. Too little memory of another device is an error, too, after which some parameters may have
    /// taken the step: continue from a saved state.
    pub fn step(&mut self, gradients: &GradStore) -> Result<()> {
        let gradients = self.checked(gradients)?;
        self.update(&gradients)?;
        self.steps += 1;
        for (parameter, gradient) in self.parameters.iter_mut().zip(&gradients) {
            parameter.steps += usize::from(gradient.is_some());
        }
        Ok(())
    }

    /// The gradient of each parameter.
    fn checked(&self, store: &GradStore) -> Result<Vec<Option<Tensor>>> {
        let places: BTreeMap<_, _> = self.parameters.iter().map(|parameter| (place(&parameter.var), ())).collect();
        let mut gradients = Vec::with_capacity(self.parameters.len());
        let mut missing = Vec::new();
        for Trained { name, var, .. } in &self.parameters {
            let mut gradient = of(store, name, var)?;
            if let Some(shared) = gradient.as_ref().filter(|gradient| places.contains_key(&place(gradient))) {
                // It is read while the parameter is written.
                gradient = Some(shared.copy()?.detach());
            }
            if gradient.is_none() {
                missing.push(name.as_str());
            }
            gradients.push(gradient);
        }
        if self.missing == MissingGradients::Refuse && !missing.is_empty() {
            return Err(
                error(&missing.join(", "), "one for every parameter", "none: the loss doesn't depend on it").into()
            );
        }
        let named = self.parameters.iter().zip(&gradients);
        let named: Vec<_> = named.filter_map(|(x, gradient)| Some((x.name.as_str(), gradient.as_ref()?))).collect();
        for ((name, gradient), sum) in named.iter().zip(finite_squares(&named)?) {
            let largest = if gradient.dtype() == candle_core::DType::F64 { f64::MAX } else { f64::from(f32::MAX) };
            if sum > largest {
                let expected = format!("a norm of at most {:e}, whose square the moments can hold", largest.sqrt());
                return Err(error(name, expected, format!("{:e}", sum.sqrt())).into());
            }
        }
        Ok(gradients)
    }
}
