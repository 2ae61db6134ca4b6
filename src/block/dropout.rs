//! Dropout, alone and with the sum of a residual and its branch.

use attention_kernels::residual;
use attention_kernels::{Dropout, filled};
use candle_core::Tensor;

use crate::block::op::{self, Dtype, Function, Gradient};
use crate::check::{check_device, check_dtype, check_number, widened};
use crate::empty::connected;
use crate::error::{AttentionError, Result};
use crate::memory;

/// x with each number dropped with probability p, and the others divided by 1 - p. A dropped number is 0, even if it was not
/// finite.
///
/// What is dropped is a function of the seed and the number's position alone: the same on every device, with any number of
/// threads, and in the backward pass.
///
/// # Shapes
///
/// x of any shape; the result has the shape and dtype of x.
///
/// # Errors
///
/// A p outside [0, 1), a dtype that isn't a float, or too little memory.
///
/// # Examples
///
/// ```
/// use candle_attention::block::dropout;
/// use candle_core::{DType, Device, Tensor};
///
/// let ones = Tensor::ones(1000, DType::F32, &Device::Cpu)?;
/// let y = dropout(&ones, 0.5, 7)?.to_vec1::<f32>()?;
/// assert!(y.iter().all(|&y| y == 0.0 || y == 2.0));
/// assert!((400..600).contains(&y.iter().filter(|&&y| y == 0.0).count()));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Source: Srivastava et al., "Dropout" (JMLR 2014), section 10.
pub fn dropout(x: &Tensor, p: f64, seed: u64) -> Result<Tensor> {
    drop_out(x, Dropout { p, seed, first: 0 })
}

/// As [`dropout`], for a tensor that is a part of a larger one.
pub(crate) fn drop_out(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    check("x", x, dropout.p)?;
    if dropout.p == 0.0 || x.elem_count() == 0 {
        return Ok(x.clone());
    }
    if x.device().is_cpu() {
        return Ok(op::apply(Dropped(Some(dropout)), [x])?);
    }
    Ok(elsewhere(&widened(x)?, dropout)?.to_dtype(x.dtype())?)
}

/// residual + dropout(branch), in one pass over memory.
///
/// # Shapes
///
/// residual and branch of one shape and dtype, which the result has too.
///
/// # Errors
///
/// Two shapes, dtypes or devices, or as [`dropout`].
///
/// # Examples
///
/// ```
/// use candle_attention::block::{add_dropped, dropout};
/// use candle_core::{DType, Device, Tensor};
///
/// let ones = Tensor::ones(100, DType::F32, &Device::Cpu)?;
/// let sum = add_dropped(&ones, &ones, 0.5, 7)?.to_vec1::<f32>()?;
/// assert_eq!(sum, (&ones + dropout(&ones, 0.5, 7)?)?.to_vec1::<f32>()?);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn add_dropped(residual: &Tensor, branch: &Tensor, p: f64, seed: u64) -> Result<Tensor> {
    add_dropped_out(residual, branch, Dropout { p, seed, first: 0 })
}

/// As [`add_dropped`], for tensors that are parts of larger ones.
pub(crate) fn add_dropped_out(residual: &Tensor, branch: &Tensor, dropout: Dropout) -> Result<Tensor> {
    check("residual", residual, dropout.p)?;
    check_device("branch", branch, residual)?;
    if branch.dtype() != residual.dtype() {
        let expected = format!("{:?}, as the residual has", residual.dtype());
        return Err(AttentionError::DType { tensor: "branch", expected, got: branch.dtype() }.into());
    }
    if branch.dims() != residual.dims() {
        let expected = format!("{:?}, as the residual has", residual.dims());
        return Err(AttentionError::Shape { tensor: "branch", expected, shape: branch.dims().to_vec() }.into());
    }
    if residual.device().is_cpu() {
        return Ok(op::apply(Dropped((dropout.p > 0.0).then_some(dropout)), [residual, branch])?);
    }
    if residual.elem_count() == 0 {
        return Ok(connected(residual.clone(), branch)?);
    }
    let branch = if dropout.p > 0.0 { elsewhere(&widened(branch)?, dropout)? } else { widened(branch)? };
    Ok((widened(residual)? + branch)?.to_dtype(residual.dtype())?)
}

fn check(tensor: &'static str, x: &Tensor, p: f64) -> Result<(), AttentionError> {
    check_dtype(tensor, x.dtype())?;
    check_number("p", Some(p), "a probability in [0, 1)", |p| (0.0..1.0).contains(&p))?;
    memory::check_countable(tensor, x)
}

/// Dropout by candle's operations. What is kept is drawn on the CPU.
fn elsewhere(x: &Tensor, dropout: Dropout) -> candle_core::Result<Tensor> {
    const WHAT: &str = "numbers that dropout keeps";
    let ones = filled(WHAT, x.elem_count(), 1f32).map_err(AttentionError::from)?;
    let kept = residual::add_dropped(None, &ones, Some(dropout)).map_err(AttentionError::from)?;
    let kept = Tensor::from_vec(kept, x.shape(), x.device())?.gt(0f32)?;
    kept.where_cond(&x.affine(1.0 / (1.0 - dropout.p), 0.0)?, &x.zeros_like()?)
}

/// Dropout of a branch, alone or added to a residual. Without dropout it is a plain sum.
struct Dropped(Option<Dropout>);

impl Dropped {
    fn gradient<E: Dtype>(&self, grad: &[E]) -> Result<Gradient<E>, AttentionError> {
        match self.0 {
            None => Ok(Gradient::Incoming),
            dropout => Ok(Gradient::Numbers(residual::dropped_gradient(grad, dropout)?)),
        }
    }
}

impl Function<1> for Dropped {
    const NAME: &'static str = "dropout";

    fn forward<E: Dtype>(&self, [x]: [&[E]; 1], _: [&[usize]; 1]) -> candle_core::Result<Vec<E>> {
        Ok(residual::add_dropped(None, x, self.0).map_err(AttentionError::from)?)
    }

    fn backward<E: Dtype>(
        &self,
        _: [&[E]; 1],
        _: [&[usize]; 1],
        grad: &[E],
        _: [bool; 1],
    ) -> candle_core::Result<[Option<Gradient<E>>; 1]> {
        Ok([Some(self.gradient(grad)?)])
    }
}

impl Function<2> for Dropped {
    const NAME: &'static str = "residual-and-dropped-branch";

    fn forward<E: Dtype>(&self, [x, branch]: [&[E]; 2], _: [&[usize]; 2]) -> candle_core::Result<Vec<E>> {
        Ok(residual::add_dropped(Some(x), branch, self.0).map_err(AttentionError::from)?)
    }

    fn backward<E: Dtype>(
        &self,
        _: [&[E]; 2],
        _: [&[usize]; 2],
        grad: &[E],
        [_, branch]: [bool; 2],
    ) -> candle_core::Result<[Option<Gradient<E>>; 2]> {
        let branch = branch.then(|| self.gradient(grad)).transpose()?;
        Ok([Some(Gradient::Incoming), branch])
    }
}
