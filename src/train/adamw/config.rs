//! The settings of AdamW.

use serde::{Deserialize, Serialize};

use crate::error::AttentionError;

/// The settings of [`AdamW`](super::AdamW), with PyTorch's defaults.
///
/// # Examples
///
/// ```
/// use candle_attention::train::AdamWConfig;
///
/// let config = AdamWConfig { lr: 3e-4, ..Default::default() };
/// assert_eq!((config.beta1, config.beta2, config.eps, config.weight_decay), (0.9, 0.999, 1e-8, 0.01));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// The learning rate: a finite number, at least 0.
    pub lr: f64,
    /// How much of the first moment a step keeps, in [0, 1).
    pub beta1: f64,
    /// How much of the second moment a step keeps, in [0, 1).
    pub beta2: f64,
    /// What is added to the root of the second moment: a number above 0, also in f32, since a parameter whose gradient is zero is
    /// divided by it.
    pub eps: f64,
    /// λ: a step takes lr · λ of a parameter away. A finite number, at least 0.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

impl AdamWConfig {
    pub(super) fn check(&self) -> Result<(), AttentionError> {
        let at_least_zero = |x: f64| x.is_finite() && x >= 0.0;
        let share = |x: f64| (0.0..1.0).contains(&x);
        // The first step is the longest: lr / (1 - beta1) times a number of at most one.
        let fits = |lr: f64| ((lr / (1.0 - self.beta1)) as f32).is_finite() || !share(self.beta1);
        let checks = [
            ("lr", self.lr, at_least_zero(self.lr) && fits(self.lr), "a number of at least 0 whose steps f32 can hold"),
            ("beta1", self.beta1, share(self.beta1), "a number in [0, 1)"),
            ("beta2", self.beta2, share(self.beta2), "a number in [0, 1)"),
            ("eps", self.eps, self.eps > 0.0 && (self.eps as f32).is_normal(), "a finite number above 0, also in f32"),
            (
                "weight_decay",
                self.weight_decay,
                at_least_zero(self.weight_decay) && ((self.lr * self.weight_decay) as f32).is_finite(),
                "a number of at least 0 whose product with lr f32 can hold",
            ),
        ];
        match checks.into_iter().find(|(_, _, is_right, _)| !is_right) {
            Some((field, got, _, expected)) => {
                Err(AttentionError::Config { field, expected: expected.into(), got: got.to_string() })
            }
            None => Ok(()),
        }
    }
}
