//! [`UniqueMap`]: a JSON object in which no name stands twice.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

/// A JSON object in which no name stands twice, in the order of the text. serde's own maps keep the last value of a name without an
/// error.
#[derive(Clone, Debug)]
pub(crate) struct UniqueMap<V>(pub(crate) Vec<(String, V)>);

impl<V> UniqueMap<V> {
    /// The values by name.
    pub(crate) fn into_map(self) -> BTreeMap<String, V> {
        self.0.into_iter().collect()
    }
}

impl<V> Default for UniqueMap<V> {
    fn default() -> Self {
        Self(vec![])
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueVisitor(PhantomData))
    }
}

struct UniqueVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueVisitor<V> {
    type Value = UniqueMap<V>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object whose names are all different")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let (mut entries, mut names) = (Vec::new(), HashSet::new());
        while let Some((name, value)) = access.next_entry::<String, V>()? {
            if !names.insert(name.clone()) {
                return Err(Error::custom(format_args!("expected different names, got `{name}` twice")));
            }
            entries.push((name, value));
        }
        Ok(UniqueMap(entries))
    }
}
