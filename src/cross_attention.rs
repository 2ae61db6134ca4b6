//! [`CrossAttention`]: queries from one sequence, keys and values from another.

use std::ops::Deref;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use crate::checkpoint::{LayerKind, Layout};
use crate::config::SelfAttentionConfig;
use crate::multi_head::{ForwardOptions, ForwardOutput, MultiHead, ProjectedMemory};

/// Cross-attention with trainable projections: every token of one sequence (a decoder's) gathers what it needs from
/// another, the memory (an encoder's output).
///
/// It is made of the same config as [`SelfAttention`](crate::SelfAttention); `kv_dim` is the size of a memory token where
/// it isn't embed_dim. A rotary embedding is refused, since the two sequences share no positions.
///
/// # Shapes
///
/// Input (batch, q_len, embed_dim) and memory (batch, kv_len, kv_dim), both with a batch axis or both without, of any
/// strides; output (batch, q_len, output_dim).
///
/// # Errors
///
/// `forward` and its kin: an input or memory of another rank, size, dtype or device than the layer's, of two batch sizes,
/// a mask or bias of another size than the scores.
///
/// # Examples
///
/// ```
/// use candle_attention::{CrossAttention, ForwardOptions, Mask, SelfAttentionConfig};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let config = SelfAttentionConfig { kv_dim: Some(6), ..SelfAttentionConfig::new(8, 2) };
/// let attention = CrossAttention::new(&config, vb)?;
///
/// let x = Tensor::randn(0f32, 1.0, (2, 3, 8), &Device::Cpu)?;
/// let memory = Tensor::randn(0f32, 1.0, (2, 5, 6), &Device::Cpu)?;
/// // The second memory holds only four tokens.
/// let options = ForwardOptions { attn_mask: Mask::key_lengths(&[5, 4]), ..Default::default() };
/// assert_eq!(attention.forward_with(&x, &memory, &options)?.output.dims(), [2, 3, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Source: Vaswani et al., "Attention Is All You Need" (NIPS 2017), section 3.2.3.
#[derive(Clone, Debug)]
pub struct CrossAttention(MultiHead);

