//! The gradients of named parameters, checked, and their norms.

use attention_kernels::optimizer::sums_of_squares;
use attention_kernels::{Number, collected};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Storage, Tensor, Var, WithDType};
use candle_nn::VarMap;
use half::{bf16, f16};

use crate::check::compute_dtype;
use crate::error::{AttentionError, Result};
use crate::memory;

/// All variables of a `VarMap` with their names, in alphabetical order. (`VarMap::all_vars` has no order.)
///
/// # Examples
///
/// ```
/// use candle_attention::train::named_variables;
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// (vb.get(2, "b")?, vb.get(2, "a")?);
/// assert_eq!(named_variables(&varmap).into_iter().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "b"]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn named_variables(varmap: &VarMap) -> Vec<(String, Var)> {
    // A panic elsewhere while the map was locked can't have left a half of an entry.
    let variables = varmap.data().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut variables: Vec<_> = variables.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
    variables.sort_by(|(a, _), (b, _)| a.cmp(b));
    variables
}

pub(crate) fn error(name: &str, expected: impl Into<String>, got: impl Into<String>) -> AttentionError {
    AttentionError::Gradient { name: name.into(), expected: expected.into(), got: got.into() }
}

/// The gradient of a parameter, contiguous; `None` if there is none. Its dtype is that of the parameter or, for half types, f32.
pub(crate) fn of(gradients: &GradStore, name: &str, var: &Var) -> Result<Option<Tensor>> {
    let Some(gradient) = gradients.get(var) else { return Ok(None) };
    if gradient.dims() != var.dims() {
        let (expected, got) = (format!("shape {:?}", var.dims()), format!("{:?}", gradient.dims()));
        return Err(error(name, expected, got).into());
    }
    let (dtype, wide) = (var.dtype(), compute_dtype(var.dtype()));
    if ![dtype, wide].contains(&gradient.dtype()) {
        let or_wide = if wide == dtype { String::new() } else { format!(" or {wide:?}") };
        return Err(error(name, format!("dtype {dtype:?}{or_wide}"), format!("{:?}", gradient.dtype())).into());
    }
    let (expected, got) = (var.device().location(), gradient.device().location());
    if expected != got {
        return Err(error(name, format!("device {expected:?}"), format!("{got:?}")).into());
    }
    Ok(Some(memory::contiguous("gradient of a parameter", &gradient.detach())?))
}

/// A contiguous tensor's numbers on the CPU.
pub(super) fn numbers<'a, E: WithDType>(storage: &'a Storage, tensor: &Tensor) -> candle_core::Result<&'a [E]> {
    let Storage::Cpu(storage) = storage else { candle_core::bail!("expected a tensor on the CPU") };
    let start = tensor.layout().start_offset();
    Ok(&storage.as_slice::<E>()?[start..start + tensor.elem_count()])
}

/// The sum of the squares of each gradient, in f64 on the CPU.
///
/// # Errors
///
/// The first gradient that isn't finite.
pub(super) fn finite_squares(gradients: &[(&str, &Tensor)]) -> Result<Vec<f64>> {
    let sums = squares(gradients)?;
    for ((name, gradient), sum) in gradients.iter().zip(&sums) {
        if !sum.is_finite() {
            let got = if is_finite(gradient)? { "a norm that overflows" } else { "NaN or infinity" };
            return Err(error(name, "finite numbers", got).into());
        }
    }
    Ok(sums)
}

/// The name of the first gradient that isn't finite.
pub(super) fn first_not_finite<'a>(gradients: &[(&'a str, &Tensor)]) -> Result<Option<&'a str>> {
    for ((name, gradient), sum) in gradients.iter().zip(squares(gradients)?) {
        if !sum.is_finite() && !is_finite(gradient)? {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn is_finite(gradient: &Tensor) -> Result<bool> {
    // Zero times infinity is NaN.
    Ok((gradient * 0.0)?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()? == 0.0)
}

/// The sum of the squares of each gradient. A sum that isn't finite may also be that of numbers whose squares overflow.
fn squares(gradients: &[(&str, &Tensor)]) -> Result<Vec<f64>> {
    let mut sums = collected("squares of the gradients", gradients.iter().map(|_| 0.0))?;
    squares_on_cpu::<f16>(gradients, &mut sums)?;
    squares_on_cpu::<bf16>(gradients, &mut sums)?;
    squares_on_cpu::<f32>(gradients, &mut sums)?;
    squares_on_cpu::<f64>(gradients, &mut sums)?;
    for ((_, gradient), sum) in gradients.iter().zip(&mut sums).filter(|((_, gradient), _)| !gradient.device().is_cpu())
    {
        let wide = if gradient.device().is_cuda() { DType::F64 } else { DType::F32 };
        *sum = gradient.to_dtype(wide)?.sqr()?.sum_all()?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_scalar()?;
    }
    Ok(sums)
}

fn squares_on_cpu<E: Number + WithDType>(gradients: &[(&str, &Tensor)], sums: &mut [f64]) -> Result<()> {
    let is_one = |gradient: &Tensor| gradient.dtype() == E::DTYPE && gradient.device().is_cpu();
    let of_type = || gradients.iter().filter(|(_, gradient)| is_one(gradient));
    let guards: Vec<_> = of_type().map(|(_, gradient)| (gradient, gradient.storage_and_layout().0)).collect();
    let slices = guards.iter().map(|(gradient, storage)| numbers::<E>(storage, gradient));
    let found = sums_of_squares(&slices.collect::<candle_core::Result<Vec<_>>>()?)?;
    let targets = gradients.iter().zip(sums).filter(|((_, gradient), _)| is_one(gradient));
    targets.zip(found).for_each(|((_, sum), found)| *sum = found);
    Ok(())
}

/// Where a tensor's storage is. Two tensors of the same place share it.
pub(super) fn place(tensor: &Tensor) -> usize {
    std::ptr::from_ref::<Storage>(&tensor.storage_and_layout().0).addr()
}

/// A dtype that both candle and the kernels know, as what `$call::<type>` is called with.
macro_rules! with_number {
    ($dtype:expr, $number:ident => $call:expr) => {
        match $dtype {
            candle_core::DType::F16 => {
                type $number = half::f16;
                $call
            }
            candle_core::DType::BF16 => {
                type $number = half::bf16;
                $call
            }
            candle_core::DType::F64 => {
                type $number = f64;
                $call
            }
            _ => {
                type $number = f32;
                $call
            }
        }
    };
}
pub(super) use with_number;
