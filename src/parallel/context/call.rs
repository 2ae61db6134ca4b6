//! [`Call`]: one call of attention, on one process or over the tokens of several ranks.

use attention_kernels::mask::ScoreShape;
use attention_kernels::{
    self as kernels, BackwardOptions, Gradients, Incoming, Layout, Number, Output, Problem, ProblemOptions, Saved,
    SimdFloat, View,
};

use super::numbers::{Dtype, checked};
use super::ring::Ring;
use super::ulysses::Ulysses;
use super::{ContextParallel, Scheme};
use crate::check::{log_bound_of_scores, scores_may_overflow};
use crate::error::{AttentionError, Result};

/// This rank's tensors, and what is done to the scores of the whole.
pub(crate) struct Call<'a, E: Number> {
    /// (batch, num_heads, own len, head_dim)
    pub(crate) q: View<'a, E>,
    /// (batch, num_kv_heads, own len, head_dim)
    pub(crate) k: View<'a, E>,
    /// (batch, num_kv_heads, own len, value_dim)
    pub(crate) v: View<'a, E>,
    /// Mask, bias and slopes are those of the whole sequence.
    pub(crate) options: ProblemOptions<'a, E::Float>,
    /// The order in memory of the results.
    pub(crate) layout: Layout,
}

impl<E: Dtype> Call<'_, E> {
    /// The sizes of the context.
    pub(crate) fn context_dims(&self) -> [usize; 4] {
        let [batch, num_heads, len, _] = self.q.dims();
        [batch, num_heads, len, self.v.dims()[3]]
    }

    /// Context and log-sum-exp of this rank's tokens.
    pub(crate) fn forward(&self, parallel: Option<&ContextParallel>) -> Result<Output<E>> {
        let Some(parallel) = parallel else { return checked(kernels::forward(&self.problem()?, self.layout)) };
        if self.is_empty(parallel) {
            return Ok(Output { context: Vec::new(), logsumexp: Vec::new() });
        }
        self.check_range(parallel)?;
        match parallel.scheme {
            Scheme::Ring => Ring::new(parallel, self).forward(),
            Scheme::Ulysses => Ulysses::new(parallel, self).forward(),
        }
    }

    /// The gradients of this rank's queries, keys and values, and that of the bias on one process.
    pub(crate) fn backward(
        &self,
        parallel: Option<&ContextParallel>,
        saved: Saved<E>,
        incoming: Incoming<E>,
        bias: bool,
    ) -> Result<Gradients<E>> {
        let Some(parallel) = parallel else {
            let options = BackwardOptions { layout: self.layout, bias };
            return checked(kernels::backward(&self.problem()?, saved, incoming, options));
        };
        if self.is_empty(parallel) {
            return Ok(Gradients { q: Vec::new(), k: Vec::new(), v: Vec::new(), bias: None });
        }
        match parallel.scheme {
            Scheme::Ring => Ring::new(parallel, self).backward(saved, incoming),
            Scheme::Ulysses => Ulysses::new(parallel, self).backward(saved, incoming),
        }
    }

    fn problem(&self) -> Result<Problem<'_, E>> {
        checked(Problem::new(self.q, self.k, self.v, self.options))
    }

    /// The scores of all ranks together.
    pub(super) fn whole(&self, parallel: &ContextParallel) -> ScoreShape {
        let ([batch, num_heads, ..], len) = (self.q.dims(), parallel.split.len());
        ScoreShape { batch, num_heads, q_len: len, kv_len: len }
    }

    /// Whether all ranks together have no scores. None of them sends anything then.
    fn is_empty(&self, parallel: &ContextParallel) -> bool {
        let ScoreShape { batch, num_heads, q_len, .. } = self.whole(parallel);
        [batch, num_heads, q_len].contains(&0)
    }

    /// Query heads that share a key head.
    pub(super) fn group(&self) -> usize {
        self.q.dims()[1] / self.k.dims()[1].max(1)
    }

    /// Refuses numbers, on every rank, so large that scores might overflow. One process then computes with every score in memory, which
    /// ranks don't.
    fn check_range(&self, parallel: &ContextParallel) -> Result<()> {
        let own = [self.q, self.k].map(|x| largest(x).to_le_bytes()).concat();
        let mut all = [0f64; 2];
        for bytes in parallel.communicator.all_gather_bytes(&own)? {
            for (largest, bytes) in all.iter_mut().zip(bytes.chunks_exact(8)) {
                *largest = largest.max(f64::from_le_bytes(bytes.try_into().unwrap_or_default()));
            }
        }
        let head_dim = self.q.dims()[3];
        let scale = self.options.scale.unwrap_or(1.0 / (head_dim as f64).sqrt());
        if scores_may_overflow(log_bound_of_scores(all, head_dim, scale), E::DTYPE) {
            let (expected, got) = ("scores that can't overflow, over several ranks", "larger queries and keys");
            return Err(AttentionError::Backend { expected, got }.into());
        }
        Ok(())
    }
}

/// The largest magnitude of the finite numbers of a tensor.
fn largest<E: Number>(x: View<E>) -> f64 {
    let [batch, heads, len, _] = x.dims();
    let mut largest = 0f64;
    for row in 0..batch * heads * len {
        let (b, h, i) = (row / (heads * len), row / len % heads, row % len);
        let magnitudes = x.row(b, h, i).iter().map(|x| x.widen().to_f64().abs());
        largest = magnitudes.filter(|x| x.is_finite()).fold(largest, f64::max);
    }
    largest
}
