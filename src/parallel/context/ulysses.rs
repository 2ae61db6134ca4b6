//! Ulysses: each rank attends with some heads over all tokens.
//!
//! Every rank sends to rank i the queries, keys and values of rank i's heads, for its own tokens. What arrives is put in the order of the
//! positions. The contexts go the opposite way. The backward pass sends the same again, with contexts, log-sum-exps and gradients, rather than
//! keep it. Key heads that several ranks need are sent to each of them, and their gradients summed in the order of the ranks.
//!
//! Source: Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer
//! Models" (2023).

use std::ops::Range;

use attention_kernels::mask::ScoreShape;
use attention_kernels::{
    self as kernels, BackwardOptions, Gradients, Incoming, Layout, LogSumExp, Number, Output, Part, Problem,
    ProblemOptions, Saved, View,
};
use candle_core::{Device, Tensor};

use super::numbers::{Dtype, Place, Target, append, checked, tensor_of, view, with_numbers};
use super::{Call, ContextParallel};
use crate::error::{AttentionError, Result};

/// Whether the heads can be divided among so many ranks.
pub(super) fn check_heads(num_heads: usize, num_kv_heads: usize, ranks: usize) -> Result<(), AttentionError> {
    let divides = |a: usize, b: usize| a > 0 && b.is_multiple_of(a);
    let (field, got) = ("heads of Scheme::Ulysses", format!("{num_heads} query heads and {num_kv_heads} key heads"));
    if divides(ranks, num_heads) && (divides(ranks, num_kv_heads) || divides(num_kv_heads, ranks)) {
        return Ok(());
    }
    let expected = format!(
        "a number of query heads that {ranks} ranks divide, and of key heads that {ranks} ranks divide or that divides {ranks} (Scheme::Ring takes any)"
    );
    Err(AttentionError::Config { field, expected, got })
}

pub(super) struct Ulysses<'a, 'c, E: Number> {
    parallel: &'a ContextParallel,
    call: &'a Call<'c, E>,
    whole: ScoreShape,
}

/// Tensors of all tokens of this rank's heads, heads first.
struct Gathered<E> {
    numbers: Vec<Target<E>>,
}

impl<'a, 'c, E: Dtype> Ulysses<'a, 'c, E> {
    pub(super) fn new(parallel: &'a ContextParallel, call: &'a Call<'c, E>) -> Self {
        Self { parallel, call, whole: call.whole(parallel) }
    }

    pub(super) fn forward(self) -> Result<Output<E>> {
        let gathered = self.gather(&[self.call.q, self.call.k, self.call.v])?;
        let output = self.with_problem(&gathered, |problem| checked(kernels::forward(problem, Layout::HeadsFirst)))?;
        drop(gathered);
        let [batch, heads, len, dim] = self.call.context_dims();
        let own_heads = self.heads(self.parallel.rank()).len();
        let dims = |dim| [batch, own_heads, self.whole.q_len, dim];
        // The two numbers of each log-sum-exp.
        let mut targets = Vec::new();
        for half in [LogSumExp::largest, LogSumExp::log_total] {
            let mut target = Target::<E::Float>::new("log-sum-exp", [batch, heads, len, 1], Layout::HeadsFirst)?;
            self.scatter(output.logsumexp.iter().map(|x| half(*x)).collect(), dims(1), |rank, numbers| {
                target.copy(&self.own_place(self.heads(rank)), numbers);
            })?;
            targets.push(target);
        }
        let mut context = Target::new("context", [batch, heads, len, dim], self.call.layout)?;
        self.scatter(output.context, dims(dim), |rank, numbers| {
            context.copy(&self.own_place(self.heads(rank)), numbers);
        })?;
        let rows = targets[0].numbers.iter().zip(&targets[1].numbers);
        let logsumexp = rows.map(|(&largest, &log_total)| LogSumExp::from_parts(largest, log_total)).collect();
        Ok(Output { context: context.numbers, logsumexp })
    }

