//! The MLP of a block as one operation with a gradient, on the CPU: down(f(up(x))) or down(f(gate(x)) · up(x)), with what stands
//! around it in a block.

use std::any::Any;
use std::borrow::Cow;
use std::sync::OnceLock;

use attention_kernels::activation::Activation as Kernel;
use attention_kernels::matmul::{Plain, matmul, matmul_side_by_side, matmul_sum};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use candle_nn::Linear;

use crate::block::branch::OwnBranch;
use crate::block::epilogue::Add;
use crate::block::op::{Dtype, with_dtype};
use crate::block::operand::{
    Columns, ReadLinear, Reading, checked, linear_gradients, rows, tensor, with_contiguous_bias,
};
use crate::block::relay::{Gradients, relay};
use crate::gradient::to_be_added;
use crate::memory;

/// One call of an MLP.
pub(super) struct FusedMlp {
    pub(super) activation: Kernel,
    pub(super) gate: Option<Linear>,
    pub(super) up: Linear,
    pub(super) down: Linear,
    pub(super) branch: OwnBranch,
}

impl FusedMlp {
    /// The output for x (..., dim).
    pub(super) fn forward(mut self, x: &Tensor) -> Result<Tensor> {
        let x = memory::contiguous("input of an MLP", x)?;
        for linear in self.gate.iter_mut().chain([&mut self.up, &mut self.down]) {
            *linear = with_contiguous_bias(linear)?;
        }
        let parameters = self.parameters();
        let keeps = !self.branch.recompute && (x.track_op() || parameters.iter().any(Tensor::track_op));
        let (relay, gradients) = relay(&parameters)?;
        x.apply_op2(&relay, Op { mlp: self, keeps, kept: OnceLock::new(), gradients })
    }

    /// The products that read the input: gate and up, or up alone.
    fn inner(&self) -> Vec<&Linear> {
        self.gate.iter().chain([&self.up]).collect()
    }

    /// Every parameter, in the order of [`Op::backward`].
    fn parameters(&self) -> Vec<Tensor> {
        let linears = self.inner().into_iter().chain([&self.down]);
        let linears = linears.flat_map(|linear| std::iter::once(linear.weight()).chain(linear.bias())).cloned();
        self.branch.norm.iter().flat_map(|norm| norm.parameters()).chain(linears).collect()
    }
}

/// What the backward pass needs.
struct Kept<E: Dtype> {
    /// What the products read, if it isn't x itself.
    normed: Option<Vec<E>>,
    /// (rows, hidden), or gate and up side by side, before the activation.
    hidden: Vec<E>,
    /// (rows, hidden), what the last product reads.
    activated: Vec<E>,
}

struct Op {
    mlp: FusedMlp,
    keeps: bool,
    /// The [`Kept`] of the call's type.
    kept: OnceLock<Box<dyn Any + Send + Sync>>,
    gradients: Gradients,
}

impl Op {
    /// Everything before the last product.
    fn hidden<E: Dtype>(&self, x: &[E]) -> Result<Kept<E>> {
        let mlp = &self.mlp;
        let normed = mlp.branch.input(x)?;
        let (hidden_dim, dim) = mlp.up.weight().dims2()?;
        let read: Vec<_> = mlp.inner().into_iter().map(ReadLinear::new).collect();
        let weights = read.iter().map(|linear| Ok(linear.weight::<E>()?.transposed())).collect::<Result<Vec<_>>>()?;
        let bias = match read.iter().map(ReadLinear::bias::<E>).collect::<Result<Vec<_>>>()?[..] {
            [Some(bias)] => Some(Cow::Borrowed(bias)),
            [Some(gate), Some(up)] => Some(Cow::Owned([gate, up].concat())),
            _ => None,
        };
        let add = Add { bias: bias.as_deref(), rows: None, columns: hidden_dim * read.len() };
        let hidden = checked(matmul_side_by_side(rows("input of an MLP", &normed, dim)?, &weights, &add))?;
        let activated = checked(match mlp.gate {
            Some(_) => mlp.activation.gated_rows_forward(normed.len() / dim, hidden_dim, &hidden),
            None => mlp.activation.forward(&hidden),
        })?;
        let normed = match normed {
            Cow::Owned(normed) => Some(normed),
            Cow::Borrowed(_) => None,
        };
        Ok(Kept { normed, hidden, activated })
    }

