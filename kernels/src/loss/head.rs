//! Cross-entropy of a linear layer over a vocabulary, without the matrix of all logits.
//!
//! The logits of some tokens at a time are computed, and their gradient takes their place. From it come the gradients of the tokens'
//! hidden states, and a part of the gradients of weight and bias, before the next tokens have their turn. Computing gradients in
//! the forward pass saves computing the logits again in the backward pass.
//!
//! Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training" (2024), section 3.2, fused linear cross-entropy.

use pulp::{Simd, WithSimd};

use super::row::{Gradient, Statistics};
use super::{IGNORED, TASK, WORK, check_labels, check_smoothing};
use crate::alloc::{filled, product, reserve};
use crate::dtype::{Number, narrow_over, widen, zeroed};
use crate::error::Error;
use crate::matmul::{Bias, Epilogue, MatmulElement, Operand, Plain, column_sums, matmul, matmul_sum};
use crate::matrix::Shared;
use crate::optimizer::scale;
use crate::schedule::run_tasks;
use crate::scratch::{Scratch, pieces};
use crate::simd::{SimdFloat, instruction_set};

/// Bytes of the logits that are in memory at the same time, about. Fewer would have the gradient of the weight read and written
/// more often, once for each chunk of tokens.
const CHUNK_BYTES: usize = 64 << 20;
/// The fewest tokens of a chunk: below, the products would read the weight more often than they need it.
const FEWEST_TOKENS: usize = 64;
/// Labels of a block. Its logits are a matrix of their own, whose products stay in the second cache.
const BLOCK: usize = 2048;

/// A linear layer over a vocabulary and what it is applied to: logits = hidden · weightᵀ + bias.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a, E> {
    /// The hidden states, row-major (tokens, dim).
    pub hidden: &'a [E],
    /// The weight, row-major (vocabulary, dim).
    pub weight: &'a [E],
    /// The bias (vocabulary).
    pub bias: Option<&'a [E]>,
    /// tokens, vocabulary and dim
    pub dims: [usize; 3],
}

/// Which gradients are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// That of the hidden states.
    pub hidden: bool,
    /// That of the weight.
    pub weight: bool,
    /// That of the bias.
    pub bias: bool,
}

/// The loss of a [`Head`], and the gradients that were wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadLoss<R> {
    /// The sum of the losses of all tokens that aren't ignored.
    pub sum: f64,
    /// How many tokens aren't ignored.
    pub counted: usize,
    hidden: Option<Vec<R>>,
    weight: Option<Vec<R>>,
    bias: Option<Vec<R>>,
    /// What the gradients are still to be multiplied by.
    late: f64,
}

impl<R: SimdFloat + Number<Float = R>> HeadLoss<R> {
    /// The gradients of hidden states, weight and bias that were wanted, times `factor`, rounded once.
    ///
    /// # Errors
    ///
    /// Too little memory.
    pub fn gradients<E: Number<Float = R>>(self, factor: f64) -> Result<[Option<Vec<E>>; 3], Error> {
        let factor = factor * self.late;
        let mut gradients = [None, None, None];
        for (gradient, numbers) in gradients.iter_mut().zip([self.hidden, self.weight, self.bias]) {
            let Some(mut numbers) = numbers else { continue };
            if factor != 1.0 {
                scale(vec![&mut numbers[..]], factor)?;
            }
            *gradient = Some(E::from_floats("gradient of a linear layer", numbers)?);
        }
        Ok(gradients)
    }
}

