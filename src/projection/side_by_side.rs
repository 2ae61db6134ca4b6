//! [`SideBySide`]: linear layers that read the same input, each with its adapter, on numbers.
//!
//! Forward, y_i = x · W_iᵀ + b_i + u_i · B_iᵀ with u_i = s_i · dropout_i(x) · A_iᵀ. Each y_i is one sum of products, so that no pass over y adds
//! the adapter's part, and B · A is never computed. Backward, with du_i = s_i · dy_i · B_i:
//!
//! - dA_i = du_iᵀ · dropout_i(x), dB_iᵀ = u_iᵀ · dy_i,
//! - dx = Σ_i dy_i · W_i + dropout_i(du_i · A_i).
//!
//! u and du are computed and kept transposed, (rank, rows): products of so few rows read x and dy once, from where they are.

use std::sync::Arc;

use attention_kernels::Dropout;
use attention_kernels::matmul::{Operand, Plain, matmul, matmul_groups, matmul_sum};
use attention_kernels::residual::{add_dropped, dropped_gradient};
use candle_core::{Result, Tensor};
use candle_nn::Linear;

use crate::block::epilogue::{Add, Scale};
use crate::block::op::Dtype;
use crate::block::operand::{Columns, LayerGradients, Reading, checked, linear_gradients, rows, tensor};
use crate::memory;
use crate::projection::low_rank::LowRank;
use crate::projection::quantised::Quantised;

/// A linear layer in one call: its parameters, and the adapter that the call has chosen.
#[derive(Clone, Debug)]
pub(crate) struct Adapted {
    pub(crate) linear: Linear,
    /// The weight, if it is in blocks; that of `linear` is then a placeholder.
    pub(crate) quantised: Option<Arc<Quantised>>,
    pub(crate) low_rank: Option<LowRank>,
    /// Dropout of the adapter's input.
    pub(crate) dropout: Option<Dropout>,
}

impl From<Linear> for Adapted {
    fn from(linear: Linear) -> Self {
        Self { linear, quantised: None, low_rank: None, dropout: None }
    }
}

impl Adapted {
    /// The same with tensors that the kernels can read. A copy passes its gradient on.
    fn readable(self) -> Result<Self> {
        let bias = self.linear.bias().map(|bias| memory::contiguous("bias", bias)).transpose()?;
        Ok(Self { linear: Linear::new(self.linear.weight().clone(), bias), ..self })
    }

    /// The same without a bias.
    pub(crate) fn without_bias(self) -> Self {
        Self { linear: Linear::new(self.linear.weight().clone(), None), ..self }
    }

    /// Every parameter, in the order of the gradients.
    fn parameters(&self) -> impl Iterator<Item = &Tensor> {
        let of_linear = std::iter::once(self.linear.weight()).chain(self.linear.bias());
        of_linear.chain(self.low_rank.iter().flat_map(|low_rank| [&low_rank.a, &low_rank.b]))
    }

    /// s · A · dropout(x)ᵀ, (rank, rows).
    fn reduce<E: Dtype>(&self, x: &[E]) -> Result<Option<Vec<E>>> {
        let Some(LowRank { a, scale, .. }) = &self.low_rank else { return Ok(None) };
        let dropped = self.dropped(x)?;
        let (x, a_read) = (rows("input of an adapter", dropped.as_deref().unwrap_or(x), a.dim(1)?)?, Reading::new(a));
        checked(matmul(a_read.matrix::<E>("lora_A")?, x.transposed(), &Scale(*scale))).map(Some)
    }

    /// What the adapter reads, if it isn't x itself.
    fn dropped<E: Dtype>(&self, x: &[E]) -> Result<Option<Vec<E>>> {
        self.dropout.map(|dropout| checked(add_dropped(None, x, Some(dropout)))).transpose()
    }

    /// s · Bᵀ · dyᵀ, (rank, rows).
    fn gradient_of_reduced<E: Dtype>(&self, grad: Columns<E>) -> Result<Option<Vec<E>>> {
        let Some(LowRank { b, scale, .. }) = &self.low_rank else { return Ok(None) };
        let b = Reading::new(b);
        let b = b.matrix::<E>("lora_B")?.transposed();
        checked(matmul(b, grad.operand()?.transposed(), &Scale(*scale))).map(Some)
    }

