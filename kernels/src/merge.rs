//! [`Output::merge`]: attention over several parts of the keys, put together.

use crate::alloc::filled;
use crate::attention::Output;
use crate::dtype::Number;
use crate::error::Error;
use crate::schedule::for_each_chunk;
use crate::simd::SimdFloat;
use crate::softmax::LogSumExp;

/// Rows of a parallel piece of work.
const ROWS_PER_CHUNK: usize = 64;

impl<R: SimdFloat + Number<Float = R>> Output<R> {
    /// Adds the result of the same queries over other keys, by its log-sum-exp. Both stand heads first. The order in which parts are
    /// merged changes the result by rounding.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] for another number of rows or columns, [`Error::Memory`].
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::{Layout, Problem, ProblemOptions, View, forward};
    ///
    /// // One query, whose scores are 1 and 3. The values are 10 and 20.
    /// let over = |key: f64, value: f64| {
    ///     let [q, k, v] = [[1.0], [key], [value]];
    ///     let view = |data| View::new("test", data, [1; 3], [1; 4]);
    ///     forward(&Problem::new(view(&q)?, view(&k)?, view(&v)?, ProblemOptions::default())?, Layout::HeadsFirst)
    /// };
    /// let mut merged = over(1.0, 10.0)?;
    /// merged.merge(&over(3.0, 20.0)?)?;
    /// let weights = [1f64.exp(), 3f64.exp()];
    /// let expected = (10.0 * weights[0] + 20.0 * weights[1]) / (weights[0] + weights[1]);
    /// assert!((merged.context[0] - expected).abs() < 1e-12);
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn merge(&mut self, part: &Self) -> Result<(), Error> {
        for (what, expected, got) in [
            ("context", self.context.len(), part.context.len()),
            ("log-sum-exp", self.logsumexp.len(), part.logsumexp.len()),
        ] {
            if expected != got {
                return Err(Error::Length { what, expected: format!("{expected}, as the other parts"), got });
            }
        }
        let rows = self.logsumexp.len();
        let columns = self.context.len() / rows.max(1);
        let none = (LogSumExp::default(), [R::ZERO; 2]);
        let mut merged = filled("shares of the parts", rows, none)?;
        for_each_chunk(&mut merged, ROWS_PER_CHUNK, |chunk, merged| {
            let first = chunk * ROWS_PER_CHUNK;
            let parts = self.logsumexp[first..].iter().zip(&part.logsumexp[first..]);
            merged.iter_mut().zip(parts).for_each(|(merged, (ours, other))| *merged = ours.merged(*other));
        });
        // Each is multiplied before the sum, so that no sum is larger than what it is a mean of. An infinite number and NaN are those of a
        // visible key, and show even where the share is rounded to zero.
        let term = |x: R, share: R| if x.is_finite() { x * share } else { x };
        for_each_chunk(&mut self.context, ROWS_PER_CHUNK * columns.max(1), |chunk, context| {
            let others = part.context.chunks_exact(columns.max(1)).zip(&merged).skip(chunk * ROWS_PER_CHUNK);
            for (context, (of_part, (_, [ours, other]))) in context.chunks_exact_mut(columns.max(1)).zip(others) {
                context.iter_mut().zip(of_part).for_each(|(x, y)| *x = term(*x, *ours) + term(*y, *other));
            }
        });
        self.logsumexp.iter_mut().zip(merged).for_each(|(ours, (merged, _))| *ours = merged);
        Ok(())
    }
}