    pub(super) fn backward(self, saved: Saved<E>, incoming: Incoming<E>) -> Result<Gradients<E>> {
        let call = self.call;
        let mut gathered = self.gather(&[call.q, call.k, call.v, saved.context, incoming.context])?;
        let [batch, heads, len, _] = call.q.dims();
        let dims = [batch, heads, len, 1];
        let halves: [Vec<E::Float>; 2] =
            [LogSumExp::largest, LogSumExp::log_total].map(|f| saved.logsumexp.iter().map(|x| f(*x)).collect());
        let mut rows = vec![view("log-sum-exp", &halves[0], dims)?, view("log-sum-exp", &halves[1], dims)?];
        if let Some(grads) = incoming.logsumexp {
            rows.push(view("gradient of the log-sum-exp", grads, dims)?);
        }
        let rows = self.gather(&rows)?.numbers;
        let of_incoming = gathered.numbers.split_off(3);
        let logsumexp: Vec<_> =
            rows[0].numbers.iter().zip(&rows[1].numbers).map(|(a, b)| LogSumExp::from_parts(*a, *b)).collect();
        let gradients = self.with_problem(&gathered, |problem| {
            let dims = problem.context_dims();
            let saved = Saved { context: view("context", &of_incoming[0].numbers, dims)?, logsumexp: &logsumexp };
            let incoming = Incoming {
                context: view("gradient of the context", &of_incoming[1].numbers, dims)?,
                logsumexp: rows.get(2).map(|grads| &grads.numbers[..]),
            };
            checked(kernels::backward_wide(problem, saved, incoming, BackwardOptions::default()))
        })?;
        let dims = [0, 1, 2].map(|i| gathered.numbers[i].dims());
        drop((gathered, of_incoming));
        let q = self.scatter_narrowed("gradient of the query", gradients.q, dims[0], call.q.dims())?;
        let k = self.scatter_keys("gradient of the key", gradients.k, dims[1], call.k.dims())?;
        let v = self.scatter_keys("gradient of the value", gradients.v, dims[2], call.v.dims())?;
        Ok(Gradients { q, k, v, bias: None })
    }

    /// The gradient of this rank's tokens, of which each rank has some heads.
    fn scatter_narrowed(
        &self,
        what: &'static str,
        gradient: Vec<E::Float>,
        dims: [usize; 4],
        own: [usize; 4],
    ) -> Result<Vec<E>> {
        let mut target = Target::new(what, own, self.call.layout)?;
        self.scatter(checked(E::from_floats(what, gradient))?, dims, |rank, numbers| {
            target.copy(&self.own_place(self.heads_of(rank, own[1])), numbers);
        })?;
        Ok(target.numbers)
    }

    /// As [`Self::scatter_narrowed`], for keys or values. If several ranks have gradients of one head, their sum is narrowed.
    fn scatter_keys(
        &self,
        what: &'static str,
        gradient: Vec<E::Float>,
        dims: [usize; 4],
        own: [usize; 4],
    ) -> Result<Vec<E>> {
        if own[1] >= self.parallel.split.ranks() {
            return self.scatter_narrowed(what, gradient, dims, own);
        }
        let mut target = Target::<E::Float>::new(what, own, self.call.layout)?;
        self.scatter(gradient, dims, |rank, numbers| target.add(&self.own_place(self.kv_heads(rank)), numbers))?;
        checked(E::from_floats(what, target.numbers))
    }

    /// The query heads of a rank.
    fn heads(&self, rank: usize) -> Range<usize> {
        let count = self.whole.num_heads / self.parallel.split.ranks();
        rank * count..(rank + 1) * count
    }

    /// The key heads that they use.
    fn kv_heads(&self, rank: usize) -> Range<usize> {
        let (heads, group) = (self.heads(rank), self.call.group());
        heads.start / group..(heads.end - 1) / group + 1
    }

    /// The heads of a rank, of a tensor with so many heads.
    fn heads_of(&self, rank: usize, heads: usize) -> Range<usize> {
        if heads == self.whole.num_heads { self.heads(rank) } else { self.kv_heads(rank) }
    }

