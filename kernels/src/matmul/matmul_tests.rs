//! Products against naive sums in f64, over sizes that leave a remainder in every block.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

use super::*;
use crate::dtype::Number;
use crate::gemm::microkernel::tests::numbers;
use crate::simd::SimdFloat;

/// `count` numbers in [-1, 1).
pub(super) fn narrow<E: Number>(seed: u64, count: usize) -> Vec<E> {
    numbers::<E::Float>(seed, count).into_iter().map(E::narrow).collect()
}

/// How the elements of an operand lie in memory.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    Rows,
    Columns,
    /// Rows with gaps.
    Wide,
    /// No neighbours anywhere.
    Loose,
}

const ORDERS: [Order; 4] = [Order::Rows, Order::Columns, Order::Wide, Order::Loose];

pub(super) struct Stored<E> {
    pub(super) data: Vec<E>,
    pub(super) dims: [usize; 2],
    pub(super) strides: [usize; 2],
}

impl<E: Number> Stored<E> {
    pub(super) fn new(seed: u64, dims: [usize; 2], order: Order) -> Self {
        let [rows, columns] = dims;
        let strides = match order {
            Order::Rows => [columns, 1],
            Order::Columns => [1, rows],
            Order::Wide => [columns + 3, 1],
            Order::Loose => [2 * columns + 1, 2],
        };
        let len = if rows * columns == 0 { 0 } else { (rows - 1) * strides[0] + (columns - 1) * strides[1] + 1 };
        Self { data: narrow(seed, len), dims, strides }
    }

    pub(super) fn operand(&self) -> Operand<'_, E> {
        Operand::new("test", &self.data, self.dims, self.strides).unwrap()
    }

    /// The same numbers.
    pub(super) fn in_f64(&self) -> Stored<f64> {
        let Self { dims, strides, .. } = *self;
        Stored { data: self.data.iter().map(|x| x.widen().to_f64()).collect(), dims, strides }
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        self.data[row * self.strides[0] + column * self.strides[1]].widen().to_f64()
    }
}

/// Σ over pairs, and the sum of the products' sizes, to which an error is relative.
pub(super) fn naive<E: Number>(pairs: &[(&Stored<E>, &Stored<E>)], row: usize, column: usize) -> (f64, f64) {
    let mut sums = (0.0, 0.0);
    for (a, b) in pairs {
        for i in 0..a.dims[1] {
            let product = a.at(row, i) * b.at(i, column);
            sums = (sums.0 + product, sums.1 + product.abs());
        }
    }
    sums
}

/// The error that rounding may make, relative to the result (of half types) and to the sum of the products' sizes.
fn tolerance<E: Number>() -> (f64, f64) {
    let one_more = E::narrow(E::Float::from_f64(1.0 + 1.0 / 300.0)).widen().to_f64();
    match size_of::<E>() {
        // bf16 has 8 bits, f16 has 11.
        2 if one_more == 1.0 => (1.0 / 256.0, 5e-7),
        2 => (1.0 / 2048.0, 5e-7),
        4 => (0.0, 5e-7),
        _ => (0.0, 1e-15),
    }
}

pub(super) fn check<E: Number>(what: &str, got: E, (expected, size): (f64, f64)) {
    let (relative, of_size) = tolerance::<E>();
    let error = (got.widen().to_f64() - expected).abs();
    let bound = relative * expected.abs() + of_size * size + f64::from(f16::MIN_POSITIVE_SUBNORMAL);
    assert!(error <= bound, "{what}: {} instead of {expected}", got.widen().to_f64());
}

fn check_product<E: MatmulElement>(dims: [usize; 3], orders: [Order; 2]) {
    let [m, k, n] = dims;
    let (a, b) = (Stored::<E>::new(1, [m, k], orders[0]), Stored::<E>::new(2, [k, n], orders[1]));
    let result = matmul(a.operand(), b.operand(), &Plain).unwrap();
    assert_eq!(result.len(), m * n);
    for (i, got) in result.into_iter().enumerate() {
        check(&format!("{dims:?} {orders:?} element {i}"), got, naive(&[(&a, &b)], i / n, i % n));
    }
}

