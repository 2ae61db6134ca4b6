//! y + b as an operation of its own, for a bias that is added to a sum over ranks.

use candle_core::{Result, Shape, Tensor};

use crate::block::op::Dtype;
use crate::block::operand::{Columns, LayerGradients, Reading, checked, tensor};
use crate::block::relay::{self, Layer};
use crate::memory;
use crate::projection::op::with_bias;

/// y + bias, (..., out).
pub(crate) fn add_bias(y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) if y.device().is_cpu() && y.elem_count() > 0 => {
            let bias = memory::contiguous("bias", bias)?;
            // Sums in f32, which are rounded once.
            memory::ask_for("sum with a bias", 2, &y, crate::check::compute_dtype(y.dtype()))?;
            relay::apply(AddBias(bias.clone()), &y, &[bias])
        }
        bias => with_bias(y, bias),
    }
}

struct AddBias(Tensor);

impl Layer for AddBias {
    const NAME: &'static str = "bias";

    fn forward<E: Dtype>(&self, y: &[E], dims: &[usize]) -> Result<(Vec<E>, Shape)> {
        let reading = Reading::new(&self.0);
        let bias = reading.numbers::<E>()?;
        let sums = y.iter().zip(bias.iter().cycle()).map(|(y, b)| y.widen() + b.widen()).collect();
        Ok((checked(E::from_floats("sum with a bias", sums))?, Shape::from(dims)))
    }

    fn backward<E: Dtype>(&self, _: &[E], _: &[usize], grad: &[E], wants_y: bool) -> Result<LayerGradients<E>> {
        let of_bias = || {
            let sums = Columns::all(grad, self.0.elem_count()).sums()?;
            tensor(checked(E::from_floats("gradient of a bias", sums))?, self.0.shape())
        };
        let of_bias = self.0.track_op().then(of_bias).transpose()?;
        Ok((wants_y.then(|| grad.to_vec()), vec![of_bias]))
    }
}
