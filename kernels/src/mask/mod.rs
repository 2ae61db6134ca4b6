//! Which keys each query may attend to.

mod answers;
mod documents;
mod nested;
mod rule;
mod table;
mod text;

pub use nested::Nested;
pub use rule::{Offset, PerSequence, Rule};
pub use table::{Table, TableAxes};

pub use crate::error::MaskError;
#[cfg(test)]
pub(crate) use answers::tests::for_all as for_all_rules;

/// The sizes that scores have: (batch, num_heads, q_len, kv_len).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreShape {
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Queries in a sequence.
    pub q_len: usize,
    /// Keys in a sequence.
    pub kv_len: usize,
}

impl From<(usize, usize, usize, usize)> for ScoreShape {
    fn from((batch, num_heads, q_len, kv_len): (usize, usize, usize, usize)) -> Self {
        Self { batch, num_heads, q_len, kv_len }
    }
}

/// How much of a tile of scores is visible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// Every query of the tile may attend to every key of it.
    All,
    /// No query of the tile may attend to any key of it: the tile needs no work.
    None,
    /// Anything between, or too costly to tell.
    Some,
}
