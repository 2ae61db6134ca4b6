//! Which variant of the kernels serves a call, and with which tiles. Tile sizes are values here, and macros in the kernels.

use super::machine::Limits;
use crate::error::Error;
use crate::mask::ScoreShape;

/// The most columns of a query, key or value.
pub const MAX_DIM: usize = 256;
/// The most registers that a thread may take for sums. 255 are there, and the operands of the matrix products take the rest, which are few
/// where they lie in shared memory (wgmma), or where there are no options.
const REGISTERS_FOR_SUMS: u32 = 176;
const REGISTERS_FOR_SUMS_OF_FEW_OPERANDS: u32 = 192;
/// Threads of a warp.
const WARP: u32 = 32;
/// Rows of a matrix instruction.
const ROWS: u32 = 16;
/// The warps of a group that copies tiles.
const COPYING_WARPS: u32 = 4;
/// A barrier in shared memory.
const BARRIER_BYTES: u32 = 8;

/// What the tensors of a call hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32 bits.
    F32,
    /// The upper half of an f32.
    Bf16,
    /// IEEE 754's half.
    F16,
}

impl Element {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        if self == Element::F32 { 4 } else { 2 }
    }

    /// The kernels' macro `ELEMENT`.
    fn code(self) -> u32 {
        match self {
            Element::F32 => 0,
            Element::Bf16 => 1,
            Element::F16 => 2,
        }
    }
}

/// What the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    pub(crate) element: Element,
    /// Columns of the tiles of query and key.
    pub(crate) head_dim: u32,
    /// Columns of the tiles of the value.
    pub(crate) value_dim: u32,
    /// Whether the kernels leave out all options.
    pub(crate) plain: bool,
    /// Whether they use the matrix instructions of compute capability 9.0.
    pub(crate) hopper: bool,
}

/// A pass over tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Queries to the context.
    Forward,
    /// A few queries to the context, with the keys in parts.
    Decode,
    /// Keys to the gradients of key and value.
    Keys,
    /// Queries to the gradient of the query.
    Queries,
}

/// The tiles of a pass: a block of threads has `16 * warps * row_tiles` rows, and goes through `others` rows of the other operands at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    pub(crate) warps: u32,
    /// A warp has 16 rows, or 32: then it reads each tile of the other operands once for twice the work.
    pub(crate) row_tiles: u32,
    pub(crate) others: u32,
    /// How many tiles of the other operands are in shared memory.
    pub(crate) stages: u32,
    /// Whether another warp group copies the tiles: the plain forward pass by wgmma.
    pub(crate) specialised: bool,
}

const fn tiles(warps: u32, others: u32, stages: u32) -> Tiles {
    Tiles { warps, row_tiles: 1, others, stages, specialised: false }
}

/// In order of preference. The last ones are for f32 with 256 columns in the least shared memory.
const FORWARD: &[Tiles] = &[tiles(4, 64, 1), tiles(4, 32, 1), tiles(2, 32, 1), tiles(2, 16, 1)];
/// The tiles of FlashAttention-2: with rows of 16, reading shared memory would take as long as the products.
const FORWARD_PLAIN: Tiles = Tiles { row_tiles: 2, ..tiles(4, 64, 1) };
const DECODE: &[Tiles] = &[tiles(4, 64, 2), tiles(4, 32, 2), tiles(2, 32, 2), tiles(2, 16, 2)];
const BACKWARD: &[Tiles] = &[
    tiles(8, 64, 2),
    tiles(8, 32, 2),
    tiles(8, 32, 1),
    tiles(4, 32, 2),
    tiles(4, 32, 1),
    tiles(4, 16, 1),
    tiles(2, 16, 1),
];
/// An instruction of wgmma has at least 64 columns here.
const FORWARD_HOPPER: &[Tiles] = &[tiles(8, 128, 2), tiles(8, 64, 2)];
/// Measured on an H200, bf16: 1.16 times as fast as without specialised warps at 8,192 tokens and head_dim 128, 1.22 times at 64.
const FORWARD_SPECIALISED: &[Tiles] = &[specialised(128), specialised(64)];
const BACKWARD_HOPPER: &[Tiles] = &[tiles(8, 64, 2), tiles(8, 64, 1), tiles(4, 64, 1)];

const fn specialised(others: u32) -> Tiles {
    Tiles { specialised: true, ..tiles(8, others, 2) }
}

impl Tiles {
    /// Rows that a block computes.
    pub(crate) fn rows(self) -> u32 {
        ROWS * self.row_tiles * self.warps
    }

    /// Threads of a block.
    pub(crate) fn threads(self) -> u32 {
        WARP * (self.warps + if self.specialised { COPYING_WARPS } else { 0 })
    }

