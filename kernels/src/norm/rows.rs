//! The rows of a norm, as vectors: the normalised rows and the gradients.

use std::any::TypeId;
use std::mem::MaybeUninit;

use pulp::bytemuck::{cast_slice, cast_slice_mut};
use pulp::{Scalar, Simd, WithSimd};

use crate::matrix::{Matrix, MatrixMut, initialised};
use crate::norm::statistics::{PIECE, Row, normalise_vector};
use crate::pointwise::write;
use crate::simd::{SimdFloat, as_vectors, as_vectors_mut, instruction_set};

/// Why a cast succeeds.
const SAME: &str = "the type is one of two, and not the other";

/// The passes over rows as functions that aren't generic, so that this package holds their code.
macro_rules! passes {
    ($float:ty, $centred:literal, $forward:ident, $backward:ident) => {
        #[inline(never)]
        fn $forward(rows: Forward<$float, $centred>) {
            instruction_set().dispatch(rows);
        }
        #[inline(never)]
        fn $backward(rows: Backward<$float, $centred>) {
            instruction_set().dispatch(rows);
        }
    };
}
passes!(f32, false, forward_rms_f32, backward_rms_f32);
passes!(f64, false, forward_rms_f64, backward_rms_f64);
passes!(f32, true, forward_layer_f32, backward_layer_f32);
passes!(f64, true, forward_layer_f64, backward_layer_f64);

/// Rows to normalise, and where they go.
pub(super) struct Forward<'a, R, const CENTRED: bool> {
    pub(super) x: Matrix<'a, R>,
    pub(super) weight: &'a [R],
    pub(super) bias: Option<&'a [R]>,
    pub(super) eps: R,
    /// Room for a row.
    pub(super) divided: &'a mut [R],
    pub(super) y: MatrixMut<'a, MaybeUninit<R>>,
}

impl<'a, R: SimdFloat, const CENTRED: bool> Forward<'a, R, CENTRED> {
    /// Computes the rows with the best instruction set.
    pub(super) fn run(self) {
        match (TypeId::of::<R>() == TypeId::of::<f32>(), CENTRED) {
            (true, false) => forward_rms_f32(self.cast()),
            (true, true) => forward_layer_f32(self.cast()),
            (false, false) => forward_rms_f64(self.cast()),
            (false, true) => forward_layer_f64(self.cast()),
        }
    }

    /// The same with R and CENTRED by what they are.
    fn cast<T: SimdFloat, const C: bool>(self) -> Forward<'a, T, C> {
        let Self { x, weight, bias, eps, divided, y } = self;
        Forward {
            x: x.cast(),
            weight: cast_slice(weight),
            bias: bias.map(cast_slice),
            eps: T::from_f64(eps.to_f64()),
            divided: cast_slice_mut(divided),
            y: y.into_downcast().expect(SAME),
        }
    }
}

impl<R: SimdFloat, const CENTRED: bool> WithSimd for Forward<'_, R, CENTRED> {
    type Output = ();

    /// y = normalised x · weight + bias
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let whole = self.x.columns() / R::lanes::<S>() * R::lanes::<S>();
        for r in 0..self.x.rows() {
            let row = Row::new::<S, CENTRED>(simd, self.x.row(r), self.eps, self.divided);
            let (weight, bias, y) = (self.weight, self.bias, self.y.row(r));
            normalise::<R, S, CENTRED>(simd, row, weight, bias, y);
            let bias = bias.map(|bias| &bias[whole..]);
            normalise::<R, _, CENTRED>(Scalar, row.from(whole), &weight[whole..], bias, &mut y[whole..]);
        }
    }
}

