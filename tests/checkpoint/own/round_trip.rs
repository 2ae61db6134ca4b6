//! A saved layer is loaded with the same config, parameters and outputs, bit for bit, and can be trained further.

use candle_attention::rotary::RotaryConfig;
use candle_attention::{CrossAttention, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Linear, Module, ModuleT, Optimizer, ParamsAdamW, VarBuilder, VarMap, linear};

use crate::common::{Random, assert_same_bits, max_abs_difference, randn};
use crate::layers::{AttentionLayer, assert_error_says, cross_attention, scalings, self_attention};

use super::files::{ENTRY, Parts, load, odd_config, odd_layer, small_file};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

fn assert_same_parameters(a: &dyn AttentionLayer, b: &dyn AttentionLayer) {
    assert_eq!(a.parameters().len(), b.parameters().len());
    for ((name, a), (other, b)) in a.parameters().into_iter().zip(b.parameters()) {
        assert_eq!(name, other);
        assert_same_bits(a, b, name);
    }
}

#[test]
fn saved_layer_comes_back_bit_for_bit() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    for dtype in DTYPES {
        let path = folder.path().join(format!("{dtype:?}.safetensors"));
        let layer = odd_layer(dtype)?;
        layer.save(&path)?;
        let loaded = SelfAttention::load(&path, &Device::Cpu)?;
        assert_eq!(loaded.config(), layer.config());
        assert_eq!(loaded.config(), &odd_config());
        assert_same_parameters(&loaded, &layer);
        let x = randn(3, (2, 5, 10), dtype)?;
        let (output, weights) = layer.forward_with_weights(&x)?;
        let (loaded_output, loaded_weights) = loaded.forward_with_weights(&x)?;
        assert_same_bits(&loaded_output, &output, "output");
        assert_same_bits(&loaded_weights, &weights, "weights");
    }
    Ok(())
}

#[test]
fn saved_cross_attention_comes_back_bit_for_bit() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("cross");
    let config = SelfAttentionConfig { kv_dim: Some(7), value_input_dim: Some(7), rotary: None, ..odd_config() };
    let layer = cross_attention(&config, DType::F32)?;
    layer.save(&path)?;
    let loaded = CrossAttention::load(&path, &Device::Cpu)?;
    assert_eq!(loaded.config(), &config);
    assert_same_parameters(&loaded, &layer);
    let (x, memory) = (randn(3, (2, 5, 10), DType::F32)?, randn(4, (2, 6, 7), DType::F32)?);
    assert_same_bits(&loaded.forward(&x, &memory)?, &layer.forward(&x, &memory)?, "output");
    let from_bytes = CrossAttention::from_bytes(&layer.to_bytes()?, &Device::Cpu)?;
    assert_same_parameters(&from_bytes, &layer);
    Ok(())
}

#[test]
fn layers_of_every_make_come_back() -> Result<()> {
    let configs = [
        SelfAttentionConfig::single_head(3, 2, 5),
        SelfAttentionConfig::new(8, 8),
        SelfAttentionConfig { out_bias: false, ..SelfAttentionConfig::new(8, 2) },
        SelfAttentionConfig { qkv_bias: false, sinks: true, ..SelfAttentionConfig::new(8, 2) },
        SelfAttentionConfig { add_bias_kv: true, add_zero_attn: true, ..SelfAttentionConfig::new(8, 2) },
    ];
    let scaled = scalings(2).into_iter().map(|scaling| {
        let rotary = Some(RotaryConfig { scaling: Some(scaling), ..Default::default() });
        SelfAttentionConfig { rotary, ..SelfAttentionConfig::new(8, 2) }
    });
    for config in configs.into_iter().chain(scaled) {
        let layer = self_attention(&config, DType::F32)?;
        let loaded = load(&layer.to_bytes()?)?;
        assert_eq!(loaded.config(), &config);
        assert_same_parameters(&loaded, &layer);
    }
    Ok(())
}

/// A config without a scaling is stored without the field, as in files from before the field existed.
#[test]
fn config_without_a_scaling_loads_and_is_saved_without_one() -> Result<()> {
    let old = r#"{"layer":"self_attention","config":{"embed_dim":4,"num_heads":2,
        "rotary":{"base":500.0,"dim":null,"pairing":"half_split"}}}"#;
    let mut parts = Parts::small()?;
    parts.metadata.insert(ENTRY.to_string(), old.to_string());
    let loaded = parts.load()?;
    assert_eq!(loaded.config().rotary, Some(RotaryConfig { base: 500.0, ..Default::default() }));
    assert!(!Parts::of(&loaded.to_bytes()?)?.metadata[ENTRY].contains("scaling"));
    Ok(())
}