    /// Dynamic shared memory of a block.
    pub(crate) fn shared_bytes(self, variant: Variant, pass: Pass) -> u32 {
        let Variant { head_dim, value_dim, element, .. } = variant;
        let own = match pass {
            Pass::Forward | Pass::Decode => head_dim,
            Pass::Keys | Pass::Queries => head_dim + value_dim,
        };
        let numbers = self.rows() * own + self.stages * self.others * (head_dim + value_dim);
        // Two barriers for the queries and for each stage of keys and of values.
        let barriers = if self.specialised { 2 * BARRIER_BYTES * (1 + 2 * self.stages) } else { 0 };
        numbers * element.bytes() as u32 + barriers
    }

    /// Registers of a thread that hold sums, and the weights of the tile before, in pairs, where wgmma computes both tiles at a time.
    fn registers(self, variant: Variant, pass: Pass) -> u32 {
        let Variant { head_dim, value_dim, .. } = variant;
        let columns = match pass {
            Pass::Forward if variant.hopper => value_dim + self.others + self.others / 2,
            Pass::Forward | Pass::Decode => value_dim + self.others,
            Pass::Keys if variant.splits_keys() => head_dim.max(value_dim) + 2 * self.others,
            Pass::Keys => head_dim + value_dim + 2 * self.others,
            Pass::Queries => head_dim + 2 * self.others,
        };
        ROWS * self.row_tiles * columns / WARP
    }
}

/// The most queries of a sequence that are decoded, and the fewest keys: below, the parts would be too small.
const DECODE_QUERIES: usize = 8;
const DECODE_KEYS: usize = 256;
/// Blocks to aim for: two for each multiprocessor of a large GPU. The same for every GPU, so that the results don't depend on it.
const DECODE_BLOCKS: usize = 256;
/// The fewest tiles of keys that are worth a block of their own.
const DECODE_TILES: usize = 2;

/// In how many parts a block of rows of each head of keys goes through the keys, if the call is to be decoded.
pub(crate) fn decode_splits(shape: &ScoreShape, kv_heads: usize, tiles: Tiles) -> Option<usize> {
    if shape.q_len > DECODE_QUERIES || shape.kv_len < DECODE_KEYS {
        return None;
    }
    let blocks = decode_row_tiles(shape, kv_heads, tiles) * kv_heads * shape.batch;
    let most = shape.kv_len.div_ceil(tiles.others as usize).div_ceil(DECODE_TILES);
    Some(DECODE_BLOCKS.div_ceil(blocks).min(most))
}

/// Tiles of the queries of all heads that share a head of keys.
pub(crate) fn decode_row_tiles(shape: &ScoreShape, kv_heads: usize, tiles: Tiles) -> usize {
    (shape.num_heads / kv_heads * shape.q_len).div_ceil(tiles.rows() as usize)
}

/// The macro `PARTS` of the pass over keys: which gradients a launch computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parts {
    Value = 1,
    Key = 2,
    Both = 3,
}

impl Variant {
    /// The smallest variant for these sizes.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for sizes beyond [`MAX_DIM`].
    pub(crate) fn new(element: Element, dims: [usize; 2], plain: bool, limits: Limits) -> Result<Self, Error> {
        let [head_dim, value_dim] = [("head_dim", dims[0]), ("value_dim", dims[1])].map(|(what, got)| {
            let bucket = [64, 128, 256].into_iter().find(|&bucket| got <= bucket as usize);
            bucket.ok_or(Error::Unsupported { what, expected: "at most 256", got })
        });
        let hopper = limits.capability == (9, 0) && element != Element::F32;
        Ok(Self { element, head_dim: head_dim?, value_dim: value_dim?, plain, hopper })
    }

    /// Whether the pass over keys takes two launches, since the sums for both gradients don't fit into registers.
    pub(crate) fn splits_keys(self) -> bool {
        self.head_dim + self.value_dim > 256
    }

