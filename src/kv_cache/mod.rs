//! [`KvCache`]: the keys and values of the tokens so far.
//!
//! candle-nn's own caches don't serve here. `KvCache` and `RotatingKvCache` know one length for the whole batch and share
//! their memory with their clones; the first grows by a fixed amount, so that a long text is copied time and again. The
//! rotating and the scattered one give keys out of order, which windows and ALiBi would have to undo.

mod store;

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use crate::config::SelfAttentionConfig;
use crate::error::AttentionError;
use crate::fused::room;
use store::{Layout, Store};

/// The keys and values of the tokens that a [`SelfAttention`](crate::SelfAttention) layer has seen, so that the next ones
/// cost no more than their own projections and a look at each key. Made by
/// [`SelfAttention::kv_cache`](crate::SelfAttention::kv_cache), used by
/// [`SelfAttention::forward_cached`](crate::SelfAttention::forward_cached). A model needs one for each layer.
///
/// Each sequence of the batch has a length of its own and grows at its own end. Memory doubles when it is full, so that a
/// token costs the same on average however many there are; [`reserve`](KvCache::reserve) asks for it beforehand. With a sliding
/// window the cache holds at most two windows, or one and the tokens of the last call.
///
/// Keys are stored after QK-norm and rotary embedding. After an error the cache is as it was before.
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
/// // Two prompts of 5 and 3 tokens, then a token for each.
/// let prompts = Tensor::randn(0f32, 1.0, (2, 5, 8), &Device::Cpu)?;
/// attention.prefill(&prompts, &[5, 3], &mut cache)?;
/// attention.forward_cached(&prompts.narrow(1, 0, 1)?, &mut cache)?;
/// assert_eq!(cache.lengths(), [6, 4]);
///
/// // Beam search goes on from the first sequence twice; a draft that was refused is taken back.
/// let mut beams = cache.select(&[0, 0])?;
/// beams.truncate(5)?;
/// assert_eq!((beams.lengths(), cache.lengths()), (&[5, 5][..], &[6, 4][..]));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct KvCache {
    layout: Layout,
    max_len: Option<usize>,
    /// Tokens of each sequence so far.
    lengths: Vec<usize>,
    /// How many of them, the last ones, stand in the store, from its first place on.
    held: Vec<usize>,
    store: Option<Store>,
}

/// A cache with more tokens written behind those that it holds, which don't count until [`KvCache::commit`].
pub(crate) struct Staged {
    store: Store,
    held: Vec<usize>,
    len: usize,
}

impl KvCache {
    pub(crate) fn new(config: &SelfAttentionConfig, batch: usize, dtype: DType, device: &Device) -> Result<Self> {
        if !config.is_causal {
            let expected =
                "true: without it earlier tokens would look at later ones, and would have to be computed anew";
            return Err(
                AttentionError::Config { field: "is_causal", expected: expected.into(), got: "false".into() }.into()
            );
        }
        let mut lengths = room("lengths of the sequences", batch)?;
        lengths.resize(batch, 0);
        Ok(Self {
            layout: Layout::of(config, dtype, device),
            max_len: None,
            held: lengths.clone(),
            lengths,
            store: None,
        })
    }

    /// Refuses more than `len` tokens in a sequence, where a model has no more positions.
    pub fn with_max_len(self, len: usize) -> Self {
        Self { max_len: Some(len), ..self }
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }

    /// Tokens of each sequence so far.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Tokens of the longest sequence so far.
    pub fn len(&self) -> usize {
        longest(&self.lengths)
    }

    /// Whether there are no tokens yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// For how many tokens of each sequence there is memory: at least [`len`](KvCache::len), or what a window needs of it.
    pub fn capacity(&self) -> usize {
        self.store.as_ref().map_or(0, Store::capacity)
    }

    /// Asks for memory for `more` further tokens of each sequence.
    ///
    /// # Errors
    ///
    /// Less memory than that.
    pub fn reserve(&mut self, more: usize) -> Result<()> {
        let places = longest(&self.held).saturating_add(more);
        if places > self.capacity() {
            self.store = Some(self.rebuilt(&self.all(), places)?);
        }
        Ok(())
    }

    /// Forgets all tokens, and keeps the memory.
    pub fn reset(&mut self) {
        self.lengths.fill(0);
        self.held.fill(0);
    }

