//! The rules that a mask is made of, and whether they fit the scores.

use std::ops::Range;
use std::sync::Arc;

use super::ScoreShape;
use super::nested::{Nested, too_many};
use super::table::Table;
use crate::error::MaskError;

/// A value that every sequence of the batch shares, or one for each.
#[derive(Clone, Debug)]
pub enum PerSequence<T> {
    /// All sequences share it.
    Same(T),
    /// Sequence `b` has value `b`.
    Each(Arc<[T]>),
}

impl<T> PerSequence<T> {
    pub(super) fn get(&self, b: usize) -> &T {
        match self {
            PerSequence::Same(value) => value,
            PerSequence::Each(values) => &values[b],
        }
    }
}

/// Position of the first query among the keys, which is negative if it stands before them; none means kv_len - q_len: the last
/// query stands at the last key.
pub type Offset = Option<PerSequence<i64>>;

/// One condition on (sequence, head, query, key), or several combined with `&` and `|`.
///
/// # Examples
///
/// ```
/// use attention_kernels::mask::{PerSequence, Rule, ScoreShape};
///
/// // Causal, and the first sequence holds 2 keys.
/// let causal = Rule::Band { below: None, above: Some(0), offset: None };
/// let lengths = Rule::FirstKeys(PerSequence::Each([2, 4].into()));
/// let rule = causal & lengths;
/// let shape = ScoreShape::from((2, 1, 4, 4));
/// rule.check(&shape)?;
/// assert!(rule.allows(&shape, 0, 0, 3, 1) && !rule.allows(&shape, 0, 0, 3, 2));
/// assert_eq!(rule.visible_keys(&shape, (0, 0), &(0..4), 0..4), 0..2);
/// # Ok::<(), attention_kernels::MaskError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub enum Rule {
    /// Every query may attend to every key.
    #[default]
    Full,
    /// -below <= key - position of the query <= above.
    Band {
        /// How far before the query's position keys may stand; none is no limit.
        below: Option<i64>,
        /// How far behind it.
        above: Option<i64>,
        /// Where the queries stand.
        offset: Offset,
    },
    /// The first keys, as many as the number says.
    FirstKeys(PerSequence<usize>),
    /// Keys of the same document as the query.
    Documents {
        /// The document of every key. A query belongs to the document at its position. Where there is no key, it belongs to none
        /// and may attend to nothing.
        ids: PerSequence<Arc<[u32]>>,
        /// Where the queries stand.
        offset: Offset,
    },
    /// Keys of the same document as the query, for documents that stand one after the other.
    Packed {
        /// Document `d` ends before key `ends[d]`. The ends never decrease.
        ends: Arc<[usize]>,
        /// Where the queries stand. A query belongs to the document at its position; where there is no key, to none.
        offset: Offset,
    },
    /// What a boolean tensor says.
    Table(Arc<Table>),
    /// The last `count` keys are visible to every query, or to none; the rule speaks of those before them.
    Extra {
        /// The rule for the other keys.
        rule: Arc<Rule>,
        /// How many keys there are behind them.
        count: usize,
        /// Whether every query may attend to them.
        visible: bool,
    },
    /// What all of the rules allow: made by `&`.
    Both(Nested),
    /// What any of the rules allows: made by `|`.
    Either(Nested),
    /// A combination of more rules than a rule can hold. It fits no scores.
    TooMany,
}

impl Rule {
    /// Whether every query may attend to every key.
    pub fn is_full(&self) -> bool {
        matches!(self, Rule::Full)
    }

    /// The same rule with the first query of each sequence at position `offset` among the keys.
    pub fn with_offset(self, offset: &PerSequence<i64>) -> Self {
        let all = |parts: &Nested| parts.map(|rule| rule.clone().with_offset(offset));
        match self {
            Rule::Band { below, above, .. } => Rule::Band { below, above, offset: Some(offset.clone()) },
            Rule::Documents { ids, .. } => Rule::Documents { ids, offset: Some(offset.clone()) },
            Rule::Packed { ends, .. } => Rule::Packed { ends, offset: Some(offset.clone()) },
            Rule::Extra { rule, count, visible } => {
                Rule::Extra { rule: Arc::new(rule.as_ref().clone().with_offset(offset)), count, visible }
            }
            Rule::Both(parts) => Rule::Both(all(&parts)),
            Rule::Either(parts) => Rule::Either(all(&parts)),
            other => other,
        }
    }

    /// The same rule with `f` of each of its tables, and of the scores that the table speaks of.
    ///
    /// # Errors
    ///
    /// The first error of `f`.
    pub fn map_tables<F>(&self, shape: &ScoreShape, f: &F) -> Result<Self, MaskError>
    where
        F: Fn(&Arc<Table>, &ScoreShape) -> Result<Arc<Table>, MaskError>,
    {
        Ok(match self {
            Rule::Table(table) => Rule::Table(f(table, shape)?),
            Rule::Extra { rule, count, visible } => {
                let rule = Arc::new(rule.map_tables(&without(shape, *count), f)?);
                Rule::Extra { rule, count: *count, visible: *visible }
            }
            Rule::Both(parts) => Rule::Both(parts.try_map(|rule| rule.map_tables(shape, f))?),
            Rule::Either(parts) => Rule::Either(parts.try_map(|rule| rule.map_tables(shape, f))?),
            other => other.clone(),
        })
    }

