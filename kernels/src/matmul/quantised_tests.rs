//! Products with quantised right operands against products with the same numbers in slices.

use std::any::TypeId;

use half::{bf16, f16};

use super::tests::{Order, Stored, check, in_pool, naive, narrow};
use super::*;
use crate::dtype::Number;
use crate::gemm::bf16_tiles::are_available;
use crate::quantised::tests::{FORMATS, blocks};
use crate::quantised::{Format, QuantisedMatrix};
use crate::simd::SimdFloat;

/// A weight (rows, columns), quantised and as numbers.
struct Weight<E> {
    bytes: Vec<u8>,
    format: Format,
    dims: [usize; 2],
    numbers: Vec<E>,
}

impl<E: Number> Weight<E> {
    fn new(seed: u32, format: Format, dims: [usize; 2]) -> Self {
        let bytes = blocks(format, seed, dims);
        let numbers = QuantisedMatrix::new("weight", format, &bytes, dims).unwrap().dequantise().unwrap();
        Self { bytes, format, dims, numbers }
    }

    /// As a right operand of x · wᵀ, or of g · w.
    fn quantised(&self, is_transposed: bool) -> Operand<'_, E> {
        let matrix = QuantisedMatrix::new("weight", self.format, &self.bytes, self.dims).unwrap();
        if is_transposed { Operand::quantised(matrix).transposed() } else { Operand::quantised(matrix) }
    }

    fn dense(&self, is_transposed: bool) -> Operand<'_, E> {
        let matrix = Operand::row_major("weight", &self.numbers, self.dims[0], self.dims[1]).unwrap();
        if is_transposed { matrix.transposed() } else { matrix }
    }

    /// The numbers in f64, as a right operand; transposed if asked for.
    fn stored(&self, is_transposed: bool) -> Stored<f64> {
        let [rows, columns] = self.dims;
        let data = QuantisedMatrix::new("weight", self.format, &self.bytes, self.dims).unwrap().dequantise().unwrap();
        match is_transposed {
            true => Stored { data, dims: [columns, rows], strides: [1, columns] },
            false => Stored { data, dims: self.dims, strides: [columns, 1] },
        }
    }
}

/// The bits of numbers, as those of f64, in which each has its own.
fn bits<E: Number>(numbers: &[E]) -> Vec<u64> {
    numbers.iter().map(|x| x.widen().to_f64().to_bits()).collect()
}

/// x · wᵀ and g · w with `m` rows: bit for bit the product with the numbers in a slice, where these are as precise; else naive sums.
fn check_products<E: MatmulElement>(m: usize, format: Format, dims: [usize; 2], order: Order) {
    let weight = Weight::<E>::new(5, format, dims);
    for is_transposed in [true, false] {
        let [k, n] = weight.dense(is_transposed).dims();
        let a = Stored::<E>::new(1, [m, k], order);
        let result = matmul(a.operand(), weight.quantised(is_transposed), &Plain).unwrap();
        let what = format!("{m} {format:?} {dims:?} transposed: {is_transposed}");
        let is_rounded = TypeId::of::<E>() == TypeId::of::<bf16>() && are_available() && m > 8;
        if size_of::<E>() > 2 || is_rounded {
            let expected = matmul(a.operand(), weight.dense(is_transposed), &Plain).unwrap();
            assert_eq!(bits(&result), bits(&expected), "{what}");
        } else {
            let (a, weight) = (a.in_f64(), weight.stored(is_transposed));
            for (i, got) in result.into_iter().enumerate() {
                check(&what, got, naive(&[(&a, &weight)], i / n, i % n));
            }
        }
    }
}

fn check_all<E: MatmulElement>() {
    let rows: &[usize] = if cfg!(miri) { &[1, 13] } else { &[0, 1, 2, 7, 8, 9, 13, 32, 33, 66] };
    for format in FORMATS {
        let len = format.block_len();
        let dims = if cfg!(miri) {
            vec![[3, len]]
        } else {
            vec![[1, len], [33, 2 * len], [70, 512], [97, 3 * len], [0, len], [4, 0]]
        };
        for &dims in &dims {
            for &m in rows {
                check_products::<E>(m, format, dims, Order::Rows);
            }
            check_products::<E>(14, format, dims, Order::Columns);
            check_products::<E>(3, format, dims, Order::Loose);
        }
    }
}

#[test]
fn products_with_quantised_weights_are_those_with_their_numbers() {
    check_all::<f32>();
    check_all::<f64>();
    check_all::<f16>();
    check_all::<bf16>();
}

#[test]
#[cfg_attr(miri, ignore = "many products")]
fn large_products_with_quantised_weights_are_those_with_their_numbers() {
    for format in FORMATS {
        for m in [1, 40, 200] {
            check_products::<f32>(m, format, [600, 1280], Order::Rows);
            check_products::<bf16>(m, format, [70, 1280], Order::Rows);
        }
    }
}

