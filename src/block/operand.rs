//! Parameters and results as the kernels take and give them.

use std::ops::Deref;

use attention_kernels as kernels;
use attention_kernels::matmul::{Operand, Plain, column_sums, matmul};
use candle_core::{Device, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
use candle_nn::Linear;

use crate::block::op::Dtype;
use crate::error::AttentionError;

/// A tensor on the CPU, to read.
pub(crate) struct Reading<'a> {
    /// candle's guard, whose type has no public name.
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    layout: &'a Layout,
}

impl<'a> Reading<'a> {
    pub(crate) fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage: Box::new(storage), layout }
    }

    /// The numbers of a contiguous tensor.
    pub(crate) fn numbers<E: WithDType>(&self) -> Result<&[E]> {
        match self.layout.contiguous_offsets() {
            Some((start, end)) => Ok(&self.all::<E>()?[start..end]),
            None => bail!("expected a contiguous tensor, got strides {:?}", self.layout.stride()),
        }
    }

    /// A matrix of any strides.
    pub(crate) fn matrix<E: Dtype>(&self, what: &'static str) -> Result<Operand<'_, E>> {
        let (rows, columns) = self.layout.shape().dims2()?;
        let strides = [self.layout.stride()[0], self.layout.stride()[1]];
        checked(Operand::new(what, &self.all::<E>()?[self.layout.start_offset()..], [rows, columns], strides))
    }

    fn all<E: WithDType>(&self) -> Result<&[E]> {
        match &**self.storage {
            Storage::Cpu(storage) => storage.as_slice::<E>(),
            _ => bail!("expected a tensor on the CPU, got one on another device"),
        }
    }
}

/// A result of the kernels with candle's error.
pub(crate) fn checked<T>(result: std::result::Result<T, kernels::Error>) -> Result<T> {
    Ok(result.map_err(AttentionError::from)?)
}

/// A tensor that takes over these numbers.
pub(crate) fn tensor<E: WithDType>(numbers: Vec<E>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(numbers, shape.into(), &Device::Cpu)
}

/// A contiguous matrix of as many rows as its numbers make.
pub(crate) fn rows<'a, E: Dtype>(what: &'static str, numbers: &'a [E], columns: usize) -> Result<Operand<'a, E>> {
    checked(Operand::row_major(what, numbers, numbers.len() / columns.max(1), columns))
}

/// The gradient of a layer's input, if it was wanted, and those of its parameters, each only if it was wanted.
pub(crate) type LayerGradients<E> = (Option<Vec<E>>, Vec<Option<Tensor>>);

/// Some columns of a row-major matrix.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a, E> {
    numbers: &'a [E],
    /// Columns of the matrix.
    stride: usize,
    first: usize,
    count: usize,
}

impl<'a, E: Dtype> Columns<'a, E> {
    /// All columns.
    pub(crate) fn all(numbers: &'a [E], count: usize) -> Self {
        Self { numbers, stride: count, first: 0, count }
    }

    /// Part `n` of a matrix that holds `parts` matrices of the same size side by side.
    pub(crate) fn part(numbers: &'a [E], count: usize, parts: usize, n: usize) -> Self {
        Self { numbers, stride: count * parts, first: count * n, count }
    }

    pub(crate) fn operand(self) -> Result<Operand<'a, E>> {
        let rows = self.numbers.len() / self.stride.max(1);
        let numbers = self.numbers.get(self.first..).unwrap_or_default();
        checked(Operand::new("gradient of a projection", numbers, [rows, self.count], [self.stride, 1]))
    }

    pub(crate) fn sums(self) -> Result<Vec<E::Float>> {
        let sums = checked(column_sums(self.numbers, self.numbers.len() / self.stride.max(1), self.stride))?;
        Ok(if self.count == self.stride { sums } else { sums[self.first..self.first + self.count].to_vec() })
    }
}

/// The gradients of a linear layer's parameters, weight before bias, each only if it is wanted: gradᵀ · x, and the sum of grad over
/// rows. `grad` is (rows, out) and `x` (rows, in).
pub(crate) fn linear_gradients<E: Dtype>(linear: &Linear, grad: Columns<E>, x: &[E]) -> Result<Vec<Option<Tensor>>> {
    let weight = linear.weight();
    let of_weight = || {
        let x = rows("input of a projection", x, weight.dim(1)?)?;
        tensor(checked(matmul(grad.operand()?.transposed(), x, &Plain))?, weight.shape())
    };
    let of_bias = |bias: &Tensor| tensor(checked(E::from_floats("gradient of a bias", grad.sums()?))?, bias.shape());
    let mut gradients = vec![weight.track_op().then(of_weight).transpose()?];
    if let Some(bias) = linear.bias() {
        gradients.push(bias.track_op().then(|| of_bias(bias)).transpose()?);
    }
    Ok(gradients)
}
