//! The JSON of transformers for a rotary scaling (`rope_scaling`, or `rope_parameters`).

use serde::de::{Deserialize, Deserializer, Error};
use serde_json::{Map, Number, Value};

use crate::rotary::RotaryScaling;
use crate::unique_map::UniqueMap;

/// The fields of a scaling. Their `rope_type` is there if the JSON has it, or has its older name `type`.
pub(super) struct Fields(pub(super) Map<String, Value>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut fields: Map<_, _> = UniqueMap::deserialize(deserializer)?.0.into_iter().collect();
        // Configs that transformers has read and written again have both names.
        if let Some(old) = fields.remove("type") {
            let rope_type = fields.entry("rope_type").or_insert_with(|| old.clone());
            if *rope_type != old {
                let text = format_args!("expected the same rope_type and type, got {rope_type} and {old}");
                return Err(Error::custom(text));
            }
        }
        Ok(Self(fields))
    }
}

/// A scaling; none if its type is `default`.
pub(super) fn none_if_default<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<RotaryScaling>, D::Error> {
    let Some(Fields(mut fields)) = Option::deserialize(deserializer)? else { return Ok(None) };
    if fields.get("rope_type").is_none_or(|rope_type| rope_type != "default") {
        return serde_json::from_value(Value::Object(fields)).map(Some).map_err(Error::custom);
    }
    fields.remove("rope_type");
    match fields.keys().next() {
        None => Ok(None),
        Some(field) => Err(Error::custom(format_args!("unknown field `{field}` of the rope_type default"))),
    }
}

/// A whole number, which may be written as a float: some configs have 32768.0.
pub(super) fn whole_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    const END: f64 = 2.0 * (1u64 << 63) as f64;
    let number = Number::deserialize(deserializer)?;
    let whole = |x: f64| (x.fract() == 0.0 && (0.0..END).contains(&x)).then_some(x as u64);
    let found = number.as_u64().or_else(|| number.as_f64().and_then(whole));
    let found = found.and_then(|found| usize::try_from(found).ok());
    found.ok_or_else(|| Error::custom(format_args!("expected a whole number of at least 0, got {number}")))
}
