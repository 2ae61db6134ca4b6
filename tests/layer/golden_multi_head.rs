//! Comparison with PyTorch's `nn.MultiheadAttention`: output, weights and all gradients of every case of
//! tests/golden/make_golden.py, from its state dict, on both backends, agree within |Δ| / (1 + |x|) < 1e-5 in f32 and
//! 1e-12 in f64.

use std::ops::Deref;

use candle_attention::{
    Backend, CrossAttention, ForwardOptions, ForwardOutput, Layout, Mask, SelfAttention, SelfAttentionConfig,
};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use serde_json::Value;

use crate::common::{Golden, assert_close, gradients, max_scaled_difference};
use crate::layers::AttentionLayer;

/// The number of cases in the script. A file with fewer cases is incomplete.
const CASES: usize = 27;

/// One case of the file, in one dtype.
struct Case<'a> {
    golden: &'a Golden,
    fields: &'a Value,
    name: &'a str,
    dtype: DType,
}

enum Layer {
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

impl Case<'_> {
    fn get(&self, tensor: &str) -> Option<&Tensor> {
        self.golden.get(self.name, self.dtype, tensor)
    }

    #[track_caller]
    fn expect(&self, tensor: &str) -> &Tensor {
        self.golden.expect(self.name, self.dtype, tensor)
    }

    fn size(&self, field: &str) -> Option<usize> {
        self.fields[field].as_u64().map(|size| size as usize)
    }

    fn flag(&self, field: &str) -> bool {
        self.fields[field].as_bool().expect("a boolean")
    }

    fn config(&self) -> SelfAttentionConfig {
        let required = |field| self.size(field).expect("a size");
        SelfAttentionConfig {
            kv_dim: self.size("kv_dim"),
            value_input_dim: self.size("value_dim"),
            qkv_bias: self.flag("bias"),
            out_bias: self.flag("bias"),
            is_causal: self.flag("is_causal"),
            add_bias_kv: self.flag("add_bias_kv"),
            add_zero_attn: self.flag("add_zero_attn"),
            ..SelfAttentionConfig::new(required("embed_dim"), required("num_heads"))
        }
    }

    /// The layer with the parameters of PyTorch's state dict.
    fn layer(&self) -> candle_core::Result<Layer> {
        let names = self.golden.names(self.name, self.dtype, "state.");
        let state = names.iter().map(|name| (name.to_string(), self.expect(name).clone()));
        let vb = VarBuilder::from_tensors(state.collect(), self.dtype, &Device::Cpu).pp("state");
        Ok(if self.flag("cross") {
            Layer::CrossAttention(CrossAttention::from_layout(Layout::Torch, &self.config(), vb)?.trainable()?)
        } else {
            Layer::SelfAttention(SelfAttention::from_layout(Layout::Torch, &self.config(), vb)?.trainable()?)
        })
    }

    /// Gives four axes to a mask of PyTorch that is (batch · num_heads, q_len, kv_len), and leaves (q_len, kv_len)
    /// unchanged.
    fn with_four_axes(&self, mask: &Tensor) -> candle_core::Result<Tensor> {
        match *mask.dims() {
            [_, q_len, kv_len] => mask.reshape(((), self.size("num_heads").expect("a size"), q_len, kv_len)),
            _ => Ok(mask.clone()),
        }
    }

    fn options(&self, backend: Backend) -> candle_core::Result<ForwardOptions> {
        let mut attn_mask = Mask::full();
        if let Some(padding) = self.get("key_padding_mask") {
            let padding = padding.reshape(((), padding.dim(D::Minus1)?))?;
            attn_mask = attn_mask & Mask::from_padding_mask(&padding)?;
        }
        if let Some(blocked) = self.get("blocked_mask") {
            attn_mask = attn_mask & Mask::from_blocked(&self.with_four_axes(blocked)?)?;
        }
        let bias = self.get("attn_bias").map(|bias| self.with_four_axes(bias)).transpose()?;
        let by_key = self.get("float_padding").map(|padding| padding.unsqueeze(1)?.unsqueeze(1)).transpose()?;
        let attn_bias = match (bias, by_key) {
            (Some(bias), Some(by_key)) => Some(bias.broadcast_add(&by_key)?),
            (bias, by_key) => bias.or(by_key),
        };
        Ok(ForwardOptions { attn_mask, attn_bias, backend, return_weights: true, ..Default::default() })
    }

