//! What the tests of whole layers share: layers whose parameters are all random, and the formula of a layer in plain
//! loops over f64, written from the papers alone.

// Each test binary compiles its own copy of this module and uses only a part of it.
#![allow(dead_code)]

use std::f64::consts::TAU;

use candle_attention::{
    CrossAttention, MultiHead, Pairing, RotaryConfig, RotaryScaling, SelfAttention, SelfAttentionConfig, Yarn,
};
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
        rotary: Some(RotaryConfig {
            base: 100.0,
            dim: Some(4),
            pairing: Pairing::Interleaved,
            scaling: Some(RotaryScaling::Yarn(Yarn::new(4.0, 16))),
        }),
        alibi: true,
        sinks: true,
        seed: 7,
        ..SelfAttentionConfig::new(10, 4)
    }
}

/// A scaling of every kind, for a rotary embedding of so many pairs, with an original length of few tokens.
pub fn scalings(pairs: usize) -> Vec<RotaryScaling> {
    let original_max_position_embeddings = 5;
    vec![
        RotaryScaling::Linear { factor: 2.5 },
        RotaryScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 0.2,
            high_freq_factor: 0.7,
            original_max_position_embeddings,
        },
        RotaryScaling::Yarn(Yarn { beta_fast: 0.7, beta_slow: 0.2, truncate: false, ..Yarn::new(4.0, 5) }),
        RotaryScaling::Yarn(Yarn { mscale: Some(1.5), mscale_all_dim: Some(0.5), ..Yarn::new(32.0, 64) }),
        RotaryScaling::LongRope {
            factors: (0..pairs).map(|i| 0.9 + i as f64).collect(),
            factor: 4.0,
            original_max_position_embeddings,
            attention_factor: None,
        },
    ]
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

/// Turns the pairs of the first `dim` entries by position · frequency, and stretches them.
fn turn(row: &mut [f64], position: f64, rotary: &RotaryConfig) {
    let dim = rotary.dim.unwrap_or(row.len());
    let (frequencies, stretch) = frequencies(rotary, dim);
    for (i, frequency) in frequencies.into_iter().enumerate() {
        let (a, b) = match rotary.pairing {
            Pairing::HalfSplit => (i, i + dim / 2),
            Pairing::Interleaved => (2 * i, 2 * i + 1),
        };
        let (sin, cos) = (position * frequency).sin_cos();
        (row[a], row[b]) = ((row[a] * cos - row[b] * sin) * stretch, (row[a] * sin + row[b] * cos) * stretch);
    }
}

/// By how many radians each pair turns a position, and by how much the pairs are stretched.
pub fn frequencies(rotary: &RotaryConfig, dim: usize) -> (Vec<f64>, f64) {
    let plain = (0..dim / 2).map(|i| rotary.base.powf(-2.0 * i as f64 / dim as f64));
    match &rotary.scaling {
        None => (plain.collect(), 1.0),
        Some(RotaryScaling::Linear { factor }) => (plain.map(|frequency| frequency / factor).collect(), 1.0),
        Some(RotaryScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings,
        }) => {
            // By wavelengths, as Meta's code has it.
            let original = *original_max_position_embeddings as f64;
            let scale = |frequency: f64| {
                let wavelength = TAU / frequency;
                if wavelength < original / high {
                    frequency
                } else if wavelength > original / low {
                    frequency / factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            };
            (plain.map(scale).collect(), 1.0)
        }
        Some(RotaryScaling::Yarn(yarn)) => {
            // The pair that turns so many times over the original length.
            let original = yarn.original_max_position_embeddings as f64;
            let pair = |turns: f64| (original / (TAU * turns)).log(rotary.base) * dim as f64 / 2.0;
            let (low, high) = (pair(yarn.beta_fast), pair(yarn.beta_slow));
            let (low, high) = if yarn.truncate { (low.floor(), high.ceil()) } else { (low, high) };
            let (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
            let scale = |(i, frequency): (usize, f64)| {
                let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency / yarn.factor * interpolated + frequency * (1.0 - interpolated)
            };
            let grown = |mscale: f64| 0.1 * mscale * yarn.factor.ln() + 1.0;
            let stretch = match (yarn.attention_factor, yarn.mscale, yarn.mscale_all_dim) {
                (Some(given), ..) => given,
                (None, Some(mscale), Some(all_dim)) => grown(mscale) / grown(all_dim),
                _ => grown(1.0),
            };
            (plain.enumerate().map(scale).collect(), stretch)
        }
        Some(RotaryScaling::LongRope { factors, factor, original_max_position_embeddings, attention_factor }) => {
            let stretch = (1.0 + factor.ln() / (*original_max_position_embeddings as f64).ln()).sqrt();
            let frequencies = plain.zip(factors).map(|(frequency, factor)| frequency / factor);
            (frequencies.collect(), attention_factor.unwrap_or(stretch))
        }
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
