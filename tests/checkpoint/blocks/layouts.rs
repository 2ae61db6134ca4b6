//! Blocks in the layouts of other programs: names, shapes, round trips, and configs that a layout can't hold.

use std::collections::BTreeMap;

use candle_attention::block::{MlpConfig, NormPlacement, TransformerBlock, TransformerBlockConfig};
use candle_attention::{Layout, LayoutFile, SelfAttentionConfig};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use crate::blocks_common::{PLACEMENTS, bert, block, gemma2, gpt2, llama};
use crate::common::{assert_same_bits, randn};
use crate::layers::assert_error_says;

pub const PREFIX: &str = "model.layers.1";

pub type Tensors = BTreeMap<String, Tensor>;

pub struct Model {
    pub layout: Layout,
    pub config: TransformerBlockConfig,
    pub shapes: &'static [(&'static str, &'static [usize])],
}

/// Blocks with tokens of 6, two heads of 3 and an MLP of 5, as their programs name the parameters.
pub fn models() -> Vec<Model> {
    let qwen3 = TransformerBlockConfig {
        attention: SelfAttentionConfig { num_kv_heads: Some(1), qk_norm_eps: Some(1e-3), ..llama().attention },
        ..llama()
    };
    vec![
        Model { layout: Layout::Own, config: llama(), shapes: OWN },
        Model { layout: Layout::Bert, config: bert(), shapes: BERT },
        Model { layout: Layout::Gpt2, config: gpt2(), shapes: GPT2 },
        Model { layout: Layout::Llama, config: qwen3, shapes: QWEN3 },
        Model { layout: Layout::Llama, config: gemma2(), shapes: GEMMA2 },
        Model { layout: Layout::QkvProj, config: llama(), shapes: PHI3 },
    ]
}

const OWN: &[(&str, &[usize])] = &[
    ("attention.q_proj.weight", &[6, 6]),
    ("attention.k_proj.weight", &[6, 6]),
    ("attention.v_proj.weight", &[6, 6]),
    ("attention.o_proj.weight", &[6, 6]),
    ("mlp.gate.weight", &[5, 6]),
    ("mlp.up.weight", &[5, 6]),
    ("mlp.down.weight", &[6, 5]),
    ("attention_norm.weight", &[6]),
    ("mlp_norm.weight", &[6]),
];

const BERT: &[(&str, &[usize])] = &[
    ("attention.self.query.weight", &[6, 6]),
    ("attention.self.query.bias", &[6]),
    ("attention.self.key.weight", &[6, 6]),
    ("attention.self.key.bias", &[6]),
    ("attention.self.value.weight", &[6, 6]),
    ("attention.self.value.bias", &[6]),
    ("attention.output.dense.weight", &[6, 6]),
    ("attention.output.dense.bias", &[6]),
    ("attention.output.LayerNorm.weight", &[6]),
    ("attention.output.LayerNorm.bias", &[6]),
    ("intermediate.dense.weight", &[5, 6]),
    ("intermediate.dense.bias", &[5]),
    ("output.dense.weight", &[6, 5]),
    ("output.dense.bias", &[6]),
    ("output.LayerNorm.weight", &[6]),
    ("output.LayerNorm.bias", &[6]),
];

const GPT2: &[(&str, &[usize])] = &[
    ("ln_1.weight", &[6]),
    ("ln_1.bias", &[6]),
    ("attn.c_attn.weight", &[6, 18]),
    ("attn.c_attn.bias", &[18]),
    ("attn.c_proj.weight", &[6, 6]),
    ("attn.c_proj.bias", &[6]),
    ("ln_2.weight", &[6]),
    ("ln_2.bias", &[6]),
    ("mlp.c_fc.weight", &[6, 5]),
    ("mlp.c_fc.bias", &[5]),
    ("mlp.c_proj.weight", &[5, 6]),
    ("mlp.c_proj.bias", &[6]),
];

const QWEN3: &[(&str, &[usize])] = &[
    ("self_attn.q_proj.weight", &[6, 6]),
    ("self_attn.k_proj.weight", &[3, 6]),
    ("self_attn.v_proj.weight", &[3, 6]),
    ("self_attn.o_proj.weight", &[6, 6]),
    ("self_attn.q_norm.weight", &[3]),
    ("self_attn.k_norm.weight", &[3]),
    ("mlp.gate_proj.weight", &[5, 6]),
    ("mlp.up_proj.weight", &[5, 6]),
    ("mlp.down_proj.weight", &[6, 5]),
    ("input_layernorm.weight", &[6]),
    ("post_attention_layernorm.weight", &[6]),
];

const GEMMA2: &[(&str, &[usize])] = &[
    ("self_attn.q_proj.weight", &[6, 6]),
    ("self_attn.k_proj.weight", &[6, 6]),
    ("self_attn.v_proj.weight", &[6, 6]),
    ("self_attn.o_proj.weight", &[6, 6]),
    ("mlp.gate_proj.weight", &[5, 6]),
    ("mlp.up_proj.weight", &[5, 6]),
    ("mlp.down_proj.weight", &[6, 5]),
    ("input_layernorm.weight", &[6]),
    ("post_attention_layernorm.weight", &[6]),
    ("pre_feedforward_layernorm.weight", &[6]),
    ("post_feedforward_layernorm.weight", &[6]),
];

