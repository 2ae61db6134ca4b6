//! [`Split`]: which tokens of a sequence each rank holds.

use std::ops::Range;

use candle_core::Tensor;

use crate::error::{AttentionError, Result};
use crate::parallel::communicator::Communicator;

/// In which order the tokens of a sequence are dealt to the ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Rank r of n holds part r of n. It suits masks that show every query about as many keys: none, windows, documents.
    #[default]
    Contiguous,
    /// Rank r of n holds parts r and 2n - 1 - r of 2n: an early part and a late one. Under a causal mask, which shows a query all
    /// keys before it, every rank then has the same work. With `Contiguous` the last rank has nearly twice the mean.
    ///
    /// Source: Grattafiori et al., "The Llama 3 Herd of Models" (2024), section 3.3.2. Brandon et al., "Striped Attention" (2023),
    /// balance the work token by token instead.
    ZigZag,
}

/// How a sequence of `len` tokens is split across ranks. Any length goes with any number of ranks: the parts differ by at most a token
/// each, and of more ranks than tokens some hold none.
///
/// # Examples
///
/// ```
/// use candle_attention::parallel::{Order, Split};
/// use candle_core::{Device, Tensor};
///
/// let split = Split::new(8, 2, Order::ZigZag)?;
/// assert_eq!(split.positions(0), [0..2, 6..8]);
/// assert_eq!(split.positions(1), [2..6]);
///
/// // The tokens of each rank, and the whole again.
/// let x = Tensor::arange(0u32, 8, &Device::Cpu)?;
/// let parts = [split.shard(&x, 0, 0)?, split.shard(&x, 0, 1)?];
/// assert_eq!(parts[0].to_vec1::<u32>()?, [0, 1, 6, 7]);
/// assert_eq!(split.join(&parts, 0)?.to_vec1::<u32>()?, x.to_vec1::<u32>()?);
/// # Ok::<(), candle_attention::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    len: usize,
    ranks: usize,
    order: Order,
}

impl Split {
    /// A split of `len` tokens.
    ///
    /// # Errors
    ///
    /// No ranks.
    pub fn new(len: usize, ranks: usize, order: Order) -> Result<Self> {
        if ranks == 0 {
            return Err(AttentionError::Number { name: "ranks of a split", expected: "at least 1", got: 0.0 }.into());
        }
        Ok(Self { len, ranks, order })
    }

    /// Tokens of the whole sequence.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the sequence has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// The order of the tokens.
    pub fn order(&self) -> Order {
        self.order
    }

    /// The positions of a rank's tokens, in the order in which it holds them: at most two ranges, which aren't empty. A rank that there
    /// isn't has none.
    pub fn positions(&self, rank: usize) -> Vec<Range<usize>> {
        if rank >= self.ranks {
            return Vec::new();
        }
        let mut parts = match self.order {
            Order::Contiguous => vec![self.part(rank, self.ranks)],
            Order::ZigZag => {
                let parts = self.ranks.saturating_mul(2);
                vec![self.part(rank, parts), self.part(parts - 1 - rank, parts)]
            }
        };
        if let [first, second] = &mut parts[..]
            && first.end == second.start
        {
            // The two parts of the last rank are neighbours.
            (first.end, second.start) = (second.end, second.end);
        }
        parts.retain(|part| !part.is_empty());
        parts
    }

    /// How many tokens a rank holds.
    pub fn rank_len(&self, rank: usize) -> usize {
        self.positions(rank).iter().map(Range::len).sum()
    }

    /// Whether every rank holds a token.
    pub(crate) fn has_tokens_everywhere(&self) -> bool {
        (0..self.ranks).all(|rank| self.rank_len(rank) > 0)
    }

    /// The most tokens that a rank holds.
    pub(crate) fn longest(&self) -> usize {
        (0..self.ranks).map(|rank| self.rank_len(rank)).max().unwrap_or(0)
    }

    /// A rank's part of a tensor of the whole sequence, whose tokens are along axis `axis`. It is differentiable.
    ///
    /// # Errors
    ///
    /// No such axis, or one of another length than [`len`](Self::len); a rank that there isn't.
    pub fn shard(&self, x: &Tensor, axis: usize, rank: usize) -> Result<Tensor> {
        self.check("sequence to split", x, axis, self.len)?;
        self.check_rank(rank)?;
        let positions = self.positions(rank);
        let parts = positions.iter().map(|part| x.narrow(axis, part.start, part.len()));
        match &parts.collect::<candle_core::Result<Vec<_>>>()?[..] {
            [] => Ok(x.narrow(axis, 0, 0)?),
            [part] => Ok(part.clone()),
            parts => Ok(Tensor::cat(parts, axis)?),
        }
    }

