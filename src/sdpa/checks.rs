//! [`Checked`]: the inputs of one call, checked once.

use attention_kernels::HeadNumbers;
use attention_kernels::mask::ScoreShape;
use candle_core::{DType, Tensor};

use crate::check::{check_device, check_dtype, check_held, check_number, compute_dtype};
use crate::empty::readable;
use crate::error::{AttentionError, Result};
use crate::sdpa::broadcast::{InputAxes, broadcast_batch, common_batch};
use crate::sdpa::head_layout::HeadLayout;
use crate::sdpa::options::AttentionOptions;
use crate::sdpa::overflow::check_range;

/// Inputs and options that have been checked against each other. Every backend takes this.
pub(crate) struct Checked<'a> {
    /// Query, key and value in `layout`, all of the same batch.
    pub(crate) inputs: [Tensor; 3],
    /// The order of the axes of the inputs and of the context.
    pub(crate) layout: HeadLayout,
    /// (batch, num_heads, q_len, head_dim), a view of the query. `k` and `v` likewise.
    pub(crate) q: Tensor,
    /// (batch, num_kv_heads, kv_len, head_dim)
    pub(crate) k: Tensor,
    /// (batch, num_kv_heads, kv_len, value_dim)
    pub(crate) v: Tensor,
    pub(crate) options: &'a AttentionOptions,
    /// The scores of the whole sequence, of which several ranks may hold a part each.
    pub(crate) scores: ScoreShape,
    pub(crate) value_dim: usize,
    pub(crate) scale: f64,
    /// The numbers of the heads that dropout counts.
    pub(crate) heads: Option<HeadNumbers>,
}

impl<'a> Checked<'a> {
    /// Checks tensors of four axes in the given layout. `axes` are those of the caller's inputs.
    pub(crate) fn new(
        inputs: [&Tensor; 3],
        layout: HeadLayout,
        axes: InputAxes,
        options: &'a AttentionOptions,
    ) -> Result<Self> {
        let [q, k, v] = inputs.map(|x| layout.transpose(x));
        let batch = check_tensors([&q?, &k?, &v?], axes)?;
        let [q, k, v] = inputs.map(|x| broadcast_batch(x, batch));
        let inputs = [q?, k?, v?];
        let [q, k, v] = inputs.each_ref().map(|x| readable(&layout.transpose(x)?));
        let (q, k, v) = (q?, k?, v?);
        check_scale_and_softcap(options.scale, options.softcap, q.dtype())?;
        check_number("dropout_p", Some(options.dropout_p), "a probability in [0, 1)", |x| (0.0..1.0).contains(&x))?;
        let (_, num_heads, q_len, head_dim) = q.dims4()?;
        let mut scores = ScoreShape { batch, num_heads, q_len, kv_len: k.dim(2)? };
        if let Some(parallel) = &options.parallel {
            for (tensor, x) in [("query", &q), ("key", &k)] {
                let dims = x.dims4()?.into();
                parallel.check_tokens(tensor, x.dim(2)?, || axes.of(dims))?;
            }
            (scores.q_len, scores.kv_len) = (parallel.split.len(), parallel.split.len());
        }
        check_options(&q, &scores, options)?;
        let (value_dim, scale) = (v.dim(3)?, options.scale.unwrap_or(1.0 / (head_dim as f64).sqrt()));
        Ok(Self { inputs, layout, q, k, v, options, scores, value_dim, scale, heads: None })
    }
}

/// Checks that query, key and value have the same rank, from 2 to 4, and returns it.
pub(super) fn check_ranks(query: &Tensor, key: &Tensor, value: &Tensor) -> Result<usize, AttentionError> {
    let rank = query.rank();
    if !(2..=4).contains(&rank) {
        return Err(AttentionError::Rank {
            tensor: "query",
            expected: "4 axes (batch, num_heads, q_len, head_dim), or 3 or 2 without num_heads and batch",
            shape: query.dims().to_vec(),
        });
    }
    for (tensor, x) in [("key", key), ("value", value)] {
        if x.rank() != rank {
            let expected = "as many axes as query";
            return Err(AttentionError::Rank { tensor, expected, shape: x.dims().to_vec() });
        }
    }
    Ok(rank)
}

