//! Rows of a tensor as panels, and panels as rows.

use std::ops::Range;

use pulp::Simd;
use pulp::bytemuck::cast_slice_mut;

use crate::dtype::{Sink, Source};
use crate::gemm::microkernel::panel_width;
use crate::gemm::transpose::transpose;
use crate::matrix::{Matrix, MatrixMut};
use crate::simd::SimdFloat;

/// The rows `range` of a (sequence, head) as panels \[dim\]\[W\], multiplied by `factor`; zeros in the lanes behind the last. If
/// the tensor has to be widened, `scratch` has room for the rows of a panel.
#[inline(always)]
pub(crate) fn pack<R: SimdFloat, S: Simd>(
    simd: S,
    source: &dyn Source<R>,
    at: (usize, usize),
    range: &Range<usize>,
    factor: R,
    scratch: &mut [R],
    panels: &mut [R],
) {
    let width = panel_width::<R, S>();
    let dim = source.dims()[3];
    for (start, panel) in range.clone().step_by(width).zip(panels.chunks_exact_mut(dim * width)) {
        let rows = source.rows(at, start..(start + width).min(range.end), scratch);
        pack_panel(simd, factor, rows, panel);
    }
}

/// As [`pack`], for rows of bf16 as they are: panels \[depth / 2\]\[W\] of pairs, each in the room of an f32, with zeros behind a
/// row's last number. `scratch` has room for the rows of a panel, in pairs.
#[inline(always)]
pub(crate) fn pack_pairs<R: SimdFloat, S: Simd>(
    simd: S,
    source: &dyn Source<R>,
    at: (usize, usize),
    range: &Range<usize>,
    depth: usize,
    scratch: &mut [R],
    panels: &mut [R],
) {
    let (width, pairs) = (panel_width::<R, S>(), depth / 2);
    for (start, panel) in range.clone().step_by(width).zip(panels.chunks_exact_mut(pairs * width)) {
        let rows = source.bf16_rows(at, start..(start + width).min(range.end)).expect("a tensor of bf16");
        rows.copy_padded(&mut cast_slice_mut(scratch)[..rows.rows() * depth], depth);
        pack_panel(simd, R::ONE, Matrix::new(scratch, rows.rows(), pairs, pairs), panel);
    }
}

/// Rows as one panel: transposed, with zeros in the lanes behind the last.
#[inline(always)]
fn pack_panel<R: SimdFloat, S: Simd>(simd: S, factor: R, rows: Matrix<R>, panel: &mut [R]) {
    let (width, count) = (panel_width::<R, S>(), rows.rows());
    let to = MatrixMut::new(panel, rows.columns(), count, width);
    // SAFETY: `transpose` writes numbers, which are initialised.
    transpose(simd, factor, rows, unsafe { to.into_uninit() });
    if count < width {
        panel.chunks_exact_mut(width).for_each(|row| row[count..].fill(R::ZERO));
    }
}

/// The first `count` lanes of a panel \[dim\]\[W\] as the rows of `to` from `first` on, multiplied by `factor`. If the numbers have
/// to be narrowed, `scratch` has room for the rows.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // a matrix product's operands, its factor and its scratch
pub(crate) fn unpack<R: SimdFloat, S: Simd>(
    simd: S,
    panel: &[R],
    dim: usize,
    count: usize,
    factor: R,
    scratch: &mut [R],
    to: &mut dyn Sink<R>,
    first: usize,
) {
    let panel = Matrix::new(panel, dim, count, panel_width::<R, S>());
    if let Some(mut to) = to.floats() {
        return transpose(simd, factor, panel, to.part(first, count));
    }
    let rows = MatrixMut::new(scratch, count, dim, dim);
    // SAFETY: `transpose` writes numbers, which are initialised.
    transpose(simd, factor, panel, unsafe { rows.into_uninit() });
    to.write(first, Matrix::new(scratch, count, dim, dim));
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::gemm::microkernel::tests::numbers;
    use crate::problem::View;
    use crate::simd::with_every_simd;

    fn check<E: crate::dtype::Number, S: Simd>(simd: S, len: usize, dim: usize) {
        let floats = numbers::<E::Float>(1, 2 * len * dim);
        let data: Vec<E> = floats.into_iter().map(E::narrow).collect();
        let view = View::new("test", &data, [2 * len * dim, dim, 2 * dim], [1, 2, len, dim]).unwrap();
        let width = panel_width::<E::Float, S>();
        let panels = len.div_ceil(width);
        let mut scratch = vec![E::Float::ZERO; width.max(len) * dim];
        let mut packed = vec![E::Float::from_f64(9.0); panels * dim * width];
        let half = E::Float::from_f64(0.5);
        pack(simd, &view, (0, 1), &(0..len), half, &mut scratch, &mut packed);
        for (lane, c) in (0..panels * width).flat_map(|lane| (0..dim).map(move |c| (lane, c))) {
            let x = packed[(lane / width * dim + c) * width + lane % width];
            let expected = if lane < len { half * view.row(0, 1, lane)[c].widen() } else { E::Float::ZERO };
            assert!(x == expected, "{lane} {c}");
        }
        let mut back = vec![std::mem::MaybeUninit::<E>::uninit(); len * dim];
        let mut rows = MatrixMut::new(&mut back, len, dim, dim);
        for (panel, first) in packed.chunks_exact(dim * width).zip((0..len).step_by(width)) {
            let (count, two) = (width.min(len - first), E::Float::from_f64(2.0));
            unpack(simd, panel, dim, count, two, &mut scratch, &mut rows, first);
        }
        for (i, row) in back.chunks_exact(dim).enumerate() {
            for (x, expected) in row.iter().zip(view.row(0, 1, i)) {
                // SAFETY: `unpack` has written every row.
                assert!(unsafe { x.assume_init() }.widen() == expected.widen());
            }
        }
    }

    #[test]
    fn panels_are_transposed_rows_and_back() {
        with_every_simd!(|simd| {
            for (len, dim) in [(1, 1), (3, 17), (37, 33)] {
                check::<f32, S>(simd, len, dim);
                check::<f64, S>(simd, len, dim);
                check::<bf16, S>(simd, len, dim);
                check::<half::f16, S>(simd, len, dim);
            }
        });
    }

    #[test]
    fn pairs_stay_together() {
        with_every_simd!(|simd| {
            let (len, dim, width) = (5, 6, panel_width::<f32, S>());
            let data: Vec<bf16> = (0..len * dim).map(|x| bf16::from_f32(x as f32)).collect();
            let view = View::new("test", &data, [0, 0, dim], [1, 1, len, dim]).unwrap();
            let panels = len.div_ceil(width);
            let (mut scratch, mut packed) = (vec![0.0; width.max(len) * dim], vec![9.0f32; panels * dim / 2 * width]);
            pack_pairs(simd, &view, (0, 0), &(0..len), dim, &mut scratch, &mut packed);
            for (lane, p) in (0..panels * width).flat_map(|lane| (0..dim / 2).map(move |p| (lane, p))) {
                let pair = packed[(lane / width * dim / 2 + p) * width + lane % width].to_bits();
                let bits = |c: usize| if lane < len { u32::from(data[lane * dim + c].to_bits()) } else { 0 };
                assert_eq!(pair, bits(2 * p) | bits(2 * p + 1) << 16);
            }
        });
    }
}
