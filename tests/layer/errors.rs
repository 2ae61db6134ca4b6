//! Every kind of bad input gives its own variant of [`AttentionError`], also through functions that return candle's `Result`.

use std::path::Path;

use candle_attention::rotary::{RotaryConfig, RotaryEmbedding};
use candle_attention::{
    AttentionError, AttentionOptions, Backend, Error, Layout, LayoutFile, Mask, Result, SelfAttention,
    SelfAttentionConfig, cross_attention, scaled_dot_product_attention, self_attention,
};
use candle_core::{DType, Device, Tensor};
use candle_nn::{ModuleT, VarBuilder, VarMap};

use crate::common::randn;

fn builder() -> VarBuilder<'static> {
    VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu)
}

fn layer() -> SelfAttention {
    self_attention(&SelfAttentionConfig::new(8, 2), builder()).unwrap()
}

fn zeros(dims: &[usize]) -> Tensor {
    Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap()
}

fn attend(query: &[usize], key: &[usize], options: &AttentionOptions) -> Result<Tensor> {
    let (query, key) = (zeros(query), zeros(key));
    Ok(scaled_dot_product_attention(&query, &key, &key, options)?.context)
}

/// The error, after a way through candle's `Result` and back.
#[track_caller]
fn error<T: std::fmt::Debug>(result: Result<T>) -> AttentionError {
    let text = result.as_ref().unwrap_err().to_string();
    let candle: candle_core::Error = result.unwrap_err().into();
    // candle adds a backtrace if the environment asks for one.
    assert!(candle.to_string().starts_with(&text), "{candle}");
    match Error::from(candle.context("in a model")) {
        Error::Attention(error) => error,
        Error::Candle(error) => panic!("an error of candle's: {error}"),
    }
}

#[test]
fn shapes_and_dtypes_have_variants_of_their_own() {
    assert!(matches!(error(layer().forward(&zeros(&[8]))), AttentionError::Rank { tensor: "input", .. }));
    assert!(matches!(error(layer().forward(&zeros(&[5, 7]))), AttentionError::Shape { tensor: "input", .. }));
    let half = randn(1, (5, 8), DType::F16).unwrap();
    assert!(matches!(error(layer().forward(&half)), AttentionError::DType { got: DType::F16, .. }));
    let heads = attend(&[1, 4, 3, 6], &[1, 3, 5, 6], &AttentionOptions::default());
    assert_eq!(error(heads), AttentionError::Heads { num_heads: 4, num_kv_heads: 3 });
    let view = zeros(&[1, 1, 1, 1]).broadcast_as((1, 1, 1 << 31, 1)).unwrap();
    let too_large = scaled_dot_product_attention(&view, &view, &view, &AttentionOptions::default());
    assert!(matches!(error(too_large), AttentionError::TooLarge { .. }));
}

#[test]
fn positions_have_a_variant_of_their_own() {
    let rotary = RotaryEmbedding::new(&RotaryConfig::default(), 4).unwrap();
    let ids = Tensor::new(&[-1i64], &Device::Cpu).unwrap();
    let (expected, got) = ("at least 0".to_string(), "-1".to_string());
    assert_eq!(error(rotary.apply_positions(&zeros(&[1, 1, 1, 4]), &ids)), AttentionError::Position { expected, got });
}

#[test]
fn options_have_variants_of_their_own() {
    let with = |options: AttentionOptions| error(attend(&[1, 2, 3, 4], &[1, 2, 5, 4], &options));
    let scale = AttentionOptions { scale: Some(f64::INFINITY), ..Default::default() };
    assert!(matches!(with(scale), AttentionError::Number { name: "scale", .. }));
    let mask = AttentionOptions { attn_mask: Mask::key_lengths(&[5, 5]), ..Default::default() };
    assert!(matches!(with(mask), AttentionError::Mask(mask) if mask.part == "key lengths"));
    let fused = AttentionOptions { backend: Backend::Fused, ..Default::default() };
    assert!(matches!(error(attend(&[1, 2, 0, 4], &[1, 2, 5, 4], &fused)), AttentionError::Backend { .. }));
}

#[test]
fn configs_and_caches_have_variants_of_their_own() {
    let config = SelfAttentionConfig::new(10, 4);
    assert!(matches!(error(self_attention(&config, builder())), AttentionError::Config { field: "embed_dim", .. }));
    assert!(matches!(error(cross_attention(&config, builder())), AttentionError::Config { field: "embed_dim", .. }));
    let causal = self_attention(&SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(8, 2) }, builder());
    let mut cache = causal.as_ref().unwrap().kv_cache(2).unwrap();
    let other_batch = causal.as_ref().unwrap().forward_cached(&zeros(&[3, 1, 8]), &mut cache);
    assert!(matches!(error(other_batch), AttentionError::Cache { part: "sequences", .. }));
    assert!(matches!(error(causal.unwrap().kv_cache(usize::MAX / 8)), AttentionError::Memory { .. }));
}

#[test]
fn files_have_variants_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.safetensors");
    let file = error(SelfAttention::load(&missing, &Device::Cpu));
    assert!(matches!(file, AttentionError::File(file) if file.path == missing && file.action == "read"));
    let broken = folder.path().join("broken.safetensors");
    std::fs::write(&broken, "no tensors").unwrap();
    let checkpoint = error(SelfAttention::load(&broken, &Device::Cpu));
    assert!(matches!(checkpoint, AttentionError::Checkpoint { path: Some(path), .. } if path == broken));
    let foreign = folder.path().join("foreign.safetensors");
    layer().save_layout(Layout::Llama, "attn", &foreign).unwrap();
    let config = SelfAttentionConfig::new(8, 2);
    let tensors = error(SelfAttention::load_layout(&config, &LayoutFile::new(Layout::Gpt2, &foreign).prefix("attn")));
    let AttentionError::CheckpointTensors { path, problems } = tensors else { panic!("{tensors}") };
    assert_eq!(path.as_deref(), Some(Path::new(&foreign)));
    assert!(problems.iter().any(|problem| problem.contains("`attn.c_attn.weight` is missing")), "{problems:?}");
}

/// candle's traits return candle's error, which keeps ours.
#[test]
fn variant_survives_the_trait_of_a_layer() {
    let candle = ModuleT::forward_t(&layer(), &zeros(&[5, 7]), true).unwrap_err();
    assert!(matches!(Error::from(candle), Error::Attention(AttentionError::Shape { tensor: "input", .. })));
}

#[test]
fn errors_of_candle_stay_what_they_are() {
    let vb = VarBuilder::from_tensors([].into(), DType::F32, &Device::Cpu);
    let missing = self_attention(&SelfAttentionConfig::new(8, 2), vb).unwrap_err();
    assert!(matches!(missing, Error::Candle(_)), "{missing:?}");
    assert!(missing.to_string().contains("cannot find tensor q_proj.weight"), "{missing}");
}
