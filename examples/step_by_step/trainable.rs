//! "The cat sat on the mat because it is warm": what trainable weights add.

use std::collections::HashMap;
use std::io::Write;

use anyhow::Result;
use candle_attention::simplified::{Normalization, simplified_attention};
use candle_attention::{SelfAttention, SelfAttentionConfig, self_attention};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Module, VarBuilder, VarMap};

use crate::page::{bar, heading, row};

const WORDS: [&str; 10] = ["The", "cat", "sat", "on", "the", "mat", "because", "it", "is", "warm"];
/// The notes give no embeddings for this sentence. In these, every entry has a meaning: animal, thing, action, quality and
/// function word. "warm" has nothing in common with "mat".
const INPUTS: [[f32; 5]; 10] = [
    [0.0, 0.0, 0.0, 0.0, 1.0],
    [1.5, 0.3, 0.0, 0.2, 0.0],
    [0.3, 0.0, 1.5, 0.0, 0.0],
    [0.0, 0.3, 0.2, 0.0, 1.0],
    [0.0, 0.0, 0.0, 0.0, 1.0],
    [0.0, 1.5, 0.2, 0.0, 0.0],
    [0.0, 0.0, 0.2, 0.2, 1.2],
    [0.4, 0.4, 0.0, 0.0, 0.8],
    [0.0, 0.0, 0.6, 0.3, 0.7],
    [0.0, 0.0, 0.0, 1.5, 0.1],
];
const DIM: usize = 5;
/// Entries of an embedding.
const THING: usize = 1;
const QUALITY: usize = 3;
/// Words of the sentence.
const MAT: usize = 5;
const WARM: usize = 9;

fn inputs() -> Result<Tensor> {
    Ok(Tensor::new(&INPUTS, &Device::Cpu)?)
}

pub fn without(out: &mut impl Write) -> Result<()> {
    heading(out, "11. What is missing: \"The cat sat on the mat because it is warm\"")?;
    let attention = simplified_attention(&inputs()?, Normalization::Softmax)?;
    let (scores, weights) = (attention.scores.to_vec2::<f32>()?, attention.weights.to_vec2::<f32>()?);
    writeln!(
        out,
        "What is warm? The mat; so \"warm\" should look at \"mat\". But without trainable
weights a word looks at words like itself. The embeddings here (made up, since
the notes give none) say how much a word is an animal, a thing, an action, a
quality or a function word. The query is \"warm\":

           animal  thing action quality  func.   score  weight"
    )?;
    for (i, word) in WORDS.iter().enumerate() {
        let (score, weight) = (scores[WARM][i], weights[WARM][i]);
        let bar = bar(weight, 20);
        writeln!(out, "  {word:<8}{}{score:8.2}{weight:8.4}  {bar}", row(&INPUTS[i], 7, 1))?;
    }
    writeln!(
        out,
        "
\"warm\" looks at itself: {:.0}% against {:.0}% for \"mat\". It can't be otherwise. The
scores X·Xᵀ are what the embeddings make them: there is nothing to adjust. And
they are symmetric: whichever of two words asks, the score is the same.",
        weights[WARM][WARM] * 100.0,
        weights[WARM][MAT] * 100.0
    )?;
    Ok(())
}

/// An untrained layer, drawn from a seed.
fn untrained(seed: u64) -> Result<SelfAttention> {
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let config = SelfAttentionConfig { seed, ..SelfAttentionConfig::single_head(DIM, DIM, DIM) };
    Ok(self_attention(&config, vb)?)
}

/// A layer whose W_Q turns a quality into a query for a thing. W_K and W_V are the identity.
fn by_hand() -> Result<SelfAttention> {
    let identity = Tensor::eye(DIM, DType::F32, &Device::Cpu)?;
    let mut w_q = [[0f32; DIM]; DIM];
    w_q[THING][QUALITY] = 4.0; // stored as (out, in)
    let parameters = HashMap::from([
        ("q_proj.weight".to_string(), Tensor::new(&w_q, &Device::Cpu)?),
        ("k_proj.weight".to_string(), identity.clone()),
        ("v_proj.weight".to_string(), identity),
    ]);
    let vb = VarBuilder::from_tensors(parameters, DType::F32, &Device::Cpu);
    Ok(self_attention(&SelfAttentionConfig::single_head(DIM, DIM, DIM), vb)?)
}

pub fn with(out: &mut impl Write) -> Result<()> {
    heading(out, "12. What trainable weights add")?;
    writeln!(
        out,
        "With W_Q and W_K, what a word asks for need not be what it is. Here is what
\"warm\" attends to in three layers. Two are as they are before training: W_Q and
W_K are random, drawn from the seeds 1 and 2. In the third, W_Q is set by hand:
a quality asks for a thing (and W_K is the identity).

              seed 1    seed 2   by hand"
    )?;
    let mut columns = Vec::new();
    for layer in [untrained(1)?, untrained(2)?, by_hand()?] {
        let (_, weights) = layer.forward_with_weights(&inputs()?)?;
        columns.push(weights.get(0)?.get(WARM)?.to_vec1::<f32>()?);
    }
    for (i, word) in WORDS.iter().enumerate() {
        let weights: Vec<_> = columns.iter().map(|column| column[i]).collect();
        writeln!(out, "  {word:<8}{}  {}", row(&weights, 10, 4), bar(weights[2], 36))?;
    }
    let (layer, x) = (by_hand()?, inputs()?);
    let scores = layer.q_proj().forward(&x)?.matmul(&layer.k_proj().forward(&x)?.t()?)?;
    let score = |i: usize, j: usize| -> Result<f32> { Ok(scores.get(i)?.get(j)?.to_scalar()?) };
    writeln!(
        out,
        "
Set by hand, \"warm\" looks at \"mat\", with the same embeddings as before. And the
symmetry is gone: q·k is {:.2} where \"warm\" asks \"mat\", {:.2} the other way round.

Before training, W_Q and W_K know nothing of this. But gradients reach them. How
a layer finds out by itself that \"warm\" should look at \"mat\":

  cargo run --release --example warm_attends_to_mat",
        score(WARM, MAT)?,
        score(MAT, WARM)?
    )?;
    Ok(())
}
