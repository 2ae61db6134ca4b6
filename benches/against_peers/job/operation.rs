//! The operations of a transformer beside attention.

use candle_attention::block::{
    CrossEntropyOptions, Embedding, add_dropped, cross_entropy, geglu, gelu, gelu_tanh, layer_norm, linear,
    linear_cross_entropy, rms_norm, silu, squared_relu, swiglu,
};
use candle_attention::rotary::{RotaryConfig, RotaryEmbedding};
use candle_core::{Result, Tensor};
use candle_nn::{Linear, Module, loss, ops, rotary_emb};
use serde::Deserialize;

use super::{Contender, Forward, Inputs, Trained};

/// As in PyTorch's norms and in `operations.py`.
const EPS: f64 = 1e-5;
/// The entries of a head that is rotated.
const HEAD_DIM: usize = 64;
const DROPOUT_P: f64 = 0.1;
const SEED: u64 = 7;

/// `operations.py` lists the inputs of each.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    Linear,
    RmsNorm,
    LayerNorm,
    Rotary,
    Gelu,
    GeluTanh,
    Silu,
    SquaredRelu,
    Swiglu,
    Geglu,
    AddDropped,
    Embedding,
    CrossEntropy,
    LinearCrossEntropy,
}

pub fn operation(mut inputs: Inputs, name: Operation, trained: &[String]) -> Result<(Forward, Trained)> {
    let trained = inputs.train(trained)?;
    let rotary = RotaryEmbedding::new(&RotaryConfig::default(), HEAD_DIM)?;
    // Each half of PyTorch's tables holds all angles. candle takes one.
    for table in ["cos", "sin"] {
        if let Ok(whole) = inputs.get(table) {
            let half = whole.chunk(2, 1)?[0].contiguous()?;
            inputs.0.insert(table.into(), half);
        }
    }
    let backward = !trained.is_empty();
    let forward = move |contender| match contender {
        Contender::Ours | Contender::OursFused => name.ours(&inputs, &rotary),
        Contender::Candle | Contender::CandleFlash => name.candle(&inputs, backward),
    };
    Ok((Box::new(forward), trained))
}

impl Operation {
    fn ours(self, inputs: &Inputs, rotary: &RotaryEmbedding) -> Result<Tensor> {
        let get = |name| inputs.get(name);
        let options = CrossEntropyOptions::default();
        Ok(match self {
            Self::Rotary => rotary.apply(get("x")?, 0)?,
            Self::Linear => linear(get("x")?, get("weight")?, Some(get("bias")?))?,
            Self::RmsNorm => rms_norm(get("x")?, get("weight")?, EPS)?,
            Self::LayerNorm => layer_norm(get("x")?, get("weight")?, Some(get("bias")?), EPS)?,
            Self::Gelu => gelu(get("x")?)?,
            Self::GeluTanh => gelu_tanh(get("x")?)?,
            Self::Silu => silu(get("x")?)?,
            Self::SquaredRelu => squared_relu(get("x")?)?,
            Self::Swiglu => swiglu(get("gate")?, get("up")?)?,
            Self::Geglu => geglu(get("gate")?, get("up")?)?,
            Self::AddDropped => add_dropped(get("x")?, get("branch")?, DROPOUT_P, SEED)?,
            Self::Embedding => Embedding::new(get("weight")?.clone())?.forward(get("ids")?)?,
            Self::CrossEntropy => cross_entropy(get("logits")?, get("labels")?, &options)?,
            Self::LinearCrossEntropy => {
                linear_cross_entropy(get("x")?, get("weight")?, None, get("labels")?, &options)?
            }
        })
    }

    /// candle's fast norms and its fast rotation have no gradient.
    fn candle(self, inputs: &Inputs, backward: bool) -> Result<Tensor> {
        let get = |name| inputs.get(name);
        let eps = EPS as f32;
        match self {
            Self::Linear => Linear::new(get("weight")?.clone(), Some(get("bias")?.clone())).forward(get("x")?),
            Self::RmsNorm if backward => ops::rms_norm_slow(get("x")?, get("weight")?, eps),
            Self::RmsNorm => ops::rms_norm(get("x")?, get("weight")?, eps),
            Self::LayerNorm if backward => ops::layer_norm_slow(get("x")?, get("weight")?, get("bias")?, eps),
            Self::LayerNorm => ops::layer_norm(get("x")?, get("weight")?, get("bias")?, eps),
            Self::Rotary if backward => rotary_emb::rope_slow(get("x")?, get("cos")?, get("sin")?),
            Self::Rotary => rotary_emb::rope(get("x")?, get("cos")?, get("sin")?),
            Self::Gelu => get("x")?.gelu_erf(),
            Self::GeluTanh => get("x")?.gelu(),
            Self::Silu => get("x")?.silu(),
            Self::SquaredRelu => get("x")?.relu()?.sqr(),
            Self::Swiglu => get("gate")?.silu()? * get("up")?,
            Self::Geglu => get("gate")?.gelu_erf()? * get("up")?,
            Self::AddDropped => get("x")? + ops::dropout(get("branch")?, DROPOUT_P as f32)?,
            Self::Embedding => get("weight")?.embedding(get("ids")?),
            Self::CrossEntropy => loss::cross_entropy(get("logits")?, get("labels")?),
            Self::LinearCrossEntropy => loss::cross_entropy(&get("x")?.matmul(&get("weight")?.t()?)?, get("labels")?),
        }
    }
}
