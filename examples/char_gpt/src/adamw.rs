//! AdamW whose state can be saved. candle-nn's hides its moments.

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_nn::ParamsAdamW;

/// A parameter, and the running means of its gradient and of its gradient's square.
pub struct Trained {
    pub name: String,
    pub var: Var,
    pub first_moment: Tensor,
    pub second_moment: Tensor,
}

/// Loshchilov, Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019), algorithm 2.
pub struct AdamW {
    pub parameters: Vec<Trained>,
    /// Steps taken.
    pub steps: usize,
}

impl AdamW {
    pub fn new(vars: Vec<(String, Var)>) -> Result<Self> {
        let start = |(name, var): (String, Var)| {
            let (first_moment, second_moment) = (var.zeros_like()?, var.zeros_like()?);
            Ok(Trained { name, var, first_moment, second_moment })
        };
        Ok(Self { parameters: vars.into_iter().map(start).collect::<Result<_>>()?, steps: 0 })
    }

    /// θ ← (1 - lr · decay) · θ - lr · m̂ / (sqrt(v̂) + eps)
    pub fn step(&mut self, gradients: &GradStore, settings: &ParamsAdamW) -> Result<()> {
        let ParamsAdamW { lr, beta1, beta2, eps, weight_decay } = *settings;
        self.steps += 1;
        let correction = |beta: f64| 1.0 / (1.0 - beta.powf(self.steps as f64));
        for Trained { name, var, first_moment, second_moment } in &mut self.parameters {
            // Some of candle's operations drop the gradient without an error. This finds them.
            let gradient = gradients.get(var).with_context(|| format!("no gradient reaches {name}"))?;
            *first_moment = ((&*first_moment * beta1)? + (gradient * (1.0 - beta1))?)?;
            *second_moment = ((&*second_moment * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let root = (&*second_moment * correction(beta2))?.sqrt()?;
            let update = ((&*first_moment * (lr * correction(beta1)))? / (root + eps)?)?;
            var.set(&((var.as_tensor() * (1.0 - lr * weight_decay))? - update)?)?;
        }
        Ok(())
    }
}
