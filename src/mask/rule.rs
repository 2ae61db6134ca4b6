//! The rules a mask is made of, and their answers for one score and for a tile of scores.

use std::ops::Range;
use std::sync::Arc;

use super::table::Table;
use super::{Coverage, ScoreShape};
use crate::error::AttentionError;

/// A value that every sequence of the batch shares, or one for each.
#[derive(Clone, Debug)]
pub(crate) enum PerSequence<T> {
    Same(T),
    Each(Arc<[T]>),
}

impl<T> PerSequence<T> {
    fn get(&self, b: usize) -> &T {
        match self {
            PerSequence::Same(value) => value,
            PerSequence::Each(values) => &values[b],
        }
    }
}

/// Position of the first query among the keys; none means kv_len - q_len.
pub(crate) type Offset = Option<PerSequence<usize>>;

/// One condition on (sequence, head, query, key), or two combined.
#[derive(Clone, Debug, Default)]
pub(crate) enum Rule {
    #[default]
    Full,
    /// -below <= key - position of the query <= above.
    Band {
        below: Option<i64>,
        above: Option<i64>,
        offset: Offset,
    },
    FirstKeys(PerSequence<usize>),
    /// The document of every key. A query belongs to the document at its position.
    Documents {
        ids: PerSequence<Arc<[u32]>>,
        offset: Offset,
    },
    Table(Arc<Table>),
    /// The last `count` keys are seen by every query; the rule speaks of those before them.
    Extra {
        rule: Arc<Rule>,
        count: usize,
    },
    Both(Arc<(Rule, Rule)>),
    Either(Arc<(Rule, Rule)>),
}

impl Rule {
    pub(super) fn with_offset(self, offset: &PerSequence<usize>) -> Self {
        let both =
            |pair: &(Rule, Rule)| Arc::new((pair.0.clone().with_offset(offset), pair.1.clone().with_offset(offset)));
        match self {
            Rule::Band { below, above, .. } => Rule::Band { below, above, offset: Some(offset.clone()) },
            Rule::Documents { ids, .. } => Rule::Documents { ids, offset: Some(offset.clone()) },
            Rule::Extra { rule, count } => {
                Rule::Extra { rule: Arc::new(rule.as_ref().clone().with_offset(offset)), count }
            }
            Rule::Both(pair) => Rule::Both(both(&pair)),
            Rule::Either(pair) => Rule::Either(both(&pair)),
            other => other,
        }
    }

    pub(super) fn varies_by_sequence(&self) -> bool {
        match self {
            Rule::Full => false,
            Rule::Band { offset, .. } => matches!(offset, Some(PerSequence::Each(_))),
            Rule::FirstKeys(lengths) => matches!(lengths, PerSequence::Each(_)),
            Rule::Documents { ids, offset } => {
                matches!(ids, PerSequence::Each(_)) || matches!(offset, Some(PerSequence::Each(_)))
            }
            Rule::Table(table) => table.dims[0] != 1,
            Rule::Extra { rule, .. } => rule.varies_by_sequence(),
            Rule::Both(pair) | Rule::Either(pair) => pair.0.varies_by_sequence() || pair.1.varies_by_sequence(),
        }
    }

    pub(super) fn varies_by_head(&self) -> bool {
        match self {
            Rule::Table(table) => table.dims[1] != 1,
            Rule::Extra { rule, .. } => rule.varies_by_head(),
            Rule::Both(pair) | Rule::Either(pair) => pair.0.varies_by_head() || pair.1.varies_by_head(),
            _ => false,
        }
    }

    pub(crate) fn check(&self, shape: &ScoreShape) -> Result<(), AttentionError> {
        match self {
            Rule::Full | Rule::FirstKeys(PerSequence::Same(_)) => Ok(()),
            Rule::Band { offset, .. } => check_offsets(offset, shape),
            Rule::FirstKeys(PerSequence::Each(lengths)) => check_key_lengths(lengths, shape),
            Rule::Documents { ids, offset } => check_documents(ids, offset, shape),
            Rule::Table(table) => table.check(shape),
            Rule::Extra { count, .. } if *count > shape.kv_len => Err(AttentionError::Mask {
                part: "extra keys",
                expected: format!("at most kv_len {}", shape.kv_len),
                got: format!("{count}"),
            }),
            Rule::Extra { rule, count } => rule.check(&without(shape, *count)),
            Rule::Both(pair) | Rule::Either(pair) => pair.0.check(shape).and_then(|()| pair.1.check(shape)),
        }
    }

