//! One call of attention, as the kernels see it: views into memory, and what is done to the scores.

use std::ops::Range;

use super::element::Element;
use super::micro::Rows;
use crate::mask::{Coverage, Mask, ScoreShape};

/// A tensor (batch, heads, len, dim) whose last axis is contiguous.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, E> {
    data: &'a [E],
    /// Of batch, heads and len.
    strides: [usize; 3],
    dims: [usize; 4],
}

impl<'a, E: Element> View<'a, E> {
    /// None if a place of the view would lie outside `data`.
    pub(crate) fn new(data: &'a [E], strides: [usize; 3], dims: [usize; 4]) -> Option<Self> {
        if dims.contains(&0) {
            return Some(Self { data, strides, dims });
        }
        let mut last = dims[3] - 1;
        for (stride, dim) in strides.iter().zip(dims) {
            last = stride.checked_mul(dim - 1)?.checked_add(last)?;
        }
        (last < data.len()).then_some(Self { data, strides, dims })
    }

    pub(crate) fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// The numbers of one place.
    #[inline(always)]
    pub(crate) fn row(&self, b: usize, h: usize, i: usize) -> &'a [E] {
        let [sb, sh, si] = self.strides;
        &self.data[b * sb + h * sh + i * si..][..self.dims[3]]
    }

    /// The rows from a place on, as they are.
    #[inline(always)]
    pub(crate) fn raw_rows(&self, (b, h): (usize, usize), start: usize) -> Rows<*const E> {
        let [sb, sh, si] = self.strides;
        // All that follows, since a pointer may read no further than the slice that it was taken from.
        Rows { start: self.data[b * sb + h * sh + start * si..].as_ptr(), stride: si }
    }

    /// Some rows to compute with: where they are, if they need no widening, else widened to `scratch`.
    #[inline(always)]
    pub(crate) fn rows(
        &self,
        (b, h): (usize, usize),
        range: Range<usize>,
        scratch: &mut [E::Real],
    ) -> Rows<*const E::Real> {
        let [sb, sh, si] = self.strides;
        // All that follows, since a pointer may read no further than the slice that it was taken from.
        if let Some(rest) = E::as_real(&self.data[b * sb + h * sh + range.start * si..]) {
            return Rows { start: rest.as_ptr(), stride: si };
        }
        let dim = self.dims[3];
        for (place, to) in range.zip(scratch.chunks_exact_mut(dim)) {
            E::widen_all(self.row(b, h, place), to);
        }
        Rows { start: scratch.as_ptr(), stride: dim }
    }
}

/// An additive bias that broadcasts to (batch, num_heads, q_len, kv_len).
#[derive(Clone, Copy)]
pub(crate) struct Bias<'a, R> {
    pub(crate) data: &'a [R],
    /// Of all four axes; 0 where it broadcasts.
    pub(crate) strides: [usize; 4],
}

impl<'a, R> Bias<'a, R> {
    /// An axis of one place broadcasts.
    pub(crate) fn new(data: &'a [R], dims: [usize; 4], mut strides: [usize; 4]) -> Self {
        for (stride, dim) in strides.iter_mut().zip(dims) {
            *stride = if dim == 1 { 0 } else { *stride };
        }
        Self { data, strides }
    }
}

/// Dropout: a number below `threshold` drops a weight, the others are multiplied by `keep`.
#[derive(Clone, Copy)]
pub(crate) struct Dropout {
    pub(crate) p: f64,
    pub(crate) seed: u64,
}

pub(crate) struct Problem<'a, E: Element> {
    pub(crate) q: View<'a, E>,
    pub(crate) k: View<'a, E>,
    pub(crate) v: View<'a, E>,
    pub(crate) scale: f64,
    pub(crate) softcap: Option<f64>,
    pub(crate) mask: &'a Mask,
    pub(crate) bias: Option<Bias<'a, E::Real>>,
    /// (num_heads) or (batch, num_heads)
    pub(crate) slopes: Option<&'a [E::Real]>,
    pub(crate) dropout: Option<Dropout>,
}

impl<E: Element> Problem<'_, E> {
    pub(crate) fn shape(&self) -> ScoreShape {
        let [batch, num_heads, q_len, _] = self.q.dims();
        ScoreShape { batch, num_heads, q_len, kv_len: self.k.dims()[2] }
    }

    pub(crate) fn dim(&self) -> usize {
        self.q.dims()[3]
    }

    pub(crate) fn value_dim(&self) -> usize {
        self.v.dims()[3]
    }

    pub(crate) fn kv_heads(&self) -> usize {
        self.k.dims()[1]
    }

    /// Query heads that share a key head.
    pub(crate) fn group(&self) -> usize {
        self.shape().num_heads / self.kv_heads()
    }

    /// Whether anything is done to the scores of a tile.
    pub(crate) fn adjusts(&self, coverage: Coverage) -> bool {
        self.softcap.is_some() || self.bias.is_some() || self.slopes.is_some() || coverage == Coverage::Some
    }

    pub(crate) fn slope(&self, (b, h): (usize, usize)) -> Option<E::Real> {
        let slopes = self.slopes?;
        let heads = self.shape().num_heads;
        Some(slopes[if slopes.len() == heads { h } else { b * heads + h }])
    }

    /// Of the keys in `keys`, the range outside which no query of the tile may attend to any, and whether all may inside.
    #[inline(always)]
    pub(crate) fn visible(
        &self,
        at: (usize, usize),
        queries: &Range<usize>,
        keys: Range<usize>,
    ) -> (Range<usize>, Coverage) {
        if self.mask.is_full() {
            return (keys, Coverage::All);
        }
        let (rule, shape) = (self.mask.rule(), self.shape());
        let keys = rule.hull(&shape, at, queries, keys);
        let coverage = if keys.is_empty() { Coverage::None } else { rule.tile(&shape, at, queries, &keys) };
        // What is hidden wholly may still lie inside the hull of two rules.
        if coverage == Coverage::None { (keys.start..keys.start, coverage) } else { (keys, coverage) }
    }
}
