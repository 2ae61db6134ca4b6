//! [`KvCache`]: the keys and values of the tokens so far.
//!
//! candle-nn's caches can't be used here. `KvCache` and `RotatingKvCache` have one length for the whole batch, and
//! share their memory with their clones. `KvCache` grows by a fixed amount, so that a long text is copied many times.
//! `RotatingKvCache` and `ScatteredKvCache` return the keys out of order, which windows and ALiBi would have to undo.

mod store;
mod tensors;

use std::ops::Range;

use attention_kernels::{collected, filled, reserve};
use candle_core::{DType, Device, Tensor};

use crate::error::{AttentionError, Result};
use crate::layer::config::SelfAttentionConfig;
use store::{Layout, Store};

/// The keys and values of the tokens that a [`SelfAttention`](crate::SelfAttention) layer has processed, so that they
/// aren't computed again for the next tokens. [`SelfAttention::kv_cache`](crate::SelfAttention::kv_cache) makes a cache
/// and [`SelfAttention::forward_cached`](crate::SelfAttention::forward_cached) uses it. A model needs one for each
/// layer.
///
/// Each sequence of the batch has its own length. The capacity doubles when it is full, so that the average cost of
/// storing a token stays constant; [`reserve`](KvCache::reserve) allocates it in advance. With a sliding window the
/// cache holds at most two windows, or one window and the tokens of the last call.
///
/// Keys are stored after QK-norm and rotary embedding. After an error the cache is unchanged.
///
/// # Examples
///
/// ```
/// use candle_attention::{SelfAttention, SelfAttentionConfig};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let config = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(8, 2) };
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let attention = SelfAttention::new(&config, vb)?;
/// let mut cache = attention.kv_cache(2)?;
///
/// // Two prompts of 5 and 3 tokens, then one more token for each.
/// let prompts = Tensor::randn(0f32, 1.0, (2, 5, 8), &Device::Cpu)?;
/// attention.prefill(&prompts, &[5, 3], &mut cache)?;
/// attention.forward_cached(&prompts.narrow(1, 0, 1)?, &mut cache)?;
/// assert_eq!(cache.lengths(), [6, 4]);
///
/// // Beam search continues the first sequence twice. `truncate` removes a rejected draft.
/// let mut beams = cache.select(&[0, 0])?;
/// beams.truncate(5)?;
/// assert_eq!((beams.lengths(), cache.lengths()), (&[5, 5][..], &[6, 4][..]));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct KvCache {
    layout: Layout,
    max_len: Option<usize>,
    /// The number of tokens of each sequence so far.
    lengths: Vec<usize>,
    /// How many tokens of each sequence the store holds: the last ones, starting at slot 0.
    held: Vec<usize>,
    store: Option<Store>,
}

/// What a list with an entry for each sequence is in an error of memory.
const LENGTHS: &str = "lengths of the sequences";

/// The store of a cache with new tokens written after the held ones. [`KvCache::commit`] adds them to the cache.
pub(crate) struct Staged {
    store: Store,
    held: Vec<usize>,
    len: usize,
}

impl KvCache {
    pub(crate) fn new(config: &SelfAttentionConfig, batch: usize, dtype: DType, device: &Device) -> Result<Self> {
        if !config.is_causal {
            let expected = "true: otherwise every new token would change the outputs of the earlier tokens";
            return Err(
                AttentionError::Config { field: "is_causal", expected: expected.into(), got: "false".into() }.into()
            );
        }
        Ok(Self {
            layout: Layout::of(config, dtype, device),
            max_len: None,
            lengths: filled(LENGTHS, batch, 0)?,
            held: filled(LENGTHS, batch, 0)?,
            store: None,
        })
    }

    /// This cache with a limit of `len` tokens for each sequence, for a model with so many positions.
    pub fn with_max_len(self, len: usize) -> Self {
        Self { max_len: Some(len), ..self }
    }

