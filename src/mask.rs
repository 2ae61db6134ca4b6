//! [`Mask`]: which keys each query may attend to.

use std::ops::{BitAnd, BitOr, Range};
use std::sync::Arc;

use attention_kernels::mask::{MaskError, PerSequence, Rule, ScoreShape, Table, TableAxes};
use attention_kernels::reserve;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};

use crate::empty::readable;
use crate::error::{AttentionError, Result};
use crate::memory;

/// Which keys each query may attend to: `true` means *may attend*, always.
///
/// A mask is a description, not a matrix: its size doesn't grow with q_len x kv_len, unless it is made from a tensor.
/// It gets the sizes when it is used, so that one mask works for every length.
///
/// Query `i` of `q_len` has position `i + kv_len - q_len` among the keys: the last query is aligned with the last key
/// (bottom-right, as in FlashAttention). Decoding with a cache needs this alignment. If the cache has room for more
/// keys than it holds, [`Mask::with_offset`] sets the position of the first query instead. `is_causal` of PyTorch and
/// ONNX aligns the first query with the first key (top-left), which is `Mask::causal().with_offset(0)`. The two differ
/// only if q_len != kv_len.
///
/// Masks combine: `a & b` allows what both masks allow, `a | b` what either mask allows. At most 65536 masks can be
/// combined, and `&` and `|` can alternate at most 256 times; [`Mask::check`] refuses more.
///
/// A query that may attend to nothing gets a zero context and zero gradients, never NaN.
///
/// # Examples
///
/// ```
/// use candle_attention::Mask;
/// use candle_core::Device;
///
/// // Two sequences of 4 and 2 tokens, padded to 4. Each token attends to itself and the tokens before it.
/// let mask = Mask::causal() & Mask::key_lengths(&[4, 2]);
/// let seen = mask.to_tensor((2, 1, 4, 4), &Device::Cpu)?;
/// assert_eq!(seen.get(0)?.get(0)?.to_vec2::<u8>()?, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]);
/// assert_eq!(seen.get(1)?.get(0)?.to_vec2::<u8>()?, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]);
///
/// // Prefix language model: every token attends to a prompt of 2 tokens, and causally to the rest.
/// let mask = Mask::prefix(2) | Mask::causal();
/// let seen = mask.to_tensor((1, 1, 3, 3), &Device::Cpu)?;
/// assert_eq!(seen.get(0)?.get(0)?.to_vec2::<u8>()?, [[1, 1, 0], [1, 1, 0], [1, 1, 1]]);
/// # Ok::<(), candle_attention::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Mask(Rule);

impl Mask {
    /// Every query may attend to every key: no mask at all.
    pub fn full() -> Self {
        Self(Rule::Full)
    }

