//! Decoded numbers against the formats' definitions, number by number.

use half::{bf16, f16};

use super::*;
use crate::simd::with_every_simd;

pub(crate) const FORMATS: [Format; 7] =
    [Format::Q8_0, Format::Q4_0, Format::Q5_0, Format::Q4K, Format::Q5K, Format::Q6K, Format::Nf4];

/// Where the scales of a block lie, which are in f16 but for NF4.
fn scales(format: Format) -> &'static [usize] {
    match format {
        Format::Q4K | Format::Q5K => &[0, 2],
        Format::Q6K => &[208],
        _ => &[0],
    }
}

/// Blocks of any codes, with scales of both signs and of many sizes.
pub(crate) fn blocks(format: Format, seed: u32, [rows, columns]: [usize; 2]) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as u16
    };
    let mut bytes: Vec<u8> =
        (0..rows * columns / format.block_len() * format.block_bytes()).map(|_| next() as u8).collect();
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        // 2^-7 to 2^-3.
        let mut scale = || (1.0 + f32::from(next()) / 65536.0) * [0.01, -0.02, 0.04, 0.06][usize::from(next() % 4)];
        for &at in scales(format) {
            match format {
                Format::Nf4 => block[at..at + 4].copy_from_slice(&scale().to_le_bytes()),
                _ => block[at..at + 2].copy_from_slice(&f16::from_f32(scale()).to_le_bytes()),
            }
        }
    }
    bytes
}

/// An f16 by its definition: sign, exponent and mantissa.
fn half(block: &[u8], at: usize) -> f32 {
    let bits = u32::from(block[at]) + 256 * u32::from(block[at + 1]);
    let (sign, exponent, mantissa) = (bits >> 15, bits >> 10 & 31, (bits & 1023) as f32 / 1024.0);
    let size = match exponent {
        0 => mantissa * 2f32.powi(-14),
        _ => (1.0 + mantissa) * 2f32.powi(exponent as i32 - 15),
    };
    if sign == 1 { -size } else { size }
}

