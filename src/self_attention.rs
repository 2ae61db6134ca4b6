//! [`SelfAttention`]: x -> W_Q, W_K, W_V -> heads -> attention -> W_O -> y.

use std::ops::Deref;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{ModuleT, VarBuilder};

use crate::checkpoint::{LayerKind, Layout};
use crate::config::SelfAttentionConfig;
use crate::kv_cache::KvCache;
use crate::multi_head::{ForwardOptions, ForwardOutput, MultiHead};

/// Self-attention with trainable projections: every token of a sequence gathers from the others what it needs.
///
/// For each head, q = W_Q x, k = W_K x, v = W_V x, and y = W_O concat(softmax(q·kᵀ / sqrt(head_dim))·v over the heads).
/// With [`SelfAttentionConfig::single_head`] it is the layer of the lecture notes, with W_Q, W_K and W_V alone.
///
/// # Shapes
///
/// Input (batch, len, embed_dim) or (len, embed_dim), of any strides; output (batch, len, output_dim) or (len,
/// output_dim), where output_dim is embed_dim, or num_heads · value_dim without W_O.
///
/// # Errors
///
/// `forward` and its kin: an input of another rank, embed_dim, dtype or device than the layer's, a mask or bias of
/// another size than the scores.
///
/// # Examples
///
/// Used in a model, trained for a step:
///
/// ```
/// use candle_attention::{SelfAttention, SelfAttentionConfig};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap};
///
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let config = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(16, 4) };
/// let attention = SelfAttention::new(&config, vb.pp("attention"))?;
///
/// let x = Tensor::randn(0f32, 1.0, (2, 5, 16), &Device::Cpu)?;
/// let y = attention.forward_t(&x, true)?; // or `forward(&x)`, without dropout
/// assert_eq!(y.dims(), [2, 5, 16]);
///
/// let mut optimizer = AdamW::new(attention.vars(), ParamsAdamW::default())?;
/// optimizer.backward_step(&y.sqr()?.mean_all()?)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Source: Vaswani et al., "Attention Is All You Need" (NIPS 2017), section 3.2.2.
#[derive(Clone, Debug)]
pub struct SelfAttention(MultiHead);

