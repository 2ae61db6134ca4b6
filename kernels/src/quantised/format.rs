//! How blocks of numbers lie in bytes, and what numbers they hold.

use half::f16;

use crate::quantised::nf4;

/// Numbers that are decoded at a time. The blocks of every format consist of whole groups.
pub(super) const GROUP: usize = 32;

/// How a block of numbers that follow each other in a row is stored. All bytes of scales are little-endian.
///
/// All but the last are formats of ggml, whose files have the extension GGUF: `block_q8_0`, `block_q4_K` and so on of its
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
    /// 32 numbers in 22 bytes: a scale d in f16, and for each number 5 bits q. The highest bits of the numbers are the bits of a u32,
    /// that of number 0 the lowest; the other 4 bits follow as in [`Format::Q4_0`]. The number is d · (q - 16).
    Q5_0,
    /// Q4_K: 256 numbers in 144 bytes. Two scales d and e in f16; for each 32 numbers two factors s and m of 6 bits, in 12 bytes;
    /// and for each number 4 bits q, where each 32 bytes hold 32 numbers in their low halves, and the next 32 in their high
    /// halves. The number is (d · s) · q - (e · m).
    Q4K,
    /// Q5_K: 256 numbers in 176 bytes. The scales and factors of [`Format::Q4K`], and for each number 5 bits q: the highest bits in
    /// 32 bytes, where bit g of byte i is that of number 32 · g + i, then the other 4 bits as in Q4_K. The number is
    /// (d · s) · q - (e · m).
    Q5K,
    /// Q6_K: 256 numbers in 210 bytes. For each number 6 bits q: the low 4 bits in 128 bytes, then the high 2 bits in 64; for each
    /// 16 numbers a factor s in i8; and a scale d in f16. Of each 128 numbers, the low halves of 64 bytes hold the first 64, the
    /// high halves the next 64; and 32 bytes hold 2 bits of the first 32 numbers, then of the next, from the lowest bits to the
    /// highest. The number is (d · s) · (q - 32).
    Q6K,
    /// 64 numbers in 36 bytes: the largest absolute value d in f32, and for each number 4 bits q, that of the first of two
    /// numbers in the high half of their byte. The number is d · c\[q\], where c are the 16 numbers of NF4: quantiles of the
    /// normal distribution.
    Nf4,
}

impl Format {
    /// Numbers in a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::Q8_0 | Self::Q4_0 | Self::Q5_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
            Self::Nf4 => nf4::LEN,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q5_0 => 22,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Nf4 => nf4::BYTES,
        }
    }

    /// Whether the scales of a block are finite.
    pub(super) fn has_finite_scales(self, block: &[u8]) -> bool {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).is_finite();
        match self {
            Self::Q8_0 | Self::Q4_0 | Self::Q5_0 => half(0),
            Self::Q4K | Self::Q5K => half(0) && half(2),
            Self::Q6K => half(Q6K::SCALE),
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

pub(super) struct Q5_0;

impl Block<22> for Q5_0 {
    const GROUPS: usize = 1;

    #[inline(always)]
    fn group([d0, d1, h0, h1, h2, h3, codes @ ..]: &[u8; 22], _: usize) -> [f32; GROUP] {
        let scale = widen([*d0, *d1]);
        let high = u32::from_le_bytes([*h0, *h1, *h2, *h3]);
        let mut numbers = [0.0; GROUP];
        for i in 0..GROUP / 2 {
            let first = u32::from(codes[i] & 15) | (high >> i & 1) << 4;
            let second = u32::from(codes[i] >> 4) | (high >> (i + 16) & 1) << 4;
            numbers[i] = scale * (first as i32 - 16) as f32;
            numbers[i + GROUP / 2] = scale * (second as i32 - 16) as f32;
        }
        numbers
    }
}

pub(super) struct Q4K;

impl Block<144> for Q4K {
    const GROUPS: usize = 8;

    #[inline(always)]
    fn group(block: &[u8; 144], group: usize) -> [f32; GROUP] {
        let [scale, min] = scale_and_min(block, group);
        let codes = &block[16 + group / 2 * GROUP..][..GROUP];
        // The high half of a byte is 16 · q, so that its scale is divided by 16: exact, and faster than a shift.
        let (mask, scale) = if group.is_multiple_of(2) { (0x0F, scale) } else { (0xF0, scale / 16.0) };
        let mut numbers = [0.0; GROUP];
        for i in 0..GROUP {
            numbers[i] = scale * f32::from(codes[i] & mask) - min;
        }
        numbers
    }
}

pub(super) struct Q5K;

impl Block<176> for Q5K {
    const GROUPS: usize = 8;

    #[inline(always)]
    fn group(block: &[u8; 176], group: usize) -> [f32; GROUP] {
        let [scale, min] = scale_and_min(block, group);
        let (high, codes) = (&block[16..][..GROUP], &block[48 + group / 2 * GROUP..][..GROUP]);
        let shift = group % 2 * 4;
        let mut numbers = [0.0; GROUP];
        for i in 0..GROUP {
            let code = codes[i] >> shift & 15 | (high[i] >> group & 1) << 4;
            numbers[i] = scale * f32::from(code) - min;
        }
        numbers
    }
}

/// The scale and the minimum of a group of Q4_K or Q5_K: d · s and e · m.
#[inline(always)]
fn scale_and_min<const BYTES: usize>(block: &[u8; BYTES], group: usize) -> [f32; 2] {
    let [scale, min] = factors(&block[4..16], group);
    let (d, e) = (widen([block[0], block[1]]), widen([block[2], block[3]]));
    [d * f32::from(scale), e * f32::from(min)]
}

/// The factors of a group of Q4_K or Q5_K. Those of the first four groups are the low 6 bits of bytes 0 to 8. Those of the others
/// have their low 4 bits in bytes 8 to 12, and their high 2 bits above the 6 bits of the first ones.
#[inline(always)]
fn factors(bytes: &[u8], group: usize) -> [u8; 2] {
    let (of_scale, of_min) = (bytes[group % 4], bytes[group % 4 + 4]);
    if group < 4 {
        return [of_scale & 63, of_min & 63];
    }
    let low = bytes[group + 4];
    [low & 15 | of_scale >> 6 << 4, low >> 4 | of_min >> 6 << 4]
}

pub(super) struct Q6K;

impl Q6K {
    /// The bytes before the high bits of the codes, before the factors and before the scale.
    const HIGH: usize = 128;
    const FACTORS: usize = Self::HIGH + 64;
    const SCALE: usize = Self::FACTORS + 16;
}

impl Block<210> for Q6K {
    const GROUPS: usize = 8;

    #[inline(always)]
    fn group(block: &[u8; 210], group: usize) -> [f32; GROUP] {
        // Half a block has four groups.
        let (half, part) = (group / 4, group % 4);
        let low = &block[half * 2 * GROUP + part % 2 * GROUP..][..GROUP];
        let high = &block[Self::HIGH + half * GROUP..][..GROUP];
        let (low_shift, high_shift) = (part / 2 * 4, part * 2);
        let scale = widen([block[Self::SCALE], block[Self::SCALE + 1]]);
        let factors = &block[Self::FACTORS + 2 * group..][..2];
        let scales = [scale * f32::from(factors[0] as i8), scale * f32::from(factors[1] as i8)];
        let mut numbers = [0.0; GROUP];
        for i in 0..GROUP {
            let code = low[i] >> low_shift & 15 | (high[i] >> high_shift & 3) << 4;
            numbers[i] = scales[i / (GROUP / 2)] * (f32::from(code) - 32.0);
        }
        numbers
    }
}
