//! Dropout of a branch, and its sum with the residual.
//!
//! Whether the number at position i of a tensor is dropped is a function of the seed and of i alone. The numbers in a group of
//! 64 take the four numbers of [`philox`](crate::philox) at 16 counters: number r of group g takes number r / 16 at counter
//! 16 · g + r mod 16. So neighbours take the same number of neighbouring counters, which are computed as vectors.

use std::mem::MaybeUninit;

use pulp::{Simd, WithSimd};

use crate::alloc::{copy_of, filled, reserve};
use crate::dropout::{Dropout, philox_lanes};
use crate::dtype::Number;
use crate::error::Error;
use crate::matrix::{Matrix, Shared};
use crate::pointwise::{NUMBERS_PER_TASK, Pointwise, WORK_PER_NUMBER, apart, lines};
use crate::schedule::run_tasks;
use crate::simd::{SimdFloat, instruction_set};

/// Numbers whose random numbers are computed together; [`NUMBERS_PER_TASK`] is a multiple of it.
const GROUP: usize = 64;
/// Counters of a group.
const COUNTERS: usize = GROUP / 4;
/// The last part of each counter. Attention's dropout has the number of a head there, which is never so large: the same seed gives
/// it other numbers.
const OF_TENSORS: u32 = u32::MAX;

/// x + dropout(branch), or dropout(branch) alone: each number of the branch is dropped with probability p, and the others are
/// divided by 1 - p. A dropped number counts as 0, even if it is not finite.
///
/// # Errors
///
/// Two lengths, a probability outside [0, 1), or too little memory.
///
/// # Examples
///
/// ```
/// use attention_kernels::Dropout;
/// use attention_kernels::residual::add_dropped;
///
/// assert_eq!(add_dropped(Some(&[1f32, 2.0]), &[3.0, 4.0], None)?, [4.0, 6.0]);
/// let half = add_dropped(Some(&[1f32; 1000]), &[3.0; 1000], Some(Dropout { p: 0.5, seed: 7, first: 0 }))?;
/// assert!(half.iter().all(|&y| y == 1.0 || y == 7.0));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
///
/// Source: Srivastava et al., "Dropout" (JMLR 2014), section 10, for the division.
pub fn add_dropped<E: Number>(x: Option<&[E]>, branch: &[E], dropout: Option<Dropout>) -> Result<Vec<E>, Error> {
    const WHAT: &str = "sum of a residual and a branch";
    if let Some(x) = x.filter(|x| x.len() != branch.len()) {
        return Err(Error::Length { what: "residual", expected: format!("{} elements", branch.len()), got: x.len() });
    }
    match (x, checked(dropout)?) {
        (None, None) => copy_of(WHAT, branch),
        (Some(x), None) => {
            let [sum] = apart(WHAT, [x, branch].map(|x| Matrix::new(x, 1, x.len(), x.len())), Sum)?;
            Ok(sum)
        }
        (x, Some(dropout)) => dropped(WHAT, x, branch, dropout),
    }
}

/// The gradient of the branch: what was dropped has none.
///
/// # Errors
///
/// A probability outside [0, 1), or too little memory.
pub fn dropped_gradient<E: Number>(grad: &[E], dropout: Option<Dropout>) -> Result<Vec<E>, Error> {
    const WHAT: &str = "gradient of a branch";
    match checked(dropout)? {
        None => copy_of(WHAT, grad),
        Some(dropout) => dropped(WHAT, None, grad, dropout),
    }
}

/// The dropout, if it drops anything.
fn checked(dropout: Option<Dropout>) -> Result<Option<Dropout>, Error> {
    match dropout {
        Some(Dropout { p, .. }) if !(0.0..1.0).contains(&p) => {
            Err(Error::Option { what: "dropout", expected: "a probability in [0, 1)", got: p.to_string() })
        }
        dropout => Ok(dropout.filter(|dropout| dropout.p > 0.0)),
    }
}

