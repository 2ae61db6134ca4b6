//! How alike the results of a GPU and of the CPU have to be.

use candle_attention::Result;
use candle_core::{DType, Tensor};

use crate::common::{assert_finite, numbers};
use crate::problem::error;

/// The bound on errors of a layer relative to the largest number of a tensor, about ten times the usual errors. The projections add theirs
/// to those of attention. A block has two products of matrices more, and twice this bound.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 5e-5,
        DType::F16 => 1.5e-2,
        _ => 1e-1,
    }
}

#[track_caller]
pub fn assert_alike(what: &str, gpu: &Tensor, cpu: &Tensor, tolerance: f64) -> Result<()> {
    assert_finite(gpu, what);
    assert_eq!((gpu.dims(), gpu.dtype()), (cpu.dims(), cpu.dtype()), "{what}");
    // A gradient whose terms cancel is only as precise as its terms.
    let error = error(gpu, cpu, 0.1)?;
    assert!(error <= tolerance, "{what} differs by {error:e}");
    Ok(())
}

/// In a half type the CPU and a GPU round after other operations, so that their differences say little. Against the same in f64, the GPU's
/// errors are at most twice those of the CPU: the root of the mean of all squares, each tensor in units of its own magnitude.
#[track_caller]
pub fn assert_as_precise(what: &str, gpu: &[Tensor], cpu: &[Tensor], exact: &[Tensor]) -> Result<()> {
    let [of_gpu, of_cpu] = [mean_error(gpu, exact)?, mean_error(cpu, exact)?];
    assert!(of_cpu > 0.0, "{what}: the CPU computed in f64, too");
    assert!(of_gpu <= 2.0 * of_cpu, "{what}: an error of {of_gpu:e}, on the CPU {of_cpu:e}");
    Ok(())
}

fn mean_error(results: &[Tensor], exact: &[Tensor]) -> Result<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for (result, exact) in results.iter().zip(exact) {
        let (result, exact) = (numbers(result)?, numbers(exact)?);
        let magnitude = exact.iter().map(|x| x * x).sum::<f64>() / exact.len() as f64;
        if magnitude > 0.0 {
            sum += result.iter().zip(&exact).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / magnitude;
            count += exact.len();
        }
    }
    Ok((sum / count as f64).sqrt())
}
