//! How ranks divide what they share.

use std::ops::Range;

/// A rank's share of so many items: consecutive ones, in the order of the ranks. The first ranks have one more if not all can have as many.
pub(super) fn share(count: usize, rank: usize, size: usize) -> Range<usize> {
    let (each, more) = (count / size, count % size);
    let first = |rank: usize| rank * each + rank.min(more);
    first(rank)..first(rank + 1)
}