    /// Whether query `i` of head `h` of sequence `b` may attend to key `j`. The shape has been checked.
    pub(super) fn allows(&self, shape: &ScoreShape, b: usize, h: usize, i: usize, j: usize) -> bool {
        match self {
            Rule::Full => true,
            Rule::Band { below, above, offset } => {
                let distance = j as i64 - position(shape, offset, b, i);
                below.is_none_or(|below| distance >= -below) && above.is_none_or(|above| distance <= above)
            }
            Rule::FirstKeys(lengths) => j < *lengths.get(b),
            Rule::Documents { ids, offset } => {
                let ids = ids.get(b);
                ids[j] == ids[position(shape, offset, b, i) as usize]
            }
            Rule::Table(table) => table.get(b, h, i, j),
            Rule::Extra { rule, count } => {
                let shape = without(shape, *count);
                j >= shape.kv_len || rule.allows(&shape, b, h, i, j)
            }
            Rule::Both(pair) => pair.0.allows(shape, b, h, i, j) && pair.1.allows(shape, b, h, i, j),
            Rule::Either(pair) => pair.0.allows(shape, b, h, i, j) || pair.1.allows(shape, b, h, i, j),
        }
    }

    /// How much of a tile, which isn't empty, is let through. The shape has been checked.
    pub(crate) fn tile(&self, shape: &ScoreShape, at: (usize, usize), q: &Range<usize>, k: &Range<usize>) -> Coverage {
        match self {
            Rule::Full => Coverage::All,
            Rule::Band { below, above, offset } => {
                let (first, last) = (position(shape, offset, at.0, q.start), position(shape, offset, at.0, q.end - 1));
                // key - position is least at the bottom left of the tile and greatest at its top right.
                let (least, greatest) = (k.start as i64 - last, (k.end - 1) as i64 - first);
                interval(least, greatest, below.map_or(i64::MIN, |below| -below), above.unwrap_or(i64::MAX))
            }
            Rule::FirstKeys(lengths) => match *lengths.get(at.0) {
                len if k.end <= len => Coverage::All,
                len if k.start >= len => Coverage::None,
                _ => Coverage::Some,
            },
            Rule::Documents { ids, offset } => {
                let start = position(shape, offset, at.0, q.start) as usize;
                documents_tile(ids.get(at.0), start..start + q.len(), k.clone())
            }
            Rule::Table(table) => table.tile(at, q, k),
            Rule::Extra { rule, count } => {
                let shape = without(shape, *count);
                let (others, extra) = split(k, shape.kv_len);
                match (others.is_empty(), extra.is_empty()) {
                    (true, _) => Coverage::All,
                    (false, true) => rule.tile(&shape, at, q, &others),
                    (false, false) => match rule.tile(&shape, at, q, &others) {
                        Coverage::All => Coverage::All,
                        _ => Coverage::Some,
                    },
                }
            }
            Rule::Both(pair) => match (pair.0.tile(shape, at, q, k), pair.1.tile(shape, at, q, k)) {
                (Coverage::None, _) | (_, Coverage::None) => Coverage::None,
                (Coverage::All, Coverage::All) => Coverage::All,
                _ => Coverage::Some,
            },
            Rule::Either(pair) => match (pair.0.tile(shape, at, q, k), pair.1.tile(shape, at, q, k)) {
                (Coverage::All, _) | (_, Coverage::All) => Coverage::All,
                (Coverage::None, Coverage::None) => Coverage::None,
                _ => Coverage::Some,
            },
        }
    }
}