impl SelfAttention {
    /// A layer whose parameters come from, or are made in, `vb`: `q_proj`, `k_proj`, `v_proj` and `o_proj` (`.weight`,
    /// `.bias`), `q_norm.weight`, `k_norm.weight`, `sinks`, `bias_k` and `bias_v`, as far as the config asks for them.
    ///
    /// Weights that a `VarMap` doesn't hold yet are drawn from the config's seed and their names: the same every time,
    /// and different for each layer of a model.
    ///
    /// # Errors
    ///
    /// A config that can't serve (see [`SelfAttentionConfig::validate`]), a dtype that isn't f16, bf16, f32 or f64,
    /// tensors that `vb` doesn't have or has in another shape.
    pub fn new(config: &SelfAttentionConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self(MultiHead::new(LayerKind::SelfAttention, config, &vb)?))
    }

    /// Loads a layer that [`save`](MultiHead::save) wrote. It trains on: every parameter is a variable (see
    /// [`vars`](MultiHead::vars)).
    ///
    /// # Errors
    ///
    /// A file that can't be read, isn't safetensors, holds no config, or holds other tensors than its config asks for;
    /// all missing, unexpected and misshapen ones are named.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::{SelfAttention, SelfAttentionConfig};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    /// let attention = SelfAttention::new(&SelfAttentionConfig::new(8, 2), vb)?;
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("attention.safetensors");
    /// attention.save(&path)?;
    /// let loaded = SelfAttention::load(&path, &Device::Cpu)?;
    ///
    /// let x = Tensor::randn(0f32, 1.0, (3, 8), &Device::Cpu)?;
    /// assert_eq!(loaded.forward(&x)?.to_vec2::<f32>()?, attention.forward(&x)?.to_vec2::<f32>()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Ok(Self(MultiHead::load(LayerKind::SelfAttention, path.as_ref(), device)?))
    }

    /// As [`SelfAttention::load`], from the bytes of a file.
    ///
    /// # Errors
    ///
    /// As [`SelfAttention::load`].
    pub fn from_bytes(bytes: &[u8], device: &Device) -> Result<Self> {
        Ok(Self(MultiHead::from_bytes(LayerKind::SelfAttention, bytes, device)?))
    }

    /// A layer from weights that another program trained: `vb`, at the attention's place in the model, has them as `layout`
    /// says. They are copied, in the dtype of `vb`, and each becomes a variable of the layer's own (see
    /// [`vars`](MultiHead::vars)).
    ///
    /// The config says what no checkpoint does: heads, scale, rotary embedding, masks.
    ///
    /// # Errors
    ///
    /// A config that can't serve, or with parameters that the layout has no place for; tensors that `vb` doesn't have, has
    /// in another shape, or has although the config doesn't ask for them: all are named.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::{Layout, SelfAttention, SelfAttentionConfig};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::VarBuilder;
    ///
    /// // The state dict of `nn.MultiheadAttention(4, 2, bias=False)`, in a model that calls it `attn`.
    /// let tensors = [
    ///     ("attn.in_proj_weight".to_string(), Tensor::randn(0f32, 1.0, (12, 4), &Device::Cpu)?),
    ///     ("attn.out_proj.weight".to_string(), Tensor::randn(0f32, 1.0, (4, 4), &Device::Cpu)?),
    /// ];
    /// let vb = VarBuilder::from_tensors(tensors.clone().into(), DType::F32, &Device::Cpu);
    /// let config = SelfAttentionConfig { qkv_bias: false, out_bias: false, ..SelfAttentionConfig::new(4, 2) };
    /// let attention = SelfAttention::from_layout(Layout::Torch, &config, vb.pp("attn"))?;
    /// let key_rows = tensors[0].1.narrow(0, 4, 4)?;
    /// assert_eq!(attention.k_proj().weight().to_vec2::<f32>()?, key_rows.to_vec2::<f32>()?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn from_layout(layout: Layout, config: &SelfAttentionConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self(MultiHead::from_layout(LayerKind::SelfAttention, layout, config, &vb)?))
    }

    /// As [`SelfAttention::from_layout`], from a checkpoint on disk: a safetensors file, the `*.index.json` of a sharded
    /// one, or a folder with either. Of it only the tensors whose names begin with `prefix` and a dot (with an empty
    /// prefix, all) are read, and cast to `dtype` if one is given.
    ///
    /// # Errors
    ///
    /// As there, and: a checkpoint that can't be read or that lacks a shard; without `dtype`, tensors of several dtypes;
    /// tensors under the prefix that the layout doesn't know; weights that are NaN or infinite, or become so in `dtype`. All
    /// that is wrong with the tensors is in one error.
    pub fn load_layout(
        layout: Layout,
        config: &SelfAttentionConfig,
        path: impl AsRef<Path>,
        prefix: &str,
        dtype: Option<DType>,
        device: &Device,
    ) -> Result<Self> {
        let (place, form) = ((path.as_ref(), prefix), (dtype, device));
        Ok(Self(MultiHead::load_layout(LayerKind::SelfAttention, layout, config, place, form)?))
    }

    /// The output, without dropout.
    ///
    /// # Errors
    ///
    /// See [`SelfAttention`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_t(x, false)
    }

    /// The output, with dropout in training.
    ///
    /// # Errors
    ///
    /// See [`SelfAttention`].
    pub fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        Ok(self.forward_with(x, &ForwardOptions { train, ..Default::default() })?.output)
    }

    /// The output, and what each token attends to: weights (batch, num_heads, len, len), or (num_heads, len, len) for
    /// input without a batch axis; the last axis is longer by the [extra keys](SelfAttentionConfig::extra_keys).
    ///
    /// # Errors
    ///
    /// See [`SelfAttention`].
    pub fn forward_with_weights(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        self.forward_with(x, &ForwardOptions { return_weights: true, ..Default::default() })?.with_weights()
    }

    /// A forward pass with a mask, a bias, positions, or more in return.
    ///
    /// # Errors
    ///
    /// See [`SelfAttention`].
    pub fn forward_with(&self, x: &Tensor, options: &ForwardOptions) -> Result<ForwardOutput> {
        self.attend(x, [x, x], options)
    }

    /// An empty cache for a batch of this size, to decode with.
    ///
    /// # Errors
    ///
    /// A layer that isn't causal: earlier tokens would look at later ones, and would have to be computed anew.
    pub fn kv_cache(&self, batch: usize) -> Result<KvCache> {
        self.new_cache(batch)
    }

    /// The output for tokens that follow those of the cache, which then holds them as well: a prompt, a token, or any
    /// number of them. It is what [`forward`](SelfAttention::forward) gives for these tokens in the whole sequence.
    ///
    /// No gradient flows through a cache: the output is detached from everything.
    ///
    /// # Shapes
    ///
    /// x (batch, len, embed_dim), or (len, embed_dim) with a cache for one sequence; output (batch, len, output_dim) or
    /// (len, output_dim).
    ///
    /// # Errors
    ///
    /// As [`SelfAttention`]; a cache for another batch size, dtype or device, or made by a layer with other heads; more
    /// tokens than the cache is allowed, or than there is memory for. The cache is then as it was before.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::{RotaryConfig, SelfAttention, SelfAttentionConfig};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let rotary = Some(RotaryConfig::default());
    /// let config = SelfAttentionConfig { is_causal: true, rotary, ..SelfAttentionConfig::new(8, 2) };
    /// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu);
    /// let attention = SelfAttention::new(&config, vb)?;
    /// let x = Tensor::randn(0f64, 1.0, (1, 6, 8), &Device::Cpu)?;
    ///
    /// let mut cache = attention.kv_cache(1)?;
    /// attention.forward_cached(&x.narrow(1, 0, 4)?, &mut cache)?; // a prompt of four tokens
    /// attention.forward_cached(&x.narrow(1, 4, 1)?, &mut cache)?; // then one by one
    /// let last = attention.forward_cached(&x.narrow(1, 5, 1)?, &mut cache)?;
    /// assert_eq!(cache.len(), 6);
    ///
    /// let whole = attention.forward(&x)?.narrow(1, 5, 1)?;
    /// assert!((last - whole)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-12);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn forward_cached(&self, x: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        Ok(self.forward_cached_with(x, cache, &ForwardOptions::default())?.output)
    }

    /// As [`SelfAttention::forward_cached`], for prompts of different lengths, padded at the right: the first `lengths[b]`
    /// tokens of sequence `b` are its own, and what the others give means nothing.
    ///
    /// # Errors
    ///
    /// As there, or lengths for another number of sequences or longer than x.
    pub fn prefill(&self, x: &Tensor, lengths: &[usize], cache: &mut KvCache) -> Result<Tensor> {
        Ok(self.attend_cached(x, Some(lengths), cache, &ForwardOptions::default())?.output)
    }

    /// As [`SelfAttention::forward_cached`], with a mask, a bias, or more in return, over scores (batch, num_heads, len,
    /// kv_len), where kv_len is the length of the longest sequence, these tokens included. Key `j` of a sequence is its
    /// token `j`, and its queries follow the tokens that it has. With a sliding window the keys are the last ones, and
    /// masks and biases can't be given.
    ///
    /// # Errors
    ///
    /// As there; `train`, or a position_offset, which the cache knows itself.
    pub fn forward_cached_with(
        &self,
        x: &Tensor,
        cache: &mut KvCache,
        options: &ForwardOptions,
    ) -> Result<ForwardOutput> {
        self.attend_cached(x, None, cache, options)
    }
}

impl Deref for SelfAttention {
    type Target = MultiHead;

    fn deref(&self) -> &MultiHead {
        &self.0
    }
}

/// With dropout in training alone, as candle's own layers with dropout. (A `Module` as well it can't be: candle makes every
/// `Module` a `ModuleT` that ignores `train`. Where one is asked for, `candle_nn::func(move |x| attention.forward(x))`
/// is one.)
impl ModuleT for SelfAttention {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        SelfAttention::forward_t(self, x, train)
    }
}
