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
//! Each step is a candle tensor operation with a gradient, so it runs on any device and candle differentiates it. If some
//! pairs of query and key are hidden, [`Visible`] computes the two matrix products, over the visible pairs only.
//! Source: Vaswani et al., "Attention Is All You Need" (NIPS 2017), section 3.2.1.

use attention_kernels::HeadNumbers;
use attention_kernels::dropout::kept_by_dropout;
use candle_core::{D, DType, Device, Result, Tensor};

use crate::check::compute_dtype;
use crate::empty::connected;
use crate::error::AttentionError;
use crate::mask::Mask;
use crate::memory;
use crate::sdpa::options::{AttentionOptions, AttentionOutput, ScoreStage};
use crate::sdpa::overflow::{Range, finite_or_zero, is_finite};
use crate::sdpa::visible::Visible;

/// The largest number of entries of a tensor on CUDA. candle's kernels count the entries in 32 bits, in blocks of 1024,
/// and don't terminate if there are more.
const MAX_ENTRIES_ON_CUDA: u64 = (1 << 32) - 1024;

/// Attention over inputs that have been checked. `heads` are the numbers of the heads that dropout counts.
pub(crate) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &AttentionOptions,
    heads: Option<HeadNumbers>,
) -> Result<AttentionOutput> {
    if q.elem_count() == 0 {
        return without_queries(q, k, v, options);
    }
    if k.dim(2)? == 0 {
        return without_keys(q, k, v, options);
    }
    let dtype = q.dtype();
    let (q, k) = (widened(q)?, widened(k)?);
    // candle can't cast an empty tensor on CUDA.
    let v = if v.elem_count() == 0 { v.clone() } else { widened(v)? };
    let steps = Steps::new(&q, &k, Some(&v), options)?;
    let (w, lse) = weights_and_logsumexp(&q, &k, options, &steps)?;
    let context = weighted_sum(&dropout(&w, options, heads)?.to_dtype(v.dtype())?, &v, &steps)?;
    Ok(AttentionOutput {
        context: context.to_dtype(dtype)?,
        weights: options.return_weights.then(|| w.to_dtype(dtype)).transpose()?,
        scores: None,
        logsumexp: options.return_logsumexp.then(|| lse.squeeze(D::Minus1)).transpose()?,
    })
}

/// The weights alone, for at least one query and key.
pub(crate) fn weights(q: &Tensor, k: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    let (dtype, q, k) = (q.dtype(), widened(q)?, widened(k)?);
    let steps = Steps::new(&q, &k, None, options)?;
    weights_and_logsumexp(&q, &k, options, &steps)?.0.to_dtype(dtype)
}

/// What decides how the steps are computed.
struct Steps {
    scale: f64,
    scores_may_overflow: bool,
    sums_may_overflow: bool,
    values_are_finite: bool,
    /// Which pairs count; `None` if all do.
    visible: Option<Visible>,
}

impl Steps {
    fn new(q: &Tensor, k: &Tensor, v: Option<&Tensor>, options: &AttentionOptions) -> Result<Self> {
        check_score_count(q, k)?;
        let scale = options.scale.unwrap_or(1.0 / (q.dim(3)? as f64).sqrt());
        let (has_mask, bias) = (!options.attn_mask.is_full(), options.attn_bias.as_ref());
        let range =
            Range::read(q, k, scale, v.filter(|_| has_mask || bias.is_some()), [bias, options.alibi_slopes.as_ref()])?;
        let bias = bias.filter(|_| range.bias_hides);
        let hides = has_mask || bias.is_some();
        Ok(Self {
            scale,
            scores_may_overflow: range.scores_may_overflow,
            sums_may_overflow: range.sums_may_overflow,
            values_are_finite: range.values_are_finite,
            visible: hides.then(|| Visible::new(&options.attn_mask, bias, q, k.dim(2)?)).transpose()?,
        })
    }

