//! A hash of numbers, which ranks compare in place of the numbers.

use attention_kernels::fnv;
use candle_core::{CpuStorage, Storage, Tensor};

use crate::empty::readable;

/// A hash of a tensor's numbers. Zero if they are not on the CPU.
pub(crate) fn hash(x: &Tensor) -> u64 {
    let Ok(x) = readable(x) else { return 0 };
    let (storage, _) = x.storage_and_layout();
    let at = x.strided_index();
    match &*storage {
        Storage::Cpu(CpuStorage::F16(numbers)) => fnv::hash(at.map(|i| u64::from(numbers[i].to_bits()))),
        Storage::Cpu(CpuStorage::BF16(numbers)) => fnv::hash(at.map(|i| u64::from(numbers[i].to_bits()))),
        Storage::Cpu(CpuStorage::F32(numbers)) => fnv::hash(at.map(|i| u64::from(numbers[i].to_bits()))),
        Storage::Cpu(CpuStorage::F64(numbers)) => fnv::hash(at.map(|i| numbers[i].to_bits())),
        _ => 0,
    }
}
