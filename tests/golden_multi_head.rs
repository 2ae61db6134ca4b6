//! The same numbers as PyTorch's `nn.MultiheadAttention`: output, weights and all gradients of every case of
//! tests/golden/make_golden.py, as |Δ| / (1 + |x|) within 1e-5 in f32 and 1e-12 in f64.

mod common;

use std::collections::HashMap;

use candle_attention::{CrossAttention, ForwardOptions, ForwardOutput, Mask, SelfAttention, SelfAttentionConfig};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use common::{Golden, assert_close, gradients, max_scaled_difference};
use serde_json::Value;

/// The cases of the script; a file with fewer has lost some.
const CASES: usize = 9;

/// Our names, in the order in which PyTorch packs the three projections.
const PROJECTIONS: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

/// One case of the file, in one dtype.
struct Case<'a> {
    golden: &'a Golden,
    fields: &'a Value,
    name: &'a str,
    dtype: DType,
}

enum Layer {
    OnItself(SelfAttention),
    OnMemory(CrossAttention),
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
            qkv_bias: self.flag("bias"),
            out_bias: self.flag("bias"),
            is_causal: self.flag("is_causal"),
            ..SelfAttentionConfig::new(required("embed_dim"), required("num_heads"))
        }
    }

    /// The state dict under our names, every tensor a variable.
    fn parameters(&self) -> anyhow::Result<HashMap<String, Var>> {
        let mut parameters = HashMap::new();
        for (i, projection) in PROJECTIONS.into_iter().enumerate() {
            let weight = match self.get("state.in_proj_weight") {
                Some(packed) => packed.chunk(3, 0)?[i].clone(),
                None => self.expect(&format!("state.{projection}_weight")).clone(),
            };
            parameters.insert(format!("{projection}.weight"), Var::from_tensor(&weight.contiguous()?)?);
            if self.flag("bias") {
                let bias = self.expect("state.in_proj_bias").chunk(3, 0)?[i].contiguous()?;
                parameters.insert(format!("{projection}.bias"), Var::from_tensor(&bias)?);
            }
        }
        let suffixes = if self.flag("bias") { vec!["weight", "bias"] } else { vec!["weight"] };
        for suffix in suffixes {
            let tensor = Var::from_tensor(self.expect(&format!("state.out_proj.{suffix}")))?;
            parameters.insert(format!("o_proj.{suffix}"), tensor);
        }
        Ok(parameters)
    }

    fn layer(&self, parameters: &HashMap<String, Var>) -> candle_core::Result<Layer> {
        let tensors = parameters.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone()));
        let vb = VarBuilder::from_tensors(tensors.collect(), self.dtype, &Device::Cpu);
        Ok(if self.flag("cross") {
            Layer::OnMemory(CrossAttention::new(&self.config(), vb)?)
        } else {
            Layer::OnItself(SelfAttention::new(&self.config(), vb)?)
        })
    }

    fn options(&self) -> candle_core::Result<ForwardOptions> {
        let attn_mask = match (self.get("key_padding_mask"), self.get("blocked_mask")) {
            (Some(padding), _) => Mask::from_padding_mask(padding)?,
            (_, Some(blocked)) => Mask::from_blocked(blocked)?,
            _ => Mask::full(),
        };
        Ok(ForwardOptions {
            attn_mask,
            attn_bias: self.get("attn_bias").cloned(),
            return_weights: true,
            ..Default::default()
        })
    }

    fn forward(&self, layer: &Layer, query: &Var, memory: Option<&Var>) -> candle_core::Result<ForwardOutput> {
        match (layer, memory) {
            (Layer::OnItself(layer), None) => layer.forward_with(query, &self.options()?),
            (Layer::OnMemory(layer), Some(memory)) => layer.forward_with(query, memory, &self.options()?),
            _ => panic!("{}: a memory where there is cross-attention, and only there", self.name),
        }
    }

    /// Every tensor that PyTorch gave for this case, by its name there, as we compute it.
    fn results(&self) -> anyhow::Result<Vec<(String, Tensor)>> {
        let query = Var::from_tensor(self.expect("query"))?;
        let memory = self.get("memory").map(Var::from_tensor).transpose()?;
        let parameters = self.parameters()?;
        let output = self.forward(&self.layer(&parameters)?, &query, memory.as_ref())?;

        let mut names = vec!["query"];
        let mut vars = vec![&query];
        if let Some(memory) = &memory {
            names.push("memory");
            vars.push(memory);
        }
        names.extend(parameters.keys().map(String::as_str));
        vars.extend(parameters.values());
        let loss = (&output.output * self.expect("grad_output"))?.sum_all()?;
        let gradients: HashMap<&str, Tensor> = names.into_iter().zip(gradients(&loss, &vars)?).collect();

        let weights = output.weights.expect("weights");
        let mut results = vec![
            ("output".to_string(), output.output),
            ("weights_mean".to_string(), weights.mean(D::Minus(3))?),
            ("weights".to_string(), weights),
        ];
        results.extend(self.under_torch_names(gradients)?);
        Ok(results)
    }

    /// The gradients as PyTorch names and packs them.
    fn under_torch_names(&self, mut gradients: HashMap<&str, Tensor>) -> anyhow::Result<Vec<(String, Tensor)>> {
        let mut take = |name: &str| gradients.remove(name).expect("a gradient");
        let mut results = vec![("grad_query".to_string(), take("query"))];
        if self.flag("cross") {
            results.push(("grad_memory".to_string(), take("memory")));
        }
        let weights = PROJECTIONS.map(|projection| take(&format!("{projection}.weight")));
        if self.get("state.in_proj_weight").is_some() {
            results.push(("grad_state.in_proj_weight".to_string(), Tensor::cat(&weights, 0)?));
        } else {
            let names = PROJECTIONS.map(|projection| format!("grad_state.{projection}_weight"));
            results.extend(names.into_iter().zip(weights));
        }
        results.push(("grad_state.out_proj.weight".to_string(), take("o_proj.weight")));
        if self.flag("bias") {
            let biases = PROJECTIONS.map(|projection| take(&format!("{projection}.bias")));
            results.push(("grad_state.in_proj_bias".to_string(), Tensor::cat(&biases, 0)?));
            results.push(("grad_state.out_proj.bias".to_string(), take("o_proj.bias")));
        }
        assert!(gradients.is_empty(), "{}: {:?} not compared", self.name, gradients.keys());
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
        for (tensor, result) in case.results()? {
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
