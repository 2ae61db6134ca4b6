//! Documents that stand one after the other. Document `d` ends before position `ends[d]`, and the ends never decrease.

use std::ops::Range;

use super::Coverage;

/// The first and the last document that a range of positions has a part of. The range isn't empty.
pub(super) fn documents_of(ends: &[usize], positions: Range<usize>) -> (usize, usize) {
    let document_at = |position| ends.partition_point(|&end| end <= position);
    (document_at(positions.start), document_at(positions.end - 1))
}

/// The positions of all documents that a range of positions has a part of.
pub(super) fn whole_documents(ends: &[usize], positions: Range<usize>) -> Range<usize> {
    let (first, last) = documents_of(ends, positions);
    first.checked_sub(1).map_or(0, |before| ends[before])..ends[last]
}

/// How much of a tile is visible whose queries, and whose keys, belong to documents from the first of a pair to the second.
pub(super) fn coverage<Id: Ord>(queries: (Id, Id), keys: (Id, Id)) -> Coverage {
    if queries.1 < keys.0 || keys.1 < queries.0 {
        Coverage::None
    } else if queries.0 == queries.1 && queries == keys {
        Coverage::All
    } else {
        Coverage::Some
    }
}
