//! The device, as the command line names it.

use anyhow::{Context, Result};
use candle_core::Device;
use clap::ValueEnum;

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DeviceName {
    Cpu,
    Cuda,
}

impl DeviceName {
    pub fn open(self) -> Result<Device> {
        match self {
            DeviceName::Cpu => Ok(Device::Cpu),
            DeviceName::Cuda if cfg!(feature = "cuda") => {
                Device::new_cuda(0).context("no CUDA device can be used (does `nvidia-smi` show a GPU?)")
            }
            DeviceName::Cuda => anyhow::bail!("this program was built without CUDA: build it with `--features cuda`"),
        }
    }
}
