//! Attention, and a layer with its projections.

use std::cell::OnceCell;

use candle_attention::{
    AttentionOptions, Backend, Mask, SelfAttentionConfig, scaled_dot_product_attention, self_attention,
};
use candle_core::{D, DType, Result, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::ops::{softmax, softmax_last_dim};

use super::{Contender, Forward, Inputs, Trained};

struct Attention {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: AttentionOptions,
    causal: bool,
    backward: bool,
    /// candle's causal mask, made once, as a model makes it once for all layers.
    causal_mask: OnceCell<Tensor>,
}

pub fn attention(mut inputs: Inputs, causal: bool, backward: bool) -> Result<(Forward, Trained)> {
    let names: &[&str] = if backward { &["query", "key", "value"] } else { &[] };
    let trained = inputs.train(names)?;
    let mut attn_mask = if causal { Mask::causal() } else { Mask::full() };
    if let Ok(allowed) = inputs.get("key_mask") {
        attn_mask = attn_mask & Mask::from_tensor(&allowed.unsqueeze(1)?.unsqueeze(1)?)?;
    }
    let attn_bias = inputs.get("bias").ok().cloned();
    let options = AttentionOptions { attn_mask, attn_bias, ..Default::default() };
    let [query, key, value] = ["query", "key", "value"].map(|name| inputs.take(name));
    let (query, key, value, causal_mask) = (query?, key?, value?, OnceCell::new());
    let attention = Attention { query, key, value, options, causal, backward, causal_mask };
    Ok((Box::new(move |contender| attention.output(contender)), trained))
}

impl Attention {
    fn output(&self, contender: Contender) -> Result<Tensor> {
        let Self { query, key, value, options, causal, backward, .. } = self;
        let scale = 1.0 / (query.dim(3)? as f64).sqrt();
        match contender {
            Contender::Ours | Contender::OursFused => {
                let fused = matches!(contender, Contender::OursFused);
                let backend = if fused { Backend::Fused } else { Backend::Auto };
                let options = AttentionOptions { backend, ..options.clone() };
                Ok(scaled_dot_product_attention(query, key, value, &options)?.context)
            }
            Contender::Candle => {
                let mut scores = (query.matmul(&key.t()?)? * scale)?;
                if *causal {
                    let allowed = self.causal_mask()?.broadcast_as(scores.shape())?;
                    let never = Tensor::new(f32::NEG_INFINITY, query.device())?.to_dtype(scores.dtype())?;
                    scores = allowed.where_cond(&scores, &never.broadcast_as(scores.shape())?)?;
                }
                // The fast softmax has no gradient.
                let weights = if *backward { softmax(&scores, D::Minus1)? } else { softmax_last_dim(&scores)? };
                weights.matmul(value)
            }
            Contender::CandleFlash => {
                let mask = if *causal { AttnMask::causal() } else { AttnMask::None };
                let [query, key, value] = [query, key, value].map(|x| x.transpose(1, 2)?.contiguous());
                flash_attn::<f32>(&query?, &key?, &value?, scale as f32, mask, None, None)
            }
        }
    }

    fn causal_mask(&self) -> Result<&Tensor> {
        if self.causal_mask.get().is_none() {
            let mask = Tensor::tril2(self.query.dim(2)?, DType::U8, self.query.device())?;
            let _ = self.causal_mask.set(mask);
        }
        Ok(self.causal_mask.get().expect("a mask that has just been made"))
    }
}

pub fn layer(mut inputs: Inputs, num_heads: usize, backward: bool) -> Result<(Forward, Trained)> {
    let x = inputs.take("x")?;
    let (vb, trained) = inputs.parameters(backward, x.device())?;
    let layer = self_attention(&SelfAttentionConfig::new(x.dim(2)?, num_heads), vb)?;
    let forward = move |contender| match contender {
        Contender::Ours | Contender::OursFused => Ok(layer.forward(&x)?),
        _ => candle_core::bail!("expected candle-attention: candle has no attention layer"),
    };
    Ok((Box::new(forward), trained))
}