    /// The gradients of A and B, each only if it is wanted.
    fn gradients_of_low_rank<E: Dtype>(
        &self,
        LowRank { a, b, .. }: &LowRank,
        x: &[E],
        reduced: &[E],
        of_reduced: &[E],
        grad: Columns<E>,
    ) -> Result<[Option<Tensor>; 2]> {
        let (inputs, rank, outputs) = (a.dim(1)?, a.dim(0)?, b.dim(0)?);
        let of_a = || {
            let dropped = self.dropped(x)?;
            let x = rows("input of an adapter", dropped.as_deref().unwrap_or(x), inputs)?;
            tensor(checked(matmul(by_rank(of_reduced, rank)?, x, &Plain))?, a.shape())
        };
        let of_b = || {
            let transposed = checked(matmul(by_rank(reduced, rank)?, grad.operand()?, &Plain))?;
            tensor(transposed, (rank, outputs))?.t()
        };
        Ok([a.track_op().then(of_a).transpose()?, b.track_op().then(of_b).transpose()?])
    }
}

/// An [`Adapted`] to read.
struct Read<'a> {
    weight: Weight<'a>,
    bias: Option<Reading<'a>>,
    low_rank: Option<[Reading<'a>; 2]>,
}

enum Weight<'a> {
    Numbers(Reading<'a>),
    Blocks(&'a Quantised),
}

impl<'a> Read<'a> {
    fn new(adapted: &'a Adapted) -> Self {
        let low_rank = adapted.low_rank.as_ref().map(|low_rank| [&low_rank.a, &low_rank.b].map(Reading::new));
        let weight = match &adapted.quantised {
            Some(quantised) => Weight::Blocks(quantised),
            None => Weight::Numbers(Reading::new(adapted.linear.weight())),
        };
        Self { weight, bias: adapted.linear.bias().map(Reading::new), low_rank }
    }

    fn weight<E: Dtype>(&self) -> Result<Operand<'_, E>> {
        match &self.weight {
            Weight::Numbers(weight) => weight.matrix("weight"),
            Weight::Blocks(weight) => weight.operand(),
        }
    }
}

/// u or du of a linear layer, (rank, rows).
fn by_rank<E: Dtype>(numbers: &[E], rank: usize) -> Result<Operand<'_, E>> {
    checked(Operand::row_major("lora_A · x", numbers, rank, numbers.len() / rank.max(1)))
}

/// uᵀ of each linear layer, `None` without an adapter.
pub(crate) type Reduced<E> = Vec<Option<Vec<E>>>;

/// Linear layers that read the same input.
#[derive(Clone, Debug)]
pub(crate) struct SideBySide(Vec<Adapted>);

impl SideBySide {
    pub(crate) fn new(linears: impl IntoIterator<Item = Adapted>) -> Result<Self> {
        Ok(Self(linears.into_iter().map(Adapted::readable).collect::<Result<_>>()?))
    }

    /// Every parameter, in the order of the gradients.
    pub(crate) fn parameters(&self) -> impl Iterator<Item = Tensor> {
        self.0.iter().flat_map(Adapted::parameters).cloned()
    }

    /// The columns of each output.
    fn widths(&self) -> Result<Vec<usize>> {
        self.0.iter().map(|adapted| adapted.linear.weight().dim(0)).collect()
    }

    fn inputs(&self) -> Result<usize> {
        self.0.first().map_or(Ok(0), |adapted| adapted.linear.weight().dim(1))
    }

    /// What the adapters make of x (rows, in) before their second products.
    pub(crate) fn reduce<E: Dtype>(&self, x: &[E]) -> Result<Reduced<E>> {
        self.0.iter().map(|adapted| adapted.reduce(x)).collect()
    }

