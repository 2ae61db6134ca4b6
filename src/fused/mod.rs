//! The fast path: attention as one candle operation with a gradient, which holds no q_len x kv_len matrix but those that
//! it was given: a bias, and its gradient.
//!
//! This file is the safe seam. It decides what the operation serves, hands the kernels views that have been checked
//! against their storage, and keeps what the backward pass needs: its inputs, its output, and the log-sum-exp.

#![allow(unsafe_code)] // here and below; every block says what makes it sound

mod cpu;

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, D, DType, Device, Layout, Shape, Storage, Tensor};
use half::{bf16, f16};

use crate::axes::Axes;
use crate::error::AttentionError;
use crate::mask::Mask;
use crate::options::{AttentionOptions, AttentionOutput};
use crate::range::may_overflow;
use cpu::{Bias, Dropout, Element, Problem, View};

/// Whether [`attention`] can do this; what it can't is left to the reference.
pub(crate) fn check(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<(), AttentionError> {
    let refuse = |expected, got| Err(AttentionError::Backend { expected, got });
    if !matches!(q.device(), Device::Cpu) {
        return refuse("tensors on the CPU", "another device");
    }
    if [q, k, v].iter().any(|tensor| tensor.elem_count() == 0) {
        return refuse("tensors that hold something", "an empty one");
    }
    if options.alibi_slopes.as_ref().is_some_and(Tensor::track_op) {
        return refuse("ALiBi slopes that are constants", "slopes that want a gradient");
    }
    Ok(())
}

/// Attention over inputs that have been checked and are served. Gives context and log-sum-exp, but no weights; nothing
/// at all where finite inputs are so large that scores overflow, which only the reference deals with.
pub(crate) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &AttentionOptions,
    axes: Axes,
) -> candle_core::Result<Option<AttentionOutput>> {
    let dtype = q.dtype();
    let want_logsumexp = options.return_logsumexp || options.sinks.is_some();
    // The result of the operation has one dtype, and a log-sum-exp wants f32 at least.
    let half = matches!(dtype, DType::F16 | DType::BF16);
    let widen = |x: &Tensor| if half && want_logsumexp { x.to_dtype(DType::F32) } else { Ok(x.clone()) };
    let (q, k, v) = (unit_stride(&widen(q)?)?, unit_stride(&widen(k)?)?, unit_stride(&widen(v)?)?);
    let compute = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let constant = |x: &Option<Tensor>| x.as_ref().map(|x| x.detach().to_dtype(compute)).transpose();
    let trained_bias = options.attn_bias.as_ref().filter(|bias| bias.track_op());
    let scale = options.scale.unwrap_or(1.0 / (q.dim(D::Minus1)? as f64).sqrt());
    let op = FusedAttention {
        scale,
        softcap: options.softcap,
        mask: options.attn_mask.clone(),
        bias: if trained_bias.is_some() { None } else { constant(&options.attn_bias)? },
        slopes: constant(&options.alibi_slopes)?.map(|slopes| slopes.contiguous()).transpose()?,
        dropout: (options.dropout_p > 0.0).then_some(Dropout { p: options.dropout_p, seed: options.dropout_seed }),
        packed: trained_bias.map(|_| Packed::new(&k, &v)).transpose()?,
        axes,
        pack_logsumexp: want_logsumexp,
        logsumexp: Arc::default(),
    };
    let logsumexp = op.logsumexp.clone();
    let (batch, heads, q_len) = axes.of(q.dims4()?);
    let value_dim = v.dim(D::Minus1)?;
    let result = match trained_bias {
        // candle's operations take three inputs: to give the bias a gradient, key and value become one.
        Some(bias) => {
            let kv = Tensor::cat(&[k.flatten_all()?, v.flatten_all()?], 0)?;
            q.apply_op3(&kv, &bias.to_dtype(compute)?, op)?
        }
        None => q.apply_op3(&k, &v, op)?,
    };
    if logsumexp.get().is_some_and(LogSumExp::is_strange) && may_overflow(&q, &k, scale)? {
        return Ok(None);
    }
    let entries = batch * q_len * heads * value_dim;
    let context = if want_logsumexp { result.narrow(0, 0, entries)? } else { result.clone() };
    let mut context = context.reshape(axes.arrange(batch, heads, q_len, value_dim))?;
    let mut logsumexp = None;
    if want_logsumexp {
        let mut own = result.narrow(0, entries, batch * heads * q_len)?.reshape((batch, heads, q_len))?;
        if let Some(sinks) = &options.sinks {
            let heads_first = axes.swap(&context)?;
            (context, own) = with_sinks(&heads_first, &own, &sinks.to_dtype(compute)?)?;
            context = axes.swap(&context)?;
        }
        logsumexp = options.return_logsumexp.then_some(own);
    }
    Ok(Some(AttentionOutput { context: context.to_dtype(dtype)?, weights: None, logsumexp }))
}