/// Writes the whole vectors of a row.
#[inline(always)]
fn normalise<R: SimdFloat, S: Simd, const CENTRED: bool>(
    simd: S,
    row: Row<R>,
    weight: &[R],
    bias: Option<&[R]>,
    y: &mut [MaybeUninit<R>],
) {
    let (x, lanes) = (as_vectors::<R, S>(row.x), R::lanes::<S>());
    let (weight, y) = (&as_vectors::<R, S>(weight)[..x.len()], &mut y[..x.len() * lanes]);
    let by = row.statistics.splats::<S>(simd);
    if let Some(bias) = bias {
        let bias = &as_vectors::<R, S>(bias)[..x.len()];
        for (j, y) in y.chunks_exact_mut(lanes).enumerate() {
            let normalised = normalise_vector::<R, S, CENTRED>(simd, x[j], by);
            write::<R, S>(y, R::mul_add(simd, normalised, weight[j], bias[j]));
        }
    } else {
        for (j, y) in y.chunks_exact_mut(lanes).enumerate() {
            write::<R, S>(y, R::vmul(simd, normalise_vector::<R, S, CENTRED>(simd, x[j], by), weight[j]));
        }
    }
}

/// Rows with the gradients of their norms, and where the gradients of the input and the parameters go.
pub(super) struct Backward<'a, R, const CENTRED: bool> {
    pub(super) x: Matrix<'a, R>,
    pub(super) grad: Matrix<'a, R>,
    /// Added to the gradient of x.
    pub(super) add: Option<Matrix<'a, R>>,
    pub(super) weight: &'a [R],
    pub(super) eps: R,
    /// Room for a row, each.
    pub(super) divided: &'a mut [R],
    pub(super) weight_grad: &'a mut [R],
    /// Only if the gradient of a bias is wanted.
    pub(super) bias_grad: Option<&'a mut [R]>,
    pub(super) x_grad: MatrixMut<'a, MaybeUninit<R>>,
    /// The sums of the gradients of weight and bias so far.
    pub(super) sums: MatrixMut<'a, f64>,
}

impl<'a, R: SimdFloat, const CENTRED: bool> Backward<'a, R, CENTRED> {
    /// Computes the rows with the best instruction set.
    pub(super) fn run(self) {
        match (TypeId::of::<R>() == TypeId::of::<f32>(), CENTRED) {
            (true, false) => backward_rms_f32(self.cast()),
            (true, true) => backward_layer_f32(self.cast()),
            (false, false) => backward_rms_f64(self.cast()),
            (false, true) => backward_layer_f64(self.cast()),
        }
    }

    /// The same with R and CENTRED by what they are.
    fn cast<T: SimdFloat, const C: bool>(self) -> Backward<'a, T, C> {
        let Self { x, grad, add, weight, eps, divided, weight_grad, bias_grad, x_grad, sums } = self;
        Backward {
            x: x.cast(),
            grad: grad.cast(),
            add: add.map(Matrix::cast),
            weight: cast_slice(weight),
            eps: T::from_f64(eps.to_f64()),
            divided: cast_slice_mut(divided),
            weight_grad: cast_slice_mut(weight_grad),
            bias_grad: bias_grad.map(cast_slice_mut),
            x_grad: x_grad.into_downcast().expect(SAME),
            sums,
        }
    }
}

impl<R: SimdFloat, const CENTRED: bool> WithSimd for Backward<'_, R, CENTRED> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        self.weight_grad.fill(R::ZERO);
        if let Some(bias_grad) = &mut self.bias_grad {
            bias_grad.fill(R::ZERO);
        }
        for r in 0..self.x.rows() {
            let row = Row::new::<S, CENTRED>(simd, self.x.row(r), self.eps, self.divided);
            let add = self.add.as_ref().map(
                #[inline(always)]
                |add| add.row(r),
            );
            let gradient = RowGradient { row, grad: self.grad.row(r), weight: self.weight, add };
            gradient.write::<S, CENTRED>(simd, self.weight_grad, self.bias_grad.as_deref_mut(), self.x_grad.row(r));
        }
        add_wide(self.weight_grad, self.sums.row(0));
        if let Some(bias_grad) = &self.bias_grad {
            add_wide(bias_grad, self.sums.row(1));
        }
    }
}

/// Adds numbers to sums in f64.
#[inline(always)]
fn add_wide<R: SimdFloat>(numbers: &[R], sums: &mut [f64]) {
    for (sum, x) in sums.iter_mut().zip(numbers) {
        *sum += x.to_f64();
    }
}

