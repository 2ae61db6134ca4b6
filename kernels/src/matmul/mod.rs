//! Matrix products: the linear layers of a transformer, forward (x · wᵀ) and backward (dy · w and dyᵀ · x).
//!
//! The operands have any strides, the result is row-major. A right operand may also be in quantised blocks, which are decoded a part at
//! a time: see [`Operand::quantised`]. f16 and bf16 are multiplied and summed in f32, and rounded once, after
//! the epilogue; products of bf16 by AMX count denormal numbers as zero. How the result is cut into tiles depends on the number of threads, but the order in which the sums of an
//! element are added doesn't: the same input gives the same bits for any number of threads.
//!
//! The method is that of Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008), section 4: a block of
//! sums stays in registers, a packed block of the left operand in the first-level cache, and one of the right operand in the
//! second-level cache.
//!
//! ```
//! use attention_kernels::matmul::{Bias, Operand, matmul};
//!
//! // y = x · wᵀ + bias
//! let x = Operand::row_major("input", &[1.0f32, 2.0], 1, 2)?;
//! let weight = Operand::row_major("weight", &[3.0, 4.0, 5.0, 6.0], 2, 2)?;
//! assert_eq!(matmul(x, weight.transposed(), &Bias(&[0.5, 0.25]))?, [11.5, 17.25]);
//! # Ok::<(), attention_kernels::Error>(())
//! ```

mod bf16_tiles;
mod column_sums;
mod epilogue;
mod few_rows;
mod microkernel;
mod operand;
mod pack;
mod product;
mod tile;

pub use column_sums::column_sums;
pub use epilogue::{Bias, Epilogue, Plain};
pub use operand::Operand;

use crate::alloc::collected;
use crate::error::Error;
use crate::matmul::product::{Group, Product};

pub use product::MatmulElement;

/// a · b, row-major, and what `epilogue` makes of it.
///
/// # Shapes
///
/// (m, k) · (k, n) → (m, n)
///
/// # Errors
///
/// [`Error::Dims`] if `b` has not as many rows as `a` has columns; what [`Epilogue::check`] finds; [`Error::Memory`] if there is
/// no memory for the result.
///
/// # Examples
///
/// ```
/// use attention_kernels::matmul::{Operand, Plain, matmul};
///
/// let a = Operand::row_major("a", &[1.0f64, 2.0, 3.0, 4.0], 2, 2)?;
/// assert_eq!(matmul(a, a, &Plain)?, [7.0, 10.0, 15.0, 22.0]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn matmul<E: MatmulElement>(a: Operand<E>, b: Operand<E>, epilogue: &dyn Epilogue<E>) -> Result<Vec<E>, Error> {
    matmul_sum(&[(a, b)], epilogue)
}

/// \[Σ_i a_0i · b_0i | Σ_i a_1i · b_1i | ...\]: sums of products side by side in one row-major result. It computes linear layers that
/// share an input, as queries, keys and values do, each with the low-rank product that an adapter adds to it.
///
/// # Shapes
///
/// Σ_i (m, k_gi) · (k_gi, n_g) → (m, n_0 + n_1 + ...). A group without pairs has no columns.
///
/// # Errors
///
/// As [`matmul_sum`].
///
/// # Examples
///
/// ```
/// use attention_kernels::matmul::{Operand, Plain, matmul_groups};
///
/// // x · w + (x · a) · b beside x · v
/// let x = Operand::row_major("x", &[1.0f32, 2.0], 1, 2)?;
/// let (w, v) = (Operand::row_major("w", &[3.0, 4.0], 2, 1)?, Operand::row_major("v", &[5.0, 6.0], 2, 1)?);
/// let (xa, b) = (Operand::row_major("x · a", &[0.5], 1, 1)?, Operand::row_major("b", &[8.0], 1, 1)?);
/// assert_eq!(matmul_groups(1, &[&[(x, w), (xa, b)], &[(x, v)]], &Plain)?, [15.0, 17.0]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn matmul_groups<E: MatmulElement>(
    rows: usize,
    groups: &[&[(Operand<E>, Operand<E>)]],
    epilogue: &dyn Epilogue<E>,
) -> Result<Vec<E>, Error> {
    let mut groups = collected("operands", groups.iter().map(|&pairs| Group { pairs, first_column: 0 }))?;
    let mut n = 0usize;
    for group in &mut groups {
        group.first_column = n;
        n = n.saturating_add(group.columns());
    }
    Product { dims: [rows, n], groups: &groups, epilogue }.result()
}

/// Σ_i a_i · b_i, summed in the order given: the gradient of an input of which several products were taken.
///
/// # Shapes
///
/// Σ_i (m, k_i) · (k_i, n) → (m, n); without pairs the result is empty
///
/// # Errors
///
/// As [`matmul`], and [`Error::Dims`] if a product has other sizes than the first.
///
/// # Examples
///
/// ```
/// use attention_kernels::matmul::{Operand, Plain, matmul_sum};
///
/// let a = Operand::row_major("a", &[1.0f32, 2.0], 1, 2)?;
/// let b = Operand::row_major("b", &[3.0], 1, 1)?;
/// assert_eq!(matmul_sum(&[(a, a.transposed()), (b, b)], &Plain)?, [14.0]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn matmul_sum<E: MatmulElement>(
    pairs: &[(Operand<E>, Operand<E>)],
    epilogue: &dyn Epilogue<E>,
) -> Result<Vec<E>, Error> {
    let dims = pairs.first().map_or([0, 0], |(a, b)| [a.dims()[0], b.dims()[1]]);
    Product { dims, groups: &[Group { pairs, first_column: 0 }], epilogue }.result()
}

#[cfg(test)]
#[path = "matmul_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "quantised_tests.rs"]
mod quantised_tests;
