//! [`Merged`]: attention over several parts of the keys, put together.

use crate::attention::Output;
use crate::dtype::Number;
use crate::error::Error;
use crate::schedule::for_each_chunk;
use crate::simd::SimdFloat;
use crate::softmax::LogSumExp;

/// Rows of a parallel piece of work.
const ROWS_PER_CHUNK: usize = 64;

/// Results of the same queries over several parts of the keys, merged one after the other by their log-sum-exp. The order of the
/// parts changes the result by rounding.
///
/// # Examples
///
/// ```
/// use attention_kernels::{Layout, Merged, Problem, ProblemOptions, View, forward};
///
/// // One query, whose scores are 1 and 3. The values are 10 and 20.
/// let over = |key: f64, value: f64| {
///     let [q, k, v] = [[1.0], [key], [value]];
///     let view = |data| View::new("test", data, [1; 3], [1; 4]);
///     forward(&Problem::new(view(&q)?, view(&k)?, view(&v)?, ProblemOptions::default())?, Layout::HeadsFirst)
/// };
/// let mut merged = Merged::new(over(1.0, 10.0)?)?;
/// merged.add(over(3.0, 20.0)?)?;
/// let weights = [1f64.exp(), 3f64.exp()];
/// let expected = (10.0 * weights[0] + 20.0 * weights[1]) / (weights[0] + weights[1]);
/// assert!((merged.context[0] - expected).abs() < 1e-12);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Merged<R> {
    /// Row by row.
    pub context: Vec<R>,
    /// One for each row of the context.
    pub logsumexp: Vec<LogSumExp<R>>,
}

impl<R: SimdFloat + Number<Float = R>> Merged<R> {
    /// The result of one part, heads first.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn new<E: Number<Float = R>>(part: Output<E>) -> Result<Self, Error> {
        Ok(Self { context: E::into_floats("context", part.context)?, logsumexp: part.logsumexp })
    }

    /// Adds the result of another part.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] for another number of rows or columns, [`Error::Memory`].
    pub fn add<E: Number<Float = R>>(&mut self, part: Output<E>) -> Result<(), Error> {
        for (what, expected, got) in [
            ("context", self.context.len(), part.context.len()),
            ("log-sum-exp", self.logsumexp.len(), part.logsumexp.len()),
        ] {
            if expected != got {
                return Err(Error::Length { what, expected: format!("{expected}, as the other parts"), got });
            }
        }
        if self.logsumexp.is_empty() {
            return Ok(());
        }
        let columns = self.context.len() / self.logsumexp.len();
        let mut shares = vec![[R::ZERO; 2]; self.logsumexp.len()];
        for ((ours, other), shares) in self.logsumexp.iter_mut().zip(&part.logsumexp).zip(&mut shares) {
            (*ours, *shares) = ours.merged(*other);
        }
        let of_part = E::into_floats("context", part.context)?;
        for_each_chunk(&mut self.context, ROWS_PER_CHUNK * columns.max(1), |chunk, context| {
            let rows = context
                .chunks_exact_mut(columns.max(1))
                .zip(of_part.chunks_exact(columns.max(1)).skip(chunk * ROWS_PER_CHUNK));
            for ((context, of_part), &[ours, other]) in rows.zip(&shares[chunk * ROWS_PER_CHUNK..]) {
                match (ours == R::ZERO, other == R::ZERO) {
                    // What has no share may hold anything.
                    (_, true) => {}
                    (true, false) => context.copy_from_slice(of_part),
                    // Each is multiplied before the sum, so that no sum is larger than what it is a mean of.
                    _ => context.iter_mut().zip(of_part).for_each(|(x, y)| *x = *x * ours + *y * other),
                }
            }
        });
        Ok(())
    }
}
