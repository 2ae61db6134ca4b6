//! Activation functions, plain and gated, with their gradients.

use std::any::TypeId;

use pulp::bytemuck::{cast_slice, cast_slice_mut};
use pulp::{Simd, WithSimd};

use crate::dtype::Number;
use crate::error::Error;
use crate::matrix::{Matrix, Shared};
use crate::pointwise::{NUMBERS_PER_TASK, WORK_PER_NUMBER, apart, beside, lines};
use crate::schedule::run_tasks;
use crate::simd::{SimdFloat, as_vectors, as_vectors_mut, instruction_set, load_up_to, store_up_to};

mod functions;

use functions::{Function, Gated, GatedGradient, Gelu, GeluTanh, Gradient, Relu, Silu, SquaredRelu, Value};

/// What the vectors hold, in an error of memory.
const RESULT: &str = "activations";
const GRADIENT: &str = "gradient of activations";

/// A function of each number of a tensor. None gives NaN for a finite number, and none has a gradient of NaN there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0). The derivative at 0 is 0.
    Relu,
    /// max(x, 0)². Source: So et al., "Primer" (NeurIPS 2021), section 3.
    SquaredRelu,
    /// x · Φ(x), where Φ is the distribution function of the normal distribution: x / 2 · (1 + erf(x / √2)). Source: Hendrycks,
    /// Gimpel, "Gaussian Error Linear Units" (2016), section 2.
    Gelu,
    /// The approximation x / 2 · (1 + tanh(√(2 / π) · (x + 0.044715 x³))) of the same section.
    GeluTanh,
    /// x · σ(x), where σ(x) = 1 / (1 + e^-x). Source: the same, section 2.
    Silu,
}

/// Runs `$body` with the function of an activation as `$f`.
macro_rules! with_function {
    ($activation:expr, $f:ident => $body:expr) => {
        match $activation {
            Activation::Relu => {
                let $f = Relu;
                $body
            }
            Activation::SquaredRelu => {
                let $f = SquaredRelu;
                $body
            }
            Activation::Gelu => {
                let $f = Gelu;
                $body
            }
            Activation::GeluTanh => {
                let $f = GeluTanh;
                $body
            }
            Activation::Silu => {
                let $f = Silu;
                $body
            }
        }
    };
}

impl Activation {
    /// f(x) of each number.
    ///
    /// # Errors
    ///
    /// Too little memory.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::activation::Activation;
    ///
    /// assert_eq!(Activation::SquaredRelu.forward(&[-1f32, 3.0])?, [0.0, 9.0]);
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn forward<E: Number>(self, x: &[E]) -> Result<Vec<E>, Error> {
        let [y] = apart(RESULT, [line(x)], Value(self))?;
        Ok(y)
    }

    /// grad · f'(x) of each number.
    ///
    /// # Errors
    ///
    /// A gradient of another length, or too little memory.
    pub fn backward<E: Number>(self, x: &[E], grad: &[E]) -> Result<Vec<E>, Error> {
        check_len("gradient of activations", x.len(), grad.len())?;
        let [x] = apart(GRADIENT, [line(x), line(grad)], Gradient(self))?;
        Ok(x)
    }

    /// As [`backward`](Self::backward), with the result in the place of `grad`, so that one such tensor is in memory and not two.
    ///
    /// # Errors
    ///
    /// As [`backward`](Self::backward).
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::activation::Activation;
    ///
    /// let mut grad = [5f32, 5.0];
    /// Activation::SquaredRelu.backward_in_place(&[-1.0, 3.0], &mut grad)?;
    /// assert_eq!(grad, [0.0, 30.0]);
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn backward_in_place<E: Number>(self, x: &[E], grad: &mut [E]) -> Result<(), Error> {
        check_len("gradient of activations", x.len(), grad.len())?;
        let shared = Shared::new(grad);
        run_tasks(WORK_PER_NUMBER * x.len(), x.len().div_ceil(NUMBERS_PER_TASK), |task| {
            let start = task * NUMBERS_PER_TASK;
            let x = &x[start..x.len().min(start + NUMBERS_PER_TASK)];
            // SAFETY: no two tasks have a number in common.
            let mut grad = unsafe { shared.rows(start, 1, x.len(), x.len()) };
            if let (Some(x), Some(grad)) = (E::as_floats(x), grad.downcast()) {
                self.apply_derivative(x, grad.into_row(0));
            } else {
                let of_x = self.backward(x, grad.row(0))?;
                grad.row(0).copy_from_slice(&of_x);
            }
            Ok(())
        })
    }