#[derive(Clone, Copy)]
struct Sum;

impl<R: SimdFloat> Pointwise<R, 2, 1> for Sum {
    #[inline(always)]
    fn eval<S: Simd>(self, simd: S, [x, y]: [R::Vector<S>; 2]) -> [R::Vector<S>; 1] {
        [R::vadd(simd, x, y)]
    }
}

lines!(Sum, 2 => 1, |op, run| run!(op));

fn dropped<E: Number>(what: &'static str, x: Option<&[E]>, branch: &[E], dropout: Dropout) -> Result<Vec<E>, Error> {
    let len = branch.len();
    let mut result = reserve(what, len)?;
    let shared = Shared::new(&mut result.spare_capacity_mut()[..len]);
    run_tasks(len.saturating_mul(WORK_PER_NUMBER), len.div_ceil(NUMBERS_PER_TASK), |task| {
        let first = task * NUMBERS_PER_TASK;
        let count = NUMBERS_PER_TASK.min(len - first);
        // SAFETY: no two tasks have an element in common.
        let mut to = unsafe { shared.rows(first, 1, count, count) };
        let (x, branch) = (x.map(|x| &x[first..][..count]), &branch[first..][..count]);
        let whole = dropout.first.wrapping_add(first as u64);
        // The numbers before the task's in its first group.
        let before = (whole % GROUP as u64) as usize;
        let mut numbers = filled("random numbers of dropout", count.next_multiple_of(GROUP) + GROUP, 0)?;
        let drawn = (before + count).next_multiple_of(GROUP);
        draw(dropout.seed, whole / GROUP as u64, &mut numbers[..drawn]);
        instruction_set().dispatch(Part { x, branch, to: to.row(0), dropout, numbers: &numbers[before..] });
        Ok(())
    })?;
    // SAFETY: `reserve` has made room for `len` numbers, and the tasks have written all of them.
    unsafe { result.set_len(len) };
    Ok(result)
}

/// A task.
struct Part<'a, E> {
    x: Option<&'a [E]>,
    branch: &'a [E],
    to: &'a mut [MaybeUninit<E>],
    dropout: Dropout,
    /// A random number for each number of the task, and more after them.
    numbers: &'a [u32],
}

impl<E: Number> WithSimd for Part<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (threshold, keep) = (self.dropout.threshold(), E::Float::from_f64(1.0 / (1.0 - self.dropout.p)));
        let (mut sum, mut branch) = ([E::Float::ZERO; GROUP], [E::Float::ZERO; GROUP]);
        for (group, to) in self.to.chunks_mut(GROUP).enumerate() {
            let (start, len) = (group * GROUP, to.len());
            E::widen_all(&self.branch[start..][..len], &mut branch[..len]);
            if let Some(x) = self.x {
                E::widen_all(&x[start..][..len], &mut sum[..len]);
            } else {
                sum = [E::Float::ZERO; GROUP];
            }
            let numbers = &self.numbers[start..][..GROUP];
            for i in 0..GROUP {
                let term = if numbers[i] < threshold { E::Float::ZERO } else { branch[i] * keep };
                sum[i] += term;
            }
            E::narrow_all(&sum[..len], to);
        }
    }
}

/// The random numbers of whole groups. It isn't generic, so that this package holds its code.
#[inline(never)]
fn draw(seed: u64, first_group: u64, numbers: &mut [u32]) {
    struct Draw<'a> {
        seed: u64,
        first_group: u64,
        numbers: &'a mut [u32],
    }
    impl WithSimd for Draw<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for (group, numbers) in self.numbers.chunks_exact_mut(GROUP).enumerate() {
                numbers.copy_from_slice(&numbers_of_group(simd, self.seed, self.first_group + group as u64));
            }
        }
    }
    instruction_set().dispatch(Draw { seed, first_group, numbers });
}

