//! Rules that are made of other rules.

use std::ops::{BitAnd, BitOr};
use std::sync::Arc;

use super::Rule;
use crate::error::MaskError;

/// The most levels of rules inside one another. Each answer descends through them on the stack of a thread.
const MAX_LEVELS: usize = 256;
/// The most rules in one rule. Each answer asks all of them, and a rule that is combined with itself again and again would fill the
/// memory.
const MAX_RULES: usize = 1 << 16;

/// Rules inside another rule. `a & b & c` has three on one level: only a change between `&` and `|` adds a level.
#[derive(Clone, Debug)]
pub struct Nested {
    rules: Arc<Vec<Rule>>,
    /// How many levels there are, this one included.
    levels: usize,
    /// How many rules there are on all levels.
    count: usize,
}

impl Nested {
    /// The rules on this level.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// These rules and more; none if that is too many.
    fn join(self, more: impl IntoIterator<Item = Rule>) -> Option<Self> {
        let Self { rules, mut levels, mut count } = self;
        // Nobody else has the list as a rule, and then nothing is copied.
        let mut rules = Arc::unwrap_or_clone(rules);
        for rule in more {
            levels = levels.max(rule.levels() + 1);
            count = count.saturating_add(rule.count());
            rules.push(rule);
        }
        (levels <= MAX_LEVELS && count <= MAX_RULES).then(|| Self { rules: Arc::new(rules), levels, count })
    }

    fn pair(a: Rule, b: Rule) -> Option<Self> {
        Self { rules: Arc::default(), levels: 1, count: 0 }.join([a, b])
    }

    /// The same structure with other rules.
    pub(super) fn map(&self, f: impl Fn(&Rule) -> Rule) -> Self {
        Self { rules: Arc::new(self.rules.iter().map(f).collect()), ..*self }
    }

    /// As [`Nested::map`], or the first error.
    pub(super) fn try_map<E>(&self, f: impl Fn(&Rule) -> Result<Rule, E>) -> Result<Self, E> {
        let rules = self.rules.iter().map(f).collect::<Result<_, E>>()?;
        Ok(Self { rules: Arc::new(rules), ..*self })
    }
}

impl Rule {
    /// The same rule for all keys except the last `count`, which every query may attend to, or none.
    pub fn with_extra_keys(self, count: usize, visible: bool) -> Self {
        match self {
            Rule::Full if visible => self,
            rule if count == 0 => rule,
            Rule::Extra { rule, count: before, visible: same } if same == visible => {
                Rule::Extra { rule, count: before.saturating_add(count), visible }
            }
            rule if rule.levels() == MAX_LEVELS => Rule::TooMany,
            rule => Rule::Extra { rule: Arc::new(rule), count, visible },
        }
    }

    fn levels(&self) -> usize {
        match self {
            Rule::Both(parts) | Rule::Either(parts) => parts.levels,
            Rule::Extra { rule, .. } => rule.levels() + 1,
            Rule::TooMany => MAX_LEVELS,
            _ => 0,
        }
    }

    fn count(&self) -> usize {
        match self {
            Rule::Both(parts) | Rule::Either(parts) => parts.count,
            Rule::Extra { rule, .. } => rule.count(),
            _ => 1,
        }
    }
}

/// Allows what both rules allow.
impl BitAnd for Rule {
    type Output = Rule;

    fn bitand(self, other: Rule) -> Rule {
        let parts = match (self, other) {
            (Rule::Full, rule) | (rule, Rule::Full) => return rule,
            (Rule::Both(parts), Rule::Both(more)) => parts.join(Arc::unwrap_or_clone(more.rules)),
            (Rule::Both(parts), rule) | (rule, Rule::Both(parts)) => parts.join([rule]),
            (a, b) => Nested::pair(a, b),
        };
        parts.map_or(Rule::TooMany, Rule::Both)
    }
}

/// Allows what either rule allows.
impl BitOr for Rule {
    type Output = Rule;

    fn bitor(self, other: Rule) -> Rule {
        let parts = match (self, other) {
            (Rule::Full, _) | (_, Rule::Full) => return Rule::Full,
            (Rule::Either(parts), Rule::Either(more)) => parts.join(Arc::unwrap_or_clone(more.rules)),
            (Rule::Either(parts), rule) | (rule, Rule::Either(parts)) => parts.join([rule]),
            (a, b) => Nested::pair(a, b),
        };
        parts.map_or(Rule::TooMany, Rule::Either)
    }
}

pub(super) fn too_many() -> MaskError {
    let expected = format!("at most {MAX_RULES} masks, and {MAX_LEVELS} changes between & and |");
    MaskError { part: "combination", expected, got: "more".into() }
}

#[cfg(test)]
#[path = "nested_tests.rs"]
mod tests;