fn check_all<E: MatmulElement>() {
    let small: &[[usize; 3]] = if cfg!(miri) {
        &[[0, 3, 2], [2, 0, 3], [1, 3, 5], [13, 3, 3]]
    } else {
        &[
            [0, 3, 2],
            [3, 2, 0],
            [5, 0, 3],
            [1, 1, 1],
            [1, 33, 65],
            [2, 31, 16],
            [3, 257, 33],
            [7, 12, 31],
            [8, 64, 97],
            [9, 13, 32],
            [11, 30, 63],
            [12, 16, 64],
            [13, 385, 31],
            [21, 40, 70],
            [25, 7, 129],
            [31, 100, 12],
        ]
    };
    for dims in small {
        for a in ORDERS {
            for b in ORDERS {
                check_product::<E>(*dims, [a, b]);
            }
        }
    }
}

#[test]
fn products_are_naive_sums_in_every_type_and_layout() {
    check_all::<f32>();
    check_all::<f64>();
    check_all::<f16>();
    check_all::<bf16>();
}

#[test]
#[cfg_attr(miri, ignore = "many products")]
fn large_products_are_naive_sums() {
    for dims in [[131, 513, 300], [600, 70, 33], [40, 900, 257], [257, 1025, 65]] {
        check_product::<f32>(dims, [Order::Rows, Order::Columns]);
        check_product::<f32>(dims, [Order::Columns, Order::Rows]);
        check_product::<bf16>(dims, [Order::Columns, Order::Columns]);
        check_product::<bf16>(dims, [Order::Rows, Order::Columns]);
        check_product::<bf16>(dims, [Order::Rows, Order::Rows]);
    }
    // Rows so far apart that they would share few sets of a cache.
    check_product::<bf16>([64, 1024, 40], [Order::Rows, Order::Columns]);
}

/// As many numbers as it should be, each element of each row in one call only.
struct Count {
    columns: usize,
    calls: Vec<AtomicUsize>,
}

impl Count {
    fn new(rows: usize, columns: usize) -> Self {
        Self { columns, calls: (0..rows * columns).map(|_| AtomicUsize::new(0)).collect() }
    }
}

impl<E: Number> Epilogue<E> for Count {
    fn apply(&self, row: usize, column: usize, sums: &mut [E::Float]) {
        for (i, sum) in sums.iter_mut().enumerate() {
            self.calls[row * self.columns + column + i].fetch_add(1, Ordering::Relaxed);
            *sum += E::Float::from_f64((row % 7) as f64 - ((column + i) % 5) as f64);
        }
    }
}

fn check_epilogue<E: MatmulElement>([m, k, n]: [usize; 3]) {
    let (a, b) = (Stored::<E>::new(1, [m, k], Order::Rows), Stored::<E>::new(2, [k, n], Order::Rows));
    let count = Count::new(m, n);
    let result = matmul(a.operand(), b.operand(), &count).unwrap();
    assert!(count.calls.iter().all(|calls| calls.load(Ordering::Relaxed) == 1), "{m} {k} {n}");
    for (i, got) in result.into_iter().enumerate() {
        let (sum, size) = naive(&[(&a, &b)], i / n, i % n);
        let added = (i / n % 7) as f64 - (i % n % 5) as f64;
        check("with what was added", got, (sum + added, size + added.abs()));
    }
}

#[test]
fn epilogue_has_each_element_once_and_before_it_is_rounded() {
    let dims: &[[usize; 3]] = if cfg!(miri) { &[[2, 3, 5]] } else { &[[3, 20, 100], [30, 500, 300], [14, 0, 40]] };
    for dims in dims {
        check_epilogue::<f32>(*dims);
        check_epilogue::<bf16>(*dims);
    }
}

#[test]
fn bias_is_added_to_every_row_and_has_to_fit() {
    let (a, b) = (Stored::<f16>::new(1, [20, 9], Order::Rows), Stored::<f16>::new(2, [9, 40], Order::Columns));
    let bias = narrow::<f16>(3, 41);
    let result = matmul(a.operand(), b.operand(), &Bias(&bias[..40])).unwrap();
    for (i, got) in result.into_iter().enumerate() {
        let (sum, size) = naive(&[(&a, &b)], i / 40, i % 40);
        check("with bias", got, (sum + f64::from(bias[i % 40]), size));
    }
    let error = matmul(a.operand(), b.operand(), &Bias(&bias)).unwrap_err();
    assert_eq!(error.to_string(), "the bias: expected one for each of 40 columns, got 41 elements");
}

