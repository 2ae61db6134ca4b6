//! Attention by the CUDA kernels, as candle operations with gradients: no q_len x kv_len matrix, and no wait for the device.
//!
//! The context has the dtype of the inputs. The log-sum-exp is an operation of its own, so that a request for it widens nothing.

mod call;
#[cfg(feature = "cuda")]
mod gpu;
mod ops;
mod storage;

use std::sync::Arc;

use attention_kernels::cuda::{MAX_DIM, Wanted};
use candle_core::{D, DType, Device, Tensor};

use crate::error::{AttentionError, Error};
use crate::memory;
use crate::sdpa::checks::Checked;
use crate::sdpa::options::{AttentionOutput, Backend};
use call::Call;
use ops::{Attention, Carrier, LogSumExp, Parameter};
pub use storage::with_machine;

/// What an option is in an error of memory.
const OPTION: &str = "bias, slopes or sinks in f32";

/// Whether these kernels are to serve a call that leaves the choice or asks for a fused path: on every GPU, and on the emulator if it is asked
/// for.
pub(crate) fn is_asked(checked: &Checked) -> bool {
    match checked.q.device() {
        Device::Cuda(_) => true,
        Device::Cpu => checked.options.backend == Backend::Fused && storage::has_emulator(),
        _ => false,
    }
}

/// Context and log-sum-exp without weights, or the reason why only the reference can compute them.
pub(crate) fn attention(checked: &Checked) -> candle_core::Result<Result<AttentionOutput, AttentionError>> {
    if let Some(reason) = unsupported(checked) {
        return Ok(Err(reason));
    }
    let machine = match storage::machine_of(checked.q.device()) {
        Ok(machine) => machine,
        Err(reason) => return Ok(Err(reason)),
    };
    let Checked { options, layout, scale, .. } = *checked;
    let [q, k, v] = checked.inputs.each_ref().map(unit_stride);
    let (q, k, v) = (q?, k?, v?);
    let wide = |x: &Option<Tensor>| x.as_ref().map(|x| memory::cast(OPTION, &x.detach(), DType::F32)).transpose();
    let contiguous = |x: Option<Tensor>| x.map(|x| memory::contiguous(OPTION, &x)).transpose();
    let is_trained = |x: &Option<Tensor>| x.as_ref().is_some_and(Tensor::track_op);
    let call = Arc::new(Call {
        machine,
        layout,
        scale,
        softcap: options.softcap(),
        mask: options.attn_mask.clone(),
        bias: wide(&options.attn_bias)?,
        slopes: contiguous(wide(&options.alibi_slopes)?)?,
        sinks: contiguous(wide(&options.sinks)?)?,
        dropout: options.dropout(checked.scores.num_heads),
        wanted: Wanted {
            bias: is_trained(&options.attn_bias),
            slopes: is_trained(&options.alibi_slopes),
            sinks: is_trained(&options.sinks),
        },
        saved: Default::default(),
        deposits: Default::default(),
    });
    let v = with_parameters(checked, &call, v)?;
    let context = match q.apply_op3(&k, &v, Attention(call.clone())) {
        Ok(context) => context,
        // The device can't run the kernels. The error converts back to what it was.
        Err(error) => match Error::from(error) {
            Error::Attention(reason @ AttentionError::Gpu(_)) => return Ok(Err(reason)),
            error => return Err(error.into()),
        },
    };
    let logsumexp = options.return_logsumexp.then(|| q.apply_op3(&k, &v, LogSumExp(call))).transpose()?;
    Ok(Ok(AttentionOutput { context, weights: None, scores: None, logsumexp }))
}

/// The value, through which the parameters that want a gradient get theirs.
fn with_parameters(checked: &Checked, call: &Arc<Call>, mut v: Tensor) -> candle_core::Result<Tensor> {
    let options = checked.options;
    let all = [
        (Parameter::Bias, &options.attn_bias),
        (Parameter::Slopes, &options.alibi_slopes),
        (Parameter::Sinks, &options.sinks),
    ];
    let trained = all.iter().filter_map(|(parameter, x)| Some((*parameter, x.as_ref().filter(|x| x.track_op())?)));
    let trained: Vec<_> = trained.collect();
    for pair in trained.chunks(2) {
        let (first, second) = (pair[0], pair.get(1));
        let parameters = [Some(first.0), second.map(|second| second.0)];
        let missing = v.detach();
        let second = second.map_or(&missing, |second| second.1);
        memory::ask_for("value beside its parameters", 1, &v, v.dtype())?;
        v = v.apply_op3(first.1, second, Carrier { call: call.clone(), parameters })?;
    }
    Ok(v)
}

/// The reason why the kernels can't serve this call, if there is one.
fn unsupported(checked: &Checked) -> Option<AttentionError> {
    let refuse = |expected, got| Some(AttentionError::Backend { expected, got });
    let Checked { q, k, v, value_dim, .. } = checked;
    if storage::element(q.dtype()).is_none() {
        return refuse("F32, BF16 or F16 on CUDA", "F64");
    }
    if [q, k, v].iter().any(|tensor| tensor.elem_count() == 0) {
        return refuse("tensors that are not empty", "an empty one");
    }
    if checked.heads.is_some() && checked.options.dropout_p > 0.0 {
        return refuse("dropout that counts all heads on CUDA", "dropout that counts those of other ranks too");
    }
    if q.dims()[3].max(*value_dim) > MAX_DIM {
        return refuse("head_dim and value_dim of at most 256 on CUDA", "more");
    }
    None
}

/// `x` with stride 1 along the last axis. The kernels take any strides for the other axes.
fn unit_stride(x: &Tensor) -> candle_core::Result<Tensor> {
    if x.stride().last() == Some(&1) || x.dim(D::Minus1)? == 1 {
        return Ok(x.clone());
    }
    memory::contiguous("copy of an input", x)
}
