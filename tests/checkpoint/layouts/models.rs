//! Small versions of the checkpoints of real models: the names and the order of the axes are those of their programs.

use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::path::Path;

use candle_attention::{
    CrossAttention, ForwardOptions, Layout, LayoutFile, Result, SelfAttention, SelfAttentionConfig,
};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use crate::common::randn;
use crate::layers::AttentionLayer;

/// The prefix of the attention in the files of these tests.
pub const PREFIX: &str = "model.layers.1.attn";

pub type Tensors = BTreeMap<String, Tensor>;

pub struct Model {
    pub name: &'static str,
    pub layout: Layout,
    pub config: SelfAttentionConfig,
    pub shapes: Vec<(&'static str, Vec<usize>)>,
}

/// A layer of either kind.
pub enum Layer {
    SelfAttention(SelfAttention),
    CrossAttention(CrossAttention),
}

impl Deref for Layer {
    type Target = dyn AttentionLayer;

    fn deref(&self) -> &(dyn AttentionLayer + 'static) {
        match self {
            Layer::SelfAttention(layer) => layer,
            Layer::CrossAttention(layer) => layer,
        }
    }
}

impl Layer {
    pub fn trainable(&self) -> Result<Layer> {
        Ok(match self {
            Layer::SelfAttention(layer) => Layer::SelfAttention(layer.trainable()?),
            Layer::CrossAttention(layer) => Layer::CrossAttention(layer.trainable()?),
        })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Layer::SelfAttention(layer) => layer.forward(x),
            Layer::CrossAttention(layer) => {
                let memory = |seed, dim| randn(seed, (2, 4, dim), x.dtype());
                let (key, value) = (memory(5, layer.config().kv_dim())?, memory(6, layer.config().value_input_dim())?);
                Ok(layer.forward_key_value(x, &key, &value, &ForwardOptions::default())?.output)
            }
        }
    }
}

impl Model {
    /// Random tensors, by their names in the layout.
    pub fn tensors(&self, dtype: DType) -> Result<Tensors> {
        let shapes = self.shapes.iter().zip(1..);
        shapes.map(|((name, shape), seed)| Ok((name.to_string(), randn(seed, shape.as_slice(), dtype)?))).collect()
    }

    fn is_cross(&self) -> bool {
        self.config.kv_dim.is_some()
    }

    pub fn layer_from(&self, vb: VarBuilder) -> Result<Layer> {
        Ok(if self.is_cross() {
            Layer::CrossAttention(CrossAttention::from_layout(self.layout, &self.config, vb)?)
        } else {
            Layer::SelfAttention(SelfAttention::from_layout(self.layout, &self.config, vb)?)
        })
    }

    pub fn load(&self, path: &Path, prefix: &str, dtype: Option<DType>) -> Result<Layer> {
        let file = LayoutFile::new(self.layout, path).prefix(prefix);
        let (config, file) = (&self.config, dtype.into_iter().fold(file, LayoutFile::dtype));
        Ok(if self.is_cross() {
            Layer::CrossAttention(CrossAttention::load_layout(config, &file)?)
        } else {
            Layer::SelfAttention(SelfAttention::load_layout(config, &file)?)
        })
    }
}

/// The tensors under [`PREFIX`], together with other tensors of a model.
pub fn in_a_model(tensors: &Tensors) -> Result<Tensors> {
    let mut all: Tensors = tensors.iter().map(|(name, tensor)| (format!("{PREFIX}.{name}"), tensor.clone())).collect();
    for other in ["model.embed.weight", "model.layers.1.attn_norm.weight", "model.layers.11.attn.q_proj.weight"] {
        all.insert(other.into(), randn(99, (3, 2), DType::F32)?);
    }
    Ok(all)
}

pub fn write(path: &Path, tensors: &Tensors) -> anyhow::Result<()> {
    Ok(std::fs::write(path, safetensors::serialize(tensors, None)?)?)
}

/// Dtype, shape and bytes of a tensor.
type Raw = (String, Vec<usize>, Vec<u8>);

/// The contents of a file by name.
pub fn bytes_of(path: &Path) -> anyhow::Result<BTreeMap<String, Raw>> {
    let bytes = std::fs::read(path)?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    let entry = |(name, view): (&str, safetensors::tensor::TensorView)| {
        (name.to_string(), (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec()))
    };
    Ok(file.iter().map(entry).collect())
}

pub fn builder(tensors: &Tensors, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_tensors(HashMap::from_iter(tensors.clone()), dtype, &Device::Cpu)
}

