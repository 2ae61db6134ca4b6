//! The config of an attention layer, from a config of transformers.

use candle_attention::rotary::{Pairing, RotaryConfig, RotaryScaling};
use candle_attention::{Layout, SelfAttentionConfig};
use serde_json::Value;

use super::ModelFile;

/// The layout and the config of the attention layer `name`.
pub fn layer_config(file: &ModelFile, name: &str) -> (Layout, SelfAttentionConfig) {
    let is_decoder = name.contains("decoder.");
    match file.kind() {
        "bert" => (Layout::Bert, SelfAttentionConfig::new(file.size("hidden_size"), file.size("num_attention_heads"))),
        "gpt2" => (Layout::Gpt2, causal(SelfAttentionConfig::new(file.size("n_embd"), file.size("n_head")))),
        "gptj" => (Layout::OutProj, gptj(file)),
        "gpt_neox" => {
            let config = SelfAttentionConfig::new(file.size("hidden_size"), file.size("num_attention_heads"));
            (Layout::GptNeox, causal(SelfAttentionConfig { rotary: Some(partial_rotary(file, &config)), ..config }))
        }
        "bloom" => {
            let config = SelfAttentionConfig::new(file.size("hidden_size"), file.size("n_head"));
            (Layout::GptNeox, causal(SelfAttentionConfig { alibi: true, ..config }))
        }
        "falcon" => {
            assert!(file.flag("new_decoder_architecture") && !file.flag("alibi") && !file.flag("bias"));
            let config = SelfAttentionConfig::new(file.size("hidden_size"), file.size("num_attention_heads"));
            let rotary = Some(rotary(file, &file.config["rope_parameters"]));
            let num_kv_heads = Some(file.size("num_kv_heads"));
            (Layout::GptNeox, causal(without_biases(SelfAttentionConfig { num_kv_heads, rotary, ..config })))
        }
        "opt" => {
            let config = SelfAttentionConfig::new(file.size("hidden_size"), file.size("num_attention_heads"));
            (Layout::OutProj, causal(config))
        }
        "clip_vision_model" => {
            (Layout::OutProj, SelfAttentionConfig::new(file.size("hidden_size"), file.size("num_attention_heads")))
        }
        "llama" | "qwen2" | "qwen3" | "gemma2" | "gpt_oss" => (Layout::Llama, llama(file, index(name))),
        "phi3" => (Layout::QkvProj, phi3(file)),
        "modernbert" => (Layout::ModernBert, modernbert(file, index(name))),
        "mpt" => {
            let config = SelfAttentionConfig::new(file.size("d_model"), file.size("n_heads"));
            assert_eq!(file.config["attn_config"]["alibi"], true, "MPT without ALiBi");
            (Layout::Wqkv, causal(without_biases(SelfAttentionConfig { alibi: true, ..config })))
        }
        "whisper" => {
            let heads = if is_decoder { "decoder_attention_heads" } else { "encoder_attention_heads" };
            let config = SelfAttentionConfig::new(file.size("d_model"), file.size(heads));
            let is_causal = is_decoder && name.ends_with("self_attn");
            (Layout::OutProj, SelfAttentionConfig { k_bias: false, is_causal, ..config })
        }
        "t5" => {
            let is_causal = is_decoder && name.ends_with("SelfAttention");
            let config = without_biases(SelfAttentionConfig::new(file.size("d_model"), file.size("num_heads")));
            let head_dim = Some(file.size("d_kv"));
            (Layout::T5, SelfAttentionConfig { head_dim, scale: Some(1.0), is_causal, ..config })
        }
        other => panic!("no config for {other}"),
    }
}

/// The first number in a module's name, which is the index of its layer.
fn index(name: &str) -> usize {
    name.split('.').find_map(|part| part.parse().ok()).expect("a layer's number")
}

fn causal(config: SelfAttentionConfig) -> SelfAttentionConfig {
    SelfAttentionConfig { is_causal: true, ..config }
}

fn without_biases(config: SelfAttentionConfig) -> SelfAttentionConfig {
    SelfAttentionConfig { qkv_bias: false, out_bias: false, ..config }
}

