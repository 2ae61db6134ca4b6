//! One step: by the kernel on the CPU, by candle's operations elsewhere.

use attention_kernels::Number;
use attention_kernels::optimizer::{AdamWConstants, AdamWParameter, adamw};
use candle_core::{Tensor, Var, WithDType};

use crate::check::compute_dtype;
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::train::adamw::moments::{Kept, Moments, Stepped};
use crate::train::adamw::{AdamW, AdamWConfig, Trained};
use crate::train::gradients::{numbers, with_number};
use crate::train::in_place::write;

impl AdamW {
    /// Steps every parameter that has a gradient.
    pub(super) fn update(&mut self, gradients: &[Option<Tensor>]) -> Result<()> {
        let config = self.config;
        for (parameter, gradient) in self.parameters.iter_mut().zip(gradients) {
            let Some(gradient) = gradient else { continue };
            let dtype = parameter.var.dtype();
            if matches!(parameter.moments, Moments::Tensors(_)) {
                step_with_tensors(parameter, gradient, &config)?;
            } else if gradient.dtype() == dtype {
                with_number!(dtype, E => step_on_cpu::<E, E>(parameter, gradient, &config))?;
            } else {
                with_number!(dtype, E => step_on_cpu::<E, <E as Number>::Float>(parameter, gradient, &config))?;
            }
        }
        Ok(())
    }
}

/// Steps a parameter of type `E` whose gradient is of type `G`.
fn step_on_cpu<E: Stepped, G: WithDType + Number<Float = E::Float>>(
    parameter: &mut Trained,
    gradient: &Tensor,
    config: &AdamWConfig,
) -> Result<()> {
    let constants = AdamWConstants { beta1: config.beta1, beta2: config.beta2, eps: config.eps };
    let Trained { var, decays, steps, moments, .. } = parameter;
    let (storage, _) = gradient.storage_and_layout();
    Ok(write::<E>(var, &mut |values| {
        let Some(Kept { moments: [first_moment, second_moment], master }) = E::kept(moments) else { return Ok(()) };
        let parameter = AdamWParameter {
            values,
            gradient: numbers::<G>(&storage, gradient)?,
            master: master.as_deref_mut(),
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
    let Moments::Tensors(Kept { moments: [first, second], master }) = &parameter.moments else { return Ok(()) };
    let dtype = compute_dtype(gradient.dtype());
    memory::ask_for("a step of AdamW", 12, gradient, dtype)?;
    let (value, gradient) = (value_before(&parameter.var, master.as_ref())?, gradient.to_dtype(dtype)?);
    let correction = |beta: f64| 1.0 - beta.powf(parameter.steps as f64 + 1.0);
    let first = (first + ((&gradient - first)? * (1.0 - beta1))?)?;
    let second = ((second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
    let root = ((second.sqrt()? * (1.0 / correction(beta2).sqrt()))? + eps)?;
    let update = ((&first * (lr / correction(beta1)))? / root)?;
    let decay = if parameter.decays { weight_decay } else { 0.0 };
    let value = ((value * (1.0 - lr * decay))? - update)?;
    parameter.var.set(&value.to_dtype(parameter.var.dtype())?)?;
    let master = master.is_some().then_some(value);
    parameter.moments = Moments::Tensors(Kept { moments: [first, second], master });
    Ok(())
}

/// What a step goes from, in the dtype to compute in: the master copy, except for the numbers of the parameter that aren't its rounding.
/// These have been changed from outside.
fn value_before(var: &Var, master: Option<&Tensor>) -> Result<Tensor> {
    let wide = var.as_detached_tensor().to_dtype(compute_dtype(var.dtype()))?;
    let Some(master) = master else { return Ok(wide) };
    let rounded = master.to_dtype(var.dtype())?.to_dtype(wide.dtype())?;
    Ok(rounded.eq(&wide)?.where_cond(master, &wide)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;

    /// A parameter and its master copy after steps of the kernel or of candle's operations, with a change from outside before the last.
    fn end(dtype: DType, with_tensors: bool, with_masters: bool, wide_gradients: bool) -> [Vec<f64>; 2] {
        let numbers: Vec<f64> = (0..60).map(|i| f64::from(i * i % 61) / 30.0 - 1.0).collect();
        let start = Tensor::from_vec(numbers, (12, 5), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let var = Var::from_tensor(&start).unwrap();
        let mut optimizer = AdamW::new(&[("x".into(), var.clone())], AdamWConfig::default()).unwrap();
        if with_tensors {
            optimizer.parameters[0].moments = Moments::tensors(&var).unwrap();
        }
        if with_masters {
            optimizer = optimizer.with_master_weights().unwrap();
        }
        for step in 0..4 {
            let mut gradients = var.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            if wide_gradients {
                let wide = gradients.get(&var).unwrap().to_dtype(compute_dtype(dtype)).unwrap();
                gradients.insert(&var, wide);
            }
            optimizer.step(&gradients).unwrap();
            if step == 2 {
                let changed = (var.narrow(0, 3, 2).unwrap() * 2.0).unwrap().detach();
                var.set(&var.as_detached_tensor().slice_scatter(&changed, 0, 3).unwrap()).unwrap();
            }
        }
        let flat = |x: &Tensor| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let kept = optimizer.parameters[0].moments.to_tensors(&var).unwrap();
        [flat(&var), kept.master.map_or(Vec::new(), |master| flat(&master))]
    }

    #[test]
    fn a_step_with_tensors_is_that_of_the_kernel() {
        for (dtype, tolerance) in [(DType::F64, 1e-15), (DType::F32, 3e-7), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
            for (with_masters, wide_gradients) in [(false, false), (false, true), (true, false), (true, true)] {
                let [kernel, tensors] = [false, true].map(|tensors| end(dtype, tensors, with_masters, wide_gradients));
                let close = |kernel: &[f64], tensors: &[f64], tolerance: f64| {
                    kernel.len() == tensors.len() && kernel.iter().zip(tensors).all(|(a, b)| (a - b).abs() <= tolerance)
                };
                let is_half = matches!(dtype, DType::F16 | DType::BF16);
                assert_eq!(kernel[1].len(), if is_half && with_masters { 60 } else { 0 }, "{dtype:?}");
                assert!(close(&kernel[0], &tensors[0], tolerance), "{dtype:?}");
                // They are in f32, so that they agree more closely than what is rounded.
                assert!(close(&kernel[1], &tensors[1], 1e-6), "{dtype:?}: the master copies");
            }
        }
    }
}
