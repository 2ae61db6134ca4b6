//! The MLP of a block as one operation with a gradient, on the CPU: down(f(up(x))) or down(f(gate(x)) · up(x)), with what stands
//! around it in a block.

use std::any::Any;
use std::borrow::Cow;
use std::sync::OnceLock;

use attention_kernels::activation::Activation as Kernel;
use candle_core::{Result, Shape, Tensor};

use crate::block::branch::OwnBranch;
use crate::block::op::Dtype;
use crate::block::operand::{Columns, LayerGradients, checked};
use crate::block::relay::{self, Layer};
use crate::projection::{Reduced, SideBySide};

/// One call of an MLP.
pub(super) struct FusedMlp {
    pub(super) activation: Kernel,
    /// Gate and up, or up alone.
    pub(super) inner: SideBySide,
    pub(super) is_gated: bool,
    pub(super) down: SideBySide,
    /// The sizes of a token and between the products.
    pub(super) embed_dim: usize,
    pub(super) hidden_dim: usize,
    pub(super) branch: OwnBranch,
}

impl FusedMlp {
    /// The output for x (..., dim).
    pub(super) fn forward(self, x: &Tensor) -> Result<Tensor> {
        let parameters = self.parameters();
        let keeps = !self.branch.recompute && (x.track_op() || parameters.iter().any(Tensor::track_op));
        relay::apply(Op { mlp: self, keeps, kept: OnceLock::new() }, x, &parameters)
    }

    /// Every parameter, in the order of its gradients.
    fn parameters(&self) -> Vec<Tensor> {
        let linears = [&self.inner, &self.down].into_iter().flat_map(SideBySide::parameters);
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
    /// What the adapters of the products made of their inputs.
    reduced: Reduced<E>,
    down_reduced: Reduced<E>,
}

struct Op {
    mlp: FusedMlp,
    keeps: bool,
    /// The [`Kept`] of the call's type.
    kept: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl Op {
    /// Everything before the last product.
    fn hidden<E: Dtype>(&self, x: &[E]) -> Result<Kept<E>> {
        let mlp = &self.mlp;
        let normed = mlp.branch.input(x)?;
        let reduced = mlp.inner.reduce(&normed)?;
        let hidden = mlp.inner.forward(&normed, &reduced, None)?;
        let activated = checked(match mlp.is_gated {
            true => mlp.activation.gated_rows_forward(normed.len() / mlp.embed_dim, mlp.hidden_dim, &hidden),
            false => mlp.activation.forward(&hidden),
        })?;
        let down_reduced = mlp.down.reduce(&activated)?;
        let normed = match normed {
            Cow::Owned(normed) => Some(normed),
            Cow::Borrowed(_) => None,
        };
        Ok(Kept { normed, hidden, activated, reduced, down_reduced })
    }

    /// The gradient of what the activation reads. That of its result is large, and goes here.
    fn gradient_of_hidden<E: Dtype>(&self, rows: usize, hidden: &[E], mut of_activated: Vec<E>) -> Result<Vec<E>> {
        let FusedMlp { activation, is_gated, hidden_dim, .. } = &self.mlp;
        if *is_gated {
            return checked(activation.gated_rows_backward(rows, *hidden_dim, hidden, &of_activated));
        }
        checked(activation.backward_in_place(hidden, &mut of_activated))?;
        Ok(of_activated)
    }
}

impl Layer for Op {
    const NAME: &'static str = "mlp";

    fn forward<E: Dtype>(&self, x: &[E], dims: &[usize]) -> Result<(Vec<E>, Shape)> {
        let kept = self.hidden(x)?;
        let (down, branch) = (&self.mlp.down, &self.mlp.branch);
        let product = down.forward(&kept.activated, &kept.down_reduced, branch.residual_of_product(x))?;
        let output = branch.output(x, product)?;
        if self.keeps {
            // The cell is empty, since an operation serves only one call.
            let _ = self.kept.set(Box::new(kept));
        }
        Ok((output, Shape::from(dims)))
    }

    fn backward<E: Dtype>(&self, x: &[E], _: &[usize], grad: &[E], wants_x: bool) -> Result<LayerGradients<E>> {
        let again;
        let kept = match self.kept.get().and_then(|kept| kept.downcast_ref::<Kept<E>>()) {
            Some(kept) => kept,
            None => {
                again = self.hidden(x)?;
                &again
            }
        };
        let FusedMlp { inner, is_gated, down, embed_dim, hidden_dim, branch, .. } = &self.mlp;
        let of_output = branch.gradient_of_output(grad)?;
        let grads = [Columns::all(&of_output, *embed_dim)];
        let (of_activated, of_down) = down.backward(&kept.activated, &kept.down_reduced, &grads, true)?;
        let rows = of_output.len() / embed_dim;
        let of_hidden = self.gradient_of_hidden(rows, &kept.hidden, of_activated.unwrap_or_default())?;
        let parts = 1 + usize::from(*is_gated);
        let grads: Vec<_> = (0..parts).map(|n| Columns::part(&of_hidden, *hidden_dim, parts, n)).collect();
        let wants_input = wants_x || branch.wants_input();
        let normed = kept.normed.as_deref().unwrap_or(x);
        let (of_input, of_inner) = inner.backward(normed, &kept.reduced, &grads, wants_input)?;
        let (of_x, mut gradients) = branch.gradient_of_x(x, of_input, grad)?;
        gradients.extend(of_inner);
        gradients.extend(of_down);
        Ok((of_x, gradients))
    }
}