/// A sink is a key with a score and a value of zero: it takes its share of the sum, and the others keep theirs.
fn with_sinks(context: &Tensor, logsumexp: &Tensor, sinks: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
    let sinks = sinks.reshape((1, (), 1))?.broadcast_as(logsumexp.shape())?;
    let largest = logsumexp.detach().maximum(&sinks.detach())?;
    // Nothing to attend to, and no sink either.
    let none = largest.eq(f64::NEG_INFINITY)?;
    let largest = none.where_cond(&largest.zeros_like()?, &largest)?;
    let sum = ((logsumexp - &largest)?.exp()? + (&sinks - &largest)?.exp()?)?;
    let with_sink = (none.where_cond(&sum.ones_like()?, &sum)?.log()? + largest)?;
    let share = (logsumexp - &with_sink)?.exp()?;
    let with_sink = none.where_cond(logsumexp, &with_sink)?;
    Ok((context.broadcast_mul(&share.unsqueeze(D::Minus1)?)?, with_sink))
}

/// The kernels take any strides, but for the last axis.
fn unit_stride(x: &Tensor) -> candle_core::Result<Tensor> {
    if x.stride().last() == Some(&1) || x.dim(D::Minus1)? == 1 {
        return Ok(x.clone());
    }
    // A copy that fails would abort the process: a view that repeats a row may be larger than memory.
    room::<u8>("copy of an input", x.elem_count().saturating_mul(x.dtype().size_in_bytes()))?;
    x.contiguous()
}

/// An empty vector with room for `count`, or an error that says for what there is no memory.
pub(crate) fn room<T>(what: &'static str, count: usize) -> candle_core::Result<Vec<T>> {
    let mut vector = Vec::new();
    let bytes = count.saturating_mul(size_of::<T>());
    vector.try_reserve_exact(count).map_err(|_| AttentionError::Memory { what, bytes })?;
    Ok(vector)
}

/// Key and value in one tensor, one after the other.
#[derive(Clone)]
struct Packed {
    key: Layout,
    value: Layout,
}

impl Packed {
    fn new(k: &Tensor, v: &Tensor) -> candle_core::Result<Self> {
        let value = Layout::contiguous_with_offset(v.shape().clone(), k.elem_count());
        Ok(Self { key: Layout::contiguous(k.shape().clone()), value })
    }
}

/// The log-sum-exp (batch, num_heads, q_len) of the forward pass.
enum LogSumExp {
    F32(Vec<f32>),
    F64(Vec<f64>),
}

impl LogSumExp {
    /// Whether there was nothing to attend to, or scores overflowed, or an input was not finite.
    fn is_strange(&self) -> bool {
        match self {
            LogSumExp::F32(x) => x.iter().any(|x| !x.is_finite()),
            LogSumExp::F64(x) => x.iter().any(|x| !x.is_finite()),
        }
    }
}

/// Ties an element to the variants that hold it.
trait Stored: Element {
    fn save(logsumexp: Vec<Self::Real>) -> LogSumExp;
    fn saved(logsumexp: &LogSumExp) -> Option<&[Self::Real]>;
}

macro_rules! stored {
    ($($element:ty => $variant:ident),*) => {$(
        impl Stored for $element {
            fn save(logsumexp: Vec<Self::Real>) -> LogSumExp {
                LogSumExp::$variant(logsumexp)
            }
            fn saved(logsumexp: &LogSumExp) -> Option<&[Self::Real]> {
                match logsumexp {
                    LogSumExp::$variant(x) => Some(x),
                    _ => None,
                }
            }
        }
    )*};
}

stored!(f16 => F32, bf16 => F32, f32 => F32, f64 => F64);

/// One call. Inputs: query, key and value; or query, key and value packed, and the bias.
struct FusedAttention {
    scale: f64,
    softcap: Option<f64>,
    mask: Mask,
    bias: Option<Tensor>,
    slopes: Option<Tensor>,
    dropout: Option<Dropout>,
    axes: Axes,
    packed: Option<Packed>,
    pack_logsumexp: bool,
    logsumexp: Arc<OnceLock<LogSumExp>>,
}

