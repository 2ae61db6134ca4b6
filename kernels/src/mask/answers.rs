//! What rules say of one score and of a tile of scores.
//!
//! The rule has to fit the shape ([`Rule::check`]), and queries and keys have to lie in it. If not, these functions may
//! panic or answer wrongly, and do nothing worse.

use std::ops::Range;

use super::documents::{self, documents_of, whole_documents};
use super::rule::{position, positions, signed, without};
use super::{Coverage, Rule, ScoreShape};

impl Rule {
    /// Whether query `i` of head `h` of sequence `b` may attend to key `j`.
    ///
    /// # Panics
    ///
    /// It may panic if there is no such score, or the rule doesn't fit the shape ([`Rule::check`]).
    pub fn allows(&self, shape: &ScoreShape, b: usize, h: usize, i: usize, j: usize) -> bool {
        match self {
            Rule::Full => true,
            Rule::Band { below, above, offset } => {
                let distance = signed(j).saturating_sub(position(shape, offset, b, i));
                below.is_none_or(|below| distance >= below.saturating_neg())
                    && above.is_none_or(|above| distance <= above)
            }
            Rule::FirstKeys(lengths) => j < *lengths.get(b),
            Rule::Documents { ids, offset } => {
                let ids = ids.get(b);
                ids[positions(shape, offset, b, &(i..i + 1))].iter().any(|&id| id == ids[j])
            }
            Rule::Packed { ends, offset } => {
                let query = positions(shape, offset, b, &(i..i + 1));
                !query.is_empty() && whole_documents(ends, query).contains(&j)
            }
            Rule::Table(table) => table.get(b, h, i, j),
            Rule::Extra { rule, count, visible } => {
                let shape = without(shape, *count);
                if j >= shape.kv_len { *visible } else { rule.allows(&shape, b, h, i, j) }
            }
            Rule::Both(parts) => parts.rules().iter().all(|rule| rule.allows(shape, b, h, i, j)),
            Rule::Either(parts) => parts.rules().iter().any(|rule| rule.allows(shape, b, h, i, j)),
            Rule::TooMany => false,
        }
    }

    /// How much of the tile `q` x `k` of head `at.1` of sequence `at.0` is visible: [`Coverage::None`] of an empty tile. `All` and
    /// `None` are certain. `Some` is also the answer for a tile of which the rest is too costly to tell.
    ///
    /// # Panics
    ///
    /// If the tile is outside the scores. It may panic if the rule doesn't fit the shape ([`Rule::check`]).
    pub fn tile(&self, shape: &ScoreShape, at: (usize, usize), q: &Range<usize>, k: &Range<usize>) -> Coverage {
        let is_inside = at.0 < shape.batch && at.1 < shape.num_heads && q.end <= shape.q_len && k.end <= shape.kv_len;
        assert!(is_inside, "expected a tile inside {shape:?}, got sequence and head {at:?}, queries {q:?}, keys {k:?}");
        if q.is_empty() || k.is_empty() { Coverage::None } else { self.coverage(shape, at, q, k) }
    }

    /// [`Rule::tile`] of a tile that isn't empty and lies inside the scores.
    fn coverage(&self, shape: &ScoreShape, at: (usize, usize), q: &Range<usize>, k: &Range<usize>) -> Coverage {
        match self {
            Rule::Full => Coverage::All,
            Rule::Band { below, above, offset } => {
                let (first, last) = (position(shape, offset, at.0, q.start), position(shape, offset, at.0, q.end - 1));
                // key - position is least at the bottom left of the tile and greatest at its top right.
                let least = signed(k.start).saturating_sub(last);
                let greatest = signed(k.end - 1).saturating_sub(first);
                interval(least, greatest, below.map_or(i64::MIN, i64::saturating_neg), above.unwrap_or(i64::MAX))
            }
            Rule::FirstKeys(lengths) => match *lengths.get(at.0) {
                len if k.end <= len => Coverage::All,
                len if k.start >= len => Coverage::None,
                _ => Coverage::Some,
            },
            Rule::Documents { ids, offset } => {
                let queries = positions(shape, offset, at.0, q);
                let ids = ids.get(at.0);
                let of_documents = || documents::coverage(extremes(&ids[queries.clone()]), extremes(&ids[k.clone()]));
                at_keys(&queries, q, of_documents)
            }
            Rule::Packed { ends, offset } => {
                let queries = positions(shape, offset, at.0, q);
                let of_documents =
                    || documents::coverage(documents_of(ends, queries.clone()), documents_of(ends, k.clone()));
                at_keys(&queries, q, of_documents)
            }
            Rule::Table(table) => table.tile(at, q, k),
            Rule::Extra { rule, count, visible } => {
                let shape = without(shape, *count);
                let (others, extra) = split(k, shape.kv_len);
                let of_extra = if *visible { Coverage::All } else { Coverage::None };
                match (others.is_empty(), extra.is_empty()) {
                    (true, _) => of_extra,
                    (false, true) => rule.coverage(&shape, at, q, &others),
                    (false, false) => match rule.coverage(&shape, at, q, &others) {
                        coverage if coverage == of_extra => coverage,
                        _ => Coverage::Some,
                    },
                }
            }
            Rule::Both(parts) => {
                let mut coverages = parts.rules().iter().map(|rule| rule.coverage(shape, at, q, k));
                combined(&mut coverages, Coverage::None, Coverage::All)
            }
            Rule::Either(parts) => {
                let mut coverages = parts.rules().iter().map(|rule| rule.coverage(shape, at, q, k));
                combined(&mut coverages, Coverage::All, Coverage::None)
            }
            Rule::TooMany => Coverage::None,
        }
    }
}

