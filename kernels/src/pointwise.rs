//! Functions of numbers at the same place: matrices in, vectors out, whatever type they hold.

use std::any::TypeId;
use std::mem::MaybeUninit;

use pulp::bytemuck::cast_slice;
use pulp::{Simd, WithSimd};

use crate::alloc::{product, reserve};
use crate::dtype::{Number, narrow, widen};
use crate::error::Error;
use crate::matrix::{Matrix, MatrixMut, Shared};
use crate::schedule::run_tasks;
use crate::simd::{MAX_LANES, SimdFloat, as_vectors, instruction_set, load_up_to, store_up_to};

/// Numbers of a task: some microseconds of work, in pieces that the second cache holds.
pub(crate) const NUMBERS_PER_TASK: usize = 16 << 10;
/// What a number costs in the multiplications that [`run_tasks`] counts: about half a nanosecond, since memory is the limit.
pub(crate) const WORK_PER_NUMBER: usize = 25;
/// Numbers of a half type that are widened at a time: so many that calls of a dispatched function cost nothing beside them.
const TILE: usize = 512;

/// A function of `N` numbers with `M` results.
pub(crate) trait Pointwise<R: SimdFloat, const N: usize, const M: usize>: Copy + Send + Sync {
    fn eval<S: Simd>(self, simd: S, x: [R::Vector<S>; N]) -> [R::Vector<S>; M];
}

/// A function on lines of f32 and of f64. Its methods aren't generic, so that this package holds their code.
pub(crate) trait Lines<const N: usize, const M: usize>: Copy + Send + Sync {
    fn of_f32(self, x: [&[f32]; N], y: [&mut [MaybeUninit<f32>]; M]);
    fn of_f64(self, x: [&[f64]; N], y: [&mut [MaybeUninit<f64>]; M]);
}

/// Implements [`Lines`] for a type by an expression of type [`Pointwise`], which it may choose with a macro.
macro_rules! lines {
    ($type:ty, $n:literal => $m:literal, |$op:ident, $run:ident| $body:expr) => {
        impl crate::pointwise::Lines<$n, $m> for $type {
            #[inline(never)]
            fn of_f32(self, x: [&[f32]; $n], y: [&mut [std::mem::MaybeUninit<f32>]; $m]) {
                let $op = self;
                macro_rules! $run {
                    ($function:expr) => {
                        crate::pointwise::run_line(x, y, $function)
                    };
                }
                $body
            }
            #[inline(never)]
            fn of_f64(self, x: [&[f64]; $n], y: [&mut [std::mem::MaybeUninit<f64>]; $m]) {
                let $op = self;
                macro_rules! $run {
                    ($function:expr) => {
                        crate::pointwise::run_line(x, y, $function)
                    };
                }
                $body
            }
        }
    };
}
pub(crate) use lines;

/// Computes a line with the best instruction set.
#[inline(always)]
pub(crate) fn run_line<R: SimdFloat, const N: usize, const M: usize>(
    x: [&[R]; N],
    y: [&mut [MaybeUninit<R>]; M],
    function: impl Pointwise<R, N, M>,
) {
    instruction_set().dispatch(Line { x, y, function });
}

/// A line of the type that is computed in.
fn call<R: SimdFloat, const N: usize, const M: usize>(
    x: [&[R]; N],
    y: [&mut [MaybeUninit<R>]; M],
    lines: impl Lines<N, M>,
) {
    fn cast<R: 'static, T: 'static>(y: &mut [MaybeUninit<R>]) -> &mut [MaybeUninit<T>] {
        let len = y.len();
        let same = MatrixMut::new(y, 1, len, len).into_downcast().expect("one of two types, and not the other");
        same.into_row(0)
    }
    if TypeId::of::<R>() == TypeId::of::<f32>() {
        lines.of_f32(x.map(cast_slice), y.map(cast));
    } else {
        lines.of_f64(x.map(cast_slice), y.map(cast));
    }
}

