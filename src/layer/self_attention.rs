//! [`SelfAttention`]: x -> W_Q, W_K, W_V -> heads -> attention -> W_O -> y.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, ModuleT, VarBuilder};

use crate::block::branch::Branch;
use crate::checkpoint::{self, LayerKind, Layout, LayoutFile, Parameters};
use crate::error::{AttentionError, Error, Result};
use crate::layer::config::SelfAttentionConfig;
use crate::layer::core::Core;
use crate::layer::init;
use crate::layer::kv_cache::KvCache;
use crate::layer::options::{ForwardOptions, ForwardOutput};
use crate::layer::shared::shared_methods;
use crate::parallel::communicator::Communicator;
use crate::projection::{Change, Projection, Projections};
use crate::rotary::RotaryEmbedding;

/// Self-attention with trainable projections: every token of a sequence attends to the tokens of the same sequence.
///
/// For each head, q = W_Q x, k = W_K x, v = W_V x, and y = W_O concat(softmax(q·kᵀ / sqrt(head_dim))·v over the heads).
/// With [`SelfAttentionConfig::single_head`] it is the layer of the lecture notes, which has only W_Q, W_K and W_V.
///
/// # Shapes
///
/// Input (batch, len, embed_dim) or (len, embed_dim), of any strides; output (batch, len, output_dim) or (len,
/// output_dim), where output_dim is embed_dim, or num_heads · value_dim without W_O.
///
/// # Errors
///
/// The methods that compute the output return an error for an input of another rank, embed_dim, dtype or device than
/// the layer's, and for a mask or bias that doesn't fit the scores.
///
/// # Examples
///
/// A layer in a model, trained for one step:
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
/// Saving and loading a layer, and loading the weights of another program:
///
/// ```
/// use candle_attention::{Layout, SelfAttention, SelfAttentionConfig};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let attention = SelfAttention::new(&SelfAttentionConfig::new(8, 2), vb)?;
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("attention.safetensors");
/// attention.save(&path)?;
/// let loaded = SelfAttention::load(&path, &Device::Cpu)?;
/// let x = Tensor::randn(0f32, 1.0, (3, 8), &Device::Cpu)?;
/// assert_eq!(loaded.forward(&x)?.to_vec2::<f32>()?, attention.forward(&x)?.to_vec2::<f32>()?);
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
/// // These weights are constants. `trainable` makes variables of them.
/// assert_eq!((attention.vars().len(), attention.trainable()?.vars().len()), (0, 4));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Source: Vaswani et al., "Attention Is All You Need" (NIPS 2017), section 3.2.2.
#[derive(Clone, Debug)]
pub struct SelfAttention(Core);

shared_methods!(SelfAttention);

/// A [`SelfAttention`] layer whose parameters are read from `vb` or created in it, as by candle-nn's `linear`.
///
/// # Errors
///
/// As [`SelfAttention::new`].
pub fn self_attention(config: &SelfAttentionConfig, vb: VarBuilder) -> Result<SelfAttention> {
    SelfAttention::new(config, vb)
}

impl SelfAttention {
    const KIND: LayerKind = LayerKind::SelfAttention;

