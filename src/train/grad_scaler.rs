//! Scaling of the loss, so that small gradients aren't zero in f16.

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use serde::{Deserialize, Serialize};

use crate::check::{check_dtype, compute_dtype, widened};
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::train::adamw::AdamW;
use crate::train::clipping::scale_in_place;
use crate::train::gradients::{error, first_not_finite, of};

/// The settings of a [`GradScaler`], with PyTorch's defaults. The scale is in f32, as PyTorch's is.
///
/// # Examples
///
/// ```
/// use candle_attention::train::GradScalerConfig;
///
/// let config = GradScalerConfig { init_scale: 1024.0, ..Default::default() };
/// assert_eq!((config.growth_factor, config.backoff_factor, config.growth_interval), (2.0, 0.5, 2000));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GradScalerConfig {
    /// The first scale: a number that f32 can hold, at least `min_scale`.
    pub init_scale: f64,
    /// What the scale is multiplied by after `growth_interval` steps with finite gradients: a number above 1.
    pub growth_factor: f64,
    /// What the scale is multiplied by after a step that was skipped: a number between 0 and 1.
    pub backoff_factor: f64,
    /// How many steps in a row have finite gradients before the scale grows: at least 1.
    pub growth_interval: usize,
    /// The scale never falls below this number above 0; a step that needs it to is an error. PyTorch has no such limit. The default, 10⁻⁴,
    /// is that of fairseq's `--min-loss-scale`.
    pub min_scale: f64,
}

impl Default for GradScalerConfig {
    fn default() -> Self {
        Self { init_scale: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000, min_scale: 1e-4 }
    }
}

impl GradScalerConfig {
    fn check(&self) -> Result<(), AttentionError> {
        let held = |x: f64| x > 0.0 && (x as f32).is_normal();
        // One unit in the last place of f32: a factor nearer to 1 would leave some scales as they are.
        let changes = |distance: f64| distance >= f64::from(f32::EPSILON);
        let checks = [
            ("min_scale", self.min_scale, held(self.min_scale), "a finite number above 0, also in f32"),
            (
                "init_scale",
                self.init_scale,
                held(self.init_scale) && self.init_scale >= self.min_scale,
                "a finite number of at least min_scale, also in f32",
            ),
            (
                "growth_factor",
                self.growth_factor,
                self.growth_factor.is_finite() && changes(self.growth_factor - 1.0),
                "a finite number above 1, also in f32",
            ),
            (
                "backoff_factor",
                self.backoff_factor,
                self.backoff_factor > 0.0 && changes(1.0 - self.backoff_factor),
                "a number above 0 and below 1, also in f32",
            ),
            ("growth_interval", self.growth_interval as f64, self.growth_interval > 0, "at least 1"),
        ];
        match checks.into_iter().find(|(_, _, is_right, _)| !is_right) {
            Some((field, got, _, expected)) => {
                Err(AttentionError::Config { field, expected: expected.into(), got: got.to_string() })
            }
            None => Ok(()),
        }
    }
}

/// Multiplies the loss by a number that follows what f16 can hold, and divides the gradients by it, as `torch.amp.GradScaler` does.
///
/// The least number above 0 in f16 is 2⁻²⁴, and gradients below half of it become 0. A loss times the scale has gradients times the scale,
/// which f16 can hold. They are divided in f32, before the step. If one of them isn't finite, the scale was too large: the step is skipped and the
/// scale is multiplied by `backoff_factor`. After `growth_interval` steps in a row with finite gradients it is multiplied by
/// `growth_factor`, unless f32 can't hold the product.
///
/// Parameters in f16 get gradients in f32, which [`AdamW::step`], [`clip_grad_norm`](super::clip_grad_norm) and
/// [`GradientAccumulator`](super::GradientAccumulator) take. [`AdamW::with_master_weights`] keeps the small steps that they make. Training
/// in bf16 needs no scale: bf16 has the range of f32.
///
/// Gradients of several batches are accumulated with one scale: scale each loss, add the gradients to the accumulator, and unscale their
/// mean.
///
/// The scaler is serialised by serde, with its settings, its scale and its count of steps. After loading it continues as if it had never
/// stopped. Save it after a step, beside the state of AdamW.
///
/// Source: Micikevicius et al., "Mixed Precision Training" (ICLR 2018), section 3.2; the names are those of PyTorch's `GradScaler`.
///
/// # Examples
///
/// ```
/// use candle_attention::train::{AdamW, AdamWConfig, GradScaler, GradScalerConfig, clip_grad_norm};
/// use candle_core::{DType, Device, Var};
///
/// let w = Var::ones(1, DType::F16, &Device::Cpu)?;
/// let parameters = [("w".to_string(), w.clone())];
/// let mut optimizer = AdamW::new(&parameters, AdamWConfig { lr: 0.1, ..Default::default() })?.with_master_weights()?;
/// let mut scaler = GradScaler::new(GradScalerConfig::default())?;
///
/// let loss = (w.to_dtype(DType::F32)? * 1e-8)?.sum_all()?;
/// // The gradient, 1e-8, is 0 in f16. Times the scale it isn't.
/// assert_eq!(loss.backward()?.get(&w).unwrap().to_dtype(DType::F32)?.to_vec1::<f32>()?, [0.0]);
/// let mut gradients = scaler.scale(&loss)?.backward()?;
/// if scaler.unscale(&optimizer, &mut gradients)? {
///     let norm = clip_grad_norm(&mut gradients, &parameters, 1.0)?;
///     assert!((norm / 1e-8 - 1.0).abs() < 1e-3);
/// }
/// assert!(scaler.step(&mut optimizer, &gradients)?); // false if it was skipped
/// assert!(w.to_dtype(DType::F32)?.to_vec1::<f32>()?[0] < 0.96);
///
/// // A run that is resumed has the same scale.
/// let json = serde_json::to_string(&scaler)?;
/// assert_eq!(serde_json::from_str::<GradScaler>(&json)?.loss_scale(), 65536.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "Saved", into = "Saved")]
pub struct GradScaler {
    config: GradScalerConfig,
    scale: f32,
    /// Steps in a row with finite gradients since the scale changed: fewer than `growth_interval`.
    finite_steps: usize,
    /// What [`GradScaler::unscale`] has found since the last step.
    unscaled: Option<Found>,
}

