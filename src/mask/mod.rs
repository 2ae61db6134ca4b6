//! [`Mask`]: which keys each query may attend to.

mod rule;
mod table;

use std::ops::{BitAnd, BitOr, Range};
use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use crate::error::AttentionError;
use rule::PerSequence;
pub(crate) use rule::Rule;
use table::Table;

/// The sizes that scores have: (batch, num_heads, q_len, kv_len).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreShape {
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Queries in a sequence.
    pub q_len: usize,
    /// Keys in a sequence.
    pub kv_len: usize,
}

impl From<(usize, usize, usize, usize)> for ScoreShape {
    fn from((batch, num_heads, q_len, kv_len): (usize, usize, usize, usize)) -> Self {
        Self { batch, num_heads, q_len, kv_len }
    }
}

/// How much of a tile of scores a [`Mask`] lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// Every query of the tile may attend to every key of it.
    All,
    /// No query of the tile may attend to any key of it: the tile needs no work.
    None,
    /// Anything between, or too costly to tell.
    Some,
}

/// Which keys each query may attend to: `true` means *may attend*, always.
///
/// A mask is a description, not a matrix: it takes no memory that grows with q_len x kv_len, unless it was given a
/// tensor. It learns the sizes when it is used, so one mask serves every length.
///
/// Query `i` of `q_len` stands at position `i + kv_len - q_len` among the keys: the last query is aligned with the last
/// key (bottom-right, as in FlashAttention), which is what decoding against a cache means. Where the cache is longer
/// than what it holds, [`Mask::with_offset`] says where the first query stands. PyTorch's `is_causal` aligns the first
/// query with the first key; the two agree when q_len = kv_len.
///
/// Masks combine: `a & b` lets through what both do, `a | b` what either does.
///
/// A query that may attend to nothing gets a zero context and zero gradients, never NaN.
///
/// # Examples
///
/// ```
/// use candle_attention::Mask;
/// use candle_core::Device;
///
/// // Two sequences of 4 and 2 tokens, padded to 4, each token looking at itself and its past.
/// let mask = Mask::causal() & Mask::key_lengths(&[4, 2]);
/// let seen = mask.to_tensor((2, 1, 4, 4), &Device::Cpu)?;
/// assert_eq!(seen.get(0)?.get(0)?.to_vec2::<u8>()?, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]);
/// assert_eq!(seen.get(1)?.get(0)?.to_vec2::<u8>()?, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]);
///
/// // Prefix language model: a prompt of 2 tokens seen from everywhere, the rest causal.
/// let mask = Mask::prefix(2) | Mask::causal();
/// let seen = mask.to_tensor((1, 1, 3, 3), &Device::Cpu)?;
/// assert_eq!(seen.get(0)?.get(0)?.to_vec2::<u8>()?, [[1, 1, 0], [1, 1, 0], [1, 1, 1]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Mask(Rule);

impl Mask {
    /// Every query may attend to every key: no mask at all.
    pub fn full() -> Self {
        Self(Rule::Full)
    }

    /// Each query may attend to its own position and those before it.
    pub fn causal() -> Self {
        Self(Rule::Band { below: None, above: Some(0), offset: None })
    }

    /// Each query may attend to `left` positions before its own, its own, and `right` positions after it; `None` is no
    /// limit on that side.
    pub fn window(left: Option<usize>, right: Option<usize>) -> Self {
        let distance = |side: usize| i64::try_from(side).unwrap_or(i64::MAX);
        Self(Rule::Band { below: left.map(distance), above: right.map(distance), offset: None })
    }

    /// Causal attention to the last `width` positions, the query's own included (Mistral's `sliding_window`). With a
    /// width of 0 there is nothing to attend to.
    pub fn sliding_window(width: usize) -> Self {
        let below = i64::try_from(width).unwrap_or(i64::MAX) - 1;
        Self(Rule::Band { below: Some(below), above: Some(0), offset: None })
    }

    /// Sequence `b` of the batch holds `lengths[b]` keys; what lies behind them is padding.
    pub fn key_lengths(lengths: &[usize]) -> Self {
        Self(Rule::FirstKeys(PerSequence::Each(lengths.into())))
    }

