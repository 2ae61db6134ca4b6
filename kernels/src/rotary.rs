//! Rotary position embedding: pairs of entries of a head, rotated in place.
//!
//! Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.4.2.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::alloc::{collected, filled, product};
use crate::dtype::Number;
use crate::error::Error;
use crate::schedule::for_each_chunk;
use crate::simd::{SimdFloat, instruction_set};

/// Numbers of a parallel piece of work: few enough to stay in a core's cache.
const NUMBERS_PER_TASK: usize = 32 << 10;

/// Which entries of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Entry `i` with entry `i + dim / 2`.
    HalfSplit,
    /// Entry `2i` with entry `2i + 1`.
    Interleaved,
}

/// The angles of every position, and which entries they rotate.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a, R> {
    /// Which entries are rotated together.
    pub pairing: Pairing,
    /// The entries of a head that are rotated: the first ones.
    pub dim: usize,
    /// Tokens of a sequence.
    pub len: usize,
    /// (lists, len, dim / 2): a list for each sequence, or one for all.
    pub cos: &'a [R],
    /// As `cos`.
    pub sin: &'a [R],
}

/// Where the heads lie: rows of `stride` numbers, of which `columns` are heads of `head_dim`.
#[derive(Clone, Debug)]
pub struct Heads {
    /// Numbers from a row to the next.
    pub stride: usize,
    /// The heads of a row.
    pub columns: Range<usize>,
    /// Numbers of a head.
    pub head_dim: usize,
    /// Rows of a sequence: a multiple of its tokens. Row r belongs to token `r % len`.
    pub rows_per_sequence: usize,
}

impl<R: SimdFloat + Number<Float = R>> Rotation<'_, R> {
    /// (a, b) = (a cos - b sin, a sin + b cos) for each pair of each head; with `inverse` the rotation back by the same angle, which is
    /// the gradient.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] where the tables, rows or columns don't fit each other, [`Error::Memory`].
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::rotary::{Heads, Pairing, Rotation};
    ///
    /// // Two tokens of one head of two numbers. The second token makes a quarter turn.
    /// let rotation = Rotation { pairing: Pairing::HalfSplit, dim: 2, len: 2, cos: &[1.0, 0.0], sin: &[0.0, 1.0] };
    /// let heads = Heads { stride: 2, columns: 0..2, head_dim: 2, rows_per_sequence: 2 };
    /// let mut rows = [1.0f32, 2.0, 1.0, 2.0];
    /// rotation.rotate(&mut rows, &heads, false)?;
    /// assert_eq!(rows, [1.0, 2.0, -2.0, 1.0]);
    /// rotation.rotate(&mut rows, &heads, true)?;
    /// assert_eq!(rows, [1.0, 2.0, 1.0, 2.0]);
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn rotate<E: Number<Float = R>>(&self, rows: &mut [E], heads: &Heads, inverse: bool) -> Result<(), Error> {
        self.check(rows.len(), heads)?;
        if rows.is_empty() || heads.columns.is_empty() {
            return Ok(());
        }
        let rows_per_task = (NUMBERS_PER_TASK / heads.stride).max(1);
        // Allocated before the tasks, which can't fail.
        let tasks = rows.len().div_ceil(rows_per_task * heads.stride);
        let mut scratch = filled("head to rotate", tasks * heads.head_dim, R::ZERO)?;
        let pieces = rows.chunks_mut(rows_per_task * heads.stride).zip(scratch.chunks_mut(heads.head_dim));
        let mut pieces = collected("pieces to rotate", pieces)?;
        for_each_chunk(&mut pieces, 1, |task, piece| {
            let (rows, head) = &mut piece[0];
            instruction_set().dispatch(Rotate {
                rotation: self,
                heads,
                first: task * rows_per_task,
                rows,
                head,
                inverse,
            });
        });
        Ok(())
    }

    fn check(&self, len: usize, heads: &Heads) -> Result<(), Error> {
        let Heads { stride, ref columns, head_dim, rows_per_sequence } = *heads;
        let refuse = |what, expected: String, got| Err(Error::Length { what, expected, got });
        if stride == 0 || !len.is_multiple_of(stride) || columns.end > stride {
            return refuse("rows to rotate", format!("rows of {stride} numbers that hold {columns:?}"), len);
        }
        if head_dim == 0
            || !columns.len().is_multiple_of(head_dim)
            || self.dim > head_dim
            || !self.dim.is_multiple_of(2)
        {
            let expected = format!("heads of {head_dim}, of which an even number {} is rotated", self.dim);
            return refuse("heads to rotate", expected, columns.len());
        }
        let rows = len / stride;
        if rows > 0 && (self.len == 0 || rows_per_sequence == 0 || !rows_per_sequence.is_multiple_of(self.len)) {
            return refuse("rows of a sequence", format!("a multiple of its {} tokens", self.len), rows_per_sequence);
        }
        let list = product("tables of a rotation", &[self.len, self.dim / 2])?;
        let lists = if rows == 0 { 0 } else { rows.div_ceil(rows_per_sequence) };
        for (what, table) in [("cosines", self.cos.len()), ("sines", self.sin.len())] {
            if list > 0 && table != list && table != list.saturating_mul(lists) {
                return refuse(what, format!("{list} for one sequence, or for each of {lists}"), table);
            }
        }
        if self.cos.len() == self.sin.len() {
            return Ok(());
        }
        refuse("sines", format!("as many as cosines, {}", self.cos.len()), self.sin.len())
    }
}

