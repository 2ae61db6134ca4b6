//! "The cat sat": queries, keys and values, with the identity for W_Q, W_K and W_V.

use std::collections::HashMap;
use std::io::Write;

use anyhow::Result;
use candle_attention::{SelfAttention, SelfAttentionConfig, self_attention};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Module, VarBuilder};

use crate::page::{heading, row, vector};

const WORDS: [&str; 3] = ["The", "cat", "sat"];
/// The embeddings of the notes.
const INPUTS: [[f32; 4]; 3] = [[1., 0., 1., 0.], [0., 1., 0., 1.], [1., 1., 1., 1.]];
/// The context of "The" in the notes.
const NOTES_CONTEXT: [f32; 4] = [1.2669, 0.9999, 1.2669, 0.9999];

/// The single-head layer of the notes, W_Q = W_K = W_V = I.
fn identity_layer() -> Result<SelfAttention> {
    let names = ["q_proj.weight", "k_proj.weight", "v_proj.weight"];
    let identity = Tensor::eye(4, DType::F32, &Device::Cpu)?;
    let parameters = HashMap::from(names.map(|name| (name.to_string(), identity.clone())));
    let vb = VarBuilder::from_tensors(parameters, DType::F32, &Device::Cpu);
    Ok(self_attention(&SelfAttentionConfig::single_head(4, 4, 4), vb)?)
}

type Rows = Vec<Vec<f32>>;

/// The weights of each word, and its context.
fn attend() -> Result<(Rows, Rows)> {
    let (context, weights) = identity_layer()?.forward_with_weights(&Tensor::new(&INPUTS, &Device::Cpu)?)?;
    // (heads, queries, keys), with one head.
    Ok((weights.squeeze(0)?.to_vec2()?, context.to_vec2()?))
}

pub fn identity_weights(out: &mut impl Write) -> Result<()> {
    heading(out, "7. Queries, keys and values: \"The cat sat\"")?;
    writeln!(
        out,
        "A word x now plays three parts: as a query, W_Q x, it asks; as a key, W_K x, it
is compared with what is asked; as a value, W_V x, it is passed on. The scores
are divided by the square root of the size of a key, here sqrt(4) = 2.

W_Q, W_K and W_V are what gets trained. The notes start with the identity for
all three, so that q = k = v = x. Here is a SelfAttention layer with these:
"
    )?;
    let (layer, x) = (identity_layer()?, Tensor::new(&INPUTS, &Device::Cpu)?);
    let (queries, keys) = (layer.q_proj().forward(&x)?, layer.k_proj().forward(&x)?);
    let scores = queries.matmul(&keys.t()?)?;
    let scaled = (&scores / 2.0)?.to_vec2::<f32>()?;
    let scores = scores.to_vec2::<f32>()?;
    let (weights, context) = attend()?;
    writeln!(out, "  {:7}{:15}{:>15}   {:>18}", "query", "   x", "q·k", "q·k / sqrt(4)")?;
    writeln!(out, "  {:22}{}   {}", "", columns(5), columns(6))?;
    for (i, word) in WORDS.iter().enumerate() {
        let x = row(&INPUTS[i], 2, 0);
        let (scores, scaled) = (row(&scores[i], 5, 0), row(&scaled[i], 6, 1));
        writeln!(out, "  {word:<7}{x:15}{scores}   {scaled}")?;
    }
    writeln!(out, "\n  {:5}{:>24}   {:>32}", "query", "weights", "context")?;
    writeln!(out, "  {:5}{}", "", columns(8))?;
    for (i, word) in WORDS.iter().enumerate() {
        writeln!(out, "  {word:5}{}   {}", row(&weights[i], 8, 4), row(&context[i], 8, 4))?;
    }
    Ok(())
}

fn columns(width: usize) -> String {
    WORDS.map(|word| format!("{word:>width$}")).concat()
}

pub fn impossible_context(out: &mut impl Write) -> Result<()> {
    heading(out, "8. A context that cannot be")?;
    let (weights, context) = attend()?;
    // The mistake that leads to the numbers of the notes: "sat" is counted twice, and weights are cut off after four digits.
    let cut: Vec<_> = weights[0].iter().map(|weight| (weight * 1e4).floor() / 1e4).collect();
    let sat_twice: Vec<_> = (0..4).map(|i| cut[0] * INPUTS[0][i] + cut[1] * INPUTS[1][i] + cut[2] * 2.0).collect();
    writeln!(
        out,
        "The context of \"The\":

  the notes say    {}
  this layer       {}

Weights are never negative and sum to 1. So an entry of the context is a mean of
entries of the values, with weights, and lies between the smallest and the
largest of them: here between 0 and 1. It cannot be 1.2669.

What may have happened: the value of \"sat\" was taken twice, as [2, 2, 2, 2], and
the weights were cut off after four digits, {}. Then

  the context is   {}",
        vector(&NOTES_CONTEXT, 4),
        vector(&context[0], 4),
        vector(&cut, 4),
        vector(&sat_twice, 4)
    )?;
    Ok(())
}
