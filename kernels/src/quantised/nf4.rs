//! NF4, the 4-bit NormalFloat of Dettmers, Pagnoni, Holtzman and Zettlemoyer, QLoRA (2023).

use crate::alloc::reserve;
use crate::dtype::Number;
use crate::error::Error;
use crate::quantised::format::{Block, GROUP};
use crate::simd::SimdFloat;

/// Numbers in a block.
pub(super) const LEN: usize = 64;

/// Bytes of a block.
pub(super) const BYTES: usize = size_of::<f32>() + LEN / 2;

/// The 16 numbers of the format, in units of a block's largest absolute value (the paper's appendix E).
pub(super) const CODES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The numbers of the high and of the low half of each byte: one load for two numbers.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [CODES[byte >> 4], CODES[byte & 15]];
        byte += 1;
    }
    pairs
};

pub(super) struct Nf4;

impl Block<BYTES> for Nf4 {
    const GROUPS: usize = LEN / GROUP;

    #[inline(always)]
    fn group([d0, d1, d2, d3, codes @ ..]: &[u8; BYTES], group: usize) -> [f32; GROUP] {
        let scale = f32::from_le_bytes([*d0, *d1, *d2, *d3]);
        let codes = &codes[group * GROUP / 2..][..GROUP / 2];
        let mut numbers = [0.0; GROUP];
        for i in 0..GROUP / 2 {
            let [high, low] = PAIRS[usize::from(codes[i])];
            numbers[2 * i] = scale * high;
            numbers[2 * i + 1] = scale * low;
        }
        numbers
    }
}

/// The code whose number is nearest to `x`.
fn nearest(x: f32) -> u8 {
    (0..15).map(|code| u8::from(x > 0.5 * (CODES[code] + CODES[code + 1]))).sum()
}

/// Numbers quantised to [`Format::Nf4`](super::Format::Nf4): each block of 64 is divided by its largest absolute value, and each
/// quotient is replaced by the nearest number of the format (equation 4 of the QLoRA paper). `what` names the numbers in errors.
///
/// A block with NaN, or with a number that f32 can't hold, gets a scale that isn't finite:
/// [`scales_are_finite`](super::QuantisedMatrix::scales_are_finite) finds it.
///
/// # Shapes
///
/// (64 · n) numbers → (36 · n) bytes. The rows of a matrix have a multiple of 64 columns.
///
/// # Errors
///
/// [`Error::Length`] if the numbers aren't whole blocks; [`Error::Memory`] if there is no memory for the bytes.
///
/// # Examples
///
/// ```
/// use attention_kernels::quantised::{Format, QuantisedMatrix, quantise_nf4};
///
/// let mut weight = [0.0f32; 64];
/// (weight[0], weight[1]) = (-2.0, 0.9);
/// let bytes = quantise_nf4("weight", &weight)?;
/// let numbers = QuantisedMatrix::new("weight", Format::Nf4, &bytes, [1, 64])?.dequantise::<f32>()?;
/// assert_eq!((numbers[0], numbers[1], numbers[2]), (-2.0, 2.0 * 0.440_709_83, 0.0));
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn quantise_nf4<E: Number>(what: &'static str, numbers: &[E]) -> Result<Vec<u8>, Error> {
    let (blocks, rest) = numbers.as_chunks::<LEN>();
    if !rest.is_empty() {
        let expected = format!("whole blocks of {LEN} numbers");
        return Err(Error::Length { what, expected, got: numbers.len() });
    }
    let mut bytes = reserve(what, blocks.len() * BYTES)?;
    for block in blocks {
        let block = block.map(|x| x.widen().to_f64() as f32);
        // `f32::max` ignores NaN.
        let has_nan = block.iter().any(|x| x.is_nan());
        let scale = if has_nan { f32::NAN } else { block.iter().fold(0.0, |max: f32, x| max.max(x.abs())) };
        bytes.extend(scale.to_le_bytes());
        // A block of zeros.
        let divisor = if scale == 0.0 { 1.0 } else { scale };
        let (pairs, _) = block.as_chunks::<2>();
        bytes.extend(pairs.iter().map(|[high, low]| nearest(high / divisor) << 4 | nearest(low / divisor)));
    }
    Ok(bytes)
}
