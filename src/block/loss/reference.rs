//! Cross-entropy by candle's operations, for other devices than the CPU.

use attention_kernels::loss::IGNORED;
use candle_core::{D, Tensor};

use super::CrossEntropyOptions;
use super::labels::Labels;
use crate::check::compute_dtype;
use crate::error::Result;
use crate::sdpa::overflow::finite_or_zero;

/// As [`cross_entropy`](super::cross_entropy), for logits and labels that have been checked.
pub(super) fn cross_entropy(logits: &Tensor, labels: &Labels, options: &CrossEntropyOptions) -> Result<Tensor> {
    let (dtype, device) = (logits.dtype(), logits.device());
    let (rows, vocabulary) = (labels.labels.len(), logits.dim(D::Minus1)?);
    if rows == 0 || vocabulary == 0 || labels.counted == 0 {
        // A loss of zero that depends on the logits.
        let zero = logits.zeros_like()?.detach();
        return Ok(crate::empty::connected(zero.sum_all()?, logits)?);
    }
    let wide = logits.to_dtype(compute_dtype(dtype))?.reshape((rows, vocabulary))?;
    let mask: Vec<f32> = labels.labels.iter().map(|label| if *label == IGNORED { 0.0 } else { 1.0 }).collect();
    let mask = Tensor::from_vec(mask, (rows, 1), device)?.to_dtype(wide.dtype())?;
    // What an ignored row holds must not matter: zero times infinity would be NaN.
    let is_counted = mask.broadcast_as(wide.shape())?.ne(0.0)?;
    let wide = is_counted.where_cond(&wide, &wide.zeros_like()?)?;
    let indices: Vec<u32> = labels.labels.iter().map(|label| if *label == IGNORED { 0 } else { *label }).collect();
    let indices = Tensor::from_vec(indices, (rows, 1), device)?;

    let shifted = wide.broadcast_sub(&finite_or_zero(&wide.max_keepdim(D::Minus1)?.detach())?)?;
    let total = shifted.exp()?.sum_keepdim(D::Minus1)?;
    // Of a row that has only minus infinity: its loss is infinite.
    let total = total.eq(0.0)?.where_cond(&total.ones_like()?, &total)?;
    let smoothing = options.label_smoothing;
    let mut losses = total.log()?;
    if smoothing < 1.0 {
        losses = (losses - (shifted.gather(&indices, 1)? * (1.0 - smoothing))?)?;
    }
    if smoothing > 0.0 {
        losses = (losses - (shifted.mean_keepdim(D::Minus1)? * smoothing)?)?;
    }
    let sum = (losses * mask)?.sum_all()?;
    Ok((sum * options.scale(labels.counted))?.to_dtype(dtype)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::super::{Reduction, labels};
    use super::*;

    #[test]
    fn loss_and_gradient_are_those_of_the_operation_on_the_cpu() {
        let numbers: Vec<f64> = (0..28).map(|i| f64::from(i * i % 29) / 4.0 - 3.0).collect();
        let logits = Tensor::from_vec(numbers, (4, 7), &Device::Cpu).unwrap();
        let targets = Tensor::new(&[3i64, -1, 6, 0], &Device::Cpu).unwrap();
        for (smoothing, reduction) in [(0.0, Reduction::Mean), (0.3, Reduction::Sum), (1.0, Reduction::Mean)] {
            let options = CrossEntropyOptions { label_smoothing: smoothing, ignore_index: Some(-1), reduction };
            for (dtype, tolerance) in [(DType::F64, 1e-14), (DType::F32, 1e-6), (DType::BF16, 3e-2)] {
                let logits = Var::from_tensor(&logits.to_dtype(dtype).unwrap()).unwrap();
                let labels = labels::read(&targets, &[4], 7, Some(-1)).unwrap();
                let losses = [
                    cross_entropy(&logits, &labels, &options).unwrap(),
                    super::super::cross_entropy(&logits, &targets, &options).unwrap(),
                ];
                let [reference, operation] = losses.map(|loss| {
                    let gradient = loss.backward().unwrap().remove(&logits).unwrap();
                    let all = Tensor::cat(&[loss.reshape(1).unwrap(), gradient.flatten_all().unwrap()], 0).unwrap();
                    all.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap()
                });
                let close = |(x, y): (&f64, &f64)| (x - y).abs() <= tolerance * (1.0 + y.abs());
                assert!(reference.iter().zip(&operation).all(close), "{options:?} {dtype:?}");
            }
        }
    }

    #[test]
    fn impossible_labels_have_an_infinite_loss_and_no_nan() {
        let row = [f32::NEG_INFINITY; 3];
        let logits = Var::new(&[row, [f32::NEG_INFINITY, 1.0, 2.0]], &Device::Cpu).unwrap();
        let targets = Tensor::new(&[0u32, 0], &Device::Cpu).unwrap();
        let labels = labels::read(&targets, &[2], 3, None).unwrap();
        let loss = cross_entropy(&logits, &labels, &CrossEntropyOptions::default()).unwrap();
        assert_eq!(loss.to_scalar::<f32>().unwrap(), f32::INFINITY);
    }
}
