//! The pieces in which keys and values travel: a call is cut by sequences and key heads.
//!
//! A rank holds the keys that it computes with and those that arrive for the next step. If all heads travelled at once, these would take as
//! much memory as the rank's own tokens several times. A piece is about as small as messages should be. The last one of a sequence may be
//! smaller.

use std::ops::Range;

/// Messages of fewer bytes take longer to announce than to send: 256 KiB is 20 µs at 100 Gbit/s.
const MESSAGE: usize = 256 << 10;

/// Some sequences and some key heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) sequences: Range<usize>,
    pub(super) kv_heads: Range<usize>,
}

/// All pieces, for keys and values that take `bytes` for each sequence and head. They depend on sizes that all ranks know.
pub(super) fn pieces(batch: usize, kv_heads: usize, bytes: usize) -> Vec<Piece> {
    let at_once = MESSAGE.div_ceil(bytes.max(1));
    // Either whole sequences, or some heads of one.
    let sequences = (at_once / kv_heads.max(1)).max(1);
    let heads = if at_once >= kv_heads { kv_heads } else { at_once };
    let starts =
        |len: usize, step: usize| (0..len).step_by(step.max(1)).map(move |start| start..(start + step).min(len));
    let of_sequences = |sequences: Range<usize>| {
        starts(kv_heads, heads).map(move |kv_heads| Piece { sequences: sequences.clone(), kv_heads })
    };
    starts(batch, sequences).flat_map(of_sequences).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_all_sequences_and_heads() {
        for (batch, kv_heads, bytes, expected) in [
            (3, 4, 1, 1),
            (3, 4, MESSAGE, 12),
            (3, 4, MESSAGE / 2, 6),
            (3, 4, MESSAGE / 3 + 1, 6),
            (5, 2, MESSAGE / 4, 3),
            (0, 2, 8, 0),
        ] {
            let pieces = pieces(batch, kv_heads, bytes);
            assert_eq!(pieces.len(), expected, "{pieces:?}");
            let mut all: Vec<_> = pieces
                .iter()
                .flat_map(|piece| piece.sequences.clone().flat_map(|b| piece.kv_heads.clone().map(move |h| (b, h))))
                .collect();
            all.sort_unstable();
            assert_eq!(all, (0..batch).flat_map(|b| (0..kv_heads).map(move |h| (b, h))).collect::<Vec<_>>());
        }
    }
}
