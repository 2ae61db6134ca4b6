//! Inputs so large that their dot products are not finite, and inputs that are not finite themselves.

use candle_core::{CpuStorage, D, DType, Result, Storage, Tensor};
use half::{bf16, f16};

use crate::check::{check_number, log_bound_of_scores, log_of_largest, scores_may_overflow};
use crate::memory;

/// What the reference has to know about its inputs before it chooses its steps.
pub(crate) struct Range {
    /// Whether some |q·k| · |scale| of finite numbers might be larger than the dtype's largest number.
    pub(crate) scores_may_overflow: bool,
    /// Whether a score of finite numbers plus a bias, or minus a slope times a distance, might be.
    pub(crate) sums_may_overflow: bool,
    pub(crate) values_are_finite: bool,
    /// Whether the bias is minus infinity somewhere.
    pub(crate) bias_hides: bool,
}

impl Range {
    /// Reads all that is needed at once, since every read from another device waits for that device. `q` and `k` are not
    /// empty. The last two are a bias and ALiBi slopes.
    pub(crate) fn read(
        q: &Tensor,
        k: &Tensor,
        scale: f64,
        v: Option<&Tensor>,
        [bias, slopes]: [Option<&Tensor>; 2],
    ) -> Result<Self> {
        // Each of them: the result of a step, and that of the step before it.
        let inputs = [Some(q), Some(k), v, bias].into_iter().flatten();
        let bytes = memory::sum(inputs.map(|x| memory::bytes(x.dims(), x.dtype()))).saturating_mul(3);
        memory::ask("largest entries of the inputs", q.device(), bytes)?;
        let largest = |x: &Tensor| -> Result<Tensor> {
            if x.device().is_cpu() {
                return Tensor::new(&[largest_on_cpu(x)?], x.device());
            }
            over_rows(&finite_or_zero(&x.detach())?.abs()?, Tensor::max)
        };
        let count = |of: Tensor| over_rows(&of.to_dtype(DType::F32)?, Tensor::sum);
        let number = |x: Option<Result<Tensor>>| x.unwrap_or_else(|| Tensor::zeros(1, q.dtype(), q.device()));
        let numbers = [
            largest(q)?,
            largest(k)?,
            number(v.filter(|v| v.elem_count() > 0).map(|v| count(is_finite(v)?.eq(0u8)?)))?,
            number(bias.map(|bias| count(bias.eq(f64::NEG_INFINITY)?)))?,
            number(slopes.map(largest))?,
        ];
        let numbers = numbers.iter().map(|x| x.to_dtype(DType::F64)).collect::<Result<Vec<_>>>()?;
        let numbers = Tensor::cat(&numbers, 0)?.to_vec1::<f64>()?;
        let bound = log_bound_of_scores([numbers[0], numbers[1]], q.dim(D::Minus1)?, scale);
        let distance = (q.dim(2)? + k.dim(2)?) as f64;
        let largest_term = bound.max(numbers[4].ln() + distance.ln());
        let digits = if q.dtype() == DType::F64 { 40.0 } else { 20.0 };
        Ok(Self {
            scores_may_overflow: scores_may_overflow(bound, q.dtype()),
            // A term that is e^digits times smaller than the largest number is rounded away beside it.
            sums_may_overflow: (bias.is_some() || slopes.is_some())
                && largest_term > log_of_largest(q.dtype()) - digits,
            values_are_finite: numbers[2] == 0.0,
            bias_hides: numbers[3] > 0.0,
        })
    }
}

/// The largest magnitude of the finite numbers of a tensor on the CPU, in one look at its storage: candle's operations for
/// it would take longer than a part of the attention.
pub(crate) fn largest_on_cpu(x: &Tensor) -> Result<f64> {
    let x = memory::contiguous("largest entries of the inputs", &x.detach())?;
    let (storage, layout) = x.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().unwrap_or((0, 0));
    // Without its sign, the bits of a float are in the order of the floats, and compared faster. Infinity and NaN are above
    // all others.
    macro_rules! largest {
        ($numbers:expr, $float:ty, $bits:ty) => {{
            let infinity = <$float>::INFINITY.to_bits();
            let bits = $numbers[start..end].iter().map(|x| x.to_bits() & (<$bits>::MAX >> 1));
            let largest = bits.fold(0, |largest, bits| if bits < infinity { largest.max(bits) } else { largest });
            f64::from(<$float>::from_bits(largest))
        }};
    }
    match &*storage {
        Storage::Cpu(CpuStorage::F32(x)) => Ok(largest!(x, f32, u32)),
        Storage::Cpu(CpuStorage::F64(x)) => Ok(largest!(x, f64, u64)),
        Storage::Cpu(CpuStorage::F16(x)) => Ok(largest!(x, f16, u16)),
        Storage::Cpu(CpuStorage::BF16(x)) => Ok(largest!(x, bf16, u16)),
        _ => Err(candle_core::Error::msg("largest number: expected floats on the CPU")),
    }
}

/// Refuses finite numbers that become infinite in the dtype that is computed in. Infinite numbers are accepted: minus
/// infinity in a bias hides a key.
pub(crate) fn check_range(tensor: &'static str, x: &Tensor, computed_in: DType) -> Result<()> {
    if x.dtype() != DType::F64 || computed_in == DType::F64 || x.elem_count() == 0 {
        return Ok(());
    }
    memory::ask_for(tensor, 4, x, x.dtype())?;
    let x = finite_or_zero(&x.detach())?;
    for got in Tensor::cat(&[over_rows(&x, Tensor::min)?, over_rows(&x, Tensor::max)?], 0)?.to_vec1::<f64>()? {
        check_number(tensor, Some(got), "numbers that F32, which is computed in, can hold", |x| {
            (x as f32).is_finite()
        })?;
    }
    Ok(())
}

/// 1 where `x` is finite, 0 where it is infinite or NaN.
pub(crate) fn is_finite(x: &Tensor) -> Result<Tensor> {
    let x = x.detach();
    // Infinity minus infinity is NaN.
    x.sub(&x)?.eq(0.0)
}

/// `x` with zeros in place of infinity and NaN.
pub(crate) fn finite_or_zero(x: &Tensor) -> Result<Tensor> {
    is_finite(x)?.where_cond(x, &x.zeros_like()?)
}

/// Reduces a whole tensor to one number. It goes row by row first: CUDA reduces a whole tensor with a single block of
/// threads.
fn over_rows(x: &Tensor, reduce: impl Fn(&Tensor, usize) -> Result<Tensor>) -> Result<Tensor> {
    let rows = if x.rank() > 1 { reduce(x, x.rank() - 1)?.flatten_all()? } else { x.flatten_all()? };
    reduce(&rows, 0)?.reshape(1)
}