    /// The number of sequences.
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }

    /// The number of tokens of each sequence so far.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// The number of tokens of the longest sequence so far.
    pub fn len(&self) -> usize {
        longest(&self.lengths)
    }

    /// Whether there are no tokens yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// For how many tokens of each sequence memory is allocated: at least [`len`](KvCache::len), or with a sliding
    /// window at least the tokens that are held.
    pub fn capacity(&self) -> usize {
        self.store.as_ref().map_or(0, Store::capacity)
    }

    /// Allocates memory for `more` further tokens of each sequence.
    ///
    /// # Errors
    ///
    /// Too little memory.
    pub fn reserve(&mut self, more: usize) -> Result<()> {
        let capacity = longest(&self.held).saturating_add(more);
        if capacity > self.capacity() {
            self.store = Some(self.rebuilt(&self.occupied()?, capacity)?);
        }
        Ok(())
    }

    /// Removes all tokens, and keeps the allocated memory.
    pub fn reset(&mut self) {
        self.lengths.fill(0);
        self.held.fill(0);
    }

    /// Removes all but the first `len` tokens of each sequence. A shorter sequence is unchanged.
    ///
    /// # Errors
    ///
    /// As [`KvCache::truncate_each`].
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        let lengths = collected(LENGTHS, self.lengths.iter().map(|&old| old.min(len)))?;
        self.truncate_each(&lengths)
    }

    /// Removes all but the first `lengths[b]` tokens of sequence `b`, such as the rejected drafts of speculative
    /// decoding.
    ///
    /// # Errors
    ///
    /// Lengths for another number of sequences; a length greater than that of its sequence; with a sliding window, a
    /// length whose window is no longer held; too little memory. The tokens of the last call can always be removed.
    pub fn truncate_each(&mut self, lengths: &[usize]) -> Result<()> {
        check_equal("lengths", self.batch(), lengths.len())?;
        let mut held = reserve(LENGTHS, lengths.len())?;
        for (&len, (&old, &old_held)) in lengths.iter().zip(self.lengths.iter().zip(&self.held)) {
            let dropped = old - old_held;
            let first_needed = self.layout.window.map_or(0, |window| len.saturating_add(1).saturating_sub(window));
            if len > old || first_needed < dropped {
                let expected = match self.layout.window {
                    Some(window) if len <= old => {
                        format!("at least {}, since only a window is held", dropped + window - 1)
                    }
                    _ => format!("at most the {old} tokens that there are"),
                };
                return Err(AttentionError::Cache { part: "length", expected, got: len.to_string() }.into());
            }
            held.push(len.saturating_sub(dropped));
        }
        (self.lengths, self.held) = (collected(LENGTHS, lengths.iter().copied())?, held);
        Ok(())
    }

    /// A cache of the given sequences, in this order. A sequence may be given several times, as in beam search. The two
    /// caches share no memory.
    ///
    /// # Errors
    ///
    /// A sequence index outside the batch, or too little memory.
    pub fn select(&self, sequences: &[usize]) -> Result<Self> {
        check_sequences(sequences, self.batch())?;
        let of = |all: &[usize]| collected(LENGTHS, sequences.iter().map(|&b| all[b]));
        let selected = collected(LENGTHS, sequences.iter().map(|&b| (b, 0..self.held[b])))?;
        Ok(Self {
            layout: self.layout.clone(),
            max_len: self.max_len,
            lengths: of(&self.lengths)?,
            held: of(&self.held)?,
            store: self.store.as_ref().map(|_| self.rebuilt(&selected, self.capacity())).transpose()?,
        })
    }

    /// Checks that this cache fits a layer with this config and a batch of this size.
    pub(crate) fn check(
        &self,
        config: &SelfAttentionConfig,
        dtype: DType,
        device: &Device,
        batch: usize,
    ) -> Result<()> {
        self.layout.check(&Layout::of(config, dtype, device))?;
        Ok(check_equal("sequences", batch, self.batch())?)
    }

    /// Checks that `added[b]` of `len` tokens can be added to sequence `b`.
    pub(crate) fn check_added(&self, added: &[usize], len: usize) -> Result<()> {
        check_equal("lengths", self.batch(), added.len())?;
        if let Some(got) = added.iter().find(|&&added| added > len) {
            let expected = format!("at most the {len} tokens of the input");
            return Err(AttentionError::Cache { part: "length", expected, got: got.to_string() }.into());
        }
        let Some(max_len) = self.max_len else { return Ok(()) };
        let mut totals = self.lengths.iter().zip(added).map(|(old, added)| old + added);
        match totals.find(|&total| total > max_len) {
            None => Ok(()),
            Some(total) => {
                let expected = format!("at most max_len {max_len}");
                Err(AttentionError::Cache { part: "tokens", expected, got: total.to_string() }.into())
            }
        }
    }

    /// Whether keys outside a sliding window are dropped.
    pub(crate) fn has_window(&self) -> bool {
        self.layout.window.is_some()
    }

    /// Writes keys and values (batch, len, num_kv_heads, dim) after the held ones. The cache is unchanged until
    /// [`KvCache::commit`] adds them.
    pub(crate) fn stage(&self, key: &Tensor, value: &Tensor) -> Result<Staged> {
        let len = key.dim(1)?;
        let (store, held) = self.room_for(len)?;
        store.write(key, value, &held)?;
        Ok(Staged { store, held, len })
    }

    /// Adds the first `added[b]` of the tokens that were staged for sequence `b`.
    pub(crate) fn commit(&mut self, staged: Staged, added: &[usize]) {
        self.lengths.iter_mut().zip(added).for_each(|(len, added)| *len += added);
        self.held = staged.held;
        self.held.iter_mut().zip(added).for_each(|(held, added)| *held += added);
        self.store = Some(staged.store);
    }

    /// A store with room for `len` more tokens, and the number of tokens of each sequence that it holds.
    fn room_for(&self, len: usize) -> Result<(Store, Vec<usize>)> {
        match &self.store {
            Some(store) if longest(&self.held).saturating_add(len) <= self.capacity() => {
                Ok((store.clone(), collected(LENGTHS, self.held.iter().copied())?))
            }
            _ => {
                let parts = self.needed()?;
                let kept = collected(LENGTHS, parts.iter().map(|(_, slots)| slots.len()))?;
                let max = self.layout.window.map_or(usize::MAX, |window| window.saturating_mul(2));
                let capacity = longest(&kept).saturating_add(len).max(self.capacity().saturating_mul(2).min(max));
                Ok((self.rebuilt(&parts, capacity)?, kept))
            }
        }
    }

    /// The index of every sequence, and the slots of the store that it occupies.
    fn occupied(&self) -> Result<Vec<(usize, Range<usize>)>> {
        Ok(collected(LENGTHS, self.held.iter().map(|&held| 0..held).enumerate())?)
    }

    /// The index of every sequence, and the slots whose keys later tokens may attend to. Keys outside the window of the
    /// next token aren't needed again.
    fn needed(&self) -> Result<Vec<(usize, Range<usize>)>> {
        let needed = self.layout.needed();
        Ok(collected(LENGTHS, self.held.iter().map(|&held| held - held.min(needed)..held).enumerate())?)
    }

    /// A new store. For `parts[i] = (b, slots)` its sequence `i` holds these slots of sequence `b` of the old store.
    fn rebuilt(&self, parts: &[(usize, Range<usize>)], capacity: usize) -> Result<Store> {
        let new = self.layout.store(parts.len(), capacity)?;
        if let Some(old) = &self.store {
            old.copy(parts, &new)?;
        }
        Ok(new)
    }
}

