//! A process with only some memory left.

use candle_attention::{AttentionError, Error};
use candle_core::{DType, Device, Tensor};

/// The address space of the process of a test.
pub const LIMIT_KIB: usize = 3 << 20;
const MIB: usize = 1 << 20;
/// From less than any call needs to more.
const HOLES: [usize; 16] = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 1024];

/// One row, broadcast to these dims.
pub fn row(dims: &[usize], dtype: DType) -> Tensor {
    let mut one = vec![1; dims.len()];
    one[dims.len() - 1] = dims[dims.len() - 1];
    Tensor::ones(one, dtype, &Device::Cpu).unwrap().broadcast_as(dims).unwrap()
}

/// One number, broadcast to these dims.
pub fn number(dims: &[usize], dtype: DType) -> Tensor {
    Tensor::ones(vec![1; dims.len()], dtype, &Device::Cpu).unwrap().broadcast_as(dims).unwrap()
}

#[track_caller]
fn is_full<T>(result: Result<T, Error>) -> bool {
    match result {
        Ok(_) => false,
        Err(Error::Attention(AttentionError::Memory { .. } | AttentionError::TooLarge { .. })) => true,
        Err(error) => panic!("expected a result or the error of memory, got {error:?}"),
    }
}

/// Memory that is taken, except for a hole of `mib`.
fn ballast(mib: usize) -> Vec<Vec<u8>> {
    let mut taken = Vec::with_capacity(10_000);
    let mut hole = Vec::<u8>::new();
    hole.try_reserve_exact(mib * MIB).expect("memory for the hole");
    for size in [256, 64, 16, 4, 1] {
        let mut block = Vec::new();
        while block.try_reserve_exact(size * MIB).is_ok() {
            taken.push(std::mem::take(&mut block));
        }
    }
    taken
}

/// Makes the call with holes of every size.
#[track_caller]
pub fn returns<T>(call: impl Fn() -> Result<T, Error>) {
    // Threads and lists that stay.
    assert!(!is_full(call()), "not enough memory for the test");
    let results = HOLES.map(|mib| {
        let _taken = ballast(mib);
        is_full(call())
    });
    assert!(results[0], "expected an error with {} MiB", HOLES[0]);
    assert!(!results[HOLES.len() - 1], "expected a result with {} MiB", HOLES[HOLES.len() - 1]);
}

/// Makes a call that no memory is enough for.
#[track_caller]
pub fn refuses<T>(call: impl Fn() -> Result<T, Error>) {
    assert!(is_full(call()), "expected an error");
}

/// Makes the call and keeps its results until memory is full. There are 256 MiB to fill.
#[track_caller]
pub fn fills_up<T>(call: impl Fn() -> Result<T, Error>) {
    let _taken = ballast(256);
    let mut kept = Vec::with_capacity(10_000);
    loop {
        match call() {
            Err(Error::Attention(AttentionError::Memory { .. })) => return,
            result => kept.push(result.expect("a result or the error of memory")),
        }
        assert!(kept.len() < kept.capacity(), "memory has no end");
    }
}

/// One test for each entry, in a process of its own.
macro_rules! memory {
    ($($name:ident: $body:expr;)*) => {
        $(#[test]
        fn $name() {
            let test = concat!(module_path!(), "::", stringify!($name));
            crate::own_process::with_memory(crate::room::LIMIT_KIB, test, || $body);
        })*
    };
}
pub(crate) use memory;
