//! Ring attention: keys and values travel from rank to rank.
//!
//! | forward | backward |
//! |---|---|
//! | keys and values visit the ranks | they visit the ranks again |
//! | each rank attends to those that visit it | each rank computes once more what it did |
//! | it merges the contexts by log-sum-exp | its queries keep their gradients; those of keys and values travel with them, and home at the end |
//!
//! At distance d a rank has the keys of the rank d before it. Distances at which no rank sees anything are skipped. The next keys are
//! under way while a rank computes. All sums are in the order of the distances, whatever arrives first. They are in the type that is
//! computed in, and narrowed once, so that half types are rounded as often as on one process.
//!
//! Source: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (ICLR 2024). The gradients
//! of a step are those of the whole where its weights are exp(s - lse), with the log-sum-exp of the whole: Dao, "FlashAttention-2" (2023), algorithm 2.

use std::ops::Range;

use attention_kernels::mask::{Coverage, Rule, ScoreShape};
use attention_kernels::{
    self as kernels, BackwardOptions, Gradients, Incoming, Layout, LogSumExp, Number, Output, Part, Problem,
    ProblemOptions, Saved, SimdFloat, View,
};
use candle_core::{Tensor, WithDType};

use super::numbers::{Dtype, Place, Target, checked, tensor_of, view, with_numbers};
use super::pieces::{Piece, pieces};
use super::{Call, ContextParallel};
use crate::error::Result;
use crate::parallel::communicator::Pending;

/// Neighbouring tokens of a rank.
#[derive(Clone, Debug)]
struct Block {
    /// In the whole sequence.
    positions: Range<usize>,
    /// Among those of the rank.
    tokens: Range<usize>,
}

/// A block of queries, and their results over the keys so far, if they saw any.
type Attended<R> = (Block, Option<Output<R>>);

/// Gradients of keys and values (batch, kv_heads, len, dim) of a piece, heads first.
struct OfKeys<R> {
    k: Target<R>,
    v: Target<R>,
}

pub(super) struct Ring<'a, 'c, E: Number> {
    parallel: &'a ContextParallel,
    call: &'a Call<'c, E>,
    whole: ScoreShape,
    /// The tokens of each rank.
    blocks: Vec<Vec<Block>>,
    /// How far before a rank those stand whose keys it visits. The first is 0.
    distances: Vec<usize>,
    pieces: Vec<Piece>,
}

impl<'a, 'c, E: Dtype> Ring<'a, 'c, E> {
    pub(super) fn new(parallel: &'a ContextParallel, call: &'a Call<'c, E>) -> Self {
        let whole = call.whole(parallel);
        let ranks = parallel.split.ranks();
        let blocks: Vec<_> = (0..ranks).map(|rank| blocks(parallel, rank)).collect();
        let all = Piece { sequences: 0..whole.batch, kv_heads: 0..call.k.dims()[1] };
        let visits = |distance: &usize| {
            // Under a causal mask the last rank sees all others.
            (0..ranks).rev().any(|rank| {
                let others = &blocks[(rank + ranks - distance) % ranks];
                blocks[rank].iter().any(|own| others.iter().any(|other| sees(call, &whole, &all, own, other)))
            })
        };
        let distances = [0].into_iter().chain((1..ranks).filter(visits)).collect();
        let [batch, kv_heads, _, dim] = call.k.dims();
        let bytes = parallel.split.longest() * (dim + call.v.dims()[3]) * size_of::<E>();
        Self { parallel, call, whole, blocks, distances, pieces: pieces(batch, kv_heads, bytes) }
    }

    pub(super) fn forward(self) -> Result<Output<E>> {
        let dims = self.call.context_dims();
        let mut context = Target::new("context", dims, self.call.layout)?;
        let none = LogSumExp::from_parts(-E::Float::INFINITY, E::Float::ZERO);
        let mut logsumexp = checked(kernels::filled("log-sum-exp", dims[0] * dims[1] * dims[2], none))?;
        for piece in &self.pieces {
            for (own, merged) in self.attend(piece)? {
                let Some(merged) = merged else { continue };
                let place = self.query_place(piece, &own.tokens);
                context.write(&place, &merged.context);
                for ((b, h, i), of_row) in place.rows().zip(merged.logsumexp) {
                    logsumexp[(b * dims[1] + h) * dims[2] + i] = of_row;
                }
            }
        }
        Ok(Output { context: context.numbers, logsumexp })
    }

