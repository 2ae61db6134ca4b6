//! `scaled_dot_product_attention` on both backends, with its masks; and attention without trainable weights.

#[path = "../common/mod.rs"]
mod common;
#[cfg(target_os = "linux")]
#[path = "../common/own_process.rs"]
mod own_process;
#[path = "../common/precision.rs"]
mod pytorch_precision;

mod attention;
mod fused;
mod golden;
mod gradients;
mod hostile;
mod mask;
mod oracle;
mod precision;
mod simplified;
