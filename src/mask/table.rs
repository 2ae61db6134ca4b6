//! A boolean tensor as a mask.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::{Coverage, ScoreShape};
use crate::error::AttentionError;

/// A boolean tensor: (batch or 1, num_heads or 1, q_len or 1, kv_len or 1), row by row.
#[derive(Debug)]
pub(crate) struct Table {
    pub(super) dims: [usize; 4],
    allowed: Vec<bool>,
}

impl Table {
    pub(super) fn new(tensor: &Tensor, allows: impl Fn(i64) -> bool) -> candle_core::Result<Self> {
        if !tensor.dtype().is_int() {
            return Err(AttentionError::DType {
                tensor: "mask",
                expected: "u8 or another integer (a float mask is added to the scores: pass it as attn_bias)".into(),
                got: tensor.dtype(),
            }
            .into());
        }
        let rank = tensor.rank();
        if !(2..=4).contains(&rank) {
            return Err(AttentionError::Rank {
                tensor: "mask",
                expected: "2 to 4 axes that broadcast to (batch, num_heads, q_len, kv_len)",
                shape: tensor.dims().to_vec(),
            }
            .into());
        }
        let mut dims = [1; 4];
        dims[4 - rank..].copy_from_slice(tensor.dims());
        let values = tensor.to_device(&Device::Cpu)?.flatten_all()?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        Ok(Self { dims, allowed: values.into_iter().map(allows).collect() })
    }

    pub(super) fn check(&self, shape: &ScoreShape) -> Result<(), AttentionError> {
        let scores = [shape.batch, shape.num_heads, shape.q_len, shape.kv_len];
        if self.dims.iter().zip(scores).all(|(&dim, size)| dim == size || dim == 1) {
            return Ok(());
        }
        Err(AttentionError::Mask {
            part: "tensor",
            expected: format!("a shape that broadcasts to (batch, num_heads, q_len, kv_len) = {scores:?}"),
            got: format!("{:?}", self.dims),
        })
    }

    /// Where the entry of query `i` and key `j` is, and how far apart those of queries and of keys are.
    fn place(&self, (b, h): (usize, usize), i: usize, j: usize) -> (usize, usize, usize) {
        let at = |axis: usize, index: usize| if self.dims[axis] == 1 { 0 } else { index };
        let row = (at(0, b) * self.dims[1] + at(1, h)) * self.dims[2] + at(2, i);
        (row * self.dims[3] + at(3, j), at(2, self.dims[3]), at(3, 1))
    }

    pub(super) fn get(&self, b: usize, h: usize, i: usize, j: usize) -> bool {
        self.allowed[self.place((b, h), i, j).0]
    }

    /// `q`, or one of it where all are alike.
    fn distinct(&self, q: &Range<usize>) -> usize {
        if self.dims[2] == 1 { q.len().min(1) } else { q.len() }
    }

    /// Whether any query of `q` may attend to key `j`.
    pub(super) fn is_seen(&self, at: (usize, usize), q: &Range<usize>, j: usize) -> bool {
        let (place, by_query, _) = self.place(at, q.start, j);
        (0..self.distinct(q)).any(|i| self.allowed[place + i * by_query])
    }

    pub(super) fn hidden(&self, at: (usize, usize), q: &Range<usize>, j: usize, hide: &mut dyn FnMut(Range<usize>)) {
        let (place, by_query, _) = self.place(at, q.start, j);
        if by_query == 0 {
            if !self.allowed[place] {
                hide(q.clone());
            }
            return;
        }
        for i in (0..q.len()).filter(|i| !self.allowed[place + i * by_query]) {
            hide(q.start + i..q.start + i + 1);
        }
    }

    pub(super) fn tile(&self, at: (usize, usize), q: &Range<usize>, k: &Range<usize>) -> Coverage {
        let (place, by_query, by_key) = self.place(at, q.start, k.start);
        let keys = if by_key == 0 { 1 } else { k.len() };
        let first = self.allowed[place];
        let is_mixed = |i: usize| self.allowed[place + i * by_query..][..keys].iter().any(|&allowed| allowed != first);
        if (0..self.distinct(q)).any(is_mixed) {
            Coverage::Some
        } else if first {
            Coverage::All
        } else {
            Coverage::None
        }
    }
}