/// The results of a function, each in a vector of its own, row by row.
pub(crate) fn apart<E: Number, const N: usize, const M: usize>(
    what: &'static str,
    inputs: [Matrix<E>; N],
    lines: impl Lines<N, M>,
) -> Result<[Vec<E>; M], Error> {
    let (rows, columns) = (inputs[0].rows(), inputs[0].columns());
    let len = product(what, &[rows, columns])?;
    let mut results = [const { Vec::new() }; M];
    for result in &mut results {
        *result = reserve(what, len)?;
    }
    let shared = results.each_mut().map(|result| Shared::new(&mut result.spare_capacity_mut()[..len]));
    run(inputs, shared.each_ref().map(|shared| Target { shared, first: 0, stride: columns }), lines)?;
    for result in &mut results {
        // SAFETY: `reserve` has made room for `len` numbers, and `run` has written each of them.
        unsafe { result.set_len(len) };
    }
    Ok(results)
}

/// The results of a function beside each other: row r holds row r of the first result, then row r of the second, and so on.
pub(crate) fn beside<E: Number, const N: usize, const M: usize>(
    what: &'static str,
    inputs: [Matrix<E>; N],
    lines: impl Lines<N, M>,
) -> Result<Vec<E>, Error> {
    let (rows, columns) = (inputs[0].rows(), inputs[0].columns());
    let len = product(what, &[rows, columns, M])?;
    let mut result = reserve(what, len)?;
    let shared = Shared::new(&mut result.spare_capacity_mut()[..len]);
    let target = |m: usize| Target { shared: &shared, first: m * columns, stride: M * columns };
    run(inputs, std::array::from_fn(target), lines)?;
    // SAFETY: `reserve` has made room for `len` numbers, and `run` has written each of them.
    unsafe { result.set_len(len) };
    Ok(result)
}

/// Where a result's rows stand. No two targets of one call have an element in common.
struct Target<'a, 'b, E> {
    shared: &'a Shared<'b, MaybeUninit<E>>,
    first: usize,
    stride: usize,
}

/// Writes every element of the targets.
fn run<E: Number, const N: usize, const M: usize>(
    inputs: [Matrix<E>; N],
    targets: [Target<E>; M],
    lines: impl Lines<N, M>,
) -> Result<(), Error> {
    let (rows, columns) = (inputs[0].rows(), inputs[0].columns());
    assert!(inputs.iter().all(|x| x.rows() == rows && x.columns() == columns), "inputs of one size");
    if rows * columns == 0 {
        return Ok(());
    }
    // A task has many short rows, or a piece of a long one.
    let pieces = columns.div_ceil(NUMBERS_PER_TASK);
    let rows_per_task = (NUMBERS_PER_TASK / columns).max(1);
    run_tasks(rows * columns * WORK_PER_NUMBER, rows.div_ceil(rows_per_task) * pieces, |task| {
        let first = task / pieces * rows_per_task;
        let count = rows_per_task.min(rows - first);
        let column = task % pieces * NUMBERS_PER_TASK;
        let width = NUMBERS_PER_TASK.min(columns - column);
        let outputs = targets.each_ref().map(|target| {
            // SAFETY: no two tasks have a row and a column in common, and no two targets an element: each of them was made by
            // `apart` for another vector, or by `beside` for other columns.
            unsafe { target.shared.rows(target.first + first * target.stride + column, count, width, target.stride) }
        });
        let mut buffer = Buffer { wide: [[E::Float::ZERO; TILE]; N], results: [[E::Float::ZERO; TILE]; M] };
        let mut outputs = outputs;
        for row in 0..count {
            let mut x: [&[E]; N] = [&[]; N];
            for (x, input) in x.iter_mut().zip(&inputs) {
                *x = &input.row(first + row)[column..][..width];
            }
            match all_floats(x) {
                Some(x) => {
                    let y = outputs.each_mut().map(|output| floats_of_row(output, row));
                    call(x, y, lines);
                }
                None => buffer.run(x, outputs.each_mut().map(|output| output.row(row)), lines),
            }
        }
        Ok(())
    })
}