/// What gradients are.
#[derive(Clone, Debug)]
enum Found {
    Finite,
    /// The gradient of the parameter of this name isn't.
    NotFinite(String),
}

/// The state of a scaler between two steps.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    scale: f32,
    finite_steps: usize,
    config: GradScalerConfig,
}

impl GradScaler {
    /// A scaler that has seen no step.
    ///
    /// # Errors
    ///
    /// A config out of range.
    pub fn new(config: GradScalerConfig) -> Result<Self> {
        Ok(Self::try_from(Saved { scale: config.init_scale as f32, finite_steps: 0, config })?)
    }

    /// The settings.
    pub fn config(&self) -> &GradScalerConfig {
        &self.config
    }

    /// What the next loss is multiplied by.
    pub fn loss_scale(&self) -> f64 {
        self.scale.into()
    }

    /// The loss times the scale, to call `backward` on. A loss in a half type is multiplied in f32, and the product is in f32.
    ///
    /// Compute the loss in f32, from an output in f32 (`to_dtype`), as PyTorch's autocast does. The gradient of a loss in f16 is the scale
    /// itself, and f16 can't hold 65536: the first step of the default config would be skipped, and so would each that follows a growth to
    /// 65536.
    ///
    /// # Errors
    ///
    /// A loss that isn't in f16, bf16, f32 or f64; too little memory.
    pub fn scale(&self, loss: &Tensor) -> Result<Tensor> {
        check_dtype("loss", loss.dtype())?;
        memory::ask_for("scaled loss", 2, loss, compute_dtype(loss.dtype()))?;
        Ok(widened(loss)?.affine(self.loss_scale(), 0.0)?)
    }

    /// Divides the gradients of the optimizer's parameters by the scale, and returns whether all of them are finite. If they aren't, the
    /// gradients stay as they are, and the next [`GradScaler::step`] skips them.
    ///
    /// Call it to clip gradients, or to look at them, between the backward pass and the step. Otherwise `step` does it. The gradients in the
    /// store are replaced by new tensors, in f32 for half types.
    ///
    /// # Errors
    ///
    /// A second call before [`GradScaler::step`] or [`GradScaler::discard`]; a gradient of another shape, dtype or device than its
    /// parameter; too little memory. Then nothing has changed.
    pub fn unscale(&mut self, optimizer: &AdamW, gradients: &mut GradStore) -> Result<bool> {
        if self.unscaled.is_some() {
            let got = "those that `unscale` has already divided: call `step` or `discard` first";
            return Err(error("all parameters", "gradients of a scaled loss", got).into());
        }
        let found = match self.divided(optimizer, gradients)? {
            Ok(mut divided) => {
                for (_, var) in optimizer.parameters() {
                    if let Some(gradient) = divided.remove(var) {
                        gradients.insert(var, gradient);
                    }
                }
                Found::Finite
            }
            Err(name) => Found::NotFinite(name),
        };
        Ok(matches!(self.unscaled.insert(found), Found::Finite))
    }

