//! bf16 as some processors multiply it: two products at a time, summed in f32 (AVX512-BF16). It halves the work of every
//! matrix product.
//!
//! A *pair* is 32 bits that hold two neighbours along the axis that is summed over. A row of a tensor is a row of pairs as
//! it stands; where the sum runs over rows, two of them are interleaved. Weights and gradients of scores are rounded to
//! bf16 for this, as PyTorch does; their sums are f32.
//!
//! Every method checks the sizes of its operands, and then calls a function that is compiled for the instructions.

use std::mem::MaybeUninit;

use half::bf16;
use pulp::Simd;

#[cfg(target_arch = "x86_64")]
use self::avx512 as kernels;
use crate::gemm::microkernel::VECTORS;
use crate::matrix::{Matrix, MatrixMut};
use crate::simd::{Allowed, allowed};

/// Numbers in a vector, and queries in a panel.
pub(crate) const LANES: usize = 16;
/// Numbers in a row of a panel.
pub(crate) const WIDTH: usize = VECTORS * LANES;

/// Says that the processor has the instructions: only [`Bf16Dot::new`] makes one, and it asks the processor.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Dot(());

impl Bf16Dot {
    /// If the processor has the instructions, and may use them.
    pub(crate) fn new<S: Simd>() -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        let can = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        let can = false;
        (S::F32_LANES == LANES && allowed() >= Allowed::Avx512Bf16 && can).then_some(Self(()))
    }

    /// scores\[j\]\[W\] = factor · Σ_p rows\[j\]\[p\] · panel\[p\]\[W\], where p are pairs. With `MAX`, `largest` becomes the
    /// greatest of itself and them, lane by lane.
    pub(crate) fn dot_products<const MAX: bool>(
        self,
        factor: f32,
        panel: &[u32],
        rows: Matrix<u16>,
        mut scores: MatrixMut<f32>,
        largest: &mut [f32],
    ) {
        let (pairs, count) = (rows.columns() / 2, rows.rows());
        assert!(panel.len() / WIDTH >= pairs && largest.len() >= WIDTH, "the panel has a row for each pair");
        assert!(scores.rows() >= count && scores.columns() >= WIDTH, "there is a row of scores for each row");
        let (panel, largest) = (panel.as_ptr(), largest.as_mut_ptr());
        // SAFETY: the assertions; `self` says that the processor has the instructions.
        unsafe { kernels::dot_products::<MAX>(pairs, factor, panel, rows.raw(), count, scores.raw(), largest) };
    }

    /// panel\[c\]\[W\] = factor\[W\] · panel\[c\]\[W\] + Σ_p rows\[p\]\[c\] · weights\[p\]\[W\], where rows and weights are pairs.
    pub(crate) fn accumulate(self, panel: &mut [f32], factor: &[f32], rows: Matrix<u32>, weights: Matrix<u32>) {
        let (columns, pairs) = (rows.columns(), weights.rows());
        assert!(panel.len() / WIDTH >= columns && factor.len() >= WIDTH, "the panel has a row for each column");
        assert!(rows.rows() >= pairs && weights.columns() >= WIDTH, "there is a row for each row of weights");
        let (panel, factor) = (panel.as_mut_ptr(), factor.as_ptr());
        // SAFETY: the assertions; `self` says that the processor has the instructions.
        unsafe { kernels::accumulate(columns, panel, factor, rows.raw(), pairs, weights.raw()) };
    }

    /// out\[j\]\[c\] += factor · Σ_p weights\[j\]\[p\] · rows\[p\]\[c\], where rows and weights are pairs. The columns are a multiple
    /// of 16.
    pub(crate) fn outer_products(self, factor: f32, mut out: MatrixMut<f32>, weights: Matrix<u32>, rows: Matrix<u32>) {
        let (count, columns, pairs) = (out.rows(), out.columns(), rows.rows());
        assert!(columns.is_multiple_of(LANES) && rows.columns() == columns, "rows of whole vectors");
        assert!(weights.rows() == count && weights.columns() == pairs, "a weight for each row in and out");
        // SAFETY: the assertions; `self` says that the processor has the instructions.
        unsafe { kernels::outer_products(columns, factor, out.raw(), count, weights.raw(), pairs, rows.raw()) };
    }

    /// Two rows of numbers become one of pairs: the second of the last pair is zero if the number of rows is odd, and so are
    /// the columns behind the last. The rows of `to` are whole vectors.
    pub(crate) fn interleave(self, rows: Matrix<u16>, mut to: MatrixMut<u32>) {
        let (count, columns) = (rows.rows(), rows.columns());
        assert!(to.rows() >= count.div_ceil(2), "room for half as many rows");
        assert!(to.columns() >= columns.next_multiple_of(LANES), "room for whole vectors");
        // SAFETY: the assertions; `self` says that the processor has the instructions.
        unsafe { kernels::interleave(rows.raw(), count, columns, to.raw()) };
    }

    /// Rounds rows of W numbers to pairs of two rows each, which take the place of the first half of the rows.
    pub(crate) fn narrow_down<'a>(self, mut rows: MatrixMut<'a, f32>) -> MatrixMut<'a, u32> {
        assert!(rows.columns() == WIDTH && rows.stride() >= WIDTH, "rows of a panel");
        let count = rows.rows();
        // SAFETY: the assertion: no row reaches into the next; `self` says that the processor has the instructions.
        unsafe { kernels::narrow_down(rows.raw(), count) };
        rows.into_part(count.div_ceil(2)).cast()
    }

    /// Rounds as many numbers as both slices have. Denormal numbers become zero.
    pub(crate) fn narrow(self, from: &[f32], to: &mut [MaybeUninit<bf16>]) {
        let count = from.len().min(to.len());
        // SAFETY: both have `count` numbers; a bf16 is 16 bits; `self` says that the processor has the instructions.
        unsafe { kernels::narrow(from.as_ptr(), to.as_mut_ptr().cast(), count) };
    }

    /// Rounds rows of W numbers to rows of W / 2 pairs.
    pub(crate) fn narrow_along(self, rows: Matrix<f32>, mut to: MatrixMut<u32>) {
        let count = rows.rows();
        assert!(rows.columns() == WIDTH, "rows of a panel");
        assert!(to.rows() >= count && to.columns() >= WIDTH / 2, "room for as many rows");
        // SAFETY: the assertions; `self` says that the processor has the instructions.
        unsafe { kernels::narrow_along(rows.raw(), count, to.raw()) };
    }
}