/// Products side by side are the products, and the sum of products is the sum of their sums.
#[test]
fn products_side_by_side_and_summed_are_the_products() {
    let (m, k) = if cfg!(miri) { (3, 4) } else { (40, 70) };
    for orders in [[Order::Rows, Order::Columns], [Order::Columns, Order::Rows], [Order::Wide, Order::Loose]] {
        let a = Stored::<f32>::new(1, [m, k], orders[0]);
        let weights = [(2, 40), (3, 0), (4, 33), (5, 1)].map(|(seed, n)| Stored::<f32>::new(seed, [k, n], orders[1]));
        let pairs = weights.each_ref().map(|weight| [(a.operand(), weight.operand())]);
        let all = matmul_groups(m, &pairs.each_ref().map(|pair| &pair[..]), &Plain).unwrap();
        let n = 74;
        assert_eq!(all.len(), m * n);
        for (row, column) in (0..m).flat_map(|row| (0..n).map(move |column| (row, column))) {
            let (weight, at) = match column {
                0..40 => (&weights[0], column),
                40..73 => (&weights[2], column - 40),
                _ => (&weights[3], 0),
            };
            check("side by side", all[row * n + column], naive(&[(&a, weight)], row, at));
        }

        let parts = [(6, 300), (7, 0), (8, 5)];
        let parts = parts.map(|(seed, k)| {
            (Stored::<f32>::new(seed, [m, k], orders[0]), Stored::<f32>::new(seed + 9, [k, 35], orders[1]))
        });
        let pairs = parts.each_ref().map(|(a, b)| (a.operand(), b.operand()));
        let sum = matmul_sum(&pairs, &Plain).unwrap();
        let stored = parts.each_ref().map(|(a, b)| (a, b));
        for (i, got) in sum.into_iter().enumerate() {
            check("summed", got, naive(&stored, i / 35, i % 35));
        }
    }
}

