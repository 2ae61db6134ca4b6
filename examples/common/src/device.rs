//! The device, as the command line names it.

use anyhow::{Context, Result};
use candle_core::Device;
use candle_core::utils::cuda_is_available;
use clap::ValueEnum;

/// The value of `--device`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DeviceName {
    Cpu,
    Cuda,
}

impl DeviceName {
    /// The CPU, or the first GPU.
    pub fn open(self) -> Result<Device> {
        match self {
            DeviceName::Cpu => Ok(Device::Cpu),
            DeviceName::Cuda if cuda_is_available() => {
                Device::new_cuda(0).context("no CUDA device can be used (does `nvidia-smi` show a GPU?)")
            }
            DeviceName::Cuda => anyhow::bail!("this program was built without CUDA: build it with `--features cuda`"),
        }
    }
}