impl Rule {
    /// The part of `k` outside which no query of `q` may attend to any key. Inside it some may still be hidden.
    ///
    /// # Panics
    ///
    /// It may panic if `q` is empty or lies outside the scores, or the rule doesn't fit the shape ([`Rule::check`]).
    pub fn visible_keys(
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
                let within = |key: i64| key.clamp(signed(k.start), signed(k.end)) as usize;
                let start = below.map_or(k.start, |below| within(first.saturating_sub(below)));
                start..above.map_or(k.end, |above| within(last.saturating_add(above).saturating_add(1))).max(start)
            }
            Rule::FirstKeys(lengths) => k.start..k.end.min(*lengths.get(at.0)).max(k.start),
            Rule::Documents { ids, offset } => {
                let ids = ids.get(at.0);
                let (low, high) = extremes(&ids[positions(shape, offset, at.0, q)]);
                trim(k, |key| (low..=high).contains(&ids[key]))
            }
            Rule::Packed { ends, offset } => {
                let queries = positions(shape, offset, at.0, q);
                let keys = if queries.is_empty() { queries } else { whole_documents(ends, queries) };
                keys.start.clamp(k.start, k.end)..keys.end.clamp(k.start, k.end)
            }
            Rule::Table(table) => trim(k, |key| table.is_seen(at, q, key)),
            Rule::Extra { rule, count, visible } => {
                let shape = without(shape, *count);
                let (others, extra) = split(&k, shape.kv_len);
                let none = k.start..k.start;
                let seen = if others.is_empty() { none } else { rule.visible_keys(&shape, at, q, others) };
                match (seen.is_empty(), extra.is_empty() || !visible) {
                    (_, true) => seen,
                    (true, false) => extra,
                    (false, false) => seen.start..extra.end,
                }
            }
            Rule::Both(parts) => parts.rules().iter().fold(k, |k, rule| rule.visible_keys(shape, at, q, k)),
            Rule::Either(parts) => {
                let seen = parts.rules().iter().map(|rule| rule.visible_keys(shape, at, q, k.clone()));
                let seen = seen.filter(|keys| !keys.is_empty());
                seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(k.start..k.start)
            }
            Rule::TooMany => k.start..k.start,
        }
    }

    /// Calls `hide` with the queries, out of `q`, that may not attend to key `j`, in any number of ranges.
    ///
    /// # Panics
    ///
    /// It may panic if `q` or `j` lies outside the scores, or the rule doesn't fit the shape ([`Rule::check`]).
    pub fn hidden(
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
                let nearest = signed(j).saturating_sub(position(shape, offset, at.0, 0));
                let within = |i: i64| i.clamp(signed(q.start), signed(q.end)) as usize;
                let from = above.map_or(q.start, |above| within(nearest.saturating_sub(above)));
                let to = below.map_or(q.end, |below| within(nearest.saturating_add(below).saturating_add(1)));
                hide_others(q, from..to, hide);
            }
            Rule::Packed { ends, offset } => {
                let first = position(shape, offset, at.0, 0);
                let seen = whole_documents(ends, j..j + 1);
                let query_at = |position: usize| signed(position).saturating_sub(first);
                let within = |position| query_at(position).clamp(signed(q.start), signed(q.end)) as usize;
                hide_others(q, within(seen.start)..within(seen.end), hide);
            }
            Rule::Both(parts) => parts.rules().iter().for_each(|rule| rule.hidden(shape, at, q, j, hide)),
            Rule::Table(table) => table.hidden(at, q, j, hide),
            Rule::Extra { rule, count, visible } => {
                let shape = without(shape, *count);
                if j < shape.kv_len {
                    rule.hidden(&shape, at, q, j, hide);
                } else if !visible {
                    hide(q.clone());
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

/// The parts of `k` before `boundary` and from there on.
fn split(k: &Range<usize>, boundary: usize) -> (Range<usize>, Range<usize>) {
    (k.start.min(boundary)..k.end.min(boundary), k.start.max(boundary)..k.end.max(boundary))
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

/// Hides all of `q` but the queries in `seen`.
fn hide_others(q: &Range<usize>, seen: Range<usize>, hide: &mut dyn FnMut(Range<usize>)) {
    for hidden in [q.start..seen.start, seen.end.max(seen.start)..q.end] {
        if !hidden.is_empty() {
            hide(hidden);
        }
    }
}

/// The coverage of a tile whose queries `q` are at the positions `queries`, out of those that have a key. `coverage` is that of
/// these. The others see nothing.
fn at_keys(queries: &Range<usize>, q: &Range<usize>, coverage: impl FnOnce() -> Coverage) -> Coverage {
    if queries.is_empty() {
        return Coverage::None;
    }
    match coverage() {
        Coverage::All if queries.len() < q.len() => Coverage::Some,
        coverage => coverage,
    }
}

/// The coverage of several rules together: `decisive` if one of them has it, `neutral` if all have that.
fn combined(coverages: &mut dyn Iterator<Item = Coverage>, decisive: Coverage, neutral: Coverage) -> Coverage {
    let mut coverage = neutral;
    for of_rule in coverages {
        if of_rule == decisive {
            return decisive;
        }
        if of_rule != neutral {
            coverage = Coverage::Some;
        }
    }
    coverage
}

/// The least and the greatest of these ids.
fn extremes(ids: &[u32]) -> (u32, u32) {
    ids.iter().fold((u32::MAX, 0), |(low, high), &id| (id.min(low), id.max(high)))
}

#[cfg(test)]
#[path = "answers_tests.rs"]
pub(super) mod tests;
