//! What attention can be asked for, and what it gives back.

use candle_core::Tensor;

use crate::mask::Mask;

/// Which code computes attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// The fused path where it serves, else the reference. The choice changes results by rounding alone. On a GPU it is the
    /// reference, whose memory grows with q_len x kv_len: the `log` crate is told so once.
    #[default]
    Auto,
    /// Candle's tensor operations, with every score in memory.
    Reference,
    /// One operation without a q_len x kv_len matrix; an error where it can't serve.
    Fused,
}

/// Everything that [`scaled_dot_product_attention`](crate::scaled_dot_product_attention) can be asked for. The default
/// is the plain formula, softmax(Q·Kᵀ / sqrt(head_dim))·V.
///
/// In this order: scores = Q·Kᵀ · scale; softcap; bias and ALiBi; mask; softmax; dropout.
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
    /// Bounds the scores smoothly: softcap · tanh(scores / softcap). Finite and positive. (Gemma 2, section 2.)
    pub softcap: Option<f64>,
    /// Which keys each query may attend to.
    pub attn_mask: Mask,
    /// Added to the scores: a float tensor that broadcasts to (batch, num_heads, q_len, kv_len), aligned at the right.
    /// It gets a gradient. Minus infinity masks a key.
    pub attn_bias: Option<Tensor>,
    /// Slopes of attention with linear biases, (num_heads) or (batch, num_heads): adds -slope · |position of the query -
    /// position of the key| to the scores, the last query standing at the last key, whatever the mask's offset. They get
    /// a gradient.
    /// (Press, Smith, Lewis, "Train Short, Test Long", ICLR 2022, section 3.)
    pub alibi_slopes: Option<Tensor>,
    /// One more score for each head, (num_heads), that takes its share of the softmax and has no value: rows of weights
    /// then sum to less than 1. They get a gradient. (Xiao et al., "Efficient Streaming Language Models with Attention
    /// Sinks", ICLR 2024, section 3; as learned in gpt-oss.)
    pub sinks: Option<Tensor>,
    /// The probability that a weight is dropped, in [0, 1); the kept ones are multiplied by 1 / (1 - dropout_p).
    pub dropout_p: f64,
    /// Which weights are dropped: the same seed drops the same ones, on every device.
    pub dropout_seed: u64,
    /// Which code computes it.
    pub backend: Backend,
    /// Whether [`AttentionOutput::weights`] is wanted. Changes no other number.
    pub return_weights: bool,
    /// Whether [`AttentionOutput::logsumexp`] is wanted. Changes other numbers of half types by rounding
    /// alone (they are widened for it), and of f32 and f64 not at all.
    pub return_logsumexp: bool,
}

/// What attention gives back. All of it is differentiable.
#[derive(Clone, Debug)]
pub struct AttentionOutput {
    /// Weights · value, (batch, num_heads, q_len, value_dim), in the input's dtype.
    pub context: Tensor,
    /// After the softmax and before dropout, (batch, num_heads, q_len, kv_len), in the input's dtype. Each row sums to 1,
    /// less its sink's share; to 0 where there is nothing to attend to.
    pub weights: Option<Tensor>,
    /// ln Σ exp(scores) over the keys and the sink, (batch, num_heads, q_len), in f32 (f64 for f64 input); minus infinity
    /// where there is nothing to attend to.
    pub logsumexp: Option<Tensor>,
}
