//! What a layout makes of a config: which tensors there are, of which shape, and what each of them holds.

use super::Layout;
use crate::config::{Parameter, SelfAttentionConfig};
use crate::error::AttentionError;

/// Frequencies of the rotary embedding, which old checkpoints hold beside the parameters.
pub(super) const INV_FREQ: &[&str] = &["rotary_emb.inv_freq"];

/// All that a layout can hold. What of it there is depends on the config.
pub(super) struct Table {
    pub(super) entries: &'static [Entry],
    /// Tensors at the same place in the model that are no parameters of the attention, and are left alone.
    pub(super) others: &'static [&'static str],
    /// Whether models of this kind can have such a config, beyond what the entries say.
    pub(super) check: fn(&SelfAttentionConfig) -> Result<(), AttentionError>,
}

/// A tensor of the layout, and the parameters of this crate whose rows it holds, one after the other unless the form says
/// otherwise.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    pub(super) name: &'static str,
    holds: &'static [&'static str],
    pub(super) form: Form,
}

/// How a tensor stands in the layout.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Form {
    /// (out, in) or (out)
    AsHere,
    /// (in, out)
    Transposed,
    /// (1, 1, out)
    WithLeadingAxes,
    /// (out, in) or (out), where the rows of all parameters for the first key head stand before those for the second.
    ByKeyHeads,
}

impl Entry {
    pub(super) const fn of(name: &'static str, holds: &'static [&'static str]) -> Self {
        Self { name, holds, form: Form::AsHere }
    }

    pub(super) const fn transposed(self) -> Self {
        Self { form: Form::Transposed, ..self }
    }

    pub(super) const fn by_key_heads(self) -> Self {
        Self { form: Form::ByKeyHeads, ..self }
    }

    pub(super) const fn with_leading_axes(self) -> Self {
        Self { form: Form::WithLeadingAxes, ..self }
    }
}

/// A tensor that a checkpoint of this layout and config holds.
pub(super) struct Piece {
    pub(super) name: &'static str,
    pub(super) form: Form,
    pub(super) parts: Vec<Parameter>,
    /// How many times rows of every part follow one another: as many as key heads, or once.
    pub(super) groups: usize,
}

impl Piece {
    pub(super) fn shape(&self) -> Vec<usize> {
        let rows = self.parts.iter().map(|part| part.shape[0]).sum();
        match (self.form, &self.parts[0].shape[1..]) {
            (Form::Transposed, &[inputs]) => vec![inputs, rows],
            (Form::WithLeadingAxes, _) => vec![1, 1, rows],
            (_, inputs) => [&[rows], inputs].concat(),
        }
    }
}

/// The tensors of a checkpoint.
pub(super) struct Plan {
    pub(super) pieces: Vec<Piece>,
    /// Tensors that the layout knows and the config doesn't ask for.
    pub(super) unwanted: Vec<&'static str>,
    /// See [`Table::others`].
    pub(super) others: &'static [&'static str],
}

impl Plan {
    /// For a config that has been checked.
    pub(super) fn new(layout: Layout, config: &SelfAttentionConfig) -> Result<Self, AttentionError> {
        let table = layout.table(config);
        (table.check)(config)?;
        let parameters = config.parameters();
        for Parameter { name, .. } in &parameters {
            if table.entries.iter().all(|entry| !entry.holds.contains(name)) {
                let expected = format!("no `{name}`, for which the layout {layout} has no place");
                return Err(AttentionError::Config { field: field_of(name), expected, got: "one".into() });
            }
        }
        let mut plan = Plan { pieces: Vec::new(), unwanted: Vec::new(), others: table.others };
        for &Entry { name, holds, form } in table.entries {
            let find = |name: &&str| parameters.iter().find(|parameter| parameter.name == *name).cloned();
            let parts: Vec<Parameter> = holds.iter().filter_map(find).collect();
            if parts.is_empty() {
                plan.unwanted.push(name);
                continue;
            }
            if let Some(absent) = holds.iter().find(|name| parts.iter().all(|part| part.name != **name)) {
                let expected = format!("a `{absent}`, which `{name}` of the layout {layout} holds among others");
                return Err(AttentionError::Config { field: field_of(absent), expected, got: "none".into() });
            }
            if let Some(odd) = parts.iter().find(|part| part.shape[1..] != parts[0].shape[1..]) {
                let field = if odd.name == "k_proj.weight" { "kv_dim" } else { "value_input_dim" };
                let expected = format!("embed_dim, since `{name}` of the layout {layout} is one matrix");
                return Err(AttentionError::Config { field, expected, got: odd.shape[1].to_string() });
            }
            let groups = if form == Form::ByKeyHeads { config.num_kv_heads() } else { 1 };
            plan.pieces.push(Piece { name, form, parts, groups });
        }
        Ok(plan)
    }
}

/// The field of the config that asks for a parameter.
fn field_of(parameter: &str) -> &'static str {
    match parameter {
        "o_proj.weight" => "out_proj",
        "o_proj.bias" => "out_bias",
        "k_proj.bias" => "k_bias",
        "q_norm.weight" | "k_norm.weight" => "qk_norm_eps",
        "sinks" => "sinks",
        "bias_k" | "bias_v" => "add_bias_kv",
        _ => "qkv_bias",
    }
}

/// That queries, keys and values are all as wide as the tokens, with as many heads each.
pub(super) fn one_width(config: &SelfAttentionConfig) -> Result<(), AttentionError> {
    let refuse = |field, expected, got: usize| Err(AttentionError::Config { field, expected, got: got.to_string() });
    if config.num_kv_heads() != config.num_heads {
        let expected = format!("num_heads {}, since the layout has no grouped queries", config.num_heads);
        return refuse("num_kv_heads", expected, config.num_kv_heads());
    }
    for (field, dim) in [("head_dim", config.head_dim()), ("value_dim", config.value_dim())] {
        if dim * config.num_heads != config.embed_dim {
            let expected = format!("embed_dim / num_heads, {} / {}", config.embed_dim, config.num_heads);
            return refuse(field, expected, dim);
        }
    }
    Ok(())
}
