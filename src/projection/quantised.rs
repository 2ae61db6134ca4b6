//! [`Quantised`]: a weight in quantised blocks, as it stands in a projection.

use attention_kernels::matmul::Operand;
use attention_kernels::quantised::{Format, QuantisedMatrix, quantise_nf4};
use attention_kernels::{SimdFloat, reserve};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};

use crate::block::op::{Dtype, numbers, with_dtype};
use crate::error::{AttentionError, Result};
use crate::memory;

/// A weight (out, in) in blocks, which have been checked.
#[derive(Debug)]
pub(crate) struct Quantised {
    format: Format,
    bytes: Vec<u8>,
    dims: [usize; 2],
}

const WHAT: &str = "quantised weight";

/// The formats that candle has, too.
const OF_CANDLE: [(Format, GgmlDType); 6] = [
    (Format::Q8_0, GgmlDType::Q8_0),
    (Format::Q4_0, GgmlDType::Q4_0),
    (Format::Q5_0, GgmlDType::Q5_0),
    (Format::Q4K, GgmlDType::Q4K),
    (Format::Q5K, GgmlDType::Q5K),
    (Format::Q6K, GgmlDType::Q6K),
];

/// The largest number of candle's formats: that of Q6_K, a scale in f16 times a factor and a code.
const LARGEST_OF_CANDLE: f64 = 65504.0 * 128.0 * 32.0;

impl Quantised {
    /// The blocks of a weight's numbers. `name` is the weight's.
    pub(crate) fn of(name: &str, weight: &Tensor, format: Format) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        if !inputs.is_multiple_of(format.block_len()) {
            let expected = format!("rows in whole blocks of {} for {format:?}", format.block_len());
            return Err(refused(name, expected, format!("rows of {inputs}")));
        }
        let weight = memory::contiguous(WHAT, &weight.detach().to_device(&Device::Cpu)?)?;
        let of_candle = OF_CANDLE.iter().find(|(other, _)| *other == format);
        let largest = if of_candle.is_some() { LARGEST_OF_CANDLE } else { f64::from(f32::MAX) };
        with_dtype!(weight.dtype(), E => check_size::<E>(name, &weight, largest))?;
        let bytes = match of_candle {
            Some((_, dtype)) => blocks_by_candle(&weight, *dtype)?,
            None => {
                let (storage, layout) = weight.storage_and_layout();
                with_dtype!(weight.dtype(), E => Ok(quantise_nf4(WHAT, numbers::<E>(&storage, layout)?)))?
                    .map_err(AttentionError::from)?
            }
        };
        Self::new(name, format, bytes, [outputs, inputs])
    }

    /// The blocks of a file.
    pub(crate) fn new(name: &str, format: Format, bytes: Vec<u8>, dims: [usize; 2]) -> Result<Self> {
        let matrix = QuantisedMatrix::new(WHAT, format, &bytes, dims);
        let matrix = matrix.map_err(|error| refused(name, "whole blocks".into(), error.to_string()))?;
        if !matrix.scales_are_finite() {
            return Err(not_finite(name));
        }
        Ok(Self { format, bytes, dims })
    }

    /// The same rows in another order.
    pub(crate) fn with_rows(&self, order: impl Iterator<Item = usize>) -> Result<Self> {
        let len = self.bytes.len() / self.dims[0].max(1);
        let mut bytes = reserve(WHAT, self.bytes.len()).map_err(AttentionError::from)?;
        order.for_each(|row| bytes.extend_from_slice(&self.bytes[row * len..][..len]));
        Self::new(WHAT, self.format, bytes, self.dims)
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    pub(crate) fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn matrix(&self) -> Result<QuantisedMatrix<'_>> {
        Ok(QuantisedMatrix::new(WHAT, self.format, &self.bytes, self.dims).map_err(AttentionError::from)?)
    }

    /// The weight as the operand of a product.
    pub(crate) fn operand<E: Dtype>(&self) -> candle_core::Result<Operand<'_, E>> {
        Ok(Operand::quantised(self.matrix()?))
    }

    /// The numbers.
    pub(crate) fn dequantise(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let matrix = self.matrix()?;
        let tensor: candle_core::Result<Tensor> = with_dtype!(dtype, E => {
            Tensor::from_vec(matrix.dequantise::<E>().map_err(AttentionError::from)?, &self.dims[..], device)
        });
        Ok(tensor?)
    }
}

