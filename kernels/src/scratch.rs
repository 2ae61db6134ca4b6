//! Memory that a thread keeps for its next task: fresh pages cost more than what is computed in them.

use std::cell::Cell;

use pulp::bytemuck::{Pod, Zeroable, cast_slice_mut};

use crate::error::Error;

/// A cache line, so that no vector lies across two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u64; 8]);

// SAFETY: the 64 bytes of eight u64 fill the 64 bytes of the alignment: there is no padding, and zeros are eight u64.
unsafe impl Zeroable for Line {}
// SAFETY: as above, and every bit pattern is eight u64.
unsafe impl Pod for Line {}

thread_local! {
    static LINES: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// A thread's memory, taken for a task and given back at its end.
pub(crate) struct Scratch {
    lines: Vec<Line>,
}

/// Lines that hold `count` numbers.
fn lines_for<R: Pod>(count: usize) -> usize {
    count.div_ceil(size_of::<Line>() / size_of::<R>())
}

impl Scratch {
    /// Room for pieces of these sizes.
    pub(crate) fn of_this_thread<R: Pod>(sizes: &[usize]) -> Result<Self, Error> {
        let wanted = sizes.iter().fold(0, |sum: usize, &size| sum.saturating_add(lines_for::<R>(size)));
        let mut scratch = Self { lines: LINES.take() };
        let lines = &mut scratch.lines;
        if let Some(missing) = wanted.checked_sub(lines.len()) {
            let bytes = wanted.saturating_mul(size_of::<Line>());
            lines.try_reserve_exact(missing).map_err(|_| Error::Memory { what: "scratch of a task", bytes })?;
            lines.resize(wanted, Line([0; 8]));
        }
        Ok(scratch)
    }

    /// The pieces, each starting at a cache line. They hold the numbers that the last task left there.
    pub(crate) fn pieces<R: Pod, const N: usize>(&mut self, sizes: [usize; N]) -> [&mut [R]; N] {
        let mut rest = self.lines.as_mut_slice();
        sizes.map(|size| {
            let (piece, others) = std::mem::take(&mut rest).split_at_mut(lines_for::<R>(size));
            rest = others;
            &mut cast_slice_mut(piece)[..size]
        })
    }
}

/// Takes a thread's memory into `$scratch`, an empty `Option`, and names its pieces, each with its size in numbers. Returns the
/// error if there is not enough memory.
macro_rules! pieces {
    ($scratch:expr, $float:ty: $($piece:ident: $size:expr),* $(,)?) => {
        let sizes = [$($size),*];
        let [$($piece),*] = $scratch.insert(Scratch::of_this_thread::<$float>(&sizes)?).pieces(sizes);
    };
}
pub(crate) use pieces;

impl Drop for Scratch {
    fn drop(&mut self) {
        LINES.set(std::mem::take(&mut self.lines));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_and_apart() {
        let sizes = [3, 0, 17, 64];
        let mut scratch = Scratch::of_this_thread::<f32>(&sizes).unwrap();
        let pieces = scratch.pieces::<f32, 4>(sizes);
        for (n, (piece, size)) in pieces.into_iter().zip(sizes).enumerate() {
            assert_eq!(piece.len(), size);
            assert!((piece.as_ptr() as usize).is_multiple_of(64));
            piece.fill(n as f32);
        }
        let pieces = scratch.pieces::<f32, 4>(sizes);
        assert!(pieces.iter().enumerate().all(|(n, piece)| piece.iter().all(|&x| x == n as f32)));
    }

    #[test]
    fn memory_is_kept_for_the_next_task() {
        let place = |count: usize| {
            let mut scratch = Scratch::of_this_thread::<f64>(&[count]).unwrap();
            scratch.pieces::<f64, 1>([count])[0].as_ptr()
        };
        assert_eq!(place(1000), place(10));
    }

    #[test]
    fn too_much_memory_is_an_error_and_keeps_what_there_is() {
        let error = Scratch::of_this_thread::<f32>(&[usize::MAX, usize::MAX]).err();
        assert!(matches!(error, Some(Error::Memory { .. })), "{error:?}");
        assert!(Scratch::of_this_thread::<f32>(&[8]).is_ok());
    }
}
