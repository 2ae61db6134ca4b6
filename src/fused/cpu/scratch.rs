//! Memory that a thread keeps for its next task: fresh pages cost more than what is computed in them.

use std::cell::Cell;

use super::real::Real;

/// A cache line, so that no vector lies across two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u64; 8]);

thread_local! {
    static LINES: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// A thread's memory, taken for a task and given back with its end.
pub(crate) struct Scratch {
    lines: Vec<Line>,
}

/// Lines that hold this many numbers.
fn lines_for<R: Real>(count: usize) -> usize {
    count.div_ceil(size_of::<Line>() / size_of::<R>())
}

impl Scratch {
    /// Room for pieces of these sizes.
    pub(crate) fn of_this_thread<R: Real>(sizes: &[usize]) -> Self {
        let wanted = sizes.iter().map(|&size| lines_for::<R>(size)).sum();
        let mut lines = LINES.take();
        if lines.len() < wanted {
            lines.resize(wanted, Line([0; 8]));
        }
        Self { lines }
    }

    /// The pieces, each starting at a cache line, with whatever was in them before.
    pub(crate) fn pieces<R: Real, const N: usize>(&mut self, sizes: [usize; N]) -> [&mut [R]; N] {
        let mut rest = self.lines.as_mut_slice();
        sizes.map(|size| {
            let (piece, others) = std::mem::take(&mut rest).split_at_mut(lines_for::<R>(size));
            rest = others;
            // SAFETY: the piece has room for `size` numbers, is aligned for them, is initialised, and any bits are a
            // number; it is borrowed for as long as the memory.
            unsafe { std::slice::from_raw_parts_mut(piece.as_mut_ptr().cast::<R>(), size) }
        })
    }
}

/// A struct whose fields are pieces of a thread's memory, each with its size in numbers.
macro_rules! pieces {
    ($scratch:ident: $real:ty => $name:ident { $($piece:ident: $size:expr),* $(,)? }) => {{
        let sizes = [$($size),*];
        $scratch = Scratch::of_this_thread::<$real>(&sizes);
        let [$($piece),*] = $scratch.pieces(sizes);
        $name { $($piece),* }
    }};
}
pub(crate) use pieces;

impl Drop for Scratch {
    fn drop(&mut self) {
        LINES.set(std::mem::take(&mut self.lines));
    }
}
