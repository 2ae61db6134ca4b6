//! The computations that are timed.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::path::PathBuf;

use candle_attention::{
    AttentionOptions, Backend, Mask, SelfAttention, SelfAttentionConfig, scaled_dot_product_attention, self_attention,
};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, D, DType, Device, Layout, Result, Shape, Tensor, Var};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::ops::{softmax, softmax_last_dim};
use candle_nn::{VarBuilder, VarMap};
use serde::Deserialize;

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contender {
    /// candle-attention.
    Ours,
    /// candle-attention's fused path. An error where it can't serve.
    OursFused,
    /// Plain candle: matmul, softmax, matmul.
    Candle,
    /// candle's fused attention, which has no gradient.
    CandleFlash,
}

#[derive(Clone, Copy, Deserialize)]
pub struct Description {
    causal: bool,
    backward: bool,
    /// The heads of a layer; none for attention alone.
    num_heads: Option<usize>,
}

enum Kind {
    Attention { query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions },
    Layer { layer: Box<SelfAttention>, x: Tensor },
}

/// A loss with a given gradient, as in PyTorch's `output.backward(gradient)`. With one of candle's own losses, the time would
/// include that loss.
struct GradOutput(Tensor);

impl CustomOp1 for GradOutput {
    fn name(&self) -> &'static str {
        "grad-output"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((storage.device().zeros_impl(&Shape::from(()), DType::F32)?, Shape::from(())))
    }

    fn bwd(&self, output: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.broadcast_as(output.shape())?))
    }
}

/// The variables that get a gradient, with their names.
type Trained = Vec<(String, Var)>;

pub struct Job {
    kind: Kind,
    /// The gradient of the output, if there is a backward pass.
    grad_output: Option<Tensor>,
    description: Description,
    trained: Trained,
    /// candle's causal mask, made once, as a model makes it once for all layers.
    causal_mask: OnceCell<Tensor>,
    device: Device,
}

impl Job {
    /// Attention over `query`, `key` and `value`, with `bias` or `key_mask` (batch, kv_len) if they are there; or a layer over
    /// `x` with the parameters that are there.
    pub fn load(path: PathBuf, description: Description, device: Device) -> Result<Self> {
        let mut inputs = candle_core::safetensors::load(path, &device)?;
        let grad_output = inputs.remove("grad_output").filter(|_| description.backward);
        let (kind, trained) = match description.num_heads {
            Some(num_heads) => layer(inputs, num_heads, description)?,
            None => attention(&inputs, description)?,
        };
        Ok(Self { kind, grad_output, description, trained, causal_mask: OnceCell::new(), device })
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The output, and with a backward pass the gradients of the trained inputs, given `grad_output`.
    pub fn run(&self, contender: Contender) -> Result<Vec<(String, Tensor)>> {
        let output = self.output(contender)?;
        let mut all = Vec::new();
        if let Some(grad) = &self.grad_output {
            let grads = output.apply_op1(GradOutput(grad.clone()))?.backward()?;
            for (name, var) in &self.trained {
                let grad = grads.get(var).ok_or_else(|| candle_core::Error::msg(format!("no gradient of `{name}`")))?;
                all.push((format!("grad_{name}"), grad.clone()));
            }
        }
        all.push(("output".to_string(), output.detach()));
        Ok(all)
    }

    fn output(&self, contender: Contender) -> Result<Tensor> {
        let (query, key, value, options) = match (&self.kind, contender) {
            (Kind::Layer { layer, x }, Contender::Ours | Contender::OursFused) => return Ok(layer.forward(x)?),
            (Kind::Layer { .. }, _) => candle_core::bail!("expected candle-attention: candle has no attention layer"),
            (Kind::Attention { query, key, value, options }, _) => (query, key, value, options),
        };
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
                if self.description.causal {
                    let allowed = self.causal_mask(query.dim(2)?)?.broadcast_as(scores.shape())?;
                    let never = Tensor::new(f32::NEG_INFINITY, &self.device)?.to_dtype(scores.dtype())?;
                    scores = allowed.where_cond(&scores, &never.broadcast_as(scores.shape())?)?;
                }
                // The fast softmax has no gradient.
                let weights =
                    if self.description.backward { softmax(&scores, D::Minus1)? } else { softmax_last_dim(&scores)? };
                weights.matmul(value)
            }
            Contender::CandleFlash => {
                let mask = if self.description.causal { AttnMask::causal() } else { AttnMask::None };
                let [query, key, value] = [query, key, value].map(|x| x.transpose(1, 2)?.contiguous());
                flash_attn::<f32>(&query?, &key?, &value?, scale as f32, mask, None, None)
            }
        }
    }

    fn causal_mask(&self, len: usize) -> Result<&Tensor> {
        if self.causal_mask.get().is_none() {
            let _ = self.causal_mask.set(Tensor::tril2(len, DType::U8, &self.device)?);
        }
        Ok(self.causal_mask.get().expect("a mask that has just been made"))
    }
}

fn attention(inputs: &HashMap<String, Tensor>, description: Description) -> Result<(Kind, Trained)> {
    let mut trained = Vec::new();
    let mut input = |name: &str| {
        let tensor = inputs.get(name).ok_or_else(|| candle_core::Error::msg(format!("expected a tensor `{name}`")))?;
        if !description.backward {
            return Ok(tensor.clone());
        }
        let var = Var::from_tensor(tensor)?;
        trained.push((name.to_string(), var.clone()));
        candle_core::Result::Ok(var.as_tensor().clone())
    };
    let (query, key, value) = (input("query")?, input("key")?, input("value")?);
    let mut attn_mask = if description.causal { Mask::causal() } else { Mask::full() };
    if let Some(allowed) = inputs.get("key_mask") {
        attn_mask = attn_mask & Mask::from_tensor(&allowed.unsqueeze(1)?.unsqueeze(1)?)?;
    }
    let attn_bias = inputs.get("bias").cloned();
    let options = AttentionOptions { attn_mask, attn_bias, ..Default::default() };
    Ok((Kind::Attention { query, key, value, options }, trained))
}

fn layer(mut inputs: HashMap<String, Tensor>, num_heads: usize, description: Description) -> Result<(Kind, Trained)> {
    let x = inputs.remove("x").ok_or_else(|| candle_core::Error::msg("expected a tensor `x`"))?;
    let config =
        SelfAttentionConfig { is_causal: description.causal, ..SelfAttentionConfig::new(x.dim(2)?, num_heads) };
    let mut trained = Vec::new();
    let vb = if description.backward {
        let variables = VarMap::new();
        for (name, tensor) in &inputs {
            let var = Var::from_tensor(tensor)?;
            variables.data().lock().expect("a lock").insert(name.clone(), var.clone());
            trained.push((name.clone(), var));
        }
        VarBuilder::from_varmap(&variables, DType::F32, x.device())
    } else {
        VarBuilder::from_tensors(inputs, DType::F32, x.device())
    };
    Ok((Kind::Layer { layer: Box::new(self_attention(&config, vb)?), x }, trained))
}