    /// What each launch of the pass over keys computes, in order.
    pub(crate) fn key_parts(self) -> &'static [Parts] {
        if self.splits_keys() { &[Parts::Value, Parts::Key] } else { &[Parts::Both] }
    }

    /// The best tiles that fit.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] if a block has too little shared memory.
    pub(crate) fn tiles(self, pass: Pass, limits: Limits) -> Result<Tiles, Error> {
        let candidates = match pass {
            Pass::Forward if self.hopper && self.plain => FORWARD_SPECIALISED,
            Pass::Forward if self.hopper => FORWARD_HOPPER,
            Pass::Forward => FORWARD,
            Pass::Decode => DECODE,
            Pass::Keys | Pass::Queries if self.hopper => BACKWARD_HOPPER,
            Pass::Keys | Pass::Queries => BACKWARD,
        };
        let has_few_operands = self.hopper || (self.plain && self.element != Element::F32);
        let registers = if has_few_operands { REGISTERS_FOR_SUMS_OF_FEW_OPERANDS } else { REGISTERS_FOR_SUMS };
        let fits = |tiles: &Tiles| {
            tiles.shared_bytes(self, pass) <= limits.shared_bytes && tiles.registers(self, pass) <= registers
        };
        let is_plain = pass == Pass::Forward && self.plain && !self.hopper && self.element != Element::F32;
        if is_plain && fits(&FORWARD_PLAIN) {
            return Ok(FORWARD_PLAIN);
        }
        candidates.iter().copied().find(fits).ok_or_else(|| Error::Gpu {
            what: "shared memory of a block",
            expected: "at least 96 KiB",
            got: format!("{} bytes", limits.shared_bytes),
        })
    }

    /// The macros for these tiles.
    pub(crate) fn defines(self, tiles: Tiles, parts: Option<Parts>) -> Vec<(&'static str, u32)> {
        let mut defines = vec![
            ("ELEMENT", self.element.code()),
            ("HEAD_DIM", self.head_dim),
            ("VALUE_DIM", self.value_dim),
            ("PLAIN", self.plain.into()),
            ("WARPS", tiles.warps),
            ("ROW_TILES", tiles.row_tiles),
            ("OTHERS", tiles.others),
            ("STAGES", tiles.stages),
        ];
        defines.extend(tiles.specialised.then_some(("SPECIALISED", 1)));
        defines.extend(parts.map(|parts| ("PARTS", parts as u32)));
        defines
    }

    /// The macros of the careful kernels, which have no tiles of their own.
    pub(crate) fn careful_defines(self) -> Vec<(&'static str, u32)> {
        vec![("ELEMENT", self.element.code()), ("PLAIN", self.plain.into())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUCKETS: [usize; 3] = [64, 128, 256];

    /// sm_80, sm_86, sm_90.
    const MACHINES: [Limits; 3] = [
        Limits { capability: (8, 0), shared_bytes: 163 << 10, multiprocessors: 108 },
        Limits { capability: (8, 6), shared_bytes: 99 << 10, multiprocessors: 84 },
        Limits { capability: (9, 0), shared_bytes: 227 << 10, multiprocessors: 132 },
    ];

    #[test]
    fn every_variant_has_tiles_that_fit_every_machine() {
        for limits in MACHINES {
            for element in [Element::F32, Element::Bf16, Element::F16] {
                for dims in BUCKETS.iter().flat_map(|&d| BUCKETS.map(|dv| [d, dv])) {
                    let variant = Variant::new(element, dims, dims[0] == dims[1], limits).unwrap();
                    assert_eq!([variant.head_dim, variant.value_dim], dims.map(|dim| dim as u32));
                    for pass in [Pass::Forward, Pass::Decode, Pass::Keys, Pass::Queries] {
                        let tiles = variant.tiles(pass, limits).unwrap();
                        let place = format!("{variant:?}, {pass:?}, {limits:?}: {tiles:?}");
                        assert!(tiles.shared_bytes(variant, pass) <= limits.shared_bytes, "{place}");
                        // The rows that all threads copy at once, and the columns of a matrix instruction.
                        let at_once = 4 * tiles.warps;
                        assert!(tiles.others.is_multiple_of(at_once.max(16)), "{place}");
                        assert!(tiles.warps.is_multiple_of(if variant.hopper { 4 } else { 2 }), "{place}");
                        assert!(!variant.hopper || pass == Pass::Decode || tiles.others >= 64, "{place}");
                    }
                }
            }
        }
    }

    /// With tiles of 128 keys, a group that computes has 232 registers and needs 224 for sums and weights alone. ptxas spills 176 and 256
    /// bytes, and none with 64.
    #[test]
    fn wide_values_leave_registers_for_fewer_keys() {
        for (dims, keys) in [([64, 64], 128), ([128, 128], 128), ([64, 256], 64), ([128, 256], 64), ([256, 256], 64)] {
            let variant = Variant::new(Element::Bf16, dims, true, MACHINES[2]).unwrap();
            assert_eq!(variant.tiles(Pass::Forward, MACHINES[2]).unwrap().others, keys, "{dims:?}");
        }
    }

    #[test]
    fn sizes_between_the_buckets_take_the_next() {
        let bucket = |dim| Variant::new(Element::Bf16, [dim, 64], false, MACHINES[0]).map(|variant| variant.head_dim);
        assert_eq!([1, 64, 65, 129, 256].map(bucket), [64, 64, 128, 256, 256].map(Ok));
        let refused = Error::Unsupported { what: "head_dim", expected: "at most 256", got: 257 };
        assert_eq!(bucket(257), Err(refused));
    }

    #[test]
    fn only_half_types_on_capability_9_0_use_its_instructions() {
        let hopper = |element, machine: usize| Variant::new(element, [64; 2], false, MACHINES[machine]).unwrap().hopper;
        assert!(hopper(Element::Bf16, 2) && hopper(Element::F16, 2));
        assert!(!hopper(Element::F32, 2) && !hopper(Element::Bf16, 1));
    }
}
