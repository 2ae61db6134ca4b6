//! [`Decoder`]: a language model of any kind with this crate's attention, and greedy decoding.

use candle_attention::{CrossAttention, ForwardOptions, KvCache, ProjectedMemory, SelfAttention};
use candle_core::{D, Result, Tensor};
use candle_nn::{Func, Linear, Module};

use super::RelativeBias;

/// Token embeddings, then steps that each add something to every token, then logits.
pub struct Decoder {
    /// (vocabulary, dim)
    pub embeddings: Tensor,
    pub embedding_scale: f64,
    /// Learned embeddings of the positions, (max_len, dim).
    pub positions: Option<Tensor>,
    pub relative_bias: Option<RelativeBias>,
    pub steps: Vec<Step>,
    pub norm: Func<'static>,
    pub head: Linear,
    /// Bounds the logits: softcap · tanh(logits / softcap).
    pub softcap: Option<f64>,
    /// The memory of cross-attention.
    pub memory: Option<Tensor>,
}

/// h + after(inner(before(h))).
pub struct Step {
    pub before: Func<'static>,
    pub inner: Inner,
    pub after: Option<Func<'static>>,
}

pub enum Inner {
    SelfAttention(SelfAttention),
    CrossAttention(CrossAttention),
    FeedForward(Func<'static>),
}

/// What a decoder keeps of earlier tokens.
pub struct Past {
    len: usize,
    steps: Vec<Kept>,
}

/// What a step keeps.
enum Kept {
    Tokens(KvCache),
    Memory(ProjectedMemory),
    Nothing,
}

impl Decoder {
    /// A past without tokens, for a batch of this size.
    pub fn past(&self, batch: usize) -> Result<Past> {
        let keep = |step: &Step| -> Result<Kept> {
            Ok(match &step.inner {
                Inner::SelfAttention(attention) => Kept::Tokens(attention.kv_cache(batch)?),
                Inner::CrossAttention(attention) => Kept::Memory(attention.project(self.memory())?),
                Inner::FeedForward(_) => Kept::Nothing,
            })
        };
        Ok(Past { len: 0, steps: self.steps.iter().map(keep).collect::<Result<_>>()? })
    }

    /// The logits (batch, vocabulary) of the token after these tokens (batch, len), computed from all of them.
    pub fn logits(&self, tokens: &Tensor) -> Result<Tensor> {
        let mut x = self.embed(tokens, 0)?;
        let bias = self.bias(tokens.dim(1)?, 0)?;
        for step in &self.steps {
            let normed = step.before.forward(&x)?;
            let inner = match &step.inner {
                Inner::SelfAttention(attention) => attention.forward_with(&normed, &with_bias(&bias))?.output,
                Inner::CrossAttention(attention) => attention.forward(&normed, self.memory())?,
                Inner::FeedForward(map) => map.forward(&normed)?,
            };
            x = step.add(&x, inner)?;
        }
        self.finish(&x)
    }

    /// As [`Decoder::logits`], for tokens that follow those of the past. They are added to the past.
    pub fn logits_after(&self, tokens: &Tensor, past: &mut Past) -> Result<Tensor> {
        let mut x = self.embed(tokens, past.len)?;
        let bias = self.bias(tokens.dim(1)?, past.len)?;
        for (step, kept) in self.steps.iter().zip(&mut past.steps) {
            let normed = step.before.forward(&x)?;
            let inner = match (&step.inner, kept) {
                (Inner::SelfAttention(attention), Kept::Tokens(cache)) => {
                    attention.forward_cached_with(&normed, cache, &with_bias(&bias))?.output
                }
                (Inner::CrossAttention(attention), Kept::Memory(memory)) => {
                    attention.forward_projected(&normed, memory)?
                }
                (Inner::FeedForward(map), Kept::Nothing) => map.forward(&normed)?,
                _ => panic!("the past of another decoder"),
            };
            x = step.add(&x, inner)?;
        }
        past.len += tokens.dim(1)?;
        self.finish(&x)
    }

    /// Greedy decoding: the next tokens (batch, count), each the likeliest one, and the logits of each step. If
    /// `cached`, each step computes only the new token, otherwise all tokens.
    pub fn greedy(&self, prompt: &Tensor, count: usize, cached: bool) -> Result<(Tensor, Vec<Tensor>)> {
        let mut past = self.past(prompt.dim(0)?)?;
        let (mut tokens, mut newest) = (prompt.clone(), prompt.clone());
        let mut all_logits = Vec::new();
        for _ in 0..count {
            let logits = if cached { self.logits_after(&newest, &mut past)? } else { self.logits(&tokens)? };
            newest = logits.argmax_keepdim(D::Minus1)?;
            tokens = Tensor::cat(&[&tokens, &newest], 1)?;
            all_logits.push(logits);
        }
        Ok((tokens.narrow(1, prompt.dim(1)?, count)?, all_logits))
    }

    fn memory(&self) -> &Tensor {
        self.memory.as_ref().expect("a memory for cross-attention")
    }

    /// The embeddings (batch, len, dim) of tokens from position `start` on.
    fn embed(&self, tokens: &Tensor, start: usize) -> Result<Tensor> {
        let (batch, len) = tokens.dims2()?;
        let embedded = self.embeddings.index_select(&tokens.flatten_all()?, 0)?.reshape((batch, len, ()))?;
        let embedded = (embedded * self.embedding_scale)?;
        match &self.positions {
            Some(positions) => embedded.broadcast_add(&positions.narrow(0, start, len)?),
            None => Ok(embedded),
        }
    }

    fn bias(&self, len: usize, past: usize) -> Result<Option<Tensor>> {
        self.relative_bias.as_ref().map(|bias| bias.scores(len, past + len)).transpose()
    }

    /// The logits of the last token.
    fn finish(&self, x: &Tensor) -> Result<Tensor> {
        let last = x.narrow(1, x.dim(1)? - 1, 1)?.squeeze(1)?.contiguous()?;
        let logits = self.head.forward(&self.norm.forward(&last)?)?;
        match self.softcap {
            Some(softcap) => (logits / softcap)?.tanh()? * softcap,
            None => Ok(logits),
        }
    }
}

impl Step {
    fn add(&self, x: &Tensor, inner: Tensor) -> Result<Tensor> {
        match &self.after {
            Some(after) => x + after.forward(&inner)?,
            None => x + inner,
        }
    }
}

fn with_bias(bias: &Option<Tensor>) -> ForwardOptions {
    ForwardOptions { attn_bias: bias.clone(), ..Default::default() }
}
