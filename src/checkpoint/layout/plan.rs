//! [`Plan`]: the tensors of a checkpoint for one layout and config, with their shapes and the parameters that they
//! hold.

use crate::checkpoint::layout::Layout;
use crate::error::AttentionError;
use crate::layer::config::{Parameter, SelfAttentionConfig};

/// The frequencies of the rotary embedding, which old checkpoints store beside the parameters.
pub(super) const INV_FREQ: &[&str] = &["rotary_emb.inv_freq"];

/// All tensors that a layout can hold. The config decides which of them a checkpoint has.
pub(super) struct Table {
    pub(super) entries: &'static [Entry],
    /// Tensors under the same prefix that are no parameters of the attention. They are ignored.
    pub(super) ignored: &'static [&'static str],
    /// Further checks of whether models of this kind can have a config.
    pub(super) check: fn(&SelfAttentionConfig) -> Result<(), AttentionError>,
}

/// A tensor of the layout, and the parameters of this crate whose rows it holds. The parameters are stored one after
/// the other, unless the form says otherwise.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    pub(super) name: &'static str,
    holds: &'static [&'static str],
    pub(super) form: Form,
}

/// The axes of a tensor in the layout, and the order of its rows.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Form {
    /// (out, in) or (out)
    Plain,
    /// (in, out)
    Transposed,
    /// (1, 1, out)
    WithLeadingAxes,
    /// (out, in) or (out), where the rows of all parameters for the first key head come before those for the second.
    ByKeyHeads,
}

impl Entry {
    pub(super) const fn of(name: &'static str, holds: &'static [&'static str]) -> Self {
        Self { name, holds, form: Form::Plain }
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
    /// The number of groups of rows, each with rows of every part: the number of key heads, or 1.
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
    /// Tensors of the layout that the config doesn't have.
    pub(super) unwanted: Vec<&'static str>,
    /// See [`Table::ignored`].
    pub(super) ignored: &'static [&'static str],
}

impl Plan {
    /// The plan for a config that has been checked.
    pub(super) fn new(layout: Layout, config: &SelfAttentionConfig) -> Result<Self, AttentionError> {
        let table = layout.table(config);
        (table.check)(config)?;
        let parameters = config.parameters();
        for Parameter { name, .. } in &parameters {
            if table.entries.iter().all(|entry| !entry.holds.contains(name)) {
                let expected = format!("no `{name}`, for which the layout {layout} has no name");
                return Err(AttentionError::Config { field: field_of(name), expected, got: "one".into() });
            }
        }
        let mut plan = Plan { pieces: Vec::new(), unwanted: Vec::new(), ignored: table.ignored };
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

/// The field of the config on which a parameter depends.
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

/// Checks that queries, keys and values are all as wide as the tokens and have the same number of heads.
pub(super) fn check_equal_widths(config: &SelfAttentionConfig) -> Result<(), AttentionError> {
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
