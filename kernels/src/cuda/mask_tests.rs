use std::sync::Arc;

use super::*;
use crate::mask::{Coverage, PerSequence, Table, for_all_rules};

/// What the kernels make of a lowered rule.
fn allows(lowered: &Lowered, shape: &ScoreShape, (b, h): (usize, usize), i: usize, j: usize) -> bool {
    let raw = lowered.raw();
    let each = |numbers: &[i32]| if numbers.len() > 1 { numbers[b] } else { numbers[0] };
    let (offset, keys, j32) = (each(&lowered.limits.offsets), each(&lowered.limits.keys), j as i32);
    let position = offset + i as i32;
    let of_documents = lowered.documents.as_ref().is_none_or(|documents| {
        let b = if raw.documents_batch == 1 { b } else { 0 };
        documents.queries[b * shape.q_len + i] == documents.keys[b * shape.kv_len + j]
    });
    let of_table = lowered.table.as_ref().is_none_or(|table| {
        let at = [b, h, i, j].iter().zip(raw.table_strides).map(|(&at, stride)| at * stride as usize).sum::<usize>();
        table.data[at] == 1
    });
    let is_near = position - raw.below <= j32 && j32 <= position + raw.above;
    j32 >= raw.always || is_near && j32 < keys && of_documents && of_table
}

fn check(rule: &Rule, shape: &ScoreShape, (b, h): (usize, usize), block: usize) {
    let lowered = Lowered::with_blocks(rule, shape, block).unwrap();
    for (i, j) in (0..shape.q_len).flat_map(|i| (0..shape.kv_len).map(move |j| (i, j))) {
        let expected = rule.allows(shape, b, h, i, j);
        assert_eq!(allows(&lowered, shape, (b, h), i, j), expected, "{rule:?} over {shape:?}, {b}, {h}, {i}, {j}");
    }
    let Some(map) = &lowered.map else {
        return assert!(lowered.is_limits(shape));
    };
    let [map_batch, map_head] = lowered.raw().map_strides.map(|stride| stride as usize);
    let columns = shape.kv_len.div_ceil(block);
    for (row, column) in (0..shape.q_len.div_ceil(block)).flat_map(|row| (0..columns).map(move |column| (row, column)))
    {
        let within = |at: usize, len: usize| at * block..((at + 1) * block).min(len);
        let (queries, keys) = (within(row, shape.q_len), within(column, shape.kv_len));
        let expected = rule.tile(shape, (b, h), &queries, &keys);
        let byte = map.data[b * map_batch + h * map_head + row * columns + column];
        assert_eq!([Coverage::None, Coverage::Some, Coverage::All][byte as usize], expected, "{rule:?}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "no unsafe code, many cases")]
fn a_lowered_rule_allows_what_the_rule_allows() {
    for_all_rules(|rule, _, shape, at| {
        check(rule, shape, at, 2);
        check(rule, shape, at, MAP_BLOCK);
    });
}

fn band(below: Option<i64>, above: Option<i64>) -> Rule {
    Rule::Band { below, above, offset: None }
}

#[test]
#[cfg_attr(miri, ignore = "no unsafe code, many cases")]
fn rules_over_several_blocks() {
    let shape = ScoreShape::from((2, 2, 130, 150));
    let lengths = Rule::FirstKeys(PerSequence::Each([150, 70].into()));
    let table = |dims: [usize; 4]| {
        let allowed = (0..dims.iter().product()).map(|at: usize| !at.is_multiple_of(3)).collect();
        Rule::Table(Arc::new(Table::new(dims, allowed).unwrap()))
    };
    let documents = |len: usize| Rule::Packed { ends: [len / 3, len / 3, len].into(), offset: None };
    for rule in [
        band(Some(30), Some(0)) & lengths.clone() & band(None, Some(5)),
        Rule::FirstKeys(PerSequence::Same(70)) | band(None, Some(0)),
        documents(150) & band(None, Some(0)) & lengths.clone(),
        documents(150) & documents(150).with_offset(&PerSequence::Same(3)),
        table([2, 1, 130, 147]).with_extra_keys(3, true) & lengths.clone(),
        (table([1, 2, 1, 147]) & documents(147) & lengths_of(147)).with_extra_keys(3, true),
        (table([1, 2, 130, 147]) & band(Some(3), None)).with_extra_keys(3, false),
        band(Some(1 << 40), Some(0)).with_offset(&PerSequence::Each([1 << 40, 3].into())),
        band(Some(4), Some(0)).with_offset(&PerSequence::Each([i64::MAX, -7].into())),
    ] {
        rule.check(&shape).unwrap();
        for at in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            check(&rule, &shape, at, MAP_BLOCK);
        }
    }
}

fn lengths_of(len: usize) -> Rule {
    Rule::FirstKeys(PerSequence::Each([len, len / 2].into()))
}

/// These masks take memory for a few numbers at most.
#[test]
fn limits_need_no_table() {
    let shape = ScoreShape::from((2, 3, 1 << 20, 1 << 20));
    for rule in [
        Rule::Full,
        band(None, Some(0)),
        band(Some(100), Some(0)).with_offset(&PerSequence::Each([1, 2].into())) & lengths_of(1 << 20),
        lengths_of(1 << 19).with_extra_keys(1 << 19, false),
    ] {
        assert!(Lowered::new(&rule, &shape).unwrap().is_limits(&shape), "{rule:?}");
    }
}
