//! A boolean tensor as a mask.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::{Coverage, ScoreShape};
use crate::error::MaskError;
use crate::fnv;

/// The axes that a table was given with, out of (batch, num_heads, q_len, kv_len). The others have length 1. Errors name these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableAxes {
    /// The last axes, as many as the number says.
    Last(usize),
    /// (batch, kv_len)
    Padding,
}

/// A boolean tensor (batch or 1, num_heads or 1, q_len or 1, kv_len or 1), row by row.
#[derive(Debug)]
pub struct Table {
    pub(super) dims: [usize; 4],
    axes: TableAxes,
    entries: Arc<Entries>,
}

/// The entries, row by row, which tables of other shapes may share.
#[derive(Debug)]
struct Entries {
    allowed: Vec<bool>,
    hash: OnceLock<u64>,
}

impl Table {
    /// `allowed` holds the entries row by row; true means that the query may attend to the key.
    ///
    /// # Errors
    ///
    /// Another number of entries than `dims` says.
    pub fn new(dims: [usize; 4], allowed: Vec<bool>) -> Result<Self, MaskError> {
        check_count(dims, allowed.len())?;
        let entries = Arc::new(Entries { allowed, hash: OnceLock::new() });
        Ok(Self { dims, axes: TableAxes::Last(4), entries })
    }

    /// This table, given with these axes.
    pub fn with_axes(self, axes: TableAxes) -> Self {
        Self { axes, ..self }
    }

    /// The axes that the table was given with.
    pub fn axes(&self) -> TableAxes {
        self.axes
    }

    /// The shape that the table was given with.
    pub fn shape(&self) -> Vec<usize> {
        match self.axes {
            TableAxes::Last(count) => self.dims[4usize.saturating_sub(count)..].to_vec(),
            TableAxes::Padding => vec![self.dims[0], self.dims[3]],
        }
    }

    /// The same entries in another shape of four axes, without a copy.
    ///
    /// # Errors
    ///
    /// Another number of entries than `dims` says.
    pub fn reshaped(&self, dims: [usize; 4]) -> Result<Self, MaskError> {
        check_count(dims, self.allowed().len())?;
        Ok(Self { dims, axes: TableAxes::Last(4), entries: self.entries.clone() })
    }

    /// The table of some of the heads. One that is the same for all heads stays as it is.
    ///
    /// # Errors
    ///
    /// Heads that the table doesn't have.
    pub fn of_heads(&self, heads: Range<usize>) -> Result<Self, MaskError> {
        let [batch, count, rows, keys] = self.dims;
        if count == 1 {
            return Ok(Self { dims: self.dims, axes: self.axes, entries: self.entries.clone() });
        }
        if heads.start > heads.end || heads.end > count {
            let (part, expected) = ("tensor", format!("at least {} heads", heads.end));
            return Err(MaskError { part, expected, got: count.to_string() });
        }
        let entries = |b: usize| (b * count + heads.start) * rows * keys..(b * count + heads.end) * rows * keys;
        let allowed = (0..batch).flat_map(|b| &self.allowed()[entries(b)]).copied().collect();
        Self::new([batch, heads.len(), rows, keys], allowed)
    }

    /// The lengths of the four axes.
    pub(crate) fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// The entries, row by row.
    pub(crate) fn allowed(&self) -> &[bool] {
        &self.entries.allowed
    }

    /// A hash of the entries, which is computed once: ranks compare their masks in every call.
    pub(super) fn hash(&self) -> u64 {
        // As many entries as a number has bits.
        let word = |bits: &[bool]| bits.iter().fold(1u64, |word, &bit| word << 1 | u64::from(bit));
        *self.entries.hash.get_or_init(|| fnv::hash(self.allowed().chunks(64).map(word)))
    }

    pub(super) fn check(&self, shape: &ScoreShape) -> Result<(), MaskError> {
        let scores = [shape.batch, shape.num_heads, shape.q_len, shape.kv_len];
        if self.dims.iter().zip(scores).all(|(&dim, size)| dim == size || dim == 1) {
            return Ok(());
        }
        let (part, expected) = match self.axes {
            TableAxes::Last(_) => {
                ("tensor", format!("a shape that broadcasts to (batch, num_heads, q_len, kv_len) = {scores:?}"))
            }
            TableAxes::Padding => {
                ("padding mask", format!("a shape that broadcasts to (batch, kv_len) = {:?}", [scores[0], scores[3]]))
            }
        };
        Err(MaskError { part, expected, got: format!("{:?}", self.shape()) })
    }

    /// The index of the entry of query `i` and key `j`, and the strides of queries and of keys.
    fn index(&self, (b, h): (usize, usize), i: usize, j: usize) -> (usize, usize, usize) {
        let at = |axis: usize, index: usize| if self.dims[axis] == 1 { 0 } else { index };
        let row = (at(0, b) * self.dims[1] + at(1, h)) * self.dims[2] + at(2, i);
        (row * self.dims[3] + at(3, j), at(2, self.dims[3]), at(3, 1))
    }

    pub(super) fn get(&self, b: usize, h: usize, i: usize, j: usize) -> bool {
        self.allowed()[self.index((b, h), i, j).0]
    }

    /// How many rows of the table the queries `q` have.
    fn distinct(&self, q: &Range<usize>) -> usize {
        if self.dims[2] == 1 { q.len().min(1) } else { q.len() }
    }

    /// Whether any query of `q` may attend to key `j`.
    pub(super) fn is_seen(&self, at: (usize, usize), q: &Range<usize>, j: usize) -> bool {
        let (first, query_stride, _) = self.index(at, q.start, j);
        (0..self.distinct(q)).any(|i| self.allowed()[first + i * query_stride])
    }

    pub(super) fn hidden(&self, at: (usize, usize), q: &Range<usize>, j: usize, hide: &mut dyn FnMut(Range<usize>)) {
        let (first, query_stride, _) = self.index(at, q.start, j);
        if query_stride == 0 {
            if !self.allowed()[first] {
                hide(q.clone());
            }
            return;
        }
        for i in (0..q.len()).filter(|i| !self.allowed()[first + i * query_stride]) {
            hide(q.start + i..q.start + i + 1);
        }
    }

    pub(super) fn tile(&self, at: (usize, usize), q: &Range<usize>, k: &Range<usize>) -> Coverage {
        let (first, query_stride, key_stride) = self.index(at, q.start, k.start);
        let keys = if key_stride == 0 { 1 } else { k.len() };
        let allowed = self.allowed();
        let value = allowed[first];
        let is_mixed = |i: usize| allowed[first + i * query_stride..][..keys].iter().any(|&entry| entry != value);
        if (0..self.distinct(q)).any(is_mixed) {
            Coverage::Some
        } else if value {
            Coverage::All
        } else {
            Coverage::None
        }
    }
}

fn check_count(dims: [usize; 4], entries: usize) -> Result<(), MaskError> {
    if dims.iter().try_fold(1usize, |entries, &dim| entries.checked_mul(dim)) == Some(entries) {
        return Ok(());
    }
    let expected = format!("one entry for each of {dims:?}");
    Err(MaskError { part: "tensor", expected, got: entries.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_the_same_entries_share_their_hash() {
        let table = Table::new([1, 1, 2, 3], vec![true, false, true, true, true, false]).unwrap();
        let other = table.reshaped([1, 2, 1, 3]).unwrap();
        let hash = table.hash();
        assert_eq!(other.entries.hash.get(), Some(&hash));
        assert_ne!(Table::new([1, 1, 2, 3], vec![true; 6]).unwrap().hash(), hash);
    }
}
