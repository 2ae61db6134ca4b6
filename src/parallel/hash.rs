//! A hash of numbers, which ranks compare in place of the numbers.

use candle_core::{CpuStorage, Storage, Tensor};

use crate::empty::readable;

/// A hash of a tensor's numbers. Zero if they are not on the CPU.
pub(crate) fn hash(x: &Tensor) -> u64 {
    let Ok(x) = readable(x) else { return 0 };
    let (storage, _) = x.storage_and_layout();
    // FNV-1a over whole numbers, with a rotation so that high bits reach low ones.
    let add = |hash: u64, bits: u64| (hash ^ bits).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(29);
    let at = x.strided_index();
    let start = 0xCBF2_9CE4_8422_2325;
    match &*storage {
        Storage::Cpu(CpuStorage::F16(numbers)) => at.fold(start, |hash, i| add(hash, u64::from(numbers[i].to_bits()))),
        Storage::Cpu(CpuStorage::BF16(numbers)) => at.fold(start, |hash, i| add(hash, u64::from(numbers[i].to_bits()))),
        Storage::Cpu(CpuStorage::F32(numbers)) => at.fold(start, |hash, i| add(hash, u64::from(numbers[i].to_bits()))),
        Storage::Cpu(CpuStorage::F64(numbers)) => at.fold(start, |hash, i| add(hash, numbers[i].to_bits())),
        _ => 0,
    }
}