    /// A layer whose parameters are read from `vb` or created in it: `q_proj`, `k_proj`, `v_proj` and `o_proj`
    /// (`.weight`, `.bias`), `q_norm.weight`, `k_norm.weight`, `sinks`, `bias_k` and `bias_v`, as far as the config has
    /// them.
    ///
    /// Weights that a `VarMap` doesn't hold yet are initialised from the config's seed and their names. They are the
    /// same in every run, and differ between the layers of a model.
    ///
    /// # Errors
    ///
    /// An invalid config (see [`SelfAttentionConfig::validate`]); a dtype other than f16, bf16, f32 and f64; tensors
    /// that `vb` lacks or holds in another shape; weights that a layer can't have (see
    /// [`from_layout`](Self::from_layout)), such as the variables of a `VarMap` that were created in another dtype; too
    /// little memory. No parameter is then created.
    pub fn new(config: &SelfAttentionConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self(Core::new(Self::KIND, config, &vb)?))
    }

    /// A layer with these parameters, which are exactly those of its config. `prefix` is its name in the model.
    pub(crate) fn from_parameters(config: &SelfAttentionConfig, parameters: Parameters, prefix: &str) -> Result<Self> {
        Ok(Self(Core::from_parameters(Self::KIND, config, parameters, prefix)?))
    }

    /// Checks an input before anything is computed of it. Ranks that share the layer do so together, when they use it.
    pub(crate) fn check_input(&self, x: &Tensor) -> Result<(), AttentionError> {
        match self.0.shared {
            Some(_) => Ok(()),
            None => self.0.check_input("input", x, self.0.config.embed_dim),
        }
    }

    /// Checks an input on all ranks that share the layer.
    pub(crate) fn agree_on(&self, x: &Tensor, options: &ForwardOptions) -> Result<()> {
        self.0.agree_on(&[x], options, &String::new, self.0.check_input("input", x, self.0.config.embed_dim))
    }

    /// Refuses what a file of this crate doesn't hold.
    pub(crate) fn check_plain(&self) -> Result<(), AttentionError> {
        self.0.check_plain()
    }

    /// The error of a call that a block refuses. Over several ranks every rank gets it.
    pub(crate) fn refuse<T>(&self, x: &Tensor, options: &ForwardOptions, error: Error) -> Result<T> {
        self.0.refuse(x, options, error)
    }

    /// Refuses a layer that no file can describe: one with a rotary embedding from tables.
    pub(crate) fn check_described(&self) -> Result<(), AttentionError> {
        self.0.check_described()
    }

    /// This layer with another rotary embedding, such as one from the
    /// [tables](RotaryEmbedding::from_tables) of another program.
    ///
    /// A config doesn't describe tables: the config of such a layer has no rotary embedding, and
    /// [`save`](SelfAttention::save) refuses the layer. `save_layout` saves its parameters, and a layer that was loaded
    /// from them gets the tables by this method again.
    ///
    /// # Errors
    ///
    /// A rotary embedding for another head_dim.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::rotary::{Pairing, RotaryConfig, RotaryEmbedding};
    /// use candle_attention::{SelfAttention, SelfAttentionConfig};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu);
    /// let rotary = Some(RotaryConfig { base: 1.0, ..RotaryConfig::default() }); // one radian per position
    /// let attention = SelfAttention::new(&SelfAttentionConfig { rotary, ..SelfAttentionConfig::new(4, 2) }, vb)?;
    /// let x = Tensor::randn(0f64, 1.0, (3, 4), &Device::Cpu)?;
    /// let expected = attention.forward(&x)?.to_vec2::<f64>()?;
    ///
    /// let angles = Tensor::new(&[[0f64], [1.], [2.]], &Device::Cpu)?; // (max_position, dim / 2)
    /// let rotary = RotaryEmbedding::from_tables(&angles.cos()?, &angles.sin()?, 2, Pairing::HalfSplit)?;
    /// assert_eq!(attention.with_rotary(rotary)?.forward(&x)?.to_vec2::<f64>()?, expected);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn with_rotary(self, rotary: RotaryEmbedding) -> Result<Self> {
        Ok(Self(self.0.with_rotary(rotary)?))
    }

    /// Computes the output, without dropout.
    ///
    /// # Errors
    ///
    /// See [`SelfAttention`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_t(x, false)
    }

    /// Computes the output, with dropout if `train` is true.
    ///
    /// # Errors
    ///
    /// See [`SelfAttention`].
    pub fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        Ok(self.forward_with(x, &ForwardOptions { train, ..Default::default() })?.output)
    }

    /// Computes the output and the weights, (batch, num_heads, len, len), or (num_heads, len, len) for input without a
    /// batch axis. The last axis also counts the [extra keys](SelfAttentionConfig::extra_keys).
    ///
    /// # Errors
    ///
    /// See [`SelfAttention`].
    pub fn forward_with_weights(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        self.forward_with(x, &ForwardOptions { return_weights: true, ..Default::default() })?.with_weights()
    }

    /// Computes the output with the given options, for example with a mask, a bias or a position offset.
    ///
    /// # Errors
    ///
    /// See [`SelfAttention`].
    pub fn forward_with(&self, x: &Tensor, options: &ForwardOptions) -> Result<ForwardOutput> {
        self.forward_in_branch(x, options, Branch::default())
    }

    /// As [`forward_with`](Self::forward_with), with what stands around the attention in a block.
    pub(crate) fn forward_in_branch(
        &self,
        x: &Tensor,
        options: &ForwardOptions,
        branch: Branch,
    ) -> Result<ForwardOutput> {
        self.0.attend_to_itself(x, options, branch)
    }

    /// An empty cache for decoding a batch of this size.
    ///
    /// # Errors
    ///
    /// A layer that isn't causal: every new token would change the outputs of the earlier tokens.
    pub fn kv_cache(&self, batch: usize) -> Result<KvCache> {
        self.0.new_cache(batch)
    }

    /// Computes the output for tokens that follow those of the cache, and adds them to the cache. `x` may be a prompt,
    /// one token, or any number of tokens. The output equals that of [`forward`](SelfAttention::forward) over the whole
    /// sequence, at these tokens.
    ///
    /// No gradient flows through a cache: the output is detached from the graph.
    ///
    /// # Shapes
    ///
    /// x (batch, len, embed_dim), or (len, embed_dim) with a cache for one sequence; output (batch, len, output_dim) or
    /// (len, output_dim).
    ///
    /// # Errors
    ///
    /// See [`SelfAttention`]; also a cache for another batch size, dtype or device, or of a layer with other heads;
    /// more tokens than the maximum of the cache, or than memory can hold. After an error the cache is unchanged.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::rotary::RotaryConfig;
    /// use candle_attention::{SelfAttention, SelfAttentionConfig};
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

    /// As [`SelfAttention::forward_cached`], for prompts of different lengths, padded at the right. The first
    /// `lengths[b]` tokens of sequence `b` are added to the cache. The outputs at the padding have no meaning.
    ///
    /// # Errors
    ///
    /// As [`SelfAttention::forward_cached`], and lengths for another number of sequences or greater than the length of
    /// x.
    pub fn prefill(&self, x: &Tensor, lengths: &[usize], cache: &mut KvCache) -> Result<Tensor> {
        Ok(self.0.attend_cached(x, Some(lengths), cache, &ForwardOptions::default())?.output)
    }

    /// As [`SelfAttention::forward_cached`], with the given options, for example with a mask or a bias.
    ///
    /// The scores are (batch, num_heads, len, kv_len), where kv_len is the length of the longest sequence including the
    /// new tokens. Key `j` of a sequence is its token `j`. With a sliding window the keys are only the last tokens, and
    /// masks and biases are refused.
    ///
    /// The cache counts the positions of the tokens. `position_ids` replace those of the tokens of this call. A cache
    /// doesn't remember them, so give them in the later calls too.
    ///
    /// # Errors
    ///
    /// As [`SelfAttention::forward_cached`]; also `train`, and a `position_offset`, since the cache counts the
    /// positions itself.
    pub fn forward_cached_with(
        &self,
        x: &Tensor,
        cache: &mut KvCache,
        options: &ForwardOptions,
    ) -> Result<ForwardOutput> {
        self.0.attend_cached(x, None, cache, options)
    }
}

/// Dropout is on in training only, as in candle's own layers. (The layer isn't a `Module`, because candle makes every
/// `Module` a `ModuleT` that ignores `train`. Where a `Module` is needed, use `candle_nn::func(move |x|
/// Ok(attention.forward(x)?))`.)
impl ModuleT for SelfAttention {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        Ok(SelfAttention::forward_t(self, x, train)?)
    }
}