    /// The outputs for x (rows, in), side by side, and a residual of their shape added.
    pub(crate) fn forward<E: Dtype>(&self, x: &[E], reduced: &Reduced<E>, residual: Option<&[E]>) -> Result<Vec<E>> {
        let (inputs, widths) = (self.inputs()?, self.widths()?);
        let x = rows("input of a linear layer", x, inputs)?;
        let read: Vec<_> = self.0.iter().map(Read::new).collect();
        let mut groups = Vec::new();
        for (read, reduced) in read.iter().zip(reduced) {
            let mut pairs = vec![(x, read.weight::<E>()?.transposed())];
            if let (Some([_, b]), Some(reduced)) = (&read.low_rank, reduced) {
                let b = b.matrix::<E>("lora_B")?.transposed();
                pairs.push((by_rank(reduced, b.dims()[0])?.transposed(), b));
            }
            groups.push(pairs);
        }
        let groups: Vec<_> = groups.iter().map(Vec::as_slice).collect();
        let bias = biases::<E>(&read, &widths)?;
        let add = Add { bias: bias.as_deref(), rows: residual, columns: widths.iter().sum() };
        checked(matmul_groups(x.dims()[0], &groups, &add))
    }

    /// The gradient of x (rows, in) from those of the outputs, and those of the parameters, each only if it is wanted.
    pub(crate) fn backward<E: Dtype>(
        &self,
        x: &[E],
        reduced: &Reduced<E>,
        grads: &[Columns<E>],
        wants_x: bool,
    ) -> Result<LayerGradients<E>> {
        let of_reduced =
            self.0.iter().zip(grads).map(|(x, grad)| x.gradient_of_reduced(*grad)).collect::<Result<Reduced<E>>>()?;
        let mut gradients = Vec::new();
        for (i, (adapted, grad)) in self.0.iter().zip(grads).enumerate() {
            gradients.extend(linear_gradients(&adapted.linear, *grad, x)?);
            if let (Some(low_rank), Some(reduced), Some(of_reduced)) = (&adapted.low_rank, &reduced[i], &of_reduced[i])
            {
                gradients.extend(adapted.gradients_of_low_rank(low_rank, x, reduced, of_reduced, *grad)?);
            }
        }
        let of_x = wants_x.then(|| self.gradient_of_x(grads, &of_reduced)).transpose()?;
        Ok((of_x, gradients))
    }

    fn gradient_of_x<E: Dtype>(&self, grads: &[Columns<E>], of_reduced: &Reduced<E>) -> Result<Vec<E>> {
        let read: Vec<_> = self.0.iter().map(Read::new).collect();
        let (mut pairs, mut of_dropped) = (Vec::new(), None::<Vec<E>>);
        for (i, (read, grad)) in read.iter().zip(grads).enumerate() {
            pairs.push((grad.operand()?, read.weight::<E>()?));
            let (Some([a, _]), Some(of_reduced)) = (&read.low_rank, &of_reduced[i]) else { continue };
            let a = a.matrix::<E>("lora_A")?;
            let of_reduced = by_rank(of_reduced, a.dims()[0])?.transposed();
            match self.0[i].dropout {
                None => pairs.push((of_reduced, a)),
                dropout => {
                    let of_input = checked(dropped_gradient(&checked(matmul(of_reduced, a, &Plain))?, dropout))?;
                    of_dropped = Some(match of_dropped {
                        Some(before) => checked(add_dropped(Some(&before), &of_input, None))?,
                        None => of_input,
                    });
                }
            }
        }
        checked(matmul_sum(&pairs, &Add { bias: None, rows: of_dropped.as_deref(), columns: self.inputs()? }))
    }
}

/// The biases one behind the other, `None` if there is none. A missing one is zero.
fn biases<E: Dtype>(read: &[Read], widths: &[usize]) -> Result<Option<Vec<E>>> {
    if read.iter().all(|read| read.bias.is_none()) {
        return Ok(None);
    }
    let mut all = Vec::new();
    for (read, width) in read.iter().zip(widths) {
        match &read.bias {
            Some(bias) => all.extend_from_slice(bias.numbers()?),
            None => all.resize(all.len() + width, E::zero()),
        }
    }
    Ok(Some(all))
}