    /// The results of a piece for each block of this rank's queries.
    fn attend(&self, piece: &Piece) -> Result<Vec<Attended<E::Float>>> {
        let mut results: Vec<Attended<E::Float>> =
            self.blocks_at(0).iter().map(|block| (block.clone(), None)).collect();
        let mut visitor = self.own_keys(piece)?;
        for step in 0..self.distances.len() {
            let next = self.send_on(step, &visitor)?;
            for (own, merged) in &mut results {
                for other in self.blocks_at(self.distances[step]) {
                    if !sees(self.call, &self.whole, piece, own, other) {
                        continue;
                    }
                    let part = self.with_problem(piece, (own, other), &visitor, |problem| {
                        checked(kernels::forward_wide(problem, Layout::HeadsFirst))
                    })?;
                    match merged {
                        None => *merged = Some(part),
                        Some(merged) => checked(merged.merge(&part))?,
                    }
                }
            }
            if let Some(next) = next {
                visitor = next.wait()?;
            }
        }
        Ok(results)
    }

    pub(super) fn backward(self, saved: Saved<E>, incoming: Incoming<E>) -> Result<Gradients<E>> {
        let (call, layout) = (self.call, self.call.layout);
        let mut q = Target::<E>::new("gradient of the query", call.q.dims(), layout)?;
        let mut k = Target::<E>::new("gradient of the key", call.k.dims(), layout)?;
        let mut v = Target::<E>::new("gradient of the value", call.v.dims(), layout)?;
        for piece in &self.pieces {
            let place = self.query_place(piece, &(0..call.q.dims()[2]));
            let mut of_q = Target::new("gradient of the query", place.dims(call.q.dims()[3]), Layout::HeadsFirst)?;
            let of_keys = self.gradients(piece, saved, incoming, &mut of_q)?;
            q.write(&place, &of_q.numbers);
            let place = self.key_place(piece, &(0..call.k.dims()[2]));
            k.write(&place, &of_keys.k.numbers);
            v.write(&place, &of_keys.v.numbers);
        }
        Ok(Gradients { q: q.numbers, k: k.numbers, v: v.numbers, bias: None })
    }

    /// Adds the gradients of this rank's queries of a piece, and gives those of its keys.
    fn gradients(
        &self,
        piece: &Piece,
        saved: Saved<E>,
        incoming: Incoming<E>,
        of_q: &mut Target<E::Float>,
    ) -> Result<OfKeys<E::Float>> {
        let mut visitor = self.own_keys(piece)?;
        let mut own = None;
        // The gradients of the visitor's keys, from the ranks that they visited before.
        let mut travelling: Option<Pending> = None;
        for (step, &distance) in self.distances.iter().enumerate() {
            let next = self.send_on(step, &visitor)?;
            let mut of_keys = self.no_gradients(piece, distance)?;
            for block in self.blocks_at(0) {
                for other in self.blocks_at(distance) {
                    if sees(self.call, &self.whole, piece, block, other) {
                        let gradients = self.part_gradients(piece, (block, other), &visitor, saved, incoming)?;
                        let tokens = |tokens: &Range<usize>, heads: usize| Place {
                            sequences: 0..piece.sequences.len(),
                            heads: 0..heads,
                            tokens: tokens.clone(),
                        };
                        of_q.add(&tokens(&block.tokens, piece.kv_heads.len() * self.call.group()), &gradients.q);
                        let keys = tokens(&other.tokens, piece.kv_heads.len());
                        of_keys.k.add(&keys, &gradients.k);
                        of_keys.v.add(&keys, &gradients.v);
                    }
                }
            }
            if let Some(before) = travelling.take() {
                // In the order of the distances: what the ranks before have summed comes first.
                of_keys = of_keys.added_to(&before.wait()?)?;
            }
            if distance == 0 {
                own = Some(of_keys);
            } else {
                let hop = self.distances.get(step + 1).copied().unwrap_or(self.parallel.split.ranks()) - distance;
                travelling = Some(self.hop(&of_keys.tensors()?, hop)?);
            }
            if let Some(next) = next {
                visitor = next.wait()?;
            }
        }
        let own = own.map_or_else(|| self.no_gradients(piece, 0), Ok)?;
        match travelling {
            Some(home) => own.added_to(&home.wait()?),
            None => Ok(own),
        }
    }

