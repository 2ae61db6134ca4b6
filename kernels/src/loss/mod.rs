//! Cross-entropy of logits and labels, and its gradient.
//!
//! Of the softmax only two numbers for each row are kept. The backward pass computes the exponentials again and writes the gradient
//! at once, so that there is no matrix of the logits' size but the gradient itself.

mod head;
mod row;

use std::mem::MaybeUninit;

use crate::alloc::{filled, product, reserve};
use crate::dtype::{Number, narrow, widen};
use crate::error::Error;
use crate::matrix::{Matrix, MatrixMut, Shared};
use crate::schedule::run_tasks;
use crate::scratch::{Scratch, pieces};
use crate::simd::SimdFloat;
pub use head::{Head, HeadLoss, Wanted, linear_cross_entropy};
pub use row::Denominator;
use row::{Gradient, Statistics};

/// The label of a row that counts nothing: its loss and its gradient are zero.
pub const IGNORED: u32 = u32::MAX;

/// Logits of a task: some 10 µs of exponentials.
const TASK: usize = 32 * 1024;
/// Logits that are widened at a time: as many as stay in the first cache, in f32 and in f64.
const BLOCK: usize = 2048;
/// An exponential costs as much as so many multiplications.
const WORK: usize = 8;

/// The cross-entropy of some rows.
#[derive(Clone, Debug, PartialEq)]
pub struct CrossEntropy<R> {
    /// The sum of the losses of all rows that aren't ignored.
    pub sum: f64,
    /// How many rows aren't ignored.
    pub counted: usize,
    /// What the gradient is computed from, for each row.
    pub denominators: Vec<Denominator<R>>,
}

/// Checks a label smoothing: the share of the loss that goes to all labels alike.
fn check_smoothing(smoothing: f64) -> Result<(), Error> {
    if (0.0..=1.0).contains(&smoothing) {
        return Ok(());
    }
    Err(Error::Option { what: "label smoothing", expected: "a number in [0, 1]", got: smoothing.to_string() })
}

/// Checks that each label is ignored or below `limit`.
fn check_labels(labels: &[u32], limit: usize) -> Result<(), Error> {
    match labels.iter().enumerate().find(|(_, label)| **label != IGNORED && **label as usize >= limit) {
        Some((position, &got)) => Err(Error::Id { what: "labels", limit, got, position }),
        None => Ok(()),
    }
}

fn check(len: usize, [rows, count]: [usize; 2], labels: &[u32], smoothing: f64) -> Result<(), Error> {
    if len != product("logits", &[rows, count])? {
        return Err(Error::Length { what: "logits", expected: format!("{rows} x {count}"), got: len });
    }
    if labels.len() != rows {
        return Err(Error::Length {
            what: "labels",
            expected: format!("one for each of {rows} rows"),
            got: labels.len(),
        });
    }
    check_smoothing(smoothing)?;
    check_labels(labels, count)
}

/// The cross-entropy of row-major logits (rows, count) with a label for each row, which may be [`IGNORED`].
///
/// A row's loss is (1 - ε) · -ln softmax(logits)\[label\] + ε / count · Σ -ln softmax(logits), with the label smoothing ε. It is
/// computed in f32 (f64 for f64), summed in f64, and infinite where the logit of a label is minus infinity.
///
/// Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (CVPR 2016), section 7, for label smoothing.
///
/// # Errors
///
/// Logits or labels of another number; a label that is neither ignored nor below `count`; a smoothing outside \[0, 1\]; too
/// little memory.
///
/// # Examples
///
/// ```
/// use attention_kernels::loss::{IGNORED, cross_entropy, cross_entropy_gradient};
///
/// // Equal logits: each of two labels has probability 1/2. The second row is ignored.
/// let (logits, labels) = ([5f32, 5.0, 1.0, 2.0], [1, IGNORED]);
/// let loss = cross_entropy(&logits, [2, 2], &labels, 0.0)?;
/// assert!((loss.sum - 2f64.ln()).abs() < 1e-6 && loss.counted == 1);
/// let gradient = cross_entropy_gradient(&logits, [2, 2], &labels, 0.0, &loss.denominators, 1.0)?;
/// assert_eq!(gradient, [0.5, -0.5, 0.0, 0.0]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn cross_entropy<E: Number>(
    logits: &[E],
    [rows, count]: [usize; 2],
    labels: &[u32],
    smoothing: f64,
) -> Result<CrossEntropy<E::Float>, Error> {
    check(logits.len(), [rows, count], labels, smoothing)?;
    let mut losses = filled("losses of the rows", rows, 0.0)?;
    let mut denominators = filled("denominators of the rows", rows, Denominator::<E::Float>::default())?;
    let (shared_losses, shared_denominators) = (Shared::new(&mut losses), Shared::new(&mut denominators));
    let per_task = (TASK / count.max(1)).max(1);
    run_tasks(logits.len().saturating_mul(WORK), rows.div_ceil(per_task), |task| {
        let (first, rows) = (task * per_task, per_task.min(rows - task * per_task));
        // SAFETY: each task has other rows.
        let (mut losses, mut denominators) =
            unsafe { (shared_losses.rows(first, 1, rows, rows), shared_denominators.rows(first, 1, rows, rows)) };
        let mut scratch = None;
        pieces!(scratch, E::Float: block: BLOCK);
        let rows = Forward {
            logits: Matrix::new(&logits[first * count..], rows, count, count),
            labels: &labels[first..][..rows],
            smoothing,
            block,
            losses: losses.row(0),
            denominators: denominators.row(0),
        };
        rows.run();
        Ok(())
    })?;
    let counted = labels.iter().filter(|label| **label != IGNORED).count();
    Ok(CrossEntropy { sum: losses.iter().sum(), counted, denominators })
}

