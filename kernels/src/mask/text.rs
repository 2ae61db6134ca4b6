//! A rule as a short text, for errors and to compare rules of several processes.

use std::fmt::{Display, Formatter, Result};

use super::rule::Offset;
use super::{PerSequence, Rule, Table};
use crate::fnv;

/// Numbers that a text holds one by one; of more it holds a hash.
const SHOWN: usize = 8;

/// Equal rules have equal texts. Long lists and tables stand in it as 64-bit hashes, so that different rules have different texts but
/// by chance.
impl Display for Rule {
    fn fmt(&self, f: &mut Formatter) -> Result {
        match self {
            Rule::Full => write!(f, "full"),
            Rule::Band { below, above, offset } => {
                write!(f, "band of {} before and {} after", side(below), side(above))?;
                write_offset(f, offset)
            }
            Rule::FirstKeys(PerSequence::Same(count)) => write!(f, "first {count} keys"),
            Rule::FirstKeys(PerSequence::Each(counts)) => {
                write!(f, "first keys ")?;
                write_numbers(f, counts.iter().map(|&count| count as u64))
            }
            Rule::Documents { ids: PerSequence::Same(ids), offset } => {
                write!(f, "documents ")?;
                write_numbers(f, ids.iter().map(|&id| u64::from(id)))?;
                write_offset(f, offset)
            }
            Rule::Documents { ids: PerSequence::Each(rows), offset } => {
                write!(f, "documents of {} sequences ", rows.len())?;
                // The length of each row stands before its ids.
                let rows = rows
                    .iter()
                    .flat_map(|row| [row.len() as u64].into_iter().chain(row.iter().map(|&id| u64::from(id))));
                write_numbers(f, rows)?;
                write_offset(f, offset)
            }
            Rule::Packed { ends, offset } => {
                write!(f, "documents that end at ")?;
                write_numbers(f, ends.iter().map(|&end| end as u64))?;
                write_offset(f, offset)
            }
            Rule::Table(table) => write_table(f, table),
            Rule::Extra { rule, count, visible } => {
                let seen = if *visible { "visible" } else { "hidden" };
                write!(f, "({rule}), then {count} {seen} keys")
            }
            Rule::Both(parts) => write_all(f, parts.rules(), " and "),
            Rule::Either(parts) => write_all(f, parts.rules(), " or "),
            Rule::TooMany => write!(f, "too many rules"),
        }
    }
}

fn side(limit: &Option<i64>) -> String {
    limit.map_or("all".into(), |limit| limit.to_string())
}

fn write_offset(f: &mut Formatter, offset: &Offset) -> Result {
    match offset {
        None => Ok(()),
        Some(PerSequence::Same(offset)) => write!(f, " from position {offset}"),
        Some(PerSequence::Each(offsets)) => {
            write!(f, " from positions ")?;
            write_numbers(f, offsets.iter().map(|&offset| offset as u64))
        }
    }
}

fn write_all(f: &mut Formatter, rules: &[Rule], between: &str) -> Result {
    for (i, rule) in rules.iter().enumerate() {
        write!(f, "{}({rule})", if i == 0 { "" } else { between })?;
    }
    Ok(())
}

fn write_table(f: &mut Formatter, table: &Table) -> Result {
    write!(f, "tensor {:?} {:016x}", table.dims(), table.hash())
}

fn write_numbers(f: &mut Formatter, numbers: impl Iterator<Item = u64> + Clone) -> Result {
    let count = numbers.clone().count();
    if count > SHOWN {
        return write!(f, "[{count} numbers, {:016x}]", fnv::hash(numbers));
    }
    write!(f, "{:?}", numbers.map(|number| number as i64).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn rules_that_differ_have_texts_that_differ() {
        let documents = |last: u32| {
            let ids: Vec<u32> = (0..100).chain([last]).collect();
            Rule::Documents { ids: PerSequence::Each([ids.into()].into()), offset: None }
        };
        let table = |last: bool| {
            let allowed = [vec![true; 99], vec![last]].concat();
            Rule::Table(Arc::new(Table::new([1, 1, 10, 10], allowed).unwrap()))
        };
        let causal = Rule::Band { below: None, above: Some(0), offset: None };
        let lengths = |last| Rule::FirstKeys(PerSequence::Each([3, last].into()));
        let rules = [
            Rule::Full,
            causal.clone(),
            causal.clone().with_offset(&PerSequence::Same(0)),
            Rule::Band { below: Some(4), above: Some(0), offset: None },
            lengths(4),
            lengths(5),
            documents(7),
            documents(8),
            table(true),
            table(false),
            causal.clone() & lengths(4),
            causal | lengths(4),
            Rule::Packed { ends: [2, 5].into(), offset: None },
        ];
        let texts: Vec<String> = rules.iter().map(Rule::to_string).collect();
        for (i, text) in texts.iter().enumerate() {
            assert!(!texts[..i].contains(text), "{text}");
            assert!(text.len() < 120 && *text == rules[i].clone().to_string(), "{text}");
        }
    }
}