fn gptj(file: &ModelFile) -> SelfAttentionConfig {
    let rotary =
        RotaryConfig { dim: Some(file.size("rotary_dim")), pairing: Pairing::Interleaved, ..RotaryConfig::default() };
    let config = SelfAttentionConfig::new(file.size("n_embd"), file.size("n_head"));
    causal(without_biases(SelfAttentionConfig { rotary: Some(rotary), ..config }))
}

/// Llama and models with its names. The config of a kind of model has only the fields that it needs.
fn llama(file: &ModelFile, layer: usize) -> SelfAttentionConfig {
    let config = &file.config;
    let is_sliding = config["layer_types"][layer] == "sliding_attention";
    // Qwen2 has biases only for queries, keys and values, and its config doesn't say so.
    let is_qwen2 = file.kind() == "qwen2";
    SelfAttentionConfig {
        num_kv_heads: Some(file.size("num_key_value_heads")),
        head_dim: config["head_dim"].as_u64().map(|dim| dim as usize),
        qkv_bias: is_qwen2 || file.flag("attention_bias"),
        out_bias: !is_qwen2 && file.flag("attention_bias"),
        scale: config["query_pre_attn_scalar"].as_f64().map(|scalar| scalar.powf(-0.5)),
        softcap: config["attn_logit_softcapping"].as_f64(),
        is_causal: true,
        sliding_window: is_sliding.then(|| file.size("sliding_window")),
        qk_norm_eps: (file.kind() == "qwen3").then(|| file.number("rms_norm_eps")),
        rotary: Some(rotary(file, &config["rope_parameters"])),
        sinks: file.kind() == "gpt_oss",
        ..SelfAttentionConfig::new(file.size("hidden_size"), file.size("num_attention_heads"))
    }
}

fn phi3(file: &ModelFile) -> SelfAttentionConfig {
    let config = SelfAttentionConfig::new(file.size("hidden_size"), file.size("num_attention_heads"));
    causal(without_biases(SelfAttentionConfig {
        num_kv_heads: Some(file.size("num_key_value_heads")),
        rotary: Some(partial_rotary(file, &config)),
        ..config
    }))
}

fn modernbert(file: &ModelFile, layer: usize) -> SelfAttentionConfig {
    let kind = file.config["layer_types"][layer].as_str().expect("a layer's type");
    SelfAttentionConfig {
        // Half of `local_attention` to either side.
        sliding_window: (kind == "sliding_attention").then(|| file.size("local_attention") / 2 + 1),
        rotary: Some(rotary(file, &file.config["rope_parameters"][kind])),
        qkv_bias: file.flag("attention_bias"),
        out_bias: file.flag("attention_bias"),
        ..SelfAttentionConfig::new(file.size("hidden_size"), file.size("num_attention_heads"))
    }
}

/// A rotary embedding of a part of each head.
fn partial_rotary(file: &ModelFile, config: &SelfAttentionConfig) -> RotaryConfig {
    let rope = &file.config["rope_parameters"];
    let dim = rope["partial_rotary_factor"].as_f64().map(|part| (config.head_dim() as f64 * part) as usize);
    RotaryConfig { dim, ..rotary(file, rope) }
}

fn rotary(file: &ModelFile, rope: &Value) -> RotaryConfig {
    let base = rope["rope_theta"].as_f64().expect("rope_theta");
    let scaling = match rope["rope_type"].as_str() {
        Some("default") => None,
        Some("longrope") => Some(longrope(file, rope)),
        _ => {
            // The other fields are the same.
            let mut rope = rope.as_object().expect("rotary parameters").clone();
            rope.remove("rope_theta");
            Some(serde_json::from_value(rope.into()).expect("a scaling"))
        }
    };
    RotaryConfig { base, scaling, ..RotaryConfig::default() }
}

/// LongRoPE with the set of factors for the length of the sequences in this file.
fn longrope(file: &ModelFile, rope: &Value) -> RotaryScaling {
    let original = file.size("original_max_position_embeddings");
    let is_long = file.expect("golden.attention_mask").dims()[1] > original;
    let factors = &rope[if is_long { "long_factor" } else { "short_factor" }];
    RotaryScaling::LongRope {
        factors: factors.as_array().expect("factors").iter().map(|factor| factor.as_f64().expect("a number")).collect(),
        factor: file.size("max_position_embeddings") as f64 / original as f64,
        original_max_position_embeddings: original,
        attention_factor: rope["attention_factor"].as_f64(),
    }
}