impl Staged {
    /// Views of the keys and values of all tokens, including the staged ones, (batch, kv_len, num_kv_heads, dim).
    pub(crate) fn key_value(&self) -> Result<(Tensor, Tensor)> {
        self.store.first(self.kv_len())
    }

    /// The number of staged tokens.
    pub(crate) fn q_len(&self) -> usize {
        self.len
    }

    /// The number of keys of the longest sequence, including the staged tokens.
    pub(crate) fn kv_len(&self) -> usize {
        longest(&self.held) + self.len
    }

    /// The position of the first staged token among the keys of each sequence.
    pub(crate) fn offsets(&self) -> &[usize] {
        &self.held
    }

    /// The offset of all sequences, if it is the same.
    pub(crate) fn common_offset(&self) -> Option<usize> {
        common(&self.held)
    }
}

fn longest(lengths: &[usize]) -> usize {
    lengths.iter().copied().max().unwrap_or(0)
}

/// The value of all lengths, if they are equal.
fn common(lengths: &[usize]) -> Option<usize> {
    let first = lengths.first()?;
    lengths.iter().all(|len| len == first).then_some(*first)
}

/// Checks that all of these are indices of sequences in the batch.
pub(crate) fn check_sequences(sequences: &[usize], batch: usize) -> Result<(), AttentionError> {
    match sequences.iter().find(|&&b| b >= batch) {
        None => Ok(()),
        Some(got) => {
            let expected = format!("one of the {batch} that there are, counted from 0");
            Err(AttentionError::Cache { part: "sequence", expected, got: got.to_string() })
        }
    }
}

fn check_equal(part: &'static str, expected: usize, got: usize) -> Result<(), AttentionError> {
    if expected == got {
        return Ok(());
    }
    Err(AttentionError::Cache { part, expected: expected.to_string(), got: got.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernels read the memory of the cache without a copy, and each key is contiguous.
    #[test]
    fn keys_and_values_are_read_where_they_stand() -> Result<()> {
        let config = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(8, 2) };
        let mut cache = KvCache::new(&config, 3, DType::F32, &Device::Cpu)?;
        cache.reserve(16)?;
        for _ in 0..4 {
            let tokens = Tensor::ones((3, 2, 2, 4), DType::F32, &Device::Cpu)?;
            let staged = cache.stage(&tokens, &tokens)?;
            let (key, value) = staged.key_value()?;
            let store = cache.store.as_ref().expect("memory");
            let (all_keys, all_values) = store.first(16)?;
            for (view, all) in [(&key, &all_keys), (&value, &all_values)] {
                assert!(std::ptr::eq(&*view.storage_and_layout().0, &*all.storage_and_layout().0));
                assert_eq!(view.stride(), [2 * 16 * 4, 4, 16 * 4, 1]);
            }
            cache.commit(staged, &[2, 0, 1]);
        }
        assert_eq!(cache.lengths(), [8, 0, 4]);
        Ok(())
    }
}
