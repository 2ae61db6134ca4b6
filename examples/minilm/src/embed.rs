//! Embeddings of many sentences, and how similar they are.

use anyhow::Result;
use candle_core::{Device, Tensor};
use indicatif::{ProgressBar, ProgressStyle};
use minilm::model::{Model, Sentence};

/// How many sentences make a batch.
const BATCH: usize = 32;

/// An embedding for each sentence, (sentences, hidden_size).
pub fn embed(model: &Model, sentences: &[Sentence]) -> Result<Tensor> {
    // Sentences of similar lengths need little padding in a batch.
    let mut order = (0..sentences.len()).collect::<Vec<_>>();
    order.sort_by_key(|&i| sentences[i].ids.len());
    // On stderr, and only if that is a terminal.
    let bar = if sentences.len() > BATCH { ProgressBar::new(sentences.len() as u64) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{wide_bar} sentence {pos}/{len}")?);
    let mut embeddings = vec![Vec::new(); sentences.len()];
    for indices in order.chunks(BATCH) {
        let batch = indices.iter().map(|&i| &sentences[i]).collect::<Vec<_>>();
        for (&i, embedding) in indices.iter().zip(model.embed(&batch)?.to_vec2::<f32>()?) {
            embeddings[i] = embedding;
        }
        bar.inc(indices.len() as u64);
    }
    bar.finish_and_clear();
    Ok(Tensor::new(embeddings, &Device::Cpu)?)
}

/// The cosine of the angle between any two embeddings, (sentences, sentences). Embeddings have length 1.
pub fn similarities(embeddings: &Tensor) -> Result<Tensor> {
    Ok(embeddings.matmul(&embeddings.t()?)?)
}

/// The most similar pairs i < j with their similarities, the most similar first.
pub fn most_similar(similarities: &[Vec<f32>], count: usize) -> Vec<(usize, usize, f32)> {
    let mut best: Vec<(usize, usize, f32)> = Vec::new();
    for (i, row) in similarities.iter().enumerate() {
        for (j, &similarity) in row.iter().enumerate().skip(i + 1) {
            let rank = best.partition_point(|&(_, _, other)| other >= similarity);
            if rank < count {
                best.insert(rank, (i, j, similarity));
                best.truncate(count);
            }
        }
    }
    best
}