/// Rotates some rows.
struct Rotate<'a, 'b, E: Number> {
    rotation: &'a Rotation<'a, E::Float>,
    heads: &'a Heads,
    /// The number of the first row.
    first: usize,
    rows: &'b mut [E],
    /// Room for a head.
    head: &'b mut [E::Float],
    inverse: bool,
}

impl<E: Number> WithSimd for Rotate<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { rotation, heads, first, rows, head, inverse } = self;
        let half = rotation.dim / 2;
        let list = rotation.len * half;
        let several = rotation.cos.len() != list;
        for (row, numbers) in rows.chunks_exact_mut(heads.stride).enumerate() {
            let row = first + row;
            let sequence = if several { row / heads.rows_per_sequence } else { 0 };
            let start = sequence * list + row % heads.rows_per_sequence % rotation.len * half;
            let (cos, sin) = (&rotation.cos[start..start + half], &rotation.sin[start..start + half]);
            for numbers in numbers[heads.columns.clone()].chunks_exact_mut(heads.head_dim) {
                let numbers = &mut numbers[..rotation.dim];
                let head = &mut head[..rotation.dim];
                E::widen_all(numbers, head);
                match rotation.pairing {
                    Pairing::HalfSplit => rotate_halves(head, cos, sin, inverse),
                    Pairing::Interleaved => rotate_neighbours(head, cos, sin, inverse),
                }
                for (number, x) in numbers.iter_mut().zip(head.iter()) {
                    *number = E::narrow(*x);
                }
            }
        }
    }
}

#[inline(always)]
fn rotate_halves<R: SimdFloat>(head: &mut [R], cos: &[R], sin: &[R], inverse: bool) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = rotated(*a, *b, *cos, if inverse { -*sin } else { *sin });
    }
}

#[inline(always)]
fn rotate_neighbours<R: SimdFloat>(head: &mut [R], cos: &[R], sin: &[R], inverse: bool) {
    for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        *pair = rotated(pair[0], pair[1], *cos, if inverse { -*sin } else { *sin }).into();
    }
}