impl CrossAttention {
    /// A layer whose parameters come from, or are made in, `vb`, as in
    /// [`SelfAttention::new`](crate::SelfAttention::new).
    ///
    /// # Errors
    ///
    /// As there, and a config with a rotary embedding.
    pub fn new(config: &SelfAttentionConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self(MultiHead::new(LayerKind::CrossAttention, config, &vb)?))
    }

    /// Loads a layer that [`save`](MultiHead::save) wrote, as [`SelfAttention::load`](crate::SelfAttention::load) does.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Ok(Self(MultiHead::load(LayerKind::CrossAttention, path.as_ref(), device)?))
    }

    /// As [`CrossAttention::load`], from the bytes of a file.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn from_bytes(bytes: &[u8], device: &Device) -> Result<Self> {
        Ok(Self(MultiHead::from_bytes(LayerKind::CrossAttention, bytes, device)?))
    }

    /// A layer from weights that another program trained, as
    /// [`SelfAttention::from_layout`](crate::SelfAttention::from_layout).
    ///
    /// # Errors
    ///
    /// As there, and a config with a rotary embedding.
    pub fn from_layout(layout: Layout, config: &SelfAttentionConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self(MultiHead::from_layout(LayerKind::CrossAttention, layout, config, &vb)?))
    }

    /// A layer from another program's checkpoint on disk, as
    /// [`SelfAttention::load_layout`](crate::SelfAttention::load_layout).
    ///
    /// # Errors
    ///
    /// As there, and a config with a rotary embedding.
    pub fn load_layout(
        layout: Layout,
        config: &SelfAttentionConfig,
        path: impl AsRef<Path>,
        prefix: &str,
        dtype: Option<DType>,
        device: &Device,
    ) -> Result<Self> {
        let (place, form) = ((path.as_ref(), prefix), (dtype, device));
        Ok(Self(MultiHead::load_layout(LayerKind::CrossAttention, layout, config, place, form)?))
    }

    /// The output, without dropout.
    ///
    /// # Errors
    ///
    /// See [`CrossAttention`].
    pub fn forward(&self, x: &Tensor, memory: &Tensor) -> Result<Tensor> {
        self.forward_t(x, memory, false)
    }

    /// The output, with dropout in training.
    ///
    /// # Errors
    ///
    /// See [`CrossAttention`].
    pub fn forward_t(&self, x: &Tensor, memory: &Tensor, train: bool) -> Result<Tensor> {
        Ok(self.forward_with(x, memory, &ForwardOptions { train, ..Default::default() })?.output)
    }

    /// The output, and what each token of `x` attends to: weights (batch, num_heads, q_len, kv_len), or (num_heads,
    /// q_len, kv_len) for input without a batch axis; the last axis is longer by the
    /// [extra keys](SelfAttentionConfig::extra_keys).
    ///
    /// # Errors
    ///
    /// See [`CrossAttention`].
    pub fn forward_with_weights(&self, x: &Tensor, memory: &Tensor) -> Result<(Tensor, Tensor)> {
        self.forward_with(x, memory, &ForwardOptions { return_weights: true, ..Default::default() })?.with_weights()
    }

    /// A forward pass with a mask, a bias, or more in return.
    ///
    /// # Errors
    ///
    /// See [`CrossAttention`].
    pub fn forward_with(&self, x: &Tensor, memory: &Tensor, options: &ForwardOptions) -> Result<ForwardOutput> {
        self.forward_key_value(x, memory, memory, options)
    }

    /// As [`CrossAttention::forward_with`], with keys and values from two memories of one length: `key` (batch, kv_len,
    /// kv_dim) and `value` (batch, kv_len, value_input_dim).
    ///
    /// # Errors
    ///
    /// See [`CrossAttention`], and two memories of different lengths.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::{CrossAttention, ForwardOptions, SelfAttentionConfig};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// // `nn.MultiheadAttention(8, 2, kdim=6, vdim=3)`
    /// let config =
    ///     SelfAttentionConfig { kv_dim: Some(6), value_input_dim: Some(3), ..SelfAttentionConfig::new(8, 2) };
    /// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    /// let attention = CrossAttention::new(&config, vb)?;
    /// let x = Tensor::randn(0f32, 1.0, (2, 4, 8), &Device::Cpu)?;
    /// let key = Tensor::randn(0f32, 1.0, (2, 5, 6), &Device::Cpu)?;
    /// let value = Tensor::randn(0f32, 1.0, (2, 5, 3), &Device::Cpu)?;
    /// let output = attention.forward_key_value(&x, &key, &value, &ForwardOptions::default())?.output;
    /// assert_eq!(output.dims(), [2, 4, 8]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn forward_key_value(
        &self,
        x: &Tensor,
        key: &Tensor,
        value: &Tensor,
        options: &ForwardOptions,
    ) -> Result<ForwardOutput> {
        self.attend(x, [key, value], options)
    }

    /// The keys and values of a memory, computed once, for a decoder that looks at it for every token.
    ///
    /// # Errors
    ///
    /// A memory that doesn't fit, as in [`CrossAttention`].
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::{CrossAttention, SelfAttentionConfig};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    /// let attention = CrossAttention::new(&SelfAttentionConfig::new(8, 2), vb)?;
    /// let memory = Tensor::randn(0f32, 1.0, (2, 5, 8), &Device::Cpu)?;
    /// let projected = attention.project(&memory)?;
    /// for _ in 0..3 {
    ///     let token = Tensor::randn(0f32, 1.0, (2, 1, 8), &Device::Cpu)?;
    ///     let output = attention.forward_projected(&token, &projected)?;
    ///     assert_eq!(output.to_vec3::<f32>()?, attention.forward(&token, &memory)?.to_vec3::<f32>()?);
    /// }
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn project(&self, memory: &Tensor) -> Result<ProjectedMemory> {
        self.project_key_value(memory, memory)
    }

    /// As [`CrossAttention::project`], with keys and values from two memories, as in
    /// [`CrossAttention::forward_key_value`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn project_key_value(&self, key: &Tensor, value: &Tensor) -> Result<ProjectedMemory> {
        self.project_memories([key, value])
    }

    /// The output for a memory that was [projected](CrossAttention::project) before. Gradients flow through both.
    ///
    /// # Errors
    ///
    /// As [`CrossAttention`], or a memory that a layer with other heads or of another dtype has projected.
    pub fn forward_projected(&self, x: &Tensor, memory: &ProjectedMemory) -> Result<Tensor> {
        Ok(self.forward_projected_with(x, memory, &ForwardOptions::default())?.output)
    }

    /// As [`CrossAttention::forward_projected`], with a mask, a bias, dropout, or more in return.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn forward_projected_with(
        &self,
        x: &Tensor,
        memory: &ProjectedMemory,
        options: &ForwardOptions,
    ) -> Result<ForwardOutput> {
        self.attend_projected(x, memory, options)
    }
}

impl Deref for CrossAttention {
    type Target = MultiHead;

    fn deref(&self) -> &MultiHead {
        &self.0
    }
}
