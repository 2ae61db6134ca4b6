//! Masks as plain values, to be sampled, printed and built for some of the sequences of a batch.

use candle_attention::Mask;
use candle_core::{Device, Result, Tensor};

use crate::common::Random;

use super::problem::Sizes;

/// Every way to make a mask.
#[derive(Clone, Debug)]
pub enum MaskKind {
    Full,
    Causal,
    CausalAt(i64),
    /// Another offset for each sequence.
    CausalAtEach(i64),
    Window(Option<usize>, Option<usize>),
    Sliding(usize),
    KeyLengths,
    Prefix(usize),
    Documents,
    DocumentIds,
    /// A random tensor over some of the axes, which are named as in (b, h, q, k).
    Allowed(&'static str),
    Blocked(&'static str),
    Padding,
    /// A mask of all keys except the last few, to which every query may attend.
    Extra(Box<MaskKind>, usize),
    And(Box<MaskKind>, Box<MaskKind>),
    Or(Box<MaskKind>, Box<MaskKind>),
}

/// Each kind of mask, and some combinations.
pub fn all() -> Vec<MaskKind> {
    use MaskKind::*;
    vec![
        Full,
        Causal,
        CausalAt(3),
        CausalAt(-20),
        Window(Some(4), Some(6)),
        Window(None, Some(2)),
        Window(Some(40), None),
        Sliding(5),
        KeyLengths,
        Prefix(3).or(Causal),
        Documents.and(Causal),
        DocumentIds,
        Allowed("bhqk"),
        Allowed("qk"),
        Blocked("hk"),
        Padding,
        Causal.and(KeyLengths).or(Sliding(2)),
        Causal.with_extra_keys(1),
        Allowed("bqk").and(KeyLengths).with_extra_keys(2),
        Sliding(5).with_extra_keys(3),
    ]
}

impl MaskKind {
    pub fn and(self, other: MaskKind) -> Self {
        MaskKind::And(Box::new(self), Box::new(other))
    }

    pub fn with_extra_keys(self, count: usize) -> Self {
        MaskKind::Extra(Box::new(self), count)
    }

    pub fn or(self, other: MaskKind) -> Self {
        MaskKind::Or(Box::new(self), Box::new(other))
    }

    /// The mask of the sequences from `first` on.
    pub fn build(&self, sizes: &Sizes, first: usize) -> Result<Mask> {
        let Sizes { batch, kv_len, .. } = *sizes;
        let each = |f: &dyn Fn(usize) -> usize| (first..first + batch).map(f).collect::<Vec<_>>();
        // Two thirds of the keys and fewer for each further sequence, down to none.
        let length = |b: usize| (kv_len * 2 / 3).saturating_sub(b * 3);
        Ok(match self {
            MaskKind::Full => Mask::full(),
            MaskKind::Causal => Mask::causal(),
            MaskKind::CausalAt(offset) => Mask::causal().with_offset(*offset),
            MaskKind::CausalAtEach(offset) => {
                let offsets = (first..first + batch).map(|b| offset / (b as i64 + 1)).collect::<Vec<_>>();
                Mask::causal().with_offsets(&offsets)
            }
            MaskKind::Window(left, right) => Mask::window(*left, *right),
            MaskKind::Sliding(width) => Mask::sliding_window(*width),
            MaskKind::KeyLengths => Mask::key_lengths(&each(&length)),
            MaskKind::Prefix(len) => Mask::prefix(*len),
            MaskKind::Documents => Mask::documents(&[kv_len / 3, 0, kv_len - kv_len / 3]),
            MaskKind::DocumentIds => {
                let ids = |b: usize| (0..kv_len).map(|j| ((j + 5 * b) / 20) as u32).collect::<Vec<_>>();
                Mask::document_ids(&each(&|b| b).into_iter().map(ids).collect::<Vec<_>>())
            }
            MaskKind::Allowed(axes) => Mask::from_tensor(&table(sizes, axes, first)?)?,
            MaskKind::Blocked(axes) => Mask::from_blocked(&table(sizes, axes, first)?)?,
            MaskKind::Padding => {
                let padding = each(&length).into_iter().flat_map(|len| (0..kv_len).map(move |j| u8::from(j >= len)));
                Mask::from_padding_mask(&Tensor::from_iter(padding, &Device::Cpu)?.reshape((batch, kv_len))?)?
            }
            MaskKind::Extra(mask, count) => {
                let count = (*count).min(kv_len);
                mask.build(&Sizes { kv_len: kv_len - count, ..*sizes }, first)?.with_extra_keys(count)
            }
            MaskKind::And(a, b) => a.build(sizes, first)? & b.build(sizes, first)?,
            MaskKind::Or(a, b) => a.build(sizes, first)? | b.build(sizes, first)?,
        })
    }
}

/// Zeros and ones, about as many of each, drawn separately for each sequence.
fn table(sizes: &Sizes, axes: &str, first: usize) -> Result<Tensor> {
    let [batch, heads, q_len, kv_len] = sizes.scores(axes);
    let first = if axes.contains('b') { first } else { 0 };
    let sequence = |b: usize| {
        let mut random = Random::new(7 + b as u64);
        (0..heads * q_len * kv_len).map(|_| random.below(2) as u8).collect::<Vec<_>>()
    };
    let drawn = (first..first + batch).flat_map(sequence).collect::<Vec<_>>();
    Tensor::from_vec(drawn, (batch, heads, q_len, kv_len), &Device::Cpu)
}