    /// f(gate) · up of each pair of numbers.
    ///
    /// # Errors
    ///
    /// Two lengths, or too little memory.
    pub fn gated_forward<E: Number>(self, gate: &[E], up: &[E]) -> Result<Vec<E>, Error> {
        check_len("gated numbers", gate.len(), up.len())?;
        let [y] = apart(RESULT, [line(gate), line(up)], Gated(self))?;
        Ok(y)
    }

    /// The gradients of gate and up.
    ///
    /// # Errors
    ///
    /// Several lengths, or too little memory.
    pub fn gated_backward<E: Number>(self, gate: &[E], up: &[E], grad: &[E]) -> Result<[Vec<E>; 2], Error> {
        check_len("gated numbers", gate.len(), up.len())?;
        check_len("gradient of activations", gate.len(), grad.len())?;
        apart(GRADIENT, [line(gate), line(up), line(grad)], GatedGradient(self))
    }

    /// f(gate) · up (rows, n), where a row of `gate_up` (rows, 2 · n) holds its `n` gates and then its `n` other numbers, as one
    /// product by both weights gives them.
    ///
    /// # Errors
    ///
    /// Another length, or too little memory.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::activation::Activation;
    ///
    /// let gate_up = [1f32, -1.0, 5.0, 6.0, 2.0, 3.0, 7.0, 8.0]; // two rows of two gates and two others
    /// assert_eq!(Activation::Relu.gated_rows_forward(2, 2, &gate_up)?, [5.0, 0.0, 14.0, 24.0]);
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn gated_rows_forward<E: Number>(self, rows: usize, n: usize, gate_up: &[E]) -> Result<Vec<E>, Error> {
        let [gate, up] = halves(rows, n, gate_up)?;
        let [y] = apart(RESULT, [gate, up], Gated(self))?;
        Ok(y)
    }

    /// The gradient (rows, 2 · n) of `gate_up`, from that of the result (rows, n).
    ///
    /// # Errors
    ///
    /// Another length, or too little memory.
    pub fn gated_rows_backward<E: Number>(
        self,
        rows: usize,
        n: usize,
        gate_up: &[E],
        grad: &[E],
    ) -> Result<Vec<E>, Error> {
        let [gate, up] = halves(rows, n, gate_up)?;
        check_len("gradient of activations", rows * n, grad.len())?;
        let grad = Matrix::new(grad, rows, n, n);
        beside(GRADIENT, [gate, up, grad], GatedGradient(self))
    }

    /// x = f(x) in place, with the best instruction set.
    pub fn apply<R: SimdFloat>(self, x: &mut [R]) {
        match as_f32_mut(x) {
            Ok(x) => apply_f32(self, x),
            Err(x) => apply_f64(self, cast_slice_mut(x)),
        }
    }

    /// grad = grad · f'(x) in place, for as many numbers as both slices have.
    pub fn apply_derivative<R: SimdFloat>(self, x: &[R], grad: &mut [R]) {
        let len = x.len().min(grad.len());
        match as_f32_mut(&mut grad[..len]) {
            Ok(grad) => apply_derivative_f32(self, cast_slice(&x[..len]), grad),
            Err(grad) => apply_derivative_f64(self, cast_slice(&x[..len]), cast_slice_mut(grad)),
        }
    }
}

