//! The fast path: attention as one candle operation with a gradient. It allocates no q_len x kv_len matrix, except for
//! the gradient of a bias of that size.
//!
//! This file connects candle's tensors with the kernels. It decides which calls the kernels can serve, makes views of
//! the tensors' storage, and keeps what the backward pass needs: inputs, output and log-sum-exp.

use std::sync::{Arc, OnceLock};

use attention_kernels::{self as kernels, BiasView, Dropout, HeadNumbers, ProblemOptions, View};
use candle_core::{CpuStorage, CustomOp3, D, DType, Device, Layout, Shape, Storage, Tensor, WithDType};
use half::{bf16, f16};

use crate::check::compute_dtype;
use crate::empty::connected;
use crate::error::AttentionError;
use crate::gradient::give;
use crate::mask::Mask;
use crate::memory;
use crate::parallel::context::{self, Call, ContextParallel};
use crate::sdpa::checks::Checked;
use crate::sdpa::head_layout::HeadLayout;
use crate::sdpa::options::AttentionOutput;
use crate::sdpa::overflow::Range;

/// What an option is in an error of memory, in the dtype to compute in.
const WIDENED_OPTION: &str = "widened bias or slopes";

/// Context and log-sum-exp without weights, or the reason why only the reference can compute them.
pub(crate) fn attention(checked: &Checked) -> candle_core::Result<Result<AttentionOutput, AttentionError>> {
    if let Some(reason) = unsupported(checked) {
        return Ok(Err(reason));
    }
    let Checked { options, layout, scale, .. } = *checked;
    let dtype = checked.q.dtype();
    let want_logsumexp = options.return_logsumexp || options.sinks.is_some();
    // The operation's result has one dtype, and a log-sum-exp needs at least f32.
    let wide = if want_logsumexp { compute_dtype(dtype) } else { dtype };
    let widen = |x: &Tensor| memory::cast("widened input", x, wide);
    let [q, k, v] = checked.inputs.each_ref().map(|x| unit_stride(&widen(x)?));
    let (q, k, v) = (q?, k?, v?);
    let compute = compute_dtype(dtype);
    let constant =
        |x: &Option<Tensor>| x.as_ref().map(|x| memory::cast(WIDENED_OPTION, &x.detach(), compute)).transpose();
    let trained_bias = options.attn_bias.as_ref().filter(|bias| bias.track_op());
    let op = FusedAttention {
        scale,
        softcap: options.softcap(),
        mask: options.attn_mask.clone(),
        bias: if trained_bias.is_some() { None } else { constant(&options.attn_bias)? },
        slopes: constant(&options.alibi_slopes)?
            .map(|slopes| memory::contiguous("ALiBi slopes", &slopes))
            .transpose()?,
        dropout: options.dropout(checked.heads.map_or(checked.scores.num_heads, |heads| heads.count)),
        packed: trained_bias.map(|_| PackedKv::new(&k, &v)),
        layout,
        pack_logsumexp: want_logsumexp,
        parallel: options.parallel.clone(),
        heads: checked.heads,
        logsumexp: Arc::default(),
    };
    let logsumexp = op.logsumexp.clone();
    let result = match trained_bias {
        // A candle operation takes at most three inputs. If the bias needs a gradient, key and value become one input.
        Some(bias) => {
            // A contiguous copy of each, and both together.
            let both = [&k, &v].map(|x| memory::bytes(x.dims(), x.dtype()).saturating_mul(2));
            memory::ask("key and value in one tensor", q.device(), memory::sum(both))?;
            let kv = Tensor::cat(&[k.flatten_all()?, v.flatten_all()?], 0)?;
            q.apply_op3(&kv, &memory::cast(WIDENED_OPTION, bias, compute)?, op)?
        }
        None => q.apply_op3(&k, &v, op)?,
    };
    // Several ranks have looked for that before, since all have to know.
    if options.parallel.is_none() && logsumexp.get().is_some_and(LogSumExp::has_non_finite) {
        let extras = [options.attn_bias.as_ref(), options.alibi_slopes.as_ref()];
        let range = Range::read(&checked.q, &checked.k, scale, None, extras)?;
        if range.scores_may_overflow || range.sums_may_overflow {
            let (expected, got) = ("scores that don't overflow", "inputs so large that they do");
            return Ok(Err(AttentionError::Backend { expected, got }));
        }
    }
    Ok(Ok(unpack(checked, &result, want_logsumexp)?))
}