    /// Each query may attend to its own position and the positions before it.
    ///
    /// The last query is aligned with the last key. `is_causal` of PyTorch and ONNX aligns the first query with the
    /// first key, which is `Mask::causal().with_offset(0)`.
    ///
    /// ```
    /// use candle_attention::Mask;
    /// use candle_core::Device;
    ///
    /// let seen = |mask: Mask| mask.to_tensor((1, 1, 2, 3), &Device::Cpu)?.squeeze(0)?.squeeze(0)?.to_vec2::<u8>();
    /// assert_eq!(seen(Mask::causal())?, [[1, 1, 0], [1, 1, 1]]);
    /// assert_eq!(seen(Mask::causal().with_offset(0))?, [[1, 0, 0], [1, 1, 0]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn causal() -> Self {
        Self(Rule::Band { below: None, above: Some(0), offset: None })
    }

    /// Each query may attend to `left` positions before its own, its own, and `right` positions after it. `None` means
    /// no limit on that side.
    pub fn window(left: Option<usize>, right: Option<usize>) -> Self {
        let distance = |side: usize| i64::try_from(side).unwrap_or(i64::MAX);
        Self(Rule::Band { below: left.map(distance), above: right.map(distance), offset: None })
    }

    /// Causal attention to the last `width` positions, including the query's own (Mistral's `sliding_window`). With a
    /// width of 0 no query may attend to any key.
    pub fn sliding_window(width: usize) -> Self {
        let below = i64::try_from(width).unwrap_or(i64::MAX) - 1;
        Self(Rule::Band { below: Some(below), above: Some(0), offset: None })
    }

    /// Sequence `b` of the batch has `lengths[b]` keys. The keys after them are padding.
    pub fn key_lengths(lengths: &[usize]) -> Self {
        Self(Rule::FirstKeys(PerSequence::Each(lengths.into())))
    }

    /// Every query may attend to the first `len` keys. This is meant to be combined: `Mask::prefix(n) | Mask::causal()`
    /// is the mask of a prefix language model.
    pub fn prefix(len: usize) -> Self {
        Self(Rule::FirstKeys(PerSequence::Same(len)))
    }

    /// Several documents packed into one sequence, one after the other. Each token may attend only to its own document
    /// (block-diagonal). The lengths must add up to kv_len. A query whose position is before the first key or after the
    /// last one sees nothing. Combine with [`Mask::causal`] to train a language model on packed text.
    pub fn documents(lengths: &[usize]) -> Self {
        let ends = lengths.iter().scan(0usize, |end, &len| {
            *end = end.saturating_add(len);
            Some(*end)
        });
        Self(Rule::Packed { ends: ends.collect(), offset: None })
    }

    /// As [`Mask::documents`], with a separate packing for each sequence of the batch: `ids[b][j]` is the document of
    /// key `j` in sequence `b`.
    pub fn document_ids<Ids: AsRef<[u32]>>(ids: &[Ids]) -> Self {
        let rows = ids.iter().map(|row| row.as_ref().into()).collect();
        Self(Rule::Documents { ids: PerSequence::Each(rows), offset: None })
    }

    /// A boolean tensor, non-zero = may attend. Its values are copied to the CPU.
    ///
    /// # Shapes
    ///
    /// The tensor broadcasts to the scores, aligned at the right. An axis of length 1 stands for any length:
    ///
    /// | axes | are |
    /// |---|---|
    /// | 0, 1, 2 | a number, (kv_len), (q_len, kv_len) |
    /// | 3 | (n, q_len, kv_len), see below |
    /// | 4 | (batch, num_heads, q_len, kv_len) |
    ///
    /// The first of three axes depends on the inputs of attention:
    ///
    /// - Inputs (batch, num_heads, len, dim) of [`scaled_dot_product_attention`](crate::scaled_dot_product_attention),
    ///   and [`Mask::to_tensor`] and [`Mask::check`]: n is num_heads, as in PyTorch.
    /// - Inputs (batch, len, dim) of [`scaled_dot_product_attention`](crate::scaled_dot_product_attention): n is batch,
    ///   as in PyTorch.
    /// - The input (batch, len, embed_dim) or (len, embed_dim) of a layer: n is batch, num_heads or batch · num_heads
    ///   (`nn.MultiheadAttention`), whichever it equals. If batch and num_heads are the same number above 1, such an n
    ///   is an error, since both could be meant: give the tensor four axes with `unsqueeze(1)` (one mask for each
    ///   sequence) or `unsqueeze(0)` (one for each head).
    ///
    /// The same holds for `attn_bias`. A mask for fewer keys than there are is an error. [`Mask::with_hidden_keys`] hides
    /// the other keys, as ONNX does.
    ///
    /// # Errors
    ///
    /// A float tensor (an additive mask is an `attn_bias`), more than 4 axes, or too little memory. Whether the shape fits
    /// the scores is checked when the mask is used.
    pub fn from_tensor(allowed: &Tensor) -> Result<Self> {
        Ok(Self(Rule::Table(Arc::new(table(allowed, true)?))))
    }

    /// A boolean tensor of the opposite meaning, non-zero = may *not* attend, as `attn_mask` of PyTorch's
    /// `nn.MultiheadAttention`. Shapes as in [`Mask::from_tensor`].
    ///
    /// # Errors
    ///
    /// As [`Mask::from_tensor`].
    pub fn from_blocked(blocked: &Tensor) -> Result<Self> {
        Ok(Self(Rule::Table(Arc::new(table(blocked, false)?))))
    }

    /// A boolean tensor (batch, kv_len), non-zero = padding, as `key_padding_mask` of PyTorch's
    /// `nn.MultiheadAttention`.
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
        let table = table(&padding.unsqueeze(1)?.unsqueeze(1)?, false)?;
        Ok(Self(Rule::Table(Arc::new(table.with_axes(TableAxes::Padding)))))
    }

    /// This mask with the first query at position `offset` among the keys, instead of the last query at the last key.
    /// It applies to every part of the mask that depends on positions. With a negative offset the first queries stand
    /// before the first key; a causal mask hides all keys from them.
    pub fn with_offset(self, offset: i64) -> Self {
        Self(self.0.with_offset(&PerSequence::Same(offset)))
    }

    /// As [`Mask::with_offset`], with a separate offset for each sequence of the batch: `offsets[b]` for sequence `b`.
    /// Sequences of different lengths in one cache need this.
    ///
    /// ```
    /// use candle_attention::Mask;
    /// use candle_core::Device;
    ///
    /// // One more token each for sequences of 2 and 0 tokens.
    /// let mask = Mask::causal().with_offsets(&[2, 0]);
    /// let seen = mask.to_tensor((2, 1, 1, 3), &Device::Cpu)?;
    /// assert_eq!(seen.flatten_all()?.to_vec1::<u8>()?, [1, 1, 1, 1, 0, 0]);
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    pub fn with_offsets(self, offsets: &[i64]) -> Self {
        Self(self.0.with_offset(&PerSequence::Each(offsets.into())))
    }

    /// This mask for all keys except the last `count`, to which every query may attend. Such extra keys are, for
    /// example, learned keys that are appended to those of the sequence. Positions, lengths and documents don't count
    /// them.
    ///
    /// ```
    /// use candle_attention::Mask;
    /// use candle_core::Device;
    ///
    /// let seen = Mask::causal().with_extra_keys(1).to_tensor((1, 1, 2, 3), &Device::Cpu)?;
    /// assert_eq!(seen.get(0)?.get(0)?.to_vec2::<u8>()?, [[1, 0, 1], [1, 1, 1]]);
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    pub fn with_extra_keys(self, count: usize) -> Self {
        Self(self.0.with_extra_keys(count, true))
    }

    /// This mask for all keys except the last `count`, which are hidden from every query. Positions, lengths and
    /// documents don't count them. ONNX's Attention reads a mask that is shorter than the keys in this way. For a
    /// shorter bias, also pad it: `bias.pad_with_zeros(D::Minus1, 0, count)`.
    ///
    /// ```
    /// use candle_attention::Mask;
    /// use candle_core::{Device, Tensor};
    ///
    /// // A mask for two of three keys.
    /// let mask = Mask::from_tensor(&Tensor::new(&[[1u8, 0], [1, 1]], &Device::Cpu)?)?.with_hidden_keys(1);
    /// let seen = mask.to_tensor((1, 1, 2, 3), &Device::Cpu)?;
    /// assert_eq!(seen.get(0)?.get(0)?.to_vec2::<u8>()?, [[1, 0, 0], [1, 1, 0]]);
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    pub fn with_hidden_keys(self, count: usize) -> Self {
        Self(self.0.with_extra_keys(count, false))
    }

    /// The same mask with `f` of the shape of each of its tensors as the tensor's four axes. `f` also gets the scores
    /// that the tensor speaks of, and its error is the shape that it expects.
    pub(crate) fn map_axes<F>(&self, shape: &ScoreShape, f: F) -> Result<Self, AttentionError>
    where
        F: Fn(&[usize], &ScoreShape) -> Result<[usize; 4], String>,
    {
        let aligned = |table: &Arc<Table>, shape: &ScoreShape| match table.axes() {
            TableAxes::Padding => Ok(table.clone()),
            TableAxes::Last(_) => {
                let own = table.shape();
                let refuse = |expected| MaskError {
                    part: "tensor",
                    expected: format!("a shape {expected}"),
                    got: format!("{own:?}"),
                };
                Ok(Arc::new(table.reshaped(f(&own, shape).map_err(refuse)?)?))
            }
        };
        Ok(Self(self.0.map_tables(shape, &aligned)?))
    }

    /// The mask of some of the heads of scores of this shape. Its tensors have four axes.
    pub(crate) fn of_heads(&self, shape: &ScoreShape, heads: &Range<usize>) -> Result<Self, AttentionError> {
        let own = |table: &Arc<Table>, _: &ScoreShape| Ok(Arc::new(table.of_heads(heads.clone())?));
        Ok(Self(self.0.map_tables(shape, &own)?))
    }

    /// The rule behind the mask, for code that has checked the shape and reads many entries.
    pub(crate) fn rule(&self) -> &Rule {
        &self.0
    }

    /// Whether this is [`Mask::full`], which hides nothing and costs nothing.
    pub fn is_full(&self) -> bool {
        self.0.is_full()
    }

    /// Checks that this mask fits scores (batch, num_heads, q_len, kv_len).
    ///
    /// # Errors
    ///
    /// Lengths or offsets for another number of sequences, lengths beyond kv_len, documents that don't add up to
    /// kv_len, more extra or hidden keys than keys, a tensor that doesn't broadcast to the scores, too many combined masks.
    pub fn check(&self, shape: (usize, usize, usize, usize)) -> Result<()> {
        Ok(self.0.check(&shape.into())?)
    }

    /// The mask as a tensor of 0 and 1, (batch, num_heads, q_len, kv_len). The batch axis has size 1 if the mask is the
    /// same for all sequences, and the head axis if it is the same for all heads.
    ///
    /// # Errors
    ///
    /// As [`Mask::check`], and too little memory.
    pub fn to_tensor(&self, shape: (usize, usize, usize, usize), device: &Device) -> Result<Tensor> {
        let shape = ScoreShape::from(shape);
        self.0.check(&shape)?;
        let batch = if self.0.varies_by_sequence() { shape.batch } else { 1 };
        let heads = if self.0.varies_by_head() { shape.num_heads } else { 1 };
        let dims = [batch, heads, shape.q_len, shape.kv_len];
        if dims.contains(&0) {
            return Ok(Tensor::zeros(&dims, DType::U8, device)?);
        }
        let mut allowed = reserve("mask as a tensor", memory::bytes(&dims, DType::U8))?;
        for b in 0..batch {
            for h in 0..heads {
                for i in 0..shape.q_len {
                    allowed.extend((0..shape.kv_len).map(|j| u8::from(self.0.allows(&shape, b, h, i, j))));
                }
            }
        }
        Ok(Tensor::from_vec(allowed, &dims, device)?)
    }
}

