//! The decoders of transformers: the parts of each kind of model, and their names.

use candle_attention::{CrossAttention, SelfAttention};
use candle_core::{D, Result, Tensor};
use candle_nn::{Func, LayerNorm, Linear, Module, RmsNorm, func};

use super::decoder::{Decoder, Inner, Step};
use super::{ModelFile, RelativeBias, layer_config};

impl Decoder {
    /// The decoder of this file.
    pub fn new(file: &ModelFile) -> Result<Self> {
        match file.kind() {
            "gpt2" => gpt2(file),
            "llama" | "qwen3" | "gpt_oss" => llama(file),
            "gemma2" => gemma2(file),
            "whisper" => whisper(file),
            "t5" => t5(file),
            other => panic!("no decoder for {other}"),
        }
    }

    /// A decoder with embeddings and a head of these names, without steps and without optional parts.
    fn bare(file: &ModelFile, embeddings: &str, norm: Func<'static>, head: &str) -> Self {
        Self {
            embeddings: file.expect(embeddings).clone(),
            embedding_scale: 1.0,
            positions: None,
            relative_bias: None,
            steps: Vec::new(),
            norm,
            head: Linear::new(file.expect(head).clone(), None),
            softcap: None,
            memory: None,
        }
    }
}

fn gpt2(file: &ModelFile) -> Result<Decoder> {
    let eps = file.number("layer_norm_epsilon");
    let norm = |name: String| layer_norm(file, &name, eps);
    let final_norm = norm("transformer.ln_f".into());
    let mut decoder = Decoder::bare(file, "transformer.wte.weight", final_norm, "lm_head.weight");
    decoder.positions = Some(file.expect("transformer.wpe.weight").clone());
    for layer in (0..file.size("n_layer")).map(|i| format!("transformer.h.{i}")) {
        let up = file.linear_transposed(&format!("{layer}.mlp.c_fc"))?;
        let down = file.linear_transposed(&format!("{layer}.mlp.c_proj"))?;
        decoder.steps.push(self_attention_step(file, norm(format!("{layer}.ln_1")), &format!("{layer}.attn"))?);
        decoder.steps.push(feed_forward(norm(format!("{layer}.ln_2")), up, Tensor::gelu, down));
    }
    Ok(decoder)
}

/// Llama, Qwen3 and, with an expert for the feed-forward layer, gpt-oss.
fn llama(file: &ModelFile) -> Result<Decoder> {
    let norm = |name: String| rms_norm(file, &name, file.number("rms_norm_eps"));
    let final_norm = norm("model.norm".into());
    let mut decoder = Decoder::bare(file, "model.embed_tokens.weight", final_norm, "lm_head.weight");
    for layer in (0..file.size("num_hidden_layers")).map(|i| format!("model.layers.{i}")) {
        let attention = format!("{layer}.self_attn");
        decoder.steps.push(self_attention_step(file, norm(format!("{layer}.input_layernorm")), &attention)?);
        let inner = match file.kind() {
            "gpt_oss" => expert(file, &format!("{layer}.mlp.experts"))?,
            _ => gated(file, &format!("{layer}.mlp"), Tensor::silu),
        };
        let before = norm(format!("{layer}.post_attention_layernorm"));
        decoder.steps.push(Step { before, inner: Inner::FeedForward(inner), after: None });
    }
    Ok(decoder)
}

fn gemma2(file: &ModelFile) -> Result<Decoder> {
    let norm = |name: String| gemma_norm(file, &name);
    let mut decoder = Decoder::bare(file, "model.embed_tokens.weight", norm("model.norm".into())?, "lm_head.weight");
    decoder.embedding_scale = (file.size("hidden_size") as f64).sqrt();
    decoder.softcap = Some(file.number("final_logit_softcapping"));
    for layer in (0..file.size("num_hidden_layers")).map(|i| format!("model.layers.{i}")) {
        let before = norm(format!("{layer}.input_layernorm"))?;
        let after = Some(norm(format!("{layer}.post_attention_layernorm"))?);
        decoder.steps.push(Step { after, ..self_attention_step(file, before, &format!("{layer}.self_attn"))? });
        decoder.steps.push(Step {
            before: norm(format!("{layer}.pre_feedforward_layernorm"))?,
            inner: Inner::FeedForward(gated(file, &format!("{layer}.mlp"), Tensor::gelu)),
            after: Some(norm(format!("{layer}.post_feedforward_layernorm"))?),
        });
    }
    Ok(decoder)
}

fn whisper(file: &ModelFile) -> Result<Decoder> {
    let norm = |name: String| layer_norm(file, &name, 1e-5);
    let embeddings = "model.decoder.embed_tokens.weight";
    let mut decoder = Decoder::bare(file, embeddings, norm("model.decoder.layer_norm".into()), embeddings);
    decoder.positions = Some(file.expect("model.decoder.embed_positions.weight").clone());
    decoder.memory = Some(file.expect("golden.greedy.memory").clone());
    for layer in (0..file.size("decoder_layers")).map(|i| format!("model.decoder.layers.{i}")) {
        let before = norm(format!("{layer}.self_attn_layer_norm"));
        decoder.steps.push(self_attention_step(file, before, &format!("{layer}.self_attn"))?);
        let before = norm(format!("{layer}.encoder_attn_layer_norm"));
        decoder.steps.push(cross_attention_step(file, before, &format!("{layer}.encoder_attn"))?);
        let (up, down) = (file.linear(&format!("{layer}.fc1")), file.linear(&format!("{layer}.fc2")));
        decoder.steps.push(feed_forward(norm(format!("{layer}.final_layer_norm")), up, Tensor::gelu_erf, down));
    }
    Ok(decoder)
}

