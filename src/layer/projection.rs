//! x·Wᵀ + b as one operation with a gradient, for any number of axes of the input and of the output.
//!
//! candle's `Linear` needs six operations for this. Each has a gradient that is zeroed, added and kept. The gradient of
//! the bias is summed number by number, and x gets a gradient even if none is needed. Together that takes more than
//! half of the training time of a small layer.
//!
//! On the CPU the products are those of `attention-kernels`, in which half types are multiplied, added and summed in f32. candle's f16
//! product of a single row has ten times the error of a rounding to f16.

use attention_kernels::matmul::{Operand, Plain, matmul};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use candle_nn::Linear;

use crate::block::epilogue::Add;
use crate::block::op::{Dtype, with_dtype};
use crate::block::operand::{Columns, Reading, checked, linear_gradients, rows, tensor};
use crate::check::compute_dtype;
use crate::empty::connected;
use crate::gradient::to_be_added;
use crate::memory;

/// Projects x to a tensor of the given shape. The last axes of x together hold the inputs of the projection, and the
/// last axes of the result together hold its outputs.
pub(crate) fn project(linear: &Linear, x: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (outputs, inputs) = linear.weight().dims2()?;
    let x = memory::contiguous("input of a projection", x)?;
    let rows =
        shape.iter().fold(1, |product: usize, &dim| product.saturating_mul(dim)).checked_div(outputs).unwrap_or(0);
    if !x.device().is_cpu() || rows == 0 || inputs == 0 {
        let dims = [[rows, outputs], [rows, inputs], [outputs, inputs]];
        memory::ask(
            "result of a projection",
            x.device(),
            memory::sum(dims.map(|dims| memory::bytes(&dims, x.dtype()))),
        )?;
        return project_with_candle(linear, &x.reshape((rows, inputs))?)?.reshape(shape);
    }
    let op = Projection { inputs, outputs, shape: Shape::from(shape) };
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
        // The gradient of the bias is a sum over rows. candle sums in the dtype of the addition.
        Some(bias) => {
            let (dtype, compute) = (y.dtype(), compute_dtype(y.dtype()));
            y.to_dtype(compute)?.broadcast_add(&bias.to_dtype(compute)?)?.to_dtype(dtype)
        }
    }
}

struct Projection {
    inputs: usize,
    outputs: usize,
    shape: Shape,
}

/// A tensor on the CPU, as candle gives it to an operation.
type Argument<'a> = (&'a CpuStorage, &'a Layout);

impl Projection {
    fn forward<E: Dtype>(&self, x: Argument, weight: Argument, bias: Option<Argument>) -> Result<(CpuStorage, Shape)> {
        let x = rows("input of a projection", contiguous::<E>(x)?, self.inputs)?;
        let (numbers, layout) = (weight.0.as_slice::<E>()?, weight.1);
        let strides = [layout.stride()[0], layout.stride()[1]];
        let weight = Operand::new("weight", &numbers[layout.start_offset()..], [self.outputs, self.inputs], strides);
        let bias = bias.map(contiguous::<E>).transpose()?;
        let add = Add { bias, rows: None, columns: self.outputs };
        let y = checked(matmul(x, checked(weight)?.transposed(), &add))?;
        Ok((E::to_cpu_storage_owned(y), self.shape.clone()))
    }

    /// The gradients of x and of the parameters, each only if it is needed.
    fn backward<E: Dtype>(&self, x: &Tensor, linear: &Linear, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let grad = memory::contiguous("gradient of a projection", &grad.detach())?;
        let detached = x.detach();
        let (x_read, grad_read) = (Reading::new(&detached), Reading::new(&grad));
        let (numbers, grad) = (x_read.numbers::<E>()?, grad_read.numbers::<E>()?);
        let of_x = || {
            let weight = Reading::new(linear.weight());
            let grad = rows("gradient of a projection", grad, self.outputs)?;
            tensor(checked(matmul(grad, weight.matrix::<E>("weight")?, &Plain))?, x.shape())
        };
        let mut gradients = vec![x.track_op().then(of_x).transpose()?];
        gradients.extend(linear_gradients(linear, Columns::all(grad, self.outputs), numbers)?);
        Ok(gradients)
    }
}

/// The numbers of a contiguous tensor.
fn contiguous<'a, E: Dtype>((storage, layout): Argument<'a>) -> Result<&'a [E]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<E>()?[start..end]),
        None => bail!("projection: expected a contiguous tensor, got strides {:?}", layout.stride()),
    }
}

impl CustomOp2 for Projection {
    fn name(&self) -> &'static str {
        "projection"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        with_dtype!(s1.dtype(), E => self.forward::<E>((s1, l1), (s2, l2), None))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let linear = Linear::new(weight.clone(), None);
        let mut gradients = with_dtype!(x.dtype(), E => self.backward::<E>(x, &linear, grad))?.into_iter();
        let mut next = || gradients.next().flatten().map(to_be_added).transpose();
        Ok((next()?, next()?))
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
        with_dtype!(s1.dtype(), E => self.forward::<E>((s1, l1), (s2, l2), Some((s3, l3))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let linear = Linear::new(weight.clone(), Some(bias.clone()));
        let mut gradients = with_dtype!(x.dtype(), E => self.backward::<E>(x, &linear, grad))?.into_iter();
        let mut next = || gradients.next().flatten().map(to_be_added).transpose();
        Ok((next()?, next()?, next()?))
    }
}