#[test]
fn nan_and_infinity_go_where_ieee_754_says() {
    for (m, n) in [(1, 40), (20, 40)] {
        let k = 3;
        let mut a = vec![1.0f32; m * k];
        (a[0], a[1]) = (0.0, 2.0);
        let mut b = vec![1.0f32; k * n];
        (b[5], b[n + 6], b[7]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        let of = |b| matmul(Operand::row_major("a", &a, m, k).unwrap(), b, &Plain).unwrap();
        let transposed: Vec<f32> = (0..k * n).map(|i| b[i % k * n + i / k]).collect();
        let direct = Operand::row_major("b", &b, k, n).unwrap();
        let packed = Operand::row_major("b", &transposed, n, k).unwrap().transposed();
        for result in [of(direct), of(packed)] {
            assert!(result[5].is_nan() && result[7].is_nan(), "0 · NaN and 0 · infinity are NaN");
            assert_eq!((result[4], result[6]), (3.0, f32::INFINITY));
            if m > 1 {
                let row = &result[n..2 * n];
                assert!(row[5].is_nan());
                assert_eq!((row[4], row[6], row[7]), (3.0, f32::INFINITY, f32::NEG_INFINITY));
            }
        }
    }
}

pub(super) fn in_pool<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

#[test]
#[cfg_attr(miri, ignore = "rayon's queues break Stacked Borrows")]
fn any_number_of_threads_gives_the_same_bits() {
    let large = [[300, 500, 700], [1, 900, 3000], [20, 400, 600], [70, 90, 2000], [2000, 300, 33]];
    // With some numbers of threads the last tile is one row.
    let few_rows = [[13, 400, 32], [25, 400, 20], [13, 1600, 32], [61, 2000, 40]];
    for [m, k, n] in large.into_iter().chain(few_rows) {
        for orders in [[Order::Rows, Order::Columns], [Order::Columns, Order::Rows]] {
            let (a, b) = (Stored::<f32>::new(1, [m, k], orders[0]), Stored::<f32>::new(2, [k, n], orders[1]));
            let of = |threads| in_pool(threads, || matmul(a.operand(), b.operand(), &Plain).unwrap());
            let one: Vec<u32> = of(1).into_iter().map(f32::to_bits).collect();
            for threads in [2, 3, 8] {
                let others = of(threads).into_iter().map(f32::to_bits);
                assert!(others.eq(one.iter().copied()), "{m} {k} {n}, {threads} threads");
            }
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let data = [1.0f32; 12];
    let error = Operand::new("weight", &data, [3, 4], [5, 1]).err().unwrap();
    let expected =
        "the weight: expected a slice that holds dims [1, 1, 3, 4] with strides [1, 1, 5, 1], got 12 elements";
    assert_eq!(error.to_string(), expected);
    assert!(Operand::new("weight", &data, [2, 2], [usize::MAX, usize::MAX]).is_err());
    assert!(Operand::new("weight", &data, [usize::MAX, 2], [0, usize::MAX]).is_err());
    assert!(Operand::new("weight", &data, [0, usize::MAX], [usize::MAX, 1]).is_ok());
    let (a, b) = (Operand::row_major("a", &data, 3, 4).unwrap(), Operand::row_major("b", &data, 6, 2).unwrap());
    let error = matmul(a, b, &Plain).unwrap_err();
    assert_eq!(error.to_string(), "the b: expected 4 rows of 2, got dims [1, 1, 6, 2]");
    let fits = a.transposed();
    assert!(matmul_sum(&[(a, fits), (b, b.transposed())], &Plain).is_err(), "6 rows instead of 3");
    assert!(matmul_groups(3, &[&[(a, fits)], &[(a, b)]], &Plain).is_err());
}

#[test]
fn result_that_no_memory_holds_is_an_error() {
    let huge = Operand::new("huge", &[1.0f32], [usize::MAX / 2, 1], [0, 0]).unwrap();
    let wide = Operand::new("wide", &[1.0f32], [1, 1 << 20], [0, 0]).unwrap();
    assert!(matches!(matmul(huge, wide, &Plain), Err(Error::Memory { .. })));
}

#[test]
fn column_sums_are_the_sums_of_the_columns() {
    fn check_sums<E: Number>(rows: usize, n: usize) {
        let x = narrow::<E>(1, rows * n);
        let sums = column_sums(&x, rows, n).unwrap();
        assert_eq!(sums.len(), n);
        for (column, sum) in sums.into_iter().enumerate() {
            let of_row = |row: usize| x[row * n + column].widen().to_f64();
            let (expected, size) = (0..rows).map(of_row).fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
            let precision = if size_of::<E>() == 8 { 1e-15 } else { 2e-7 };
            assert!((sum.to_f64() - expected).abs() <= precision * size, "{rows} x {n}");
        }
    }
    let sizes: &[(usize, usize)] =
        if cfg!(miri) { &[(0, 3), (34, 2)] } else { &[(0, 3), (5, 0), (1, 7), (33, 100), (2100, 31), (5000, 3)] };
    for &(rows, n) in sizes {
        check_sums::<f32>(rows, n);
        check_sums::<f64>(rows, n);
        check_sums::<f16>(rows, n);
        check_sums::<bf16>(rows, n);
    }
    assert!(column_sums(&[1.0f32; 5], 2, 3).is_err());
}

/// An epilogue that multiplies matrices itself.
struct Nested(Vec<bf16>);

impl Epilogue<bf16> for Nested {
    fn apply(&self, _: usize, _: usize, sums: &mut [f32]) {
        let a = Operand::row_major("inner", &self.0, 40, 40).unwrap();
        let inner = matmul(a, a, &Plain).unwrap();
        sums.iter_mut().for_each(|sum| *sum += inner[0].widen());
    }
}

#[test]
fn epilogue_may_multiply_matrices() {
    let (a, ones) = (vec![bf16::ONE; 70 * 70], vec![bf16::ONE; 40 * 40]);
    let a = Operand::row_major("outer", &a, 70, 70).unwrap();
    assert!(matmul(a, a, &Nested(ones)).unwrap().iter().all(|x| x.to_f32() == 110.0));
}