/// The model of this name.
#[track_caller]
pub fn model(name: &str) -> Model {
    models().into_iter().find(|model| model.name == name).expect("a model of this name")
}

fn no_bias(config: SelfAttentionConfig) -> SelfAttentionConfig {
    SelfAttentionConfig { qkv_bias: false, out_bias: false, ..config }
}

/// Four query heads of three entries each, which share two key heads.
fn grouped() -> SelfAttentionConfig {
    no_bias(SelfAttentionConfig { num_kv_heads: Some(2), is_causal: true, ..SelfAttentionConfig::new(12, 4) })
}

pub fn models() -> Vec<Model> {
    let model = |name, layout, config: SelfAttentionConfig, shapes: &[(&'static str, &[usize])]| Model {
        name,
        layout,
        config,
        shapes: shapes.iter().map(|(name, shape)| (*name, shape.to_vec())).collect(),
    };
    let plain = || SelfAttentionConfig::new(8, 2);
    let causal = || SelfAttentionConfig { is_causal: true, ..plain() };
    [
        of_pytorch(),
        vec![
            model(
                "own",
                Layout::Own,
                SelfAttentionConfig { add_bias_kv: true, sinks: true, ..grouped() },
                &[
                    ("q_proj.weight", &[12, 12]),
                    ("k_proj.weight", &[6, 12]),
                    ("v_proj.weight", &[6, 12]),
                    ("o_proj.weight", &[12, 12]),
                    ("sinks", &[4]),
                    ("bias_k", &[6]),
                    ("bias_v", &[6]),
                ],
            ),
            model(
                "BERT",
                Layout::Bert,
                plain(),
                &[
                    ("self.query.weight", &[8, 8]),
                    ("self.query.bias", &[8]),
                    ("self.key.weight", &[8, 8]),
                    ("self.key.bias", &[8]),
                    ("self.value.weight", &[8, 8]),
                    ("self.value.bias", &[8]),
                    ("output.dense.weight", &[8, 8]),
                    ("output.dense.bias", &[8]),
                ],
            ),
            model(
                "ViT",
                Layout::Vit,
                plain(),
                &[
                    ("attention.query.weight", &[8, 8]),
                    ("attention.query.bias", &[8]),
                    ("attention.key.weight", &[8, 8]),
                    ("attention.key.bias", &[8]),
                    ("attention.value.weight", &[8, 8]),
                    ("attention.value.bias", &[8]),
                    ("output.dense.weight", &[8, 8]),
                    ("output.dense.bias", &[8]),
                ],
            ),
            model(
                "GPT-2",
                Layout::Gpt2,
                causal(),
                &[
                    ("c_attn.weight", &[8, 24]),
                    ("c_attn.bias", &[24]),
                    ("c_proj.weight", &[8, 8]),
                    ("c_proj.bias", &[8]),
                ],
            ),
            model(
                "GPT-NeoX",
                Layout::GptNeox,
                causal(),
                &[
                    ("query_key_value.weight", &[24, 8]),
                    ("query_key_value.bias", &[24]),
                    ("dense.weight", &[8, 8]),
                    ("dense.bias", &[8]),
                ],
            ),
            model(
                "Falcon 7B",
                Layout::GptNeox,
                no_bias(SelfAttentionConfig { num_kv_heads: Some(1), ..SelfAttentionConfig::new(12, 4) }),
                &[("query_key_value.weight", &[18, 12]), ("dense.weight", &[12, 12])],
            ),
            model(
                "Falcon 40B",
                Layout::GptNeox,
                grouped(),
                &[("query_key_value.weight", &[24, 12]), ("dense.weight", &[12, 12])],
            ),
            model(
                "OPT",
                Layout::OutProj,
                causal(),
                &[
                    ("q_proj.weight", &[8, 8]),
                    ("q_proj.bias", &[8]),
                    ("k_proj.weight", &[8, 8]),
                    ("k_proj.bias", &[8]),
                    ("v_proj.weight", &[8, 8]),
                    ("v_proj.bias", &[8]),
                    ("out_proj.weight", &[8, 8]),
                    ("out_proj.bias", &[8]),
                ],
            ),
            model(
                "Whisper",
                Layout::OutProj,
                SelfAttentionConfig { k_bias: false, ..plain() },
                &[
                    ("q_proj.weight", &[8, 8]),
                    ("q_proj.bias", &[8]),
                    ("k_proj.weight", &[8, 8]),
                    ("v_proj.weight", &[8, 8]),
                    ("v_proj.bias", &[8]),
                    ("out_proj.weight", &[8, 8]),
                    ("out_proj.bias", &[8]),
                ],
            ),
            model("Phi-3", Layout::QkvProj, grouped(), &[("qkv_proj.weight", &[24, 12]), ("o_proj.weight", &[12, 12])]),
            model("MPT", Layout::Wqkv, no_bias(causal()), &[("Wqkv.weight", &[24, 8]), ("out_proj.weight", &[8, 8])]),
            model("DBRX", Layout::Wqkv, grouped(), &[("Wqkv.weight", &[24, 12]), ("out_proj.weight", &[12, 12])]),
            model(
                "flash-attn",
                Layout::Wqkv,
                plain(),
                &[
                    ("Wqkv.weight", &[24, 8]),
                    ("Wqkv.bias", &[24]),
                    ("out_proj.weight", &[8, 8]),
                    ("out_proj.bias", &[8]),
                ],
            ),
            model(
                "ModernBERT",
                Layout::ModernBert,
                no_bias(plain()),
                &[("Wqkv.weight", &[24, 8]), ("Wo.weight", &[8, 8])],
            ),
            // The heads together are wider than a token.
            model(
                "T5",
                Layout::T5,
                no_bias(SelfAttentionConfig { head_dim: Some(6), scale: Some(1.0), ..plain() }),
                &[("q.weight", &[12, 8]), ("k.weight", &[12, 8]), ("v.weight", &[12, 8]), ("o.weight", &[8, 12])],
            ),
        ],
        like_llama(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn of_pytorch() -> Vec<Model> {
    let model = |name, config: SelfAttentionConfig, shapes: &[(&'static str, &[usize])]| Model {
        name,
        layout: Layout::Torch,
        config,
        shapes: shapes.iter().map(|(name, shape)| (*name, shape.to_vec())).collect(),
    };
    let plain = || SelfAttentionConfig::new(8, 2);
    vec![
        model(
            "MultiheadAttention",
            plain(),
            &[
                ("in_proj_weight", &[24, 8]),
                ("in_proj_bias", &[24]),
                ("out_proj.weight", &[8, 8]),
                ("out_proj.bias", &[8]),
            ],
        ),
        model(
            "add_bias_kv",
            no_bias(SelfAttentionConfig { add_bias_kv: true, ..plain() }),
            &[
                ("in_proj_weight", &[24, 8]),
                ("bias_k", &[1, 1, 8]),
                ("bias_v", &[1, 1, 8]),
                ("out_proj.weight", &[8, 8]),
            ],
        ),
        model(
            "kdim and vdim",
            SelfAttentionConfig { kv_dim: Some(6), value_input_dim: Some(3), add_bias_kv: true, ..plain() },
            &[
                ("q_proj_weight", &[8, 8]),
                ("k_proj_weight", &[8, 6]),
                ("v_proj_weight", &[8, 3]),
                ("in_proj_bias", &[24]),
                ("bias_k", &[1, 1, 8]),
                ("bias_v", &[1, 1, 8]),
                ("out_proj.weight", &[8, 8]),
                ("out_proj.bias", &[8]),
            ],
        ),
    ]
}

fn like_llama() -> Vec<Model> {
    let weights: &[(&'static str, &[usize])] = &[
        ("q_proj.weight", &[12, 12]),
        ("k_proj.weight", &[6, 12]),
        ("v_proj.weight", &[6, 12]),
        ("o_proj.weight", &[12, 12]),
    ];
    let model = |name, config, others: &[(&'static str, &[usize])]| Model {
        name,
        layout: Layout::Llama,
        config,
        shapes: [weights, others].concat().iter().map(|(name, shape)| (*name, shape.to_vec())).collect(),
    };
    let biases: &[(&'static str, &[usize])] = &[("q_proj.bias", &[12]), ("k_proj.bias", &[6]), ("v_proj.bias", &[6])];
    vec![
        model("Llama", grouped(), &[]),
        model("Qwen2", SelfAttentionConfig { qkv_bias: true, ..grouped() }, biases),
        model(
            "Qwen3",
            SelfAttentionConfig { qk_norm_eps: Some(1e-6), ..grouped() },
            &[("q_norm.weight", &[3]), ("k_norm.weight", &[3])],
        ),
        model(
            "gpt-oss",
            SelfAttentionConfig { qkv_bias: true, out_bias: true, sinks: true, ..grouped() },
            &[biases, &[("o_proj.bias", &[12]), ("sinks", &[4])]].concat(),
        ),
    ]
}
