//! How far results may be from the reference.

use candle_attention::{Backend, ScoreShape};
use candle_core::{DType, Device, Result};

use crate::common::numbers;
use crate::problem::{Bias, Case, Inputs, error};

/// About twice the worst that was seen. Half types round what they give back by up to half a unit in the last place, which is
/// 2^-11 and 2^-8, and the backward pass starts from a context that was rounded.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-13,
        DType::F32 => 1e-5,
        DType::F16 => 4.0 * 2f64.powi(-11),
        _ => 4.0 * 2f64.powi(-8),
    }
}

/// The most keys that a query sees, and at least one.
fn most_seen(case: &Case, inputs: &Inputs) -> Result<usize> {
    let [batch, num_heads, q_len, kv_len] = case.sizes.scores("bhqk");
    let mask = case.options(inputs, Backend::Fused)?.attn_mask;
    let table = mask.to_tensor(ScoreShape { batch, num_heads, q_len, kv_len }, &Device::Cpu)?;
    let seen = numbers(&table)?.chunks(kv_len).map(|row| row.iter().sum::<f64>() as usize).max();
    Ok(seen.unwrap_or(1).max(1))
}

/// About what is summed up: weights of 1 / `seen` times values. Gradients of scores are differences of dot products of
/// value_dim numbers, which cancel to nothing where a query sees one key alone; so does the gradient of a bias that all keys
/// share, over each query's weights, which add up to 1.
fn floor(name: &str, case: &Case, seen: usize) -> f64 {
    let value_dim = case.sizes.value_dim;
    let entries = |axes: &str| case.sizes.scores(axes).iter().product::<usize>();
    let (shared_by, terms) = match (name, case.bias) {
        ("bias", Some(Bias::Trained(axes))) if !axes.contains('k') => (1, value_dim * entries("bhq") / entries(axes)),
        ("bias", Some(Bias::Trained(axes))) => (seen, value_dim * entries("bhqk") / entries(axes)),
        ("query" | "key" | "sinks", _) => (seen, value_dim),
        _ => (seen, 1),
    };
    (terms as f64).sqrt() / shared_by as f64
}

/// What the backend gives on the device in `dtype`, held against the reference in f64 on the same numbers. Gives the worst
/// error, as a part of the tolerance, which may be another for each result.
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
    let (mut worst, seen) = (0.0f64, most_seen(case, &inputs)?);
    for ((name, result), (_, exact)) in results.iter().zip(&exact) {
        let error = error(result, exact, floor(name, case, seen))?;
        assert!(error <= tolerance(name), "{name} differs by {error:e}: {dtype:?}, {case:?}");
        worst = worst.max(error / tolerance(name));
    }
    Ok(worst)
}
