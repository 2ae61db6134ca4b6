//! [`Plan`]: the tensors of a checkpoint for one layout and config, with their shapes and the parameters that they
//! hold.

use crate::checkpoint::layout::Layout;
use crate::checkpoint::prefixed;
use crate::error::AttentionError;
use crate::layer::config::{Name, Parameter, SelfAttentionConfig};

/// The frequencies of the rotary embedding, which old checkpoints store beside the parameters.
pub(super) const INV_FREQ: &[&str] = &["rotary_emb.inv_freq"];

/// All tensors that a layout can hold for a layer with a config of type `C`. The config decides which of them a checkpoint has.
pub(crate) struct Table<C = SelfAttentionConfig> {
    pub(crate) entries: &'static [Entry],
    /// Tensors under the same prefix that are no parameters of the layer. They are ignored.
    pub(crate) ignored: &'static [&'static str],
    /// Further checks of whether models of this kind can have a config.
    pub(crate) check: fn(&C) -> Result<(), AttentionError>,
}

/// A tensor of the layout, and the parameters of this crate whose rows it holds. The parameters are stored one after
/// the other, unless the form says otherwise.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    name: &'static str,
    /// What some checkpoints call it.
    other_name: Option<&'static str>,
    holds: &'static [&'static str],
    form: Form,
}

/// The axes of a tensor in the layout, and the order of its rows.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Form {
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
    pub(crate) const fn of(name: &'static str, holds: &'static [&'static str]) -> Self {
        Self { name, other_name: None, holds, form: Form::Plain }
    }

    /// This tensor, which some checkpoints call `other_name`.
    pub(crate) const fn or(self, other_name: &'static str) -> Self {
        Self { other_name: Some(other_name), ..self }
    }

    pub(crate) const fn transposed(self) -> Self {
        Self { form: Form::Transposed, ..self }
    }

    pub(crate) const fn by_key_heads(self) -> Self {
        Self { form: Form::ByKeyHeads, ..self }
    }

    pub(crate) const fn with_leading_axes(self) -> Self {
        Self { form: Form::WithLeadingAxes, ..self }
    }
}

/// A tensor that a checkpoint of this layout and config holds.
pub(crate) struct Piece {
    pub(super) name: Name,
    other_name: Option<Name>,
    pub(super) form: Form,
    pub(super) parts: Vec<Parameter>,
    /// The number of groups of rows, each with rows of every part: the number of key heads, or 1.
    pub(super) groups: usize,
}

impl Piece {
    fn name_mut(&mut self) -> impl Iterator<Item = &mut Name> {
        std::iter::once(&mut self.name).chain(&mut self.other_name)
    }

    fn is_called(&self, name: &Name) -> bool {
        self.name == *name || self.other_name.as_ref() == Some(name)
    }

    /// The same tensor with other parts.
    pub(super) fn with_parts(&self, parts: Vec<Parameter>) -> Self {
        let Self { name, other_name, form, groups, .. } = self;
        Self { name: name.clone(), other_name: other_name.clone(), form: *form, parts, groups: *groups }
    }

    pub(super) fn shape(&self) -> Vec<usize> {
        let rows = self.parts.iter().map(|part| part.shape[0]).sum();
        match (self.form, &self.parts[0].shape[1..]) {
            (Form::Transposed, &[inputs]) => vec![inputs, rows],
            (Form::WithLeadingAxes, _) => vec![1, 1, rows],
            (_, inputs) => [&[rows], inputs].concat(),
        }
    }
}

/// The parameters of a layer.
pub(crate) struct Wanted {
    pub(crate) parameters: Vec<Parameter>,
    /// The field of the config on which a parameter depends.
    pub(crate) field_of: fn(&str) -> &'static str,
    pub(crate) num_kv_heads: usize,
}

/// The tensors of a checkpoint.
pub struct Plan {
    pub(super) pieces: Vec<Piece>,
    /// Tensors of the layout that the config doesn't have.
    pub(super) unwanted: Vec<Name>,
    /// See [`Table::ignored`].
    pub(super) ignored: Vec<Name>,
}

impl Plan {
    /// The plan for an attention layer with a config that has been checked.
    pub(crate) fn of_attention(layout: Layout, config: &SelfAttentionConfig) -> Result<Self, AttentionError> {
        let wanted = Wanted { parameters: config.parameters(), field_of, num_kv_heads: config.num_kv_heads() };
        Self::new(layout, layout.table(config), config, &wanted)
    }

    /// The plan for a layer with these parameters, whose config has been checked.
    pub(crate) fn new<C>(
        layout: Layout,
        table: &Table<C>,
        config: &C,
        wanted: &Wanted,
    ) -> Result<Self, AttentionError> {
        (table.check)(config)?;
        let Wanted { parameters, field_of, num_kv_heads } = wanted;
        for Parameter { name, .. } in parameters {
            if table.entries.iter().all(|entry| entry.holds.iter().all(|held| held != name)) {
                let expected = format!("no `{name}`, for which the layout {layout} has no name");
                return Err(AttentionError::Config { field: field_of(name), expected, got: "one".into() });
            }
        }
        let mut plan = Plan { pieces: vec![], unwanted: vec![], ignored: vec![] };
        plan.ignored.extend(table.ignored.iter().map(|&name| Name::from(name)));
        for &Entry { name, other_name, holds, form } in table.entries {
            let find = |name: &&str| parameters.iter().find(|parameter| parameter.name == *name).cloned();
            let parts: Vec<Parameter> = holds.iter().filter_map(find).collect();
            if parts.is_empty() {
                plan.unwanted.extend([Some(name), other_name].into_iter().flatten().map(Name::from));
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
            let groups = if form == Form::ByKeyHeads { *num_kv_heads } else { 1 };
            plan.pieces.push(Piece { name: name.into(), other_name: other_name.map(Name::from), form, parts, groups });
        }
        Ok(plan)
    }

    /// This plan for a part of another layer: `prefix` is the part's name in the checkpoint, and `part` its name in this crate.
    pub(crate) fn under(mut self, prefix: &str, part: &str) -> Self {
        let put = |name: &mut Name, prefix| *name = prefixed(prefix, name).into();
        for piece in &mut self.pieces {
            piece.name_mut().for_each(|name| put(name, prefix));
            piece.parts.iter_mut().for_each(|parameter| put(&mut parameter.name, part));
        }
        self.unwanted.iter_mut().chain(&mut self.ignored).for_each(|name| put(name, prefix));
        self
    }

    /// This plan and another one for the rest of the layer. What only one of them ignores, the other may hold.
    pub(crate) fn and(mut self, rest: Plan) -> Self {
        self.pieces.extend(rest.pieces);
        self.unwanted.extend(rest.unwanted);
        self.ignored.extend(rest.ignored);
        let Self { pieces, unwanted, ignored } = &mut self;
        ignored.retain(|name| !unwanted.contains(name) && pieces.iter().all(|piece| !piece.is_called(name)));
        self
    }

    /// Each tensor under the name that the checkpoint has. A tensor that it has under both names is unwanted under the second.
    pub(super) fn named_as_in(mut self, contains: impl Fn(&str) -> bool) -> Self {
        for piece in &mut self.pieces {
            let Some(other) = piece.other_name.take_if(|name| contains(name)) else { continue };
            if contains(&piece.name) { self.unwanted.push(other) } else { piece.name = other }
        }
        self
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
