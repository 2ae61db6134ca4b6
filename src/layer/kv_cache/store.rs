//! [`Store`]: the memory for a cache's keys and values.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::error::{AttentionError, Result};
use crate::layer::config::SelfAttentionConfig;
use crate::layer::kv_cache::{check_equal, common};
use crate::memory;

/// What a cache must have in common with its layer.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) value_dim: usize,
    pub(super) window: Option<usize>,
    dtype: DType,
    device: Device,
}

impl Layout {
    pub(super) fn of(config: &SelfAttentionConfig, dtype: DType, device: &Device) -> Self {
        Self {
            num_kv_heads: config.num_kv_heads(),
            head_dim: config.head_dim(),
            value_dim: config.value_dim(),
            window: config.sliding_window,
            dtype,
            device: device.clone(),
        }
    }

    /// Checks that a cache of this layout fits a layer whose caches have the layout `layer`.
    pub(super) fn check(&self, layer: &Layout) -> Result<(), AttentionError> {
        if self.dtype != layer.dtype {
            let expected = format!("{:?}, that of the layer's parameters", layer.dtype);
            return Err(AttentionError::DType { tensor: "cache", expected, got: self.dtype });
        }
        let (expected, got) = (layer.device.location(), self.device.location());
        if expected != got {
            return Err(AttentionError::Device { tensor: "cache", expected, got });
        }
        check_equal("num_kv_heads", layer.num_kv_heads, self.num_kv_heads)?;
        check_equal("head_dim", layer.head_dim, self.head_dim)?;
        check_equal("value_dim", layer.value_dim, self.value_dim)?;
        if layer.window != self.window {
            let name = |window: Option<usize>| window.map_or("none".to_string(), |width| width.to_string());
            let (expected, got) = (name(layer.window), name(self.window));
            return Err(AttentionError::Cache { part: "sliding_window", expected, got });
        }
        Ok(())
    }

    /// How many of the last tokens of a sequence the next token may attend to.
    pub(super) fn needed(&self) -> usize {
        self.window.map_or(usize::MAX, |window| window.saturating_sub(1))
    }

    /// A store of zeros for `batch` sequences of `capacity` tokens.
    pub(super) fn store(&self, batch: usize, capacity: usize) -> Result<Store> {
        let zeros = |dim: usize| -> Result<Tensor> {
            let shape = [batch, self.num_kv_heads, capacity, dim];
            let bytes = shape.iter().try_fold(self.dtype.size_in_bytes(), |bytes, &size| bytes.checked_mul(size));
            let bytes = bytes.ok_or(AttentionError::TooLarge { shape })?;
            memory::ask("key-value cache", &self.device, bytes)?;
            Ok(Tensor::zeros(&shape, self.dtype, &self.device)?)
        };
        Ok(Store { key: zeros(self.head_dim)?, value: zeros(self.value_dim)? })
    }
}

/// Keys and values, each (batch, num_kv_heads, capacity, dim): the keys of a head are contiguous, as decoding reads
/// them.
#[derive(Clone, Debug)]
pub(super) struct Store {
    pub(super) key: Tensor,
    pub(super) value: Tensor,
}

impl Store {
    /// The number of slots of each sequence. A slot holds one token.
    pub(super) fn capacity(&self) -> usize {
        // The tensor always has four axes.
        self.key.dims()[2]
    }

    /// Views of the keys and values in the first `len` slots, (batch, len, num_kv_heads, dim).
    pub(super) fn first(&self, len: usize) -> Result<(Tensor, Tensor)> {
        let tokens = |x: &Tensor| x.narrow(2, 0, len)?.transpose(1, 2);
        Ok((tokens(&self.key)?, tokens(&self.value)?))
    }

    /// Writes keys and values (batch, len, num_kv_heads, dim), those of sequence `b` from slot `starts[b]` on.
    pub(super) fn write(&self, key: &Tensor, value: &Tensor, starts: &[usize]) -> Result<()> {
        for (from, to) in [(key, &self.key), (value, &self.value)] {
            let from = memory::contiguous("new keys or values", &from.transpose(1, 2)?)?;
            if let Some(start) = common(starts) {
                to.slice_set(&from, 2, start)?;
                continue;
            }
            for (b, &start) in starts.iter().enumerate() {
                to.narrow(0, b, 1)?.slice_set(&from.narrow(0, b, 1)?, 2, start)?;
            }
        }
        Ok(())
    }

    /// For `parts[i] = (b, slots)`, copies these slots of sequence `b` to the first slots of sequence `i` of `to`.
    pub(super) fn copy(&self, parts: &[(usize, Range<usize>)], to: &Store) -> Result<()> {
        for (i, (b, slots)) in parts.iter().enumerate().filter(|(_, (_, slots))| !slots.is_empty()) {
            for (from, to) in [(&self.key, &to.key), (&self.value, &to.value)] {
                let from = from.narrow(0, *b, 1)?.narrow(2, slots.start, slots.len())?;
                to.narrow(0, i, 1)?.slice_set(&memory::contiguous("part of a key-value cache", &from)?, 2, 0)?;
            }
        }
        Ok(())
    }
}