/// The reason why the kernels can't serve this call, if there is one.
fn unsupported(checked: &Checked) -> Option<AttentionError> {
    let refuse = |expected, got| Some(AttentionError::Backend { expected, got });
    let Checked { q, k, v, options, .. } = checked;
    if !matches!(q.device(), Device::Cpu) {
        return refuse("tensors on the CPU", "another device");
    }
    // A rank without tokens takes part in what the others do.
    if options.parallel.is_none() && [q, k, v].iter().any(|tensor| tensor.elem_count() == 0) {
        return refuse("tensors that are not empty", "an empty one");
    }
    if options.alibi_slopes.as_ref().is_some_and(Tensor::track_op) {
        return refuse("ALiBi slopes that are constants", "slopes that want a gradient");
    }
    None
}

/// Context and log-sum-exp from the operation's result. If a log-sum-exp is wanted, the result holds it after the
/// context.
fn unpack(checked: &Checked, result: &Tensor, with_logsumexp: bool) -> candle_core::Result<AttentionOutput> {
    let Checked { scores, layout, value_dim, options, .. } = *checked;
    let (dtype, q_len) = (checked.q.dtype(), checked.q.dim(2)?);
    let rows = scores.batch * scores.num_heads * q_len;
    if !with_logsumexp {
        // It has its shape: candle would copy and add the gradient of a reshape that changes nothing.
        return Ok(AttentionOutput { context: result.clone(), weights: None, scores: None, logsumexp: None });
    }
    // The sums with a sink, each for every row; the context, times the share of the keys, in the input's dtype.
    let bytes = memory::bytes(&[rows, 10], result.dtype());
    let contexts = memory::bytes(&[rows, value_dim, 2], result.dtype());
    memory::ask("context beside its sinks", result.device(), memory::sum([bytes, contexts]))?;
    let shape = layout.shape(scores.batch, scores.num_heads, q_len, value_dim);
    let mut context = result.narrow(0, 0, rows * value_dim)?.reshape(shape)?;
    let numbers = |start: usize| result.narrow(0, start, rows)?.reshape((scores.batch, scores.num_heads, q_len));
    let log_total = numbers(rows * value_dim)?;
    // The results don't depend on it, only on the sum of both, so that it needs no gradient.
    let largest = numbers(rows * (value_dim + 1))?.detach();
    let logsumexp = match &options.sinks {
        Some(sinks) => {
            let sinks = sinks.to_dtype(compute_dtype(dtype))?;
            if rows == 0 {
                // A rank without tokens: candle would give the sinks no gradient.
                context = connected(context, &sinks)?;
                connected(log_total, &sinks)?
            } else {
                let (share, logsumexp) = share_and_logsumexp(&largest, &log_total, &sinks)?;
                let bhld = layout.transpose(&context)?.broadcast_mul(&share.unsqueeze(D::Minus1)?)?;
                context = layout.transpose(&bhld)?;
                logsumexp
            }
        }
        None => (log_total + largest)?,
    };
    let logsumexp = options.return_logsumexp.then_some(logsumexp);
    Ok(AttentionOutput { context: context.to_dtype(dtype)?, weights: None, scores: None, logsumexp })
}

/// The share that a sink leaves to the keys, exp(lse) / (exp(lse) + exp(sink)), and the log-sum-exp with the sink, where
/// lse = largest + log_total is that of the keys. A sink is a key with a learned score and a value of zero.
fn share_and_logsumexp(largest: &Tensor, log_total: &Tensor, sinks: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
    let sinks = sinks.reshape((1, (), 1))?.broadcast_as(largest.shape())?;
    let shift = largest.maximum(&sinks.detach())?;
    // These rows have no visible key, and a sink of minus infinity.
    let none = shift.eq(f64::NEG_INFINITY)?;
    let shift = none.where_cond(&shift.zeros_like()?, &shift)?;
    // The small number is added last: beside a large score it would be lost.
    let of_keys = (log_total + (largest - &shift)?)?.exp()?;
    let sum = (&of_keys + (&sinks - &shift)?.exp()?)?;
    let sum = none.where_cond(&sum.ones_like()?, &sum)?;
    let logsumexp = none.where_cond(largest, &(sum.log()? + shift)?)?;
    Ok(((of_keys / sum)?, logsumexp))
}

/// `x` with stride 1 along the last axis. The kernels take any strides for the other axes.
fn unit_stride(x: &Tensor) -> candle_core::Result<Tensor> {
    if x.stride().last() == Some(&1) || x.dim(D::Minus1)? == 1 {
        return Ok(x.clone());
    }
    memory::contiguous("copy of an input", x)
}

/// The layouts of key and value in the tensor that holds both, first the key and then the value.
struct PackedKv {
    key: Layout,
    value: Layout,
}