/// The random numbers of a group.
#[inline(always)]
fn numbers_of_group<S: Simd>(simd: S, seed: u64, group: u64) -> [u32; GROUP] {
    let mut numbers = [0; GROUP];
    let first = group * COUNTERS as u64;
    for lane in (0..COUNTERS).step_by(S::U32_LANES) {
        let counter = [0, first as u32 + lane as u32, (first >> 32) as u32, OF_TENSORS];
        let all = philox_lanes(simd, seed, counter);
        for n in 0..4 {
            numbers[n * COUNTERS + lane..][..S::U32_LANES].copy_from_slice(&all[n][..S::U32_LANES]);
        }
    }
    numbers
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::philox::philox;
    use crate::simd::with_every_simd;

    #[test]
    fn random_numbers_of_a_group_are_the_generator() {
        with_every_simd!(|simd| {
            // The counters of the second group lie beyond 32 bits.
            for group in [3, (1 << 28) + 5] {
                let numbers = numbers_of_group(simd, 99, group);
                for (r, number) in numbers.into_iter().enumerate() {
                    let counter = group * 16 + (r % 16) as u64;
                    let expected = philox(99, [0, counter as u32, (counter >> 32) as u32, u32::MAX]);
                    assert_eq!(number, expected[r / 16]);
                }
            }
        });
    }

    #[test]
    fn what_is_dropped_depends_on_the_position_alone_and_has_the_right_share() {
        let dropout = Dropout { p: 0.25, seed: 5, first: 0 };
        let count = if cfg!(miri) { 300 } else { 3 * NUMBERS_PER_TASK + 77 };
        let ones = vec![1f32; count];
        let long = add_dropped(None, &ones, Some(dropout)).unwrap();
        for short in [1, 63, 64, 200] {
            assert_eq!(add_dropped(None, &ones[..short], Some(dropout)).unwrap(), long[..short]);
        }
        for first in [1, 63, 64, 200, count - 1] {
            let dropout = Some(Dropout { first: first as u64, ..dropout });
            assert_eq!(add_dropped(None, &ones[first..], dropout).unwrap(), long[first..], "{first}");
        }
        let kept = long.iter().filter(|&&y| y != 0.0).count() as f64 / count as f64;
        assert!((kept - 0.75).abs() < if cfg!(miri) { 0.1 } else { 0.01 }, "{kept}");
        assert!(long.iter().all(|&y| y == 0.0 || y == 4.0 / 3.0));
    }

    #[test]
    fn gradient_is_zero_where_the_branch_was_dropped() {
        let dropout = Some(Dropout { p: 0.5, seed: 6, first: 0 });
        let x = vec![bf16::from_f32(2.0); 150];
        let sum = add_dropped(Some(&x), &x, dropout).unwrap();
        let grad = dropped_gradient(&x, dropout).unwrap();
        assert!(sum.iter().zip(&grad).all(|(y, grad)| y.to_f32() == 2.0 + grad.to_f32()));
        assert!(grad.iter().any(|x| x.to_f32() == 0.0) && grad.iter().any(|x| x.to_f32() == 4.0));
    }

    #[test]
    fn dropped_infinity_is_zero() {
        let dropout = Some(Dropout { p: 0.5, seed: 6, first: 0 });
        let sum = add_dropped(Some(&[1f64; 100]), &[f64::INFINITY; 100], dropout).unwrap();
        assert!(sum.contains(&1.0) && sum.contains(&f64::INFINITY));
        assert!(!sum.iter().any(|x| x.is_nan()));
    }

    #[test]
    fn bad_input_is_an_error() {
        assert!(matches!(add_dropped(Some(&[1f32; 3]), &[1.0; 4], None), Err(Error::Length { got: 3, .. })));
        for p in [1.0, -0.1, f64::NAN] {
            let result = dropped_gradient(&[1f32; 3], Some(Dropout { p, ..Dropout::default() }));
            assert!(matches!(result, Err(Error::Option { what: "dropout", .. })), "{p}");
        }
    }
}