lines!(Value<Activation>, 1 => 1, |op, run| with_function!(op.0, f => run!(Value(f))));
lines!(Gradient<Activation>, 2 => 1, |op, run| with_function!(op.0, f => run!(Gradient(f))));
lines!(Gated<Activation>, 2 => 1, |op, run| with_function!(op.0, f => run!(Gated(f))));
lines!(GatedGradient<Activation>, 3 => 2, |op, run| with_function!(op.0, f => run!(GatedGradient(f))));

/// The functions in place, compiled in this package.
macro_rules! in_place {
    ($float:ty, $apply:ident, $apply_derivative:ident) => {
        #[inline(never)]
        fn $apply(activation: Activation, x: &mut [$float]) {
            with_function!(activation, f => instruction_set().dispatch(Apply { x, f }));
        }
        #[inline(never)]
        fn $apply_derivative(activation: Activation, x: &[$float], grad: &mut [$float]) {
            with_function!(activation, f => instruction_set().dispatch(ApplyDerivative { x, grad, f }));
        }
    };
}
in_place!(f32, apply_f32, apply_derivative_f32);
in_place!(f64, apply_f64, apply_derivative_f64);

/// The same slice if it is one of f32, else itself.
fn as_f32_mut<R: SimdFloat>(x: &mut [R]) -> Result<&mut [f32], &mut [R]> {
    if TypeId::of::<R>() == TypeId::of::<f32>() { Ok(cast_slice_mut(x)) } else { Err(x) }
}

/// A slice as one row.
fn line<E>(x: &[E]) -> Matrix<'_, E> {
    Matrix::new(x, 1, x.len(), x.len())
}

fn check_len(what: &'static str, expected: usize, got: usize) -> Result<(), Error> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Length { what, expected: format!("{expected} elements"), got })
}

/// The two halves of each row.
fn halves<E>(rows: usize, n: usize, gate_up: &[E]) -> Result<[Matrix<'_, E>; 2], Error> {
    let len = n.checked_mul(2).and_then(|n| n.checked_mul(rows));
    if len != Some(gate_up.len()) {
        let expected = format!("{rows} rows of 2 * {n} elements");
        return Err(Error::Length { what: "gates and gated numbers", expected, got: gate_up.len() });
    }
    Ok([0, n].map(|first| Matrix::new(gate_up.get(first..).unwrap_or_default(), rows, n, 2 * n)))
}

struct Apply<'a, R, F> {
    x: &'a mut [R],
    f: F,
}

impl<R: SimdFloat, F: Function<R>> WithSimd for Apply<'_, R, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let whole = self.x.len() / R::lanes::<S>() * R::lanes::<S>();
        for x in as_vectors_mut::<R, S>(self.x) {
            *x = self.f.value(simd, *x);
        }
        let rest = &mut self.x[whole..];
        if !rest.is_empty() {
            let y = self.f.value(simd, load_up_to(simd, rest));
            store_up_to::<R, S>(rest, y);
        }
    }
}

struct ApplyDerivative<'a, R, F> {
    x: &'a [R],
    grad: &'a mut [R],
    f: F,
}

impl<R: SimdFloat, F: Function<R>> WithSimd for ApplyDerivative<'_, R, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let whole = self.x.len() / R::lanes::<S>() * R::lanes::<S>();
        for (x, grad) in as_vectors::<R, S>(self.x).iter().zip(as_vectors_mut::<R, S>(self.grad)) {
            *grad = R::vmul(simd, self.f.derivative(simd, *x), *grad);
        }
        let (x, rest) = (&self.x[whole..], &mut self.grad[whole..]);
        if !rest.is_empty() {
            let derivative = self.f.derivative(simd, load_up_to(simd, x));
            let y = R::vmul(simd, derivative, load_up_to(simd, rest));
            store_up_to::<R, S>(rest, y);
        }
    }
}

#[cfg(test)]
#[path = "activation_tests.rs"]
mod tests;