    /// The gradients that the keys of one block give to the queries of another, and the other way round.
    fn part_gradients(
        &self,
        piece: &Piece,
        blocks: (&Block, &Block),
        visitor: &[Tensor],
        saved: Saved<E>,
        incoming: Incoming<E>,
    ) -> Result<Gradients<E::Float>> {
        let [_, heads, len, _] = self.call.q.dims();
        let place = self.query_place(piece, &blocks.0.tokens);
        let index = |(b, h, i): (usize, usize, usize)| (b * heads + h) * len + i;
        let logsumexp: Vec<_> = place.rows().map(|row| saved.logsumexp[index(row)]).collect();
        let of_logsumexp: Option<Vec<_>> =
            incoming.logsumexp.map(|grads| place.rows().map(|row| grads[index(row)]).collect());
        let saved = Saved { context: place.of(saved.context)?, logsumexp: &logsumexp };
        let incoming = Incoming { context: place.of(incoming.context)?, logsumexp: of_logsumexp.as_deref() };
        self.with_problem(piece, blocks, visitor, |problem| {
            checked(kernels::backward_wide(problem, saved, incoming, BackwardOptions::default()))
        })
    }

    /// Calls `f` with the problem of a block of this rank's queries and a block of the keys that visit it.
    fn with_problem<T>(
        &self,
        piece: &Piece,
        (own, other): (&Block, &Block),
        visitor: &[Tensor],
        f: impl FnOnce(&Problem<E>) -> Result<T>,
    ) -> Result<T> {
        let place = self.query_place(piece, &own.tokens);
        let q = place.of(self.call.q)?;
        let first = [place.sequences.start, place.heads.start, own.positions.start, other.positions.start];
        let options = ProblemOptions { part: Some(Part { whole: self.whole, first }), ..self.call.options };
        let keys =
            Place { sequences: 0..piece.sequences.len(), heads: 0..piece.kv_heads.len(), tokens: other.tokens.clone() };
        with_views(visitor, |k, v| f(&checked(Problem::new(q, keys.of(k)?, keys.of(v)?, options))?))
    }

    /// The blocks of the rank that stands `distance` before this one.
    fn blocks_at(&self, distance: usize) -> &[Block] {
        let ranks = self.parallel.split.ranks();
        &self.blocks[(self.parallel.rank() + ranks - distance) % ranks]
    }

    /// The queries that belong to a piece.
    fn query_place(&self, piece: &Piece, tokens: &Range<usize>) -> Place {
        let group = self.call.group();
        let heads = piece.kv_heads.start * group..piece.kv_heads.end * group;
        Place { sequences: piece.sequences.clone(), heads, tokens: tokens.clone() }
    }

    fn key_place(&self, piece: &Piece, tokens: &Range<usize>) -> Place {
        Place { sequences: piece.sequences.clone(), heads: piece.kv_heads.clone(), tokens: tokens.clone() }
    }

    /// This rank's keys and values of a piece.
    fn own_keys(&self, piece: &Piece) -> Result<Vec<Tensor>> {
        let place = self.key_place(piece, &(0..self.call.k.dims()[2]));
        Ok(vec![tensor_of(place.of(self.call.k)?)?, tensor_of(place.of(self.call.v)?)?])
    }

    /// Starts to send the visitor of a step to where it is at the next.
    fn send_on(&self, step: usize, visitor: &[Tensor]) -> Result<Option<Pending>> {
        let next = self.distances.get(step + 1).map(|next| self.hop(visitor, next - self.distances[step]));
        next.transpose()
    }

