//! The heads with the largest weight from one word to another.

use std::fmt;

use anyhow::Result;
use attention_examples::words::find;
use serde_json::{Value, json};

use crate::look::Look;

/// How many heads are shown.
const FIRST: usize = 5;

/// The heads with the largest weight from one word to another, the largest first.
pub struct Ranking {
    from: String,
    to: String,
    heads: usize,
    first: Vec<Head>,
}

/// A head, and its weight from the one word to the other.
struct Head {
    layer: usize,
    head: usize,
    weight: f32,
}

impl Ranking {
    pub fn new(look: &Look, from: &str, to: &str) -> Result<Self> {
        let (from, to) = (find(&look.words, from, "--from")?, find(&look.words, to, "--to")?);
        let weights = look.weights.narrow(2, from, 1)?.narrow(3, to, 1)?.squeeze(3)?.squeeze(2)?.to_vec2::<f32>()?;
        let mut first = Vec::new();
        for (layer, heads) in weights.iter().enumerate() {
            first.extend(heads.iter().enumerate().map(|(head, &weight)| Head { layer, head, weight }));
        }
        let heads = first.len();
        first.sort_by(|a, b| b.weight.total_cmp(&a.weight));
        first.truncate(FIRST);
        Ok(Self { from: look.words[from].clone(), to: look.words[to].clone(), heads, first })
    }

    pub fn to_json(&self) -> Value {
        let head = |head: &Head| json!({"layer": head.layer, "head": head.head, "weight": head.weight});
        json!({"from": self.from, "to": self.to, "first": self.first.iter().map(head).collect::<Vec<_>>()})
    }
}

impl fmt::Display for Ranking {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "Of {} heads, these look most from \"{}\" to \"{}\":\n", self.heads, self.from, self.to)?;
        writeln!(f, "layer  head  weight")?;
        for Head { layer, head, weight } in &self.first {
            writeln!(f, "{layer:>5}  {head:>4}  {weight:>6.4}")?;
        }
        Ok(())
    }
}