impl<E: Number> Head<'_, E> {
    fn check(&self, labels: &[u32], smoothing: f64) -> Result<(), Error> {
        let [tokens, vocabulary, dim] = self.dims;
        let slices = [
            ("hidden states", self.hidden.len(), product("hidden states", &[tokens, dim])?),
            ("weight", self.weight.len(), product("weight", &[vocabulary, dim])?),
            ("bias", self.bias.map_or(vocabulary, <[E]>::len), vocabulary),
            ("labels", labels.len(), tokens),
        ];
        if let Some((what, got, expected)) = slices.into_iter().find(|(_, got, expected)| got != expected) {
            return Err(Error::Length { what, expected: format!("{expected}, from dims {:?}", self.dims), got });
        }
        check_smoothing(smoothing)?;
        check_labels(labels, vocabulary)
    }

    /// Tokens whose logits are in memory at the same time.
    fn chunk(&self) -> usize {
        let row = self.dims[1].max(1).saturating_mul(size_of::<E>());
        (CHUNK_BYTES / row / FEWEST_TOKENS * FEWEST_TOKENS).max(FEWEST_TOKENS)
    }
}

/// The cross-entropy of a linear layer, as [`cross_entropy`](super::cross_entropy) of its logits, and the gradients of `scale`
/// times the sum of the losses.
///
/// Half types are multiplied and summed in f32. Their logits, and the gradients of these, are rounded before the next product, as
/// those of separate operations are; sums over tokens are not.
///
/// # Errors
///
/// Slices that don't fit the dims; a label that is neither ignored nor below the vocabulary's size; a smoothing outside \[0, 1\]; too
/// little memory.
///
/// # Examples
///
/// ```
/// use attention_kernels::loss::{Head, Wanted, linear_cross_entropy};
///
/// // One token of dimension 1, and two labels whose logits are 3 and 3.
/// let head = Head { hidden: &[1f32], weight: &[3.0, 3.0], bias: None, dims: [1, 2, 1] };
/// let wanted = Wanted { hidden: true, weight: true, bias: false };
/// let loss = linear_cross_entropy(&head, &[0], 0.0, 1.0, wanted)?;
/// assert!((loss.sum - 2f64.ln()).abs() < 1e-6);
/// let [hidden, weight, bias] = loss.gradients::<f32>(1.0)?;
/// assert_eq!((hidden.unwrap(), weight.unwrap(), bias), (vec![0.0], vec![-0.5, 0.5], None));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn linear_cross_entropy<E: MatmulElement>(
    head: &Head<E>,
    labels: &[u32],
    smoothing: f64,
    scale: f64,
    wanted: Wanted,
) -> Result<HeadLoss<E::Float>, Error> {
    head.check(labels, smoothing)?;
    by_chunks(head, labels, (smoothing, scale), wanted, head.chunk())
}

/// The same, with `chunk` tokens at a time.
fn by_chunks<E: MatmulElement>(
    head: &Head<E>,
    labels: &[u32],
    (smoothing, scale): (f64, f64),
    wanted: Wanted,
    chunk: usize,
) -> Result<HeadLoss<E::Float>, Error> {
    let [tokens, vocabulary, dim] = head.dims;
    // A half type may not hold the gradient of a mean over many tokens. f16 ends at 6e-8.
    let (early, late) = if size_of::<E>() < size_of::<E::Float>() { (1.0, scale) } else { (scale, 1.0) };
    let zeros = |what, count: usize, is_wanted: bool| is_wanted.then(|| zeroed::<E::Float>(what, count)).transpose();
    let mut result = HeadLoss {
        sum: 0.0,
        counted: labels.iter().filter(|label| **label != IGNORED).count(),
        hidden: zeros("gradient of the hidden states", tokens * dim, wanted.hidden)?,
        weight: zeros("gradient of the weight", vocabulary * dim, wanted.weight)?,
        bias: zeros("gradient of the bias", vocabulary, wanted.bias)?,
        late,
    };
    for first in (0..tokens).step_by(chunk) {
        let count = chunk.min(tokens - first);
        let hidden = &head.hidden[first * dim..][..count * dim];
        let mut chunk = Chunk { head, count, hidden, blocks: reserve("blocks of logits", vocabulary.div_ceil(BLOCK))? };
        chunk.compute_logits()?;
        let replacing = (wanted != Wanted::default()).then_some(early);
        result.sum += chunk.losses(&labels[first..][..count], smoothing, replacing)?;
        if let Some(gradient) = &mut result.hidden {
            chunk.hidden_gradient(&mut gradient[first * dim..][..count * dim])?;
        }
        chunk.add_weight_gradients(result.weight.as_deref_mut(), result.bias.as_deref_mut())?;
    }
    Ok(result)
}

