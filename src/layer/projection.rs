//! x·Wᵀ + b as one operation with a gradient, for any number of axes of the input and of the output.
//!
//! candle's `Linear` needs six operations for this. Each has a gradient that is zeroed, added and kept. The gradient of
//! the bias is summed number by number, and x gets a gradient even if none is needed. Together that takes more than
//! half of the training time of a small layer.
//!
//! On the CPU half types are multiplied, added and summed in f32. candle's f16 product of a single row has ten times the
//! error of a rounding to f16.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType};
use candle_nn::Linear;

use crate::check::compute_dtype;
use crate::empty::connected;
use crate::memory;

/// Projects x to a tensor of the given shape. The last axes of x together hold the inputs of the projection, and the
/// last axes of the result together hold its outputs.
pub(crate) fn project(linear: &Linear, x: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (outputs, inputs) = linear.weight().dims2()?;
    let x = memory::contiguous("input of a projection", x)?;
    let rows = x.elem_count() / inputs.max(1);
    memory::ask(
        "result of a projection",
        x.device(),
        product_memory(&[[rows, outputs]], &[[rows, inputs], [outputs, inputs]], x.dtype()),
    )?;
    if !x.device().is_cpu() || rows * outputs == 0 {
        return project_with_candle(linear, &x.reshape((rows, inputs))?)?.reshape(shape);
    }
    let op = Projection { rows, inputs, outputs, shape: Shape::from(shape) };
    match linear.bias() {
        Some(bias) => x.apply_op3(linear.weight(), &bias.contiguous()?, op),
        None => x.apply_op2(linear.weight(), op),
    }
}

/// The memory of a matrix product with these results and operands.
fn product_memory(results: &[[usize; 2]], operands: &[[usize; 2]], dtype: DType) -> usize {
    let all = |matrices: &[[usize; 2]], dtype| memory::sum(matrices.iter().map(|dims| memory::bytes(dims, dtype)));
    // Half types are multiplied as f32, of which there are copies.
    let wide = compute_dtype(dtype);
    let copies = if dtype == wide { [0; 2] } else { [all(operands, wide), all(results, wide)] };
    memory::sum(copies.into_iter().chain([all(results, dtype)]))
}

/// The projection by candle's own operations, which run on every device.
fn project_with_candle(linear: &Linear, rows: &Tensor) -> Result<Tensor> {
    // candle's matmul on CUDA refuses a matrix with gaps between its rows.
    let y = rows.matmul(&linear.weight().contiguous()?.t()?)?;
    match linear.bias() {
        None => Ok(y),
        // For an empty result candle leaves the bias without a gradient.
        Some(bias) if y.elem_count() == 0 => connected(y, bias),
        // The gradient of the bias is a sum over rows. candle sums in the dtype of the addition.
        Some(bias) => {
            let (dtype, compute) = (y.dtype(), compute_dtype(y.dtype()));
            y.to_dtype(compute)?.broadcast_add(&bias.to_dtype(compute)?)?.to_dtype(dtype)
        }
    }
}

struct Projection {
    rows: usize,
    inputs: usize,
    outputs: usize,
    shape: Shape,
}

/// A tensor on the CPU, as candle gives it to an operation.
type Operand<'a> = (&'a CpuStorage, &'a Layout);

impl Projection {
    fn forward(&self, x: Operand, weight: Operand, bias: Option<Operand>) -> Result<(CpuStorage, Shape)> {
        let dtype = x.0.dtype();
        let ((x, x_layout), (weight, weight_layout)) = (widened(x)?, widened(weight)?);
        let rows = Layout::contiguous_with_offset((self.rows, self.inputs), x_layout.start_offset());
        let size = (1, self.rows, self.outputs, self.inputs);
        let mut y = x.matmul(&weight, size, &rows, &weight_layout.transpose(0, 1)?)?;
        if let Some(bias) = bias {
            let (bias, layout) = widened(bias)?;
            let range = layout.start_offset()..layout.start_offset() + self.outputs;
            match (&mut y, bias.as_ref()) {
                (CpuStorage::F32(y), CpuStorage::F32(bias)) => add_to_rows(y, &bias[range]),
                (CpuStorage::F64(y), CpuStorage::F64(bias)) => add_to_rows(y, &bias[range]),
                (y, bias) => candle_core::bail!(
                    "projection: expected a bias of the weight's dtype {:?}, got {:?}",
                    y.dtype(),
                    bias.dtype()
                ),
            }
        }
        if y.dtype() != dtype {
            y = y.to_dtype(&Layout::contiguous((self.rows, self.outputs)), dtype)?;
        }
        Ok((y, self.shape.clone()))
    }

    /// The gradients of x and W, each only if it is needed. `grad` is the gradient of the result by rows, in the dtype to
    /// compute in.
    fn gradients(&self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (like_x, like_weight) = ([self.rows, self.inputs], [self.outputs, self.inputs]);
        let bytes = product_memory(&[like_x, like_weight], &[like_x, like_weight], x.dtype());
        memory::ask("gradients of a projection", grad.device(), bytes)?;
        let wide = |x: &Tensor| x.detach().to_dtype(grad.dtype());
        let grad_x = || grad.matmul(&wide(weight)?)?.reshape(x.shape())?.to_dtype(x.dtype());
        let grad_weight = || grad.t()?.matmul(&wide(x)?.reshape((self.rows, self.inputs))?)?.to_dtype(weight.dtype());
        Ok((x.track_op().then(grad_x).transpose()?, weight.track_op().then(grad_weight).transpose()?))
    }

    fn rows_of(&self, grad: &Tensor) -> Result<Tensor> {
        let wide = memory::cast("gradient of a projection", &grad.detach(), compute_dtype(grad.dtype()))?;
        memory::contiguous("gradient of a projection", &wide)?.reshape((self.rows, self.outputs))
    }
}

impl CustomOp2 for Projection {
    fn name(&self) -> &'static str {
        "projection"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward((s1, l1), (s2, l2), None)
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
        self.forward((s1, l1), (s2, l2), Some((s3, l3)))
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
            // A product with ones is many times as fast as candle's sum over rows.
            let ones = Tensor::ones((1, self.rows), grad.dtype(), grad.device())?;
            ones.matmul(&grad)?.reshape(bias.shape())?.to_dtype(bias.dtype())
        };
        let (grad_x, grad_weight) = self.gradients(x, weight, &grad)?;
        Ok((grad_x, grad_weight, bias.track_op().then(grad_bias).transpose()?))
    }
}

/// A tensor in the dtype to compute in. Half types are copied.
fn widened<'a>((storage, layout): Operand<'a>) -> Result<(Cow<'a, CpuStorage>, Layout)> {
    let compute = compute_dtype(storage.dtype());
    if storage.dtype() == compute {
        return Ok((Cow::Borrowed(storage), layout.clone()));
    }
    Ok((Cow::Owned(storage.to_dtype(layout, compute)?), Layout::contiguous(layout.shape())))
}

fn add_to_rows<T: WithDType>(y: &mut [T], bias: &[T]) {
    for row in y.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(y, bias)| *y += *bias);
    }
}