    /// The whole sequence from the parts of all ranks, in the order of the ranks. It is differentiable.
    ///
    /// # Errors
    ///
    /// Another number of parts than ranks, or parts of other lengths than [`rank_len`](Self::rank_len).
    pub fn join(&self, parts: &[Tensor], axis: usize) -> Result<Tensor> {
        if parts.len() != self.ranks {
            let (name, expected) = ("parts of a sequence", "one of each rank");
            return Err(AttentionError::Number { name, expected, got: parts.len() as f64 }.into());
        }
        let mut pieces = Vec::new();
        for (rank, part) in parts.iter().enumerate() {
            self.check("part of a sequence", part, axis, self.rank_len(rank))?;
            let mut first = 0;
            for positions in self.positions(rank) {
                pieces.push((positions.start, part.narrow(axis, first, positions.len())?));
                first += positions.len();
            }
        }
        pieces.sort_by_key(|(position, _)| *position);
        let pieces: Vec<_> = pieces.into_iter().map(|(_, piece)| piece).collect();
        if pieces.is_empty() { Ok(parts[0].clone()) } else { Ok(Tensor::cat(&pieces, axis)?) }
    }

    /// The whole sequence on every rank, from this rank's part. It carries no gradient.
    ///
    /// # Errors
    ///
    /// As [`join`](Self::join); ranks that disagree; a communicator of another number of ranks.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::parallel::{Order, Split, threads};
    /// use candle_core::{Device, Tensor};
    ///
    /// let split = Split::new(3, 2, Order::ZigZag)?;
    /// let all = threads(2, |communicator| {
    ///     let own = split.positions(communicator.rank()).into_iter().flatten().map(|i| i as u32).collect::<Vec<_>>();
    ///     split.gather(&*communicator, &Tensor::new(own, &Device::Cpu)?, 0)
    /// })?;
    /// assert_eq!(all[1].to_vec1::<u32>()?, [0, 1, 2]);
    /// # Ok::<(), candle_attention::Error>(())
    /// ```
    pub fn gather(&self, communicator: &dyn Communicator, x: &Tensor, axis: usize) -> Result<Tensor> {
        let own = self
            .check_size(communicator)
            .and_then(|()| self.check("part of a sequence", x, axis, self.rank_len(communicator.rank())));
        let others = x.dims().iter().enumerate().filter(|(i, _)| *i != axis).map(|(_, size)| size).collect::<Vec<_>>();
        let text = format!("{:?} {others:?} beside axis {axis}, {self:?}", x.dtype());
        super::agree_on(communicator, "parts of a sequence", text, own.map_err(Into::into))?;
        self.join(&communicator.all_gather(x)?, axis)
    }

    /// Checks that a communicator has as many ranks.
    pub(crate) fn check_size(&self, communicator: &dyn Communicator) -> Result<(), AttentionError> {
        if communicator.size() == self.ranks {
            return Ok(());
        }
        let expected = format!("{}, those of the communicator", communicator.size());
        Err(AttentionError::Config { field: "ranks of a split", expected, got: self.ranks.to_string() })
    }

    fn check_rank(&self, rank: usize) -> Result<(), AttentionError> {
        if rank < self.ranks {
            return Ok(());
        }
        Err(AttentionError::Number { name: "rank", expected: "less than the ranks of the split", got: rank as f64 })
    }

    fn check(&self, tensor: &'static str, x: &Tensor, axis: usize, len: usize) -> Result<(), AttentionError> {
        if x.dims().get(axis) == Some(&len) {
            return Ok(());
        }
        let expected = format!("with {len} tokens along axis {axis}");
        Err(AttentionError::Shape { tensor, expected, shape: x.dims().to_vec() })
    }

    /// Part `i` of `count` parts.
    fn part(&self, i: usize, count: usize) -> Range<usize> {
        // In u128 the products don't overflow.
        let at = |i: usize| (self.len as u128 * i as u128 / count as u128) as usize;
        at(i)..at(i + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_on_one_rank() -> Result<()> {
        for order in [Order::Contiguous, Order::ZigZag] {
            for (len, ranks) in [(0, 1), (0, 3), (1, 1), (3, 7), (16, 4), (101, 7), (1000, 3)] {
                let split = Split::new(len, ranks, order)?;
                let mut positions: Vec<usize> = (0..ranks).flat_map(|rank| split.positions(rank).concat()).collect();
                positions.sort_unstable();
                assert_eq!(positions, (0..len).collect::<Vec<_>>(), "{split:?}");
                let lengths = (0..ranks).map(|rank| split.rank_len(rank));
                assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= 2, "{split:?}");
                assert!((0..ranks).all(|rank| split.positions(rank).len() <= 2));
                assert!(split.positions(ranks).is_empty());
            }
        }
        assert!(Split::new(3, 0, Order::Contiguous).is_err());
        Ok(())
    }

    /// All positions of some ranges.
    trait Concat {
        fn concat(self) -> Vec<usize>;
    }

    impl Concat for Vec<Range<usize>> {
        fn concat(self) -> Vec<usize> {
            self.into_iter().flatten().collect()
        }
    }
}
