//! Configs with parameters for which a layout has no name, or that its models can't have.

use candle_attention::{CrossAttention, Layout, LayoutFile, SelfAttention, SelfAttentionConfig};
use candle_core::DType;

use crate::layers::{assert_error_says, cross_attention, self_attention};

use super::models::{Tensors, builder};

/// Checks that a config is refused for loading, from a builder and from a file, and for saving.
#[track_caller]
fn refused(layout: Layout, change: impl FnOnce(&mut SelfAttentionConfig), parts: &[&str]) {
    let mut config = SelfAttentionConfig::new(8, 2);
    change(&mut config);
    let vb = builder(&Tensors::new(), DType::F32);
    let parts = [&["config, "], parts].concat();
    // The config is checked before the file is opened, so that the file needn't exist.
    if config.kv_dim() == config.embed_dim && config.value_input_dim() == config.embed_dim {
        assert_error_says(SelfAttention::from_layout(layout, &config, vb), &parts);
        let loaded = SelfAttention::load_layout(&config, &LayoutFile::new(layout, "nowhere"));
        assert_error_says(loaded, &parts);
        assert_error_says(self_attention(&config, DType::F32).unwrap().to_layout(layout), &parts);
    } else {
        assert_error_says(CrossAttention::from_layout(layout, &config, vb), &parts);
        let loaded = CrossAttention::load_layout(&config, &LayoutFile::new(layout, "nowhere"));
        assert_error_says(loaded, &parts);
        assert_error_says(cross_attention(&config, DType::F32).unwrap().to_layout(layout), &parts);
    }
}

#[test]
fn parameters_without_a_place_are_refused() {
    use Layout::*;
    for layout in [Torch, Bert, Vit, Gpt2, GptNeox, OutProj, QkvProj, Wqkv, ModernBert] {
        refused(layout, |c| c.sinks = true, &["sinks", &format!("the layout {layout} has no name")]);
        refused(layout, |c| c.qk_norm_eps = Some(1e-6), &["qk_norm_eps", "no `q_norm.weight`"]);
    }
    for layout in [Bert, Vit, Gpt2, GptNeox, Llama, OutProj, QkvProj, Wqkv, ModernBert] {
        refused(layout, |c| c.add_bias_kv = true, &["add_bias_kv", "no `bias_k`"]);
    }
}

#[test]
fn packed_biases_are_all_there_or_none() {
    use Layout::*;
    for (layout, packed) in [
        (Torch, "in_proj_bias"),
        (Gpt2, "c_attn.bias"),
        (GptNeox, "query_key_value.bias"),
        (QkvProj, "qkv_proj.bias"),
        (Wqkv, "Wqkv.bias"),
    ] {
        refused(layout, |c| c.k_bias = false, &["k_bias", "a `k_proj.bias`", packed]);
    }
    refused(Torch, |c| c.out_bias = false, &["out_bias", "qkv_bias true", "got false"]);
    refused(Torch, |c| c.qkv_bias = false, &["out_bias", "qkv_bias false", "got true"]);
}

#[test]
fn packed_weights_come_from_tokens_of_one_size() {
    use Layout::*;
    for (layout, packed) in [
        (Gpt2, "c_attn.weight"),
        (GptNeox, "query_key_value.weight"),
        (QkvProj, "qkv_proj.weight"),
        (ModernBert, "Wqkv.weight"),
    ] {
        refused(layout, |c| c.kv_dim = Some(6), &["kv_dim", packed, "got 6"]);
        refused(layout, |c| c.value_input_dim = Some(3), &["value_input_dim", packed, "got 3"]);
    }
}

#[test]
fn gpt2_and_pytorch_have_heads_of_one_width() {
    for layout in [Layout::Gpt2, Layout::Torch] {
        refused(layout, |c| c.num_kv_heads = Some(1), &["num_kv_heads", "num_heads 2", "got 1"]);
        refused(layout, |c| c.head_dim = Some(3), &["head_dim", "8 / 2", "got 3"]);
        refused(layout, |c| c.value_dim = Some(5), &["value_dim", "8 / 2", "got 5"]);
    }
}

#[test]
fn t5_neither_scales_nor_has_biases() {
    let no_bias = |c: &mut SelfAttentionConfig| (c.qkv_bias, c.out_bias) = (false, false);
    refused(Layout::T5, no_bias, &["scale", "expected 1", "got none"]);
    refused(Layout::T5, |c| (no_bias(c), c.scale = Some(0.5)).1, &["scale", "expected 1", "got 0.5"]);
    refused(Layout::T5, |c| (c.scale, c.qkv_bias) = (Some(1.0), false), &["out_bias", "no `o_proj.bias`"]);
    refused(Layout::T5, |c| (c.scale, c.out_bias) = (Some(1.0), false), &["qkv_bias", "no `q_proj.bias`"]);
}

/// A config that every layer refuses is refused for a layout, too.
#[test]
fn config_that_no_layer_can_have_is_refused() {
    let vb = || builder(&Tensors::new(), DType::F32);
    let config = SelfAttentionConfig::new(8, 3);
    assert_error_says(SelfAttention::from_layout(Layout::Llama, &config, vb()), &["embed_dim", "num_heads 3"]);
    let config = SelfAttentionConfig { kv_dim: Some(6), ..SelfAttentionConfig::new(8, 2) };
    assert_error_says(SelfAttention::from_layout(Layout::Llama, &config, vb()), &["kv_dim", "got 6"]);
    let (config, integers) = (SelfAttentionConfig::new(8, 2), builder(&Tensors::new(), DType::U32));
    assert_error_says(SelfAttention::from_layout(Layout::Llama, &config, integers), &["parameters", "got U32"]);
    let loaded = SelfAttention::load_layout(&config, &LayoutFile::new(Layout::Llama, "nowhere").dtype(DType::I64));
    assert_error_says(loaded, &["parameters", "got I64"]);
}