    /// Starts to send tensors to the rank `hop` after this one.
    fn hop(&self, tensors: &[Tensor], hop: usize) -> Result<Pending> {
        let (rank, ranks) = (self.parallel.rank(), self.parallel.split.ranks());
        self.parallel.communicator.start_exchange(tensors, (rank + hop) % ranks, (rank + ranks - hop) % ranks)
    }

    fn no_gradients(&self, piece: &Piece, distance: usize) -> Result<OfKeys<E::Float>> {
        let ranks = self.parallel.split.ranks();
        let len = self.parallel.split.rank_len((self.parallel.rank() + ranks - distance) % ranks);
        let target = |what, dim| {
            let dims = [piece.sequences.len(), piece.kv_heads.len(), len, dim];
            Target::new(what, dims, Layout::HeadsFirst)
        };
        let dims = [self.call.k.dims()[3], self.call.v.dims()[3]];
        Ok(OfKeys { k: target("gradient of the key", dims[0])?, v: target("gradient of the value", dims[1])? })
    }
}

impl<R: SimdFloat + Dtype<Float = R> + WithDType> OfKeys<R> {
    /// These gradients and those that came with the keys.
    fn added_to(mut self, before: &[Tensor]) -> Result<Self> {
        for (ours, before) in [&mut self.k, &mut self.v].into_iter().zip(before) {
            with_numbers::<R, _>(before, |before| {
                ours.numbers.iter_mut().zip(before).for_each(|(x, before)| *x = *before + *x);
                Ok(())
            })?;
        }
        Ok(self)
    }

    fn tensors(self) -> Result<Vec<Tensor>> {
        [self.k, self.v].into_iter().map(Target::into_tensor).collect()
    }
}

/// Calls `f` with keys and values that have arrived.
fn with_views<E: Dtype, T>(visitor: &[Tensor], f: impl FnOnce(View<E>, View<E>) -> Result<T>) -> Result<T> {
    let [k, v] = visitor else {
        return Err(candle_core::Error::msg("ring attention: expected keys and values from the rank before").into());
    };
    let dims = |x: &Tensor| x.dims4().map(|(batch, heads, len, dim)| [batch, heads, len, dim]);
    let (k_dims, v_dims) = (dims(k)?, dims(v)?);
    with_numbers::<E, _>(k, |k| with_numbers::<E, _>(v, |v| f(view("key", k, k_dims)?, view("value", v, v_dims)?)))
}

/// A rank's tokens.
fn blocks(parallel: &ContextParallel, rank: usize) -> Vec<Block> {
    let mut start = 0;
    let block = |positions: Range<usize>| {
        let tokens = start..start + positions.len();
        start = tokens.end;
        Block { positions, tokens }
    };
    parallel.split.positions(rank).into_iter().map(block).collect()
}

/// Whether any query of a block may attend to any key of another, as far as the mask tells without looking at every pair.
fn sees<E: Dtype>(call: &Call<E>, whole: &ScoreShape, piece: &Piece, own: &Block, other: &Block) -> bool {
    let (rule, group): (&Rule, _) = (call.options.mask, call.group());
    let (q, k) = (&own.positions, &other.positions);
    let sequences = if rule.varies_by_sequence() { piece.sequences.clone() } else { 0..whole.batch.min(1) };
    let heads = piece.kv_heads.start * group..piece.kv_heads.end * group;
    let heads = if rule.varies_by_head() { heads } else { 0..whole.num_heads.min(1) };
    // A tensor looks at every pair where all are hidden or none is. One that is visible under most masks comes first.
    let is_seen = |at: (usize, usize)| {
        rule.allows(whole, at.0, at.1, q.end - 1, k.start)
            || match rule.tile(whole, at, q, k) {
                Coverage::All => true,
                Coverage::None => false,
                Coverage::Some => {
                    let visible = rule.visible_keys(whole, at, q, k.clone());
                    !visible.is_empty() && rule.tile(whole, at, q, &visible) != Coverage::None
                }
            }
    };
    sequences.into_iter().any(|b| heads.clone().any(|h| is_seen((b, h))))
}