const PHI3: &[(&str, &[usize])] = &[
    ("self_attn.qkv_proj.weight", &[18, 6]),
    ("self_attn.o_proj.weight", &[6, 6]),
    ("mlp.gate_up_proj.weight", &[10, 6]),
    ("mlp.down_proj.weight", &[6, 5]),
    ("input_layernorm.weight", &[6]),
    ("post_attention_layernorm.weight", &[6]),
];

impl Model {
    /// Random tensors, by their names in the layout.
    pub fn tensors(&self) -> Result<Tensors> {
        let shapes = self.shapes.iter().zip(1..);
        shapes.map(|((name, shape), seed)| Ok((name.to_string(), randn(seed, *shape, DType::F32)?))).collect()
    }

    /// The block of these tensors in a model, by a `VarBuilder`.
    pub fn build(&self, tensors: &Tensors) -> candle_attention::Result<TransformerBlock> {
        let vb = VarBuilder::from_tensors(in_a_model(tensors)?.into_iter().collect(), DType::F32, &Device::Cpu);
        TransformerBlock::from_layout(self.layout, &self.config, vb.pp(PREFIX))
    }

    /// The block of these tensors in a model, from a file.
    pub fn load(&self, tensors: &Tensors) -> anyhow::Result<candle_attention::Result<TransformerBlock>> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), safetensors::serialize(in_a_model(tensors)?, None)?)?;
        let file = LayoutFile::new(self.layout, file.path()).prefix(PREFIX);
        Ok(TransformerBlock::load_layout(&self.config, &file))
    }
}

/// The tensors under [`PREFIX`], together with other tensors of a model.
fn in_a_model(tensors: &Tensors) -> Result<Tensors> {
    let mut all: Tensors = tensors.iter().map(|(name, tensor)| (format!("{PREFIX}.{name}"), tensor.clone())).collect();
    for other in ["model.embed.weight", "model.layers.11.mlp.up_proj.weight", "model.norm.weight"] {
        all.insert(other.into(), randn(99, (3, 2), DType::F32)?);
    }
    Ok(all)
}

#[test]
fn tensors_have_the_names_and_shapes_of_their_models() -> Result<()> {
    for model in models() {
        let saved = block(&model.config, DType::F32)?.to_layout(model.layout)?;
        let found: BTreeMap<_, _> = saved.iter().map(|(name, tensor)| (name.as_str(), tensor.dims())).collect();
        assert_eq!(found, model.shapes.iter().copied().collect(), "{}", model.layout);
        assert_eq!(saved.len(), found.len(), "{}", model.layout);
    }
    Ok(())
}

#[test]
fn blocks_go_through_a_layout_unchanged() -> anyhow::Result<()> {
    for model in models() {
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            let made = block(&model.config, dtype)?;
            let vb = VarBuilder::from_tensors(made.to_layout(model.layout)?.into_iter().collect(), dtype, &Device::Cpu);
            let built = TransformerBlock::from_layout(model.layout, &model.config, vb)?;
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("model.safetensors");
            made.save_layout(model.layout, PREFIX, &path)?;
            let file = LayoutFile::new(model.layout, &path).prefix(PREFIX);
            let loaded = TransformerBlock::load_layout(&model.config, &file)?;
            for again in [&built, &loaded] {
                assert_eq!(again.config(), made.config());
                for ((name, found), (_, expected)) in again.parameters().into_iter().zip(made.parameters()) {
                    assert_same_bits(found, expected, &format!("{}, {name}", model.layout));
                }
            }
            assert_eq!((built.vars().len(), loaded.vars().len()), (0, made.vars().len()));
        }
    }
    Ok(())
}

#[test]
fn tensors_of_a_model_come_back_as_they_were() -> anyhow::Result<()> {
    for model in models() {
        let tensors = model.tensors()?;
        for block in [model.build(&tensors)?, model.load(&tensors)??] {
            for (name, tensor) in block.to_layout(model.layout)? {
                assert_same_bits(&tensor, &tensors[&name], &format!("{}, {name}", model.layout));
            }
        }
    }
    Ok(())
}

/// Another model's block of the same shapes computes something else, and so would tensors that were mixed up.
#[test]
fn each_tensor_becomes_its_own_parameter() -> Result<()> {
    let model = &models()[4];
    let (block, tensors) = (model.build(&model.tensors()?)?, model.tensors()?);
    for (name, tensor) in [
        ("attention_norm.weight", "input_layernorm.weight"),
        ("attention_post_norm.weight", "post_attention_layernorm.weight"),
        ("mlp_norm.weight", "pre_feedforward_layernorm.weight"),
        ("mlp_post_norm.weight", "post_feedforward_layernorm.weight"),
        ("mlp.gate.weight", "mlp.gate_proj.weight"),
        ("mlp.up.weight", "mlp.up_proj.weight"),
    ] {
        let found = crate::blocks_common::parameter(&block, name).expect("a parameter");
        assert_same_bits(&found, &tensors[tensor], name);
    }
    Ok(())
}

