//! [`forward`] and [`backward`], compiled in this package for each type that tensors can hold.

mod backward;
mod forward;

use half::{bf16, f16};

use crate::dtype::Number;
use crate::error::Error;
use crate::layout::Layout;
use crate::problem::{Problem, View};
use crate::softmax::LogSumExp;

/// What the forward pass gives.
#[derive(Clone, Debug)]
pub struct Output<E: Number> {
    /// (batch, num_heads, q_len, value_dim), in the order in memory that was asked for.
    pub context: Vec<E>,
    /// (batch, num_heads, q_len)
    pub logsumexp: Vec<LogSumExp<E::Float>>,
}

/// What the backward pass needs of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a, E: Number> {
    /// (batch, num_heads, q_len, value_dim)
    pub context: View<'a, E>,
    /// (batch, num_heads, q_len)
    pub logsumexp: &'a [LogSumExp<E::Float>],
}

/// The gradients of what the forward pass gave.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<'a, E: Number> {
    /// (batch, num_heads, q_len, value_dim)
    pub context: View<'a, E>,
    /// (batch, num_heads, q_len); none is zero.
    pub logsumexp: Option<&'a [E::Float]>,
}

/// What the backward pass is to give.
#[derive(Clone, Copy, Debug, Default)]
pub struct BackwardOptions {
    /// The order in memory of the gradients of query, key and value.
    pub layout: Layout,
    /// Whether the gradient of the bias is wanted.
    pub bias: bool,
}

/// What the backward pass gives.
#[derive(Clone, Debug)]
pub struct Gradients<E: Number> {
    /// (batch, num_heads, q_len, head_dim)
    pub q: Vec<E>,
    /// (batch, num_kv_heads, kv_len, head_dim)
    pub k: Vec<E>,
    /// (batch, num_kv_heads, kv_len, value_dim)
    pub v: Vec<E>,
    /// The bias's own four axes, row by row, if it was wanted.
    pub bias: Option<Vec<E::Float>>,
}

mod sealed {
    use super::*;

    /// The passes as functions that aren't generic, so that this package holds their code.
    pub trait Passes: Number {
        fn forward(problem: &Problem<Self>, layout: Layout) -> Result<Output<Self>, Error>;
        fn backward(
            problem: &Problem<Self>,
            saved: Saved<Self>,
            incoming: Incoming<Self>,
            options: BackwardOptions,
        ) -> Result<Gradients<Self>, Error>;
        fn forward_wide(problem: &Problem<Self>, layout: Layout) -> Result<Output<Self::Float>, Error>;
        fn backward_wide(
            problem: &Problem<Self>,
            saved: Saved<Self>,
            incoming: Incoming<Self>,
            options: BackwardOptions,
        ) -> Result<Gradients<Self::Float>, Error>;
    }
}

/// A type of number that attention can be computed of: f16, bf16, f32 or f64.
pub trait Element: Number + sealed::Passes {}

macro_rules! element {
    ($($element:ty),*) => {$(
        impl Element for $element {}

        impl sealed::Passes for $element {
            #[inline(never)]
            fn forward(problem: &Problem<Self>, layout: Layout) -> Result<Output<Self>, Error> {
                forward::forward(problem, layout)
            }
            #[inline(never)]
            fn backward(
                problem: &Problem<Self>,
                saved: Saved<Self>,
                incoming: Incoming<Self>,
                options: BackwardOptions,
            ) -> Result<Gradients<Self>, Error> {
                backward::backward(problem, saved, incoming, options)
            }
            #[inline(never)]
            fn forward_wide(problem: &Problem<Self>, layout: Layout) -> Result<Output<Self::Float>, Error> {
                forward::forward(problem, layout)
            }
            #[inline(never)]
            fn backward_wide(
                problem: &Problem<Self>,
                saved: Saved<Self>,
                incoming: Incoming<Self>,
                options: BackwardOptions,
            ) -> Result<Gradients<Self::Float>, Error> {
                backward::backward(problem, saved, incoming, options)
            }
        }
    )*};
}

element!(f16, bf16, f32, f64);

/// Context and log-sum-exp.
///
/// context = softmax(mask(softcap(scale · q · kᵀ) + bias)) · v, with dropout on the weights. A query that may attend to nothing
/// gets a zero context. What the mask hides may hold anything, NaN included.
///
/// # Shapes
///
/// Those of [`Problem::new`]; the context is (batch, num_heads, q_len, value_dim), its order in memory `layout`.
///
/// # Errors
///
/// [`Error::Memory`] if the results or what a task keeps don't fit into memory.
pub fn forward<E: Element>(problem: &Problem<E>, layout: Layout) -> Result<Output<E>, Error> {
    E::forward(problem, layout)
}

/// As [`forward`], in the type that is computed in. Results over parts of the keys are merged before they are narrowed, so that several
/// parts are rounded as often as one.
///
/// # Errors
///
/// Those of [`forward`].
pub fn forward_wide<E: Element>(problem: &Problem<E>, layout: Layout) -> Result<Output<E::Float>, Error> {
    E::forward_wide(problem, layout)
}

/// Gradients of query, key, value and, if wanted, the bias.
///
/// # Shapes
///
/// Each gradient has the shape of its tensor.
///
/// # Errors
///
/// [`Error::Dims`] for a context or gradient of another shape than [`Problem::context_dims`], [`Error::Length`] for a log-sum-exp or its
/// gradient of another length than batch · num_heads · q_len, [`Error::Option`] if the gradient of a bias is wanted and there is no bias, or
/// the problem is a [`Part`](crate::Part), and [`Error::Memory`].
pub fn backward<E: Element>(
    problem: &Problem<E>,
    saved: Saved<E>,
    incoming: Incoming<E>,
    options: BackwardOptions,
) -> Result<Gradients<E>, Error> {
    E::backward(problem, saved, incoming, options)
}

/// As [`backward`], in the type that is computed in: gradients from parts are added up before they are narrowed.
///
/// # Errors
///
/// Those of [`backward`].
pub fn backward_wide<E: Element>(
    problem: &Problem<E>,
    saved: Saved<E>,
    incoming: Incoming<E>,
    options: BackwardOptions,
) -> Result<Gradients<E::Float>, Error> {
    E::backward_wide(problem, saved, incoming, options)
}
