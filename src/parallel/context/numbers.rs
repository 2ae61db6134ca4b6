//! Numbers of parts of tensors: to send, to add, to write into results.

use std::ops::Range;

use attention_kernels::{Element, Layout, Number, View, reserve};
use candle_core::{Device, Storage, Tensor, WithDType};

use crate::error::{AttentionError, Result};

/// A type of number that candle and the kernels know.
pub(crate) trait Dtype: Element + Number<Float: WithDType + Element> + WithDType {}

impl<E: Element + Number<Float: WithDType + Element> + WithDType> Dtype for E {}

/// A result of the kernels with this crate's error.
pub(super) fn checked<T>(result: std::result::Result<T, attention_kernels::Error>) -> Result<T> {
    Ok(result.map_err(AttentionError::from)?)
}

/// Batch, heads and tokens of a part of a tensor.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) sequences: Range<usize>,
    pub(super) heads: Range<usize>,
    pub(super) tokens: Range<usize>,
}

impl Place {
    pub(super) fn rows(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let Self { sequences, heads, tokens } = self.clone();
        sequences.flat_map(move |b| {
            let tokens = tokens.clone();
            heads.clone().flat_map(move |h| tokens.clone().map(move |i| (b, h, i)))
        })
    }

    pub(super) fn of<'a, E: Number>(&self, view: View<'a, E>) -> Result<View<'a, E>> {
        let Self { sequences, heads, tokens } = self.clone();
        checked(view.narrow(0, sequences).and_then(|x| x.narrow(1, heads)).and_then(|x| x.narrow(2, tokens)))
    }

    /// The sizes of a part whose rows have `dim` numbers.
    pub(super) fn dims(&self, dim: usize) -> [usize; 4] {
        [self.sequences.len(), self.heads.len(), self.tokens.len(), dim]
    }
}

/// Appends the rows of a view, sequence by sequence, head by head.
pub(super) fn append<E: Number>(to: &mut Vec<E>, view: View<E>) -> Result<()> {
    let [batch, heads, len, dim] = view.dims();
    let count = batch * heads * len * dim;
    to.try_reserve(count).map_err(|_| AttentionError::Memory { what: "message", bytes: count * size_of::<E>() })?;
    if dim == 0 {
        return Ok(());
    }
    for (b, h, i) in (Place { sequences: 0..batch, heads: 0..heads, tokens: 0..len }).rows() {
        to.extend_from_slice(view.row(b, h, i));
    }
    Ok(())
}

/// The rows of a view as a tensor (batch, heads, len, dim).
pub(super) fn tensor_of<E: Dtype>(view: View<E>) -> Result<Tensor> {
    let mut numbers = checked(reserve("message", view.dims().iter().product()))?;
    append(&mut numbers, view)?;
    let [batch, heads, len, dim] = view.dims();
    Ok(Tensor::from_vec(numbers, (batch, heads, len, dim), &Device::Cpu)?)
}

/// Calls `f` with the numbers of a contiguous tensor on the CPU.
pub(super) fn with_numbers<E: WithDType, T>(tensor: &Tensor, f: impl FnOnce(&[E]) -> Result<T>) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => f(&storage.as_slice::<E>()?[start..end]),
        _ => Err(candle_core::Error::msg("message of a rank: expected a contiguous tensor on the CPU").into()),
    }
}

/// A view of numbers that stand head by head.
pub(super) fn view<'a, E: Number>(what: &'static str, numbers: &'a [E], dims: [usize; 4]) -> Result<View<'a, E>> {
    checked(View::new(what, numbers, Layout::HeadsFirst.strides(dims), dims))
}

/// A result (batch, heads, len, dim) of which parts are written.
pub(super) struct Target<E> {
    pub(super) numbers: Vec<E>,
    dims: [usize; 4],
    strides: [usize; 3],
}

impl<E: Number> Target<E> {
    pub(super) fn new(what: &'static str, dims: [usize; 4], layout: Layout) -> Result<Self> {
        let numbers = checked(attention_kernels::filled(what, dims.iter().product(), E::default()))?;
        Ok(Self { numbers, dims, strides: layout.strides(dims) })
    }

    fn row(&mut self, (b, h, i): (usize, usize, usize)) -> &mut [E] {
        let [sb, sh, si] = self.strides;
        let start = b * sb + h * sh + i * si;
        &mut self.numbers[start..start + self.dims[3]]
    }

    /// (batch, heads, len, dim)
    pub(super) fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// The result as a tensor, for one that stands head by head.
    pub(super) fn into_tensor(self) -> Result<Tensor>
    where
        E: WithDType,
    {
        let [batch, heads, len, dim] = self.dims;
        Ok(Tensor::from_vec(self.numbers, (batch, heads, len, dim), &Device::Cpu)?)
    }

    /// Copies the rows of a part, which stand head by head.
    pub(super) fn copy(&mut self, place: &Place, rows: &[E]) {
        let dim = self.dims[3].max(1);
        for (at, from) in place.rows().zip(rows.chunks_exact(dim)) {
            self.row(at).copy_from_slice(from);
        }
    }

    /// Copies the rows of a view of the part's sizes.
    pub(super) fn copy_from(&mut self, place: &Place, rows: View<E>) {
        let [_, heads, len, _] = rows.dims();
        for (n, at) in place.rows().enumerate() {
            self.row(at).copy_from_slice(rows.row(n / (heads * len), n / len % heads, n % len));
        }
    }

    /// Writes the rows of a part, which stand head by head, narrowed.
    pub(super) fn write(&mut self, place: &Place, rows: &[E::Float]) {
        let dim = self.dims[3].max(1);
        for (at, from) in place.rows().zip(rows.chunks_exact(dim)) {
            self.row(at).iter_mut().zip(from).for_each(|(to, x)| *to = E::narrow(*x));
        }
    }

    /// Adds the rows of a part, which stand head by head.
    pub(super) fn add<F: Number<Float = E>>(&mut self, place: &Place, rows: &[F])
    where
        E: attention_kernels::SimdFloat,
    {
        let dim = self.dims[3].max(1);
        for (at, from) in place.rows().zip(rows.chunks_exact(dim)) {
            self.row(at).iter_mut().zip(from).for_each(|(to, x)| *to += x.widen());
        }
    }
}
