//! The gradient of a batch that is too large for memory, from the gradients of its parts.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, TensorId};

use crate::check::{check_number, compute_dtype};
use crate::error::{AttentionError, Result};
use crate::memory;

/// Adds up the gradients of several batches, and gives their mean.
///
/// The mean of the gradients of parts of equal size is the gradient of the whole batch, if the loss is a mean. Parts of different
/// sizes are added with their sizes as weights. Half types are summed in f32 and rounded once.
///
/// # Examples
///
/// ```
/// use candle_attention::train::GradientAccumulator;
/// use candle_core::{Device, Tensor, Var};
///
/// let weight = Var::new(2f32, &Device::Cpu)?;
/// let loss = |x: &[f32]| Tensor::new(x, &Device::Cpu)?.broadcast_mul(&weight)?.mean_all();
/// let mut accumulator = GradientAccumulator::new();
/// accumulator.add(loss(&[1.0, 2.0, 3.0])?.backward()?, 3.0)?;
/// accumulator.add(loss(&[10.0])?.backward()?, 1.0)?;
/// let gradients = accumulator.finish()?;
/// assert_eq!(gradients.get(&weight).unwrap().to_scalar::<f32>()?, 4.0); // mean of 1, 2, 3, 10
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct GradientAccumulator {
    /// The sum of each gradient times the weight of its batch, and the dtype of the gradient.
    sums: HashMap<TensorId, (Tensor, DType)>,
    weight: f64,
}

impl GradientAccumulator {
    /// An accumulator of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the gradients of a batch with a weight: the number of what its loss is a mean of, or 1 if all batches have as many.
    /// A variable that has no gradient in a batch has one of zeros.
    ///
    /// # Errors
    ///
    /// A weight that isn't a finite number above 0; a gradient of another shape or dtype than that of the same variable before;
    /// too little memory. Then nothing is added.
    pub fn add(&mut self, gradients: GradStore, weight: f64) -> Result<()> {
        check_number("weight", Some(weight), "a finite number above 0", |x| x.is_finite() && x > 0.0)?;
        let mut sums = Vec::new();
        for &id in gradients.get_ids() {
            let Some(gradient) = gradients.get_id(id) else { continue };
            sums.push((id, self.sum_with(id, &gradient.detach(), weight)?, gradient.dtype()));
        }
        self.sums.extend(sums.into_iter().map(|(id, sum, dtype)| (id, (sum, dtype))));
        self.weight += weight;
        Ok(())
    }

    /// The sum of a variable's gradients so far and `gradient` · `weight`.
    fn sum_with(&self, id: TensorId, gradient: &Tensor, weight: f64) -> Result<Tensor> {
        let wide = compute_dtype(gradient.dtype());
        memory::ask_for("sum of gradients", 3, gradient, wide)?;
        let mut term = gradient.to_dtype(wide)?;
        if weight != 1.0 {
            term = (term * weight)?;
        }
        let Some((sum, dtype)) = self.sums.get(&id) else { return Ok(term) };
        if gradient.dtype() != *dtype {
            return Err(AttentionError::DType {
                tensor: "gradient",
                expected: format!("{dtype:?}"),
                got: gradient.dtype(),
            }
            .into());
        }
        if gradient.dims() != sum.dims() {
            let (expected, shape) = (format!("{:?}, as before", sum.dims()), gradient.dims().to_vec());
            return Err(AttentionError::Shape { tensor: "gradient", expected, shape }.into());
        }
        Ok((sum + term)?)
    }

    /// The mean of the gradients, Σ weight · gradient / Σ weight. The accumulator is then empty.
    ///
    /// # Errors
    ///
    /// No batch has been added; too little memory.
    pub fn finish(&mut self) -> Result<GradStore> {
        if self.weight == 0.0 {
            let (name, expected) = ("weight of all batches", "a finite number above 0");
            return Err(AttentionError::Number { name, expected, got: 0.0 }.into());
        }
        let mut means = GradStore::default();
        for (id, (sum, dtype)) in &self.sums {
            memory::ask_for("mean of gradients", 2, sum, sum.dtype())?;
            let mean = if self.weight == 1.0 { sum.clone() } else { sum.affine(1.0 / self.weight, 0.0)? };
            means.insert_id(*id, mean.to_dtype(*dtype)?);
        }
        *self = Self::default();
        Ok(means)
    }
}
