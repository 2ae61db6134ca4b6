//! Embeddings of many sentences, and how alike they are.

use anyhow::Result;
use candle_core::{Device, Tensor};
use indicatif::{ProgressBar, ProgressStyle};

use crate::model::{Model, Sentence};

/// Sentences that are computed together.
const BATCH: usize = 32;

/// An embedding for each sentence, (sentences, hidden_size).
pub fn embed(model: &Model, sentences: &[Sentence]) -> Result<Tensor> {
    // Sentences of like lengths together need little padding.
    let mut order = (0..sentences.len()).collect::<Vec<_>>();
    order.sort_by_key(|&i| sentences[i].ids.len());
    // On stderr, and only if that is a terminal.
    let bar = if sentences.len() > BATCH { ProgressBar::new(sentences.len() as u64) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{wide_bar} sentence {pos}/{len}")?);
    let mut embeddings = vec![Vec::new(); sentences.len()];
    for places in order.chunks(BATCH) {
        let batch = places.iter().map(|&i| &sentences[i]).collect::<Vec<_>>();
        for (&i, embedding) in places.iter().zip(model.embed(&batch)?.to_vec2::<f32>()?) {
            embeddings[i] = embedding;
        }
        bar.inc(places.len() as u64);
    }
    bar.finish_and_clear();
    Ok(Tensor::new(embeddings, &Device::Cpu)?)
}

/// The cosine of the angle between each two embeddings, which have length 1.
pub fn similarities(embeddings: &Tensor) -> Result<Tensor> {
    Ok(embeddings.matmul(&embeddings.t()?)?)
}

/// The pairs i < j that are most alike, the best first, and how much.
pub fn most_alike(similarities: &[Vec<f32>], count: usize) -> Vec<(usize, usize, f32)> {
    let mut best: Vec<(usize, usize, f32)> = Vec::new();
    for (i, row) in similarities.iter().enumerate() {
        for (j, &similarity) in row.iter().enumerate().skip(i + 1) {
            let place = best.partition_point(|&(_, _, other)| other >= similarity);
            if place < count {
                best.insert(place, (i, j, similarity));
                best.truncate(count);
            }
        }
    }
    best
}