/// Numbers over the whole range of f64. Their decimal form in JSON must be exact.
#[test]
fn numbers_of_the_config_keep_every_bit() -> anyhow::Result<()> {
    let mut random = Random::new(1);
    let mut numbers: Vec<f64> = (0..300).map(|_| f64::from_bits(random.bits()).abs()).collect();
    numbers.extend([5e-324, f64::MIN_POSITIVE, f64::MAX, f64::EPSILON, 1.0 / 3.0, 0.1, 1e-6]);
    for number in numbers.into_iter().filter(|x| x.is_finite() && *x > 0.0) {
        let config = SelfAttentionConfig {
            scale: Some(-number),
            softcap: Some(number),
            dropout_p: if number < 1.0 { number } else { 0.0 },
            ..SelfAttentionConfig::new(2, 1)
        };
        // A layer computes with normal numbers only.
        if number.is_normal() {
            let loaded = load(&self_attention(&config, DType::F64)?.to_bytes()?)?;
            assert_eq!(loaded.config(), &config);
        }
        assert_eq!(serde_json::from_str::<SelfAttentionConfig>(&serde_json::to_string(&config)?)?, config);
    }
    Ok(())
}

#[test]
fn what_training_changed_is_what_is_saved() -> Result<()> {
    let layer = odd_layer(DType::F32)?;
    let before = layer.to_bytes()?;
    crate::layers::randomise(&layer, 8)?;
    let loaded = load(&layer.to_bytes()?)?;
    assert_same_parameters(&loaded, &layer);
    let (old, new) = (load(&before)?, loaded);
    assert!(max_abs_difference(new.q_proj().weight(), old.q_proj().weight())? > 1e-3);
    Ok(())
}

#[test]
fn loaded_layer_trains_on() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("layer.safetensors");
    odd_layer(DType::F32)?.save(&path)?;
    let layer = SelfAttention::load(&path, &Device::Cpu)?;
    assert_eq!(layer.vars().len(), layer.parameters().len());
    assert_eq!(layer.vars().len(), 9);
    let x = randn(3, (4, 5, 10), DType::F32)?;
    let target = randn(4, (4, 5, 10), DType::F32)?;
    let loss = || layer.forward(&x)?.sub(&target)?.sqr()?.mean_all();
    let before = loss()?.to_scalar::<f32>()?;
    let params = ParamsAdamW { lr: 0.02, ..Default::default() };
    let mut optimizer = AdamW::new(layer.vars(), params)?;
    for _ in 0..40 {
        optimizer.backward_step(&loss()?)?;
    }
    let after = loss()?.to_scalar::<f32>()?;
    assert!(after < 0.8 * before, "loss from {before} to {after}");
    Ok(())
}

/// Two loaded layers share no parameters.
#[test]
fn loading_twice_gives_two_layers() -> Result<()> {
    let bytes = small_file()?;
    let (a, b) = (load(&bytes)?, load(&bytes)?);
    crate::layers::randomise(&a, 9)?;
    assert!(max_abs_difference(a.q_proj().weight(), b.q_proj().weight())? > 1e-3);
    assert_same_parameters(&b, &load(&bytes)?);
    Ok(())
}

#[test]
fn same_layer_gives_the_same_bytes() -> anyhow::Result<()> {
    let layer = odd_layer(DType::F32)?;
    let bytes = layer.to_bytes()?;
    for _ in 0..20 {
        assert!(layer.to_bytes()? == bytes, "another call");
    }
    assert!(odd_layer(DType::F32)?.to_bytes()? == bytes, "a second layer");
    assert!(load(&bytes)?.to_bytes()? == bytes, "loaded");
    let file = tempfile::NamedTempFile::new()?;
    layer.save(file.path())?;
    assert!(std::fs::read(file.path())? == bytes, "saved");
    Ok(())
}

/// Tensors are copied from the bytes, which may have any alignment.
#[test]
fn bytes_need_no_alignment() -> Result<()> {
    for dtype in DTYPES {
        let layer = odd_layer(dtype)?;
        let bytes = layer.to_bytes()?;
        for shift in 1..8 {
            let shifted = [vec![0; shift], bytes.clone()].concat();
            assert_same_parameters(&load(&shifted[shift..])?, &layer);
        }
    }
    Ok(())
}