/// Some tokens and their logits, or the gradient that takes the logits' place.
struct Chunk<'a, E: Number> {
    head: &'a Head<'a, E>,
    count: usize,
    hidden: &'a [E],
    /// Row-major matrices (count, at most [`BLOCK`]), side by side.
    blocks: Vec<Vec<E>>,
}

impl<E: MatmulElement> Chunk<'_, E> {
    /// Number n of the blocks is of the labels from `n * BLOCK` on; how many there are.
    fn width(&self, block: usize) -> usize {
        BLOCK.min(self.head.dims[1] - block * BLOCK)
    }

    fn hidden(&self) -> Result<Operand<'_, E>, Error> {
        Operand::row_major("hidden states", self.hidden, self.count, self.head.dims[2])
    }

    /// The rows of the weight that belong to a block.
    fn weight(&self, block: usize) -> Result<Operand<'_, E>, Error> {
        let dim = self.head.dims[2];
        Operand::row_major("weight", &self.head.weight[block * BLOCK * dim..], self.width(block), dim)
    }

    fn block(&self, block: usize) -> Result<Operand<'_, E>, Error> {
        Operand::row_major("gradient of the logits", &self.blocks[block], self.count, self.width(block))
    }

    fn compute_logits(&mut self) -> Result<(), Error> {
        for block in 0..self.head.dims[1].div_ceil(BLOCK) {
            let (hidden, weight) = (self.hidden()?, self.weight(block)?.transposed());
            let logits = match self.head.bias {
                Some(bias) => matmul(hidden, weight, &Bias(&bias[block * BLOCK..][..self.width(block)]))?,
                None => matmul(hidden, weight, &Plain)?,
            };
            self.blocks.push(logits);
        }
        Ok(())
    }

    /// The sum of the losses. With a scale the gradient takes the place of the logits.
    fn losses(&mut self, labels: &[u32], smoothing: f64, replacing: Option<f64>) -> Result<f64, Error> {
        let vocabulary = self.head.dims[1];
        let mut losses = filled("losses of the tokens", self.count, 0.0)?;
        let mut shared = reserve("blocks of logits", self.blocks.len())?;
        shared.extend(self.blocks.iter_mut().map(|block| Shared::new(block)));
        let shared_losses = Shared::new(&mut losses);
        let per_task = (TASK / vocabulary.max(1)).max(1);
        let work = self.count.saturating_mul(vocabulary).saturating_mul(WORK);
        run_tasks(work, self.count.div_ceil(per_task), |task| {
            let tokens = task * per_task..(task * per_task + per_task).min(labels.len());
            // SAFETY: each task has other tokens.
            let mut losses = unsafe { shared_losses.rows(tokens.start, 1, tokens.len(), tokens.len()) };
            let mut scratch = None;
            pieces!(scratch, E::Float: wide: BLOCK);
            for (token, loss) in tokens.zip(losses.row(0)) {
                let (blocks, label, wide) = (&shared, labels[token], &mut *wide);
                *loss = Row { blocks, vocabulary, token, label, smoothing, replacing, wide }.compute();
            }
            Ok(())
        })?;
        Ok(losses.iter().sum())
    }

    /// gradient += blocks · weight
    fn hidden_gradient(&self, gradient: &mut [E::Float]) -> Result<(), Error> {
        let mut pairs = reserve("operands", self.blocks.len())?;
        for block in 0..self.blocks.len() {
            pairs.push((self.block(block)?, self.weight(block)?));
        }
        let add = AddTo { to: &Shared::new(gradient), first: 0, columns: self.head.dims[2] };
        matmul_sum(&pairs, &add)?;
        Ok(())
    }

    /// weight += blocksᵀ · hidden, and bias += the sums of the blocks' columns.
    fn add_weight_gradients(
        &self,
        weight: Option<&mut [E::Float]>,
        mut bias: Option<&mut [E::Float]>,
    ) -> Result<(), Error> {
        let dim = self.head.dims[2];
        let weight = weight.map(Shared::new);
        for block in 0..self.blocks.len() {
            if let Some(to) = &weight {
                let add = AddTo { to, first: block * BLOCK * dim, columns: dim };
                matmul(self.block(block)?.transposed(), self.hidden()?, &add)?;
            }
            if let Some(bias) = &mut bias {
                let sums = column_sums(&self.blocks[block], self.count, self.width(block))?;
                bias[block * BLOCK..].iter_mut().zip(sums).for_each(|(sum, x)| *sum += x);
            }
        }
        Ok(())
    }
}

