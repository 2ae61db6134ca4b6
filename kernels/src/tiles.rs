//! How large the tiles of each pass are. The sizes depend on how products are computed.

/// The most panels that [`BackwardTiles`] may have.
pub(crate) const MAX_PANELS: usize = 8;

/// Tile sizes of all passes.
#[derive(Clone, Copy)]
pub(crate) struct TileSizes {
    pub(crate) forward: ForwardTiles,
    pub(crate) backward: BackwardTiles,
    pub(crate) decode: DecodeTiles,
}

#[derive(Clone, Copy)]
pub(crate) struct ForwardTiles {
    /// Queries of a task. With 64 entries each, queries and sums (32 KB each) and a block of keys and values (24 KB each)
    /// stay in a second-level cache of 256 KB.
    pub(crate) queries: usize,
    /// Keys of a block, at least as many as a panel has queries: the scores of a panel (6 KB) and the keys stay in a first-level
    /// cache of 32 KB.
    pub(crate) keys: usize,
    /// Blocks of keys whose sums are added up before they are added to those of the other keys.
    pub(crate) blocks_of_part: usize,
}

#[derive(Clone, Copy)]
pub(crate) struct BackwardTiles {
    /// Panels of a block of queries. Their weights lie side by side, so that the products over queries, dk and dv, are long
    /// enough to pay for loading and storing their sums.
    pub(crate) panels: usize,
    /// Keys of a block, at least as many as the panels have queries: the weights and their gradients (48 KB each with AVX2)
    /// stay in a second-level cache.
    pub(crate) keys: usize,
    /// Products that are summed up before the sum is added to the others, an even number: a longer sum loses more to
    /// rounding, a shorter one is loaded and stored more often.
    pub(crate) longest_sum: usize,
}

#[derive(Clone, Copy)]
pub(crate) struct DecodeTiles {
    /// More queries than this fill the lanes of a panel well enough for the forward pass.
    pub(crate) max_queries: usize,
    /// With fewer keys, decoding doesn't wait for memory, and the forward pass is as fast.
    pub(crate) min_keys: usize,
    /// Keys of a block, a multiple of all lanes: those of 128 entries (64 KB) stay in a second-level cache until all rows have
    /// had them.
    pub(crate) keys: usize,
}

impl DecodeTiles {
    /// Whether scores of this size are decoded. It depends on the shape alone, so that a layer gives the same numbers whether it
    /// trains or not.
    pub(crate) fn suit(&self, q_len: usize, kv_len: usize) -> bool {
        q_len <= self.max_queries && kv_len >= self.min_keys
    }
}

impl TileSizes {
    /// The sizes, whether AMX's tile registers multiply or vectors.
    ///
    /// With tile registers, copying and transposing a block of keys costs as much as a few panels, so a task has more of them, and
    /// what happens to each panel's sums costs more than with vectors, so a block has more keys: on an Emerald Rapids processor
    /// the forward pass is 1.17 to 1.33 times as fast as with the smaller tiles. Processors with AMX have second-level caches of 2 MB.
    pub(crate) const fn new(by_tile_registers: bool) -> Self {
        let forward = if by_tile_registers {
            ForwardTiles { queries: 256, keys: 192, blocks_of_part: 32 }
        } else {
            ForwardTiles { queries: 128, keys: 96, blocks_of_part: 64 }
        };
        Self {
            forward,
            backward: BackwardTiles { panels: 4, keys: 192, longest_sum: 64 },
            decode: DecodeTiles { max_queries: 8, min_keys: 128, keys: 128 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::microkernel::panel_width;
    use crate::simd::{MAX_LANES, with_every_simd};

    #[test]
    fn sizes_fit_every_instruction_set() {
        with_every_simd!(|simd| {
            let _ = simd;
            for TileSizes { forward, backward, decode } in [false, true].map(TileSizes::new) {
                for width in [panel_width::<f32, S>(), panel_width::<f64, S>()] {
                    assert!(forward.keys >= width && forward.queries.is_multiple_of(width));
                    assert!(backward.keys >= backward.panels * width && backward.panels <= MAX_PANELS);
                }
                assert!(backward.longest_sum.is_multiple_of(2) && decode.keys.is_multiple_of(MAX_LANES));
            }
        });
    }
}
