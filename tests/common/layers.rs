//! What the tests of whole layers share: layers whose parameters are all random, and the formula of a layer in plain
//! loops over f64, written only from the papers.

// Each test binary compiles its own copy of this module and uses only a part of it.
#![allow(dead_code)]

use std::f64::consts::TAU;
use std::path::Path;

use candle_attention::rotary::{Pairing, RotaryConfig, RotaryScaling, Yarn};
use candle_attention::{CrossAttention, Error, Layout, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, VarBuilder, VarMap};

use crate::common::{numbers, randn};

/// The methods of both kinds of layers, for tests that take either kind.
pub trait AttentionLayer {
    fn config(&self) -> &SelfAttentionConfig;
    fn parameters(&self) -> Vec<(&'static str, &Tensor)>;
    fn vars(&self) -> Vec<Var>;
    fn set_dropout_calls(&self, calls: u64);
    /// W_Q, W_K, W_V and W_O.
    fn projections(&self) -> [Option<&Linear>; 4];
    fn to_bytes(&self) -> Result<Vec<u8>>;
    fn to_layout(&self, layout: Layout) -> Result<Vec<(String, Tensor)>>;
    fn save_layout(&self, layout: Layout, prefix: &str, path: &Path) -> Result<()>;
}

macro_rules! attention_layer {
    ($($layer:ty),*) => {$(
        impl AttentionLayer for $layer {
            fn config(&self) -> &SelfAttentionConfig {
                self.config()
            }
            fn parameters(&self) -> Vec<(&'static str, &Tensor)> {
                self.parameters()
            }
            fn vars(&self) -> Vec<Var> {
                self.vars()
            }
            fn set_dropout_calls(&self, calls: u64) {
                self.set_dropout_calls(calls);
            }
            fn projections(&self) -> [Option<&Linear>; 4] {
                [Some(self.q_proj()), Some(self.k_proj()), Some(self.v_proj()), self.o_proj()]
            }
            fn to_bytes(&self) -> Result<Vec<u8>> {
                self.to_bytes()
            }
            fn to_layout(&self, layout: Layout) -> Result<Vec<(String, Tensor)>> {
                self.to_layout(layout)
            }
            fn save_layout(&self, layout: Layout, prefix: &str, path: &Path) -> Result<()> {
                self.save_layout(layout, prefix, path)
            }
        }
    )*};
}

attention_layer!(SelfAttention, CrossAttention);

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

/// Sets every parameter to random numbers, including those that are initialised to zero or one, so that a formula that
/// leaves one out gives other results. Weights preserve the variance of their inputs, so that scores stay near 1.
pub fn randomise(layer: &dyn AttentionLayer, seed: u64) -> Result<()> {
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

/// A config with almost every feature of self-attention at once, and with sizes that all differ.
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

/// A scaling of every kind for a rotary embedding with this number of pairs. The original lengths are short.
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
pub fn parameter(layer: &dyn AttentionLayer, name: &str) -> Option<Tensor> {
    let parameters = layer.parameters();
    let found = parameters.iter().find(|(other, _)| *other == name);
    found.map(|(_, tensor)| (*tensor).clone())
}

/// The variable of this name.
#[track_caller]
pub fn variable(layer: &dyn AttentionLayer, name: &str) -> Var {
    let parameters = layer.parameters();
    let index = parameters.iter().position(|(other, _)| *other == name);
    layer.vars()[index.expect("a parameter of this name")].clone()
}

/// Panics unless the result is an [`AttentionError`] whose text has all these parts.
#[track_caller]
pub fn assert_error_says<T>(result: Result<T, impl Into<Error>>, parts: &[&str]) {
    match result.map_err(Into::into) {
        Err(Error::Attention(error)) => assert_says(&error.to_string(), parts),
        Err(Error::Candle(error)) => panic!("an error of candle's, where one with {parts:?} was expected: {error}"),
        Ok(_) => panic!("no error, where one with {parts:?} was expected"),
    }
}

/// Panics unless the result is an error of candle's whose text has all these parts.
#[track_caller]
pub fn assert_candle_error_says<T>(result: Result<T, impl Into<Error>>, parts: &[&str]) {
    match result.map_err(Into::into) {
        Err(Error::Candle(error)) => assert_says(&error.to_string(), parts),
        Err(Error::Attention(error)) => panic!("not an error of candle's: {error}"),
        Ok(_) => panic!("no error, where one with {parts:?} was expected"),
    }
}

#[track_caller]
fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

type Rows = Vec<Vec<f64>>;

/// The formula of a layer, for one sequence.
pub struct Formula<'a> {
    pub layer: &'a dyn AttentionLayer,
    /// Whether a query may attend to a key.
    pub allowed: &'a dyn Fn(usize, usize) -> bool,
    /// ALiBi's slope of each head; none if empty.
    pub slopes: &'a [f64],
    pub position_offset: usize,
}

impl<'a> Formula<'a> {
    pub fn of(layer: &'a dyn AttentionLayer) -> Self {
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
            let q = self.normalise_and_rotate(&part(&query, head, config.head_dim()), "q_norm.weight")?;
            let k = self.normalise_and_rotate(&part(&key, kv_head, config.head_dim()), "k_norm.weight")?;
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

    /// The queries or keys of a head, normalised and rotated as the config says.
    fn normalise_and_rotate(&self, head: &Rows, norm: &str) -> Result<Rows> {
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
                rotate(row, position as f64, rotary);
            }
        }
        Ok(head)
    }