    fn forward<E: Dtype>(&self, (storage, layout): (&CpuStorage, &Layout)) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("mlp: expected a contiguous input, got strides {:?}", layout.stride());
        };
        let x = &storage.as_slice::<E>()?[start..end];
        let kept = self.hidden(x)?;
        let (down, branch) = (&self.mlp.down, &self.mlp.branch);
        let (columns, hidden_dim) = down.weight().dims2()?;
        let read = ReadLinear::new(down);
        let add = Add { bias: read.bias()?, rows: branch.residual_of_product(x), columns };
        let weight = read.weight::<E>()?.transposed();
        let product = checked(matmul(rows("hidden", &kept.activated, hidden_dim)?, weight, &add))?;
        let output = branch.output(x, product)?;
        if self.keeps {
            // The cell is empty, since an operation serves only one call.
            let _ = self.kept.set(Box::new(kept));
        }
        Ok((E::to_cpu_storage_owned(output), layout.shape().clone()))
    }

    /// The gradient of x. The parameters' gradients are left to the relay.
    fn backward<E: Dtype>(&self, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let (x_read, grad_read) = (Reading::new(x), Reading::new(grad));
        let (numbers, grad) = (x_read.numbers::<E>()?, grad_read.numbers::<E>()?);
        let again;
        let kept = match self.kept.get().and_then(|kept| kept.downcast_ref::<Kept<E>>()) {
            Some(kept) => kept,
            None => {
                again = self.hidden(numbers)?;
                &again
            }
        };
        let (mlp, branch) = (&self.mlp, &self.mlp.branch);
        let of_output = branch.gradient_of_output(grad)?;
        let of_down =
            linear_gradients(&mlp.down, Columns::all(&of_output, mlp.down.weight().dim(0)?), &kept.activated)?;
        let of_inner = self.gradients_of_inner(kept, &of_output)?;
        let normed = kept.normed.as_deref().unwrap_or(numbers);
        let (inner, hidden_dim) = (mlp.inner(), mlp.up.weight().dim(0)?);
        let read: Vec<_> = inner.iter().map(|linear| ReadLinear::new(linear)).collect();
        let (mut of_linears, mut pairs) = (Vec::new(), Vec::new());
        for (n, (linear, read)) in inner.iter().zip(&read).enumerate() {
            let grad = Columns::part(&of_inner, hidden_dim, inner.len(), n);
            of_linears.extend(linear_gradients(linear, grad, normed)?);
            pairs.push((grad.operand()?, read.weight::<E>()?));
        }
        let of_normed = checked(matmul_sum(&pairs, &Plain))?;
        let (of_x, mut gradients) = branch.gradient_of_x(numbers, of_normed, grad)?;
        gradients.extend(of_linears);
        gradients.extend(of_down);
        self.gradients.leave(gradients);
        tensor(of_x, x.shape())
    }

    /// The gradients of what the inner products gave, side by side.
    fn gradients_of_inner<E: Dtype>(&self, kept: &Kept<E>, of_output: &[E]) -> Result<Vec<E>> {
        let (columns, hidden_dim) = self.mlp.down.weight().dims2()?;
        let read = ReadLinear::new(&self.mlp.down);
        let of_activated = checked(matmul(rows("gradient", of_output, columns)?, read.weight::<E>()?, &Plain))?;
        checked(match self.mlp.gate {
            None => self.mlp.activation.backward(&kept.hidden, &of_activated),
            Some(_) => self.mlp.activation.gated_rows_backward(
                of_output.len() / columns,
                hidden_dim,
                &kept.hidden,
                &of_activated,
            ),
        })
    }
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "mlp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        with_dtype!(x.dtype(), E => self.forward::<E>((x, layout)))
    }

    fn bwd(&self, x: &Tensor, relay: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = memory::contiguous("gradient of an MLP", &grad.detach())?;
        let detached = x.detach();
        let of_x = with_dtype!(x.dtype(), E => self.backward::<E>(&detached, &grad))?;
        // It goes nowhere if the input is a constant.
        let of_relay = relay.track_op().then(|| relay.zeros_like()).transpose()?;
        Ok((x.track_op().then(|| to_be_added(of_x)).transpose()?, of_relay))
    }
}
