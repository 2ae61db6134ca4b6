//! The options and the output of attention.

use attention_kernels::Dropout;
use candle_core::Tensor;

use crate::mask::Mask;
use crate::parallel::context::ContextParallel;

/// Which implementation computes attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// The fused path if it can serve the call, otherwise the reference. The choice changes results only by rounding.
    /// On a GPU the reference allocates all q_len x kv_len scores, and a warning is logged once.
    #[default]
    Auto,
    /// candle's tensor operations, with every score in memory.
    Reference,
    /// One operation without a q_len x kv_len matrix; an error if it can't serve the call. On a GPU these are CUDA kernels of
    /// this crate, for F32, BF16 and F16 and a head_dim and value_dim of at most 256.
    Fused,
}

/// A step of the scores, in the order in which they are computed.
///
/// ONNX's Attention numbers them by `qk_matmul_output_mode`: 0 is `Scaled`, 1 `Softcapped`, 2 `Masked`, and 3 are the
/// weights. Earlier editions of its text add bias and mask before the softcap. Without a softcap, their modes 1 and 2
/// are both `Masked`. With one, they have no counterpart here.
///
/// ```
/// use candle_attention::{AttentionOptions, Mask, ScoreStage, scaled_dot_product_attention};
/// use candle_core::{Device, Tensor};
///
/// let query = Tensor::new(&[[4f32, 0.]], &Device::Cpu)?;
/// let key = Tensor::new(&[[1f32, 0.], [3., 0.]], &Device::Cpu)?;
/// let scores = |stage| {
///     // The mask hides the second key.
///     let (scale, attn_mask, return_scores) = (Some(0.5), Mask::prefix(1), Some(stage));
///     let options = AttentionOptions { scale, attn_mask, return_scores, ..Default::default() };
///     scaled_dot_product_attention(&query, &key, &key, &options)?.scores.unwrap().to_vec2::<f32>()
/// };
/// assert_eq!(scores(ScoreStage::Scaled)?, [[2.0, 6.0]]);
/// assert_eq!(scores(ScoreStage::Masked)?, [[2.0, f32::NEG_INFINITY]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ScoreStage {
    /// Q·Kᵀ · scale.
    Scaled,
    /// After the softcap. Equal to `Scaled` without one.
    Softcapped,
    /// After the bias and ALiBi have been added.
    Biased,
    /// After the mask: minus infinity where a query may not attend. The weights are the softmax of these.
    Masked,
}

/// The options of [`scaled_dot_product_attention`](crate::scaled_dot_product_attention). The default is the plain
/// formula, softmax(Q·Kᵀ / sqrt(head_dim))·V.
///
/// The steps in order: scores = Q·Kᵀ · scale; softcap; bias and ALiBi; mask; softmax; dropout.
///
/// ```
/// use candle_attention::{AttentionOptions, Mask};
///
/// let options = AttentionOptions { attn_mask: Mask::causal(), softcap: Some(50.0), ..Default::default() };
/// assert!(options.attn_bias.is_none());
/// ```
#[derive(Clone, Debug, Default)]
pub struct AttentionOptions {
    /// What the dot products are multiplied by; 1 / sqrt(head_dim) if not given. Finite; may be negative.
    pub scale: Option<f64>,
    /// Bounds the scores smoothly: softcap · tanh(scores / softcap). Finite and positive; 0 is none, as in ONNX. (Gemma
    /// 2, section 2.)
    pub softcap: Option<f64>,
    /// Which keys each query may attend to. `is_causal` of PyTorch and ONNX is `Mask::causal().with_offset(0)`, which
    /// differs from `Mask::causal()` if q_len != kv_len.
    pub attn_mask: Mask,
    /// Added to the scores: a float tensor that broadcasts to (batch, num_heads, q_len, kv_len), aligned at the right as
    /// [`Mask::from_tensor`] says. It gets a gradient. Minus infinity masks a key, as a mask does. A finite number that the
    /// dtype to compute in can't hold, such as `f64::MIN` for queries in f32, is an error.
    pub attn_bias: Option<Tensor>,
    /// Slopes of attention with linear biases (ALiBi), (num_heads) or (batch, num_heads): adds -slope · |position of
    /// the query - position of the key| to the scores. The last query is aligned with the last key, whatever the mask's
    /// offset. The slopes get a gradient. (Press, Smith, Lewis, "Train Short, Test Long", ICLR 2022, section 3.)
    pub alibi_slopes: Option<Tensor>,
    /// One more score for each head, (num_heads), that takes its share of the softmax and has no value. Rows of weights
    /// then sum to less than 1. The sinks get a gradient. (Xiao et al., "Efficient Streaming Language Models with
    /// Attention Sinks", ICLR 2024, section 3; as learned in gpt-oss.)
    pub sinks: Option<Tensor>,
    /// The probability that a weight is dropped, in [0, 1). The other weights are multiplied by 1 / (1 - dropout_p).
    pub dropout_p: f64,
    /// Decides which weights are dropped. The same seed drops the same weights on every device.
    pub dropout_seed: u64,
    /// The place of the first sequence in a larger batch. A batch that is computed in parts then drops the weights that it drops as a
    /// whole.
    pub first_sequence: usize,
    /// Which implementation computes the attention.
    pub backend: Backend,
    /// Whether to return [`AttentionOutput::weights`]. This changes no other number.
    pub return_weights: bool,
    /// Which [`AttentionOutput::scores`] to return, if any. This changes no other number.
    pub return_scores: Option<ScoreStage>,
    /// Whether to return [`AttentionOutput::logsumexp`]. Half types are widened for it, which changes other numbers by
    /// rounding. Numbers in f32 and f64 stay the same.
    pub return_logsumexp: bool,
    /// The ranks that share the sequence. Query, key, value and the results are then those of this rank's tokens, and the other options
    /// those of the whole sequence.
    pub parallel: Option<ContextParallel>,
}

impl AttentionOptions {
    /// The dropout of scores of this many heads, if there is any.
    pub(crate) fn dropout(&self, num_heads: usize) -> Option<Dropout> {
        let first = (self.first_sequence as u64).wrapping_mul(num_heads as u64);
        (self.dropout_p > 0.0).then_some(Dropout { p: self.dropout_p, seed: self.dropout_seed, first })
    }

    /// The softcap, where 0 is none.
    pub(crate) fn softcap(&self) -> Option<f64> {
        self.softcap.filter(|&cap| cap != 0.0)
    }
}

/// What attention returns. Every tensor is differentiable.
#[derive(Clone, Debug)]
pub struct AttentionOutput {
    /// Weights · value, (batch, num_heads, q_len, value_dim), in the input's dtype.
    pub context: Tensor,
    /// The weights after the softmax and before dropout, (batch, num_heads, q_len, kv_len), in the input's dtype. Each
    /// row sums to 1 minus the share of its sink, or to 0 if the query may attend to no key.
    pub weights: Option<Tensor>,
    /// The scores at the requested stage, (batch, num_heads, q_len, kv_len), in f32 (f64 for f64 input), without the
    /// sinks.
    pub scores: Option<Tensor>,
    /// ln Σ exp(scores) over the keys and the sink, (batch, num_heads, q_len), in f32 (f64 for f64 input). It is minus
    /// infinity if the query may attend to no key and has no sink.
    pub logsumexp: Option<Tensor>,
}