    /// Takes a step with the gradients of a scaled loss, or skips it if one of them isn't finite; then updates the scale. Returns whether
    /// the step was taken.
    ///
    /// The gradients are those of a backward pass from [`GradScaler::scale`], or what [`GradScaler::unscale`] has made of them.
    ///
    /// # Errors
    ///
    /// Those of [`AdamW::step`] and [`GradScaler::unscale`]. Gradients that aren't finite at a scale that can't fall without getting below
    /// `min_scale`, with the name of the first parameter that has one: then no scale helps, since the loss or the parameters aren't
    /// finite. After an error the scaler is as it was.
    pub fn step(&mut self, optimizer: &mut AdamW, gradients: &GradStore) -> Result<bool> {
        let not_finite = match &self.unscaled {
            Some(Found::NotFinite(name)) => Some(name.clone()),
            Some(Found::Finite) => {
                optimizer.step(gradients)?;
                None
            }
            None => match self.divided(optimizer, gradients)? {
                Err(name) => Some(name),
                Ok(divided) => {
                    optimizer.step(&divided)?;
                    None
                }
            },
        };
        match &not_finite {
            Some(name) => self.fall(name)?,
            None => self.rise(),
        }
        self.unscaled = None;
        Ok(not_finite.is_none())
    }

    /// Forgets what [`GradScaler::unscale`] has found: its gradients get no step, for example after an error.
    pub fn discard(&mut self) {
        self.unscaled = None;
    }

    /// The gradients of the optimizer's parameters divided by the scale, or the name of the first parameter whose gradient isn't finite.
    fn divided(&self, optimizer: &AdamW, gradients: &GradStore) -> Result<Result<GradStore, String>> {
        let mut scaled = Vec::new();
        for (name, var) in optimizer.parameters() {
            scaled.extend(of(gradients, name, var)?.map(|gradient| (name, var, gradient)));
        }
        for (_, _, gradient) in &mut scaled {
            *gradient = times(gradient, 1.0 / self.loss_scale())?;
        }
        // The quotients are asked, since a scale below 1 makes them larger. NaN and infinity stay what they are.
        let named: Vec<_> = scaled.iter().map(|(name, _, gradient)| (*name, gradient)).collect();
        if let Some(name) = first_not_finite(&named)? {
            return Ok(Err(name.to_string()));
        }
        let mut divided = GradStore::default();
        for (_, var, gradient) in scaled {
            divided.insert(var, gradient);
        }
        Ok(Ok(divided))
    }

    /// After a step with finite gradients.
    fn rise(&mut self) {
        self.finite_steps += 1;
        if self.finite_steps < self.config.growth_interval {
            return;
        }
        self.finite_steps = 0;
        let higher = (self.loss_scale() * self.config.growth_factor) as f32;
        if higher.is_finite() {
            self.scale = higher;
        }
    }

    /// After a step that was skipped because of the gradient of the parameter `name`.
    fn fall(&mut self, name: &str) -> Result<()> {
        let (lower, min_scale) = ((self.loss_scale() * self.config.backoff_factor) as f32, self.config.min_scale);
        if lower < min_scale as f32 {
            let expected = format!("finite numbers at a loss scale of {}, with a min_scale of {min_scale}", self.scale);
            return Err(error(name, expected, "NaN or infinity: the loss or a parameter may not be finite").into());
        }
        self.scale = lower;
        self.finite_steps = 0;
        Ok(())
    }
}

/// A contiguous gradient times a factor, in f32 for half types: in f16 what the scale has saved would be 0 again.
fn times(gradient: &Tensor, factor: f64) -> Result<Tensor> {
    let wide = compute_dtype(gradient.dtype());
    memory::ask_for("unscaled gradient", 1, gradient, wide)?;
    if !gradient.device().is_cpu() {
        return Ok(widened(gradient)?.affine(factor, 0.0)?);
    }
    let copy = if gradient.dtype() == wide { gradient.copy()?.detach() } else { gradient.to_dtype(wide)? };
    scale_in_place(&copy, factor)?;
    Ok(copy)
}

impl TryFrom<Saved> for GradScaler {
    type Error = AttentionError;

    fn try_from(saved: Saved) -> Result<Self, AttentionError> {
        let Saved { scale, finite_steps, config } = saved;
        config.check()?;
        let wrong = |field, expected: String, got: String| Err(AttentionError::Config { field, expected, got });
        if !(scale.is_finite() && scale >= config.min_scale as f32) {
            let expected = format!("a finite number of at least min_scale, which is {}", config.min_scale);
            return wrong("scale", expected, scale.to_string());
        }
        if finite_steps >= config.growth_interval {
            let expected = format!("fewer than growth_interval, which is {}", config.growth_interval);
            return wrong("finite_steps", expected, finite_steps.to_string());
        }
        Ok(Self { config, scale, finite_steps, unscaled: None })
    }
}

impl From<GradScaler> for Saved {
    fn from(GradScaler { scale, finite_steps, config, .. }: GradScaler) -> Self {
        Self { scale, finite_steps, config }
    }
}
