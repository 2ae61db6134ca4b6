//! Training: the backward pass, AdamW whose state can be saved, clipping of gradients, learning rates, gradients of several batches, and half
//! types.
//!
//! ```
//! use candle_attention::train::{AdamW, AdamWConfig, Schedule, backward, clip_grad_norm, named_variables};
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//!
//! let varmap = VarMap::new();
//! let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
//! let weight = vb.get_with_hints((1, 2), "weight", candle_nn::Init::Const(0.0))?;
//! let parameters = named_variables(&varmap);
//! let mut optimizer = AdamW::new(&parameters, AdamWConfig { weight_decay: 0.0, ..Default::default() })?;
//! let schedule = Schedule::warm_up_cosine(0.1, 0.0, 10, 200)?;
//!
//! // Learns that y = 2 · a - b.
//! let (x, y) = (Tensor::new(&[[1f32, 0.0], [0.0, 1.0]], &Device::Cpu)?, Tensor::new(&[[2f32], [-1.0]], &Device::Cpu)?);
//! for step in 0..200 {
//!     let loss = (x.matmul(&weight.t()?)? - &y)?.sqr()?.mean_all()?;
//!     let mut gradients = backward(&loss)?;
//!     clip_grad_norm(&mut gradients, &parameters, 1.0)?;
//!     optimizer.set_learning_rate(schedule.learning_rate(step))?;
//!     optimizer.step(&gradients)?;
//! }
//! let learned = weight.to_vec2::<f32>()?;
//! assert!((learned[0][0] - 2.0).abs() < 0.05 && (learned[0][1] + 1.0).abs() < 0.05);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Half types
//!
//! Parameters in bf16 train with [`AdamW::with_master_weights`]. Parameters in f16 need a [`GradScaler`] besides.

mod accumulation;
mod adamw;
mod backward;
mod clipping;
mod grad_scaler;
pub(crate) mod gradients;
mod in_place;
mod schedule;

pub use accumulation::GradientAccumulator;
pub use adamw::{AdamW, AdamWConfig, MissingGradients};
pub use attention_kernels::keep_freed_memory;
pub use backward::backward;
pub use clipping::clip_grad_norm;
pub use grad_scaler::{GradScaler, GradScalerConfig};
pub use gradients::named_variables;
pub use schedule::Schedule;