/// Number `i` of a block.
fn number(format: Format, block: &[u8], i: usize) -> f32 {
    // The 4 bits of number `i` of 32, where the low halves of some bytes come before their high halves.
    let nibble = |bytes: &[u8], i: usize| if i < bytes.len() { bytes[i] % 16 } else { bytes[i - bytes.len()] / 16 };
    match format {
        Format::Q8_0 => half(block, 0) * f32::from(block[2 + i] as i8),
        Format::Q4_0 => half(block, 0) * (f32::from(nibble(&block[2..], i)) - 8.0),
        Format::Q5_0 => {
            let high = block[2 + i / 8] >> (i % 8) & 1;
            half(block, 0) * (f32::from(nibble(&block[6..], i) + 16 * high) - 16.0)
        }
        Format::Q4K | Format::Q5K => {
            // As bits of one number, least significant first: 6 bits of each of the first four scales and mins, then 2 bits more.
            let part = |byte: usize, from: usize, bits: usize| usize::from(block[4 + byte]) >> from & ((1 << bits) - 1);
            let (scale, min) = match i / 32 {
                group @ 0..4 => (part(group, 0, 6), part(group + 4, 0, 6)),
                group => {
                    (part(group + 4, 0, 4) + 16 * part(group - 4, 6, 2), part(group + 4, 4, 4) + 16 * part(group, 6, 2))
                }
            };
            let code = match format {
                Format::Q4K => nibble(&block[16 + i / 64 * 32..][..32], i % 64),
                _ => nibble(&block[48 + i / 64 * 32..][..32], i % 64) + 16 * (block[16 + i % 32] >> (i / 32) & 1),
            };
            half(block, 0) * scale as f32 * f32::from(code) - half(block, 2) * min as f32
        }
        Format::Q6K => {
            let high = block[128 + i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3;
            let code = nibble(&block[i / 128 * 64..][..64], i % 128) + 16 * high;
            half(block, 208) * f32::from(block[192 + i / 16] as i8) * (f32::from(code) - 32.0)
        }
        Format::Nf4 => {
            let byte = block[4 + i / 2];
            let code = if i.is_multiple_of(2) { byte / 16 } else { byte % 16 };
            f32::from_le_bytes(block[..4].try_into().unwrap()) * nf4::CODES[usize::from(code)]
        }
    }
}

pub(crate) fn naive(format: Format, bytes: &[u8]) -> Vec<f32> {
    let of_block = |block| (0..format.block_len()).map(move |i| number(format, block, i));
    bytes.chunks_exact(format.block_bytes()).flat_map(of_block).collect()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn every_format_decodes_to_its_definition_in_every_type() {
    // Several tasks.
    let dims = if cfg!(miri) { [2, 256] } else { [83, 512] };
    for format in FORMATS {
        let bytes = blocks(format, 1, dims);
        let matrix = QuantisedMatrix::new("weight", format, &bytes, dims).unwrap();
        let expected = naive(format, &bytes);
        assert_eq!(bits(&matrix.dequantise::<f32>().unwrap()), bits(&expected), "{format:?}");
        let doubles = matrix.dequantise::<f64>().unwrap();
        assert!(doubles.iter().zip(&expected).all(|(x, expected)| *x == f64::from(*expected)));
        let halves = matrix.dequantise::<f16>().unwrap();
        assert!(halves.iter().zip(&expected).all(|(x, expected)| *x == f16::from_f32(*expected)));
        let halves = matrix.dequantise::<bf16>().unwrap();
        assert!(halves.iter().zip(&expected).all(|(x, expected)| *x == bf16::from_f32(*expected)));
        assert_eq!((matrix.dims(), matrix.format(), matrix.bytes()), (dims, format, &*bytes));
    }
}

/// All bytes and all factors: every code in every place, and scales of all exponents.
#[test]
fn all_scales_of_f16_decode_to_the_definition() {
    for format in FORMATS.into_iter().filter(|format| *format != Format::Nf4) {
        let all_scales =
            (0..u16::MAX).step_by(if cfg!(miri) { 997 } else { 7 }).filter(|x| f16::from_bits(*x).is_finite());
        let mut bytes = Vec::new();
        for scale in all_scales {
            let first = bytes.len();
            bytes.extend((0..format.block_bytes()).map(|i| (usize::from(scale) / 7 * 31 + i * 97) as u8));
            for (&at, scale) in scales(format).iter().zip([scale, f16::from_f32(0.25).to_bits()]) {
                bytes[first + at..][..2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        let dims = [1, bytes.len() / format.block_bytes() * format.block_len()];
        let matrix = QuantisedMatrix::new("weight", format, &bytes, dims).unwrap();
        assert!(matrix.scales_are_finite());
        assert_eq!(bits(&matrix.dequantise().unwrap()), bits(&naive(format, &bytes)), "{format:?}");
    }
}

#[test]
fn part_at_any_place_is_that_part_of_the_whole() {
    for format in FORMATS {
        let dims = [3, 2 * format.block_len().max(64)];
        let bytes = blocks(format, 2, dims);
        let matrix = QuantisedMatrix::new("weight", format, &bytes, dims).unwrap();
        let all = matrix.dequantise::<f32>().unwrap();
        let step = if cfg!(miri) { 61 } else { 1 };
        for first in (0..=dims[1]).step_by(step) {
            for len in [0, 1, 5, 31, 32, 33, 70, 300] {
                let columns = first..dims[1].min(first + len);
                let mut part = vec![7.0; 2 * columns.len()];
                matrix.dequantise_block(1..3, columns.clone(), &mut part).unwrap();
                let expected = (1..3).flat_map(|row| all[row * dims[1]..][columns.clone()].iter().copied());
                assert!(part.into_iter().eq(expected), "{format:?} {columns:?}");
            }
        }
    }
}

#[test]
fn numbers_are_the_same_with_every_instruction_set() {
    with_every_simd!(|simd| {
        for format in FORMATS {
            let (dims, columns) = ([2, 512], 3..500);
            let bytes = blocks(format, 3, dims);
            let matrix = QuantisedMatrix::new("weight", format, &bytes, dims).unwrap();
            let expected = naive(format, &bytes);
            let mut numbers = vec![MaybeUninit::new(0.0f32); 2 * 600];
            let to = MatrixMut::new(&mut numbers, 2, columns.len(), 600);
            simd.vectorize(Decode { matrix: &matrix, rows: 0..2, columns: columns.clone(), to });
            // SAFETY: they were initialised from the start.
            let numbers: Vec<f32> = numbers.into_iter().map(|x| unsafe { x.assume_init() }).collect();
            for row in 0..2 {
                assert_eq!(numbers[row * 600..][..columns.len()], expected[row * 512..][columns.clone()], "{format:?}");
                assert!(numbers[row * 600 + columns.len()..][..600 - columns.len()].iter().all(|x| *x == 0.0));
            }
        }
    });
}

#[test]
fn scale_that_is_not_finite_is_found_in_any_block() {
    for format in FORMATS {
        let dims = [3, 512];
        let bytes = blocks(format, 4, dims);
        let is_finite = |bytes: &[u8]| QuantisedMatrix::new("weight", format, bytes, dims).unwrap().scales_are_finite();
        assert!(is_finite(&bytes));
        for first in (0..bytes.len()).step_by(format.block_bytes()) {
            for at in scales(format).iter().map(|scale| first + scale) {
                for (half, single) in [(f16::NAN, f32::NAN), (f16::INFINITY, f32::NEG_INFINITY)] {
                    let mut bytes = bytes.clone();
                    match format {
                        Format::Nf4 => bytes[at..at + 4].copy_from_slice(&single.to_le_bytes()),
                        _ => bytes[at..at + 2].copy_from_slice(&half.to_le_bytes()),
                    }
                    assert!(!is_finite(&bytes), "{format:?}");
                }
            }
        }
    }
}

#[test]
fn bytes_that_do_not_fit_are_errors() {
    let bytes = [0; 72];
    let error = |format, dims| QuantisedMatrix::new("weight", format, &bytes, dims).unwrap_err().to_string();
    let expected = "the weight: expected rows in whole blocks of 64, got dims [1, 1, 2, 96]";
    assert_eq!(error(Format::Nf4, [2, 96]), expected);
    let expected = "the weight: expected 68 bytes in blocks of 34, got 72 elements";
    assert_eq!(error(Format::Q8_0, [2, 32]), expected);
    assert_eq!(error(Format::Q4_0, [5, 32]), "the weight: expected 90 bytes in blocks of 18, got 72 elements");
    let huge = QuantisedMatrix::new("weight", Format::Q4K, &bytes, [usize::MAX / 2, 512]);
    assert!(matches!(huge, Err(Error::Memory { .. })));

    let matrix = QuantisedMatrix::new("weight", Format::Nf4, &bytes, [2, 64]).unwrap();
    let part = |rows, columns, len| matrix.dequantise_block(rows, columns, &mut vec![0f32; len]);
    assert!(part(0..2, 1..64, 126).is_ok());
    assert!(matches!(part(0..2, 1..64, 127), Err(Error::Length { .. })));
    assert!(matches!(part(1..3, 0..1, 2), Err(Error::Dims { .. })));
    let error = part(0..1, 64..65, 1).unwrap_err();
    assert_eq!(error.to_string(), "the weight: expected rows 0..1 and columns 64..65, got dims [1, 1, 2, 64]");
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = part(0..1, 5..3, 0);
    assert!(matches!(reversed, Err(Error::Dims { .. })));
}

#[test]
fn matrix_without_numbers_has_none() {
    for dims in [[0, 256], [usize::MAX, 0]] {
        let matrix = QuantisedMatrix::new("weight", Format::Q4K, &[], dims).unwrap();
        assert!(matrix.scales_are_finite() && matrix.dequantise::<f16>().unwrap().is_empty());
        assert!(matrix.dequantise_block::<f32>(0..dims[0], 0..dims[1], &mut []).is_ok());
    }
}

/// The number below which a normal variable is with probability `p`: Simpson's rule for the density, and bisection.
fn normal_quantile(p: f64) -> f64 {
    let density = |x: f64| (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
    let probability = |x: f64| {
        let step = x / 200.0;
        let simpson = |i: usize| {
            let at = |half: usize| density((2 * i + half) as f64 * 0.5 * step);
            (at(0) + 4.0 * at(1) + at(2)) * step / 6.0
        };
        0.5 + (0..200).map(simpson).sum::<f64>()
    };
    let (mut low, mut high) = (-8.0, 8.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if probability(middle) < p { low = middle } else { high = middle }
    }
    low
}

/// The paper's section 3: 7 quantiles below zero, zero, and 8 above it, on each side evenly between the probabilities of zero and
/// of the outermost number. For that one the authors' code takes 0.9677083.
#[test]
#[cfg_attr(miri, ignore = "arithmetic of the test itself")]
fn codes_of_nf4_are_quantiles_of_the_normal_distribution() {
    let greatest = 0.967_708_3;
    let quantile = |i: u32, count: u32| normal_quantile(0.5 + (greatest - 0.5) * f64::from(i) / f64::from(count));
    let below = (1..8).rev().map(|i| -quantile(i, 7));
    let expected: Vec<f64> = below.chain((0..9).map(|i| quantile(i, 8))).collect();
    assert_eq!(expected.len(), 16);
    for (code, quantile) in nf4::CODES.iter().zip(expected) {
        assert!((f64::from(*code) - quantile / normal_quantile(greatest)).abs() < 2e-6, "{code} {quantile}");
    }
}

#[test]
fn nf4_takes_the_nearest_code_of_every_number() {
    let mut numbers: Vec<f32> =
        (0..64 * 50).map(|i| ((i * 7919 % 6007) as f32 / 3003.0 - 1.0) * (i / 64) as f32).collect();
    numbers[70] = -1e-40;
    let bytes = quantise_nf4("weight", &numbers).unwrap();
    let decoded = naive(Format::Nf4, &bytes);
    for (block, decoded) in numbers.chunks(64).zip(decoded.chunks(64)) {
        let scale = block.iter().fold(0f32, |max, x| max.max(x.abs()));
        for (x, decoded) in block.iter().zip(decoded) {
            let error = nf4::CODES.iter().map(|code| (scale * code - x).abs()).fold(f32::INFINITY, f32::min);
            assert!((decoded - x).abs() <= error + 1e-6 * scale, "{x} {decoded}");
        }
    }
    // What can be represented stays as it is.
    assert_eq!(quantise_nf4("weight", &decoded).unwrap(), bytes);
    let doubles: Vec<f64> = numbers.iter().map(|x| f64::from(*x)).collect();
    assert_eq!(quantise_nf4("weight", &doubles).unwrap(), bytes);
}

#[test]
fn numbers_that_nf4_can_not_hold_are_found() {
    for bad in [f64::NAN, f64::INFINITY, -1e300] {
        let mut numbers = vec![1.0f64; 128];
        numbers[90] = bad;
        let bytes = quantise_nf4("weight", &numbers).unwrap();
        assert!(!QuantisedMatrix::new("weight", Format::Nf4, &bytes, [1, 128]).unwrap().scales_are_finite(), "{bad}");
    }
    let error = quantise_nf4("weight", &[1.0f32; 65]).unwrap_err();
    assert_eq!(error.to_string(), "the weight: expected whole blocks of 64 numbers, got 65 elements");
    assert!(quantise_nf4::<f16>("weight", &[]).unwrap().is_empty());
}
