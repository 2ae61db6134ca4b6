//! An operation on the CPU as candle wants it: contiguous numbers of one dtype in, a vector out, and the gradients.
//!
//! The operations of a block implement [`Function`], and [`apply`] connects them with candle's tensors.

use attention_kernels::matmul::MatmulElement;
use attention_kernels::{Element, Number};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, WithDType,
};
use half::{bf16, f16};

use crate::error::AttentionError;
use crate::gradient::{give, give_incoming};
use crate::memory;

/// A type of number that both candle and the kernels know.
pub(crate) trait Dtype: Element + MatmulElement + Number<Float: WithDType + Element> + WithDType {}

impl Dtype for f16 {}
impl Dtype for bf16 {}
impl Dtype for f32 {}
impl Dtype for f64 {}

/// Runs `$body` with the type of a dtype as `$element`. Any other dtype than the four floats is an error.
macro_rules! with_dtype {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F16 => {
                type $element = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $element = half::bf16;
                $body
            }
            candle_core::DType::F32 => {
                type $element = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $element = f64;
                $body
            }
            got => Err($crate::block::op::unsupported(got)),
        }
    };
}
#[allow(unused_imports)]
pub(crate) use with_dtype;

/// The error of a dtype that isn't a float. The checks before an operation should have found it.
pub(crate) fn unsupported(got: DType) -> candle_core::Error {
    AttentionError::DType { tensor: "operation on the CPU", expected: crate::check::SUPPORTED.into(), got }.into()
}

/// The numbers of a contiguous tensor.
pub(crate) fn slice<'a, E: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [E]> {
    let numbers = storage.as_slice::<E>()?;
    if layout.shape().elem_count() == 0 {
        return Ok(&[]);
    }
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&numbers[start..end]),
        None => Err(candle_core::Error::msg("operation on the CPU: expected a contiguous tensor")),
    }
}

/// The same of a tensor's storage, which has to be on the CPU.
pub(crate) fn numbers<'a, E: WithDType>(storage: &'a Storage, layout: &Layout) -> Result<&'a [E]> {
    match storage {
        Storage::Cpu(storage) => slice(storage, layout),
        _ => Err(candle_core::Error::msg("operation on the CPU: expected a tensor on the CPU")),
    }
}

/// A gradient of an operation's input.
pub(crate) enum Gradient<E> {
    /// Its numbers.
    Numbers(Vec<E>),
    /// The gradient of the result, as it came.
    Incoming,
}

/// A function of `N` tensors of one dtype.
pub(crate) trait Function<const N: usize>: Send + Sync + 'static {
    /// The operation's name in candle's errors.
    const NAME: &'static str;

    /// The numbers of the result. `dims` are those of the inputs.
    fn forward<E: Dtype>(&self, inputs: [&[E]; N], dims: [&[usize]; N]) -> Result<Vec<E>>;

    /// The gradients of the inputs, from that of the result. An input whose gradient isn't `wanted` needs none.
    fn backward<E: Dtype>(
        &self,
        inputs: [&[E]; N],
        dims: [&[usize]; N],
        grad: &[E],
        wanted: [bool; N],
    ) -> Result<[Option<Gradient<E>>; N]>;

    /// The result's shape: that of the first input, unless it says otherwise.
    fn shape(&self, dims: [&[usize]; N]) -> Shape {
        Shape::from(dims[0])
    }
}

/// The function as an operation of candle.
pub(crate) struct Op<F>(F);

/// An operation on `N` tensors.
pub(crate) trait Arity<const N: usize> {
    /// Calls candle.
    fn apply(self, inputs: [&Tensor; N]) -> Result<Tensor>;
}

/// Applies a function to tensors of one dtype on the CPU. Those that are not contiguous are copied.
pub(crate) fn apply<const N: usize, F: Function<N>>(function: F, inputs: [&Tensor; N]) -> Result<Tensor>
where
    Op<F>: Arity<N>,
{
    Op(function).apply(inputs)
}

fn contiguous(x: &Tensor) -> Result<Tensor> {
    memory::contiguous("copy of an operation's input", x)
}

impl<F> Op<F> {
    fn forward<const N: usize>(&self, storages: [&CpuStorage; N], layouts: [&Layout; N]) -> Result<(CpuStorage, Shape)>
    where
        F: Function<N>,
    {
        let dims = layouts.map(Layout::dims);
        with_dtype!(storages[0].dtype(), E => {
            let mut inputs: [&[E]; N] = [&[]; N];
            for (input, (storage, layout)) in inputs.iter_mut().zip(storages.iter().zip(layouts)) {
                *input = slice(storage, layout)?;
            }
            Ok((E::to_cpu_storage_owned(self.0.forward(inputs, dims)?), self.0.shape(dims)))
        })
    }

    fn backward<const N: usize>(
        &self,
        args: [&Tensor; N],
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; N]>
    where
        F: Function<N>,
    {
        let wanted = args.map(Tensor::track_op);
        let (dims, grad) = (args.map(Tensor::dims), contiguous(&grad.detach())?);
        let (guards, grad_guard) = (args.map(Tensor::storage_and_layout), grad.storage_and_layout());
        with_dtype!(grad.dtype(), E => {
            let mut inputs: [&[E]; N] = [&[]; N];
            for (input, (storage, layout)) in inputs.iter_mut().zip(&guards) {
                *input = numbers(storage, layout)?;
            }
            let gradients = self.0.backward::<E>(inputs, dims, numbers(&grad_guard.0, grad_guard.1)?, wanted)?;
            let mut given = [const { None }; N];
            for (((given, gradient), arg), wanted) in given.iter_mut().zip(gradients).zip(args).zip(wanted) {
                *given = match gradient.filter(|_| wanted) {
                    Some(Gradient::Numbers(numbers)) => {
                        give(arg, result, Tensor::from_vec(numbers, arg.shape(), arg.device())?)?
                    }
                    Some(Gradient::Incoming) => give_incoming(arg, result, &grad)?,
                    None => None,
                };
            }
            Ok(given)
        })
    }
}

impl<F: Function<1>> Arity<1> for Op<F> {
    fn apply(self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        contiguous(x)?.apply_op1(self)
    }
}

impl<F: Function<2>> Arity<2> for Op<F> {
    fn apply(self, [x, y]: [&Tensor; 2]) -> Result<Tensor> {
        contiguous(x)?.apply_op2(&contiguous(y)?, self)
    }
}

impl<F: Function<3>> Arity<3> for Op<F> {
    fn apply(self, [x, y, z]: [&Tensor; 3]) -> Result<Tensor> {
        contiguous(x)?.apply_op3(&contiguous(y)?, &contiguous(z)?, self)
    }
}

impl<F: Function<1>> CustomOp1 for Op<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward([s1], [l1])
    }

    fn bwd(&self, arg: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [x] = self.backward([arg], result, grad)?;
        Ok(x)
    }
}

impl<F: Function<2>> CustomOp2 for Op<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward([s1, s2], [l1, l2])
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, result: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = self.backward([a, b], result, grad)?;
        Ok((a, b))
    }
}

impl<F: Function<3>> CustomOp3 for Op<F> {
    fn name(&self) -> &'static str {
        F::NAME
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
        self.forward([s1, s2, s3], [l1, l2, l3])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.backward([a, b, c], result, grad)?;
        Ok((a, b, c))
    }
}
