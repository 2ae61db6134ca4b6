//! [`CrossAttention`]: queries from one sequence, keys and values from another.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, VarBuilder};

use crate::adapter::config::AdapterChoice;
use crate::checkpoint::{self, LayerKind, Layout, LayoutFile};
use crate::error::Result;
use crate::layer::cached::ProjectedMemory;
use crate::layer::config::SelfAttentionConfig;
use crate::layer::core::Core;
use crate::layer::init;
use crate::layer::options::{ForwardOptions, ForwardOutput};
use crate::layer::shared::shared_methods;
use crate::parallel::communicator::Communicator;
use crate::projection::{Change, Projection, Projections};

/// Cross-attention with trainable projections: every token of one sequence (a decoder's) attends to the tokens of
/// another, the memory (an encoder's output).
///
/// It has the same config as [`SelfAttention`](crate::SelfAttention). `kv_dim` is the size of a memory token, if that
/// isn't embed_dim. A rotary embedding is refused, since the two sequences share no positions. With `is_causal` the
/// last query is aligned with the last token of the memory; see [`SelfAttentionConfig::is_causal`].
///
/// # Shapes
///
/// Input (batch, q_len, embed_dim) and memory (batch, kv_len, kv_dim), both with a batch axis or both without, of any
/// strides; output (batch, q_len, output_dim). A batch of 1 broadcasts: all sequences can attend to one memory, and one
/// sequence to many memories.
///
/// # Errors
///
/// The methods that compute the output return an error for an input or memory of another rank, size, dtype or device
/// than the layer's; for an input and a memory of different batch sizes, of which none is 1; and for a mask or bias that doesn't fit the
/// scores.
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
pub struct CrossAttention(Core);

shared_methods!(CrossAttention);

/// A [`CrossAttention`] layer whose parameters are read from `vb` or created in it, as by candle-nn's `linear`.
///
/// # Errors
///
/// As [`CrossAttention::new`].
pub fn cross_attention(config: &SelfAttentionConfig, vb: VarBuilder) -> Result<CrossAttention> {
    CrossAttention::new(config, vb)
}

impl CrossAttention {
    const KIND: LayerKind = LayerKind::CrossAttention;

    /// A layer whose parameters are read from `vb` or created in it, as in
    /// [`SelfAttention::new`](crate::SelfAttention::new).
    ///
    /// # Errors
    ///
    /// As [`SelfAttention::new`](crate::SelfAttention::new), and a config with a rotary embedding.
    pub fn new(config: &SelfAttentionConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self(Core::new(Self::KIND, config, &vb)?))
    }

    /// Computes the output, without dropout.
    ///
    /// # Errors
    ///
    /// See [`CrossAttention`].
    pub fn forward(&self, x: &Tensor, memory: &Tensor) -> Result<Tensor> {
        self.forward_t(x, memory, false)
    }

    /// Computes the output, with dropout if `train` is true.
    ///
    /// # Errors
    ///
    /// See [`CrossAttention`].
    pub fn forward_t(&self, x: &Tensor, memory: &Tensor, train: bool) -> Result<Tensor> {
        Ok(self.forward_with(x, memory, &ForwardOptions { train, ..Default::default() })?.output)
    }

    /// Computes the output and the weights, (batch, num_heads, q_len, kv_len), or (num_heads, q_len, kv_len) for input
    /// without a batch axis. The last axis also counts the [extra keys](SelfAttentionConfig::extra_keys).
    ///
    /// # Errors
    ///
    /// See [`CrossAttention`].
    pub fn forward_with_weights(&self, x: &Tensor, memory: &Tensor) -> Result<(Tensor, Tensor)> {
        self.forward_with(x, memory, &ForwardOptions { return_weights: true, ..Default::default() })?.with_weights()
    }

    /// Computes the output with the given options, for example with a mask or a bias.
    ///
    /// # Errors
    ///
    /// See [`CrossAttention`].
    pub fn forward_with(&self, x: &Tensor, memory: &Tensor, options: &ForwardOptions) -> Result<ForwardOutput> {
        self.forward_key_value(x, memory, memory, options)
    }

    /// As [`CrossAttention::forward_with`], with keys and values from two memories of the same length: `key` (batch,
    /// kv_len, kv_dim) and `value` (batch, kv_len, value_input_dim).
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
        self.0.attend_to_memory(x, [key, value], options)
    }

    /// Projects the keys and values of a memory, for a decoder that attends to the same memory at every step.
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
    /// Memories that don't fit, as in [`CrossAttention::forward_key_value`].
    pub fn project_key_value(&self, key: &Tensor, value: &Tensor) -> Result<ProjectedMemory> {
        self.project_with(key, value, &AdapterChoice::Active)
    }

    /// As [`CrossAttention::project_key_value`], with an [adapter](crate::adapter) of choice and without its dropout. The calls that use the
    /// memory have to choose the same one.
    ///
    /// # Errors
    ///
    /// As [`CrossAttention::project_key_value`], and a name that no adapter has.
    pub fn project_with(&self, key: &Tensor, value: &Tensor, adapter: &AdapterChoice) -> Result<ProjectedMemory> {
        self.0.project_memory([key, value], adapter)
    }

    /// Computes the output for a memory that has been [projected](CrossAttention::project). Gradients flow to the input
    /// and to the memory.
    ///
    /// # Errors
    ///
    /// See [`CrossAttention`], and a memory that was projected by a layer with other heads, of another dtype or with another adapter.
    pub fn forward_projected(&self, x: &Tensor, memory: &ProjectedMemory) -> Result<Tensor> {
        Ok(self.forward_projected_with(x, memory, &ForwardOptions::default())?.output)
    }

    /// As [`CrossAttention::forward_projected`], with the given options, for example with a mask or with dropout.
    ///
    /// # Errors
    ///
    /// As [`CrossAttention::forward_projected`].
    pub fn forward_projected_with(
        &self,
        x: &Tensor,
        memory: &ProjectedMemory,
        options: &ForwardOptions,
    ) -> Result<ForwardOutput> {
        self.0.attend_projected(x, memory, options)
    }
}