/// The same slices, if their type is computed in itself.
fn all_floats<E: Number, const N: usize>(x: [&[E]; N]) -> Option<[&[E::Float]; N]> {
    let mut floats: [&[E::Float]; N] = [&[]; N];
    for (floats, x) in floats.iter_mut().zip(x) {
        *floats = E::as_floats(x)?;
    }
    Some(floats)
}

/// A row of a result whose type is computed in itself.
fn floats_of_row<'m, E: Number>(
    output: &'m mut MatrixMut<MaybeUninit<E>>,
    row: usize,
) -> &'m mut [MaybeUninit<E::Float>] {
    let floats = output.downcast::<MaybeUninit<E::Float>>().expect("`as_floats` has shown that the types are the same");
    floats.into_row(row)
}

/// Numbers of a half type as the type that is computed in, some at a time.
struct Buffer<R, const N: usize, const M: usize> {
    wide: [[R; TILE]; N],
    results: [[R; TILE]; M],
}

impl<R: SimdFloat, const N: usize, const M: usize> Buffer<R, N, M> {
    /// Computes a line of a half type.
    fn run<E: Number<Float = R>>(&mut self, x: [&[E]; N], mut y: [&mut [MaybeUninit<E>]; M], lines: impl Lines<N, M>) {
        let width = x[0].len();
        for start in (0..width).step_by(TILE) {
            let len = TILE.min(width - start);
            for (wide, x) in self.wide.iter_mut().zip(x) {
                widen(&x[start..][..len], wide);
            }
            let results = self.results.each_mut().map(|y| uninit(&mut y[..len]));
            call(self.wide.each_ref().map(|x| &x[..len]), results, lines);
            for (y, results) in y.iter_mut().zip(&self.results) {
                narrow(&results[..len], &mut y[start..][..len]);
            }
        }
    }
}

/// Initialised numbers as memory that need not be. Only numbers are written to it.
fn uninit<R: SimdFloat>(numbers: &mut [R]) -> &mut [MaybeUninit<R>] {
    let len = numbers.len();
    // SAFETY: `Line`, which alone gets the result, writes vectors of numbers to it, all of them initialised.
    unsafe { MatrixMut::new(numbers, 1, len, len).into_uninit() }.into_row(0)
}

/// A line of each input and result, all of one length.
struct Line<'a, 'b, R, F, const N: usize, const M: usize> {
    x: [&'a [R]; N],
    y: [&'b mut [MaybeUninit<R>]; M],
    function: F,
}

impl<R: SimdFloat, F: Pointwise<R, N, M>, const N: usize, const M: usize> WithSimd for Line<'_, '_, R, F, N, M> {
    type Output = ();

    /// Computes vector by vector, and the numbers behind the last in a vector that is filled up with zeros.
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, y, function } = self;
        let (len, lanes) = (y[0].len(), R::lanes::<S>());
        let (vectors, rest) = (len / lanes, len % lanes);
        let mut input = [R::splat(simd, R::ZERO); N];
        for j in 0..vectors {
            for n in 0..N {
                input[n] = as_vectors::<R, S>(x[n])[j];
            }
            let output = function.eval(simd, input);
            for m in 0..M {
                write::<R, S>(&mut y[m][j * lanes..], output[m]);
            }
        }
        if rest > 0 {
            for n in 0..N {
                input[n] = load_up_to(simd, &x[n][vectors * lanes..]);
            }
            let output = function.eval(simd, input);
            for m in 0..M {
                let mut last = [R::ZERO; MAX_LANES];
                store_up_to::<R, S>(&mut last[..rest], output[m]);
                for (to, x) in y[m][vectors * lanes..].iter_mut().zip(last) {
                    to.write(x);
                }
            }
        }
    }
}

/// Writes a vector to the start of a slice.
#[inline(always)]
pub(crate) fn write<R: SimdFloat, S: Simd>(to: &mut [MaybeUninit<R>], x: R::Vector<S>) {
    assert!(to.len() >= R::lanes::<S>(), "room for a vector");
    // SAFETY: the assertion; a vector is `lanes` numbers and nothing else.
    unsafe { to.as_mut_ptr().cast::<R::Vector<S>>().write_unaligned(x) }
}
