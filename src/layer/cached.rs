//! Attention over keys and values that were computed earlier: those of earlier tokens, or those of a memory.

use std::borrow::Cow;
use std::sync::Arc;

use attention_kernels::{collected, filled};
use candle_core::Tensor;

use crate::adapter::config::AdapterChoice;
use crate::empty::connected;
use crate::error::{AttentionError, Result};
use crate::layer::core::{Core, batches_fit, score_shape};
use crate::layer::kv_cache::{KvCache, Staged, check_sequences};
use crate::layer::options::{ForwardOptions, ForwardOutput};
use crate::memory;
use crate::projection::Call;
use crate::rotary::Positions;
use crate::sdpa::checks::check_bias;
use crate::sdpa::{AttentionOptions, reference};

/// The keys and values that a [`CrossAttention`](crate::CrossAttention) layer computes from a memory. They are computed
/// once by [`project`](crate::CrossAttention::project) and can be attended to any number of times.
///
/// They depend on the parameters of the layer: after a step of an optimiser, project the memory again.
#[derive(Clone, Debug)]
pub struct ProjectedMemory {
    /// (batch, kv_len, num_kv_heads, head_dim)
    key: Tensor,
    /// (batch, kv_len, num_kv_heads, value_dim)
    value: Tensor,
    has_batch: bool,
    /// The adapter of the projections.
    adapter: Option<Arc<str>>,
}

impl ProjectedMemory {
    /// The projected memories of the given sequences, in this order. A sequence may be given several times, as in beam
    /// search.
    ///
    /// # Errors
    ///
    /// A sequence index outside the batch, or too little memory.
    pub fn select(&self, sequences: &[usize]) -> Result<Self> {
        check_sequences(sequences, self.key.dim(0)?)?;
        let indices = collected("sequences", sequences.iter().map(|&b| b as u32))?;
        let indices = Tensor::from_vec(indices, sequences.len(), self.key.device())?;
        let select = |x: &Tensor| -> candle_core::Result<Tensor> {
            let dims = [&[sequences.len()], &x.dims()[1..]].concat();
            // candle can't select from an empty tensor on CUDA. An empty result has no contents, only a shape and an
            // origin.
            if dims.contains(&0) {
                return connected(Tensor::zeros(dims, x.dtype(), x.device())?, x);
            }
            let x = memory::contiguous("projected memory", x)?;
            memory::ask("selected memories", x.device(), memory::bytes(&dims, x.dtype()))?;
            x.index_select(&indices, 0)
        };
        let adapter = self.adapter.clone();
        Ok(Self { key: select(&self.key)?, value: select(&self.value)?, has_batch: true, adapter })
    }

    /// Checks that x has a batch axis if this memory has one, and a batch that fits.
    fn check_batch(&self, x: &Tensor) -> Result<(), AttentionError> {
        let batch = self.key.dims()[0];
        if (x.rank() == 3) == self.has_batch && (!self.has_batch || batches_fit(x.dims()[0], batch)) {
            return Ok(());
        }
        let expected = match self.has_batch {
            true => format!("(batch, len, dim) with batch 1 or {batch}, that of the memory"),
            false => "(len, dim), since the memory has no batch axis".to_string(),
        };
        Err(AttentionError::Shape { tensor: "input", expected, shape: x.dims().to_vec() })
    }
}

impl Core {
    /// An empty cache for a batch of this size.
    pub(super) fn new_cache(&self, batch: usize) -> Result<KvCache> {
        let weight = self.k_proj.weight();
        KvCache::new(&self.config, batch, weight.dtype(), weight.device())
    }

