//! Training and evaluation.

use anyhow::{Result, ensure};
use attention_examples::random::Seeded;
use candle_attention::block::{CrossEntropyOptions, cross_entropy};
use candle_attention::train::{AdamW, AdamWConfig, backward};
use candle_core::{D, Tensor};
use indicatif::{ProgressBar, ProgressStyle};

use crate::grammar::Sentence;
use crate::model::Model;
use crate::reader::Reader;

/// Sentences in a training step.
const BATCH: usize = 64;
const LEARNING_RATE: f64 = 0.01;

/// The sentences with each other's labels. Each label is as frequent as before, but doesn't depend on the sentence.
pub fn with_shuffled_labels(sentences: &[Sentence], seed: u64) -> Vec<Sentence> {
    let mut labels = sentences.iter().map(|sentence| sentence.label).collect::<Vec<_>>();
    Seeded::new(seed).shuffle(&mut labels);
    sentences.iter().zip(labels).map(|(sentence, label)| Sentence { label, ..sentence.clone() }).collect()
}

/// Trains the model on the labels of the sentences. No attention weight is computed here. `title` stands before the
/// progress bar.
pub fn teach(model: &Model, reader: &Reader, sentences: &[Sentence], steps: usize, title: &'static str) -> Result<()> {
    let mut optimizer = AdamW::new(&model.variables()?, AdamWConfig { lr: LEARNING_RATE, ..Default::default() })?;
    let mut random = Seeded::new(model.config().seed);
    // On stderr, and only if that is a terminal.
    let style = ProgressStyle::with_template("{prefix:8} {wide_bar} step {pos}/{len}  {msg}")?;
    let bar = ProgressBar::new(steps as u64).with_style(style).with_prefix(title);
    let mut waiting = Vec::new();
    for _ in 0..steps {
        if waiting.len() < BATCH {
            waiting = sentences.iter().collect();
            random.shuffle(&mut waiting);
        }
        let lesson = waiting.split_off(waiting.len().saturating_sub(BATCH));
        let labels = lesson.iter().map(|sentence| sentence.label).collect::<Vec<_>>();
        let labels = Tensor::new(labels, &reader.device)?;
        let loss = cross_entropy(&model.forward(&reader.read(&lesson)?)?, &labels, &CrossEntropyOptions::default())?;
        optimizer.step(&backward(&loss)?)?;
        let loss = loss.to_scalar::<f32>()?;
        ensure!(loss.is_finite(), "the loss is {loss}");
        bar.set_message(format!("loss {loss:.4}"));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// The evaluation of a model.
pub struct Report {
    /// The share of sentences whose noun the model names.
    pub accuracy: f32,
    /// The share of sentences in which the noun gets more than half of the property's attention.
    pub attention_on_noun: f32,
    /// The mean weight of the noun in the property's row.
    pub mean_attention: f32,
}

impl Report {
    pub fn new(model: &Model, reader: &Reader, sentences: &[Sentence]) -> Result<Self> {
        let (mut right, mut most, mut sum) = (0, 0, 0.0);
        for sentences in sentences.chunks(BATCH) {
            let batch = reader.read(&sentences.iter().collect::<Vec<_>>())?;
            let said = model.forward(&batch)?.argmax(D::Minus1)?.to_vec1::<u32>()?;
            let weights = model.weights(&batch)?.to_vec3::<f32>()?;
            for ((sentence, said), weights) in sentences.iter().zip(said).zip(weights) {
                let on_noun = weights[sentence.property][sentence.noun];
                right += usize::from(said == sentence.label);
                most += usize::from(on_noun > 0.5);
                sum += on_noun;
            }
        }
        let count = sentences.len() as f32;
        let (accuracy, attention_on_noun) = (right as f32 / count, most as f32 / count);
        Ok(Self { accuracy, attention_on_noun, mean_attention: sum / count })
    }
}