/// x + y, number by number.
pub(super) struct Add<'a, R> {
    pub(super) x: Matrix<'a, R>,
    pub(super) y: Matrix<'a, R>,
    /// Row by row.
    pub(super) sum: &'a mut [R],
}

impl<R: SimdFloat> WithSimd for Add<'_, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (r, sum) in self.sum.chunks_exact_mut(self.x.columns()).enumerate() {
            for ((sum, x), y) in sum.iter_mut().zip(self.x.row(r)).zip(self.y.row(r)) {
                *sum = *x + *y;
            }
        }
    }
}

/// A row and the gradient of its norm.
#[derive(Clone, Copy)]
struct RowGradient<'a, R> {
    row: Row<'a, R>,
    grad: &'a [R],
    weight: &'a [R],
    /// Added to the gradient of x.
    add: Option<&'a [R]>,
}

impl<'a, R: SimdFloat> RowGradient<'a, R> {
    /// The same from number `first` on.
    #[inline(always)]
    fn from(self, first: usize) -> Self {
        let Self { row, grad, weight, add } = self;
        Self { row: row.from(first), grad: &grad[first..], weight: &weight[first..], add: add.map(|add| &add[first..]) }
    }

    /// The same of the first `count` numbers.
    #[inline(always)]
    fn first(self, count: usize) -> Self {
        let row = Row { x: &self.row.x[..count], ..self.row };
        Self { row, ..self }
    }

    /// Adds the row's part to the gradients of weight and bias, and writes the gradient of x:
    /// (g · w - mean(g · w) - x̂ · mean(g · w · x̂)) · inverse, where x̂ is the normalised x; without the mean for RMS norm.
    #[inline(always)]
    fn write<S: Simd, const CENTRED: bool>(
        self,
        simd: S,
        weight_grad: &mut [R],
        bias_grad: Option<&mut [R]>,
        x_grad: &mut [MaybeUninit<R>],
    ) {
        let x_grad = &mut x_grad[..self.row.x.len()];
        let [sum, product] = match bias_grad {
            Some(bias_grad) => self.add_parameters::<S, CENTRED, true>(simd, weight_grad, bias_grad, x_grad),
            None => self.add_parameters::<S, CENTRED, false>(simd, weight_grad, &mut [], x_grad),
        };
        let (count, whole) = (self.row.x.len() as f64, self.whole::<S>());
        let means = [R::from_f64(sum / count), R::from_f64(product / count)];
        // SAFETY: `add_parameters` has written every number of the row.
        let x_grad = unsafe { initialised(x_grad) };
        self.write_vectors::<S, CENTRED>(simd, means, x_grad);
        self.from(whole).write_vectors::<_, CENTRED>(Scalar, means, &mut x_grad[whole..]);
    }

    /// The numbers of the row's whole vectors.
    #[inline(always)]
    fn whole<S: Simd>(&self) -> usize {
        self.row.x.len() / R::lanes::<S>() * R::lanes::<S>()
    }

    /// The sums of g · w and g · w · x̂ over the row, in f64. It adds the row's part to the gradients of weight and, if it is `BIASED`,
    /// bias, and writes x̂.
    #[inline(always)]
    fn add_parameters<S: Simd, const CENTRED: bool, const BIASED: bool>(
        self,
        simd: S,
        weight_grad: &mut [R],
        bias_grad: &mut [R],
        normalised: &mut [MaybeUninit<R>],
    ) -> [f64; 2] {
        let whole = self.whole::<S>();
        let bias_from = |first: usize| if BIASED { first } else { 0 };
        let [of_rest, products_of_rest] = self.from(whole).sums::<_, CENTRED, BIASED>(
            Scalar,
            &mut weight_grad[whole..],
            &mut bias_grad[bias_from(whole)..],
            &mut normalised[whole..],
        );
        let (mut sum, mut product) = (of_rest.to_f64(), products_of_rest.to_f64());
        for first in (0..whole).step_by(PIECE) {
            let piece = self.from(first).first(PIECE.min(whole - first));
            let [of_piece, products_of_piece] = piece.sums::<S, CENTRED, BIASED>(
                simd,
                &mut weight_grad[first..],
                &mut bias_grad[bias_from(first)..],
                &mut normalised[first..],
            );
            sum += of_piece.to_f64();
            product += products_of_piece.to_f64();
        }
        [sum, product]
    }

