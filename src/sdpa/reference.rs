//! Attention as the lecture notes write it, with every score in memory: read this first. The tests compare the fused
//! path with it.
//!
//! | symbol | shape | what |
//! |---|---|---|
//! | q | (B, H, Lq, D) | queries |
//! | k | (B, Hkv, Lk, D) | keys; H is a multiple of Hkv |
//! | v | (B, Hkv, Lk, Dv) | values |
//! | s | (B, H, Lq, Lk) | scores: q·kᵀ · scale, then softcap, bias and mask |
//! | w | (B, H, Lq, Lk) | weights: softmax(s) over the keys |
//! | lse | (B, H, Lq, 1) | ln Σ exp(s) over the keys |
//!
//! Each step is a candle tensor operation with a gradient, so it runs on any device and candle differentiates it.
//! Source: Vaswani et al., "Attention Is All You Need" (NIPS 2017), section 3.2.1.

use attention_kernels::dropout::kept_by_dropout;
use candle_core::{D, DType, Device, Result, Tensor};

use crate::check::compute_dtype;
use crate::error::AttentionError;
use crate::mask::Mask;
use crate::sdpa::grad_connect::connected;
use crate::sdpa::options::{AttentionOptions, AttentionOutput};
use crate::sdpa::overflow::may_overflow;

/// The largest number of entries of a tensor on CUDA. candle's kernels count the entries in 32 bits, in blocks of 1024,
/// and don't terminate if there are more.
const MAX_ENTRIES_ON_CUDA: usize = (1 << 32) - 1024;

/// Attention over inputs that have been checked.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<AttentionOutput> {
    if q.elem_count() == 0 {
        return without_queries(q, k, v, options);
    }
    if k.dim(2)? == 0 {
        return without_keys(q, k, v, options);
    }
    let dtype = q.dtype();
    let (w, lse) = weights_and_logsumexp(&widened(q)?, &widened(k)?, options)?;
    // candle can't cast an empty tensor on CUDA.
    let v = if v.elem_count() == 0 { v.clone() } else { widened(v)? };
    let context = weighted_sum(&dropout(&w, options)?.to_dtype(v.dtype())?, &v)?;
    Ok(AttentionOutput {
        context: context.to_dtype(dtype)?,
        weights: options.return_weights.then(|| w.to_dtype(dtype)).transpose()?,
        logsumexp: options.return_logsumexp.then(|| lse.squeeze(D::Minus1)).transpose()?,
    })
}

/// The weights alone, for at least one query and key.
pub(crate) fn weights(q: &Tensor, k: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    weights_and_logsumexp(&widened(q)?, &widened(k)?, options)?.0.to_dtype(q.dtype())
}

/// `x` in the dtype to compute in. Half types accumulate in f32.
fn widened(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(compute_dtype(x.dtype()))?.contiguous()
}

/// The weights, and ln Σ exp(s), for at least one query and key.
fn weights_and_logsumexp(q: &Tensor, k: &Tensor, options: &AttentionOptions) -> Result<(Tensor, Tensor)> {
    check_score_count(q, k)?;
    let scale = options.scale.unwrap_or(1.0 / (q.dim(3)? as f64).sqrt());
    let mut s = scaled_scores(q, k, scale)?;
    if let Some(cap) = options.softcap() {
        s = ((s / cap)?.tanh()? * cap)?;
    }
    if let Some(bias) = &options.attn_bias {
        s = s.broadcast_add(&bias.to_dtype(q.dtype())?)?;
    }
    if let Some(slopes) = &options.alibi_slopes {
        s = s.broadcast_sub(&alibi(&slopes.to_dtype(q.dtype())?, q.dim(2)?, k.dim(2)?)?)?;
    }
    s = mask_scores(&s, options)?;
    let sinks = match &options.sinks {
        Some(sinks) => Some(sinks.to_dtype(q.dtype())?.reshape((1, (), 1, 1))?),
        None => None,
    };
    softmax(&s, sinks.as_ref())
}

fn check_score_count(q: &Tensor, k: &Tensor) -> std::result::Result<(), AttentionError> {
    let shape = vec![q.dims()[0], q.dims()[1], q.dims()[2], k.dims()[2]];
    if q.device().is_cuda() && shape.iter().product::<usize>() > MAX_ENTRIES_ON_CUDA {
        let expected = format!("one of at most {MAX_ENTRIES_ON_CUDA} entries on a CUDA device");
        return Err(AttentionError::Shape { tensor: "scores", expected, shape });
    }
    Ok(())
}

