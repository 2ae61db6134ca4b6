//! How far results may be from the reference.

use candle_attention::Backend;
use candle_core::{DType, Device, Result};

use crate::common::numbers;

use super::problem::{Bias, Case, Inputs, error};

/// About twice the largest error that was observed. Half types round their results by up to half a unit in the last
/// place, 2^-11 or 2^-8, and the backward pass starts from a rounded context.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-13,
        DType::F32 => 1e-5,
        DType::F16 => 4.0 * 2f64.powi(-11),
        _ => 4.0 * 2f64.powi(-8),
    }
}

/// The largest number of keys that a query may attend to, at least 1.
fn max_visible_keys(case: &Case, inputs: &Inputs) -> Result<usize> {
    let [batch, num_heads, q_len, kv_len] = case.sizes.scores("bhqk");
    let mask = case.options(inputs, Backend::Fused)?.attn_mask;
    let table = mask.to_tensor((batch, num_heads, q_len, kv_len), &Device::Cpu)?;
    let visible = numbers(&table)?.chunks(kv_len).map(|row| row.iter().sum::<f64>() as usize).max();
    Ok(visible.unwrap_or(1).max(1))
}

/// The magnitude of the terms that a result sums up, for results whose terms cancel. The terms of the context are
/// weights of about 1 / `visible` times values. Gradients of scores are differences of dot products of value_dim
/// numbers, which cancel if a query has only one key. The gradient of a bias that all keys share cancels, too, since
/// the weights of a query sum to 1.
fn floor(name: &str, case: &Case, visible: usize) -> f64 {
    let value_dim = case.sizes.value_dim;
    let entries = |axes: &str| case.sizes.scores(axes).iter().product::<usize>();
    let (shared_by, terms) = match (name, case.bias) {
        ("bias", Some(Bias::Trained(axes))) if !axes.contains('k') => (1, value_dim * entries("bhq") / entries(axes)),
        ("bias", Some(Bias::Trained(axes))) => (visible, value_dim * entries("bhqk") / entries(axes)),
        // Each term is multiplied by a distance of up to kv_len.
        ("slopes", _) => (visible, value_dim * entries("bqk") * (case.sizes.kv_len / 4).pow(2).max(1)),
        ("query" | "key" | "sinks", _) => (visible, value_dim),
        _ => (visible, 1),
    };
    (terms as f64).sqrt() / shared_by as f64
}

/// Compares the results of a backend on a device in `dtype` with those of the reference in f64 on the same numbers.
/// Returns the largest error as a fraction of the tolerance, which can differ between the results.
pub fn check(
    case: &Case,
    dtype: DType,
    (backend, device): (Backend, &Device),
    tolerance: impl Fn(&str) -> f64,
) -> Result<f64> {
    let inputs = case.inputs(dtype)?;
    let exact = case.run(&inputs.to_dtype(DType::F64)?, Backend::Reference)?;
    let results = case.run(&inputs.to_device(device)?, backend)?;
    assert_eq!(results.len(), exact.len());
    let (mut worst, visible) = (0.0f64, max_visible_keys(case, &inputs)?);
    for ((name, result), (_, exact)) in results.iter().zip(&exact) {
        let error = error(result, exact, floor(name, case, visible))?;
        assert!(error <= tolerance(name), "{name} differs by {error:e}: {dtype:?}, {case:?}");
        worst = worst.max(error / tolerance(name));
    }
    Ok(worst)
}