    /// Takes back all but the first `len` tokens of each sequence; a shorter sequence stays as it is.
    ///
    /// # Errors
    ///
    /// As [`KvCache::truncate_each`].
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        let lengths: Vec<_> = self.lengths.iter().map(|&old| old.min(len)).collect();
        self.truncate_each(&lengths)
    }

    /// Takes back all but the first `lengths[b]` tokens of sequence `b`: what speculative decoding has drafted in vain.
    ///
    /// # Errors
    ///
    /// Lengths for another number of sequences, or longer than they are. With a sliding window: a length whose window
    /// is no longer held. The tokens of the last call can always be taken back.
    pub fn truncate_each(&mut self, lengths: &[usize]) -> Result<()> {
        check_equal("lengths", self.batch(), lengths.len())?;
        let mut held = Vec::with_capacity(lengths.len());
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
        (self.lengths, self.held) = (lengths.to_vec(), held);
        Ok(())
    }

    /// A cache of these sequences, in this order, each as often as it is named: what beam search goes on with. It shares
    /// nothing with this one.
    ///
    /// # Errors
    ///
    /// A sequence that isn't there, or too little memory.
    pub fn select(&self, sequences: &[usize]) -> Result<Self> {
        check_sequences(sequences, self.batch())?;
        let of = |all: &[usize]| sequences.iter().map(|&b| all[b]).collect::<Vec<_>>();
        let all = self.all();
        let selected: Vec<_> = sequences.iter().map(|&b| all[b].clone()).collect();
        Ok(Self {
            layout: self.layout.clone(),
            max_len: self.max_len,
            lengths: of(&self.lengths),
            held: of(&self.held),
            store: self.store.as_ref().map(|_| self.rebuilt(&selected, self.capacity())).transpose()?,
        })
    }

    /// That this is a cache of a layer of this config, for a batch of this size.
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

    /// That `added[b]` of `len` tokens can be added to sequence `b`.
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

    /// Whether keys behind the window are dropped.
    pub(crate) fn has_window(&self) -> bool {
        self.layout.window.is_some()
    }

    /// Writes keys and values (batch, len, num_kv_heads, dim) behind those that are held. They count from
    /// [`KvCache::commit`] on; until then this cache is as it was.
    pub(crate) fn stage(&self, key: &Tensor, value: &Tensor) -> Result<Staged> {
        let len = key.dim(1)?;
        let (store, held) = self.room_for(len)?;
        store.write(key, value, &held)?;
        Ok(Staged { store, held, len })
    }

    /// The first `added[b]` of the tokens that were staged for sequence `b` count.
    pub(crate) fn commit(&mut self, staged: Staged, added: &[usize]) {
        self.lengths.iter_mut().zip(added).for_each(|(len, added)| *len += added);
        self.held = staged.held.iter().zip(added).map(|(held, added)| held + added).collect();
        self.store = Some(staged.store);
    }

    /// A store with room for `len` more tokens, and how many it holds.
    fn room_for(&self, len: usize) -> Result<(Store, Vec<usize>)> {
        match &self.store {
            Some(store) if longest(&self.held) + len <= self.capacity() => Ok((store.clone(), self.held.clone())),
            _ => {
                // What the next token's window doesn't reach isn't needed again.
                let needed = self.layout.window.map_or(usize::MAX, |window| window - 1);
                let kept: Vec<_> = self.held.iter().map(|&held| held.min(needed)).collect();
                let parts: Vec<_> =
                    (0..).zip(self.held.iter().zip(&kept)).map(|(b, (&held, kept))| (b, held - kept..held)).collect();
                let most = self.layout.window.map_or(usize::MAX, |window| window.saturating_mul(2));
                let capacity = (longest(&kept) + len).max(self.capacity().saturating_mul(2).min(most));
                Ok((self.rebuilt(&parts, capacity)?, kept))
            }
        }
    }

    /// Every sequence, and the places that it takes.
    fn all(&self) -> Vec<(usize, Range<usize>)> {
        (0..).zip(self.held.iter().map(|&held| 0..held)).collect()
    }

    /// A new store, whose sequence `i` holds these places of that sequence of the old one.
    fn rebuilt(&self, parts: &[(usize, Range<usize>)], capacity: usize) -> Result<Store> {
        let new = self.layout.store(parts.len(), capacity)?;
        if let Some(old) = &self.store {
            old.copy(parts, &new)?;
        }
        Ok(new)
    }
}

impl Staged {
    /// Keys and values of all tokens, those that were staged included, (batch, kv_len, num_kv_heads, dim). Nothing is copied.
    pub(crate) fn key_value(&self) -> Result<(Tensor, Tensor)> {
        self.store.first(self.kv_len())
    }

    /// New tokens.
    pub(crate) fn q_len(&self) -> usize {
        self.len
    }

    /// Keys of the longest sequence.
    pub(crate) fn kv_len(&self) -> usize {
        longest(&self.held) + self.len
    }

    /// Where the first of the new tokens stands among the keys of each sequence.
    pub(crate) fn offsets(&self) -> &[usize] {
        &self.held
    }

    /// The same place for all, if it is.
    pub(crate) fn common_offset(&self) -> Option<usize> {
        common(&self.held)
    }
}

fn longest(lengths: &[usize]) -> usize {
    lengths.iter().copied().max().unwrap_or(0)
}

/// The length of all, if they have one.
fn common(lengths: &[usize]) -> Option<usize> {
    let first = lengths.first()?;
    lengths.iter().all(|len| len == first).then_some(*first)
}

/// That all of these are among the sequences of a batch.
pub(crate) fn check_sequences(sequences: &[usize], batch: usize) -> std::result::Result<(), AttentionError> {
    match sequences.iter().find(|&&b| b >= batch) {
        None => Ok(()),
        Some(got) => {
            let expected = format!("one of the {batch} that there are, counted from 0");
            Err(AttentionError::Cache { part: "sequence", expected, got: got.to_string() })
        }
    }
}

fn check_equal(part: &'static str, expected: usize, got: usize) -> std::result::Result<(), AttentionError> {
    if expected == got {
        return Ok(());
    }
    Err(AttentionError::Cache { part, expected: expected.to_string(), got: got.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernels read is the cache itself, each key in one piece.
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
