//! Tensor parallelism: each rank holds some of the heads of an attention and some of the hidden numbers of an MLP.
//!
//! A layer is y = Σ over the ranks of f_r(x), and its bias. Forward, the ranks sum what each of them has computed. Backward, each rank has a
//! part of the gradient of x, and the ranks sum these.
//!
//! Source: Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism" (2019), section 3, where
//! [`TensorParallel::entering`] is f and [`TensorParallel::sum`] is g.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, Device, Layout, MetalStorage, Result as CandleResult, Shape, Storage, Tensor,
    Var, bail,
};

use crate::empty::readable;
use crate::error::{AttentionError, Result};
use crate::gradient::{give, give_incoming};
use crate::memory;
use crate::parallel::communicator::Communicator;
use crate::parallel::context::agree_on;
use crate::parallel::hash::hash;

/// The ranks that share a layer.
#[derive(Clone, Debug)]
pub(crate) struct TensorParallel(Arc<dyn Communicator>);

/// A rank's part of a parameter: part `part` of `parts` equal ones along an axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Slice {
    pub(crate) axis: usize,
    pub(crate) part: usize,
    pub(crate) parts: usize,
}

impl TensorParallel {
    pub(crate) fn new(communicator: &Arc<dyn Communicator>) -> Self {
        Self(communicator.clone())
    }

    pub(crate) fn rank(&self) -> usize {
        self.0.rank()
    }

    pub(crate) fn ranks(&self) -> usize {
        self.0.size()
    }

    /// This rank's part of a parameter of which each rank holds another one.
    pub(crate) fn slice(&self, axis: usize) -> Slice {
        Slice { axis, part: self.rank(), parts: self.ranks() }
    }

    /// Refuses a number that the ranks can't divide equally.
    pub(crate) fn check_divides(&self, field: &'static str, number: usize) -> Result<(), AttentionError> {
        if number.is_multiple_of(self.ranks()) {
            return Ok(());
        }
        let expected = format!("a multiple of the {} ranks that share the layer", self.ranks());
        Err(AttentionError::Config { field, expected, got: number.to_string() })
    }

    /// The error of what takes a whole layer.
    pub(crate) fn refuse(&self) -> Result<(), AttentionError> {
        let got = format!("the part of rank {} of {}", self.rank(), self.ranks());
        let expected = "a whole one (gather it first)".to_string();
        Err(AttentionError::Config { field: "layer", expected, got })
    }

    /// `ours`, if all ranks have the same `text` to say. An error of one rank is an error on all.
    pub(crate) fn agree_on<T>(&self, what: &'static str, text: String, ours: Result<T>) -> Result<T> {
        agree_on(&*self.0, what, text, ours)
    }

    /// Whether it is so on any rank.
    pub(crate) fn any(&self, ours: bool) -> Result<bool> {
        Ok(self.0.all_gather_bytes(&[u8::from(ours)])?.iter().any(|theirs| theirs[..] == [1]))
    }

    /// x, from which each rank goes on with its part of a layer: the gradient is the sum of the ranks'.
    pub(crate) fn entering(&self, x: &Tensor) -> CandleResult<Tensor> {
        self.with_sum_of_gradients(x, None)
    }

    /// A parameter that several ranks hold and use, each for its own heads: all of them, or those with the same slice.
    pub(crate) fn with_sum_of_gradients(&self, x: &Tensor, slice: Option<Slice>) -> CandleResult<Tensor> {
        if !x.track_op() || self.ranks() == 1 {
            return Ok(x.clone());
        }
        memory::ask_for("input of a layer that ranks share", 1, x, x.dtype())?;
        readable(x)?.apply_op1(SumOfGradients { communicator: self.0.clone(), slice })
    }

    /// The sum of the ranks' tensors. Each one gets the gradient of the sum.
    pub(crate) fn sum(&self, x: &Tensor) -> Result<Tensor> {
        if self.ranks() == 1 {
            return Ok(x.clone());
        }
        let sum = self.0.all_reduce(x)?;
        if !x.track_op() {
            return Ok(sum);
        }
        memory::ask_for("sum over the ranks", 1, x, x.dtype())?;
        Ok(readable(x)?.apply_op1(Sum(Mutex::new(Some(sum))))?)
    }

    /// This rank's part of every parameter, each a variable if the whole is one. `slice_of` gives the part by the parameter's name, `None`
    /// for one that every rank has.
    ///
    /// # Errors
    ///
    /// [`AttentionError::Ranks`] on every rank, if the ranks have other parameters.
    pub(crate) fn shard<N: AsRef<str>>(
        &self,
        parameters: Vec<(N, &Tensor)>,
        slice_of: impl Fn(&str) -> Option<Slice>,
    ) -> Result<Vec<(N, Tensor)>> {
        let mut own = Vec::with_capacity(parameters.len());
        for (name, whole) in parameters {
            self.check_same(name.as_ref(), whole)?;
            let part = match slice_of(name.as_ref()) {
                Some(slice) => slice.of(whole)?,
                None => whole.clone(),
            };
            own.push((name, copy_of(&part, whole)?));
        }
        Ok(own)
    }

