use super::*;
use crate::mask::{PerSequence, ScoreShape};

const SHAPE: (usize, usize, usize, usize) = (1, 1, 4, 4);

fn first_keys(count: usize) -> Rule {
    Rule::FirstKeys(PerSequence::Same(count))
}

/// What a rule allows of scores of 4 x 4.
fn allowed(rule: &Rule) -> Vec<bool> {
    let shape = ScoreShape::from(SHAPE);
    rule.check(&shape).unwrap();
    (0..16).map(|at| rule.allows(&shape, 0, 0, at / 4, at % 4)).collect()
}

#[test]
fn many_rules_of_one_kind_are_one_level() {
    let mut all = first_keys(3);
    let mut any = first_keys(3);
    for _ in 1..MAX_RULES {
        (all, any) = (all & first_keys(3), first_keys(3) | any);
    }
    assert_eq!((all.levels(), any.levels()), (1, 1));
    assert_eq!((allowed(&all), allowed(&any)), (allowed(&first_keys(3)), allowed(&first_keys(3))));
    assert!(all.bitand(first_keys(3)).check(&SHAPE.into()).is_err());
}

/// Each change between `&` and `|` adds a level. Answers to the deepest rule don't overflow a thread's stack.
#[test]
fn levels_are_bounded() {
    let deep = |levels: usize| {
        let add = |rule: Rule, level| if level % 2 == 0 { rule & first_keys(4) } else { rule | first_keys(0) };
        (0..levels).fold(first_keys(2), add)
    };
    let deepest = deep(MAX_LEVELS);
    assert_eq!((deepest.levels(), allowed(&deepest)), (MAX_LEVELS, allowed(&first_keys(2))));
    for rule in [deep(MAX_LEVELS + 1), deep(50_000), deepest.with_extra_keys(1, true)] {
        let error = rule.check(&SHAPE.into()).unwrap_err();
        assert!(error.part == "combination" && error.expected.contains("256"), "{error}");
    }
}

#[test]
fn a_rule_combined_with_itself_again_and_again_is_refused() {
    let rule = (0..64).fold(first_keys(2), |rule, _| rule.clone() & rule);
    assert!(rule.check(&SHAPE.into()).is_err());
    let rule =
        (0..64).fold(first_keys(2), |rule, i| if i % 2 == 0 { rule.clone() & rule } else { rule.clone() | rule });
    assert!(rule.check(&SHAPE.into()).is_err());
}

#[test]
fn extra_keys_of_extra_keys_add_up() {
    let rule = (0..50_000).fold(first_keys(0), |rule, _| rule.with_extra_keys(1, true));
    assert!(matches!(rule, Rule::Extra { count: 50_000, .. }));
    assert_eq!(
        allowed(&first_keys(0).with_extra_keys(1, true).with_extra_keys(1, true)),
        [false, false, true, true].repeat(4)
    );
    assert!(first_keys(0).with_extra_keys(usize::MAX, true).with_extra_keys(1, true).check(&SHAPE.into()).is_err());
}

#[test]
fn combinations_keep_their_meaning_in_any_order() {
    let (a, b, c) = (first_keys(2), first_keys(3), first_keys(1).with_extra_keys(1, true));
    let both =
        [a.clone() & b.clone() & c.clone(), c.clone() & (a.clone() & b.clone()), (c.clone() & a.clone()) & b.clone()];
    let either = [a.clone() | b.clone() | c.clone(), c.clone() | (a.clone() | b.clone()), (c.clone() | a.clone()) | b];
    for (both, either) in both.iter().zip(&either) {
        assert_eq!(allowed(both), [true, false, false, false].repeat(4));
        assert_eq!(allowed(either), [true, true, true, true].repeat(4));
    }
    // A list that two rules share stays as it is.
    let shared = a.clone() & c;
    let before = allowed(&shared);
    let _ = shared.clone() & first_keys(0);
    assert_eq!(allowed(&shared), before);
    assert!(matches!((Rule::Full & a.clone(), Rule::Full | a), (Rule::FirstKeys(_), Rule::Full)));
}