#[inline(always)]
fn rotated<R: SimdFloat>(a: R, b: R, cos: R, sin: R) -> (R, R) {
    (a * cos - b * sin, a * sin + b * cos)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// Entries of a head, one by one, in f64.
    fn naive(head: &[f64], pairing: Pairing, angles: &[f64]) -> Vec<f64> {
        let mut result = head.to_vec();
        for (i, angle) in angles.iter().enumerate() {
            let (a, b) = match pairing {
                Pairing::HalfSplit => (i, i + angles.len()),
                Pairing::Interleaved => (2 * i, 2 * i + 1),
            };
            result[a] = head[a] * angle.cos() - head[b] * angle.sin();
            result[b] = head[a] * angle.sin() + head[b] * angle.cos();
        }
        result
    }

    fn check<E: Number>(tolerance: f64) {
        // Two sequences of 3 tokens, each row two heads of 10 numbers between 3 others before and 2 after; 8 of 10 are rotated.
        let (lists, len, dim, stride) = (2, 3, 8, 25);
        let heads = Heads { stride, columns: 3..23, head_dim: 10, rows_per_sequence: len };
        let numbers: Vec<f64> = (0..lists * len * stride).map(|i| (i as f64 * 0.7).sin()).collect();
        let angles: Vec<f64> = (0..lists * len * dim / 2).map(|i| i as f64 * 0.3).collect();
        let table = |f: fn(f64) -> f64| angles.iter().map(|&x| E::Float::from_f64(f(x))).collect::<Vec<_>>();
        let (cos, sin) = (table(f64::cos), table(f64::sin));
        for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
            let mut rows: Vec<E> = numbers.iter().map(|&x| E::narrow(E::Float::from_f64(x))).collect();
            let before: Vec<f64> = rows.iter().map(|x| x.widen().to_f64()).collect();
            let rotation = Rotation { pairing, dim, len, cos: &cos, sin: &sin };
            rotation.rotate(&mut rows, &heads, false).unwrap();
            for (row, (now, before)) in rows.chunks(stride).zip(before.chunks(stride)).enumerate() {
                let mut expected = before.to_vec();
                for head in [3, 13] {
                    let angles = &angles[row * dim / 2..][..dim / 2];
                    expected[head..head + dim].copy_from_slice(&naive(&before[head..head + dim], pairing, angles));
                }
                for (x, expected) in now.iter().zip(expected) {
                    assert!((x.widen().to_f64() - expected).abs() <= tolerance, "{pairing:?}");
                }
            }
            rotation.rotate(&mut rows, &heads, true).unwrap();
            assert!(rows.iter().zip(&before).all(|(x, y)| (x.widen().to_f64() - y).abs() <= 2.0 * tolerance));
        }
    }

    #[test]
    fn heads_are_rotated_as_one_by_one() {
        check::<f32>(1e-6);
        check::<f64>(1e-15);
        check::<bf16>(0.005);
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() {
        let rotation = Rotation { pairing: Pairing::HalfSplit, dim: 2, len: 2, cos: &[1.0f32, 1.0], sin: &[0.0, 0.0] };
        let heads = Heads { stride: 4, columns: 0..4, head_dim: 2, rows_per_sequence: 2 };
        let error = |rotation: Rotation<f32>, heads: Heads, len| {
            let mut rows = vec![1.0f32; len];
            match rotation.rotate(&mut rows, &heads, false) {
                Err(Error::Length { what, .. }) => what,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(error(rotation, heads.clone(), 7), "rows to rotate");
        assert_eq!(error(rotation, Heads { columns: 2..5, ..heads.clone() }, 8), "rows to rotate");
        assert_eq!(error(rotation, Heads { columns: 0..3, ..heads.clone() }, 8), "heads to rotate");
        assert_eq!(error(rotation, Heads { rows_per_sequence: 3, ..heads.clone() }, 8), "rows of a sequence");
        assert_eq!(error(Rotation { cos: &[1.0], ..rotation }, heads.clone(), 8), "cosines");
        assert_eq!(error(Rotation { sin: &[0.0; 4], ..rotation }, heads, 16), "sines");
    }
}