    fn forward(&self, layer: &Layer, inputs: &[Var], backend: Backend) -> candle_attention::Result<ForwardOutput> {
        let options = self.options(backend)?;
        match (layer, inputs) {
            (Layer::SelfAttention(layer), [query]) => layer.forward_with(query, &options),
            (Layer::CrossAttention(layer), [query, memory]) => layer.forward_with(query, memory, &options),
            (Layer::CrossAttention(layer), [query, key, value]) => layer.forward_key_value(query, key, value, &options),
            _ => panic!("{}: only cross-attention has a memory", self.name),
        }
    }

    /// This crate's results for all tensors that PyTorch computed in this case, by PyTorch's names.
    fn results(&self, backend: Backend) -> anyhow::Result<Vec<(String, Tensor)>> {
        let names = ["query", "memory", "value"].into_iter().filter(|name| self.get(name).is_some());
        let names: Vec<&str> = names.collect();
        let inputs = names.iter().map(|name| Var::from_tensor(self.expect(name)));
        let inputs = inputs.collect::<candle_core::Result<Vec<Var>>>()?;
        let layer = self.layer()?;
        let output = self.forward(&layer, &inputs, backend)?;

        let vars = layer.vars();
        let loss = (&output.output * self.expect("grad_output"))?.sum_all()?;
        let mut gradients = gradients(&loss, &inputs.iter().chain(&vars).collect::<Vec<_>>())?;
        let parameter_gradients = gradients.split_off(inputs.len());

        let weights = output.weights.expect("weights");
        let mut results = vec![
            ("output".to_string(), output.output),
            ("weights_mean".to_string(), weights.mean(D::Minus(3))?),
            ("weights".to_string(), weights),
        ];
        results.extend(names.iter().map(|name| format!("grad_{name}")).zip(gradients));
        // The gradients replace the parameters, so that `to_layout` names and packs them as PyTorch does.
        for (var, gradient) in vars.iter().zip(parameter_gradients) {
            var.set(&gradient)?;
        }
        let named_gradients = layer.to_layout(Layout::Torch)?.into_iter();
        results.extend(named_gradients.map(|(name, gradient)| (format!("grad_state.{name}"), gradient)));
        let expected = self.golden.names(self.name, self.dtype, "grad_").len() - 1;
        let compared = results.iter().filter(|(name, _)| name.starts_with("grad_")).count();
        assert_eq!(compared, expected, "{}: number of gradients without that of the output", self.name);
        Ok(results)
    }
}

fn check_all(dtype: DType, tolerance: f64) -> anyhow::Result<()> {
    let golden = Golden::load("multi_head")?;
    assert!(golden.cases.len() >= CASES, "{} cases", golden.cases.len());
    let mut worst = (0.0, String::new());
    for fields in &golden.cases {
        let name = fields["name"].as_str().expect("a name");
        let case = Case { golden: &golden, fields, name, dtype };
        let both = [case.results(Backend::Fused)?, case.results(Backend::Reference)?].concat();
        for (tensor, result) in both {
            let what = format!("{name}, {tensor}");
            assert_eq!(result.dtype(), dtype, "{what}");
            assert_close(&result, case.expect(&tensor), tolerance, &what);
            let difference = max_scaled_difference(&result, case.expect(&tensor))?;
            if difference > worst.0 {
                worst = (difference, what);
            }
        }
    }
    println!("{dtype:?}: largest difference {:e} ({})", worst.0, worst.1);
    Ok(())
}

#[test]
fn agrees_with_pytorch_in_f32() -> anyhow::Result<()> {
    check_all(DType::F32, 1e-5)
}

#[test]
fn agrees_with_pytorch_in_f64() -> anyhow::Result<()> {
    check_all(DType::F64, 1e-12)
}
