//! One step: by the kernel on the CPU, by candle's operations elsewhere.

use attention_kernels::optimizer::{AdamWConstants, AdamWParameter, adamw};
use candle_core::Tensor;

use crate::check::compute_dtype;
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::train::adamw::moments::{Moments, Stepped};
use crate::train::adamw::{AdamW, AdamWConfig, Trained};
use crate::train::gradients::{numbers, with_number};
use crate::train::in_place::write;

impl AdamW {
    /// Steps every parameter that has a gradient.
    pub(super) fn update(&mut self, gradients: &[Option<Tensor>]) -> Result<()> {
        let config = self.config;
        for (parameter, gradient) in self.parameters.iter_mut().zip(gradients) {
            let Some(gradient) = gradient else { continue };
            if matches!(parameter.moments, Moments::Tensors(_)) {
                step_with_tensors(parameter, gradient, &config)?;
            } else {
                with_number!(parameter.var.dtype(), E => step_on_cpu::<E>(parameter, gradient, &config))?;
            }
        }
        Ok(())
    }
}

/// Steps a parameter of type `E`.
fn step_on_cpu<E: Stepped>(parameter: &mut Trained, gradient: &Tensor, config: &AdamWConfig) -> Result<()> {
    let constants = AdamWConstants { beta1: config.beta1, beta2: config.beta2, eps: config.eps };
    let Trained { var, decays, steps, moments, .. } = parameter;
    let (storage, _) = gradient.storage_and_layout();
    Ok(write::<E>(var, &mut |values| {
        let Some([first_moment, second_moment]) = E::moments(moments) else { return Ok(()) };
        let parameter = AdamWParameter {
            values,
            gradient: numbers::<E>(&storage, gradient)?,
            first_moment,
            second_moment,
            step: *steps as u64 + 1,
            learning_rate: config.lr,
            weight_decay: if *decays { config.weight_decay } else { 0.0 },
        };
        Ok(adamw(constants, vec![parameter]).map_err(AttentionError::from)?)
    })?)
}

/// The same step by candle's operations, in the same order.
fn step_with_tensors(parameter: &mut Trained, gradient: &Tensor, config: &AdamWConfig) -> Result<()> {
    let AdamWConfig { lr, beta1, beta2, eps, weight_decay } = *config;
    let Moments::Tensors([first, second]) = &parameter.moments else { return Ok(()) };
    let dtype = compute_dtype(gradient.dtype());
    memory::ask_for("a step of AdamW", 10, gradient, dtype)?;
    let (var, gradient) = (parameter.var.as_detached_tensor(), gradient.to_dtype(dtype)?);
    let correction = |beta: f64| 1.0 - beta.powf(parameter.steps as f64 + 1.0);
    let first = (first + ((&gradient - first)? * (1.0 - beta1))?)?;
    let second = ((second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
    let root = ((second.sqrt()? * (1.0 / correction(beta2).sqrt()))? + eps)?;
    let update = ((&first * (lr / correction(beta1)))? / root)?;
    let decay = if parameter.decays { weight_decay } else { 0.0 };
    let value = ((var.to_dtype(dtype)? * (1.0 - lr * decay))? - update)?;
    parameter.var.set(&value.to_dtype(var.dtype())?)?;
    parameter.moments = Moments::Tensors([first, second]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    /// Two optimizers of the same parameters, of which the second keeps its moments as tensors.
    #[test]
    fn a_step_with_tensors_is_that_of_the_kernel() {
        for (dtype, tolerance) in [(DType::F64, 1e-15), (DType::F32, 3e-7), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
            let numbers: Vec<f64> = (0..60).map(|i| f64::from(i * i % 61) / 30.0 - 1.0).collect();
            let start = Tensor::from_vec(numbers, (12, 5), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let [kernel, tensors] = [false, true].map(|with_tensors| {
                let var = Var::from_tensor(&start.copy().unwrap()).unwrap();
                let mut optimizer = AdamW::new(&[("x".into(), var.clone())], AdamWConfig::default()).unwrap();
                if with_tensors {
                    optimizer.parameters[0].moments = Moments::tensors(&var).unwrap();
                }
                for _ in 0..3 {
                    optimizer.step(&var.sqr().unwrap().sum_all().unwrap().backward().unwrap()).unwrap();
                }
                var.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap()
            });
            assert!(kernel.iter().zip(&tensors).all(|(a, b)| (a - b).abs() <= tolerance), "{dtype:?}");
        }
    }
}