/// Attention without queries, heads or sequences. Its results are products of empty matrices, since on CUDA candle can
/// neither sum nor cast empty tensors.
fn without_queries(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<AttentionOutput> {
    let (batch, heads, q_len, _) = q.dims4()?;
    let connect = |x: Tensor| {
        let others = [&options.attn_bias, &options.alibi_slopes, &options.sinks];
        others.into_iter().flatten().try_fold(x, connected)
    };
    let logsumexp = || {
        let lse = Tensor::zeros((batch, heads, q_len), compute_dtype(q.dtype()), q.device())?;
        connect(connected(connected(lse, q)?, k)?)
    };
    let w = connect(dot_products(q, k)?)?;
    Ok(AttentionOutput {
        context: weighted_sum(&w, v)?,
        weights: options.return_weights.then_some(w),
        logsumexp: options.return_logsumexp.then(logsumexp).transpose()?,
    })
}

/// Attention without keys, computed with one key that is hidden from every query. All results stay connected to their
/// inputs, so that gradients are zero and not missing.
fn without_keys(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<AttentionOutput> {
    let append_zeros = |x: &Tensor| {
        let (batch, heads, _, dim) = x.dims4()?;
        Tensor::cat(&[x, &Tensor::zeros((batch, heads, 1, dim), x.dtype(), x.device())?], 2)
    };
    // A bias with a kv_len of 0 is left out. A bias that is the same for all keys also fits the hidden key.
    let (left_out, attn_bias) = match &options.attn_bias {
        Some(bias) if bias.elem_count() == 0 => (Some(bias), None),
        bias => (None, bias.clone()),
    };
    let options = AttentionOptions { attn_mask: Mask::prefix(0), attn_bias, ..options.clone() };
    let output = attention(q, &append_zeros(k)?, &append_zeros(v)?, &options)?;
    let connect = |x: Tensor| match left_out {
        Some(bias) => connected(x, bias),
        None => Ok(x),
    };
    Ok(AttentionOutput {
        context: connect(output.context)?,
        weights: output.weights.map(|w| connect(w.narrow(3, 0, 0)?)).transpose()?,
        logsumexp: output.logsumexp.map(connect).transpose()?,
    })
}

/// q·kᵀ · scale. The query heads that share a key head are rows of one matrix product, so that no key is copied
/// (grouped-query attention: Ainslie et al., "GQA", EMNLP 2023, section 2.2).
fn scaled_scores(q: &Tensor, k: &Tensor, scale: f64) -> Result<Tensor> {
    if may_overflow(q, k, scale)? {
        return scaled_scores_of_huge_inputs(q, k, scale);
    }
    multiply(&dot_products(q, k)?, scale)
}

/// s · scale. A multiplication by the number 0 would cut candle's graph, and gradients would be missing.
fn multiply(s: &Tensor, scale: f64) -> Result<Tensor> {
    if scale == 0.0 { s * s.zeros_like()? } else { s * scale }
}

fn dot_products(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    let (batch, heads, q_len, dim) = q.dims4()?;
    let (_, kv_heads, kv_len, _) = k.dims4()?;
    let rows = q.reshape((batch, kv_heads, heads / kv_heads * q_len, dim))?;
    rows.matmul(&k.t()?)?.reshape((batch, heads, q_len, kv_len))
}

/// As [`scaled_scores`], for inputs so large that a dot product could overflow to infinity, and then the difference of
/// two infinities be NaN. Each huge query and key is divided by its largest entry, and the scores are clamped to the
/// dtype's range.
fn scaled_scores_of_huge_inputs(q: &Tensor, k: &Tensor, scale: f64) -> Result<Tensor> {
    let row_divisor = |x: &Tensor| -> Result<Tensor> {
        let largest = x.detach().abs()?.max_keepdim(D::Minus1)?;
        // The square of this bound is 2^-64 (f64) or 2^-16 (f32) of the largest number, which leaves room for the sum
        // over head_dim. Rows below the bound are not divided and keep every bit.
        let huge = if x.dtype() == DType::F64 { 2f64.powi(480) } else { 2f64.powi(56) };
        largest.gt(huge)?.where_cond(&largest, &largest.ones_like()?)
    };
    let (q_divisor, k_divisor) = (row_divisor(q)?, row_divisor(k)?);
    let s = multiply(&dot_products(&q.broadcast_div(&q_divisor)?, &k.broadcast_div(&k_divisor)?)?, scale)?;
    let s = s.broadcast_mul(&q_divisor)?;
    // A key's divisor applies to every query head of its group.
    let (batch, heads, q_len, kv_len) = s.dims4()?;
    let kv_heads = k.dim(1)?;
    let k_divisor = k_divisor.t()?.contiguous()?;
    let s = s.reshape((batch, kv_heads, heads / kv_heads * q_len, kv_len))?.broadcast_mul(&k_divisor)?;
    let limit = if q.dtype() == DType::F64 { f64::MAX } else { f64::from(f32::MAX) };
    clamp_keeping_nan(&s, limit)?.reshape((batch, heads, q_len, kv_len))
}

/// Clamps to ±limit and keeps NaN, which candle's `clamp` turns into a number on CUDA.
fn clamp_keeping_nan(s: &Tensor, limit: f64) -> Result<Tensor> {
    let max = (s.ones_like()? * limit)?;
    let min = max.neg()?;
    let s = s.gt(&max)?.where_cond(&max, s)?;
    s.lt(&min)?.where_cond(&min, &s)
}

/// slope · |position of the query - position of the key|, where the last query is aligned with the last key.
fn alibi(slopes: &Tensor, q_len: usize, kv_len: usize) -> Result<Tensor> {
    let queries = (0..q_len).map(|i| kv_len as f64 - q_len as f64 + i as f64);
    let distances = distances(queries, kv_len, slopes)?;
    let heads = slopes.dim(D::Minus1)?;
    let batch = if slopes.rank() == 2 { slopes.dim(0)? } else { 1 };
    slopes.reshape((batch, heads, 1, 1))?.broadcast_mul(&distances)
}

/// |position of the query - position of the key|, (queries, kv_len), in the dtype and on the device of `like`.
pub(crate) fn distances(queries: impl Iterator<Item = f64>, kv_len: usize, like: &Tensor) -> Result<Tensor> {
    let keys = Tensor::from_iter((0..kv_len).map(|j| j as f64), &Device::Cpu)?;
    let queries = Tensor::from_iter(queries, &Device::Cpu)?.unsqueeze(1)?;
    // Only two short lists are copied to the device, not the table of all pairs.
    let to_device = |x: Tensor| x.to_dtype(like.dtype())?.to_device(like.device());
    to_device(queries)?.broadcast_sub(&to_device(keys)?)?.abs()
}

/// Sets the scores to minus infinity where a query may not attend.
fn mask_scores(s: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    if options.attn_mask.is_full() {
        return Ok(s.clone());
    }
    let allowed = options.attn_mask.to_tensor(s.dims4()?, s.device())?;
    let hidden = Tensor::new(f64::NEG_INFINITY, s.device())?.to_dtype(s.dtype())?.broadcast_as(s.shape())?;
    allowed.broadcast_as(s.shape())?.where_cond(s, &hidden)
}

/// exp(s) / Σ exp(s) over the keys, and ln Σ exp(s). The sink, if there is one, is one more score in both sums.
///
/// Both are computed relative to the row's largest score, so that no exponential overflows. The largest score is a
/// constant here: the results don't depend on it, so neither do their gradients.
fn softmax(s: &Tensor, sinks: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    let mut largest = s.detach().max_keepdim(D::Minus1)?;
    if let Some(sinks) = sinks {
        largest = largest.broadcast_maximum(&sinks.detach())?;
    }
    let minus_infinity = (largest.zeros_like()? + f64::NEG_INFINITY)?;
    let largest = largest.eq(&minus_infinity)?.where_cond(&largest.zeros_like()?, &largest)?;

    let exponentials = s.broadcast_sub(&largest)?.exp()?;
    let mut sum = exponentials.sum_keepdim(D::Minus1)?;
    if let Some(sinks) = sinks {
        sum = (sum + sinks.broadcast_sub(&largest)?.exp()?)?;
    }
    // In a row without visible keys every exponential is 0. Replacing the sum by 1 gives it zero weights and zero
    // gradients. (The largest score can't identify these rows: on CUDA it is minus infinity for a row of NaN, too.)
    let empty = sum.eq(&sum.zeros_like()?)?;
    let sum = empty.where_cond(&sum.ones_like()?, &sum)?;
    let weights = exponentials.broadcast_div(&sum)?;
    let logsumexp = empty.where_cond(&minus_infinity, &(sum.log()? + largest)?)?;
    Ok((weights, logsumexp))
}

/// Dropout in its inverted form: kept weights are scaled up in training, so that inference needs no scaling.
/// (Srivastava et al., "Dropout", JMLR 2014, section 10.)
fn dropout(w: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    if options.dropout_p == 0.0 {
        return Ok(w.clone());
    }
    let kept = kept_by_dropout(options.dropout_seed, options.dropout_p, w.dims4()?).map_err(AttentionError::from)?;
    let kept = Tensor::from_vec(kept, w.shape(), w.device())?.to_dtype(w.dtype())?;
    w * (kept * (1.0 / (1.0 - options.dropout_p)))?
}

/// w·v, with the query heads of a group as rows of one matrix product, as in [`scaled_scores`].
fn weighted_sum(w: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (batch, heads, q_len, kv_len) = w.dims4()?;
    let (_, kv_heads, _, value_dim) = v.dims4()?;
    let rows = w.reshape((batch, kv_heads, heads / kv_heads * q_len, kv_len))?;
    rows.matmul(v)?.reshape((batch, heads, q_len, value_dim))
}