    /// The weights of query `i`, whose entries are `q`.
    fn weights(&self, head: usize, i: usize, q_len: usize, q: &[f64], keys: &Rows) -> Result<Vec<f64>> {
        let config = self.layer.config();
        let scale = config.scale.unwrap_or(1.0 / (config.head_dim() as f64).sqrt());
        // The last query is aligned with the last key.
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

/// Rotates the pairs of the first `dim` entries by position · frequency, and multiplies them by the magnitude.
fn rotate(row: &mut [f64], position: f64, rotary: &RotaryConfig) {
    let dim = rotary.dim.unwrap_or(row.len());
    let (frequencies, magnitude) = frequencies(rotary, dim);
    for (i, frequency) in frequencies.into_iter().enumerate() {
        let (a, b) = match rotary.pairing {
            Pairing::HalfSplit => (i, i + dim / 2),
            Pairing::Interleaved => (2 * i, 2 * i + 1),
        };
        let (sin, cos) = (position * frequency).sin_cos();
        (row[a], row[b]) = ((row[a] * cos - row[b] * sin) * magnitude, (row[a] * sin + row[b] * cos) * magnitude);
    }
}

/// The rotation of each pair in radians per position, and the magnitude, which is the factor of cosines and sines.
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
            // In terms of wavelengths, as in Meta's code.
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
            // The index of the pair that makes this number of turns over the original length.
            let original = yarn.original_max_position_embeddings as f64;
            let pair = |turns: f64| (original / (TAU * turns)).log(rotary.base) * dim as f64 / 2.0;
            let (low, high) = (pair(yarn.beta_fast), pair(yarn.beta_slow));
            let (low, high) = if yarn.truncate { (low.floor(), high.ceil()) } else { (low, high) };
            let (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
            let scale = |(i, frequency): (usize, f64)| {
                let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency / yarn.factor * interpolated + frequency * (1.0 - interpolated)
            };
            let scale_by = |mscale: f64| 0.1 * mscale * yarn.factor.ln() + 1.0;
            let magnitude = match (yarn.attention_factor, yarn.mscale, yarn.mscale_all_dim) {
                (Some(given), ..) => given,
                (None, Some(mscale), Some(all_dim)) => scale_by(mscale) / scale_by(all_dim),
                _ => scale_by(1.0),
            };
            (plain.enumerate().map(scale).collect(), magnitude)
        }
        Some(RotaryScaling::LongRope { factors, factor, original_max_position_embeddings, attention_factor }) => {
            let magnitude = (1.0 + factor.ln() / (*original_max_position_embeddings as f64).ln()).sqrt();
            let frequencies = plain.zip(factors).map(|(frequency, factor)| frequency / factor);
            (frequencies.collect(), attention_factor.unwrap_or(magnitude))
        }
    }
}

/// The entries of one head, for all tokens.
fn part(tokens: &Rows, head: usize, dim: usize) -> Rows {
    tokens.iter().map(|token| token[head * dim..][..dim].to_vec()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn rows(matrix: &Tensor) -> Result<Rows> {
    Ok(matrix.to_dtype(DType::F64)?.to_vec2()?)
}