    /// This rank's tokens.
    fn own_place(&self, heads: Range<usize>) -> Place {
        Place { sequences: 0..self.whole.batch, heads, tokens: 0..self.parallel.own_len() }
    }

    /// All tokens of this rank's heads, in the order of their positions, of tensors of this rank's tokens. They travel one after the other:
    /// messages take memory.
    fn gather<F: Dtype>(&self, own: &[View<F>]) -> Result<Gathered<F>> {
        let numbers = own.iter().map(|view| self.gather_one(*view)).collect::<Result<_>>()?;
        Ok(Gathered { numbers })
    }

    fn gather_one<F: Dtype>(&self, own: View<F>) -> Result<Target<F>> {
        let (split, [_, all_heads, _, dim]) = (&self.parallel.split, own.dims());
        let mut messages = Vec::new();
        for rank in 0..split.ranks() {
            messages.push(tensor_of(self.own_place(self.heads_of(rank, all_heads)).of(own)?)?);
        }
        let heads = self.heads_of(self.parallel.rank(), all_heads).len();
        let dims = [self.whole.batch, heads, split.len(), dim];
        let received = self.parallel.communicator.all_to_all(&messages)?;
        drop(messages);
        let mut target = Target::new("tokens of all ranks", dims, Layout::HeadsFirst)?;
        for (rank, message) in received.iter().enumerate() {
            let of_rank = [dims[0], heads, split.rank_len(rank), dim];
            with_numbers::<F, _>(message, |numbers| {
                // A rank's tokens are in one block or two.
                let mut first = 0;
                for positions in split.positions(rank) {
                    let tokens = first..first + positions.len();
                    first = tokens.end;
                    let place = Place { sequences: 0..dims[0], heads: 0..heads, tokens: positions };
                    let from = view("tokens of a rank", numbers, of_rank)?;
                    target.copy_from(&place, checked(from.narrow(2, tokens))?);
                }
                Ok(())
            })?;
        }
        Ok(target)
    }

    /// Gives every rank its tokens of a tensor (batch, heads, all tokens, dim), heads first, of this rank's heads. `receive` gets, for each
    /// rank in order, the numbers of this rank's tokens.
    fn scatter<F: Dtype>(&self, numbers: Vec<F>, dims: [usize; 4], mut receive: impl FnMut(usize, &[F])) -> Result<()> {
        let split = &self.parallel.split;
        let mut messages = Vec::new();
        for rank in 0..split.ranks() {
            let len = split.rank_len(rank);
            let mut message = checked(kernels::reserve("message", dims[0] * dims[1] * len * dims[3]))?;
            let view = view("result of all tokens", &numbers, dims)?;
            // Head by head, as tensors of the rank's tokens stand.
            for (b, h) in (0..dims[0]).flat_map(|b| (0..dims[1]).map(move |h| (b, h))) {
                for tokens in split.positions(rank) {
                    let place = Place { sequences: b..b + 1, heads: h..h + 1, tokens };
                    append(&mut message, place.of(view)?)?;
                }
            }
            messages.push(Tensor::from_vec(message, (dims[0], dims[1], len, dims[3]), &Device::Cpu)?);
        }
        drop(numbers);
        for (rank, message) in self.parallel.communicator.all_to_all(&messages)?.iter().enumerate() {
            with_numbers::<F, _>(message, |numbers| {
                receive(rank, numbers);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Calls `f` with the problem of this rank's heads.
    fn with_problem<T>(&self, gathered: &Gathered<E>, f: impl FnOnce(&Problem<E>) -> Result<T>) -> Result<T> {
        let first = [0, self.heads(self.parallel.rank()).start, 0, 0];
        let options = ProblemOptions { part: Some(Part { whole: self.whole, first }), ..self.call.options };
        let of = |what, i: usize| view(what, &gathered.numbers[i].numbers, gathered.numbers[i].dims());
        f(&checked(Problem::new(of("query", 0)?, of("key", 1)?, of("value", 2)?, options))?)
    }
}
