//! A problem as the kernels see it.

use std::any::TypeId;
use std::ops::Range;

use crate::dropout::Dropout;
use crate::dtype::{Number, Source};
use crate::gemm::bf16_tiles;
use crate::mask::{Coverage, Rule, ScoreShape};
use crate::part::{HeadNumbers, Part};
use crate::problem::{BiasView, Problem, ProblemOptions};
use crate::simd::SimdFloat;

/// A problem for kernels that compute in `R`, whatever type the tensors hold.
pub(crate) struct Operands<'a, R> {
    pub(crate) q: &'a dyn Source<R>,
    pub(crate) k: &'a dyn Source<R>,
    pub(crate) v: &'a dyn Source<R>,
    pub(crate) dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) kv_heads: usize,
    /// Query heads that share a key head.
    pub(crate) group: usize,
    /// Whether the tensors hold bf16.
    pub(crate) is_bf16: bool,
    pub(crate) shape: ScoreShape,
    pub(crate) part: Part,
    pub(crate) scale: f64,
    pub(crate) softcap: Option<f64>,
    pub(crate) mask: &'a Rule,
    pub(crate) bias: Option<BiasView<'a, R>>,
    pub(crate) slopes: Option<&'a [R]>,
    pub(crate) dropout: Option<Dropout>,
    pub(crate) heads: Option<HeadNumbers>,
}

impl<E: Number> Problem<'_, E> {
    /// The problem without the type of its tensors.
    pub(crate) fn operands(&self) -> Operands<'_, E::Float> {
        let ProblemOptions { softcap, mask, bias, slopes, dropout, heads, .. } = *self.options();
        let ([q, k, v], shape) = (self.views(), self.shape());
        let [_, kv_heads, _, value_dim] = v.dims();
        Operands {
            q,
            k,
            v,
            dim: q.dims()[3],
            value_dim,
            kv_heads,
            group: shape.num_heads / kv_heads,
            is_bf16: TypeId::of::<E>() == TypeId::of::<half::bf16>(),
            shape,
            part: self.part(),
            scale: self.scale(),
            softcap,
            mask,
            bias,
            slopes,
            dropout,
            heads,
        }
    }
}

impl<R: SimdFloat> Operands<'_, R> {
    /// Whether nothing but the scale and the mask changes the scores.
    #[inline(always)]
    pub(crate) fn has_plain_scores(&self) -> bool {
        self.softcap.is_none() && self.bias.is_none() && self.slopes.is_none()
    }

    /// Whether AMX's tile registers multiply, in all passes but decoding.
    pub(crate) fn is_by_tile_registers(&self) -> bool {
        self.is_bf16 && bf16_tiles::are_available()
    }

    /// Multiplications of the forward pass without a mask.
    pub(crate) fn work(&self) -> usize {
        let ScoreShape { batch, num_heads, q_len, kv_len } = self.shape;
        let sizes = [num_heads, q_len, kv_len, self.dim + self.value_dim];
        sizes.into_iter().fold(batch, usize::saturating_mul)
    }

    /// Whether anything is done to the scores of a tile.
    pub(crate) fn modifies(&self, coverage: Coverage) -> bool {
        !self.has_plain_scores() || coverage == Coverage::Some
    }

    /// Whether a key may be hidden from a query.
    pub(crate) fn hides(&self) -> bool {
        !self.mask.is_full() || self.bias.is_some()
    }

    pub(crate) fn slope(&self, at: (usize, usize)) -> Option<R> {
        let slopes = self.slopes?;
        let is_shared = slopes.len() == self.part.whole.num_heads;
        Some(slopes[if is_shared { self.part.at(at).1 } else { self.part.row(at) }])
    }

    /// The number of a head that dropout counts, among those of all sequences.
    pub(crate) fn head_number(&self, at: (usize, usize)) -> usize {
        let HeadNumbers { first, count } =
            self.heads.unwrap_or(HeadNumbers { first: 0, count: self.part.whole.num_heads });
        let (b, h) = self.part.at(at);
        b * count + first + h
    }

    /// The part of `keys` outside which no query of the tile may attend to any key, and whether all may inside.
    ///
    /// # Panics
    ///
    /// If the mask gives keys that are not among `keys`.
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
        let (part, of_whole) = (&self.part, self.part.keys(&keys));
        let visible = self.mask.visible_keys(&part.whole, part.at(at), &part.queries(queries), of_whole.clone());
        let is_inside = of_whole.start <= visible.start && visible.start <= visible.end && visible.end <= of_whole.end;
        assert!(is_inside, "visible keys lie among those asked for");
        let visible = visible.start - part.first[3]..visible.end - part.first[3];
        let coverage = if visible.is_empty() { Coverage::None } else { self.coverage(at, queries, &visible) };
        // Two rules may have visible keys, and none together.
        let end = if coverage == Coverage::None { visible.start } else { visible.end };
        (visible.start..end, coverage)
    }

    /// How much of a tile the mask shows.
    #[inline(always)]
    pub(crate) fn coverage(&self, at: (usize, usize), queries: &Range<usize>, keys: &Range<usize>) -> Coverage {
        let part = &self.part;
        self.mask.tile(&part.whole, part.at(at), &part.queries(queries), &part.keys(keys))
    }

    /// Calls `hide` with the queries, out of `queries`, that the mask hides a key from.
    #[inline(always)]
    pub(crate) fn hidden(
        &self,
        at: (usize, usize),
        queries: &Range<usize>,
        key: usize,
        mut hide: impl FnMut(Range<usize>),
    ) {
        let (part, first) = (&self.part, self.part.first[2]);
        self.mask.hidden(&part.whole, part.at(at), &part.queries(queries), part.first[3] + key, &mut |hidden| {
            hide(hidden.start - first..hidden.end - first);
        });
    }
}
