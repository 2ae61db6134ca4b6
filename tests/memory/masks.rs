//! Masks from tensors and to tensors.

use candle_attention::Mask;
use candle_core::{DType, Device, Tensor};

use crate::room::{memory, number, refuses, returns};

/// So many queries and keys that a table of them is 16 MiB.
const LEN: usize = 4096;

/// The most memory that the process has had so far, in MiB.
fn peak_mib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() >> 10
}

/// Copies a table of 64 MiB and the same table transposed, and compares the peaks of memory.
fn is_copied_once() {
    let table = Tensor::ones((8192, 8192), DType::U8, &Device::Cpu).unwrap();
    let before = peak_mib();
    drop(Mask::from_tensor(&table).unwrap());
    drop(Mask::from_blocked(&table.t().unwrap()).unwrap());
    let used = peak_mib() - before;
    assert!((60..80).contains(&used), "expected 64 MiB for one table, got {used}");
}

memory! {
    mask_to_tensor: returns(|| Mask::causal().to_tensor((1, 1, LEN, LEN), &Device::Cpu));
    mask_from_tensor: {
        let table = Tensor::zeros((LEN, LEN), DType::U8, &Device::Cpu).unwrap();
        returns(|| Mask::from_tensor(&table));
        returns(|| Mask::from_blocked(&table));
        returns(|| Mask::from_padding_mask(&table));
    };
    masks_beyond_the_address_space: {
        for sizes in [[1 << 24, 1 << 24], [1 << 31, 1 << 31], [1 << 32, 1 << 32], [1 << 40, 1 << 40], [1, usize::MAX]] {
            let table = number(&sizes, DType::U8);
            refuses(|| Mask::from_tensor(&table));
            refuses(|| Mask::from_padding_mask(&table));
            refuses(|| Mask::causal().to_tensor((1, 1, sizes[0], sizes[1]), &Device::Cpu));
            refuses(|| Mask::full().to_tensor((1, 1, sizes[1], sizes[0]), &Device::Cpu));
        }
    };
    documents_take_no_memory_for_their_tokens: {
        for len in [1 << 36, usize::MAX] {
            let documents = Mask::documents(&[len, 3]);
            let error = documents.check((1, 1, 4, 4)).unwrap_err().to_string();
            assert!(error.contains("expected documents of 4 keys together, got"), "{error}");
        }
    };
    table_takes_memory_once: is_copied_once();
}
