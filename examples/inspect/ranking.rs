//! Which heads look most from one word to another.

use std::fmt;

use anyhow::Result;
use serde_json::{Value, json};

use crate::look::Look;
use crate::words::find;

/// Heads that are shown.
const FIRST: usize = 5;

/// The heads that look most from one word to the other, the first of all first.
pub struct Ranking {
    from: String,
    to: String,
    heads: usize,
    places: Vec<Place>,
}

/// A head, and how much it looks.
struct Place {
    layer: usize,
    head: usize,
    weight: f32,
}

impl Ranking {
    pub fn new(look: &Look, from: &str, to: &str) -> Result<Self> {
        let (from, to) = (find(&look.words, from, "--from")?, find(&look.words, to, "--to")?);
        let weights = look.weights.narrow(2, from, 1)?.narrow(3, to, 1)?.squeeze(3)?.squeeze(2)?.to_vec2::<f32>()?;
        let mut places = Vec::new();
        for (layer, heads) in weights.iter().enumerate() {
            places.extend(heads.iter().enumerate().map(|(head, &weight)| Place { layer, head, weight }));
        }
        let heads = places.len();
        places.sort_by(|a, b| b.weight.total_cmp(&a.weight));
        places.truncate(FIRST);
        Ok(Self { from: look.words[from].clone(), to: look.words[to].clone(), heads, places })
    }

    pub fn to_json(&self) -> Value {
        let place = |place: &Place| json!({"layer": place.layer, "head": place.head, "weight": place.weight});
        json!({"from": self.from, "to": self.to, "first": self.places.iter().map(place).collect::<Vec<_>>()})
    }
}

impl fmt::Display for Ranking {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "Of {} heads, these look most from \"{}\" to \"{}\":\n", self.heads, self.from, self.to)?;
        writeln!(f, "layer  head  weight")?;
        for Place { layer, head, weight } in &self.places {
            writeln!(f, "{layer:>5}  {head:>4}  {weight:>6.4}")?;
        }
        Ok(())
    }
}
