use std::ops::Range;
use std::sync::Arc;

use super::*;
use crate::mask::{PerSequence, Table};
use crate::philox::uniform;

fn causal() -> Rule {
    band(None, Some(0))
}

fn band(below: Option<i64>, above: Option<i64>) -> Rule {
    Rule::Band { below, above, offset: None }
}

fn documents(lengths: &[usize]) -> Rule {
    let ids = lengths.iter().zip(0u32..).flat_map(|(&len, id)| std::iter::repeat_n(id, len));
    Rule::Documents { ids: PerSequence::Same(ids.collect()), offset: None }
}

/// The same as [`documents`], by their ends.
fn packed(lengths: &[usize]) -> Rule {
    let ends = lengths.iter().scan(0, |end, len| {
        *end += len;
        Some(*end)
    });
    Rule::Packed { ends: ends.collect(), offset: None }
}

fn table(dims: [usize; 4], seed: u64) -> Rule {
    let allowed = uniform(seed, 1.0, dims.iter().product()).map(|x| x > 0.3).collect();
    Rule::Table(Arc::new(Table::new(dims, allowed).unwrap()))
}

/// Rules that fit the shape, and whether [`Rule::tile`] must tell a uniform tile from a mixed one.
fn rules(shape: ScoreShape) -> Vec<(Rule, bool)> {
    let ScoreShape { batch, num_heads, q_len, kv_len } = shape;
    let mut exact = vec![Rule::Full, causal(), Rule::FirstKeys(PerSequence::Same(2))];
    let sides = [None, Some(0), Some(1), Some(6), Some(i64::MAX)];
    exact.extend(sides.iter().flat_map(|&below| sides.map(|above| band(below, above))));
    exact.extend([band(Some(-1), Some(3)), band(Some(i64::MIN), Some(i64::MAX)), band(Some(0), Some(i64::MIN))]);
    exact.push(Rule::FirstKeys(PerSequence::Each((0..batch).map(|b| kv_len * b / 2).collect())));
    for axes in 0..16usize {
        let dims = [batch, num_heads, q_len, kv_len];
        exact.push(table(std::array::from_fn(|axis| if axes >> axis & 1 == 1 { dims[axis] } else { 1 }), axes as u64));
    }
    let ids: Vec<Arc<[u32]>> = (0..batch).map(|b| (0..kv_len).map(|j| (j * (b + 2) % 3) as u32).collect()).collect();
    let halves = [kv_len / 2, 0, kv_len - kv_len / 2];
    let mut coarse = vec![documents(&halves), packed(&halves)];
    for offset in [0, 1, 7, -1, -4, i64::MIN, i64::MAX] {
        exact.push(causal().with_offset(&PerSequence::Same(offset)));
        let each = PerSequence::Each((0..batch).map(|b| offset.saturating_add(b as i64)).collect());
        exact.push(band(Some(1), Some(1)).with_offset(&each));
        coarse.push(packed(&[0, kv_len / 2, 0, kv_len - kv_len / 2, 0]).with_offset(&each));
        coarse.push(Rule::Documents { ids: PerSequence::Each(ids.as_slice().into()), offset: Some(each) });
    }
    let samples = [exact[0].clone(), causal(), exact[2].clone(), exact[34].clone(), exact[40].clone()];
    let samples = samples.into_iter().chain(coarse.iter().step_by(3).cloned()).collect::<Vec<_>>();
    for a in &samples {
        coarse.extend(samples.iter().flat_map(|b| [a.clone() & b.clone(), a.clone() | b.clone()]));
    }
    let mut all: Vec<_> = exact.into_iter().map(|rule| (rule, true)).collect();
    all.extend(coarse.into_iter().map(|rule| (rule, false)));
    all
}

/// Small shapes, with more queries than keys and fewer.
fn shapes() -> Vec<ScoreShape> {
    let lengths = [(1, 1), (1, 5), (3, 5), (5, 5), (4, 2)];
    let of = |(batch, num_heads)| lengths.map(|(q, k)| ScoreShape::from((batch, num_heads, q, k)));
    [(1, 1), (2, 2)].into_iter().flat_map(of).collect()
}

fn ranges(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).flat_map(move |start| (start + 1..=len).map(move |end| start..end))
}