    /// Every query may attend to the first `len` keys. Meant for combination: `Mask::prefix(n) | Mask::causal()` is the
    /// mask of a prefix language model.
    pub fn prefix(len: usize) -> Self {
        Self(Rule::FirstKeys(PerSequence::Same(len)))
    }

    /// Several documents packed into one sequence, one after the other, each of which sees itself alone
    /// (block-diagonal). The lengths must add up to kv_len. Combine with [`Mask::causal`] to train a language model on
    /// packed text.
    pub fn documents(lengths: &[usize]) -> Self {
        let ids = lengths.iter().zip(0u32..).flat_map(|(&len, id)| std::iter::repeat_n(id, len));
        Self(Rule::Documents { ids: PerSequence::Same(ids.collect()), offset: None })
    }

    /// As [`Mask::documents`], with packing of its own for each sequence of the batch: `ids[b][j]` is the document that
    /// key `j` belongs to.
    pub fn document_ids<Ids: AsRef<[u32]>>(ids: &[Ids]) -> Self {
        let rows = ids.iter().map(|row| row.as_ref().into()).collect();
        Self(Rule::Documents { ids: PerSequence::Each(rows), offset: None })
    }

    /// A boolean tensor, non-zero = may attend, of a shape that broadcasts to (batch, num_heads, q_len, kv_len), aligned
    /// at the right as in PyTorch's `scaled_dot_product_attention`. Its values are copied to the CPU.
    ///
    /// # Errors
    ///
    /// A float tensor (an additive mask is an `attn_bias`), or a rank outside 2 to 4.
    pub fn from_tensor(allowed: &Tensor) -> Result<Self> {
        Ok(Self(Rule::Table(Arc::new(Table::new(allowed, |x| x != 0)?))))
    }

    /// A boolean tensor of the opposite meaning, non-zero = may *not* attend, as `attn_mask` of PyTorch's
    /// `nn.MultiheadAttention`. Shapes as in [`Mask::from_tensor`].
    ///
    /// # Errors
    ///
    /// As [`Mask::from_tensor`].
    pub fn from_blocked(blocked: &Tensor) -> Result<Self> {
        Ok(Self(Rule::Table(Arc::new(Table::new(blocked, |x| x == 0)?))))
    }

    /// A boolean tensor (batch, kv_len), non-zero = padding, as `key_padding_mask` of PyTorch's `nn.MultiheadAttention`.
    ///
    /// # Errors
    ///
    /// A float tensor, or a rank other than 2.
    pub fn from_padding_mask(padding: &Tensor) -> Result<Self> {
        if padding.rank() != 2 {
            return Err(AttentionError::Rank {
                tensor: "padding mask",
                expected: "2 axes (batch, kv_len)",
                shape: padding.dims().to_vec(),
            }
            .into());
        }
        Self::from_blocked(&padding.unsqueeze(1)?.unsqueeze(1)?)
    }

    /// The first query stands at position `offset` among the keys, in every part of this mask that speaks of positions,
    /// instead of being aligned at the end.
    pub fn with_offset(self, offset: usize) -> Self {
        Self(self.0.with_offset(&PerSequence::Same(offset)))
    }