/// Three inputs as the operation got them.
type Inputs<'a> = [(&'a CpuStorage, &'a Layout); 3];

impl FusedAttention {
    /// Runs `f` on the problem that the inputs pose.
    fn with_problem<E: Element, T>(
        &self,
        inputs: Inputs,
        f: impl FnOnce(&Problem<E>) -> candle_core::Result<T>,
    ) -> candle_core::Result<T> {
        let [(q, q_layout), (second, second_layout), (third, third_layout)] = inputs;
        let (k, v) = match &self.packed {
            Some(packed) => {
                let start = second_layout.start_offset();
                let at = |layout: &Layout| {
                    Layout::contiguous_with_offset(layout.shape().clone(), start + layout.start_offset())
                };
                (self.view::<E>(second, &at(&packed.key))?, self.view::<E>(second, &at(&packed.value))?)
            }
            None => (self.view::<E>(second, second_layout)?, self.view::<E>(third, third_layout)?),
        };
        let q = self.view::<E>(q, q_layout)?;
        let constant_bias = self.bias.as_ref().map(|bias| bias.storage_and_layout());
        let bias = match (&self.packed, &constant_bias) {
            (Some(_), _) => Some(bias_view::<E>(third, third_layout)?),
            (None, Some((storage, layout))) => Some(bias_view::<E>(cpu_storage(storage)?, layout)?),
            (None, None) => None,
        };
        let slopes = self.slopes.as_ref().map(|slopes| slopes.storage_and_layout());
        let slopes = match &slopes {
            Some((storage, layout)) => {
                let slopes = cpu_storage(storage)?.as_slice::<E::Real>()?;
                Some(&slopes[layout.start_offset()..][..layout.shape().elem_count()])
            }
            None => None,
        };
        f(&Problem {
            q,
            k,
            v,
            scale: self.scale,
            softcap: self.softcap,
            mask: &self.mask,
            bias,
            slopes,
            dropout: self.dropout,
        })
    }

    fn view<'a, E: Element>(&self, storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<View<'a, E>> {
        let shape = layout.shape().dims4()?;
        let (batch, heads, len) = self.axes.of(shape);
        let (by_sequence, by_head, by_place) =
            self.axes.of((layout.stride()[0], layout.stride()[1], layout.stride()[2], 1));
        let data = &storage.as_slice::<E>()?[layout.start_offset()..];
        View::new(data, [by_sequence, by_head, by_place], [batch, heads, len, shape.3]).ok_or_else(|| missing("input"))
    }

    fn forward<E: Stored>(&self, inputs: Inputs) -> candle_core::Result<(CpuStorage, Shape)>
    where
        E::Real: Element<Real = E::Real>,
    {
        self.with_problem::<E, _>(inputs, |problem| {
            let [batch, heads, q_len, _] = problem.q.dims();
            let dv = problem.value_dim();
            let strides = self.axes.strides(heads, q_len, dv);
            let cpu::Output { context: mut result, logsumexp } = cpu::forward(problem, strides)?;
            let shape = if self.pack_logsumexp {
                // f32 or f64 here, so that nothing is lost.
                result.extend(logsumexp.iter().map(|&x| E::narrow(x)));
                Shape::from(result.len())
            } else {
                Shape::from(self.axes.arrange(batch, heads, q_len, dv))
            };
            // Set once: an operation is made for one call.
            let _ = self.logsumexp.set(E::save(logsumexp));
            Ok((E::to_cpu_storage_owned(result), shape))
        })
    }

