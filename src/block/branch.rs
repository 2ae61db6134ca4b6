//! What stands around attention or an MLP in a block: x + dropout(f(norm(x))).

use std::borrow::Cow;

use attention_kernels::Dropout;
use attention_kernels::residual::{add_dropped, dropped_gradient};
use candle_core::{Result, Tensor};

use crate::block::dropout::{add_dropped_out, drop_out};
use crate::block::norm_layer::Norm;
use crate::block::op::Dtype;
use crate::block::operand::{LayerGradients, checked};

/// What a layer does beside its own work, in the same operation. By default nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Branch<'a> {
    /// The norm before the layer.
    pub(crate) norm: Option<&'a Norm>,
    /// Dropout of the layer's output.
    pub(crate) dropout: Option<Dropout>,
    /// Whether the layer's input is added to its output.
    pub(crate) residual: bool,
    /// Whether the backward pass computes the forward pass again, so that nothing but the input is kept.
    pub(crate) recompute: bool,
}

/// [`Branch`] inside an operation, which outlives the call.
#[derive(Clone, Debug)]
pub(crate) struct OwnBranch {
    pub(crate) norm: Option<Norm>,
    pub(crate) dropout: Option<Dropout>,
    pub(crate) residual: bool,
    pub(crate) recompute: bool,
}

impl Branch<'_> {
    pub(crate) fn to_owned(self) -> OwnBranch {
        let Self { norm, dropout, residual, recompute } = self;
        OwnBranch { norm: norm.cloned(), dropout, residual, recompute }
    }

    /// The result from the layer's output, by operations of their own.
    pub(crate) fn finish(self, x: &Tensor, output: Tensor) -> crate::error::Result<Tensor> {
        match (self.dropout, self.residual) {
            (None, false) => Ok(output),
            (None, true) => add_dropped_out(x, &output, Dropout::default()),
            (Some(dropout), true) => add_dropped_out(x, &output, dropout),
            (Some(dropout), false) => drop_out(&output, dropout),
        }
    }
}

impl OwnBranch {
    /// What goes into the layer.
    pub(crate) fn input<'x, E: Dtype>(&self, x: &'x [E]) -> Result<Cow<'x, [E]>> {
        match &self.norm {
            Some(norm) => Ok(Cow::Owned(norm.read().forward(x)?)),
            None => Ok(Cow::Borrowed(x)),
        }
    }

    /// The residual that the last product adds, if no dropout stands between them.
    pub(crate) fn residual_of_product<'x, E>(&self, x: &'x [E]) -> Option<&'x [E]> {
        (self.residual && self.dropout.is_none()).then_some(x)
    }

    /// The result from the layer's output, which already has the residual if there is no dropout.
    pub(crate) fn output<E: Dtype>(&self, x: &[E], output: Vec<E>) -> Result<Vec<E>> {
        match self.dropout {
            None => Ok(output),
            dropout => checked(add_dropped(self.residual.then_some(x), &output, dropout)),
        }
    }

    /// The gradient of the layer's output from that of the result.
    pub(crate) fn gradient_of_output<'g, E: Dtype>(&self, grad: &'g [E]) -> Result<Cow<'g, [E]>> {
        match self.dropout {
            None => Ok(Cow::Borrowed(grad)),
            dropout => Ok(Cow::Owned(checked(dropped_gradient(grad, dropout))?)),
        }
    }

    /// Whether a parameter of the norm wants a gradient, which takes that of the layer's input.
    pub(crate) fn wants_input(&self) -> bool {
        self.norm.iter().flat_map(Norm::parameters).any(|parameter| parameter.track_op())
    }

    /// The gradient of x from that of the layer's input, and those of the norm's parameters; none where that of the input wasn't wanted.
    /// `grad` is the gradient of the result.
    pub(crate) fn gradient_of_x<E: Dtype>(
        &self,
        x: &[E],
        of_input: Option<Vec<E>>,
        grad: &[E],
    ) -> Result<LayerGradients<E>> {
        let Some(of_input) = of_input else {
            return Ok((None, self.norm.iter().flat_map(Norm::parameters).map(|_| None).collect()));
        };
        let residual = self.residual.then_some(grad);
        let (of_x, of_norm) = match &self.norm {
            Some(norm) => norm.read().backward(x, &of_input, residual)?,
            None if self.residual => (checked(add_dropped(Some(grad), &of_input, None))?, vec![]),
            None => (of_input, vec![]),
        };
        Ok((Some(of_x), of_norm))
    }
}