    /// Whether the rule may differ between sequences.
    pub fn varies_by_sequence(&self) -> bool {
        match self {
            Rule::Full | Rule::TooMany => false,
            Rule::Band { offset, .. } | Rule::Packed { offset, .. } => matches!(offset, Some(PerSequence::Each(_))),
            Rule::FirstKeys(lengths) => matches!(lengths, PerSequence::Each(_)),
            Rule::Documents { ids, offset } => {
                matches!(ids, PerSequence::Each(_)) || matches!(offset, Some(PerSequence::Each(_)))
            }
            Rule::Table(table) => table.dims[0] != 1,
            Rule::Extra { rule, .. } => rule.varies_by_sequence(),
            Rule::Both(parts) | Rule::Either(parts) => parts.rules().iter().any(Rule::varies_by_sequence),
        }
    }

    /// Whether the rule may differ between heads.
    pub fn varies_by_head(&self) -> bool {
        match self {
            Rule::Table(table) => table.dims[1] != 1,
            Rule::Extra { rule, .. } => rule.varies_by_head(),
            Rule::Both(parts) | Rule::Either(parts) => parts.rules().iter().any(Rule::varies_by_head),
            _ => false,
        }
    }

    /// Whether the rule fits scores of this shape.
    ///
    /// # Errors
    ///
    /// Lengths or offsets for another number of sequences, lengths beyond kv_len, documents of another length, more extra keys
    /// than keys, a table that doesn't broadcast to the scores, more rules than can be combined.
    pub fn check(&self, shape: &ScoreShape) -> Result<(), MaskError> {
        match self {
            Rule::Full | Rule::FirstKeys(PerSequence::Same(_)) => Ok(()),
            Rule::Band { offset, .. } => check_offsets(offset, shape),
            Rule::FirstKeys(PerSequence::Each(lengths)) => check_key_lengths(lengths, shape),
            Rule::Documents { ids, offset } => check_documents(ids, offset, shape),
            Rule::Packed { ends, offset } => {
                check_document_lengths(std::iter::once(ends.last().copied().unwrap_or(0)), shape)?;
                check_offsets(offset, shape)
            }
            Rule::Table(table) => table.check(shape),
            Rule::Extra { count, .. } if *count > shape.kv_len => Err(MaskError {
                part: "extra keys",
                expected: format!("at most kv_len {}", shape.kv_len),
                got: format!("{count}"),
            }),
            Rule::Extra { rule, count, .. } => rule.check(&without(shape, *count)),
            Rule::Both(parts) | Rule::Either(parts) => parts.rules().iter().try_for_each(|rule| rule.check(shape)),
            Rule::TooMany => Err(too_many()),
        }
    }
}

/// Where query `i` of sequence `b` stands among the keys; it may stand before the first of them or behind the last.
pub(super) fn position(shape: &ScoreShape, offset: &Offset, b: usize, i: usize) -> i64 {
    let first = match offset {
        None => signed(shape.kv_len) - signed(shape.q_len),
        Some(offset) => *offset.get(b),
    };
    first.saturating_add(signed(i))
}

/// The positions of the queries `q` of sequence `b` at which there is a key.
pub(super) fn positions(shape: &ScoreShape, offset: &Offset, b: usize, q: &Range<usize>) -> Range<usize> {
    let at_key = |i| position(shape, offset, b, i).clamp(0, signed(shape.kv_len)) as usize;
    at_key(q.start)..at_key(q.end)
}

/// A size as a position; the greatest position if it is beyond.
pub(super) fn signed(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// The scores without those of the last `count` keys.
pub(super) fn without(shape: &ScoreShape, count: usize) -> ScoreShape {
    ScoreShape { kv_len: shape.kv_len.saturating_sub(count), ..*shape }
}

fn check_one_each(part: &'static str, count: usize, shape: &ScoreShape) -> Result<(), MaskError> {
    if count == shape.batch {
        return Ok(());
    }
    let expected = format!("one for each of {} sequences", shape.batch);
    Err(MaskError { part, expected, got: format!("{count}") })
}

fn check_offsets(offset: &Offset, shape: &ScoreShape) -> Result<(), MaskError> {
    match offset {
        Some(PerSequence::Each(offsets)) => check_one_each("offsets", offsets.len(), shape),
        _ => Ok(()),
    }
}

fn check_key_lengths(lengths: &[usize], shape: &ScoreShape) -> Result<(), MaskError> {
    check_one_each("key lengths", lengths.len(), shape)?;
    match lengths.iter().find(|&&len| len > shape.kv_len) {
        None => Ok(()),
        Some(len) => Err(MaskError {
            part: "key lengths",
            expected: format!("at most kv_len {}", shape.kv_len),
            got: format!("{len}"),
        }),
    }
}

fn documents_error<T>(expected: String, got: String) -> Result<T, MaskError> {
    Err(MaskError { part: "documents", expected, got })
}

fn check_documents(ids: &PerSequence<Arc<[u32]>>, offset: &Offset, shape: &ScoreShape) -> Result<(), MaskError> {
    let rows = match ids {
        PerSequence::Same(ids) => std::slice::from_ref(ids),
        PerSequence::Each(rows) if rows.len() == shape.batch => rows,
        PerSequence::Each(rows) => {
            let expected = format!("one row for each of {} sequences", shape.batch);
            return documents_error(expected, format!("{} rows", rows.len()));
        }
    };
    check_document_lengths(rows.iter().map(|row| row.len()), shape)?;
    check_offsets(offset, shape)
}

/// Checks the length of all documents together, in each sequence.
fn check_document_lengths(mut lengths: impl Iterator<Item = usize>, shape: &ScoreShape) -> Result<(), MaskError> {
    match lengths.find(|&len| len != shape.kv_len) {
        None => Ok(()),
        Some(len) => documents_error(format!("documents of {} keys together", shape.kv_len), format!("{len} keys")),
    }
}