impl PackedKv {
    fn new(k: &Tensor, v: &Tensor) -> Self {
        let value = Layout::contiguous_with_offset(v.shape().clone(), k.elem_count());
        Self { key: Layout::contiguous(k.shape().clone()), value }
    }
}

/// The log-sum-exp (batch, num_heads, q_len) of the forward pass.
enum LogSumExp {
    F32(Vec<kernels::LogSumExp<f32>>),
    F64(Vec<kernels::LogSumExp<f64>>),
}

impl LogSumExp {
    /// Whether a row is infinite or NaN: its query attends to nothing, its scores overflowed, or an input was not
    /// finite.
    fn has_non_finite(&self) -> bool {
        match self {
            LogSumExp::F32(x) => x.iter().any(|x| !x.value().is_finite()),
            LogSumExp::F64(x) => x.iter().any(|x| !x.value().is_finite()),
        }
    }
}

/// A type of number that both candle and the kernels know, and the variant of [`LogSumExp`] for it.
trait Stored: context::Dtype {
    fn save(logsumexp: Vec<kernels::LogSumExp<Self::Float>>) -> LogSumExp;
    fn saved(logsumexp: &LogSumExp) -> Option<&[kernels::LogSumExp<Self::Float>]>;
}

macro_rules! stored {
    ($($element:ty => $variant:ident),*) => {$(
        impl Stored for $element {
            fn save(logsumexp: Vec<kernels::LogSumExp<Self::Float>>) -> LogSumExp {
                LogSumExp::$variant(logsumexp)
            }
            fn saved(logsumexp: &LogSumExp) -> Option<&[kernels::LogSumExp<Self::Float>]> {
                match logsumexp {
                    LogSumExp::$variant(x) => Some(x),
                    _ => None,
                }
            }
        }
    )*};
}

stored!(f16 => F32, bf16 => F32, f32 => F32, f64 => F64);

/// The operation of one call. Its inputs are query, key and value; or, with a trained bias, query, key and value in one
/// tensor, and the bias.
struct FusedAttention {
    scale: f64,
    softcap: Option<f64>,
    mask: Mask,
    /// A bias without a gradient.
    bias: Option<Tensor>,
    slopes: Option<Tensor>,
    dropout: Option<Dropout>,
    layout: HeadLayout,
    packed: Option<PackedKv>,
    pack_logsumexp: bool,
    /// The ranks that share the sequence.
    parallel: Option<ContextParallel>,
    /// The numbers of the heads that dropout counts.
    heads: Option<HeadNumbers>,
    logsumexp: Arc<OnceLock<LogSumExp>>,
}

/// The three inputs of the operation.
type Inputs<'a> = [(&'a CpuStorage, &'a Layout); 3];

impl FusedAttention {
    /// Builds the kernels' call from the inputs, and runs `f` on it.
    fn with_call<E: Stored, T>(
        &self,
        inputs: Inputs,
        f: impl FnOnce(&Call<E>) -> candle_core::Result<T>,
    ) -> candle_core::Result<T> {
        let [(q, q_layout), (second, second_layout), (third, third_layout)] = inputs;
        let q = self.view::<E>("query", q, q_layout)?;
        let (k, v) = match &self.packed {
            Some(packed) => {
                let start = second_layout.start_offset();
                let at = |layout: &Layout| {
                    Layout::contiguous_with_offset(layout.shape().clone(), start + layout.start_offset())
                };
                (self.view::<E>("key", second, &at(&packed.key))?, self.view::<E>("value", second, &at(&packed.value))?)
            }
            None => (self.view::<E>("key", second, second_layout)?, self.view::<E>("value", third, third_layout)?),
        };
        let constant_bias = self.bias.as_ref().map(|bias| bias.storage_and_layout());
        let bias = match (&self.packed, &constant_bias) {
            (Some(_), _) => Some(bias_view::<E>(third, third_layout)?),
            (None, Some((storage, layout))) => Some(bias_view::<E>(cpu_storage(storage)?, layout)?),
            (None, None) => None,
        };
        let slopes = self.slopes.as_ref().map(|slopes| slopes.storage_and_layout());
        let slopes = match &slopes {
            Some((storage, layout)) => Some(&numbers::<E::Float>(storage, layout)?[..layout.shape().elem_count()]),
            None => None,
        };
        let options = ProblemOptions {
            scale: Some(self.scale),
            softcap: self.softcap,
            mask: self.mask.rule(),
            bias,
            slopes,
            dropout: self.dropout,
            part: None,
            heads: self.heads,
        };
        f(&Call { q, k, v, options, layout: self.layout.in_memory() })
    }

