//! Attention for [candle](https://github.com/huggingface/candle) that trains.
//!
//! [`SelfAttention`] and [`CrossAttention`] are layers to plug into a model: trainable projections, heads, masks,
//! grouped-query attention, rotary embedding, with a gradient for every parameter, and self-describing checkpoints.
//! [`scaled_dot_product_attention`] is the function inside them. [`simplified`] explains the idea without trainable
//! weights.
//!
//! ```
//! use candle_attention::{SelfAttention, SelfAttentionConfig};
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//!
//! let varmap = VarMap::new();
//! let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
//! let config = SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(64, 4) };
//! let attention = SelfAttention::new(&config, vb.pp("attention"))?;
//!
//! let x = Tensor::randn(0f32, 1.0, (2, 10, 64), &Device::Cpu)?; // (batch, len, embed_dim)
//! assert_eq!(attention.forward(&x)?.dims(), [2, 10, 64]);
//! # Ok::<(), candle_attention::Error>(())
//! ```
//!
//! # The map
//!
//! A file imports only from files on lower floors. A folder's `mod.rs` is on the folder's own floor.
//!
//! | floor | file | what |
//! |---|---|---|
//! | 14 | `block` | the parts of a transformer block, and the block |
//! | 13 | `block/files` | blocks in files: this crate's own, and those of other programs |
//! | 13 | `block/tensor` | blocks that several ranks share |
//! | 12 | `block/transformer` | the block: attention and an MLP, with norms, dropout and residuals |
//! | 10 | `train` | training: AdamW, clipping, learning rates, gradients of several batches, half types |
//! | 9 | `train/grad_scaler` | the scale of the loss, for training in f16 |
//! | 8 | `train/adamw` | AdamW, and its state in files |
//! | 8 | `train/clipping`, `train/accumulation` | clipping by norm; the mean of the gradients of several batches |
//! | 7 | `train/adamw/moments`, `train/adamw/config` | what AdamW keeps of each parameter; its settings |
//! | 7 | `train/gradients` | the gradients of named parameters, checked |
//! | 6 | `train/in_place`, `train/schedule` | writes to several tensors at once; the learning rate of each step |
//! | 6 | `train/backward` | the backward pass of a loss |
//! | 11 | `layer` | the layers, with their configs, options and caches |
//! | 10 | `layer/self_attention`, `layer/cross_attention` | the two layers |
//! | 10 | `block/layouts` | how other programs name and arrange the parameters of whole blocks |
//! | 9 | `block/config` | the config of a block, its checks and its parameters |
//! | 9 | `layer/shared` | the methods that both layers share: parameters and files |
//! | 9 | `layer/tensor` | attention of which each rank has some of the heads |
//! | 7 | `layer/shared_heads` | which heads of a layer a rank has, and which part of each parameter |
//! | 9 | `layer/sequence` | self-attention of a sequence, of which several ranks may hold a part each |
//! | 9 | `layer/adapted` | the core as a layer of projections |
//! | 9 | `layer/cached` | attention over keys and values that were computed earlier |
//! | 8 | `block/linear` | x·Wᵀ + b with a gradient |
//! | 8 | `block/mlp` | the MLP of a block |
//! | 8 | `block/loss` | cross-entropy of logits, and of a linear layer without all logits at once |
//! | 8 | `layer/core` | projections, heads, attention, output |
//! | 15 | `quantised` | weights in 8 to 4 bits, and GGUF files |
//! | 15 | `adapter` | fine-tuning by LoRA, on any projection |
//! | 15 | `adapter/peft` | adapters in the files that PEFT writes |
//! | 15 | `parallel` | work over several ranks |
//! | 8 | `parallel/data` | data parallelism: the mean of the gradients over the ranks |
//! | 6 | `parallel/threads` | ranks as threads of one process |
//! | 6 | `parallel/nccl` | tensors of CUDA devices over NCCL (feature `nccl`; not run so far) |
//! | 6 | `parallel/mpi` | ranks as processes of `mpirun` (feature `mpi`) |
//! | 5 | `parallel/rank` | the work of one rank, from its start to its end |
//! | 4 | `parallel/host` | what ranks do together with tensors on the CPU |
//! | 3 | `parallel/context/work` | how the work of attention is divided among ranks |
//! | 2 | `parallel/context` | attention over a sequence that is split across ranks: the split, the ring, Ulysses |
//! | 3 | `parallel/tensor` | layers whose heads and hidden numbers the ranks share: their parts of parameters, sums over ranks |
//! | 3 | `parallel/engine` | rounds and exchanges of messages; ranks that disagree, fail or are gone |
//! | 2 | `parallel/message` | a message, and tensors in it as bytes |
//! | 1 | `parallel/calls` | a thread that runs calls in their order |
//! | 1 | `parallel/hash` | a hash of a tensor's numbers |
//! | 1 | `parallel/sum` | the sum of a tensor over ranks, in their order |
//! | 1 | `parallel/communicator` | what ranks do together, as a trait |
//! | 9 | `adapter/linear` | adapters on any linear layer |
//! | 8 | `adapter/adapt` | adapters added to a layer, chosen, merged |
//! | 8 | `layer/kv_cache` | keys and values of the tokens so far |
//! | 7 | `layer/fused` | self-attention as one operation |
//! | 7 | `layer/init` | a layer's parameters: checked, created, initialised |
//! | 7 | `layer/options` | the options and the output of one call of a layer |
//! | 7 | `layer/bias_kv` | keys and values that a layer appends to the given ones |
//! | 7 | `block/mlp_op` | an MLP as one operation |
//! | 6 | `checkpoint` | safetensors files with their config, and the layouts of other programs |
//! | 6 | `sdpa` | `scaled_dot_product_attention`: checks its input, then chooses the backend |
//! | 5 | `sdpa/reference` | attention with every score in memory: read this first |
//! | 5 | `sdpa/fused` | attention without a q_len x kv_len matrix: the interface to the kernels; sinks are added after them |
//! | 5 | `sdpa/parallel` | attention over several ranks: what they agree on |
//! | 5 | `sdpa/cuda` | fused attention by the CUDA kernels |
//! | 6 | `projection` | a linear layer inside another layer, with its adapters, as one operation |
//! | 5 | `projection/side_by_side` | linear layers that read the same input, on numbers |
//! | 4 | `projection/quantised` | a weight in quantised blocks |
//! | 4 | `projection/low_rank` | the matrices of one adapter at one linear layer |
//! | 3 | `adapter/config` | the config of an adapter; which adapter a call uses |
//! | 6 | `block/branch` | what stands around attention or an MLP: norm, dropout, residual |
//! | 5 | `block/relay` | a layer as an operation, with gradients of many parameters |
//! | 5 | `block/norm_layer` | a norm with its parameters |
//! | 4 | `block/operand` | parameters and results as the kernels take and give them |
//! | 3 | `block/epilogue` | what a product does to its rows: bias and residual |
//! | 3 | `block/op` | an operation on the CPU as candle wants it: numbers in, numbers and gradients out |
//! | 4 | `block/activation` | activation functions, plain and gated |
//! | 4 | `block/dropout` | dropout, alone and with the sum of a residual and its branch |
//! | 4 | `block/norm` | RMS norm and layer norm |
//! | 4 | `block/embedding` | rows of a trained table |
//! | 4 | `layer/config` | the config of a layer, and its checks |
//! | 5 | `sdpa/score_memory` | the memory of the reference, asked for before |
//! | 4 | `sdpa/checks` | the inputs of one call, checked once |
//! | 4 | `sdpa/visible` | matrix products over the pairs of query and key that the mask allows |
//! | 3 | `sdpa/options` | the options and the output of attention |
//! | 3 | `sdpa/broadcast` | inputs, masks and biases that broadcast |
//! | 3 | `sdpa/head_layout` | the order of the axes: heads first or tokens first |
//! | 3 | `sdpa/overflow` | whether scores can overflow, and which numbers are finite |
//! | 2 | `mask` | which keys each query may attend to |
//! | 3 | `rotary` | rotary position embedding |
//! | 2 | `simplified` | attention without trainable weights |
//! | 1 | `check` | checks that several files share |
//! | 2 | `gradient` | gradients on their way from operations to candle, or past it |
//! | 1 | `memory` | memory, asked for before candle allocates it |
//! | 1 | `unique_map` | JSON objects in which no name stands twice |
//! | 0 | `empty` | tensors without entries: gradients through them, and views that candle can't read |
//! | 0 | `error` | every way an input can be wrong |
//!
//! These files use the package `attention-kernels`: the fused computation on slices, masks as rules, dropout, random
//! numbers. Code that works with raw memory is only there. `attention-files` replaces files as a whole or not at all, and
//! `attention-heatmap` draws weights.

