//! How the work of attention is divided among ranks.

use std::ops::Range;

use attention_kernels::mask::{Coverage, Rule, ScoreShape};

use super::split::Split;
use crate::error::Result;
use crate::mask::Mask;

impl Split {
    /// The pairs of query and key that the mask shows each rank's queries, over `batch` sequences and `num_heads` heads: the work
    /// of attention is proportional to them.
    ///
    /// # Errors
    ///
    /// A mask that doesn't fit scores (batch, num_heads, len, len).
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::Mask;
    /// use candle_attention::parallel::{Order, Split};
    ///
    /// let pairs = |order| Split::new(8, 2, order)?.visible_pairs(&Mask::causal(), 1, 1);
    /// assert_eq!(pairs(Order::Contiguous)?, [10, 26]);
    /// assert_eq!(pairs(Order::ZigZag)?, [18, 18]);
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    pub fn visible_pairs(&self, mask: &Mask, batch: usize, num_heads: usize) -> Result<Vec<u64>> {
        let (rule, shape) = (mask.rule(), ScoreShape { batch, num_heads, q_len: self.len(), kv_len: self.len() });
        rule.check(&shape)?;
        // What all sequences or heads have in common is counted once.
        let (sequences, of_each) = if rule.varies_by_sequence() { (batch, 1) } else { (batch.min(1), batch) };
        let (heads, of_each_head) = if rule.varies_by_head() { (num_heads, 1) } else { (num_heads.min(1), num_heads) };
        let of_rank = |rank: usize| {
            let places = (0..sequences).flat_map(|b| (0..heads).map(move |h| (b, h)));
            let pairs = places.map(|at| {
                let blocks = self.positions(rank);
                blocks.into_iter().map(|q| count(rule, &shape, at, q, 0..self.len())).sum::<u64>()
            });
            pairs.sum::<u64>() * of_each as u64 * of_each_head as u64
        };
        Ok((0..self.ranks()).map(of_rank).collect())
    }
}

/// The visible pairs of a tile, which is cut in two until the rule knows.
fn count(rule: &Rule, shape: &ScoreShape, at: (usize, usize), q: Range<usize>, k: Range<usize>) -> u64 {
    match rule.tile(shape, at, &q, &k) {
        Coverage::None => 0,
        Coverage::All => q.len() as u64 * k.len() as u64,
        Coverage::Some if q.len() == 1 && k.len() == 1 => u64::from(rule.allows(shape, at.0, at.1, q.start, k.start)),
        Coverage::Some => {
            let middle = |range: &Range<usize>| range.start + range.len() / 2;
            let [(q1, k1), (q2, k2)] = if q.len() >= k.len() {
                [(q.start..middle(&q), k.clone()), (middle(&q)..q.end, k)]
            } else {
                [(q.clone(), k.start..middle(&k)), (q, middle(&k)..k.end)]
            };
            count(rule, shape, at, q1, k1) + count(rule, shape, at, q2, k2)
        }
    }
}