    /// Attention of the tokens of `x`, which follow those of the cache. The first `added[b]` tokens of sequence `b` are
    /// added to the cache; all of them if not given.
    pub(super) fn attend_cached(
        &self,
        x: &Tensor,
        added: Option<&[usize]>,
        cache: &mut KvCache,
        options: &ForwardOptions,
    ) -> Result<ForwardOutput> {
        let has_batch = x.rank() == 3;
        let prepared = self.prepared_for_cache(x, added, cache, options);
        let tokens = || format!(", after {:?} and with {added:?} tokens", cache.lengths());
        let (x, added, positions) = self.agree_on(&[x], options, &tokens, prepared)?;
        let call = self.call(options);
        let query = self.queries(&x, &positions, &call)?;
        let (key, value) = self.keys_and_values([&x, &x], &positions, &call)?;
        let staged = cache.stage(&key, &value)?;
        let (key, value) = staged.key_value()?;
        let scores = score_shape(&query, &key)?;
        let options = self.attention_options(options, &scores, &call)?;
        if let Some(bias) = &options.attn_bias {
            check_bias(bias, &query, &scores)?;
        }
        let output = self.attend_heads(&query.detach(), key, value, cached_options(options, &staged)?, &call)?;
        cache.commit(staged, &added);
        output.map(|tensor| if has_batch { Ok(tensor.detach()) } else { tensor.detach().squeeze(0) })
    }

    /// The input with a batch axis, the tokens of each sequence that are added, and the positions, if the call is right.
    fn prepared_for_cache<'a>(
        &self,
        x: &Tensor,
        added: Option<&'a [usize]>,
        cache: &KvCache,
        options: &ForwardOptions,
    ) -> Result<(Tensor, Cow<'a, [usize]>, Positions)> {
        self.check_input("input", x, self.config.embed_dim)?;
        check_options(options, cache)?;
        let x = if x.rank() == 3 { x.clone() } else { x.unsqueeze(0)? };
        let (batch, len, _) = x.dims3()?;
        let weight = self.k_proj.weight();
        cache.check(&self.config, weight.dtype(), weight.device(), batch)?;
        let added = match added {
            Some(added) => Cow::Borrowed(added),
            None => Cow::Owned(filled("lengths of the sequences", cache.batch(), len)?),
        };
        cache.check_added(&added, len)?;
        let positions = options.positions(&x, cache.lengths())?;
        Ok((x, added, positions))
    }

    /// Projects keys from one memory (batch, kv_len, kv_dim) and values from another (batch, kv_len, value_input_dim).
    /// Both may lack the batch axis.
    pub(super) fn project_memory(&self, memories: [&Tensor; 2], adapter: &AdapterChoice) -> Result<ProjectedMemory> {
        self.check_memory(memories)?;
        let has_batch = memories[0].rank() == 3;
        let batch = |memory: &Tensor| if has_batch { Ok(memory.clone()) } else { memory.unsqueeze(0) };
        let memories = self.entering_both(memories)?;
        let memories = [&batch(&memories[0])?, &batch(&memories[1])?];
        let (key, value) =
            self.keys_and_values(memories, &Positions::from_offsets(&[0]), &Call { adapter, ..Call::default() })?;
        // The keys of a head are stored contiguously, since every call reads them in this order.
        let by_head = |x: Tensor| memory::contiguous("projected memory", &x.transpose(1, 2)?)?.transpose(1, 2);
        let adapter = self.k_proj.chosen(adapter)?.map(|adapter| adapter.name.clone());
        Ok(ProjectedMemory { key: by_head(key)?, value: by_head(value)?, has_batch, adapter })
    }

    /// As [`Core::attend_to_memory`], with a memory that has been projected.
    pub(super) fn attend_projected(
        &self,
        x: &Tensor,
        memory: &ProjectedMemory,
        options: &ForwardOptions,
    ) -> Result<ForwardOutput> {
        let checked = options
            .check_alone("cross-attention")
            .and_then(|()| self.check_input("input", x, self.config.embed_dim))
            .and_then(|()| self.check_projected(memory, &options.adapter))
            .and_then(|()| memory.check_batch(x));
        self.agree_on(&[x, &memory.key, &memory.value], options, &String::new, checked)?;
        let x_3 = if memory.has_batch { x.clone() } else { x.unsqueeze(0)? };
        let call = self.call(options);
        let query = self.queries(&self.entering(&x_3)?, &options.positions(&x_3, &[0])?, &call)?;
        let options = self.attention_options(options, &score_shape(&query, &memory.key)?, &call)?;
        let output = self.attend_heads(&query, memory.key.clone(), memory.value.clone(), options, &call)?;
        if memory.has_batch { Ok(output) } else { output.map(|tensor| tensor.squeeze(0)) }
    }

    /// Checks that a layer with the same heads, dtype, device and adapter has projected the memory.
    fn check_projected(&self, memory: &ProjectedMemory, adapter: &AdapterChoice) -> Result<(), AttentionError> {
        let config = &self.config;
        let adapter = self.k_proj.chosen(adapter)?.map(|adapter| adapter.name.clone());
        if adapter != memory.adapter {
            let name =
                |adapter: &Option<Arc<str>>| adapter.as_ref().map_or("none".to_string(), |name| name.to_string());
            let expected = format!("that of the projected memory, {}", name(&memory.adapter));
            let (adapter, got) = (name(&adapter), "another one".to_string());
            return Err(AttentionError::Adapter { name: adapter, expected, got });
        }
        for (tensor, x, dim) in [("key", &memory.key, config.head_dim()), ("value", &memory.value, config.value_dim())]
        {
            if x.dims()[2..] != [config.num_kv_heads(), dim] {
                let expected = format!("(batch, kv_len, {}, {dim}), as this layer projects it", config.num_kv_heads());
                return Err(AttentionError::Shape { tensor, expected, shape: x.dims().to_vec() });
            }
            self.check_dtype_and_device(tensor, x)?;
        }
        Ok(())
    }
}

