//! Attention as the notes write it, with every score in memory: read this first. It is the oracle.
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

use candle_core::{D, DType, Device, Result, Tensor};

use crate::empty::connected;
use crate::error::AttentionError;
use crate::mask::{Mask, ScoreShape};
use crate::options::{AttentionOptions, AttentionOutput};
use crate::philox::kept_by_dropout;
use crate::range::may_overflow;

/// The most entries of a tensor on CUDA: candle's kernels count them in 32 bits, in blocks of 1024, and of more would never
/// come to an end.
const MOST_ON_CUDA: usize = (1 << 32) - 1024;

/// Attention over inputs that have been checked.
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<AttentionOutput> {
    if q.elem_count() == 0 {
        return nothing_that_attends(q, k, v, options);
    }
    if k.dim(2)? == 0 {
        return nothing_to_attend_to(q, k, v, options);
    }
    let dtype = q.dtype();
    let (w, lse) = weigh(&widened(q)?, &widened(k)?, options)?;
    // Not even a cast is done on CUDA to values without entries.
    let v = if v.elem_count() == 0 { v.clone() } else { widened(v)? };
    let context = weighted_sum(&dropout(&w, options)?.to_dtype(v.dtype())?, &v)?;
    Ok(AttentionOutput {
        context: context.to_dtype(dtype)?,
        weights: options.return_weights.then(|| w.to_dtype(dtype)).transpose()?,
        logsumexp: options.return_logsumexp.then(|| lse.squeeze(D::Minus1)).transpose()?,
    })
}

/// The weights alone, of keys that there are.
pub(crate) fn weights(q: &Tensor, k: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    weigh(&widened(q)?, &widened(k)?, options)?.0.to_dtype(q.dtype())
}

/// Half types accumulate in f32.
fn widened(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(wide(x.dtype()))?.contiguous()
}

fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The weights, and ln Σ exp(s), of at least one query and key.
fn weigh(q: &Tensor, k: &Tensor, options: &AttentionOptions) -> Result<(Tensor, Tensor)> {
    check_countable(q, k)?;
    let scale = options.scale.unwrap_or(1.0 / (q.dim(3)? as f64).sqrt());
    let mut s = scaled_scores(q, k, scale)?;
    if let Some(cap) = options.softcap {
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

fn check_countable(q: &Tensor, k: &Tensor) -> std::result::Result<(), AttentionError> {
    let shape = vec![q.dims()[0], q.dims()[1], q.dims()[2], k.dims()[2]];
    if q.device().is_cuda() && shape.iter().product::<usize>() > MOST_ON_CUDA {
        let expected = format!("one of at most {MOST_ON_CUDA} entries on a CUDA device");
        return Err(AttentionError::Shape { tensor: "scores", expected, shape });
    }
    Ok(())
}

/// No queries at all, or no heads or sequences: products of nothing. On CUDA candle does little else with nothing, neither
/// a sum nor a cast.
fn nothing_that_attends(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<AttentionOutput> {
    let (batch, heads, q_len, _) = q.dims4()?;
    let connect = |x: Tensor| {
        let others = [&options.attn_bias, &options.alibi_slopes, &options.sinks];
        others.into_iter().flatten().try_fold(x, connected)
    };
    let logsumexp = || {
        let lse = Tensor::zeros((batch, heads, q_len), wide(q.dtype()), q.device())?;
        connect(connected(connected(lse, q)?, k)?)
    };
    let w = connect(dot_products(q, k)?)?;
    Ok(AttentionOutput {
        context: weighted_sum(&w, v)?,
        weights: options.return_weights.then_some(w),
        logsumexp: options.return_logsumexp.then(logsumexp).transpose()?,
    })
}

/// No keys at all: as if there were one, hidden from every query. All results stay connected to their inputs.
fn nothing_to_attend_to(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<AttentionOutput> {
    let one_row = |x: &Tensor| {
        let (batch, heads, _, dim) = x.dims4()?;
        Tensor::cat(&[x, &Tensor::zeros((batch, heads, 1, dim), x.dtype(), x.device())?], 2)
    };
    let options = AttentionOptions {
        attn_mask: Mask::prefix(0),
        // A bias without keys has no entries; one that is the same for all keys serves for the hidden one.
        attn_bias: options.attn_bias.clone().filter(|bias| bias.elem_count() > 0),
        ..options.clone()
    };
    let output = attention(q, &one_row(k)?, &one_row(v)?, &options)?;
    Ok(AttentionOutput { weights: output.weights.map(|w| w.narrow(3, 0, 0)).transpose()?, ..output })
}

/// q·kᵀ · scale. The query heads that share a key head stand side by side as rows of one product, so that no key is
/// copied (grouped-query attention: Ainslie et al., "GQA", EMNLP 2023, section 2.2).
fn scaled_scores(q: &Tensor, k: &Tensor, scale: f64) -> Result<Tensor> {
    if may_overflow(q, k, scale)? {
        return scaled_scores_of_huge_inputs(q, k, scale);
    }
    multiply(&dot_products(q, k)?, scale)
}

/// s · scale. candle cuts its graph at a multiplication by the number 0, so that gradients would be missing.
fn multiply(s: &Tensor, scale: f64) -> Result<Tensor> {
    if scale == 0.0 { s * s.zeros_like()? } else { s * scale }
}

fn dot_products(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    let (batch, heads, q_len, dim) = q.dims4()?;
    let (_, kv_heads, kv_len, _) = k.dims4()?;
    let rows = q.reshape((batch, kv_heads, heads / kv_heads * q_len, dim))?;
    rows.matmul(&k.t()?)?.reshape((batch, heads, q_len, kv_len))
}

/// As [`scaled_scores`], where a dot product could overflow to infinity, and the difference of two infinities to NaN:
/// each huge query and key is divided by its largest entry, and the scores are held inside the dtype's range.
fn scaled_scores_of_huge_inputs(q: &Tensor, k: &Tensor, scale: f64) -> Result<Tensor> {
    let row_size = |x: &Tensor| -> Result<Tensor> {
        let size = x.detach().abs()?.max_keepdim(D::Minus1)?;
        // Rows whose products with each other stay far inside the range are left as they are, to the last bit.
        let huge = if x.dtype() == DType::F64 { 2f64.powi(480) } else { 2f64.powi(56) };
        size.gt(huge)?.where_cond(&size, &size.ones_like()?)
    };
    let (q_size, k_size) = (row_size(q)?, row_size(k)?);
    let s = multiply(&dot_products(&q.broadcast_div(&q_size)?, &k.broadcast_div(&k_size)?)?, scale)?;
    let s = s.broadcast_mul(&q_size)?;
    // Each key's size belongs to every query head of its group.
    let (batch, heads, q_len, kv_len) = s.dims4()?;
    let kv_heads = k.dim(1)?;
    let k_size = k_size.t()?.contiguous()?;
    let s = s.reshape((batch, kv_heads, heads / kv_heads * q_len, kv_len))?.broadcast_mul(&k_size)?;
    let limit = if q.dtype() == DType::F64 { f64::MAX } else { f64::from(f32::MAX) };
    hold_inside(&s, limit)?.reshape((batch, heads, q_len, kv_len))
}

/// As `clamp`, which makes a number of NaN on CUDA.
fn hold_inside(s: &Tensor, limit: f64) -> Result<Tensor> {
    let most = (s.ones_like()? * limit)?;
    let least = most.neg()?;
    let s = s.gt(&most)?.where_cond(&most, s)?;
    s.lt(&least)?.where_cond(&least, &s)
}

/// slope · |position of the query - position of the key|, the last query standing at the last key.
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
    // Two short lists go to the device, not the table of all pairs.
    let there = |x: Tensor| x.to_dtype(like.dtype())?.to_device(like.device());
    there(queries)?.broadcast_sub(&there(keys)?)?.abs()
}

/// Minus infinity where a query may not attend.
fn mask_scores(s: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    if options.attn_mask.is_full() {
        return Ok(s.clone());
    }
    let allowed = options.attn_mask.to_tensor(ScoreShape::from(s.dims4()?), s.device())?;
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
    // A row with nothing to attend to has exponentials of 0 alone; a sum of 1 instead gives it weights of zero and gradients
    // of zero. (Its largest score is minus infinity, but on CUDA so is that of a row of NaN.)
    let empty = sum.eq(&sum.zeros_like()?)?;
    let sum = empty.where_cond(&sum.ones_like()?, &sum)?;
    let weights = exponentials.broadcast_div(&sum)?;
    let logsumexp = empty.where_cond(&minus_infinity, &(sum.log()? + largest)?)?;
    Ok((weights, logsumexp))
}

/// Srivastava et al., "Dropout" (JMLR 2014), section 10, in its inverted form: what is kept is scaled up, so that
/// nothing is left to do at inference.
fn dropout(w: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    if options.dropout_p == 0.0 {
        return Ok(w.clone());
    }
    let kept = kept_by_dropout(options.dropout_seed, options.dropout_p, w.dims4()?);
    let kept = Tensor::from_vec(kept, w.shape(), w.device())?.to_dtype(w.dtype())?;
    w * (kept * (1.0 / (1.0 - options.dropout_p)))?
}

/// w·v, with the heads of a group side by side as in [`scaled_scores`].
fn weighted_sum(w: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (batch, heads, q_len, kv_len) = w.dims4()?;
    let (_, kv_heads, _, value_dim) = v.dims4()?;
    let rows = w.reshape((batch, kv_heads, heads / kv_heads * q_len, kv_len))?;
    rows.matmul(v)?.reshape((batch, heads, q_len, value_dim))
}