/// Calls `f` with every rule, shape and head.
pub(crate) fn for_all(f: impl Fn(&Rule, bool, &ScoreShape, (usize, usize))) {
    for shape in shapes() {
        let mut all = rules(shape);
        for count in 1..=2.min(shape.kv_len) {
            let before = ScoreShape { kv_len: shape.kv_len - count, ..shape };
            if before.kv_len > 0 {
                let before = rules(before).into_iter().step_by(3).zip([true, false].into_iter().cycle());
                all.extend(before.map(|((rule, exact), visible)| (rule.with_extra_keys(count, visible), exact)));
            }
        }
        for (rule, exact) in all {
            rule.check(&shape).unwrap();
            (0..shape.batch * shape.num_heads)
                .for_each(|h| f(&rule, exact, &shape, (h / shape.num_heads, h % shape.num_heads)));
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "no unsafe code, many cases")]
fn tile_follows_the_definition_and_is_exact_for_single_rules() {
    for_all(|rule, exact, shape, (b, h)| {
        for queries in ranges(shape.q_len) {
            for keys in ranges(shape.kv_len) {
                let says = rule.tile(shape, (b, h), &queries, &keys);
                let allowed = |i| keys.clone().filter(|&j| rule.allows(shape, b, h, i, j)).count();
                let certain = match queries.clone().map(allowed).sum::<usize>() {
                    0 => Coverage::None,
                    all if all == queries.len() * keys.len() => Coverage::All,
                    _ => Coverage::Some,
                };
                let place = || format!("{rule:?} over {shape:?}, head {b}, {h}, {queries:?} x {keys:?}");
                assert!(says == certain || says == Coverage::Some && !exact, "{}: {says:?}, not {certain:?}", place());
            }
        }
    });
}

#[test]
#[cfg_attr(miri, ignore = "no unsafe code, many cases")]
fn no_key_outside_the_visible_ones_is_allowed() {
    for_all(|rule, _, shape, (b, h)| {
        for queries in ranges(shape.q_len) {
            for keys in ranges(shape.kv_len) {
                let visible = rule.visible_keys(shape, (b, h), &queries, keys.clone());
                assert!(keys.start <= visible.start && visible.start <= visible.end && visible.end <= keys.end);
                let hidden = keys.clone().filter(|key| !visible.contains(key));
                let is_allowed = |j: usize| queries.clone().any(|i| rule.allows(shape, b, h, i, j));
                assert!(!hidden.into_iter().any(is_allowed), "{rule:?} over {shape:?}, {queries:?} x {keys:?}");
            }
        }
    });
}

#[test]
#[cfg_attr(miri, ignore = "no unsafe code, many cases")]
fn hidden_queries_are_those_that_arent_allowed() {
    for_all(|rule, _, shape, (b, h)| {
        for queries in ranges(shape.q_len) {
            for j in 0..shape.kv_len {
                let mut hidden = vec![false; shape.q_len];
                rule.hidden(shape, (b, h), &queries, j, &mut |range| hidden[range].fill(true));
                for (i, &hidden) in hidden.iter().enumerate() {
                    let expected = queries.contains(&i) && !rule.allows(shape, b, h, i, j);
                    // Two rules may hide a query only together with `allows`.
                    assert_eq!(hidden, expected, "{rule:?} over {shape:?}, {queries:?}, key {j}, query {i}");
                }
            }
        }
    });
}

/// A causal mask over packed documents is what training uses; tiles off the diagonal must cost nothing.
#[test]
fn tile_between_two_documents_is_none() {
    let (rule, shape) = (documents(&[4, 4]) & causal(), ScoreShape::from((1, 1, 8, 8)));
    let tile = |queries, keys| rule.tile(&shape, (0, 0), &queries, &keys);
    assert_eq!(tile(4..8, 0..4), Coverage::None);
    assert_eq!(tile(0..4, 4..8), Coverage::None);
    assert_eq!(tile(4..8, 4..5), Coverage::All);
    assert_eq!(tile(4..8, 4..8), Coverage::Some);
}

#[test]
fn tile_without_area_is_none() {
    let shape = ScoreShape::from((1, 1, 3, 3));
    for rule in
        [Rule::Full, causal(), documents(&[2, 1]), causal().with_extra_keys(1, true), causal() | documents(&[2, 1])]
    {
        for (queries, keys) in [(0..0, 0..3), (1..3, 2..2), (2..2, 1..1)] {
            assert_eq!(rule.tile(&shape, (0, 0), &queries, &keys), Coverage::None, "{rule:?}");
        }
    }
}

#[test]
fn tile_outside_the_scores_is_refused() {
    let shape = ScoreShape::from((2, 2, 3, 5));
    for (at, queries, keys) in [
        ((2, 0), 0..1, 0..1),
        ((0, 2), 0..1, 0..1),
        ((0, 0), 0..4, 0..1),
        ((0, 0), 0..1, 4..6),
        ((0, 0), 0..usize::MAX, 0..1),
    ] {
        let message = std::panic::catch_unwind(|| causal().tile(&shape, at, &queries, &keys)).unwrap_err();
        let message = message.downcast_ref::<String>().expect("a message");
        let got = format!("got sequence and head {at:?}, queries {queries:?}, keys {keys:?}");
        assert!(message.contains("expected a tile inside ScoreShape") && message.contains(&got), "{message}");
    }
}

#[test]
fn band_beyond_all_positions_saturates() {
    let shape = ScoreShape { batch: 1, num_heads: 1, q_len: usize::MAX, kv_len: usize::MAX };
    for rule in [band(Some(i64::MIN), Some(i64::MIN)), band(Some(i64::MAX), Some(i64::MAX)), causal()] {
        for rule in [
            rule.clone(),
            rule.clone().with_offset(&PerSequence::Same(i64::MAX)),
            rule.with_offset(&PerSequence::Same(i64::MIN)),
        ] {
            let (q, k) = (usize::MAX - 2..usize::MAX, 3..usize::MAX);
            rule.check(&shape).unwrap();
            rule.allows(&shape, 0, 0, usize::MAX - 1, usize::MAX - 1);
            rule.tile(&shape, (0, 0), &q, &k);
            rule.visible_keys(&shape, (0, 0), &q, k);
            rule.hidden(&shape, (0, 0), &q, usize::MAX - 1, &mut |_| {});
        }
    }
}

#[test]
fn rules_that_dont_fit_are_refused() {
    let shape = ScoreShape::from((2, 2, 3, 5));
    let offsets = PerSequence::Each([1i64].into());
    for (rule, part, got) in [
        (Rule::FirstKeys(PerSequence::Each([5, 5, 5].into())), "key lengths", "3"),
        (Rule::FirstKeys(PerSequence::Each([5, 6].into())), "key lengths", "6"),
        (documents(&[2, 2]), "documents", "4 keys"),
        (packed(&[2, 2]), "documents", "4 keys"),
        (packed(&[]), "documents", "0 keys"),
        (causal().with_offset(&offsets), "offsets", "1"),
        (table([2, 2, 3, 4], 1), "tensor", "[2, 2, 3, 4]"),
        (causal().with_extra_keys(6, true), "extra keys", "6"),
        (causal() & documents(&[5]).with_extra_keys(1, true), "documents", "5 keys"),
    ] {
        let error = rule.check(&shape).unwrap_err();
        assert!(error.part == part && error.got.contains(got), "{error}");
    }
    assert!(Table::new([1, 2, 3, 4], vec![true; 23]).is_err());
    assert!(Table::new([usize::MAX, 2, 3, 4], vec![true; 24]).is_err());
}

#[test]
fn query_where_no_key_stands_sees_no_document() {
    let shape = ScoreShape::from((1, 1, 4, 3));
    // The queries stand at -1, 0, 1 and 2.
    let rule = documents(&[1, 2]);
    let seen = |i| (0..3).map(|j| rule.allows(&shape, 0, 0, i, j)).collect::<Vec<_>>();
    assert_eq!([seen(0), seen(1), seen(2)], [[false; 3], [true, false, false], [false, true, true]]);
    assert_eq!(rule.tile(&shape, (0, 0), &(0..1), &(0..3)), Coverage::None);
    assert_eq!(rule.tile(&shape, (0, 0), &(0..2), &(0..1)), Coverage::Some);
    assert_eq!(rule.tile(&shape, (0, 0), &(2..4), &(1..3)), Coverage::All);
}

#[test]
fn tile_of_hidden_keys_is_none() {
    let (rule, shape) = (Rule::Full.with_extra_keys(2, false), ScoreShape::from((1, 1, 3, 5)));
    let tile = |keys| rule.tile(&shape, (0, 0), &(0..3), &keys);
    assert_eq!([tile(0..3), tile(3..5), tile(2..4)], [Coverage::All, Coverage::None, Coverage::Some]);
    assert_eq!(rule.visible_keys(&shape, (0, 0), &(0..3), 0..5), 0..3);
    assert_eq!(rule.visible_keys(&shape, (0, 0), &(0..3), 4..5), 4..4);
}