#![deny(missing_docs)]
#![forbid(unsafe_code)]

pub mod adapter;
pub mod block;
mod check;
pub mod checkpoint;
mod empty;
mod error;
mod gradient;
mod layer;
mod mask;
mod memory;
pub mod parallel;
mod projection;
pub mod quantised;
pub mod rotary;
mod sdpa;
pub mod simplified;
pub mod train;
mod unique_map;

pub use attention_files::FileError;
pub use attention_kernels::mask::MaskError;
pub use checkpoint::{Layout, LayoutFile};
pub use error::{AttentionError, Error, Result};
pub use layer::{
    CrossAttention, ForwardOptions, ForwardOutput, KvCache, ProjectedMemory, SelfAttention, SelfAttentionConfig,
    cross_attention, self_attention,
};
pub use mask::Mask;
pub use sdpa::{AttentionOptions, AttentionOutput, Backend, ScoreStage, scaled_dot_product_attention};

/// For tests: the CUDA kernels on a machine that isn't a GPU.
#[doc(hidden)]
pub mod cuda_testing {
    pub use crate::sdpa::cuda::with_machine;
}

/// The programs in the README are compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The programs in the guide to fine-tuning are compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../docs/fine_tuning.md")]
struct FineTuning;

/// The programs in the guide to several ranks are compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../docs/parallel.md")]
struct Parallel;
