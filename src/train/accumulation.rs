//! The gradient of a batch that is too large for memory, from the gradients of its parts.

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use crate::check::{check_number, compute_dtype};
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::train::gradients::of;

/// Adds up the gradients of several batches, and gives their mean.
///
/// The mean of the gradients of parts of equal size is the gradient of the whole batch, if the loss is a mean. Parts of different
/// sizes are added with their sizes as weights. Half types are summed in f32 and rounded once, unless a gradient in f32 was added to them.
/// candle's gradients hold those of constants, too, which are left out.
///
/// # Examples
///
/// ```
/// use candle_attention::train::GradientAccumulator;
/// use candle_core::{Device, Tensor, Var};
///
/// let weight = Var::new(2f32, &Device::Cpu)?;
/// let loss = |x: &[f32]| Tensor::new(x, &Device::Cpu)?.broadcast_mul(&weight)?.mean_all();
/// let mut accumulator = GradientAccumulator::new(&[("weight".into(), weight.clone())]);
/// accumulator.add(&loss(&[1.0, 2.0, 3.0])?.backward()?, 3.0)?;
/// accumulator.add(&loss(&[10.0])?.backward()?, 1.0)?;
/// let gradients = accumulator.finish()?;
/// assert_eq!(gradients.get(&weight).unwrap().to_scalar::<f32>()?, 4.0); // mean of 1, 2, 3, 10
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct GradientAccumulator {
    parameters: Vec<(String, Var)>,
    /// The sum of each parameter's gradient times the weight of its batch.
    sums: Vec<Option<Sum>>,
    weight: f64,
}

#[derive(Clone, Debug)]
struct Sum {
    /// In the dtype to compute in.
    total: Tensor,
    /// The widest dtype of what was added, which the mean gets.
    dtype: DType,
}

impl GradientAccumulator {
    /// An accumulator of the gradients of these parameters.
    pub fn new(parameters: &[(String, Var)]) -> Self {
        Self { parameters: parameters.to_vec(), sums: vec![None; parameters.len()], weight: 0.0 }
    }

    /// Adds the gradients of a batch with a weight: the number of what its loss is a mean of, or 1 if all batches have as many.
    /// A parameter that has no gradient in a batch has one of zeros.
    ///
    /// # Errors
    ///
    /// A weight that isn't a finite number above 0, also in f32; a gradient of another shape, dtype or device than its parameter; too
    /// little memory. Then nothing is added.
    pub fn add(&mut self, gradients: &GradStore, weight: f64) -> Result<()> {
        let expected = "a finite number above 0, also in f32";
        check_number("weight", Some(weight), expected, |x| x > 0.0 && (x as f32).is_normal())?;
        let mut sums = Vec::with_capacity(self.sums.len());
        for ((name, var), sum) in self.parameters.iter().zip(&self.sums) {
            sums.push(match of(gradients, name, var)? {
                Some(gradient) => Some(sum_with(sum.as_ref(), &gradient, weight)?),
                None => sum.clone(),
            });
        }
        self.sums = sums;
        self.weight += weight;
        Ok(())
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
        for ((_, var), sum) in self.parameters.iter().zip(&self.sums) {
            let Some(Sum { total, dtype }) = sum else { continue };
            memory::ask_for("mean of gradients", 2, total, total.dtype())?;
            let mean = if self.weight == 1.0 { total.clone() } else { total.affine(1.0 / self.weight, 0.0)? };
            means.insert(var, mean.to_dtype(*dtype)?);
        }
        self.sums.fill(None);
        self.weight = 0.0;
        Ok(means)
    }
}

/// A parameter's sum so far and `gradient` · `weight`.
fn sum_with(sum: Option<&Sum>, gradient: &Tensor, weight: f64) -> Result<Sum> {
    let wide = compute_dtype(gradient.dtype());
    memory::ask_for("sum of gradients", 3, gradient, wide)?;
    let mut term = gradient.to_dtype(wide)?;
    if weight != 1.0 {
        term = (term * weight)?;
    }
    Ok(match sum {
        Some(Sum { total, dtype }) => {
            let dtype = if gradient.dtype() == wide { wide } else { *dtype };
            Sum { total: (total + term)?, dtype }
        }
        None => Sum { total: term, dtype: gradient.dtype() },
    })
}
