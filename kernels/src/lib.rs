//! Fused attention on the CPU: slices in, slices out, forward and backward, in f16, bf16, f32 and f64.
//!
//! context = softmax(mask(softcap(scale · q · kᵀ) + bias)) · v, with ALiBi, dropout, grouped heads and any strides, and its
//! gradients. No matrix of q_len x kv_len is ever in memory. The kernels use the best instruction set of the processor
//! (AMX and AVX-512, AVX2, NEON, else scalar code); the environment variable `CANDLE_ATTENTION_SIMD` can ask for less: `scalar`,
//! `avx2`, `avx512`, or `avx512bf16`, which is all but AMX. The same input gives the same bits for any number of threads.
//!
//! ```
//! use attention_kernels::mask::Rule;
//! use attention_kernels::{
//!     BackwardOptions, Incoming, Layout, Problem, ProblemOptions, Saved, View, backward, forward,
//! };
//!
//! // One sequence, one head, two tokens of dimension 2, each of which looks at itself and its past.
//! let (dims, layout) = ([1, 1, 2, 2], Layout::HeadsFirst);
//! let (q, k, v) = ([0.0f32, 0.0, 1.0, 1.0], [1.0, 2.0, 1.0, 2.0], [2.0, 4.0, 6.0, 8.0]);
//! let view = |what, data| View::new(what, data, layout.strides(dims), dims);
//! let causal = Rule::Band { below: None, above: Some(0), offset: None };
//! let options = ProblemOptions { mask: &causal, ..Default::default() };
//! let problem = Problem::new(view("query", &q)?, view("key", &k)?, view("value", &v)?, options)?;
//!
//! // The first token sees its own value alone, the second the mean of two values with equal keys.
//! let output = forward(&problem, layout)?;
//! assert_eq!(output.context, [2.0, 4.0, 4.0, 6.0]);
//!
//! // The gradient of the sum of the context.
//! let saved = Saved { context: view("context", &output.context)?, logsumexp: &output.logsumexp };
//! let incoming = Incoming { context: view("gradient", &[1.0; 4])?, logsumexp: None };
//! let gradients = backward(&problem, saved, incoming, BackwardOptions::default())?;
//! assert_eq!(gradients.v, [1.5, 1.5, 0.5, 0.5]);
//! # Ok::<(), attention_kernels::Error>(())
//! ```
//!
//! # The map
//!
//! A file imports only from files on lower floors.
//!
//! | floor | file | what |
//! |---|---|---|
//! | 8 | `merge` | attention over several parts of the keys, put together |
//! | 8 | `cuda` | attention on a GPU: plans, masks as the kernels read them, launches |
//! | 7 | `attention` | the two passes: tasks, and their parts of the results |
//! | 6 | `prefill` | a task of many queries, forward and backward |
//! | 6 | `decode` | a task of a few queries and many keys |
//! | 5 | `gemm` | the matrix products: which kernel computes them |
//! | 5 | `score_mods` | softcap, bias, ALiBi and mask |
//! | 5 | `loss` | cross-entropy of logits, and of a linear layer without all logits at once, and their gradients |
//! | 4 | `activation` | activation functions, plain and gated |
//! | 4 | `norm` | RMS norm and layer norm of rows |
//! | 4 | `residual` | dropout of a branch, and its sum with the residual |
//! | 4 | `operands` | a problem without the type of its tensors |
//! | 4 | `matmul` | matrix products of linear layers, with an epilogue |
//! | 3 | `pointwise` | functions of numbers at the same place |
//! | 3 | `problem` | one call, checked |
//! | 2 | `part` | some of the scores of a larger call |
//! | 3 | `gemm/pack` | operands of products, in the order in which the kernels read them |
//! | 3 | `gemm/bf16_tiles` | products of bf16 by AMX's tiles |
//! | 3 | `softmax/bf16` | the softmax of scores computed by tiles, which rounds weights to bf16 |
//! | 3 | `embedding`, `optimizer` | rows of a table, and their gradient; steps of AdamW, and norms |
//! | 3 | `rotary` | rotary position embedding, in place |
//! | 3 | `quantised` | matrices in blocks of a few bits a number |
//! | 2 | `gemm/bf16_dot` | products of bf16 in pairs (AVX512-BF16) |
//! | 2 | `gemm/nan_safe` | sums to which a weight of zero adds nothing |
//! | 2 | `softmax` | every softmax: online, of splits, and backward; a row's maximum (plain scores: inside `gemm`) |
//! | 2 | `dtype` | the types that tensors hold, and tensors as the kernels read and write them |
//! | 2 | `dropout` | which weights are dropped |
//! | 2 | `decode/microkernel` | products of a few rows, key by key |
//! | 1 | `gemm/amx` | AMX's tile registers: products of bf16 in blocks |
//! | 1 | `gemm/microkernel`, `gemm/transpose` | small blocks of products in registers; rows to lanes and back |
//! | 1 | `mask` | which keys are visible |
//! | 1 | `math`, `careful` | exp and tanh; what is computed again where a result is not finite |
//! | 1 | `alloc`, `scratch`, `schedule` | allocation that may fail; a thread's memory; tasks |
//! | 0 | `matrix` | matrices in slices, checked once |
//! | 0 | `simd`, `tiles`, `layout` | f32 and f64 as vectors; tile sizes; the order of a result's axes |
//! | 0 | `philox`, `fnv`, `error` | random numbers; a hash; every way an input can be wrong |
//!
//! # Unsafe code
//!
//! The kernels read and write through pointers, and are safe functions: what they are given are [matrices](self#the-map) that
//! can only be made from slices that hold them, and they assert that the sizes of their operands fit. Inner loops are
//! `unsafe fn` that such a function calls. Results that several tasks write at the same time are `Shared`: its one
//! `unsafe fn` hands out the rows of a task, and each caller says why no two tasks have a row in common.
//!
//! AMX is used through inline assembly, in one file. The first product of bf16 asks Linux for the room that tile registers need when
//! threads are switched: 8 KB for each thread that uses them.
#![deny(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod activation;
mod alloc;
mod attention;
mod careful;
pub mod cuda;
mod decode;
pub mod dropout;
mod dtype;
pub mod embedding;
mod error;
pub mod fnv;
mod gemm;
mod layout;
pub mod loss;
pub mod mask;
mod math;
pub mod matmul;
mod matrix;
mod merge;
pub mod norm;
mod operands;
pub mod optimizer;
mod part;
pub mod philox;
mod pointwise;
mod prefill;
mod problem;
pub mod quantised;
pub mod residual;
pub mod rotary;
mod schedule;
mod score_mods;
mod scratch;
mod simd;
mod softmax;
mod tiles;

pub use alloc::{collected, filled, keep_freed_memory, reserve};
pub use attention::{
    BackwardOptions, Element, Gradients, Incoming, Output, Saved, backward, backward_wide, forward, forward_wide,
};
pub use dropout::Dropout;
pub use dtype::Number;
pub use error::{Error, MaskError};
pub use layout::Layout;
pub use part::{HeadNumbers, Part};
pub use problem::{BiasView, Problem, ProblemOptions, View};
pub use simd::SimdFloat;
pub use softmax::LogSumExp;