/// The options of one call, with the positions of the cache. The queries of a sequence follow its cached keys, whose
/// number can differ between sequences.
fn cached_options(mut options: AttentionOptions, staged: &Staged) -> Result<AttentionOptions> {
    // The number of tokens in memory fits into an i64.
    let position = |&len: &usize| len as i64;
    if let Some(offset) = staged.common_offset() {
        options.attn_mask = options.attn_mask.with_offset(position(&offset));
        return Ok(options);
    }
    let offsets: Vec<_> = staged.offsets().iter().map(position).collect();
    options.attn_mask = options.attn_mask.with_offsets(&offsets);
    if let Some(slopes) = options.alibi_slopes.take() {
        // The slopes would align the last query of every sequence with the last key, so they are replaced by a bias. It
        // is computed in three steps, and widened and added to the given one.
        let dims = [staged.offsets().len(), slopes.elem_count(), staged.q_len(), staged.kv_len()];
        memory::ask(
            "bias of the ALiBi slopes",
            slopes.device(),
            memory::bytes(&dims, slopes.dtype()).saturating_mul(5),
        )?;
        let bias = slopes.reshape((1, (), 1, 1))?.broadcast_mul(&distances(staged, &slopes)?)?.neg()?;
        options.attn_bias = Some(match &options.attn_bias {
            Some(own) => own.to_dtype(bias.dtype())?.broadcast_add(&bias)?,
            None => bias,
        });
    }
    Ok(options)
}

/// Refuses options that a cache can't serve.
fn check_options(options: &ForwardOptions, cache: &KvCache) -> Result<(), AttentionError> {
    let refuse = |part, expected: &str, got: &str| {
        Err(AttentionError::Cache { part, expected: expected.into(), got: got.into() })
    };
    options.check_alone("a cache")?;
    if options.train {
        return refuse("train", "false, since no gradient flows through a cache", "true");
    }
    if options.position_offset != 0 {
        let got = options.position_offset.to_string();
        return refuse(
            "position_offset",
            "0, since the cache counts the positions itself (position_ids are accepted)",
            &got,
        );
    }
    if cache.has_window() && !(options.attn_mask.is_full() && options.attn_bias.is_none()) {
        let expected = "no attn_mask and no attn_bias, since with a sliding window only some keys are held";
        return refuse("options", expected, "one");
    }
    Ok(())
}

/// |position of the query - position of the key| for each sequence, (batch, 1, q_len, kv_len).
fn distances(staged: &Staged, like: &Tensor) -> Result<Tensor> {
    let (q_len, kv_len) = (staged.q_len(), staged.kv_len());
    let queries = staged.offsets().iter().flat_map(|&offset| offset..offset + q_len);
    let distances = reference::distances(queries.map(|query| query as f64), kv_len, like)?;
    Ok(distances.reshape((staged.offsets().len(), 1, q_len, kv_len))?)
}
