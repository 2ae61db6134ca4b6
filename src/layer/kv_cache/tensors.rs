//! A [`KvCache`] from the tensors of another program, and back.

use candle_core::Tensor;

use crate::check::{check_device, check_dtype};
use crate::error::{AttentionError, Result};
use crate::layer::config::SelfAttentionConfig;
use crate::layer::kv_cache::store::{Layout, Store};
use crate::layer::kv_cache::{KvCache, check_equal, longest};

impl KvCache {
    /// A cache that holds copies of the given keys and values, such as `past_key_values` of Hugging Face transformers
    /// or `past_key` and `past_value` of ONNX's Attention, for layers with this config.
    ///
    /// Sequence `b` has `lengths[b]` tokens so far, the first of them at position 0, and its next token is at position
    /// `lengths[b]`. The keys have gone through QK-norm and rotary embedding. What follows the tokens of a sequence is
    /// padding and is ignored. With a sliding window the tensors may hold only the last tokens: those of a sequence
    /// that is longer than `len` are its last `len` tokens.
    ///
    /// # Shapes
    ///
    /// key (batch, num_kv_heads, len, head_dim), value (batch, num_kv_heads, len, value_dim); one length for each
    /// sequence.
    ///
    /// # Errors
    ///
    /// An invalid config, or one that isn't causal; another shape; a dtype that isn't a float; a key and value of
    /// different dtypes or devices; lengths for another number of sequences; a length greater than `len`, unless `len`
    /// is at least sliding_window - 1; too little memory.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::{KvCache, SelfAttention, SelfAttentionConfig};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let config = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(8, 2) };
    /// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    /// let attention = SelfAttention::new(&config, vb)?;
    /// let x = Tensor::randn(0f32, 1.0, (2, 5, 8), &Device::Cpu)?;
    /// let mut cache = attention.kv_cache(2)?;
    /// attention.prefill(&x, &[5, 3], &mut cache)?;
    ///
    /// let (key, value) = cache.key_value()?; // to a file, or to another program
    /// assert_eq!(key.dims(), [2, 2, 5, 4]);
    /// let mut copy = KvCache::from_tensors(&config, &key, &value, cache.lengths())?;
    /// let token = x.narrow(1, 0, 1)?;
    /// let expected = attention.forward_cached(&token, &mut cache)?.to_vec3::<f32>()?;
    /// assert_eq!(attention.forward_cached(&token, &mut copy)?.to_vec3::<f32>()?, expected);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn from_tensors(config: &SelfAttentionConfig, key: &Tensor, value: &Tensor, lengths: &[usize]) -> Result<Self> {
        config.check()?;
        let layout = Layout::of(config, key.dtype(), key.device());
        let (batch, len) = layout.check_tensors(key, value)?;
        check_equal("lengths", batch, lengths.len())?;
        let cache = Self::new(config, batch, key.dtype(), key.device())?;
        let held = lengths.iter().map(|&length| layout.held_of(length, len)).collect::<Result<Vec<_>, _>>()?;
        let cache = Self { lengths: lengths.to_vec(), held, ..cache };
        let capacity = longest(&cache.held);
        if capacity == 0 {
            return Ok(cache);
        }
        let store = layout.store(batch, capacity)?;
        Store { key: key.detach(), value: value.detach() }.copy(&cache.occupied()?, &store)?;
        Ok(Self { store: Some(store), ..cache })
    }

    /// Copies of the keys and values, such as `present_key` and `present_value` of ONNX's Attention. The lengths of the
    /// sequences are those of [`lengths`](KvCache::lengths). [`KvCache::from_tensors`] makes a cache of them again.
    ///
    /// With a sliding window they are those of the last sliding_window - 1 tokens of each sequence, which are all that
    /// the next token may attend to.
    ///
    /// # Shapes
    ///
    /// key (batch, num_kv_heads, len, head_dim), value (batch, num_kv_heads, len, value_dim), where `len` is the number
    /// of tokens of the longest sequence. The tokens of a shorter sequence come first, and zeros follow them.
    ///
    /// # Errors
    ///
    /// Too little memory.
    pub fn key_value(&self) -> Result<(Tensor, Tensor)> {
        let needed = self.needed()?;
        let len = needed.iter().map(|(_, slots)| slots.len()).max().unwrap_or(0);
        let Store { key, value } = self.rebuilt(&needed, len)?;
        Ok((key, value))
    }
}

impl Layout {
    /// Checks keys and values (batch, num_kv_heads, len, dim), and returns batch and len.
    fn check_tensors(&self, key: &Tensor, value: &Tensor) -> Result<(usize, usize), AttentionError> {
        let [batch, _, len, _] = *key.dims() else {
            let expected = "4 axes (batch, num_kv_heads, len, head_dim)";
            return Err(AttentionError::Rank { tensor: "key", expected, shape: key.dims().to_vec() });
        };
        for (tensor, x, name, dim) in
            [("key", key, "head_dim", self.head_dim), ("value", value, "value_dim", self.value_dim)]
        {
            let shape = [batch, self.num_kv_heads, len, dim];
            if x.dims() != shape {
                let expected = format!("(batch, num_kv_heads, len, {name}) = {shape:?}");
                return Err(AttentionError::Shape { tensor, expected, shape: x.dims().to_vec() });
            }
        }
        check_dtype("key", key.dtype())?;
        if value.dtype() != key.dtype() {
            let expected = format!("{:?}, that of key", key.dtype());
            return Err(AttentionError::DType { tensor: "value", expected, got: value.dtype() });
        }
        check_device("value", value, key)?;
        Ok((batch, len))
    }

    /// How many of the tokens of a sequence of this length are in tensors of `len` tokens.
    fn held_of(&self, length: usize, len: usize) -> Result<usize, AttentionError> {
        // Later tokens are counted on from here.
        if length > isize::MAX as usize {
            let expected = format!("at most {}", isize::MAX);
            return Err(AttentionError::Cache { part: "length", expected, got: length.to_string() });
        }
        if length.min(self.needed()) <= len {
            return Ok(length.min(len));
        }
        let expected = match self.window {
            None => format!("at most the {len} tokens of the key"),
            Some(_) => format!(
                "at most the {len} tokens of the key, unless it holds at least sliding_window - 1 = {}",
                self.needed()
            ),
        };
        Err(AttentionError::Cache { part: "length", expected, got: length.to_string() })
    }
}
