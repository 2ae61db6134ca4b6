//! How the backward pass is cut into tasks.
//!
//! The gradient of a bias that heads or sequences share is a sum over them, and a sum has an order: the heads of a *chain*
//! are computed one after the other and add to one matrix. Few chains would leave threads idle, so there are several for
//! one bias, each with a matrix of its own, *side by side*, which are added up at the end.

/// Tasks to aim for, where heads are few, and the fewest keys that are worth a task of their own.
const TASKS: usize = 8;
const KEYS_PER_TASK: usize = 384;

pub(crate) struct Chains {
    batch: usize,
    kv_heads: usize,
    /// Whether each sequence, and each head, has a bias of its own.
    own: (bool, bool),
    /// Biases that are sums of their own.
    slots: usize,
    pub(crate) side_by_side: usize,
    by_key: bool,
}

impl Chains {
    /// `bias_dims`: the four axes of a bias whose gradient is wanted; an axis of one place is shared.
    pub(crate) fn new(batch: usize, kv_heads: usize, bias_dims: Option<[usize; 4]>) -> Self {
        let own = bias_dims.map_or((true, true), |dims| (dims[0] == batch, dims[1] != 1 || kv_heads == 1));
        let slots = if own.0 { batch } else { 1 } * if own.1 { kv_heads } else { 1 };
        let side_by_side = (batch * kv_heads / slots).min(TASKS.div_ceil(slots));
        Self { batch, kv_heads, own, slots, side_by_side, by_key: bias_dims.is_none_or(|dims| dims[3] != 1) }
    }

    pub(crate) fn count(&self) -> usize {
        self.slots * self.side_by_side
    }

    /// Shares of the keys for each chain: of two that write to the same places of a bias there can only be one.
    pub(crate) fn splits(&self, kv_len: usize) -> usize {
        let worthwhile = TASKS.div_ceil(self.count()).min(kv_len.div_ceil(KEYS_PER_TASK)).max(1);
        if self.by_key { worthwhile } else { 1 }
    }

    /// Which of the matrices side by side a chain adds to.
    pub(crate) fn side(&self, chain: usize) -> usize {
        chain % self.side_by_side
    }

    /// Sequence and key head of each of a chain's tasks, in their order.
    pub(crate) fn members(&self, chain: usize) -> impl Iterator<Item = (usize, usize)> {
        let slot = chain / self.side_by_side;
        let (batch, kv_heads, own) = (self.batch, self.kv_heads, self.own);
        let member = move |m: usize| match own {
            (true, true) => (slot / kv_heads, slot % kv_heads),
            (true, false) => (slot, m),
            (false, true) => (m, slot),
            (false, false) => (m / kv_heads, m % kv_heads),
        };
        (self.side(chain)..batch * kv_heads / self.slots).step_by(self.side_by_side).map(member)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_cover_every_head_once() {
        for (batch, kv_heads) in [(1, 1), (1, 8), (3, 1), (3, 4), (16, 2), (1, 100)] {
            for bias_dims in
                [None, Some([1, 1, 5, 5]), Some([batch, 1, 5, 5]), Some([1, 9, 5, 1]), Some([batch, 9, 1, 5])]
            {
                let chains = Chains::new(batch, kv_heads, bias_dims);
                let mut all: Vec<_> = (0..chains.count()).flat_map(|chain| chains.members(chain)).collect();
                all.sort();
                let expected: Vec<_> = (0..batch).flat_map(|b| (0..kv_heads).map(move |h| (b, h))).collect();
                assert_eq!(all, expected, "{batch} {kv_heads} {bias_dims:?}");
            }
        }
    }
}
