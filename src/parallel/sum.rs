//! The sum of a tensor over ranks, on bytes: who sums which part, and the sum in the order of the ranks.

use std::ops::{AddAssign, Range};

use candle_core::DType;
use half::{bf16, f16};

use super::share::share;
use crate::error::AttentionError;

/// The bytes that rank `rank` of `size` sums, of a tensor of `count` entries.
pub(super) fn part(rank: usize, size: usize, count: usize, dtype: DType) -> Range<usize> {
    let Range { start, end } = share(count, rank, size);
    start * dtype.size_in_bytes()..end * dtype.size_in_bytes()
}

/// # Errors
///
/// [`AttentionError::DType`] for a dtype that can't be summed. Integers can't: their sum may not fit.
pub(super) fn check(dtype: DType) -> Result<(), AttentionError> {
    match dtype {
        DType::F32 | DType::F64 | DType::BF16 | DType::F16 => Ok(()),
        got => {
            let expected = "f32, f64, bf16 or f16".to_string();
            Err(AttentionError::DType { tensor: "tensor of all_reduce", expected, got })
        }
    }
}

/// ((x_0 + x_1) + x_2) + ... of the ranks' parts, which have the same length. Half types are summed in f32, and rounded once.
pub(super) fn sum(dtype: DType, parts: &[&[u8]]) -> Vec<u8> {
    match dtype {
        DType::F64 => add(parts, f64::from_le_bytes, f64::to_le_bytes),
        DType::BF16 => add(parts, |bytes| bf16::from_le_bytes(bytes).to_f32(), |sum| bf16::from_f32(sum).to_le_bytes()),
        DType::F16 => add(parts, |bytes| f16::from_le_bytes(bytes).to_f32(), |sum| f16::from_f32(sum).to_le_bytes()),
        _ => add(parts, f32::from_le_bytes, f32::to_le_bytes),
    }
}

fn add<const N: usize, A: AddAssign>(
    parts: &[&[u8]],
    read: impl Fn([u8; N]) -> A,
    write: impl Fn(A) -> [u8; N],
) -> Vec<u8> {
    /// So many sums stay in the processor's cache while the ranks' parts are added.
    const BLOCK: usize = 4096;
    let len = parts[0].len();
    let mut bytes = vec![0; len];
    let mut sums = Vec::with_capacity(BLOCK);
    for start in (0..len).step_by(BLOCK * N) {
        let block = start..len.min(start + BLOCK * N);
        let numbers = |part: &usize| parts[*part][block.clone()].as_chunks::<N>().0;
        sums.clear();
        sums.extend(numbers(&0).iter().map(|bytes| read(*bytes)));
        for part in 1..parts.len() {
            for (sum, bytes) in sums.iter_mut().zip(numbers(&part)) {
                *sum += read(*bytes);
            }
        }
        for (place, sum) in bytes[block.clone()].as_chunks_mut::<N>().0.iter_mut().zip(sums.drain(..)) {
            *place = write(sum);
        }
    }
    bytes
}