fn t5(file: &ModelFile) -> Result<Decoder> {
    let norm = |name: String| rms_norm(file, &name, file.number("layer_norm_epsilon"));
    let final_norm = norm("decoder.final_layer_norm".into());
    assert!(!file.flag("scale_decoder_outputs"), "T5's logits aren't scaled");
    let mut decoder = Decoder::bare(file, "shared.weight", final_norm, "shared.weight");
    decoder.relative_bias = Some(RelativeBias::new(file, "decoder"));
    decoder.memory = Some(file.expect("golden.greedy.memory").clone());
    for layer in (0..file.size("num_decoder_layers")).map(|i| format!("decoder.block.{i}.layer")) {
        let before = |step: usize| norm(format!("{layer}.{step}.layer_norm"));
        decoder.steps.push(self_attention_step(file, before(0), &format!("{layer}.0.SelfAttention"))?);
        decoder.steps.push(cross_attention_step(file, before(1), &format!("{layer}.1.EncDecAttention"))?);
        let linear = |name: &str| file.linear(&format!("{layer}.2.DenseReluDense.{name}"));
        decoder.steps.push(feed_forward(before(2), linear("wi"), Tensor::relu, linear("wo")));
    }
    Ok(decoder)
}

fn self_attention_step(file: &ModelFile, before: Func<'static>, name: &str) -> Result<Step> {
    let (layout, config) = layer_config(file, name);
    let attention = SelfAttention::from_layout(layout, &config, file.var_builder().pp(name))?;
    Ok(Step { before, inner: Inner::SelfAttention(attention), after: None })
}

fn cross_attention_step(file: &ModelFile, before: Func<'static>, name: &str) -> Result<Step> {
    let (layout, config) = layer_config(file, name);
    let attention = CrossAttention::from_layout(layout, &config, file.var_builder().pp(name))?;
    Ok(Step { before, inner: Inner::CrossAttention(attention), after: None })
}

/// down(activation(up(x)))
fn feed_forward(before: Func<'static>, up: Linear, activation: fn(&Tensor) -> Result<Tensor>, down: Linear) -> Step {
    let map = func(move |x| down.forward(&activation(&up.forward(x)?)?));
    Step { before, inner: Inner::FeedForward(map), after: None }
}

/// down(activation(gate(x)) · up(x))
fn gated(file: &ModelFile, name: &str, activation: fn(&Tensor) -> Result<Tensor>) -> Func<'static> {
    let [gate, up, down] = ["gate_proj", "up_proj", "down_proj"].map(|part| file.linear(&format!("{name}.{part}")));
    func(move |x| down.forward(&(activation(&gate.forward(x)?)? * up.forward(x)?)?))
}

/// The only expert of gpt-oss, to which the router sends every token.
fn expert(file: &ModelFile, name: &str) -> Result<Func<'static>> {
    assert_eq!(file.size("num_local_experts"), 1, "experts");
    let (alpha, limit) = (file.number("swiglu_alpha"), file.number("swiglu_limit"));
    let linear = |part: &str| -> Result<Linear> {
        let weight = file.expect(&format!("{name}.{part}")).squeeze(0)?.t()?.contiguous()?;
        Ok(Linear::new(weight, Some(file.expect(&format!("{name}.{part}_bias")).squeeze(0)?)))
    };
    let (gate_up, down) = (linear("gate_up_proj")?, linear("down_proj")?);
    Ok(func(move |x| {
        let both = gate_up.forward(x)?;
        // Gate and value of each feature are adjacent.
        let mut shape = both.dims().to_vec();
        let features = shape.pop().expect("features");
        shape.extend([features / 2, 2]);
        let both = both.reshape(shape)?;
        let [gate, up] = [0, 1].map(|i| both.narrow(D::Minus1, i, 1).and_then(|part| part.squeeze(D::Minus1)));
        let (gate, up) = (gate?.minimum(limit)?, up?.clamp(-limit, limit)?);
        let swish = (&gate * candle_nn::ops::sigmoid(&(&gate * alpha)?)?)?;
        down.forward(&((up + 1.0)? * swish)?)
    }))
}

fn layer_norm(file: &ModelFile, name: &str, eps: f64) -> Func<'static> {
    let [weight, bias] = ["weight", "bias"].map(|part| file.expect(&format!("{name}.{part}")).clone());
    let norm = LayerNorm::new(weight, bias, eps);
    func(move |x| norm.forward(x))
}

fn rms_norm(file: &ModelFile, name: &str, eps: f64) -> Func<'static> {
    let norm = RmsNorm::new(file.expect(&format!("{name}.weight")).clone(), eps);
    func(move |x| norm.forward(x))
}

/// Gemma stores the weight minus 1.
fn gemma_norm(file: &ModelFile, name: &str) -> Result<Func<'static>> {
    let norm = RmsNorm::new((file.expect(&format!("{name}.weight")) + 1.0)?, file.number("rms_norm_eps"));
    Ok(func(move |x| norm.forward(x)))
}