    /// As [`Mask::with_offset`], with a place of its own for each sequence of the batch: that of sequence `b` is
    /// `offsets[b]`. Sequences of different lengths in one cache need this.
    ///
    /// ```
    /// use candle_attention::Mask;
    /// use candle_core::Device;
    ///
    /// // One more token each for sequences of 2 and 0 tokens.
    /// let mask = Mask::causal().with_offsets(&[2, 0]);
    /// let seen = mask.to_tensor((2, 1, 1, 3), &Device::Cpu)?;
    /// assert_eq!(seen.flatten_all()?.to_vec1::<u8>()?, [1, 1, 1, 1, 0, 0]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn with_offsets(self, offsets: &[usize]) -> Self {
        Self(self.0.with_offset(&PerSequence::Each(offsets.into())))
    }

    /// As this mask for all keys but the last `count`, which every query may attend to: learned keys, say, that stand
    /// behind those of the sequence. Positions, lengths and documents are those of the keys before them.
    ///
    /// ```
    /// use candle_attention::Mask;
    /// use candle_core::Device;
    ///
    /// let seen = Mask::causal().with_extra_keys(1).to_tensor((1, 1, 2, 3), &Device::Cpu)?;
    /// assert_eq!(seen.get(0)?.get(0)?.to_vec2::<u8>()?, [[1, 0, 1], [1, 1, 1]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn with_extra_keys(self, count: usize) -> Self {
        match self.0 {
            Rule::Full => self,
            rule if count == 0 => Self(rule),
            rule => Self(Rule::Extra { rule: Arc::new(rule), count }),
        }
    }

    /// For those who have checked the shape and ask often.
    pub(crate) fn rule(&self) -> &Rule {
        &self.0
    }

    /// Whether this is [`Mask::full`], which costs nothing.
    pub fn is_full(&self) -> bool {
        matches!(self.0, Rule::Full)
    }

    /// Whether this mask fits scores of this shape.
    ///
    /// # Errors
    ///
    /// Lengths or offsets for another number of sequences, lengths beyond kv_len, documents that don't add up to kv_len, more
    /// extra keys than keys, a tensor that doesn't broadcast to the scores.
    pub fn check(&self, shape: impl Into<ScoreShape>) -> Result<()> {
        Ok(self.0.check(&shape.into())?)
    }

    /// The mask as a tensor of 0 and 1, to look at or to compute with, of shape (batch, num_heads, q_len, kv_len), where
    /// batch and num_heads are 1 if the mask is the same for all of them.
    ///
    /// # Errors
    ///
    /// As [`Mask::check`].
    pub fn to_tensor(&self, shape: impl Into<ScoreShape>, device: &Device) -> Result<Tensor> {
        let shape = shape.into();
        self.check(shape)?;
        let batch = if self.0.varies_by_sequence() { shape.batch } else { 1 };
        let heads = if self.0.varies_by_head() { shape.num_heads } else { 1 };
        let mut allowed = Vec::new();
        for b in 0..batch {
            for h in 0..heads {
                for i in 0..shape.q_len {
                    allowed.extend((0..shape.kv_len).map(|j| u8::from(self.0.allows(&shape, b, h, i, j))));
                }
            }
        }
        Tensor::from_vec(allowed, (batch, heads, shape.q_len, shape.kv_len), device)
    }

    /// How much of the tile `queries` x `keys` of head `h` of sequence `b` is let through. `All` and `None` are certain;
    /// `Some` may also be said of a tile of which the rest is too costly to tell.
    ///
    /// # Errors
    ///
    /// As [`Mask::check`], or a tile that reaches outside the scores.
    pub fn tile(
        &self,
        shape: impl Into<ScoreShape>,
        (b, h): (usize, usize),
        queries: Range<usize>,
        keys: Range<usize>,
    ) -> Result<Coverage> {
        let shape = shape.into();
        self.check(shape)?;
        if b >= shape.batch || h >= shape.num_heads || queries.end > shape.q_len || keys.end > shape.kv_len {
            return Err(AttentionError::Mask {
                part: "tile",
                expected: format!("a place inside {shape:?}"),
                got: format!("sequence {b}, head {h}, queries {queries:?}, keys {keys:?}"),
            }
            .into());
        }
        if queries.is_empty() || keys.is_empty() {
            return Ok(Coverage::None);
        }
        Ok(self.0.tile(&shape, (b, h), &queries, &keys))
    }
}

/// Lets through what both masks do.
impl BitAnd for Mask {
    type Output = Mask;

    fn bitand(self, other: Mask) -> Mask {
        match (self.0, other.0) {
            (Rule::Full, rule) | (rule, Rule::Full) => Mask(rule),
            (a, b) => Mask(Rule::Both(Arc::new((a, b)))),
        }
    }
}

/// Lets through what either mask does.
impl BitOr for Mask {
    type Output = Mask;

    fn bitor(self, other: Mask) -> Mask {
        match (self.0, other.0) {
            (Rule::Full, _) | (_, Rule::Full) => Mask(Rule::Full),
            (a, b) => Mask(Rule::Either(Arc::new((a, b)))),
        }
    }
}
