//! Attention by the CUDA kernels, run by the emulator: every mask and option, in every dtype and layout, with gradients.

mod laws;

use std::panic::catch_unwind;
use std::sync::Arc;

use attention_kernels::cuda::Limits;
use candle_attention::cuda_testing::with_machine;
use candle_attention::{Backend, Result};
use candle_core::{DType, Device};

use crate::attention::cases;
use crate::check::{check, tolerance};
use crate::emulator::{self, AMPERE, Emulator, HOPPER, Options};
use crate::problem::Case;
use crate::pytorch_precision::check_all;

/// Runs `f` on an emulated GPU.
fn on<T>(limits: Limits, options: Options, f: impl FnOnce() -> T) -> T {
    with_machine(Arc::new(Emulator::new(limits, options)), f)
}

/// The cases that a GPU computes, too, in these dtypes. The kernels don't serve f64, and f32 takes the same engine on all machines.
fn all(dtypes: &[DType]) -> impl Iterator<Item = (Case, DType)> {
    let served = cases().into_iter().filter(|(_, dtype)| dtypes.contains(dtype));
    served.map(|(case, dtype)| (Case { train_slopes: case.alibi, ..case }, dtype))
}

fn every_pair_of_properties(limits: Limits, dtypes: &[DType]) -> Result<()> {
    if !emulator::is_there() {
        return Ok(());
    }
    let wrong = |(case, dtype): (Case, DType)| {
        let checked = catch_unwind(|| check(&case, dtype, (Backend::Fused, &Device::Cpu), |_| tolerance(dtype)));
        match checked {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(format!("{error}: {dtype:?}, {case:?}")),
            Err(message) => Some(message.downcast_ref::<String>().cloned().unwrap_or_default()),
        }
    };
    let wrong = on(limits, Options::default(), || all(dtypes).filter_map(wrong).collect::<Vec<_>>());
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

#[test]
fn every_pair_of_properties_on_ampere() -> Result<()> {
    every_pair_of_properties(AMPERE, &[DType::F32, DType::F16, DType::BF16])
}

#[test]
fn every_pair_of_properties_on_hopper() -> Result<()> {
    every_pair_of_properties(HOPPER, &[DType::F16, DType::BF16])
}

/// The largest ratio to the error of PyTorch on a CPU in a half type. It is above 1 only where PyTorch takes its steps one by one, which
/// it does for a trained bias, and for the largest of many errors.
const MAX_RATIO_OF_HALVES: f64 = 1.5;
/// Tensor cores compute a product of f32 in three parts of 11 bits.
const MAX_RATIO_OF_F32: f64 = 6.0;

#[test]
fn errors_in_half_types_are_about_those_of_pytorch() -> anyhow::Result<()> {
    if emulator::is_there() {
        for limits in [AMPERE, HOPPER] {
            for dtype in [DType::BF16, DType::F16] {
                on(limits, Options::default(), || check_all(dtype, MAX_RATIO_OF_HALVES))?;
            }
        }
    }
    Ok(())
}

#[test]
fn errors_of_f32_are_small_multiples_of_pytorchs() -> anyhow::Result<()> {
    if emulator::is_there() {
        on(AMPERE, Options::default(), || check_all(DType::F32, MAX_RATIO_OF_F32))?;
    }
    Ok(())
}