impl Rule {
    /// The part of `k` outside which no query of `q` may attend to any key. Inside it some still may not.
    pub(crate) fn hull(
        &self,
        shape: &ScoreShape,
        at: (usize, usize),
        q: &Range<usize>,
        k: Range<usize>,
    ) -> Range<usize> {
        match self {
            Rule::Full => k,
            Rule::Band { below, above, offset } => {
                let (first, last) = (position(shape, offset, at.0, q.start), position(shape, offset, at.0, q.end - 1));
                let within = |key: i64| key.clamp(k.start as i64, k.end as i64) as usize;
                let start = below.map_or(k.start, |below| within(first.saturating_sub(below)));
                start..above.map_or(k.end, |above| within(last.saturating_add(above).saturating_add(1))).max(start)
            }
            Rule::FirstKeys(lengths) => k.start..k.end.min(*lengths.get(at.0)).max(k.start),
            Rule::Documents { ids, offset } => {
                let (ids, start) = (ids.get(at.0), position(shape, offset, at.0, q.start) as usize);
                let (low, high) = extremes(&ids[start..start + q.len()]);
                trim(k, |key| (low..=high).contains(&ids[key]))
            }
            Rule::Table(table) => trim(k, |key| table.is_seen(at, q, key)),
            Rule::Extra { rule, count } => {
                let shape = without(shape, *count);
                let (others, extra) = split(&k, shape.kv_len);
                let seen = rule.hull(&shape, at, q, others);
                match (seen.is_empty(), extra.is_empty()) {
                    (_, true) => seen,
                    (true, false) => extra,
                    (false, false) => seen.start..extra.end,
                }
            }
            Rule::Both(pair) => pair.1.hull(shape, at, q, pair.0.hull(shape, at, q, k)),
            Rule::Either(pair) => match (pair.0.hull(shape, at, q, k.clone()), pair.1.hull(shape, at, q, k)) {
                (a, b) if a.is_empty() => b,
                (a, b) if b.is_empty() => a,
                (a, b) => a.start.min(b.start)..a.end.max(b.end),
            },
        }
    }

    /// Calls `hide` with the queries, out of `q`, that may not attend to key `j`, in one or more ranges.
    pub(crate) fn hidden(
        &self,
        shape: &ScoreShape,
        at: (usize, usize),
        q: &Range<usize>,
        j: usize,
        hide: &mut dyn FnMut(Range<usize>),
    ) {
        match self {
            Rule::Full => {}
            Rule::Band { below, above, offset } => {
                // Query i may attend if -below <= j - (first + i) <= above.
                let nearest = j as i64 - position(shape, offset, at.0, 0);
                let within = |i: i64| i.clamp(q.start as i64, q.end as i64) as usize;
                let from = above.map_or(q.start, |above| within(nearest.saturating_sub(above)));
                let to = below.map_or(q.end, |below| within(nearest.saturating_add(below).saturating_add(1)));
                let to = to.max(from);
                for hidden in [q.start..from, to..q.end] {
                    if !hidden.is_empty() {
                        hide(hidden);
                    }
                }
            }
            Rule::Both(pair) => {
                pair.0.hidden(shape, at, q, j, hide);
                pair.1.hidden(shape, at, q, j, hide);
            }
            Rule::Table(table) => table.hidden(at, q, j, hide),
            Rule::Extra { rule, count } => {
                let shape = without(shape, *count);
                if j < shape.kv_len {
                    rule.hidden(&shape, at, q, j, hide);
                }
            }
            _ => {
                for i in q.clone().filter(|&i| !self.allows(shape, at.0, at.1, i, j)) {
                    hide(i..i + 1);
                }
            }
        }
    }
}

/// Where query `i` of sequence `b` stands among the keys; before the first of them if there are more queries than keys.
fn position(shape: &ScoreShape, offset: &Offset, b: usize, i: usize) -> i64 {
    let first = match offset {
        None => shape.kv_len as i64 - shape.q_len as i64,
        Some(offset) => i64::try_from(*offset.get(b)).unwrap_or(i64::MAX),
    };
    first.saturating_add(i as i64)
}

