//! Writing: one character after another, each drawn from the distribution that the model gives.

use anyhow::Result;
use attention_examples::random::Random;
use candle_core::{DType, Device, Tensor};

use crate::model::Gpt;

/// How characters are drawn.
pub struct Sampling {
    pub characters: usize,
    pub temperature: f64,
    pub seed: u64,
    /// Whether keys and values of earlier characters are kept, or computed again for each character.
    pub use_cache: bool,
}

impl Sampling {
    /// The characters that follow the prompt.
    ///
    /// The model never reads more than the `len` characters of its training. Once there are more, it continues from the
    /// last `len` / 2 of them.
    pub fn write(&self, model: &Gpt, prompt: &[u32], device: &Device) -> Result<Vec<u32>> {
        let mut random = Random::new(self.seed, "sample", 0);
        let len = model.config().len;
        let mut seen = prompt[prompt.len().saturating_sub(len)..].to_vec();
        let (mut caches, mut cached) = (model.caches()?, 0);
        let mut written = Vec::new();
        while written.len() < self.characters {
            if seen.len() > len {
                seen.drain(..seen.len() - (len / 2).max(1));
                (caches, cached) = (model.caches()?, 0);
            }
            let tokens = Tensor::new(&seen[cached..], device)?.unsqueeze(0)?;
            let logits = if self.use_cache {
                cached = seen.len();
                model.forward_cached(&tokens, &mut caches)?
            } else {
                model.forward(&tokens)?
            };
            let last = logits.squeeze(0)?.get(tokens.dim(1)? - 1)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            let next = self.choose(&last, &mut random);
            seen.push(next);
            written.push(next);
        }
        Ok(written)
    }

    /// Draws from softmax(logits / temperature), or takes the likeliest if the temperature is 0.
    fn choose(&self, logits: &[f32], random: &mut Random) -> u32 {
        let likeliest = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
        if self.temperature == 0.0 {
            return likeliest as u32;
        }
        let chance = |logit: &f32| (f64::from(logit - logits[likeliest]) / self.temperature).exp();
        let mut left = random.unit() * logits.iter().map(chance).sum::<f64>();
        let drawn = logits.iter().position(|logit| {
            left -= chance(logit);
            left < 0.0
        });
        drawn.unwrap_or(likeliest) as u32
    }
}