    /// s + x. Where both are finite, so is the sum: beyond the dtype's range it is the dtype's largest or lowest number.
    fn add(&self, s: &Tensor, x: &Tensor) -> Result<Tensor> {
        let sum = s.broadcast_add(x)?;
        if !self.sums_may_overflow {
            return Ok(sum);
        }
        let both_finite = is_finite(s)?.broadcast_mul(&is_finite(x)?)?;
        both_finite.where_cond(&clamp_keeping_nan(&sum, largest_number(s.dtype()))?, &sum)
    }

    /// `x`, one number for each pair, with `instead` in place of those of hidden pairs.
    fn keep_visible(&self, x: Tensor, instead: f64) -> Result<Tensor> {
        self.visible.as_ref().map_or(Ok(x.clone()), |visible| visible.keep(&x, instead))
    }
}

/// The scores after this step, in the dtype to compute in.
pub(crate) fn scores(q: &Tensor, k: &Tensor, options: &AttentionOptions, stage: ScoreStage) -> Result<Tensor> {
    let ((batch, heads, q_len, _), kv_len) = (q.dims4()?, k.dim(2)?);
    if q.elem_count() == 0 || kv_len == 0 {
        return connected_zeros(&[batch, heads, q_len, kv_len], q, k, options);
    }
    let (q, k) = (widened(q)?, widened(k)?);
    let mut steps = Steps::new(&q, &k, None, options)?;
    if stage < ScoreStage::Masked {
        // No pair is hidden yet, and each has a gradient.
        steps.visible = None;
    }
    scores_after(stage, &q, &k, options, &steps)
}

/// `x` in the dtype to compute in. Half types accumulate in f32.
fn widened(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(compute_dtype(x.dtype()))?.contiguous()
}

/// The weights, and ln Σ exp(s), for at least one query and key.
fn weights_and_logsumexp(
    q: &Tensor,
    k: &Tensor,
    options: &AttentionOptions,
    steps: &Steps,
) -> Result<(Tensor, Tensor)> {
    let s = scores_after(ScoreStage::Masked, q, k, options, steps)?;
    let sinks = match &options.sinks {
        Some(sinks) => Some(sinks.to_dtype(q.dtype())?.reshape((1, (), 1, 1))?),
        None => None,
    };
    let (w, lse) = softmax(&s, sinks.as_ref())?;
    // Hidden weights are zero already, unless the row holds NaN.
    Ok((steps.keep_visible(w, 0.0)?, lse))
}

/// The scores after the steps up to this one, for at least one query and key.
fn scores_after(
    stage: ScoreStage,
    q: &Tensor,
    k: &Tensor,
    options: &AttentionOptions,
    steps: &Steps,
) -> Result<Tensor> {
    let mut s = scaled_scores(q, k, steps)?;
    if let Some(cap) = options.softcap().filter(|_| stage >= ScoreStage::Softcapped) {
        s = ((s / cap)?.tanh()? * cap)?;
    }
    if let Some(bias) = options.attn_bias.as_ref().filter(|_| stage >= ScoreStage::Biased) {
        s = steps.add(&s, &bias.to_dtype(q.dtype())?)?;
    }
    if let Some(slopes) = options.alibi_slopes.as_ref().filter(|_| stage >= ScoreStage::Biased) {
        let mut penalties = alibi(&slopes.to_dtype(q.dtype())?, q.dim(2)?, k.dim(2)?)?;
        if steps.sums_may_overflow {
            penalties = clamp_keeping_nan(&penalties, largest_number(q.dtype()))?;
        }
        s = steps.add(&s, &penalties.neg()?)?;
    }
    if stage >= ScoreStage::Masked { steps.keep_visible(s, f64::NEG_INFINITY) } else { Ok(s) }
}

