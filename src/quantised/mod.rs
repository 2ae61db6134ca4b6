//! Weights in 8 to 4 bits: for inference in less memory, and as the base of adapters (QLoRA).
//!
//! [`Quantise::quantise`] replaces the weights of a layer's projections by blocks of a [`Format`], and [`Gguf`] reads them from a GGUF file.
//! On the CPU a product decodes a part of a weight at a time, forward and backward, and never the whole matrix. The numbers that it multiplies
//! are those of the blocks (rounded to bf16 for inputs of bf16, on processors with AMX): inputs aren't quantised. The
//! weights themselves get no gradient; the input and [adapters](crate::adapter) do.
//!
//! ```
//! use candle_attention::adapter::{Adapt, LoraConfig};
//! use candle_attention::quantised::{Format, Quantise};
//! use candle_attention::{SelfAttention, SelfAttentionConfig};
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//!
//! let vb = || VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
//! let base = SelfAttention::new(&SelfAttentionConfig::new(64, 4), vb())?.quantise(Format::Q8_0)?;
//! let x = Tensor::randn(0f32, 1.0, (1, 5, 64), &Device::Cpu)?;
//! let difference = (base.forward(&x)? - base.dequantise()?.forward(&x)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
//! assert!(difference < 1e-5);
//!
//! // QLoRA: adapters on a quantised base.
//! let layer = base.with_lora("default", &LoraConfig::new(8, 16.0), vb())?;
//! let grads = layer.forward_t(&x, true)?.sqr()?.mean_all()?.backward()?;
//! assert!(layer.vars().iter().all(|var| grads.get(var).is_some()));
//! # Ok::<(), candle_attention::Error>(())
//! ```
//!
//! The accessors of a quantised layer, such as [`SelfAttention::q_proj`](crate::SelfAttention::q_proj), give a weight of the right shape,
//! dtype and device that takes no memory and whose numbers are NaN. [`Quantise::dequantise`] gives the numbers. On a GPU each call
//! decodes the whole weight, which stays in memory until the backward pass.
//!
//! Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (NeurIPS 2023), section 3; the formats of ggml.

mod gguf;

pub use attention_kernels::quantised::Format;
pub use gguf::Gguf;

use crate::error::Result;
use crate::projection::Projections;

/// A layer whose weights can be quantised: [`SelfAttention`](crate::SelfAttention), [`CrossAttention`](crate::CrossAttention),
/// [`TransformerBlock`](crate::block::TransformerBlock), [`Mlp`](crate::block::Mlp) and [`LoraLinear`](crate::adapter::LoraLinear).
pub trait Quantise: Projections + Clone {
    /// This layer with the weights of its projections in blocks. Biases, norms and adapters stay as they are, but for an adapter that is
    /// merged: it is a part of the weights for good. Weights that are in blocks of this format already stay so.
    ///
    /// The scales of ggml's formats are in f16, which has few digits for small numbers: in Q4_K, Q5_K and Q6_K, blocks whose largest number is
    /// below about 10⁻⁴ may become zeros.
    ///
    /// # Errors
    ///
    /// A weight whose rows aren't whole blocks ([`Format::block_len`] numbers), whose numbers aren't finite or are too large for
    /// blocks; too little memory; weights in blocks of another format.
    fn quantise(&self, format: Format) -> Result<Self> {
        self.map_projections(&mut |name, projection| projection.quantise(&format!("{name}.weight"), format))
    }

    /// This layer with numbers as weights again: those that the blocks stand for, as constants. Other weights stay as they are.
    ///
    /// # Errors
    ///
    /// Too little memory.
    fn dequantise(&self) -> Result<Self> {
        self.map_projections(&mut |_, projection| projection.dequantise())
    }

    /// The format of each weight that is in blocks, with its name.
    fn formats(&self) -> Vec<(String, Format)> {
        let format = |(name, projection): (String, &crate::projection::Projection)| {
            Some((format!("{name}.weight"), projection.quantised()?.format()))
        };
        self.projections().into_iter().filter_map(format).collect()
    }
}

impl<L: Projections + Clone> Quantise for L {}