/// The scores without those of the last `count` keys.
fn without(shape: &ScoreShape, count: usize) -> ScoreShape {
    ScoreShape { kv_len: shape.kv_len - count, ..*shape }
}

/// The parts of `k` before `place` and from there on.
fn split(k: &Range<usize>, place: usize) -> (Range<usize>, Range<usize>) {
    (k.start.min(place)..k.end.min(place), k.start.max(place)..k.end.max(place))
}

/// How much of the values `from..=to`, each of which occurs, lies in `lowest..=highest`.
fn interval(from: i64, to: i64, lowest: i64, highest: i64) -> Coverage {
    if from >= lowest && to <= highest {
        Coverage::All
    } else if to < lowest || from > highest || lowest > highest {
        Coverage::None
    } else {
        Coverage::Some
    }
}

/// `range` without what `is_seen` says no to at its ends.
fn trim(mut range: Range<usize>, is_seen: impl Fn(usize) -> bool) -> Range<usize> {
    while !range.is_empty() && !is_seen(range.start) {
        range.start += 1;
    }
    while !range.is_empty() && !is_seen(range.end - 1) {
        range.end -= 1;
    }
    range
}

fn extremes(ids: &[u32]) -> (u32, u32) {
    ids.iter().fold((u32::MAX, 0), |(low, high), &id| (id.min(low), id.max(high)))
}

fn documents_tile(ids: &[u32], queries: Range<usize>, keys: Range<usize>) -> Coverage {
    let (q_low, q_high) = extremes(&ids[queries]);
    let (k_low, k_high) = extremes(&ids[keys]);
    if q_high < k_low || k_high < q_low {
        Coverage::None
    } else if q_low == q_high && (q_low, q_high) == (k_low, k_high) {
        Coverage::All
    } else {
        Coverage::Some
    }
}

fn check_one_each(part: &'static str, count: usize, shape: &ScoreShape) -> Result<(), AttentionError> {
    if count == shape.batch {
        return Ok(());
    }
    let expected = format!("one for each of {} sequences", shape.batch);
    Err(AttentionError::Mask { part, expected, got: format!("{count}") })
}

fn check_offsets(offset: &Offset, shape: &ScoreShape) -> Result<(), AttentionError> {
    match offset {
        Some(PerSequence::Each(offsets)) => check_one_each("offsets", offsets.len(), shape),
        _ => Ok(()),
    }
}

fn check_key_lengths(lengths: &[usize], shape: &ScoreShape) -> Result<(), AttentionError> {
    check_one_each("key lengths", lengths.len(), shape)?;
    match lengths.iter().find(|&&len| len > shape.kv_len) {
        None => Ok(()),
        Some(len) => Err(AttentionError::Mask {
            part: "key lengths",
            expected: format!("at most kv_len {}", shape.kv_len),
            got: format!("{len}"),
        }),
    }
}

fn check_documents(ids: &PerSequence<Arc<[u32]>>, offset: &Offset, shape: &ScoreShape) -> Result<(), AttentionError> {
    let error = |expected, got| Err(AttentionError::Mask { part: "documents", expected, got });
    let rows = match ids {
        PerSequence::Same(ids) => std::slice::from_ref(ids),
        PerSequence::Each(rows) if rows.len() == shape.batch => rows,
        PerSequence::Each(rows) => {
            return error(format!("one row for each of {} sequences", shape.batch), format!("{} rows", rows.len()));
        }
    };
    if let Some(row) = rows.iter().find(|row| row.len() != shape.kv_len) {
        return error(format!("documents of {} keys together", shape.kv_len), format!("{} keys", row.len()));
    }
    check_offsets(offset, shape)?;
    let alike = !matches!(offset, Some(PerSequence::Each(_)));
    for b in 0..if alike { 1 } else { shape.batch } {
        let (first, end) = (position(shape, offset, b, 0), position(shape, offset, b, shape.q_len));
        if first < 0 || end > shape.kv_len as i64 {
            return error(format!("queries at positions 0 to {}", shape.kv_len), format!("positions {first} to {end}"));
        }
    }
    Ok(())
}
