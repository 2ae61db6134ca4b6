//! x·Wᵀ + b, with an adapter's low-rank product or without, as one operation with a gradient, for any number of axes of the
//! input and of the output.
//!
//! candle's `Linear` needs six operations for this. Each has a gradient that is zeroed, added and kept. The gradient of
//! the bias is summed number by number, and x gets a gradient even if none is needed. Together that takes more than
//! half of the training time of a small layer.
//!
//! On the CPU the products are those of `attention-kernels`, in which half types are multiplied, added and summed in f32. candle's f16
//! product of a single row has ten times the error of a rounding to f16.

use candle_core::{Result, Shape, Tensor};

use crate::block::dropout::drop_out;
use crate::block::op::Dtype;
use crate::block::operand::{Columns, LayerGradients};
use crate::block::relay::{self, Layer};
use crate::check::compute_dtype;
use crate::empty::connected;
use crate::memory;
use crate::projection::low_rank::LowRank;
use crate::projection::side_by_side::{Adapted, SideBySide};

/// Projects x to a tensor of the given shape. The last axes of x together hold the inputs of the projection, and the
/// last axes of the result together hold its outputs.
pub(crate) fn project(adapted: Adapted, x: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (outputs, inputs) = adapted.linear.weight().dims2()?;
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
        return project_with_candle(&adapted, &x.reshape((rows, inputs))?)?.reshape(shape);
    }
    let linear = SideBySide::new([adapted])?;
    let parameters: Vec<_> = linear.parameters().collect();
    relay::apply(Projection { linear, outputs, shape: Shape::from(shape) }, &x, &parameters)
}

/// The projection by candle's own operations, which run on every device.
fn project_with_candle(adapted: &Adapted, rows: &Tensor) -> Result<Tensor> {
    let Adapted { linear, quantised, low_rank, dropout } = adapted;
    // candle's matmul on CUDA refuses a matrix with gaps between its rows.
    let product = |x: &Tensor, weight: &Tensor| x.matmul(&weight.contiguous()?.t()?);
    let y = match quantised {
        Some(quantised) => product(rows, &quantised.dequantise(rows.dtype(), rows.device())?)?,
        None => product(rows, linear.weight())?,
    };
    let y = with_bias(y, linear.bias())?;
    let Some(LowRank { a, b, scale, .. }) = low_rank else { return Ok(y) };
    let dropped = match *dropout {
        Some(dropout) => drop_out(rows, dropout)?,
        None => rows.clone(),
    };
    y + (product(&product(&dropped, a)?, b)? * *scale)?
}

/// y + bias, (..., out), by candle's own operations.
pub(super) fn with_bias(y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
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
    linear: SideBySide,
    outputs: usize,
    shape: Shape,
}

impl Layer for Projection {
    const NAME: &'static str = "projection";

    fn forward<E: Dtype>(&self, x: &[E], _: &[usize]) -> Result<(Vec<E>, Shape)> {
        Ok((self.linear.forward(x, &self.linear.reduce(x)?, None)?, self.shape.clone()))
    }

    fn backward<E: Dtype>(&self, x: &[E], _: &[usize], grad: &[E], wants_x: bool) -> Result<LayerGradients<E>> {
        self.linear.backward(x, &self.linear.reduce(x)?, &[Columns::all(grad, self.outputs)], wants_x)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use attention_kernels::Dropout;
    use attention_kernels::quantised::Format;
    use candle_core::{DType, Device, Var};
    use candle_nn::Linear;

    use super::*;
    use crate::projection::quantised::{Quantised, placeholder};

    /// What other devices compute is what the kernels compute, with an adapter, its dropout and quantised weights.
    #[test]
    fn both_ways_of_a_projection_give_the_same() -> crate::error::Result<()> {
        let device = &Device::Cpu;
        let randn = |shape: [usize; 2]| Tensor::randn(0f64, 1.0, &shape[..], device);
        for (rows, format, p) in
            [(1, None, 0.0), (7, None, 0.3), (7, Some(Format::Q4_0), 0.0), (50, Some(Format::Nf4), 0.3)]
        {
            let [x, weight, a, b] =
                [[rows, 64], [5, 64], [3, 64], [5, 3]].map(|shape| Var::from_tensor(&randn(shape)?));
            let (x, weight, a, b) = (x?, weight?.detach(), a?, b?);
            let quantised = format.map(|format| Quantised::of("weight", &weight, format)).transpose()?.map(Arc::new);
            let weight = if quantised.is_some() { placeholder(&[5, 64], DType::F64, device)? } else { weight };
            let low_rank = LowRank { a: a.as_tensor().clone(), b: b.as_tensor().clone(), scale: 1.5, input: None };
            let adapted = Adapted {
                linear: Linear::new(weight, Some(randn([1, 5])?.squeeze(0)?)),
                quantised,
                low_rank: Some(low_rank),
                dropout: (p > 0.0).then_some(Dropout { p, seed: 7, first: 3 }),
            };
            let by_candle = project_with_candle(&adapted, &x)?;
            let by_kernels = project(adapted, &x, &[rows, 5])?;
            let close = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.max_all()?.to_scalar::<f64>().map(|x| x < 1e-11);
            assert!(close(&by_kernels, &by_candle)?, "{rows} rows, {format:?}, p {p}");
            let c = randn([rows, 5])?;
            let [of_kernels, of_candle] = [by_kernels, by_candle].map(|y| (y * &c)?.backward());
            let (of_kernels, of_candle) = (of_kernels?, of_candle?);
            for var in [&x, &a, &b] {
                let [of_kernels, of_candle] =
                    [&of_kernels, &of_candle].map(|grads| grads.get(var).expect("a gradient"));
                assert!(close(of_kernels, of_candle)?, "gradients: {rows} rows, {format:?}, p {p}");
            }
        }
        Ok(())
    }
}