    fn view<'a, E: Stored>(
        &self,
        what: &'static str,
        storage: &'a CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<View<'a, E>> {
        let (shape, stride) = (layout.shape().dims4()?, layout.stride());
        let dims = self.layout.bhld([shape.0, shape.1, shape.2, shape.3]);
        let [batch, head, token, _] = self.layout.bhld([stride[0], stride[1], stride[2], 1]);
        let data = &storage.as_slice::<E>()?[layout.start_offset()..];
        Ok(View::new(what, data, [batch, head, token], dims).map_err(AttentionError::from)?)
    }

    fn forward<E: Stored>(&self, inputs: Inputs) -> candle_core::Result<(CpuStorage, Shape)> {
        self.with_call::<E, _>(inputs, |call| {
            let [batch, heads, q_len, dv] = call.context_dims();
            let output = call.forward(self.parallel.as_ref())?;
            let kernels::Output { context: mut result, logsumexp } = output;
            let shape = if self.pack_logsumexp {
                // The operation then computes in f32 or f64, so that the log-sum-exp loses no precision.
                let rows = logsumexp.len();
                let number = |i: usize| match i.checked_sub(rows) {
                    None => E::narrow(logsumexp[i].log_total()),
                    Some(i) => E::narrow(logsumexp[i].largest()),
                };
                memory::append("context and log-sum-exp", &mut result, (0..2 * rows).map(number))?;
                Shape::from(result.len())
            } else {
                Shape::from(self.layout.shape(batch, heads, q_len, dv))
            };
            // The cell is empty, since an operation serves only one call.
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
        let grads = self.with_call::<E, _>(inputs, |call| {
            let dims = call.context_dims();
            let strides = self.layout.in_memory().strides(dims);
            // Both hold the context, followed by the two numbers of the log-sum-exp if it is packed.
            let (kept, grad) = (result.detach(), memory::contiguous("gradient of the context", &grad.detach())?);
            let (result_guard, grad_guard) = (kept.storage_and_layout(), grad.storage_and_layout());
            let (result, grad) =
                (numbers::<E>(&result_guard.0, result_guard.1)?, numbers::<E>(&grad_guard.0, grad_guard.1)?);
            let context = |what, data| View::new(what, data, strides, dims).map_err(AttentionError::from);
            let missing = || candle_core::Error::msg("fused attention: the forward pass has left no log-sum-exp");
            let logsumexp = self.logsumexp.get().and_then(E::saved).ok_or_else(missing)?;
            let saved = kernels::Saved { context: context("context", result)?, logsumexp };
            let (entries, rows) = (dims.iter().product::<usize>(), logsumexp.len());
            let grad_logsumexp = self.pack_logsumexp.then(|| E::as_floats(&grad[entries..][..rows])).flatten();
            let incoming =
                kernels::Incoming { context: context("gradient of the context", grad)?, logsumexp: grad_logsumexp };
            Ok(call.backward(self.parallel.as_ref(), saved, incoming, self.packed.is_some())?)
        })?;
        let given = |argument: &Tensor, numbers: Vec<E>| {
            give(argument, result, Tensor::from_vec(numbers, argument.shape(), argument.device())?)
        };
        let [q, k, v] = args;
        if self.packed.is_none() {
            return Ok([given(q, grads.q)?, given(k, grads.k)?, given(v, grads.v)?]);
        }
        let mut kv = grads.k;
        memory::append("gradients of key and value", &mut kv, grads.v.into_iter())?;
        let bias = v;
        let of_bias = grads.bias.map(|numbers| Tensor::from_vec(numbers, bias.shape(), bias.device())).transpose()?;
        let of_bias = of_bias.map(|gradient| give(bias, result, gradient)).transpose()?.flatten();
        Ok([given(q, grads.q)?, given(k, kv)?, of_bias])
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

/// The numbers of a tensor's storage, from its first on.
fn numbers<'a, T: WithDType>(storage: &'a Storage, layout: &Layout) -> candle_core::Result<&'a [T]> {
    Ok(&cpu_storage(storage)?.as_slice::<T>()?[layout.start_offset()..])
}

/// A bias with axes of length 1 before its own.
fn bias_view<'a, E: Stored>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<BiasView<'a, E::Float>> {
    let (mut dims, mut strides) = ([1; 4], [0; 4]);
    let first = 4 - layout.shape().rank();
    dims[first..].copy_from_slice(layout.dims());
    strides[first..].copy_from_slice(layout.stride());
    let data = &storage.as_slice::<E::Float>()?[layout.start_offset()..];
    Ok(BiasView::new(data, dims, strides).map_err(AttentionError::from)?)
}
