//! How blocks of numbers lie in bytes, and what numbers they hold.

use half::f16;

use crate::quantised::nf4;

/// Numbers that are decoded at a time. The blocks of every format consist of whole groups.
pub(super) const GROUP: usize = 32;

/// How a block of numbers that follow each other in a row is stored. All bytes of scales are little-endian.
///
/// The first three are formats of ggml, whose files have the extension GGUF: `block_q8_0`, `block_q4_0` and `block_q4_K` of its
/// `ggml-common.h`. The last one is that of Dettmers, Pagnoni, Holtzman and Zettlemoyer, QLoRA (2023), section 3.
///
/// # Examples
///
/// ```
/// use attention_kernels::quantised::Format;
///
/// // 4.5 bits a number.
/// assert_eq!((Format::Q4K.block_len(), Format::Q4K.block_bytes()), (256, 144));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// 32 numbers in 34 bytes: a scale d in f16, and for each number an i8 q. The number is d · q.
    Q8_0,
    /// 32 numbers in 18 bytes: a scale d in f16, and for each number 4 bits q. The low halves of the 16 bytes are numbers 0 to 16,
    /// the high halves 16 to 32. The number is d · (q - 8).
    Q4_0,
    /// Q4_K: 256 numbers in 144 bytes. Two scales d and e in f16; for each 32 numbers two factors s and m of 6 bits, in 12 bytes;
    /// and for each number 4 bits q, where each 32 bytes hold 32 numbers in their low halves, and the next 32 in their high
    /// halves. The number is (d · s) · q - (e · m).
    Q4K,
    /// 64 numbers in 36 bytes: the largest absolute value d in f32, and for each number 4 bits q, that of the first of two
    /// numbers in the high half of their byte. The number is d · c\[q\], where c are the 16 numbers of NF4: quantiles of the
    /// normal distribution.
    Nf4,
}

impl Format {
    /// Numbers in a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 => 32,
            Self::Q4K => 256,
            Self::Nf4 => nf4::LEN,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4K => 144,
            Self::Nf4 => nf4::BYTES,
        }
    }

    /// Whether the scales of a block are finite.
    pub(super) fn has_finite_scales(self, block: &[u8]) -> bool {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).is_finite();
        match self {
            Self::Q8_0 | Self::Q4_0 => half(0),
            Self::Q4K => half(0) && half(2),
            Self::Nf4 => f32::from_le_bytes([block[0], block[1], block[2], block[3]]).is_finite(),
        }
    }
}

/// A format as the code that decodes it. Its functions are inlined into loops that are compiled for each instruction set.
pub(super) trait Block<const BYTES: usize> {
    /// The groups in a block.
    const GROUPS: usize;

    /// The numbers of a group of a block.
    fn group(block: &[u8; BYTES], group: usize) -> [f32; GROUP];
}

/// The number of an f16. (`half` has a function for it that isn't inlined. Its call would take as long as a group.)
#[inline(always)]
fn widen(bytes: [u8; 2]) -> f32 {
    /// 2^112, the quotient of two numbers with the same bits for an exponent.
    const BIAS: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(u16::from_le_bytes(bytes));
    let (sign, size) = ((bits & 0x8000) << 16, (bits & 0x7FFF) << 13);
    let is_finite = bits & 0x7C00 < 0x7C00;
    let size = if is_finite { f32::from_bits(size) * BIAS } else { f32::from_bits(size | 0x7F80_0000) };
    f32::from_bits(size.to_bits() | sign)
}

pub(super) struct Q8_0;

impl Block<34> for Q8_0 {
    const GROUPS: usize = 1;

    #[inline(always)]
    fn group([d0, d1, codes @ ..]: &[u8; 34], _: usize) -> [f32; GROUP] {
        let scale = widen([*d0, *d1]);
        let mut numbers = [0.0; GROUP];
        for i in 0..GROUP {
            numbers[i] = scale * f32::from(codes[i] as i8);
        }
        numbers
    }
}

pub(super) struct Q4_0;

impl Block<18> for Q4_0 {
    const GROUPS: usize = 1;

    #[inline(always)]
    fn group([d0, d1, codes @ ..]: &[u8; 18], _: usize) -> [f32; GROUP] {
        let scale = widen([*d0, *d1]);
        let mut numbers = [0.0; GROUP];
        for i in 0..GROUP / 2 {
            numbers[i] = scale * (f32::from(codes[i] & 15) - 8.0);
            numbers[i + GROUP / 2] = scale * (f32::from(codes[i] >> 4) - 8.0);
        }
        numbers
    }
}

pub(super) struct Q4K;

impl Block<144> for Q4K {
    const GROUPS: usize = 8;

    #[inline(always)]
    fn group([d0, d1, e0, e1, rest @ ..]: &[u8; 144], group: usize) -> [f32; GROUP] {
        let [scale, min] = factors(rest, group);
        let scale = widen([*d0, *d1]) * f32::from(scale);
        let min = widen([*e0, *e1]) * f32::from(min);
        let codes = &rest[12 + group / 2 * GROUP..][..GROUP];
        // The high half of a byte is 16 · q, so that its scale is divided by 16: exact, and faster than a shift.
        let (mask, scale) = if group.is_multiple_of(2) { (0x0F, scale) } else { (0xF0, scale / 16.0) };
        let mut numbers = [0.0; GROUP];
        for i in 0..GROUP {
            numbers[i] = scale * f32::from(codes[i] & mask) - min;
        }
        numbers
    }
}

/// The factors of a group of Q4_K. Those of the first four groups are the low 6 bits of bytes 0 to 8. Those of the others have their
/// low 4 bits in bytes 8 to 12, and their high 2 bits above the 6 bits of the first ones.
#[inline(always)]
fn factors(bytes: &[u8; 140], group: usize) -> [u8; 2] {
    let (of_scale, of_min) = (bytes[group % 4], bytes[group % 4 + 4]);
    if group < 4 {
        return [of_scale & 63, of_min & 63];
    }
    let low = bytes[group + 4];
    [low & 15 | of_scale >> 6 << 4, low >> 4 | of_min >> 6 << 4]
}
