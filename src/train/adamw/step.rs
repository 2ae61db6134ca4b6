//! One step: by the kernel on the CPU, by candle's operations elsewhere.

use attention_kernels::optimizer::{AdamWConstants, AdamWParameter, adamw};
use candle_core::Tensor;
use half::{bf16, f16};

use crate::check::compute_dtype;
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::train::adamw::moments::{Moments, Stepped};
use crate::train::adamw::{AdamW, AdamWConfig, Trained};
use crate::train::gradients::numbers;
use crate::train::in_place::write_all;

/// How many parameters are stepped at once. Each takes a frame of the stack, and so many take a small part of it.
const AT_ONCE: usize = 64;

impl AdamW {
    /// Steps every parameter that has a gradient.
    pub(super) fn update(&mut self, gradients: &[Option<Tensor>]) -> Result<()> {
        let config = self.config;
        let mut on_cpu = Vec::new();
        for (parameter, gradient) in self.parameters.iter_mut().zip(gradients) {
            let Some(gradient) = gradient else { continue };
            if matches!(parameter.moments, Moments::Tensors(_)) {
                step_with_tensors(parameter, gradient, &config)?;
            } else {
                on_cpu.push((parameter, gradient));
            }
        }
        step_on_cpu::<f16>(&mut on_cpu, &config)?;
        step_on_cpu::<bf16>(&mut on_cpu, &config)?;
        step_on_cpu::<f32>(&mut on_cpu, &config)?;
        step_on_cpu::<f64>(&mut on_cpu, &config)
    }
}

/// Steps the parameters of type `E`.
fn step_on_cpu<E: Stepped>(all: &mut [(&mut Trained, &Tensor)], config: &AdamWConfig) -> Result<()> {
    let mut of_type: Vec<_> = all.iter_mut().filter(|(parameter, _)| parameter.var.dtype() == E::DTYPE).collect();
    let constants = AdamWConstants { beta1: config.beta1, beta2: config.beta2, eps: config.eps };
    for some in of_type.chunks_mut(AT_ONCE) {
        let vars: Vec<_> = some.iter().map(|(parameter, _)| parameter.var.clone()).collect();
        let gradients: Vec<_> = some.iter().map(|(_, gradient)| *gradient).collect();
        let guards: Vec<_> = gradients.iter().map(|gradient| (*gradient, gradient.storage_and_layout().0)).collect();
        write_all::<E>(&vars.iter().map(|var| var.as_tensor()).collect::<Vec<_>>(), &mut |slices| {
            let mut parameters = Vec::with_capacity(some.len());
            for (((parameter, _), values), (gradient, storage)) in some.iter_mut().zip(slices).zip(&guards) {
                let Some([first_moment, second_moment]) = E::moments(&mut parameter.moments) else { continue };
                parameters.push(AdamWParameter {
                    values,
                    gradient: numbers::<E>(storage, gradient)?,
                    first_moment,
                    second_moment,
                    step: parameter.steps as u64 + 1,
                    learning_rate: config.lr,
                    weight_decay: if parameter.decays { config.weight_decay } else { 0.0 },
                });
            }
            Ok(adamw(constants, parameters).map_err(AttentionError::from)?)
        })?;
    }
    Ok(())
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
