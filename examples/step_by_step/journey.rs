//! "Your journey starts with one step": attention without trainable weights, from scores to contexts.

use std::io::Write;

use anyhow::Result;
use candle_attention::simplified::{Normalization, SimplifiedAttention, normalize, simplified_attention};
use candle_core::{Device, Tensor};

use crate::page::{bar, heading, row, vector};

const WORDS: [&str; 6] = ["Your", "journey", "starts", "with", "one", "step"];
/// The embeddings of the notes.
const INPUTS: [[f32; 3]; 6] = [
    [0.43, 0.15, 0.89],
    [0.55, 0.87, 0.66],
    [0.57, 0.85, 0.64],
    [0.22, 0.58, 0.33],
    [0.77, 0.25, 0.10],
    [0.05, 0.80, 0.55],
];
/// The query of the notes is "journey".
const QUERY: usize = 1;

const NORMALIZATIONS: [(&str, Normalization); 3] = [
    ("by sum", Normalization::SumNormalized),
    ("naive", Normalization::NaiveSoftmax),
    ("softmax", Normalization::Softmax),
];

fn attention() -> Result<SimplifiedAttention> {
    let inputs = Tensor::new(&INPUTS, &Device::Cpu)?;
    Ok(simplified_attention(&inputs, Normalization::Softmax)?)
}

/// The row of the query "journey".
fn of_query(matrix: &Tensor) -> Result<Vec<f32>> {
    Ok(matrix.get(QUERY)?.to_vec1()?)
}

pub fn scores(out: &mut impl Write) -> Result<()> {
    heading(out, "1. Scores: how alike are two words?")?;
    writeln!(
        out,
        "\"Your journey starts with one step\": each word is an embedding of three numbers.
The query is \"journey\". Its score with a word is the dot product of the two:
multiply entry by entry, then add.\n"
    )?;
    let scores = of_query(&attention()?.scores)?;
    for ((word, x), score) in WORDS.iter().zip(INPUTS).zip(scores) {
        let products = INPUTS[QUERY].iter().zip(x).map(|(q, x)| format!("{q:.2}·{x:.2}"));
        let sum = products.collect::<Vec<_>>().join(" + ");
        writeln!(out, "  journey · {word:<8} =  {sum}  =  {score:.4}")?;
    }
    writeln!(
        out,
        "\nThe higher the score, the more the two vectors are aligned, and the longer they
are. \"starts\" comes almost as close to \"journey\" as \"journey\" does itself."
    )?;
    Ok(())
}

pub fn weights(out: &mut impl Write) -> Result<()> {
    heading(out, "2. Weights: scores that are made to sum to 1")?;
    writeln!(
        out,
        "There are three ways to make weights of the scores s:

  by sum    s / Σ s
  naive     exp(s) / Σ exp(s)                     the softmax as one writes it
  softmax   exp(s - max s) / Σ exp(s - max s)     the softmax as one computes it

  word       score   by sum    naive  softmax"
    )?;
    let scores = attention()?.scores.get(QUERY)?;
    let mut columns = vec![scores.to_vec1::<f32>()?];
    for (_, normalization) in NORMALIZATIONS {
        columns.push(normalize(&scores, normalization)?.to_vec1()?);
    }
    for (i, word) in WORDS.iter().enumerate() {
        let numbers: Vec<_> = columns.iter().map(|column| column[i]).collect();
        writeln!(out, "  {word:<7}{}  {}", row(&numbers, 9, 4), bar(numbers[3], 80))?;
    }
    let sums: Vec<f32> = columns.iter().map(|column| column.iter().sum()).collect();
    writeln!(out, "  {:<7}{}", "sum", row(&sums, 9, 4))?;
    writeln!(out, "\nNow one can say: \"journey\" pays {:.0}% of its attention to \"starts\".", columns[3][2] * 100.0)?;
    Ok(())
}

