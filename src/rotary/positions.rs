//! [`Positions`]: the position of each token.

use std::ops::Range;

use attention_kernels::{collected, reserve};
use candle_core::{DType, Device, Tensor};

use crate::error::{AttentionError, Result};
use crate::memory;

/// What a list of positions is in an error of memory.
const POSITIONS: &str = "positions of the tokens";

/// The positions of the tokens of a batch: a list for each sequence, or a single one for all sequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Positions {
    /// The positions `offset..offset + len`, for each of these offsets.
    From(Vec<usize>),
    /// As many lists of `len` positions, one after the other.
    Each { lists: usize, ids: Vec<usize> },
}

impl Positions {
    /// Positions that count up from an offset for each sequence, or from one for all sequences.
    pub(crate) fn from_offsets(offsets: &[usize]) -> Self {
        match offsets {
            // The offsets are usually equal. The angles are then computed only once.
            [first, rest @ ..] if rest.iter().all(|offset| offset == first) => Self::From(vec![*first]),
            _ => Self::From(offsets.to_vec()),
        }
    }

    /// The positions of some ranges, one after the other, each plus an offset. All sequences share them.
    pub(crate) fn from_ranges(ranges: &[Range<usize>], offset: usize) -> Result<Self, AttentionError> {
        let mut ids = reserve(POSITIONS, ranges.iter().map(Range::len).sum())?;
        for range in ranges {
            let end = offset.checked_add(range.end).ok_or(position_overflow(offset))?;
            ids.extend(offset + range.start..end);
        }
        Ok(Self::Each { lists: 1, ids })
    }

    /// The positions that a tensor of integers (len) or (batch, len) holds, for a batch of sequences of `len` tokens.
    pub(crate) fn from_ids(ids: &Tensor, batch: usize, len: usize) -> Result<Self> {
        let tensor = "position_ids";
        if !ids.dtype().is_int() {
            let expected = "U32, I64 or another integer".into();
            return Err(AttentionError::DType { tensor, expected, got: ids.dtype() }.into());
        }
        let lists = match *ids.dims() {
            [ids_len] if ids_len == len => 1,
            [lists, ids_len] if ids_len == len && (lists == batch || lists == 1) => lists,
            _ => {
                let expected = format!("(len) = [{len}] or (batch, len) = [{batch}, {len}]");
                return Err(AttentionError::Shape { tensor, expected, shape: ids.dims().to_vec() }.into());
            }
        };
        // candle can't cast an empty tensor on CUDA.
        if ids.elem_count() == 0 {
            return Ok(Self::Each { lists, ids: Vec::new() });
        }
        memory::check_countable(tensor, ids)?;
        // As a view that was made contiguous, as i64, and as positions.
        memory::ask_for(tensor, 4, ids, DType::I64)?;
        let ids = ids.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?;
        let position = |id: i64| {
            usize::try_from(id)
                .map_err(|_| AttentionError::Position { expected: "at least 0".into(), got: id.to_string() })
        };
        Ok(Self::Each { lists, ids: ids.into_iter().map(position).collect::<Result<_, _>>()? })
    }

    /// The number of lists.
    pub(crate) fn lists(&self) -> usize {
        match self {
            Self::From(offsets) => offsets.len(),
            Self::Each { lists, .. } => *lists,
        }
    }

    /// All lists, one after the other, for sequences of `len` tokens.
    pub(super) fn flatten(&self, len: usize) -> Result<Vec<usize>, AttentionError> {
        match self {
            Self::Each { ids, .. } => Ok(collected(POSITIONS, ids.iter().copied())?),
            Self::From(offsets) => {
                let mut positions = reserve(POSITIONS, offsets.len().saturating_mul(len))?;
                for &offset in offsets {
                    positions.extend(offset..offset.checked_add(len).ok_or(position_overflow(offset))?);
                }
                Ok(positions)
            }
        }
    }
}

fn position_overflow(offset: usize) -> AttentionError {
    let expected = "an offset that leaves room to count the positions";
    AttentionError::Number { name: "position_offset", expected, got: offset as f64 }
}