/// Allows what both masks allow.
impl BitAnd for Mask {
    type Output = Mask;

    fn bitand(self, other: Mask) -> Mask {
        Mask(self.0 & other.0)
    }
}

/// Allows what either mask allows.
impl BitOr for Mask {
    type Output = Mask;

    fn bitor(self, other: Mask) -> Mask {
        Mask(self.0 | other.0)
    }
}

/// The entries of a boolean tensor as a table of allowed scores: those that are non-zero, or if `nonzero_allows` is
/// false those that are zero.
fn table(tensor: &Tensor, nonzero_allows: bool) -> Result<Table> {
    if !tensor.dtype().is_int() {
        return Err(AttentionError::DType {
            tensor: "mask",
            expected: "u8 or another integer (a float mask is added to the scores: pass it as attn_bias)".into(),
            got: tensor.dtype(),
        }
        .into());
    }
    let rank = tensor.rank();
    if rank > 4 {
        return Err(AttentionError::Rank {
            tensor: "mask",
            expected: "at most 4 axes that broadcast to (batch, num_heads, q_len, kv_len)",
            shape: tensor.dims().to_vec(),
        }
        .into());
    }
    memory::check_countable("mask", tensor)?;
    let mut dims = [1; 4];
    dims[4 - rank..].copy_from_slice(tensor.dims());
    // The storage is read where it is: a copy of a large table would take as much memory again.
    let tensor = readable(&tensor.to_device(&Device::Cpu)?)?;
    let (storage, _) = tensor.storage_and_layout();
    let entries = match &*storage {
        Storage::Cpu(CpuStorage::U8(x)) => are_nonzero(x, &tensor, nonzero_allows)?,
        Storage::Cpu(CpuStorage::U32(x)) => are_nonzero(x, &tensor, nonzero_allows)?,
        Storage::Cpu(CpuStorage::I16(x)) => are_nonzero(x, &tensor, nonzero_allows)?,
        Storage::Cpu(CpuStorage::I32(x)) => are_nonzero(x, &tensor, nonzero_allows)?,
        Storage::Cpu(CpuStorage::I64(x)) => are_nonzero(x, &tensor, nonzero_allows)?,
        _ => return Err(candle_core::Error::msg("mask: expected integers on the CPU").into()),
    };
    Ok(Table::new(dims, entries)?.with_axes(TableAxes::Last(rank)))
}

/// For each entry of a tensor, row by row, whether being non-zero equals `expected`.
fn are_nonzero<T: Default + PartialEq>(storage: &[T], tensor: &Tensor, expected: bool) -> Result<Vec<bool>> {
    let holds = |x: &T| (*x != T::default()) == expected;
    let mut entries = reserve("mask from a tensor", tensor.elem_count())?;
    match tensor.layout().contiguous_offsets() {
        Some((start, end)) => entries.extend(storage[start..end].iter().map(holds)),
        None => entries.extend(tensor.strided_index().map(|at| holds(&storage[at]))),
    }
    Ok(entries)
}
