//! Why scores are divided by sqrt(head_dim).

use std::io::Write;

use anyhow::{Context, Result};
use candle_attention::{AttentionOptions, scaled_dot_product_attention};
use candle_core::{D, DType, Device, Tensor, Var};

use crate::page::{heading, row, vector};

/// The query and the keys of the notes.
const QUERY: [[f32; 4]; 1] = [[2., 3., 4., 1.]];
const KEYS: [[f32; 4]; 2] = [[1., 0., 1., 0.], [0., 1., 0., 1.]];

const HEAD_DIMS: [usize; 5] = [4, 16, 64, 256, 1024];
/// Enough queries for stable averages.
const NUM_QUERIES: usize = 2000;
/// Few keys, so that the weights are easy to interpret.
const NUM_KEYS: usize = 16;

pub fn six_and_four(out: &mut impl Write) -> Result<()> {
    heading(out, "9. Why divide by sqrt(head_dim)? The example of the notes")?;
    let (query, keys) = (Tensor::new(&QUERY, &Device::Cpu)?, Tensor::new(&KEYS, &Device::Cpu)?);
    let scores = query.matmul(&keys.t()?)?;
    writeln!(
        out,
        "The query q = {} and the keys k1 = {}, k2 = {}:

              scores         weights             the notes say",
        vector(&QUERY[0], 0),
        vector(&KEYS[0], 0),
        vector(&KEYS[1], 0)
    )?;
    for (name, scale, notes) in [("unscaled", 1.0, "0.88  0.12"), ("/ sqrt(4)", 0.5, "\"more balanced\"")] {
        let options = AttentionOptions { scale: Some(scale), return_weights: true, ..Default::default() };
        let attention = scaled_dot_product_attention(&query, &keys, &keys, &options)?;
        let weights = attention.weights.context("weights were asked for")?.get(0)?.to_vec1::<f32>()?;
        let scores = (&scores * scale)?.get(0)?.to_vec1::<f32>()?;
        writeln!(out, "  {name:<9}{}    {}    {notes}", row(&scores, 6, 1), row(&weights, 8, 4))?;
    }
    Ok(())
}

/// Statistics of the scores of random queries and keys, and of their weights and gradients.
struct Statistics {
    /// Of the dot products q·k.
    variance: f64,
    /// The largest weight of a query, averaged over the queries.
    largest_weight: f32,
    /// The length of the gradient that reaches the scores of a query: the median over the queries.
    gradient: f32,
}

pub fn growing_head_dim(out: &mut impl Write) -> Result<()> {
    heading(out, "10. Why the square root? Dot products of many numbers")?;
    writeln!(
        out,
        "A dot product is a sum of head_dim products. If the entries of queries and keys
are random, with mean 0 and variance 1, then each product has variance 1, and
their sum has variance head_dim: a score is of the size of sqrt(head_dim).
Divided by just that, scores are of the same size for every head_dim.

{NUM_QUERIES} random queries, each with {NUM_KEYS} random keys and values: the variance of q·k;
the largest weight of a query (mean over queries); and how much gradient gets
through the softmax, from the sum of all contexts to the scores of a query (its
length; median over queries).

            variance      largest weight            gradient
  head_dim    of q·k   unscaled    scaled    unscaled      scaled"
    )?;
    for head_dim in HEAD_DIMS {
        let unscaled = statistics(head_dim, 1.0)?;
        let scaled = statistics(head_dim, 1.0 / (head_dim as f64).sqrt())?;
        writeln!(
            out,
            "  {head_dim:>8}{:>10.1}{:>11.4}{:>10.4}{:>12.6}{:>12.6}",
            unscaled.variance, unscaled.largest_weight, scaled.largest_weight, unscaled.gradient, scaled.gradient
        )?;
    }
    writeln!(
        out,
        "
Unscaled, the softmax saturates as head_dim grows: one key takes all the weight,
a small change of a score changes nothing, and the gradient vanishes. From most
queries W_Q and W_K then learn nothing. Scaled, head_dim hardly matters."
    )?;
    Ok(())
}

fn statistics(head_dim: usize, scale: f64) -> Result<Statistics> {
    let mut noise = Noise(head_dim as u64);
    // Every query has keys and values of its own: a batch of sequences with one query each.
    let query = noise.tensor((NUM_QUERIES, 1, head_dim))?;
    let key = noise.tensor((NUM_QUERIES, NUM_KEYS, head_dim))?;
    let value = noise.tensor((NUM_QUERIES, NUM_KEYS, 1))?;
    let dot_products = query.matmul(&key.t()?)?.to_dtype(DType::F64)?;

    // A bias of zero changes no score, and its gradient is the gradient of the scores.
    let bias = Var::zeros((NUM_QUERIES, 1, 1, NUM_KEYS), DType::F32, &Device::Cpu)?;
    let options = AttentionOptions {
        scale: Some(scale),
        attn_bias: Some(bias.as_tensor().clone()),
        return_weights: true,
        ..Default::default()
    };
    let attention = scaled_dot_product_attention(&query, &key, &value, &options)?;
    let gradients = attention.context.sum_all()?.backward()?;
    let gradient = gradients.get(&bias).context("attention should pass gradients on")?;
    let mut lengths = gradient.sqr()?.sum(D::Minus1)?.sqrt()?.flatten_all()?.to_vec1::<f32>()?;
    lengths.sort_by(f32::total_cmp);
    let weights = attention.weights.context("weights were asked for")?;
    Ok(Statistics {
        variance: dot_products.sqr()?.mean_all()?.to_scalar()?,
        largest_weight: weights.max(D::Minus1)?.mean_all()?.to_scalar()?,
        gradient: lengths[lengths.len() / 2],
    })
}

/// Random numbers that are the same in every run: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
struct Noise(u64);

impl Noise {
    /// Uniform in (0, 1).
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / 2f64.powi(53) + 2f64.powi(-54)
    }

    /// Mean 0 and variance 1, normally distributed (Box and Muller, 1958).
    fn normal(&mut self) -> f32 {
        let (radius, angle) = ((-2.0 * self.uniform().ln()).sqrt(), std::f64::consts::TAU * self.uniform());
        (radius * angle.cos()) as f32
    }

    fn tensor(&mut self, (batch, len, dim): (usize, usize, usize)) -> Result<Tensor> {
        let numbers: Vec<_> = (0..batch * len * dim).map(|_| self.normal()).collect();
        Ok(Tensor::from_vec(numbers, (batch, len, dim), &Device::Cpu)?)
    }
}