    fn backward<E: Stored>(
        &self,
        args: [&Tensor; 3],
        result: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<[Option<Tensor>; 3]> {
        let guards = args.map(|arg| arg.storage_and_layout());
        let [(s1, l1), (s2, l2), (s3, l3)] = &guards;
        let inputs = [(cpu_storage(s1)?, *l1), (cpu_storage(s2)?, *l2), (cpu_storage(s3)?, *l3)];
        let grads = self.with_problem::<E, _>(inputs, |problem| {
            let [batch, heads, q_len, _] = problem.q.dims();
            let dv = problem.value_dim();
            let entries = batch * heads * q_len * dv;
            // Both have the context's axes, with the log-sum-exp behind if it is packed.
            let (by_head, by_place) = self.axes.strides(heads, q_len, dv);
            let (dims, strides) = ([batch, heads, q_len, dv], [q_len * heads * dv, by_head, by_place]);
            let (result, grad) = (result.detach(), grad.detach().contiguous()?);
            let (result_guard, grad_guard) = (result.storage_and_layout(), grad.storage_and_layout());
            let (result, grad) = (numbers(&result_guard.0, result_guard.1)?, numbers(&grad_guard.0, grad_guard.1)?);
            let logsumexp = self.logsumexp.get().and_then(E::saved).ok_or_else(|| missing("log-sum-exp"))?;
            let saved =
                cpu::Saved { context: View::new(result, strides, dims).ok_or_else(|| missing("context"))?, logsumexp };
            let incoming = cpu::Incoming {
                context: View::new(grad, strides, dims).ok_or_else(|| missing("gradient"))?,
                logsumexp: self.pack_logsumexp.then(|| E::as_real(&grad[entries..])).flatten(),
            };
            let bias_dims = self.packed.as_ref().map(|_| aligned(args[2].dims()));
            cpu::backward(problem, saved, incoming, bias_dims, |heads, len, dim| self.axes.strides(heads, len, dim))
        })?;
        let q = args[0];
        let grad_q = Tensor::from_vec(grads.q, q.shape(), q.device())?;
        let Some(packed) = &self.packed else {
            let grad_k = Tensor::from_vec(grads.k, args[1].shape(), q.device())?;
            let grad_v = Tensor::from_vec(grads.v, args[2].shape(), q.device())?;
            return Ok([Some(grad_q), Some(grad_k), Some(grad_v)]);
        };
        let mut kv = grads.k;
        kv.extend(grads.v);
        debug_assert_eq!(kv.len(), packed.key.shape().elem_count() + packed.value.shape().elem_count());
        let grad_kv = Tensor::from_vec(kv, args[1].shape(), q.device())?;
        let grad_bias = grads.bias.ok_or_else(|| missing("gradient of the bias"))?;
        let grad_bias = Tensor::from_vec(grad_bias, args[2].shape(), q.device())?;
        Ok([Some(grad_q), Some(grad_kv), Some(grad_bias)])
    }
}

impl CustomOp3 for FusedAttention {
    fn name(&self) -> &'static str {
        "fused-attention"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let inputs = [(s1, l1), (s2, l2), (s3, l3)];
        match s1 {
            CpuStorage::F16(_) => self.forward::<f16>(inputs),
            CpuStorage::BF16(_) => self.forward::<bf16>(inputs),
            CpuStorage::F64(_) => self.forward::<f64>(inputs),
            _ => self.forward::<f32>(inputs),
        }
    }

    fn bwd(
        &self,
        arg1: &Tensor,
        arg2: &Tensor,
        arg3: &Tensor,
        res: &Tensor,
        grad_res: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let args = [arg1, arg2, arg3];
        let [q, k, v] = match arg1.dtype() {
            DType::F16 => self.backward::<f16>(args, res, grad_res),
            DType::BF16 => self.backward::<bf16>(args, res, grad_res),
            DType::F64 => self.backward::<f64>(args, res, grad_res),
            _ => self.backward::<f32>(args, res, grad_res),
        }?;
        Ok((q, k, v))
    }
}

fn cpu_storage(storage: &Storage) -> candle_core::Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => Err(candle_core::Error::msg("fused attention: expected a tensor on the CPU")),
    }
}

fn numbers<'a, E: Element>(storage: &'a Storage, layout: &Layout) -> candle_core::Result<&'a [E]> {
    Ok(&cpu_storage(storage)?.as_slice::<E>()?[layout.start_offset()..])
}

fn missing(what: &str) -> candle_core::Error {
    candle_core::Error::msg(format!("fused attention: the {what} doesn't fit its shape"))
}

/// The sizes of the last of four axes; those before are 1.
fn aligned(dims: &[usize]) -> [usize; 4] {
    let mut all = [1; 4];
    all[4 - dims.len()..].copy_from_slice(dims);
    all
}

fn bias_view<'a, E: Element>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<Bias<'a, E::Real>> {
    let mut strides = [0; 4];
    strides[4 - layout.shape().rank()..].copy_from_slice(layout.stride());
    let dims = aligned(layout.dims());
    Ok(Bias::new(&storage.as_slice::<E::Real>()?[layout.start_offset()..], dims, strides))
}