pub fn extreme_scores(out: &mut impl Write) -> Result<()> {
    heading(out, "3. Why softmax, and why the largest score is subtracted")?;
    writeln!(out, "The extreme scores of the notes:\n")?;
    all_normalizations(out, &[1., 3., 4., 400.])?;
    writeln!(
        out,
        "
By sum, the small scores keep a share, though next to 400 they should mean
nothing. The naive softmax breaks: exp(400) is {} in 32-bit floats, and
{0} / {0} is NaN. With the largest score subtracted, the largest exponential
is exp(0) = 1. Nothing overflows, and where the naive form works, the weights
are the same.

Scores can also be negative. Shares of the sum are then no weights at all:
",
        400f32.exp()
    )?;
    all_normalizations(out, &[2., -1., -0.5])
}

fn all_normalizations(out: &mut impl Write, scores: &[f32]) -> Result<()> {
    writeln!(out, "  scores  {}", row(scores, 9, 1))?;
    let scores = Tensor::new(scores, &Device::Cpu)?;
    for (name, normalization) in NORMALIZATIONS {
        let weights = normalize(&scores, normalization)?.to_vec1::<f32>()?;
        writeln!(out, "  {name:<8}{}", row(&weights, 9, 4))?;
    }
    Ok(())
}

pub fn context(out: &mut impl Write) -> Result<()> {
    heading(out, "4. Context: the weighted sum of all words")?;
    let SimplifiedAttention { weights, context, .. } = attention()?;
    writeln!(out, "Each embedding is multiplied by its weight, and the products are added:\n")?;
    for ((word, x), weight) in WORDS.iter().zip(INPUTS).zip(of_query(&weights)?) {
        let product = x.map(|x| weight * x);
        writeln!(out, "  {word:<8}{weight:.4} · {}  = {}", vector(&x, 2), row(&product, 9, 4))?;
    }
    let z2 = of_query(&context)?;
    writeln!(out, "  {:39}{}", "", "-".repeat(26))?;
    writeln!(out, "  {:<37}{}", "z2, the context of \"journey\"", row(&z2, 9, 4))?;
    writeln!(
        out,
        "\nA context has as many entries as an embedding. It is the word \"journey\" seen in
the light of its sentence."
    )?;
    Ok(())
}

pub fn wrong_z2(out: &mut impl Write) -> Result<()> {
    heading(out, "5. A slip in the notes: z2 = 0.4371, six times")?;
    let SimplifiedAttention { weights, context, .. } = attention()?;
    // The loop of the notes: it takes index and entry of the query, where index and row of the inputs were meant.
    let terms: Vec<_> = INPUTS[QUERY].iter().zip(of_query(&weights)?).map(|(x_j, weight)| weight * x_j).collect();
    let slip = [terms.iter().sum::<f32>(); 6];
    writeln!(
        out,
        "The notes compute the context like this:

  context_vector = torch.empty(inputs.shape[0])
  for (index, x_j) in enumerate(query):            # `inputs` was meant
    context_vector += attn_weights_2_solid[index] * x_j

Going through the query, x_j is one number of \"journey\" and not one word of the
sentence. So each of six entries becomes {}:

  the notes say   {}
  their loop      {}
  the right z2    {}

How to notice: a context has as many entries as an embedding, 3, while 6 is the
number of words. (And torch.empty need not start at 0; torch.zeros does.)",
        terms.iter().map(|term| format!("{term:.4}")).collect::<Vec<_>>().join(" + "),
        vector(&[0.4371; 6], 4),
        vector(&slip, 4),
        vector(&of_query(&context)?, 4)
    )?;
    Ok(())
}

pub fn all_contexts(out: &mut impl Write) -> Result<()> {
    heading(out, "6. All words at once: two matrix products")?;
    let SimplifiedAttention { weights, context, .. } = attention()?;
    writeln!(
        out,
        "Every word is a query now: scores = X·Xᵀ, a softmax over each row, context =
weights·X. The row \"journey\" is what was found above.
"
    )?;
    let heads: String = WORDS.map(|word| format!("{word:>8}")).concat();
    writeln!(out, "  weights{heads}")?;
    for (word, weights) in WORDS.iter().zip(weights.to_vec2::<f32>()?) {
        writeln!(out, "  {word:<7}{}", row(&weights, 8, 4))?;
    }
    writeln!(out, "\n  context")?;
    for (word, context) in WORDS.iter().zip(context.to_vec2::<f32>()?) {
        writeln!(out, "  {word:<7}{}", row(&context, 8, 4))?;
    }
    Ok(())
}
