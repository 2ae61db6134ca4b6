//! Writes to several tensors at the same time.
//!
//! candle lends the storage of one tensor to write, for the time of an operation. An operation that writes all parameters in one
//! go takes the next tensor inside the operation of the one before.

use std::cell::{Cell, RefCell};

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

/// What is done with the numbers of all tensors.
type Work<'f, E> = RefCell<&'f mut dyn FnMut(Vec<&mut [E]>) -> Result<()>>;

/// Calls `work` with the numbers of all `tensors`, which are contiguous, on the CPU, and different storages of type `E`.
///
/// Each tensor takes a frame of the stack. A caller with many of them calls this for some at a time.
pub(super) fn write_all<E: Writable>(
    tensors: &[&Tensor],
    work: &mut dyn FnMut(Vec<&mut [E]>) -> Result<()>,
) -> Result<()> {
    lock(tensors, Vec::with_capacity(tensors.len()), &RefCell::new(work))
}

fn lock<E: Writable>(tensors: &[&Tensor], held: Vec<&mut [E]>, work: &Work<E>) -> Result<()> {
    match tensors.split_first() {
        None => (work.borrow_mut())(held),
        Some((tensor, rest)) => tensor.inplace_op1(&Lock { rest, held: Cell::new(held), work }),
    }
}

/// The operation of one tensor. It holds the tensors before it, and locks those after it.
struct Lock<'h, 't, 'w, 'f, E> {
    rest: &'t [&'t Tensor],
    held: Cell<Vec<&'h mut [E]>>,
    work: &'w Work<'f, E>,
}

impl<E: Writable> InplaceOp1 for Lock<'_, '_, '_, '_, E> {
    fn name(&self) -> &'static str {
        "write-all"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let range =
            layout.contiguous_offsets().ok_or_else(|| candle_core::Error::msg("expected a contiguous tensor"))?;
        let mut held: Vec<&mut [E]> = self.held.take();
        let numbers = E::slice_mut(storage).ok_or_else(|| candle_core::Error::msg("expected another dtype"))?;
        held.push(&mut numbers[range.0..range.1]);
        lock(self.rest, held, self.work)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn all_tensors_are_written_at_once() {
        let vars: Vec<Var> = (1..4).map(|n| Var::zeros(n, f32::DTYPE, &Device::Cpu).unwrap()).collect();
        let tensors: Vec<&Tensor> = vars.iter().map(Var::as_tensor).collect();
        write_all::<f32>(&tensors, &mut |slices| {
            slices.into_iter().enumerate().for_each(|(n, slice)| slice.fill(n as f32));
            Ok(())
        })
        .unwrap();
        for (n, var) in vars.iter().enumerate() {
            assert_eq!(var.to_vec1::<f32>().unwrap(), vec![n as f32; n + 1]);
        }
    }

    #[test]
    fn another_dtype_is_an_error() {
        let var = Var::zeros(3, f32::DTYPE, &Device::Cpu).unwrap();
        assert!(write_all::<f64>(&[&var], &mut |_| Ok(())).is_err());
    }
}