/// Groups of sums of products, with quantised and other right operands in all places.
fn check_groups<E: MatmulElement>(m: usize, is_transposed: bool) {
    let dims = if is_transposed { [40, 256] } else { [256, 512] };
    let weights = [Format::Q4K, Format::Q8_0].map(|format| Weight::<E>::new(7, format, dims));
    let [k, n] = weights[0].dense(is_transposed).dims();
    let (x, low, up) = (
        Stored::<E>::new(1, [m, k], Order::Rows),
        Stored::<E>::new(2, [m, 8], Order::Rows),
        Stored::<E>::new(3, [8, n], Order::Columns),
    );
    let quantised = weights.each_ref().map(|weight| weight.quantised(is_transposed));
    let (x_of, low_of, up_of) = (x.operand(), low.operand(), up.operand());
    let groups: [&[_]; 4] = [
        &[(x_of, quantised[0]), (low_of, up_of)],
        &[(low_of, up_of)],
        &[],
        &[(low_of, up_of), (x_of, quantised[1]), (x_of, quantised[0])],
    ];
    let result = matmul_groups(m, &groups, &Plain).unwrap();
    let stored = weights.each_ref().map(|weight| weight.stored(is_transposed));
    let (x, low, up) = (x.in_f64(), low.in_f64(), up.in_f64());
    let expected: [&[_]; 3] =
        [&[(&x, &stored[0]), (&low, &up)], &[(&low, &up)], &[(&low, &up), (&x, &stored[1]), (&x, &stored[0])]];
    for (i, got) in result.into_iter().enumerate() {
        let (row, column) = (i / (3 * n), i % (3 * n));
        let (sum, size) = naive(expected[column / n], row, column % n);
        // AMX rounds the weights.
        let size = if size_of::<E>() == 2 { size * 4e3 } else { size };
        check("groups", got, (sum, size));
    }
}

#[test]
#[cfg_attr(miri, ignore = "many products")]
fn groups_mix_quantised_weights_and_others() {
    for is_transposed in [true, false] {
        for m in [1, 5, 20, 70] {
            check_groups::<f32>(m, is_transposed);
            check_groups::<f64>(m, is_transposed);
            check_groups::<f16>(m, is_transposed);
            check_groups::<bf16>(m, is_transposed);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "rayon's queues break Stacked Borrows")]
fn any_number_of_threads_gives_the_same_bits_with_quantised_weights() {
    fn check_bits<E: MatmulElement>() {
        for (m, dims) in [(1, [3000, 768]), (13, [64, 1792]), (20, [900, 512]), (150, [700, 1024])] {
            let weight = Weight::<E>::new(3, Format::Q4K, dims);
            for right in [weight.quantised(true), weight.quantised(false)] {
                let a = Stored::<E>::new(1, [m, right.dims()[0]], Order::Rows);
                let of = |threads| bits(&in_pool(threads, || matmul(a.operand(), right, &Plain).unwrap()));
                let one = of(1);
                for threads in [2, 3] {
                    assert_eq!(of(threads), one, "{m} {dims:?}, {threads} threads");
                }
            }
        }
    }
    check_bits::<f32>();
    check_bits::<bf16>();
}

#[test]
fn products_refuse_a_quantised_left_operand() {
    let weight = Weight::<f32>::new(1, Format::Q8_0, [32, 32]);
    let other = narrow::<f32>(1, 32 * 32);
    let dense = Operand::row_major("dense", &other, 32, 32).unwrap();
    let expected = "left operand of a product: expected a matrix of numbers, got the weight in quantised blocks";
    for left in [weight.quantised(false), weight.quantised(true)] {
        assert_eq!(matmul(left, dense, &Plain).unwrap_err().to_string(), expected);
        assert_eq!(matmul_sum(&[(dense, dense), (left, dense)], &Plain).unwrap_err().to_string(), expected);
        assert_eq!(matmul_groups(32, &[&[(left, dense)]], &Plain).unwrap_err().to_string(), expected);
    }
    let x = Operand::row_major("x", &other, 4, 256).unwrap();
    let error = matmul(x, weight.quantised(false), &Plain).unwrap_err();
    assert_eq!(error.to_string(), "the weight: expected 256 rows of 32, got dims [1, 1, 32, 32]");
}

#[test]
fn scale_that_is_not_finite_reaches_its_row_alone() {
    for m in [1, 40] {
        let mut weight = Weight::<f32>::new(2, Format::Q4_0, [5, 64]);
        weight.bytes[2 * 36 + 18..][..2].copy_from_slice(&f16::NAN.to_le_bytes());
        let x = vec![1.0f32; m * 64];
        let x = Operand::row_major("x", &x, m, 64).unwrap();
        let result = matmul(x, weight.quantised(true), &Plain).unwrap();
        assert!(result.iter().enumerate().all(|(i, y)| y.is_nan() == (i % 5 == 2)));
    }
}