/// Some rows of the forward pass.
struct Forward<'a, E: Number> {
    logits: Matrix<'a, E>,
    labels: &'a [u32],
    smoothing: f64,
    block: &'a mut [E::Float],
    losses: &'a mut [f64],
    denominators: &'a mut [Denominator<E::Float>],
}

impl<E: Number> Forward<'_, E> {
    fn run(self) {
        let share = (self.smoothing > 0.0).then(|| E::Float::from_f64(1.0 / self.logits.columns() as f64));
        for (row, &label) in self.labels.iter().enumerate() {
            if label == IGNORED {
                continue;
            }
            let (logits, mut statistics) = (self.logits.row(row), Statistics::new());
            for logits in logits.chunks(BLOCK) {
                match E::as_floats(logits) {
                    Some(logits) => statistics.add(logits, share),
                    None => {
                        let block = &mut self.block[..logits.len()];
                        widen(logits, block);
                        statistics.add(block, share);
                    }
                }
            }
            self.losses[row] = statistics.loss(logits[label as usize].widen(), self.smoothing);
            self.denominators[row] = statistics.denominator();
        }
    }
}

/// The gradient of [`cross_entropy`] for the logits: `scale` · (softmax(logits) - ε / count - (1 - ε) · \[label\]), and zeros in
/// ignored rows.
///
/// # Errors
///
/// As [`cross_entropy`]; denominators of another number of rows.
pub fn cross_entropy_gradient<E: Number>(
    logits: &[E],
    [rows, count]: [usize; 2],
    labels: &[u32],
    smoothing: f64,
    denominators: &[Denominator<E::Float>],
    scale: f64,
) -> Result<Vec<E>, Error> {
    const WHAT: &str = "gradient of the logits";
    check(logits.len(), [rows, count], labels, smoothing)?;
    if denominators.len() != rows {
        let (expected, got) = (format!("one for each of {rows} rows"), denominators.len());
        return Err(Error::Length { what: "denominators", expected, got });
    }
    let mut gradient: Vec<E> = reserve(WHAT, logits.len())?;
    let shared = Shared::new(&mut gradient.spare_capacity_mut()[..logits.len()]);
    let per_task = (TASK / count.max(1)).max(1);
    run_tasks(logits.len().saturating_mul(WORK), rows.div_ceil(per_task), |task| {
        let (first, rows) = (task * per_task, per_task.min(rows - task * per_task));
        let mut scratch = None;
        pieces!(scratch, E::Float: block: BLOCK);
        let rows = Backward {
            logits: Matrix::new(&logits[first * count..], rows, count, count),
            labels: &labels[first..][..rows],
            denominators: &denominators[first..][..rows],
            scale,
            smoothing,
            block,
            // SAFETY: each task has other rows.
            gradient: unsafe { shared.rows(first * count, rows, count, count) },
        };
        rows.run();
        Ok(())
    })?;
    // SAFETY: every task has succeeded. Together they have all rows, and each writes all numbers of its rows.
    unsafe { gradient.set_len(logits.len()) };
    Ok(gradient)
}

/// Some rows of the backward pass.
struct Backward<'a, E: Number> {
    logits: Matrix<'a, E>,
    labels: &'a [u32],
    denominators: &'a [Denominator<E::Float>],
    scale: f64,
    smoothing: f64,
    block: &'a mut [E::Float],
    gradient: MatrixMut<'a, MaybeUninit<E>>,
}

impl<E: Number> Backward<'_, E> {
    fn run(mut self) {
        let zero = E::narrow(E::Float::ZERO);
        for (row, &label) in self.labels.iter().enumerate() {
            let to = self.gradient.row(row);
            if label == IGNORED {
                for x in to {
                    x.write(zero);
                }
                continue;
            }
            let count = self.logits.columns();
            let gradient = Gradient::new(self.denominators[row], self.scale, self.smoothing, count);
            let blocks = self.logits.row(row).chunks(BLOCK).zip(to.chunks_mut(BLOCK));
            for ((logits, to), start) in blocks.zip((0..).step_by(BLOCK)) {
                let block = &mut self.block[..logits.len()];
                widen(logits, block);
                let target = (label as usize).checked_sub(start).filter(|target| *target < logits.len());
                gradient.replace(block, target);
                narrow(block, to);
            }
        }
    }
}

#[cfg(test)]
#[path = "loss_tests.rs"]
mod tests;
