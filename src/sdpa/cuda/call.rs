//! One call: what its operations share. The forward pass leaves here what the backward passes need.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use attention_kernels::Dropout;
use attention_kernels::cuda::{self, Gradients, Inputs, Machine, Memory, Saved, Wanted};
use candle_core::{DType, Layout, Result, Storage, Tensor};

use super::storage::{Borrowed, Stored, tensor};
use crate::error::AttentionError;
use crate::mask::Mask;
use crate::sdpa::head_layout::HeadLayout;

/// The options of a call, and what its passes leave for one another.
pub(super) struct Call {
    pub(super) machine: Arc<dyn Machine>,
    pub(super) layout: HeadLayout,
    pub(super) scale: f64,
    pub(super) softcap: Option<f64>,
    pub(super) mask: Mask,
    /// f32, as the slopes and sinks, which are contiguous.
    pub(super) bias: Option<Tensor>,
    pub(super) slopes: Option<Tensor>,
    pub(super) sinks: Option<Tensor>,
    pub(super) dropout: Option<Dropout>,
    pub(super) wanted: Wanted,
    pub(super) saved: OnceLock<Saved>,
    pub(super) deposits: Mutex<Deposits>,
}

/// Gradients of parameters, which the backward pass of one operation computes and that of another hands out.
#[derive(Default)]
pub(super) struct Deposits {
    /// f32, with the four axes of the bias.
    pub(super) bias: Deposit,
    /// f32 (batch, num_heads, q_len): each row's part. `sinks` likewise.
    pub(super) slopes: Deposit,
    pub(super) sinks: Deposit,
}

/// A parameter's gradients through the context and through the log-sum-exp. A new one takes the place of what a backward pass has left
/// that failed before its end.
#[derive(Default)]
pub(super) struct Deposit([Option<Tensor>; 2]);

impl Deposit {
    fn put(&mut self, through_logsumexp: bool, gradient: Option<Tensor>) {
        self.0[usize::from(through_logsumexp)] = gradient;
    }

    /// The sum, if there is one. Nothing is left.
    pub(super) fn take(&mut self) -> Result<Option<Tensor>> {
        match std::mem::take(&mut self.0) {
            [Some(a), Some(b)] => Ok(Some((a + b)?)),
            [a, b] => Ok(a.or(b)),
        }
    }
}

