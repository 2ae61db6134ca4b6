//! Fine-tuning by LoRA: low-rank matrices beside the weights of linear layers, which alone are trained.
//!
//! [`Adapt::with_lora`] adds an adapter to a layer or a block. What was there becomes constant. The optimiser gets the adapter's variables:
//! those of the `VarBuilder` that it was created in, or the layer's `vars()`.
//!
//! ```
//! use candle_attention::adapter::{Adapt, AdapterChoice, LoraConfig, Target};
//! use candle_attention::train::{AdamW, AdamWConfig, named_variables};
//! use candle_attention::{ForwardOptions, SelfAttention, SelfAttentionConfig};
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//!
//! # let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
//! let base = SelfAttention::new(&SelfAttentionConfig::new(8, 2), vb)?; // or from a checkpoint
//! let x = Tensor::randn(0f32, 1.0, (1, 5, 8), &Device::Cpu)?;
//!
//! let varmap = VarMap::new();
//! let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
//! let config = LoraConfig { targets: vec![Target::Query, Target::Value], ..LoraConfig::new(2, 4.0) };
//! let layer = base.with_lora("legal", &config, vb)?;
//! let mut optimizer = AdamW::new(&named_variables(&varmap), AdamWConfig { lr: 0.1, ..Default::default() })?;
//! let loss = |layer: &SelfAttention| layer.forward_t(&x, true)?.sqr()?.mean_all();
//! let before = loss(&layer)?.to_scalar::<f32>()?;
//! for _ in 0..20 {
//!     optimizer.step(&loss(&layer)?.backward()?)?;
//! }
//! assert!(loss(&layer)?.to_scalar::<f32>()? < before);
//!
//! // The base is as it was, and one call may do without the adapter.
//! let options = ForwardOptions { adapter: AdapterChoice::Base, ..Default::default() };
//! let untouched = layer.forward_with(&x, &options)?.output;
//! assert_eq!(untouched.to_vec3::<f32>()?, base.forward(&x)?.to_vec3::<f32>()?);
//!
//! // Merged, it is a plain layer, which can be saved.
//! let merged = layer.merge("legal")?;
//! let difference = (merged.forward(&x)? - layer.forward(&x)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
//! assert!(difference < 1e-5);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! On the CPU no pass over the output adds an adapter's part: it is one more term in the sum of products. B · A is computed only by
//! [`Adapt::merge`].
//!
//! Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022), section 4.

mod adapt;
pub(crate) mod config;
mod linear;
mod peft;

pub use adapt::Adapt;
pub use config::{AdapterChoice, LoraConfig, Target};
pub use linear::LoraLinear;
pub use peft::{InLayout, PeftAdapter, PeftExtras, load_peft, save_peft};
