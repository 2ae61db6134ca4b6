//! [`Layout`]: how other programs name and arrange the parameters of attention, and the [`Plan`]s by which the tensors of any layer
//! are converted.
//!
//! Each layout has a file with its [`Table`]: the names of the tensors, and which of this crate's parameters each of
//! them holds. `plan` combines a table with a config, `transfer` converts the tensors.

mod bert;
mod gpt2;
mod gpt_neox;
mod llama;
mod modules;
mod out_proj;
mod own;
mod plan;
mod qkv_proj;
mod t5;
mod torch;
mod transfer;
mod wqkv;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::AttentionError;
use crate::layer::config::SelfAttentionConfig;
pub(crate) use modules::Module;
pub(crate) use plan::{Entry, Plan, Table, Wanted};
pub(crate) use transfer::{from_file, from_var_builder, prefixed, to_file, to_tensors};

/// How a checkpoint names and arranges the parameters of attention.
///
/// `Own`, `Bert`, `Gpt2`, `Llama` and `QkvProj` have whole blocks, too: see
/// [`TransformerBlock::from_layout`](crate::block::TransformerBlock::from_layout).
///
/// As text, in JSON and on command lines, a layout is its name in small letters: `torch`, `out_proj`, `modern_bert`.
///
/// ```
/// use candle_attention::Layout;
///
/// let layout: Layout = "gpt2".parse()?;
/// assert_eq!(layout, Layout::Gpt2);
/// assert!("gpt9".parse::<Layout>().unwrap_err().to_string().contains("llama")); // the error lists all layouts
/// # Ok::<(), candle_attention::AttentionError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Layout {
    /// This crate's own names, as a `VarMap` saves them: `q_proj`, `k_proj`, `v_proj`, `o_proj`.
    Own,
    /// PyTorch's `nn.MultiheadAttention`: `in_proj_weight` (queries, keys and values one after the other; three tensors
    /// where kv_dim or value_input_dim differ), `in_proj_bias`, `out_proj`, `bias_k`, `bias_v`.
    Torch,
    /// BERT, RoBERTa, ELECTRA at `attention`: `self.query`, `self.key`, `self.value`, `output.dense`. The layer norm
    /// beside them is ignored.
    Bert,
    /// ViT, DeiT, DINOv2, BEiT at `attention`: `attention.query`, `attention.key`, `attention.value`, `output.dense`.
    Vit,
    /// GPT-2 at `attn`: `c_attn` (queries, keys and values side by side) and `c_proj`, transposed to (in, out).
    Gpt2,
    /// GPT-NeoX, Pythia at `attention`, BLOOM, Falcon at `self_attention`: `query_key_value` (for each key head its
    /// queries, its key and its value, one after the other) and `dense`. Falcon 7B has one key head: `num_kv_heads:
    /// Some(1)`.
    GptNeox,
    /// Llama, Mistral, Qwen, Gemma 1, gpt-oss at `self_attn`: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `q_norm`,
    /// `k_norm`, `sinks`.
    Llama,
    /// OPT, BART, Whisper, CLIP at `self_attn` (or `encoder_attn`): `q_proj`, `k_proj`, `v_proj`, `out_proj`. Whisper's
    /// `k_proj` has no bias: `k_bias: false`.
    OutProj,
    /// Phi-3 at `self_attn`: `qkv_proj` (queries, keys and values one after the other, grouped-query too) and `o_proj`.
    QkvProj,
    /// MPT, DBRX, Nomic BERT at `attn`, and flash-attn's `MHA`: `Wqkv` (queries, keys and values one after the other)
    /// and `out_proj`.
    Wqkv,
    /// ModernBERT at `attn`: `Wqkv` and `Wo`.
    ModernBert,
    /// T5 at `SelfAttention` or `EncDecAttention`: `q`, `k`, `v`, `o` without biases. T5 doesn't scale, so the config
    /// must have `scale: Some(1.0)`. `relative_attention_bias` is ignored: add it as `attn_bias`.
    T5,
}

impl Layout {
    /// Every layout.
    pub const ALL: &[Layout] = &[
        Layout::Own,
        Layout::Torch,
        Layout::Bert,
        Layout::Vit,
        Layout::Gpt2,
        Layout::GptNeox,
        Layout::Llama,
        Layout::OutProj,
        Layout::QkvProj,
        Layout::Wqkv,
        Layout::ModernBert,
        Layout::T5,
    ];

    fn name(self) -> &'static str {
        match self {
            Layout::Own => "own",
            Layout::Torch => "torch",
            Layout::Bert => "bert",
            Layout::Vit => "vit",
            Layout::Gpt2 => "gpt2",
            Layout::GptNeox => "gpt_neox",
            Layout::Llama => "llama",
            Layout::OutProj => "out_proj",
            Layout::QkvProj => "qkv_proj",
            Layout::Wqkv => "wqkv",
            Layout::ModernBert => "modern_bert",
            Layout::T5 => "t5",
        }
    }

    fn table(self, config: &SelfAttentionConfig) -> &'static Table {
        match self {
            Layout::Own => &own::TABLE,
            Layout::Torch if torch::is_packed(config) => &torch::PACKED,
            Layout::Torch => &torch::SEPARATE,
            Layout::Bert => &bert::BERT,
            Layout::Vit => &bert::VIT,
            Layout::Gpt2 => &gpt2::TABLE,
            Layout::GptNeox => &gpt_neox::TABLE,
            Layout::Llama => &llama::TABLE,
            Layout::OutProj => &out_proj::TABLE,
            Layout::QkvProj => &qkv_proj::TABLE,
            Layout::Wqkv => &wqkv::OUT_PROJ,
            Layout::ModernBert => &wqkv::WO,
            Layout::T5 => &t5::TABLE,
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Layout {
    type Err = AttentionError;

    fn from_str(name: &str) -> Result<Self, AttentionError> {
        Layout::ALL.iter().copied().find(|layout| layout.name() == name).ok_or_else(|| {
            let known: Vec<&str> = Layout::ALL.iter().map(|layout| layout.name()).collect();
            let expected = format!("one of {}", known.join(", "));
            AttentionError::Config { field: "layout", expected, got: format!("`{name}`") }
        })
    }
}