impl Call {
    pub(super) fn deposits(&self) -> MutexGuard<'_, Deposits> {
        self.deposits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` with the call as the kernels know it.
    fn with_call<T>(
        &self,
        [q, k, v]: [(&Borrowed, &Layout); 3],
        f: impl FnOnce(&cuda::Call) -> Result<T>,
    ) -> Result<T> {
        let guards = [&self.bias, &self.slopes, &self.sinks].map(|x| x.as_ref().map(Tensor::storage_and_layout));
        let [bias, slopes, sinks] =
            guards.each_ref().map(|x| x.as_ref().map(|(storage, layout)| borrow(storage, layout)).transpose());
        let (bias, slopes, sinks) = (bias?, slopes?, sinks?);
        let inputs = Inputs {
            q: q.0.view("query", q.1, self.layout)?,
            k: k.0.view("key", k.1, self.layout)?,
            v: v.0.view("value", v.1, self.layout)?,
            layout: self.layout.in_memory(),
            scale: self.scale,
            softcap: self.softcap,
            mask: self.mask.rule(),
            bias: bias.as_ref().map(|(bias, layout)| bias.bias(layout)).transpose()?,
            slopes: slopes.as_ref().map(|(slopes, layout)| slopes.numbers("ALiBi slopes", layout)).transpose()?,
            sinks: sinks.as_ref().map(|(sinks, layout)| sinks.numbers("sinks", layout)).transpose()?,
            dropout: self.dropout,
        };
        f(&cuda::Call::new(inputs).map_err(AttentionError::from)?)
    }

    /// The context, in the call's layout. What the backward passes need is kept.
    pub(super) fn forward(&self, inputs: [(Stored, &Layout); 3]) -> Result<Box<dyn Memory>> {
        let [q, k, v] = inputs.map(|(stored, layout)| Ok::<_, candle_core::Error>((stored.borrow()?, layout)));
        let (q, k, v) = (q?, k?, v?);
        self.with_call([(&q.0, q.1), (&k.0, k.1), (&v.0, v.1)], |call| {
            let (context, saved) = cuda::forward(self.machine.as_ref(), call).map_err(AttentionError::from)?;
            // The cell is empty, since a call has one forward pass.
            let _ = self.saved.set(saved);
            Ok(context)
        })
    }

    /// What the forward pass has left.
    pub(super) fn saved(&self) -> Result<&Saved> {
        self.saved.get().ok_or_else(|| candle_core::Error::msg("CUDA attention: expected a forward pass before this"))
    }

    /// The gradients of query, key and value. Those of parameters are deposited.
    pub(super) fn backward(&self, args: [&Tensor; 3], incoming: Incoming) -> Result<[Option<Tensor>; 3]> {
        let guards = args.map(|arg| arg.storage_and_layout());
        let [q, k, v] = guards.each_ref().map(|(storage, layout)| borrow(storage, layout));
        let (q, k, v) = (q?, k?, v?);
        let guards = incoming.tensors().map(|x| x.map(Tensor::storage_and_layout));
        let [context, gradient, logsumexp] =
            guards.each_ref().map(|x| x.as_ref().map(|(storage, layout)| borrow(storage, layout)).transpose());
        let (context, gradient, logsumexp) = (context?, gradient?, logsumexp?);
        let gradients = self.with_call([(&q.0, q.1), (&k.0, k.1), (&v.0, v.1)], |call| {
            let context = match (&context, &gradient) {
                (Some(context), Some(gradient)) => Some([
                    context.0.view("context", context.1, self.layout)?,
                    gradient.0.view("gradient of the context", gradient.1, self.layout)?,
                ]),
                _ => None,
            };
            let logsumexp = logsumexp.as_ref().map(|(x, layout)| x.numbers("gradient of the log-sum-exp", layout));
            let incoming = cuda::Incoming { context, logsumexp: logsumexp.transpose()? };
            let gradients = cuda::backward(self.machine.as_ref(), call, self.saved()?, incoming, self.wanted);
            Ok(gradients.map_err(AttentionError::from)?)
        })?;
        self.hand_out(args, gradients, logsumexp.is_some())
    }

    /// The gradients as tensors.
    fn hand_out(
        &self,
        args: [&Tensor; 3],
        gradients: Gradients,
        through_logsumexp: bool,
    ) -> Result<[Option<Tensor>; 3]> {
        let device = args[0].device();
        let of = |memory, x: &Tensor| Ok::<_, candle_core::Error>(Some(tensor(memory, x.dtype(), x.shape(), device)?));
        let Gradients { q, k, v, bias, slope_rows, sink_rows } = gradients;
        let dims = self.layout.bhld(args[0].dims4()?.into());
        let rows = |memory: Option<_>| {
            memory.map(|memory| tensor(memory, DType::F32, (dims[0], dims[1], dims[2]), device)).transpose()
        };
        let bias = match (bias, &self.bias) {
            (Some(memory), Some(bias)) => Some(tensor(memory, DType::F32, bias.shape(), device)?),
            _ => None,
        };
        let mut deposits = self.deposits();
        deposits.bias.put(through_logsumexp, bias);
        deposits.slopes.put(through_logsumexp, rows(slope_rows)?);
        deposits.sinks.put(through_logsumexp, rows(sink_rows)?);
        Ok([of(q, args[0])?, of(k, args[1])?, of(v, args[2])?])
    }
}

fn borrow<'a>(storage: &'a Storage, layout: &'a Layout) -> Result<(Borrowed<'a>, &'a Layout)> {
    Ok((Stored::of(storage)?.borrow()?, layout))
}

/// The gradient of one of a call's results.
pub(super) enum Incoming<'a> {
    /// The context, and its gradient in the same layout.
    Context(&'a Tensor, Tensor),
    /// The gradient of the log-sum-exp, contiguous.
    LogSumExp(Tensor),
}

impl Incoming<'_> {
    /// The context, its gradient, and the gradient of the log-sum-exp.
    fn tensors(&self) -> [Option<&Tensor>; 3] {
        match self {
            Self::Context(context, gradient) => [Some(context), Some(gradient), None],
            Self::LogSumExp(gradient) => [None, None, Some(gradient)],
        }
    }
}