    /// A copy of a parameter that every rank has.
    ///
    /// # Errors
    ///
    /// As [`shard`](Self::shard).
    pub(crate) fn same(&self, name: &str, parameter: &Tensor) -> Result<Tensor> {
        self.check_same(name, parameter)?;
        Self::copy(parameter)
    }

    /// A copy of a parameter, a variable if it is one.
    pub(crate) fn copy(parameter: &Tensor) -> Result<Tensor> {
        copy_of(parameter, parameter)
    }

    fn check_same(&self, name: &str, parameter: &Tensor) -> Result<()> {
        let (dims, dtype, hash) = (parameter.dims(), parameter.dtype(), hash(&parameter.to_device(&Device::Cpu)?));
        let kind = if parameter.is_variable() { "variable" } else { "constant" };
        let text = format!("{name} {dims:?} {dtype:?}, a {kind}, numbers {hash:016x}");
        self.0.agree("parameter of a layer to share", &text)
    }

    /// The inverse of [`shard`](Self::shard).
    pub(crate) fn gather<N: AsRef<str>>(
        &self,
        parameters: Vec<(N, &Tensor)>,
        slice_of: impl Fn(&str) -> Option<Slice>,
    ) -> Result<Vec<(N, Tensor)>> {
        let mut all = Vec::with_capacity(parameters.len());
        for (name, own) in parameters {
            let whole = match slice_of(name.as_ref()) {
                Some(Slice { axis, parts, .. }) => {
                    let of_ranks = self.0.all_gather(own)?;
                    // The first rank that holds each part.
                    let parts: Vec<_> = (0..parts).map(|part| &of_ranks[part * of_ranks.len() / parts]).collect();
                    Tensor::cat(&parts, axis)?
                }
                None => own.clone(),
            };
            all.push((name, copy_of(&whole, own)?));
        }
        Ok(all)
    }
}

/// A copy of `x`, a variable if `like` is one.
fn copy_of(x: &Tensor, like: &Tensor) -> Result<Tensor> {
    memory::ask_for("parameters of a rank", 1, x, x.dtype())?;
    match like.is_variable() {
        true => Ok(Var::from_tensor(&x.detach())?.into_inner()),
        false => Ok(x.detach().force_contiguous()?),
    }
}

impl Slice {
    /// The part of a whole tensor.
    pub(crate) fn of(&self, whole: &Tensor) -> CandleResult<Tensor> {
        let size = whole.dim(self.axis)? / self.parts;
        whole.narrow(self.axis, self.part * size, size)
    }

    /// A whole tensor with zeros around this part.
    fn with_zeros(&self, part: &Tensor) -> CandleResult<Tensor> {
        let size = part.dim(self.axis)?;
        part.pad_with_zeros(self.axis, self.part * size, (self.parts - self.part - 1) * size)
    }
}

/// x, whose gradient is the sum of the ranks'.
struct SumOfGradients {
    communicator: Arc<dyn Communicator>,
    slice: Option<Slice>,
}

fn copy<S>(storage: &S, layout: &Layout) -> CandleResult<(S, Shape)>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    let shape = layout.shape().clone();
    let mut copy = storage.device().zeros_impl(&shape, storage.dtype())?;
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok((copy, shape))
}

impl CustomOp1 for SumOfGradients {
    fn name(&self) -> &'static str {
        "sum-of-gradients"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        copy(storage, layout)
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> CandleResult<(CudaStorage, Shape)> {
        copy(storage, layout)
    }

    fn metal_fwd(&self, storage: &MetalStorage, layout: &Layout) -> CandleResult<(MetalStorage, Shape)> {
        copy(storage, layout)
    }

    fn bwd(&self, x: &Tensor, result: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let grad = grad.detach();
        let sum = match self.slice {
            None => self.communicator.all_reduce(&grad)?,
            // The ranks have no groups, so all of them sum all parts.
            Some(slice) => slice.of(&self.communicator.all_reduce(&slice.with_zeros(&grad)?)?)?.force_contiguous()?,
        };
        give(x, result, sum)
    }
}

/// The sum of the ranks' tensors, which the forward pass takes.
struct Sum(Mutex<Option<Tensor>>);

impl Sum {
    fn take(&self) -> CandleResult<Tensor> {
        let sum = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        sum.ok_or_else(|| candle_core::Error::msg("sum over ranks: expected one forward pass, got a second one"))
    }
}

/// A pass on the storage of the sum, which lies on the device of the input.
macro_rules! forward {
    ($name:ident, $storage:ty, $variant:ident) => {
        fn $name(&self, _: &$storage, _: &Layout) -> CandleResult<($storage, Shape)> {
            let sum = self.take()?;
            let (storage, layout) = sum.storage_and_layout();
            match &*storage {
                Storage::$variant(storage) => copy(storage, layout),
                _ => bail!("sum over ranks: expected it on the device of its input, got another one"),
            }
        }
    };
}

impl CustomOp1 for Sum {
    fn name(&self) -> &'static str {
        "sum-over-ranks"
    }

    forward!(cpu_fwd, CpuStorage, Cpu);
    forward!(cuda_fwd, CudaStorage, Cuda);
    forward!(metal_fwd, MetalStorage, Metal);

    fn bwd(&self, x: &Tensor, result: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        give_incoming(x, result, &grad.detach())
    }
}