    /// As [`RowGradient::add_parameters`], for the whole vectors of a piece of a row, and without f64. The first sum is wanted for
    /// centred rows alone.
    #[inline(always)]
    fn sums<S: Simd, const CENTRED: bool, const BIASED: bool>(
        self,
        simd: S,
        weight_grad: &mut [R],
        bias_grad: &mut [R],
        normalised: &mut [MaybeUninit<R>],
    ) -> [R; 2] {
        let (x, lanes) = (as_vectors::<R, S>(self.row.x), R::lanes::<S>());
        let (grad, weight) = (&as_vectors::<R, S>(self.grad)[..x.len()], &as_vectors::<R, S>(self.weight)[..x.len()]);
        let weight_grad = &mut as_vectors_mut::<R, S>(weight_grad)[..x.len()];
        let bias_grad = &mut as_vectors_mut::<R, S>(bias_grad)[..if BIASED { x.len() } else { 0 }];
        let normalised = &mut normalised[..x.len() * lanes];
        let by = self.row.statistics.splats::<S>(simd);
        let zero = R::splat(simd, R::ZERO);
        // Two sums of each at a time, since each addition waits for the one before it.
        let (mut sums, mut products) = ([zero; 2], [zero; 2]);
        // (A macro and no closure: what isn't inlined is compiled without the vectors' instructions.)
        macro_rules! add {
            ($j:expr, $i:expr) => {{
                let (j, i) = ($j, $i);
                let of_x = normalise_vector::<R, S, CENTRED>(simd, x[j], by);
                write::<R, S>(&mut normalised[j * lanes..(j + 1) * lanes], of_x);
                weight_grad[j] = R::mul_add(simd, grad[j], of_x, weight_grad[j]);
                if BIASED {
                    bias_grad[j] = R::vadd(simd, bias_grad[j], grad[j]);
                }
                let weighted = R::vmul(simd, grad[j], weight[j]);
                if CENTRED {
                    sums[i] = R::vadd(simd, sums[i], weighted);
                }
                products[i] = R::mul_add(simd, weighted, of_x, products[i]);
            }};
        }
        for pair in 0..x.len() / 2 {
            add!(2 * pair, 0);
            add!(2 * pair + 1, 1);
        }
        if x.len() % 2 == 1 {
            add!(x.len() - 1, 0);
        }
        let total = |[a, b]: [R::Vector<S>; 2]| R::reduce_add(simd, R::vadd(simd, a, b));
        [total(sums), total(products)]
    }

    /// Writes the gradient of x over the normalised numbers.
    #[inline(always)]
    fn write_vectors<S: Simd, const CENTRED: bool>(self, simd: S, means: [R; 2], x_grad: &mut [R]) {
        let x_grad = as_vectors_mut::<R, S>(x_grad);
        let (grad, weight) =
            (&as_vectors::<R, S>(self.grad)[..x_grad.len()], &as_vectors::<R, S>(self.weight)[..x_grad.len()]);
        let [mean, product] = [R::splat(simd, means[0]), R::splat(simd, -means[1])];
        let factor = R::splat(simd, self.row.statistics.inverse / self.row.divisor);
        let add = self.add.map(|add| &as_vectors::<R, S>(add)[..x_grad.len()]);
        for (j, x_grad) in x_grad.iter_mut().enumerate() {
            let mut weighted = R::vmul(simd, grad[j], weight[j]);
            if CENTRED {
                weighted = R::vsub(simd, weighted, mean);
            }
            let difference = R::mul_add(simd, *x_grad, product, weighted);
            *x_grad = match add {
                Some(add) => R::mul_add(simd, difference, factor, add[j]),
                None => R::vmul(simd, difference, factor),
            };
        }
    }
}
