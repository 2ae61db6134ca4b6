//! Gradients, as candle adds them fastest.

use candle_core::{CpuStorage, D, DType, Device, Result, Storage, Tensor};
use half::bf16;

use crate::memory;

/// Fewer numbers than this are added in no time, however that is done.
const FEW: usize = 1 << 10;

/// A gradient that an operation gives to candle, which adds it to a tensor of zeros.
///
/// On x86-64, candle adds contiguous bf16 with instructions that aren't inlined, in 16 ns a number. Where the numbers of one
/// operand are no neighbours it takes plain code, in 2.5 ns a number (measured with candle 0.11.1 on two cores of an Emerald Rapids
/// processor). So a gradient in bf16 has a gap behind each number; the sum has none.
pub(crate) fn to_be_added(gradient: Tensor) -> Result<Tensor> {
    let is_slow = cfg!(target_arch = "x86_64") && gradient.dtype() == DType::BF16 && gradient.device().is_cpu();
    if !is_slow || gradient.rank() == 0 || gradient.elem_count() < FEW || !gradient.is_contiguous() {
        return Ok(gradient);
    }
    memory::ask_for("gradient", 2, &gradient, DType::BF16)?;
    let (storage, layout) = gradient.storage_and_layout();
    let Storage::Cpu(CpuStorage::BF16(numbers)) = &*storage else { return Ok(gradient.clone()) };
    let numbers = &numbers[layout.start_offset()..][..gradient.elem_count()];
    let mut apart = vec![bf16::ZERO; 2 * numbers.len()];
    apart.chunks_exact_mut(2).zip(numbers).for_each(|(to, x)| to[0] = *x);
    let dims = [gradient.dims(), &[2]].concat();
    Tensor::from_vec(apart, dims, &Device::Cpu)?.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_what_they_were() -> Result<()> {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for dims in [vec![], vec![3], vec![0, 4], vec![8, 16, 32]] {
                let x = Tensor::randn(0f32, 1.0, dims.clone(), &Device::Cpu)?.to_dtype(dtype)?;
                let apart = to_be_added(x.clone())?;
                assert_eq!((apart.dims(), apart.dtype()), (&dims[..], dtype));
                let numbers = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
                assert_eq!(numbers(&x.zeros_like()?.add(&apart)?)?, numbers(&x)?);
            }
        }
        Ok(())
    }
}