/// Adds the sums of a product, before they are rounded, to a matrix of `columns` columns that starts at element `first`.
struct AddTo<'a, 'm, R> {
    to: &'a Shared<'m, R>,
    first: usize,
    columns: usize,
}

impl<E: Number> Epilogue<E> for AddTo<'_, '_, E::Float> {
    fn apply(&self, row: usize, column: usize, sums: &mut [E::Float]) {
        let first = self.first + row * self.columns + column;
        // SAFETY: a product calls this once for each of its elements, and no two products write to the same matrix at a time.
        let mut to = unsafe { self.to.rows(first, 1, sums.len(), sums.len()) };
        instruction_set().dispatch(Add { sums, to: to.row(0) });
    }
}

struct Add<'a, R> {
    sums: &'a [R],
    to: &'a mut [R],
}

impl<R: SimdFloat> WithSimd for Add<'_, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (to, sum) in self.to.iter_mut().zip(self.sums) {
            *to += *sum;
        }
    }
}

/// One token: its loss, and the gradient of its logits in their place.
struct Row<'a, 'm, E: Number> {
    blocks: &'a [Shared<'m, E>],
    vocabulary: usize,
    token: usize,
    label: u32,
    smoothing: f64,
    replacing: Option<f64>,
    wide: &'a mut [E::Float],
}

impl<E: Number> Row<'_, '_, E> {
    fn compute(mut self) -> f64 {
        let (label, smoothing, count) = (self.label as usize, self.smoothing, self.vocabulary);
        if self.label == IGNORED {
            let zero = E::narrow(E::Float::ZERO);
            self.for_each_part(|logits, _, _| logits.fill(zero));
            return 0.0;
        }
        let share = (smoothing > 0.0).then(|| E::Float::from_f64(1.0 / count as f64));
        let (mut statistics, mut of_label) = (Statistics::new(), E::Float::ZERO);
        self.for_each_part(|logits, first, wide| {
            if let Some(x) = label.checked_sub(first).and_then(|label| logits.get(label)) {
                of_label = x.widen();
            }
            match E::as_floats(logits) {
                Some(logits) => statistics.add(logits, share),
                None => {
                    widen(logits, wide);
                    statistics.add(wide, share);
                }
            }
        });
        if let Some(scale) = self.replacing {
            let gradient = Gradient::new(statistics.denominator(), scale, smoothing, count);
            self.for_each_part(|logits, first, wide| {
                widen(logits, wide);
                gradient.replace(wide, label.checked_sub(first).filter(|label| *label < wide.len()));
                narrow_over(wide, logits);
            });
        }
        statistics.loss(of_label, smoothing)
    }

    /// Calls `f` with the token's part of each block, the part's first label, and room for as many numbers.
    fn for_each_part(&mut self, mut f: impl FnMut(&mut [E], usize, &mut [E::Float])) {
        for (block, shared) in self.blocks.iter().enumerate() {
            let width = BLOCK.min(self.vocabulary - block * BLOCK);
            // SAFETY: each token has a row of its own in each block, and belongs to one task.
            let mut row = unsafe { shared.rows(self.token * width, 1, width, width) };
            f(row.row(0), block * BLOCK, &mut self.wide[..width]);
        }
    }
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
