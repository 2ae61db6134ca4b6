//! What the tests of whole layers share: layers whose parameters are all random, and the formula of a layer in plain
//! loops over f64, written from the papers alone.

// Each test binary compiles its own copy of this module and uses only a part of it.
#![allow(dead_code)]

use candle_attention::{CrossAttention, MultiHead, Pairing, RotaryConfig, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use crate::common::{numbers, randn};

/// A layer on a `VarMap` of its own, with [random parameters](randomise).
pub fn self_attention(config: &SelfAttentionConfig, dtype: DType) -> Result<SelfAttention> {
    let layer = SelfAttention::new(config, VarBuilder::from_varmap(&VarMap::new(), dtype, &Device::Cpu))?;
    randomise(&layer, 1)?;
    Ok(layer)
}

/// As [`self_attention`].
pub fn cross_attention(config: &SelfAttentionConfig, dtype: DType) -> Result<CrossAttention> {
    let layer = CrossAttention::new(config, VarBuilder::from_varmap(&VarMap::new(), dtype, &Device::Cpu))?;
    randomise(&layer, 1)?;
    Ok(layer)
}

/// Every parameter random, those too that start at zero or one, so that none of them can be left out of a formula
/// unnoticed. Weights keep their inputs' variance, so that scores stay near 1.
pub fn randomise(layer: &MultiHead, seed: u64) -> Result<()> {
    for ((name, _), (var, seed)) in layer.parameters().iter().zip(layer.vars().iter().zip(seed * 1000..)) {
        let (mean, std) = match (*name, var.dims()) {
            ("q_norm.weight" | "k_norm.weight", _) => (1.0, 0.3),
            (_, [_, inputs]) => (0.0, (*inputs as f64).powf(-0.5)),
            _ => (0.0, 0.5),
        };
        let numbers = randn(seed, var.shape(), DType::F64)?.affine(std, mean)?;
        var.set(&numbers.to_dtype(var.dtype())?)?;
    }
    Ok(())
}

/// Everything a self-attention can have, at once, with sizes that all differ.
pub fn everything() -> SelfAttentionConfig {
    SelfAttentionConfig {
        num_kv_heads: Some(2),
        head_dim: Some(6),
        value_dim: Some(3),
        scale: Some(0.3),
        softcap: Some(2.5),
        is_causal: true,
        sliding_window: Some(4),
        dropout_p: 0.25,
        qk_norm_eps: Some(1e-3),
        rotary: Some(RotaryConfig { base: 100.0, dim: Some(4), pairing: Pairing::Interleaved }),
        alibi: true,
        sinks: true,
        seed: 7,
        ..SelfAttentionConfig::new(10, 4)
    }
}

/// The parameter of this name, if the layer has it.
pub fn parameter(layer: &MultiHead, name: &str) -> Option<Tensor> {
    let parameters = layer.parameters();
    let found = parameters.iter().find(|(other, _)| *other == name);
    found.map(|(_, tensor)| (*tensor).clone())
}

/// The variable of this name.
#[track_caller]
pub fn variable(layer: &MultiHead, name: &str) -> Var {
    let parameters = layer.parameters();
    let place = parameters.iter().position(|(other, _)| *other == name);
    layer.vars()[place.expect("a parameter of this name")].clone()
}

/// That it is an error whose text has all these parts.
#[track_caller]
pub fn assert_error_says<T>(result: Result<T>, parts: &[&str]) {
    let text = match result {
        Ok(_) => panic!("no error, where one with {parts:?} was expected"),
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

type Rows = Vec<Vec<f64>>;

/// The formula of a layer, for one sequence.
pub struct Formula<'a> {
    pub layer: &'a MultiHead,
    /// Whether a query may attend to a key.
    pub allowed: &'a dyn Fn(usize, usize) -> bool,
    /// ALiBi's slope of each head; none if empty.
    pub slopes: &'a [f64],
    pub position_offset: usize,
}

impl<'a> Formula<'a> {
    pub fn of(layer: &'a MultiHead) -> Self {
        Self { layer, allowed: &|_, _| true, slopes: &[], position_offset: 0 }
    }

    /// The output (q_len, output_dim) and the weights (num_heads, q_len, kv_len) for x (q_len, embed_dim) and memory
    /// (kv_len, kv_dim), in f64.
    pub fn compute(&self, x: &Tensor, memory: &Tensor) -> Result<(Tensor, Tensor)> {
        let config = self.layer.config();
        let (x, memory) = (rows(x)?, rows(memory)?);
        let query = self.project(&x, "q_proj")?;
        let key = self.project(&memory, "k_proj")?;
        let value = self.project(&memory, "v_proj")?;
        let mut merged = vec![Vec::new(); x.len()];
        let mut weights = Vec::new();
        for head in 0..config.num_heads {
            let kv_head = head * config.num_kv_heads() / config.num_heads;
            let q = self.place(&part(&query, head, config.head_dim()), "q_norm.weight")?;
            let k = self.place(&part(&key, kv_head, config.head_dim()), "k_norm.weight")?;
            let v = part(&value, kv_head, config.value_dim());
            for (i, q) in q.iter().enumerate() {
                let row = self.weights(head, i, x.len(), q, &k)?;
                merged[i]
                    .extend((0..config.value_dim()).map(|d| row.iter().zip(&v).map(|(w, v)| w * v[d]).sum::<f64>()));
                weights.extend(row);
            }
        }
        let output = if config.out_proj { self.project(&merged, "o_proj")? } else { merged };
        let (q_len, kv_len) = (x.len(), memory.len());
        let output = Tensor::from_vec(output.concat(), (q_len, config.output_dim()), &Device::Cpu)?;
        Ok((output, Tensor::from_vec(weights, (config.num_heads, q_len, kv_len), &Device::Cpu)?))
    }

    /// W x + b for every token.
    fn project(&self, tokens: &Rows, name: &str) -> Result<Rows> {
        let weight = rows(&parameter(self.layer, &format!("{name}.weight")).expect("a weight"))?;
        let bias = match parameter(self.layer, &format!("{name}.bias")) {
            Some(bias) => numbers(&bias)?,
            None => vec![0.0; weight.len()],
        };
        let project = |token: &Vec<f64>| weight.iter().zip(&bias).map(|(row, bias)| dot(row, token) + bias).collect();
        Ok(tokens.iter().map(project).collect())
    }

    /// Queries or keys of a head, normalised and turned as the config says.
    fn place(&self, head: &Rows, norm: &str) -> Result<Rows> {
        let config = self.layer.config();
        let mut head = head.clone();
        if let (Some(eps), Some(weight)) = (config.qk_norm_eps, parameter(self.layer, norm)) {
            let weight = numbers(&weight)?;
            for row in &mut head {
                let mean_square = dot(row, row) / row.len() as f64;
                row.iter_mut().zip(&weight).for_each(|(x, w)| *x *= w / (mean_square + eps).sqrt());
            }
        }
        if let Some(rotary) = &config.rotary {
            for (row, position) in head.iter_mut().zip(self.position_offset..) {
                turn(row, position as f64, rotary);
            }
        }
        Ok(head)
    }

    /// The weights of query `i`, which is `q`.
    fn weights(&self, head: usize, i: usize, q_len: usize, q: &[f64], keys: &Rows) -> Result<Vec<f64>> {
        let config = self.layer.config();
        let scale = config.scale.unwrap_or(1.0 / (config.head_dim() as f64).sqrt());
        // The last query stands at the last key.
        let position = i as f64 + keys.len() as f64 - q_len as f64;
        let exponential = |(j, k): (usize, &Vec<f64>)| {
            let mut score = dot(q, k) * scale;
            if let Some(softcap) = config.softcap {
                score = softcap * (score / softcap).tanh();
            }
            if let Some(slope) = self.slopes.get(head) {
                score -= slope * (position - j as f64).abs();
            }
            if (self.allowed)(i, j) { score.exp() } else { 0.0 }
        };
        let exponentials: Vec<f64> = keys.iter().enumerate().map(exponential).collect();
        let sink = match parameter(self.layer, "sinks") {
            Some(sinks) => numbers(&sinks)?[head].exp(),
            None => 0.0,
        };
        let sum = exponentials.iter().sum::<f64>() + sink;
        Ok(exponentials.into_iter().map(|x| if x == 0.0 { 0.0 } else { x / sum }).collect())
    }
}

/// Turns the pairs of the first `dim` entries by position · base^(-2i / dim).
fn turn(row: &mut [f64], position: f64, rotary: &RotaryConfig) {
    let dim = rotary.dim.unwrap_or(row.len());
    for i in 0..dim / 2 {
        let (a, b) = match rotary.pairing {
            Pairing::HalfSplit => (i, i + dim / 2),
            Pairing::Interleaved => (2 * i, 2 * i + 1),
        };
        let (sin, cos) = (position * rotary.base.powf(-2.0 * i as f64 / dim as f64)).sin_cos();
        (row[a], row[b]) = (row[a] * cos - row[b] * sin, row[a] * sin + row[b] * cos);
    }
}

/// The entries of one head of all tokens.
fn part(tokens: &Rows, head: usize, dim: usize) -> Rows {
    tokens.iter().map(|token| token[head * dim..][..dim].to_vec()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn rows(matrix: &Tensor) -> Result<Rows> {
    matrix.to_dtype(DType::F64)?.to_vec2()
}
