//! Writes to a tensor's numbers where they are.

use std::cell::RefCell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, WithDType};
use half::{bf16, f16};

/// A type of number in a candle storage that can be written to.
pub(super) trait Writable: WithDType {
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>>;
}

macro_rules! writable {
    ($($number:ty => $variant:ident),*) => {$(
        impl Writable for $number {
            fn slice_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>> {
                match storage {
                    CpuStorage::$variant(numbers) => Some(numbers),
                    _ => None,
                }
            }
        }
    )*};
}

writable!(f16 => F16, bf16 => BF16, f32 => F32, f64 => F64);

/// What is done with the numbers of a tensor.
type Work<'f, E> = RefCell<&'f mut dyn FnMut(&mut [E]) -> Result<()>>;

/// Calls `work` with the numbers of a tensor, which is contiguous, on the CPU, and of type `E`.
///
/// candle lends a storage to write for the time of an operation. Only one is held at a time: two threads that wait for the tensors of
/// each other would wait for ever.
pub(super) fn write<E: Writable>(tensor: &Tensor, work: &mut dyn FnMut(&mut [E]) -> Result<()>) -> Result<()> {
    tensor.inplace_op1(&Write(RefCell::new(work)))
}

struct Write<'f, E>(Work<'f, E>);

impl<E: Writable> InplaceOp1 for Write<'_, E> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let range =
            layout.contiguous_offsets().ok_or_else(|| candle_core::Error::msg("expected a contiguous tensor"))?;
        let numbers = E::slice_mut(storage).ok_or_else(|| candle_core::Error::msg("expected another dtype"))?;
        (self.0.borrow_mut())(&mut numbers[range.0..range.1])
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn numbers_are_written_where_they_are() {
        let var = Var::zeros(3, f32::DTYPE, &Device::Cpu).unwrap();
        write::<f32>(&var, &mut |numbers| {
            numbers.fill(2.0);
            Ok(())
        })
        .unwrap();
        assert_eq!(var.to_vec1::<f32>().unwrap(), [2.0; 3]);
    }

    #[test]
    fn another_dtype_is_an_error() {
        let var = Var::zeros(3, f32::DTYPE, &Device::Cpu).unwrap();
        assert!(write::<f64>(&var, &mut |_| Ok(())).is_err());
    }
}
