//! x·Wᵀ + b as one operation with a gradient, for any number of axes of the input and of the output.
//!
//! candle's `Linear` needs six operations for this. Each has a gradient that is zeroed, added and kept. The gradient of
//! the bias is summed number by number, and x gets a gradient even if none is needed. Together that takes more than
//! half of the training time of a small layer.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType};
use candle_nn::Linear;
use half::{bf16, f16};

use crate::sdpa::grad_connect::connected;

/// Projects x to a tensor of the given shape. The last axes of x together hold the inputs of the projection, and the
/// last axes of the result together hold its outputs.
pub(crate) fn project(linear: &Linear, x: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (outputs, inputs) = linear.weight().dims2()?;
    let rows = x.elem_count() / inputs.max(1);
    let x = x.contiguous()?;
    if !x.device().is_cpu() || rows * outputs == 0 {
        return project_with_candle(linear, &x.reshape((rows, inputs))?)?.reshape(shape);
    }
    let op = Projection { rows, inputs, outputs, shape: Shape::from(shape) };
    match linear.bias() {
        Some(bias) => x.apply_op3(linear.weight(), &bias.contiguous()?, op),
        None => x.apply_op2(linear.weight(), op),
    }
}

/// The projection by candle's own operations, which run on every device.
fn project_with_candle(linear: &Linear, rows: &Tensor) -> Result<Tensor> {
    // candle's matmul on CUDA refuses a matrix with gaps between its rows.
    let y = rows.matmul(&linear.weight().contiguous()?.t()?)?;
    match linear.bias() {
        None => Ok(y),
        // For an empty result candle leaves the bias without a gradient.
        Some(bias) if y.elem_count() == 0 => connected(y, bias),
        // On CUDA candle sums the gradient of an f16 bias number by number in f16. (It sums bf16 in f32.)
        Some(bias) if y.dtype() == DType::F16 => {
            y.to_dtype(DType::F32)?.broadcast_add(&bias.to_dtype(DType::F32)?)?.to_dtype(DType::F16)
        }
        Some(bias) => y.broadcast_add(bias),
    }
}

struct Projection {
    rows: usize,
    inputs: usize,
    outputs: usize,
    shape: Shape,
}

impl Projection {
    fn multiply(&self, x: (&CpuStorage, &Layout), weight: (&CpuStorage, &Layout)) -> Result<CpuStorage> {
        let rows = Layout::contiguous_with_offset((self.rows, self.inputs), x.1.start_offset());
        let size = (1, self.rows, self.outputs, self.inputs);
        x.0.matmul(weight.0, size, &rows, &weight.1.transpose(0, 1)?)
    }

    /// The gradients of x and W, each only if it is needed.
    fn gradients(&self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad_x = || grad.matmul(&weight.detach())?.reshape(x.shape());
        let grad_weight = || grad.t()?.matmul(&x.detach().reshape((self.rows, self.inputs))?);
        Ok((x.track_op().then(grad_x).transpose()?, weight.track_op().then(grad_weight).transpose()?))
    }

    fn rows_of(&self, grad: &Tensor) -> Result<Tensor> {
        grad.detach().contiguous()?.reshape((self.rows, self.outputs))
    }
}

impl CustomOp2 for Projection {
    fn name(&self) -> &'static str {
        "projection"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((self.multiply((s1, l1), (s2, l2))?, self.shape.clone()))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.gradients(x, weight, &self.rows_of(grad)?)
    }
}

impl CustomOp3 for Projection {
    fn name(&self) -> &'static str {
        "projection"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut y = self.multiply((s1, l1), (s2, l2))?;
        match (&mut y, s3) {
            (CpuStorage::F32(y), CpuStorage::F32(bias)) => add_to_rows(y, &bias[l3.start_offset()..][..self.outputs]),
            (CpuStorage::F64(y), CpuStorage::F64(bias)) => add_to_rows(y, &bias[l3.start_offset()..][..self.outputs]),
            (CpuStorage::F16(y), CpuStorage::F16(bias)) => {
                add_to_rows::<f16>(y, &bias[l3.start_offset()..][..self.outputs])
            }
            (CpuStorage::BF16(y), CpuStorage::BF16(bias)) => {
                add_to_rows::<bf16>(y, &bias[l3.start_offset()..][..self.outputs]);
            }
            _ => candle_core::bail!(
                "projection: expected a bias of the weight's dtype {:?}, got {:?}",
                y.dtype(),
                s3.dtype()
            ),
        }
        Ok((y, self.shape.clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = self.rows_of(grad)?;
        let grad_bias = || {
            // A product with ones is many times as fast as candle's sum over rows. Half types are summed in f32.
            let wide = if matches!(grad.dtype(), DType::F16 | DType::BF16) {
                grad.to_dtype(DType::F32)?
            } else {
                grad.clone()
            };
            let ones = Tensor::ones((1, self.rows), wide.dtype(), wide.device())?;
            ones.matmul(&wide)?.reshape(bias.shape())?.to_dtype(grad.dtype())
        };
        let (grad_x, grad_weight) = self.gradients(x, weight, &grad)?;
        Ok((grad_x, grad_weight, bias.track_op().then(grad_bias).transpose()?))
    }
}

fn add_to_rows<T: WithDType>(y: &mut [T], bias: &[T]) {
    for row in y.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(y, bias)| *y += *bias);
    }
}
