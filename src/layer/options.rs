//! The options and the output of one call of a layer.

use candle_core::Tensor;

use crate::adapter::config::AdapterChoice;
use crate::error::{AttentionError, Error, Result};
use crate::mask::Mask;
use crate::parallel::context::ContextParallel;
use crate::rotary::Positions;
use crate::sdpa::{Backend, ScoreStage};

/// The options of one call of a layer, in addition to its config.
#[derive(Clone, Debug, Default)]
pub struct ForwardOptions {
    /// Which keys each query may attend to. The config's own mask applies as well. Tensors broadcast to the scores as
    /// [`Mask::from_tensor`] says.
    pub attn_mask: Mask,
    /// Added to the scores: broadcasts to (batch, num_heads, q_len, kv_len) as [`Mask::from_tensor`] says, where kv_len
    /// doesn't count the extra keys. It gets a gradient.
    pub attn_bias: Option<Tensor>,
    /// Whether dropout is on.
    pub train: bool,
    /// The place of the first sequence in a larger batch. A batch that is computed in parts, by several ranks or one after the
    /// other, then drops the numbers that it drops as a whole. (The parts have to have the same
    /// [`dropout_calls`](crate::SelfAttention::set_dropout_calls).)
    pub first_sequence: usize,
    /// Position of the first token, for the rotary embedding.
    pub position_offset: usize,
    /// The position of each token, for the rotary embedding: integers (len) or (batch, len), in place of
    /// `position_offset`. They suit batches that are padded at the left, and packed documents. Masks and ALiBi still
    /// count the tokens as they come. Without a rotary embedding they change nothing.
    pub position_ids: Option<Tensor>,
    /// Which implementation computes the attention.
    pub backend: Backend,
    /// Which [adapter](crate::adapter) is used.
    pub adapter: AdapterChoice,
    /// Whether to return [`ForwardOutput::weights`]. This changes no other number.
    pub return_weights: bool,
    /// Which [`ForwardOutput::scores`] to return, if any. This changes no other number.
    pub return_scores: Option<ScoreStage>,
    /// Whether to return [`ForwardOutput::logsumexp`]. Half types are widened for it, which changes other numbers by
    /// rounding. Numbers in f32 and f64 stay the same.
    pub return_logsumexp: bool,
    /// The ranks that share the sequence. The input, `position_ids` and the results are then those of this rank's tokens, and the
    /// other options those of the whole sequence. Without `position_ids`, each token has its position in the whole.
    pub parallel: Option<ContextParallel>,
}

/// What a layer returns. If the input has no batch axis, none of these has one.
#[derive(Clone, Debug)]
pub struct ForwardOutput {
    /// The output, (batch, len, output_dim).
    pub output: Tensor,
    /// The weights after the softmax, (batch, num_heads, q_len, kv_len), with one more column for each of the
    /// [extra keys](crate::SelfAttentionConfig::extra_keys).
    pub weights: Option<Tensor>,
    /// The scores at the requested stage, of the shape of the weights, in f32 (f64 for an f64 layer).
    pub scores: Option<Tensor>,
    /// ln Σ exp(scores), (batch, num_heads, q_len).
    pub logsumexp: Option<Tensor>,
}

impl ForwardOptions {
    /// The positions of the tokens of x (batch, len, dim). They count up from `offsets` if there are no `position_ids`.
    pub(super) fn positions(&self, x: &Tensor, offsets: &[usize]) -> Result<Positions> {
        let Some(ids) = &self.position_ids else {
            return match &self.parallel {
                Some(parallel) => Ok(Positions::from_ranges(&parallel.own_positions(), self.position_offset)?),
                None => Ok(Positions::from_offsets(offsets)),
            };
        };
        if self.position_offset != 0 {
            let (name, expected) = ("position_offset", "0 with position_ids");
            return Err(AttentionError::Number { name, expected, got: self.position_offset as f64 }.into());
        }
        let (batch, len, _) = x.dims3()?;
        Positions::from_ids(ids, batch, len)
    }

    /// Refuses ranks that share the sequence, for calls that don't serve them.
    pub(super) fn check_alone(&self, got: &'static str) -> Result<(), AttentionError> {
        let expected = "self-attention of a whole sequence with ForwardOptions::parallel";
        if self.parallel.is_some() { Err(AttentionError::Backend { expected, got }) } else { Ok(()) }
    }
}

impl ForwardOutput {
    pub(super) fn map(self, f: impl Fn(Tensor) -> candle_core::Result<Tensor>) -> Result<Self> {
        Ok(Self {
            output: f(self.output)?,
            weights: self.weights.map(&f).transpose()?,
            scores: self.scores.map(&f).transpose()?,
            logsumexp: self.logsumexp.map(&f).transpose()?,
        })
    }

    pub(super) fn with_weights(self) -> Result<(Tensor, Tensor)> {
        let missing = || Error::Candle(candle_core::Error::msg("weights were not requested"));
        Ok((self.output, self.weights.ok_or_else(missing)?))
    }
}
