//! The backward pass of a loss.

use candle_core::Tensor;
use candle_core::backprop::GradStore;

use crate::error::Result;
use crate::gradient::collecting_backward;

/// The gradients of all variables that a loss depends on: those of `loss.backward()`, in less time and memory.
///
/// candle makes a tensor of zeros for each gradient and adds the gradient to it, on one thread. Here the gradients that this crate's
/// operations compute for variables go into the result as they are, on the CPU. A variable that candle's operations use too gets the
/// sum of both, which may differ from candle's by rounding. All other gradients have the same bits, except that a zero may be negative.
///
/// An operation of your own may run a backward pass in its `bwd`, through a graph of its own, with this function or with candle's. That
/// graph must not contain tensors of the graph around it that have a gradient: detach them.
///
/// # Errors
///
/// What an operation's gradient or candle finds wrong; too little memory.
///
/// # Examples
///
/// ```
/// use candle_attention::block::linear;
/// use candle_attention::train::backward;
/// use candle_core::{Device, Tensor, Var};
///
/// let weight = Var::new(&[[1f32, 2.0]], &Device::Cpu)?;
/// let x = Tensor::new(&[[3f32, 4.0]], &Device::Cpu)?;
/// let gradients = backward(&linear(&x, &weight, None)?.sum_all()?)?;
/// assert_eq!(gradients.get(&weight).unwrap().to_vec2::<f32>()?, [[3.0, 4.0]]);
/// # Ok::<(), candle_attention::Error>(())
/// ```
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    Ok(collecting_backward(loss)?)
}