fn check_score_count(q: &Tensor, k: &Tensor) -> std::result::Result<(), AttentionError> {
    let shape = vec![q.dims()[0], q.dims()[1], q.dims()[2], k.dims()[2]];
    let entries: u64 = shape.iter().map(|&size| size as u64).product();
    if q.device().is_cuda() && entries > MAX_ENTRIES_ON_CUDA {
        let expected = format!("of at most {MAX_ENTRIES_ON_CUDA} entries on a CUDA device");
        return Err(AttentionError::Shape { tensor: "scores", expected, shape });
    }
    Ok(())
}

/// Attention without queries, heads or sequences. Its results are products of empty matrices, since on CUDA candle can
/// neither sum nor cast empty tensors.
fn without_queries(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<AttentionOutput> {
    let (batch, heads, q_len, _) = q.dims4()?;
    let logsumexp = || connected_zeros(&[batch, heads, q_len], q, k, options);
    let w = connect_options(dot_products(q, k, None)?, options)?;
    Ok(AttentionOutput {
        context: product_with_values(&w, v, |w, v| w.matmul(v))?,
        weights: options.return_weights.then_some(w),
        scores: None,
        logsumexp: options.return_logsumexp.then(logsumexp).transpose()?,
    })
}

/// An empty tensor of this shape that depends on the inputs, so that their gradients are zero and not missing.
fn connected_zeros(dims: &[usize], q: &Tensor, k: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    let zeros = Tensor::zeros(dims, compute_dtype(q.dtype()), q.device())?;
    connect_options(connected(connected(zeros, q)?, k)?, options)
}

fn connect_options(x: Tensor, options: &AttentionOptions) -> Result<Tensor> {
    [&options.attn_bias, &options.alibi_slopes, &options.sinks].into_iter().flatten().try_fold(x, connected)
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
    let output = attention(q, &append_zeros(k)?, &append_zeros(v)?, &options, None)?;
    let connect = |x: Tensor| match left_out {
        Some(bias) => connected(x, bias),
        None => Ok(x),
    };
    Ok(AttentionOutput {
        context: connect(output.context)?,
        weights: output.weights.map(|w| connect(w.narrow(3, 0, 0)?)).transpose()?,
        scores: None,
        logsumexp: output.logsumexp.map(connect).transpose()?,
    })
}

/// q·kᵀ · scale.
fn scaled_scores(q: &Tensor, k: &Tensor, steps: &Steps) -> Result<Tensor> {
    if steps.scores_may_overflow {
        return scaled_scores_of_huge_inputs(q, k, steps);
    }
    multiply(&dot_products(q, k, steps.visible.as_ref())?, steps.scale)
}

/// s · scale. A multiplication by the number 0 would cut candle's graph, and gradients would be missing.
fn multiply(s: &Tensor, scale: f64) -> Result<Tensor> {
    if scale == 0.0 { s * s.zeros_like()? } else { s * scale }
}

/// q·kᵀ. The query heads that share a key head are rows of one matrix product, so that no key is copied (grouped-query
/// attention: Ainslie et al., "GQA", EMNLP 2023, section 2.2).
fn dot_products(q: &Tensor, k: &Tensor, visible: Option<&Visible>) -> Result<Tensor> {
    let (batch, heads, q_len, dim) = q.dims4()?;
    let (_, kv_heads, kv_len, _) = k.dims4()?;
    let rows = q.reshape((batch, kv_heads, heads / kv_heads * q_len, dim))?;
    let s = match visible {
        Some(visible) => visible.dot_products(&rows, k)?,
        None => rows.matmul(&k.t()?)?,
    };
    s.reshape((batch, heads, q_len, kv_len))
}

/// As [`scaled_scores`], for inputs so large that a dot product could overflow to infinity, and then the difference of
/// two infinities be NaN. Each huge query and key is divided by its largest entry, and the scores are clamped to the
/// dtype's range.
fn scaled_scores_of_huge_inputs(q: &Tensor, k: &Tensor, steps: &Steps) -> Result<Tensor> {
    // Scaled and clamped: each step's result, two limits and two comparisons.
    let scores = [q.dim(0)?, q.dim(1)?, q.dim(2)?, k.dim(2)?];
    memory::ask("scores of huge inputs", q.device(), memory::bytes(&scores, q.dtype()).saturating_mul(8))?;
    let row_divisor = |x: &Tensor| -> Result<Tensor> {
        let largest = finite_or_zero(&x.detach())?.abs()?.max_keepdim(D::Minus1)?;
        // The square of this bound is 2^-64 (f64) or 2^-16 (f32) of the largest number, which leaves room for the sum
        // over head_dim. Rows below the bound are not divided and keep every bit.
        let huge = if x.dtype() == DType::F64 { 2f64.powi(480) } else { 2f64.powi(56) };
        largest.gt(huge)?.where_cond(&largest, &largest.ones_like()?)
    };
    let (q_divisor, k_divisor) = (row_divisor(q)?, row_divisor(k)?);
    let (q, k) = (q.broadcast_div(&q_divisor)?, k.broadcast_div(&k_divisor)?);
    let quotients = dot_products(&q, &k, steps.visible.as_ref())?;
    let s = multiply(&quotients, steps.scale)?.broadcast_mul(&q_divisor)?;
    // A key's divisor applies to every query head of its group.
    let (batch, heads, q_len, kv_len) = s.dims4()?;
    let kv_heads = k.dim(1)?;
    let k_divisor = k_divisor.t()?.contiguous()?;
    let s = s.reshape((batch, kv_heads, heads / kv_heads * q_len, kv_len))?.broadcast_mul(&k_divisor)?;
    let s = s.reshape((batch, heads, q_len, kv_len))?;
    let limit = largest_number(q.dtype());
    // Quotients don't overflow. One that isn't finite comes from an infinite or NaN input, and has to stay what it is.
    is_finite(&quotients)?.where_cond(&clamp_keeping_nan(&s, limit)?, &s)
}

/// The largest number of a dtype to compute in.
fn largest_number(dtype: DType) -> f64 {
    if dtype == DType::F64 { f64::MAX } else { f64::from(f32::MAX) }
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
fn dropout(w: &Tensor, options: &AttentionOptions, heads: Option<HeadNumbers>) -> Result<Tensor> {
    let (batch, own, q_len, kv_len) = w.dims4()?;
    let HeadNumbers { first, count } = heads.unwrap_or(HeadNumbers { first: 0, count: own });
    let Some(dropout) = options.dropout(count) else { return Ok(w.clone()) };
    let whole = (batch, count, q_len, kv_len);
    let kept = kept_by_dropout(dropout, whole).map_err(AttentionError::from)?;
    let kept = Tensor::from_vec(kept, whole, &Device::Cpu)?.narrow(1, first, own)?.contiguous()?;
    let kept = kept.to_device(w.device())?.to_dtype(w.dtype())?;
    w * (kept * (1.0 / (1.0 - dropout.p)))?
}

/// w·v over the visible pairs.
fn weighted_sum(w: &Tensor, v: &Tensor, steps: &Steps) -> Result<Tensor> {
    product_with_values(w, v, |w, v| match &steps.visible {
        Some(visible) if v.elem_count() > 0 => visible.weighted_sum(w, v, steps.values_are_finite),
        _ => w.matmul(v),
    })
}

/// A product of weights and values, with the query heads of a group as rows of one matrix, as in [`dot_products`].
fn product_with_values(w: &Tensor, v: &Tensor, product: impl Fn(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (batch, heads, q_len, kv_len) = w.dims4()?;
    let (_, kv_heads, _, value_dim) = v.dims4()?;
    let rows = w.reshape((batch, kv_heads, heads / kv_heads * q_len, kv_len))?;
    product(&rows, v)?.reshape((batch, heads, q_len, value_dim))
}
