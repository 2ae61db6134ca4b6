//! The lesson: the query should attend to the target, and every other word to what it attended to before.

use anyhow::Result;
use attention_examples::embeddings::embeddings;
use candle_attention::SelfAttention;
use candle_attention::simplified::{Normalization, simplified_attention};
use candle_core::{Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use indicatif::{ProgressBar, ProgressStyle};

use crate::sentence::Sentence;

/// A sentence as tensors, and the weights that a layer should learn.
pub struct Lesson {
    /// (len, dim)
    embeddings: Tensor,
    query: usize,
    target: usize,
    target_word: String,
    /// The weights to learn, (len, len): those of the untrained layer, except that the query gives all of its attention to
    /// the target.
    goal: Tensor,
}

/// What a layer computes from the sentence.
pub struct Look {
    /// (len, output_dim)
    pub output: Tensor,
    /// (len, len), the mean of the heads
    pub weights: Tensor,
}

impl Lesson {
    /// The lesson for an untrained layer.
    pub fn new(sentence: &Sentence, untrained: &SelfAttention, device: &Device) -> Result<Self> {
        let embeddings = embeddings(&sentence.words, untrained.config().embed_dim, device)?;
        let mut goal = look(untrained, &embeddings)?.weights.to_vec2::<f32>()?;
        for (key, weight) in goal[sentence.query].iter_mut().enumerate() {
            *weight = if key == sentence.target { 1.0 } else { 0.0 };
        }
        Ok(Self {
            embeddings,
            query: sentence.query,
            target: sentence.target,
            target_word: sentence.target_word().to_string(),
            goal: Tensor::new(goal, device)?,
        })
    }

    /// The weight of the target in the query's row, in attention without trainable weights.
    pub fn without_parameters(&self) -> Result<f32> {
        self.on_target(&simplified_attention(&self.embeddings, Normalization::Softmax)?.weights)
    }

    /// The cosine of the angle between the embeddings of query and target.
    pub fn likeness(&self) -> Result<f32> {
        let (a, b) = (self.embeddings.get(self.query)?, self.embeddings.get(self.target)?);
        let dot = |a: &Tensor, b: &Tensor| (a * b)?.sum_all()?.to_scalar::<f32>();
        Ok(dot(&a, &b)? / (dot(&a, &a)? * dot(&b, &b)?).sqrt())
    }

    /// One forward pass.
    pub fn look(&self, layer: &SelfAttention) -> Result<Look> {
        look(layer, &self.embeddings)
    }

    /// The weight of the target in the query's row.
    pub fn on_target(&self, weights: &Tensor) -> Result<f32> {
        Ok(weights.get(self.query)?.get(self.target)?.to_scalar()?)
    }

    /// The Kullback-Leibler divergence of the weights from the goal, Σ goal · ln(goal / weight).
    pub fn loss(&self, weights: &Tensor) -> Result<Tensor> {
        // At least the smallest normal number, so that the logarithm is finite.
        let logarithm = |x: &Tensor| x.maximum(f64::from(f32::MIN_POSITIVE))?.log();
        Ok((&self.goal * (logarithm(&self.goal)? - logarithm(weights)?)?)?.sum_all()?)
    }

    /// Trains W_Q and W_K. W_V has no influence on the weights, and stays as it is.
    pub fn teach(&self, layer: &SelfAttention, steps: usize, learning_rate: f64) -> Result<()> {
        let trained = [layer.q_proj().weight(), layer.k_proj().weight()];
        let vars = trained.map(Var::from_tensor).into_iter().collect::<candle_core::Result<Vec<_>>>()?;
        let mut optimizer = AdamW::new(vars, ParamsAdamW { lr: learning_rate, ..Default::default() })?;
        // On stderr, and only if that is a terminal.
        let bar = ProgressBar::new(steps as u64)
            .with_style(ProgressStyle::with_template("{wide_bar} step {pos}/{len}  {msg}")?);
        for _ in 0..steps {
            let weights = self.look(layer)?.weights;
            let loss = self.loss(&weights)?;
            optimizer.backward_step(&loss)?;
            let (loss, on_target) = (loss.to_scalar::<f32>()?, self.on_target(&weights)?);
            bar.set_message(format!("loss {loss:.4}  \"{}\" {on_target:.4}", self.target_word));
            bar.inc(1);
        }
        bar.finish();
        Ok(())
    }
}

fn look(layer: &SelfAttention, embeddings: &Tensor) -> Result<Look> {
    let (output, weights) = layer.forward_with_weights(embeddings)?;
    Ok(Look { output, weights: weights.mean(0)? })
}