/// A transposed view of a weight is saved row by row, not in its order in memory.
#[test]
fn parameters_of_any_strides_are_saved_in_order() -> Result<()> {
    let config = SelfAttentionConfig::single_head(3, 3, 3);
    let names = ["q_proj.weight", "k_proj.weight", "v_proj.weight"];
    let transposed =
        names.into_iter().zip(1..).map(|(name, seed)| Ok((name.to_string(), randn(seed, (3, 3), DType::F32)?.t()?)));
    let tensors = transposed.collect::<Result<_>>()?;
    let layer = SelfAttention::new(&config, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))?;
    assert_same_parameters(&load(&layer.to_bytes()?)?, &layer);
    Ok(())
}

struct Model {
    attention: SelfAttention,
    cross: CrossAttention,
    head: Linear,
}

impl Model {
    fn new(vb: VarBuilder) -> Result<Self> {
        let config = SelfAttentionConfig { seed: 1, ..SelfAttentionConfig::new(8, 2) };
        Ok(Self {
            attention: SelfAttention::new(&config, vb.pp("blocks.0.attention"))?,
            cross: CrossAttention::new(&config, vb.pp("blocks.1.attention"))?,
            head: linear(8, 3, vb.pp("head"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = ModuleT::forward_t(&self.attention, x, false)?;
        Ok(self.head.forward(&self.cross.forward(&y, x)?)?)
    }
}

#[test]
fn larger_model_is_saved_and_loaded_by_its_var_map() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    let (mut saved, mut loaded) = (VarMap::new(), VarMap::new());
    let model = Model::new(VarBuilder::from_varmap(&saved, DType::F32, &Device::Cpu))?;
    crate::layers::randomise(&model.attention, 4)?;
    crate::layers::randomise(&model.cross, 5)?;
    saved.save(&path)?;
    saved.set_one("head.bias", randn(1, 3, DType::F32)?)?;
    saved.save(&path)?;
    let other = Model::new(VarBuilder::from_varmap(&loaded, DType::F32, &Device::Cpu))?;
    let x = randn(6, (2, 5, 8), DType::F32)?;
    assert!(max_abs_difference(&other.forward(&x)?, &model.forward(&x)?)? > 1e-3);
    loaded.load(&path)?;
    assert_same_bits(&other.forward(&x)?, &model.forward(&x)?, "loaded into the map");

    let vb = VarBuilder::from_buffered_safetensors(std::fs::read(&path)?, DType::F32, &Device::Cpu)?;
    assert_same_bits(&Model::new(vb)?.forward(&x)?, &model.forward(&x)?, "built on the file");
    Ok(())
}

/// For other programs a saved layer is a plain safetensors file.
#[test]
fn saved_layer_serves_as_a_mapped_var_builder() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("layer.safetensors");
    let layer = odd_layer(DType::F32)?;
    layer.save(&path)?;
    // SAFETY: the file is in a temporary folder of this test, which doesn't change it while it is mapped.
    let vb = unsafe { VarBuilder::from_mmaped_safetensors(&[&path], DType::F32, &Device::Cpu)? };
    assert!(vb.contains_tensor("q_proj.weight") && vb.contains_tensor("sinks"));
    let mapped = SelfAttention::new(&odd_config(), vb)?;
    assert_same_parameters(&mapped, &layer);
    let x = randn(3, (2, 5, 10), DType::F32)?;
    assert_same_bits(&mapped.forward(&x)?, &layer.forward(&x)?, "output");
    Ok(())
}

/// A minimal file, written by hand. Later versions must be able to read it, too.
#[test]
fn file_written_by_hand_loads() -> Result<()> {
    let mut parts = Parts::small()?;
    let header = r#"{"layer": "self_attention", "config": {"embed_dim": 4, "num_heads": 2}}"#;
    parts.metadata = [(ENTRY.to_string(), header.to_string()), ("made by".into(), "hand".into())].into();
    let layer = parts.load()?;
    assert_eq!(layer.config(), &SelfAttentionConfig::new(4, 2));
    for (name, tensor) in layer.parameters() {
        assert_same_bits(tensor, &parts.tensors[name], name);
    }
    Ok(())
}

#[test]
fn layer_of_one_kind_is_not_loaded_as_the_other() -> Result<()> {
    let config = SelfAttentionConfig::new(4, 2);
    let as_cross = CrossAttention::from_bytes(&small_file()?, &Device::Cpu);
    assert_error_says(as_cross, &["expected a CrossAttention", "got a SelfAttention"]);
    let as_self = load(&cross_attention(&config, DType::F32)?.to_bytes()?);
    assert_error_says(as_self, &["expected a SelfAttention", "got a CrossAttention"]);
    Ok(())
}