/// Elsewhere there is never a [`Bf16Dot`] to call these with.
#[cfg(not(target_arch = "x86_64"))]
mod kernels {
    use crate::matrix::Raw;

    macro_rules! unreachable_kernels {
        ($(fn $name:ident $(<const $constant:ident: bool>)? ($($type:ty),*);)*) => {$(
            pub(super) unsafe fn $name $(<const $constant: bool>)? ($(_: $type),*) {
                unreachable!("only x86-64 has the instructions")
            }
        )*};
    }
    unreachable_kernels! {
        fn dot_products<const MAX: bool>(usize, f32, *const u32, Raw<*const u16>, usize, Raw<*mut f32>, *mut f32);
        fn accumulate(usize, *mut f32, *const f32, Raw<*const u32>, usize, Raw<*const u32>);
        fn outer_products(usize, f32, Raw<*mut f32>, usize, Raw<*const u32>, usize, Raw<*const u32>);
        fn interleave(Raw<*const u16>, usize, usize, Raw<*mut u32>);
        fn narrow_down(Raw<*mut f32>, usize);
        fn narrow(*const f32, *mut u16, usize);
        fn narrow_along(Raw<*const f32>, usize, Raw<*mut u32>);
    }
}

#[cfg(target_arch = "x86_64")]
#[path = "bf16_dot_avx512.rs"]
pub(crate) mod avx512;

#[cfg(test)]
#[path = "bf16_dot_tests.rs"]
mod tests;