/// Checks tensors (batch, heads, len, dim), whose batch may be 1, and returns the number of sequences.
fn check_tensors([query, key, value]: [&Tensor; 3], axes: InputAxes) -> Result<usize> {
    let (_, num_heads, q_len, head_dim) = query.dims4()?;
    let (_, num_kv_heads, kv_len, _) = key.dims4()?;
    let batch = common_batch([query.dim(0)?, key.dim(0)?, value.dim(0)?]);
    let own = |x: &Tensor| Ok::<_, candle_core::Error>(axes.of(x.dims4()?.into()));
    let value_dim = value.dim(3)?;
    check_dtype("query", query.dtype())?;
    for (tensor, x, dim, last) in [("key", key, head_dim, "head_dim"), ("value", value, value_dim, "value_dim")] {
        if x.dtype() != query.dtype() {
            let expected = format!("{:?}, that of query", query.dtype());
            return Err(AttentionError::DType { tensor, expected, got: x.dtype() }.into());
        }
        check_device(tensor, x, query)?;
        if ![1, batch].contains(&x.dim(0)?) || x.dims()[1..] != [num_kv_heads, kv_len, dim] {
            let sizes = axes.named(["batch", "num_kv_heads", "kv_len", last], [batch, num_kv_heads, kv_len, dim]);
            let expected = format!("{sizes}, given query {:?} and key {:?}", own(query)?, own(key)?);
            return Err(AttentionError::Shape { tensor, expected, shape: own(x)? }.into());
        }
    }
    if num_kv_heads == 0 || num_heads % num_kv_heads != 0 {
        return Err(AttentionError::Heads { num_heads, num_kv_heads }.into());
    }
    if head_dim == 0 {
        let names = axes.of(["batch", "num_heads", "q_len", "head_dim"]).join(", ");
        let expected = format!("({names}) with head_dim at least 1");
        return Err(AttentionError::Shape { tensor: "query", expected, shape: own(query)? }.into());
    }
    // A broadcast view can have a shape for which the result doesn't fit into memory.
    for shape in [
        [batch, num_heads, q_len, kv_len],
        [batch, num_heads, q_len, head_dim.max(value_dim)],
        [batch, num_kv_heads, kv_len, head_dim.max(value_dim)],
    ] {
        let bytes = shape.iter().try_fold(size_of::<f64>(), |bytes, &size| bytes.checked_mul(size));
        if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
            return Err(AttentionError::TooLarge { shape }.into());
        }
    }
    for (tensor, x) in [("query", query), ("key", key), ("value", value)] {
        if x.dims().iter().any(|&dim| i32::try_from(dim).is_err()) {
            let expected = format!("with at most {} along every axis", i32::MAX);
            return Err(AttentionError::Shape { tensor, expected, shape: own(x)? }.into());
        }
    }
    Ok(batch)
}

/// Checks the numbers that scores of inputs in `dtype` are multiplied by and divided by.
pub(crate) fn check_scale_and_softcap(
    scale: Option<f64>,
    softcap: Option<f64>,
    dtype: DType,
) -> Result<(), AttentionError> {
    let (computed_in, softcap) = (compute_dtype(dtype), softcap.filter(|&cap| cap != 0.0));
    check_number("scale", scale, "a finite number", f64::is_finite)?;
    check_held("scale", scale, computed_in)?;
    check_number("softcap", softcap, "a finite number above 0, or 0 for none", |x| x > 0.0 && x.is_finite())?;
    // The inverse of such a number is finite, too.
    check_held("softcap", softcap, computed_in)
}

fn check_options(query: &Tensor, shape: &ScoreShape, options: &AttentionOptions) -> Result<()> {
    let &ScoreShape { batch, num_heads, .. } = shape;
    options.attn_mask.rule().check(shape)?;
    if let Some(bias) = &options.attn_bias {
        check_bias(bias, query, shape)?;
    }
    if let Some(slopes) = &options.alibi_slopes {
        let fits = slopes.dims() == [num_heads] || slopes.dims() == [batch, num_heads];
        let expected = format!("(num_heads) = [{num_heads}] or (batch, num_heads) = [{batch}, {num_heads}]");
        check_extra("alibi_slopes", slopes, query, fits, expected)?;
    }
    if let Some(sinks) = &options.sinks {
        let expected = format!("(num_heads) = [{num_heads}]");
        check_extra("sinks", sinks, query, sinks.dims() == [num_heads], expected)?;
    }
    Ok(())
}

/// Checks a bias for scores of this query. A layer calls this before it changes a bias.
pub(crate) fn check_bias(bias: &Tensor, query: &Tensor, scores: &ScoreShape) -> Result<()> {
    let scores = [scores.batch, scores.num_heads, scores.q_len, scores.kv_len];
    let broadcasts = bias.rank() <= 4
        && bias.dims().iter().rev().zip(scores.iter().rev()).all(|(&dim, &size)| dim == size || dim == 1);
    let expected = format!("that broadcasts to (batch, num_heads, q_len, kv_len) = {scores:?}");
    check_extra("attn_bias", bias, query, broadcasts, expected)
}

/// Checks a tensor other than query, key and value: any float dtype, the same device, a shape that fits, numbers in the
/// range that is computed in.
fn check_extra(tensor: &'static str, x: &Tensor, query: &Tensor, fits: bool, expected: String) -> Result<()> {
    check_dtype(tensor, x.dtype())?;
    check_device(tensor, x, query)?;
    if !fits {
        return Err(AttentionError::Shape { tensor, expected, shape: x.dims().to_vec() }.into());
    }
    Ok(check_range(tensor, x, compute_dtype(query.dtype()))?)
}