/// Refuses NaN and numbers beyond `largest`. candle's quantisers may make zeros of them, without an error.
fn check_size<E: Dtype>(name: &str, weight: &Tensor, largest: f64) -> candle_core::Result<()> {
    let (storage, layout) = weight.storage_and_layout();
    let fits = |x: &E| SimdFloat::to_f64(x.widen()).abs() <= largest;
    if numbers::<E>(&storage, layout)?.iter().all(fits) { Ok(()) } else { Err(not_finite(name).into()) }
}

fn not_finite(name: &str) -> crate::Error {
    refused(name, "finite numbers".into(), "NaN, infinity or larger ones than blocks hold".into())
}

/// The blocks of a contiguous weight on the CPU, whose numbers have been checked.
fn blocks_by_candle(weight: &Tensor, dtype: GgmlDType) -> Result<Vec<u8>> {
    let mut wide = memory::cast(WHAT, weight, DType::F32)?;
    if matches!(dtype, GgmlDType::Q4K | GgmlDType::Q5K) {
        wide = without_equal_groups(wide)?;
    }
    let blocks = weight.elem_count() / dtype.block_size();
    memory::ask(WHAT, &Device::Cpu, blocks.saturating_mul(2 * dtype.type_size()))?;
    Ok(QTensor::quantize(&wide, dtype)?.data()?.into_owned())
}

/// A weight in f32 for candle's quantisers of Q4_K and Q5_K. They give zeros for 32 numbers that are equal, or so close that rounding hides
/// the difference. The first number of such a group is changed by less than a hundredth of a step of the formats.
fn without_equal_groups(weight: Tensor) -> Result<Tensor> {
    const CLOSE: f32 = 1.0 / 65536.0;
    const CHANGE: f32 = 1.0 / 4096.0;
    let are_equal = |group: &[f32]| {
        let (least, most) = group.iter().fold((f32::MAX, f32::MIN), |(least, most), x| (least.min(*x), most.max(*x)));
        let largest = most.abs().max(least.abs());
        // Halves, since the difference may overflow.
        largest > 0.0 && most / 2.0 - least / 2.0 < CLOSE / 2.0 * largest
    };
    let mut changed = {
        let (storage, layout) = weight.storage_and_layout();
        let numbers = numbers::<f32>(&storage, layout)?;
        if !numbers.chunks(32).any(are_equal) {
            return Ok(weight.clone());
        }
        let mut copy = reserve(WHAT, numbers.len()).map_err(AttentionError::from)?;
        copy.extend_from_slice(numbers);
        copy
    };
    changed.chunks_mut(32).filter(|group| are_equal(group)).for_each(|group| group[0] *= 1.0 - CHANGE);
    Ok(Tensor::from_vec(changed, weight.shape(), &Device::Cpu)?)
}

/// What stands in a linear layer for a weight in blocks: NaN of its shape, dtype and device, which takes no memory.
pub(crate) fn placeholder(dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(Tensor::new(f32::NAN, device)?.to_dtype(dtype)?.broadcast_as(dims)?)
}

/// The format of a type of candle's, if products can take it.
pub(crate) fn format_of(dtype: GgmlDType) -> Option<Format> {
    OF_CANDLE.iter().find(|(_, other)| *other == dtype).map(|(format, _)| *format)
}

pub(crate) fn refused(name: &str, expected: String, got: String) -> crate::Error {
    AttentionError::Parameter { name: name.into(), expected, got }.into()
}