/// Renames the norms as in checkpoints that were converted from TensorFlow.
fn from_tensorflow(name: &str) -> String {
    name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
}

#[test]
fn bert_that_was_converted_from_tensorflow_is_read() -> anyhow::Result<()> {
    let model = &models()[1];
    let tensors = model.tensors()?;
    let renamed: Tensors = tensors.iter().map(|(name, tensor)| (from_tensorflow(name), tensor.clone())).collect();
    assert!(renamed.contains_key("output.LayerNorm.gamma") && !renamed.contains_key("output.LayerNorm.bias"));
    for block in [model.build(&renamed)?, model.load(&renamed)??] {
        for (name, tensor) in block.to_layout(Layout::Bert)? {
            assert_same_bits(&tensor, &tensors[&name], &name);
        }
    }
    Ok(())
}

#[test]
fn tensor_under_two_names_is_refused() -> anyhow::Result<()> {
    let model = &models()[1];
    let mut tensors = model.tensors()?;
    tensors.insert("output.LayerNorm.gamma".into(), randn(1, 6, DType::F32)?);
    let expected = format!("`{PREFIX}.output.LayerNorm.gamma` is unexpected");
    assert_error_says(model.build(&tensors), &[&expected]);
    assert_error_says(model.load(&tensors)?, &[&expected]);
    Ok(())
}

/// Checks that a config is refused for loading, from a builder and from a file, and for saving.
#[track_caller]
fn refused(layout: Layout, config: &TransformerBlockConfig, parts: &[&str]) {
    let vb = VarBuilder::from_tensors(Default::default(), DType::F32, &Device::Cpu);
    assert_error_says(TransformerBlock::from_layout(layout, config, vb), parts);
    // The config is checked before the file is opened, so that the file needn't exist.
    assert_error_says(TransformerBlock::load_layout(config, &LayoutFile::new(layout, "nowhere")), parts);
    assert_error_says(block(config, DType::F32).unwrap().to_layout(layout), parts);
}

#[test]
fn layout_without_blocks_is_refused() {
    let with_blocks = [Layout::Own, Layout::Bert, Layout::Gpt2, Layout::Llama, Layout::QkvProj];
    for &layout in Layout::ALL.iter().filter(|layout| !with_blocks.contains(layout)) {
        refused(layout, &bert(), &["layout", "one of own, bert, gpt2, llama, qkv_proj", &format!("got {layout}")]);
    }
}

#[test]
fn norms_at_other_places_than_in_the_models_are_refused() {
    for model in models().into_iter().filter(|model| model.layout != Layout::Own) {
        for placement in PLACEMENTS.into_iter().filter(|&placement| placement != model.config.placement) {
            let config = TransformerBlockConfig { placement, ..model.config.clone() };
            match (model.layout, placement) {
                // Llama's and Gemma's blocks have the same layout.
                (Layout::Llama, NormPlacement::Pre | NormPlacement::Sandwich) => {
                    assert!(block(&config, DType::F32).unwrap().to_layout(Layout::Llama).is_ok());
                }
                _ => refused(model.layout, &config, &["placement", &format!("got {placement:?}")]),
            }
        }
    }
}

#[test]
fn parameters_without_a_name_are_refused() {
    let with_mlp = |config: TransformerBlockConfig, mlp| TransformerBlockConfig { mlp, ..config };
    let swiglu = MlpConfig::swiglu(6, 5);
    refused(Layout::Bert, &with_mlp(bert(), swiglu.clone()), &["mlp.gated", "no `mlp.gate.weight`"]);
    refused(Layout::Gpt2, &with_mlp(gpt2(), swiglu.clone()), &["mlp.gated", "no `mlp.gate.weight`"]);
    let with_bias = MlpConfig { bias: true, ..swiglu };
    refused(Layout::Llama, &with_mlp(gemma2(), with_bias.clone()), &["mlp.gated", "no `mlp.gate.bias`"]);
    let not_gated = MlpConfig { bias: false, ..MlpConfig::new(6, 5) };
    refused(Layout::QkvProj, &with_mlp(llama(), not_gated), &["mlp.gated", "a `mlp.gate.weight`", "gate_up_proj"]);
    let mut config = llama();
    config.norm.bias = true;
    refused(Layout::Llama, &config, &["norm.bias", "no `attention_norm.bias`"]);
    let mut config = gpt2();
    config.attention.k_bias = false;
    refused(Layout::Gpt2, &config, &["k_bias", "a `k_proj.bias`", "c_attn.bias"]);
    let mut config = bert();
    config.attention.sinks = true;
    refused(Layout::Bert, &config, &["sinks", "no `sinks`"]);
}
