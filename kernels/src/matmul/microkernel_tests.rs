//! The kernels with every instruction set that this processor has.

use pulp::Simd;

use super::*;
use crate::dtype::Number;
use crate::gemm::microkernel::tests::{check_guard, close, numbers};
use crate::matmul::Operand;
use crate::matmul::pack::{PackLeft, PackLeftBlock, PackRight};
use crate::simd::with_every_simd;

/// A product whose operands are packed, in blocks; `base` is added.
fn check_packed<R: SimdFloat + Number<Float = R>, S: Simd>(simd: S, [rows, k, columns]: [usize; 3]) {
    let [max, width] = simd.vectorize(BlockDims::<R>(PhantomData));
    let blocks = Blocks::new(rows, max);
    let (a, b) = (numbers::<R>(1, rows * k), numbers::<R>(2, k * columns));
    let left = Operand::row_major("a", &a, k, rows).unwrap().transposed();
    let mut wide = vec![R::ZERO; (width * k).max(rows).max(columns)];
    let mut packed_left = vec![R::ZERO; rows * k];
    let k_range = 0..k;
    let packed = &mut packed_left[..];
    simd.vectorize(PackLeft { a: &left, first_row: 0, k: k_range.clone(), blocks, packed, wide: &mut wide });
    check_left_blocks(simd, &left, blocks, &packed_left);
    for right in [
        Operand::row_major("b", &b, k, columns).unwrap(),
        Operand::row_major("b", &b, columns, k).unwrap().transposed(),
    ] {
        let mut panels = vec![R::ONE; columns.next_multiple_of(width) * k];
        let (columns_range, packed) = (0..columns, &mut panels[..]);
        simd.vectorize(PackRight {
            b: &right,
            k: k_range.clone(),
            columns: columns_range,
            panels: packed,
            wide: &mut wide,
        });
        let stride = columns + 3;
        let before = numbers::<R>(3, rows * stride);
        let mut result = before.clone();
        for block in (0..blocks.count).map(|block| blocks.rows_of(block)) {
            let left = &packed_left[block.start * k..block.end * k];
            let to = MatrixMut::new(&mut result, rows, columns, stride).into_block(block, 0..columns);
            let right = Right { direct: None, packed: &panels };
            // SAFETY: the result is initialised, and the kernel writes numbers.
            simd.vectorize(unsafe {
                MultiplyBlock::new(k, left, right, to.into_uninit(), Base::Same, Ahead::default())
            });
        }
        let b_at = |i: usize, column: usize| {
            let [row_stride, column_stride] = right.strides();
            b[i * row_stride + column * column_stride].to_f64()
        };
        for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
            let sum: f64 = (0..k).map(|i| a[i * rows + row].to_f64() * b_at(i, column)).sum();
            let expected = before[row * stride + column].to_f64() + sum;
            assert!(close(result[row * stride + column], expected), "{rows} {k} {columns}: {row} {column}");
        }
        check_guard(&result, &before, rows, columns, stride);
    }
}

/// The same blocks packed one by one, from a row-major operand and from one whose numbers lie apart.
fn check_left_blocks<R: SimdFloat + Number<Float = R>, S: Simd>(
    simd: S,
    left: &Operand<R>,
    blocks: Blocks,
    expected: &[R],
) {
    let [rows, k] = left.dims();
    for gap in [1, 3] {
        let mut numbers = vec![R::ZERO; rows * k * gap];
        for (row, i) in (0..rows).flat_map(|row| (0..k).map(move |i| (row, i))) {
            numbers[(row * k + i) * gap] = left.from(row, i)[0];
        }
        let a = Operand::new("a", &numbers, [rows, k], [k * gap, gap]).unwrap();
        for block in (0..blocks.count).map(|block| blocks.rows_of(block)) {
            let (mut packed, mut wide) = (vec![R::ZERO; block.len() * k], vec![R::ZERO; block.len() * k]);
            let (rows, all, to) = (block.clone(), 0..k, &mut packed[..]);
            simd.vectorize(PackLeftBlock { a: &a, rows, k: all, packed: to, wide: &mut wide });
            assert!(packed == expected[block.start * k..block.end * k], "{block:?}, {gap} apart");
        }
    }
}

#[test]
fn packed_blocks_are_naive_sums_with_every_instruction_set() {
    with_every_simd!(|simd| {
        let dims: &[[usize; 3]] = if cfg!(miri) {
            &[[3, 2, 5]]
        } else {
            &[
                [1, 1, 1],
                [2, 5, 31],
                [5, 3, 32],
                [6, 4, 33],
                [11, 7, 64],
                [12, 9, 65],
                [13, 8, 16],
                [27, 6, 47],
                [40, 5, 96],
            ]
        };
        for dims in dims {
            check_packed::<f32, S>(simd, *dims);
            check_packed::<f64, S>(simd, *dims);
        }
    });
}

#[test]
fn blocks_cover_every_row_once() {
    for max in [6, 12] {
        for rows in 1..100 {
            let blocks = Blocks::new(rows, max);
            let all: Vec<_> = (0..blocks.count).map(|block| blocks.rows_of(block)).collect();
            assert!(all.iter().all(|block| (1..=max).contains(&block.len())), "{rows} {max}: {all:?}");
            assert!(all.iter().cloned().flatten().eq(0..rows), "{rows} {max}: {all:?}");
        }
    }
}

#[test]
#[should_panic(expected = "the left operand has its rows")]
fn operands_of_other_sizes_are_refused() {
    let (numbers, mut result) = ([0.0f32; 64], [0.0f32; 8]);
    let (left, right) = (&numbers[..6], Right { direct: None, packed: &numbers });
    let to = MatrixMut::new(&mut result, 2, 4, 4);
    // SAFETY: the kernel writes numbers.
    let block = unsafe { MultiplyBlock::new(4, left, right, to.into_uninit(), Base::Zero, Ahead::default()) };
    pulp::Simd::vectorize(pulp::Scalar, block);
}
