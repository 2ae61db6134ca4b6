//! The operations of a call: attention, its log-sum-exp, and the one that gives parameters their gradients.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CustomOp3, Device, Layout, Result, Shape, Storage, Tensor};

use super::call::{Call, Incoming};
use super::storage::{Stored, logsumexp, storage};
use crate::memory;
use crate::sdpa::head_layout::HeadLayout;

/// Query, key and value to the context, in the dtype of the inputs.
pub(super) struct Attention(pub(super) Arc<Call>);

/// Query, key and value to the log-sum-exp (batch, num_heads, q_len) in f32, which [`Attention`] has computed before.
pub(super) struct LogSumExp(pub(super) Arc<Call>);

/// A value and two parameters to the same value. candle's operations have at most three inputs, and attention has up to six that want a
/// gradient. The backward pass of attention leaves those of the parameters in the call, and this operation hands them out.
///
/// All operations that use the value belong to one call, so that their backward passes come before this one.
pub(super) struct Carrier {
    pub(super) call: Arc<Call>,
    /// What the two parameters are. The second may be missing; any tensor without a gradient then stands for it.
    pub(super) parameters: [Option<Parameter>; 2],
}

/// A parameter of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parameter {
    Bias,
    Slopes,
    Sinks,
}

/// The shape of the context.
fn context_shape(layout: HeadLayout, q: &Layout, v: &Layout) -> Result<Shape> {
    let dims = layout.bhld(q.shape().dims4()?.into());
    Ok(layout.shape(dims[0], dims[1], dims[2], v.shape().dims4()?.3).into())
}

/// The shape of the log-sum-exp.
fn row_shape(layout: HeadLayout, q: &Layout) -> Result<Shape> {
    let dims = layout.bhld(q.shape().dims4()?.into());
    Ok((dims[0], dims[1], dims[2]).into())
}

/// A contiguous gradient that begins at a multiple of 16 bytes.
fn aligned(what: &'static str, gradient: &Tensor) -> Result<Tensor> {
    let gradient = memory::contiguous(what, &gradient.detach())?;
    let start = gradient.layout().start_offset() * gradient.dtype().size_in_bytes();
    if start.is_multiple_of(16) { Ok(gradient) } else { gradient.force_contiguous() }
}

fn not_on_the_cpu<T>() -> Result<T> {
    Err(candle_core::Error::msg("CUDA attention: expected a result on the CPU"))
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "cuda-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let inputs = [(Stored::Cpu(q), q_layout), (Stored::Cpu(k), k_layout), (Stored::Cpu(v), v_layout)];
        let context = self.0.forward(inputs)?;
        match storage(context, q.dtype(), &Device::Cpu)? {
            Storage::Cpu(context) => Ok((context, context_shape(self.0.layout, q_layout, v_layout)?)),
            _ => not_on_the_cpu(),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let inputs = [(Stored::Cuda(q), q_layout), (Stored::Cuda(k), k_layout), (Stored::Cuda(v), v_layout)];
        let context = super::gpu::storage(self.0.forward(inputs)?, q.dtype(), q.device())?;
        Ok((context, context_shape(self.0.layout, q_layout, v_layout)?))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        context: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradient = aligned("gradient of the context", gradient)?;
        let [q, k, v] = self.0.backward([q, k, v], Incoming::Context(context, gradient))?;
        Ok((q, k, v))
    }
}

impl CustomOp3 for LogSumExp {
    fn name(&self) -> &'static str {
        "cuda-attention-logsumexp"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        q_layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match logsumexp(self.0.saved()?.logsumexp(), &Device::Cpu)? {
            Storage::Cpu(numbers) => Ok((numbers, row_shape(self.0.layout, q_layout)?)),
            _ => not_on_the_cpu(),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let numbers = super::gpu::logsumexp(self.0.saved()?.logsumexp(), q.device())?;
        Ok((numbers, row_shape(self.0.layout, q_layout)?))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradient = aligned("gradient of the log-sum-exp", gradient)?;
        let [q, k, v] = self.0.backward([q, k, v], Incoming::LogSumExp(gradient))?;
        Ok((q, k, v))
    }
}

/// A contiguous copy of a tensor.
fn copy<S>(storage: &S, layout: &Layout) -> Result<(S, Shape)>
where
    S: BackendStorage<Device: BackendDevice<Storage = S>>,
{
    let shape = layout.shape().clone();
    let mut copy = storage.device().zeros_impl(&shape, storage.dtype())?;
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok((copy, shape))
}

impl Carrier {
    /// The gradient of a parameter, as it has been deposited.
    fn gradient(&self, of: Option<Parameter>, parameter: &Tensor) -> Result<Option<Tensor>> {
        let mut deposits = self.call.deposits();
        let gradient = match of {
            Some(Parameter::Bias) => deposits.bias.take()?,
            // Each row has its part.
            Some(Parameter::Slopes) => deposits.slopes.take()?.map(|rows| of_heads(&rows, parameter)).transpose()?,
            Some(Parameter::Sinks) => deposits.sinks.take()?.map(|rows| of_heads(&rows, parameter)).transpose()?,
            None => None,
        };
        gradient.map(|gradient| gradient.reshape(parameter.shape())?.to_dtype(parameter.dtype())).transpose()
    }
}

/// The sum of the parts of the rows (batch, num_heads, q_len), for a parameter (num_heads) or (batch, num_heads).
fn of_heads(rows: &Tensor, parameter: &Tensor) -> Result<Tensor> {
    let sums = rows.sum(2)?;
    if parameter.rank() == 1 { sums.sum(0) } else { Ok(sums) }
}

impl CustomOp3 for Carrier {
    fn name(&self) -> &'static str {
        "cuda-attention-parameters"
    }

    fn cpu_fwd(
        &self,
        value: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        copy(value, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        value: &CudaStorage,
        layout: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        copy(value, layout)
    }

    fn bwd(
        &self,
        _: &Tensor,
        first: &Tensor,
        second: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [of_first, of_second] = self.parameters;
        Ok((Some(gradient.clone()), self.gradient(of_first, first)?, self.gradient(of_second, second)?))
    }
}
