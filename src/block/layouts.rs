//! Whole blocks of other programs: for each layout the tensors beside those of the attention, and the attention's name.

use crate::block::config::{ATTENTION, NormPlacement, TransformerBlockConfig};
use crate::checkpoint::{Entry, LayerConfig, Layout, Plan, Table, Wanted};
use crate::error::AttentionError;

/// A block in a layout.
struct Form {
    /// The name of the attention in the block.
    attention: &'static str,
    table: Table<TransformerBlockConfig>,
}

/// The layouts that have whole blocks.
const LAYOUTS: [(Layout, &Form); 5] = [
    (Layout::Own, &OWN),
    (Layout::Bert, &BERT),
    (Layout::Gpt2, &GPT2),
    (Layout::Llama, &LLAMA),
    (Layout::QkvProj, &PHI3),
];

/// The tensors of a block with this config, which must have been checked.
pub(super) fn plan(layout: Layout, config: &TransformerBlockConfig) -> Result<Plan, AttentionError> {
    let Some((_, Form { attention, table })) = LAYOUTS.iter().find(|(other, _)| *other == layout) else {
        let known = LAYOUTS.map(|(layout, _)| layout.to_string()).join(", ");
        let expected = format!("a layout of whole blocks, one of {known}");
        return Err(AttentionError::Config { field: "layout", expected, got: layout.to_string() });
    };
    let table = if layout == Layout::Llama && config.placement == NormPlacement::Sandwich { &GEMMA2 } else { table };
    let mut parameters = config.parameters();
    parameters.retain(|parameter| !parameter.name.starts_with("attention."));
    let wanted = Wanted { parameters, field_of, num_kv_heads: 1 };
    let rest = Plan::new(layout, table, config, &wanted)?;
    Ok(Plan::of_attention(layout, &config.attention)?.under(attention, ATTENTION).and(rest))
}

/// The field of the config on which a parameter beside the attention depends.
fn field_of(parameter: &str) -> &'static str {
    match parameter {
        "mlp.gate.weight" | "mlp.gate.bias" => "mlp.gated",
        "mlp.up.bias" | "mlp.down.bias" => "mlp.bias",
        "attention_norm.bias" | "mlp_norm.bias" | "attention_post_norm.bias" | "mlp_post_norm.bias" => "norm.bias",
        _ => "placement",
    }
}

static OWN: Form = Form {
    attention: "attention",
    table: Table {
        entries: &[
            Entry::of("mlp.gate.weight", &["mlp.gate.weight"]),
            Entry::of("mlp.gate.bias", &["mlp.gate.bias"]),
            Entry::of("mlp.up.weight", &["mlp.up.weight"]),
            Entry::of("mlp.up.bias", &["mlp.up.bias"]),
            Entry::of("mlp.down.weight", &["mlp.down.weight"]),
            Entry::of("mlp.down.bias", &["mlp.down.bias"]),
            Entry::of("attention_norm.weight", &["attention_norm.weight"]),
            Entry::of("attention_norm.bias", &["attention_norm.bias"]),
            Entry::of("mlp_norm.weight", &["mlp_norm.weight"]),
            Entry::of("mlp_norm.bias", &["mlp_norm.bias"]),
            Entry::of("attention_post_norm.weight", &["attention_post_norm.weight"]),
            Entry::of("attention_post_norm.bias", &["attention_post_norm.bias"]),
            Entry::of("mlp_post_norm.weight", &["mlp_post_norm.weight"]),
            Entry::of("mlp_post_norm.bias", &["mlp_post_norm.bias"]),
        ],
        ignored: &[],
        check: |_| Ok(()),
    },
};

/// Checkpoints that were converted from TensorFlow call weight and bias of a norm gamma and beta.
static BERT: Form = Form {
    attention: "attention",
    table: Table {
        entries: &[
            Entry::of("attention.output.LayerNorm.weight", &["attention_norm.weight"])
                .or("attention.output.LayerNorm.gamma"),
            Entry::of("attention.output.LayerNorm.bias", &["attention_norm.bias"])
                .or("attention.output.LayerNorm.beta"),
            Entry::of("intermediate.dense.weight", &["mlp.up.weight"]),
            Entry::of("intermediate.dense.bias", &["mlp.up.bias"]),
            Entry::of("output.dense.weight", &["mlp.down.weight"]),
            Entry::of("output.dense.bias", &["mlp.down.bias"]),
            Entry::of("output.LayerNorm.weight", &["mlp_norm.weight"]).or("output.LayerNorm.gamma"),
            Entry::of("output.LayerNorm.bias", &["mlp_norm.bias"]).or("output.LayerNorm.beta"),
        ],
        ignored: &[],
        check: |config| check_placement(config, NormPlacement::Post, Layout::Bert),
    },
};

/// Its `Conv1D` stores matrices as (in, out).
static GPT2: Form = Form {
    attention: "attn",
    table: Table {
        entries: &[
            Entry::of("ln_1.weight", &["attention_norm.weight"]),
            Entry::of("ln_1.bias", &["attention_norm.bias"]),
            Entry::of("ln_2.weight", &["mlp_norm.weight"]),
            Entry::of("ln_2.bias", &["mlp_norm.bias"]),
            Entry::of("mlp.c_fc.weight", &["mlp.up.weight"]).transposed(),
            Entry::of("mlp.c_fc.bias", &["mlp.up.bias"]),
            Entry::of("mlp.c_proj.weight", &["mlp.down.weight"]).transposed(),
            Entry::of("mlp.c_proj.bias", &["mlp.down.bias"]),
        ],
        ignored: &[],
        check: |config| check_placement(config, NormPlacement::Pre, Layout::Gpt2),
    },
};

static LLAMA: Form = Form {
    attention: "self_attn",
    table: Table {
        entries: &[
            INPUT_NORM,
            Entry::of("post_attention_layernorm.weight", &["mlp_norm.weight"]),
            GATE,
            Entry::of("mlp.gate_proj.bias", &["mlp.gate.bias"]),
            UP,
            Entry::of("mlp.up_proj.bias", &["mlp.up.bias"]),
            DOWN,
            Entry::of("mlp.down_proj.bias", &["mlp.down.bias"]),
        ],
        ignored: &[],
        check: |config| check_placement(config, NormPlacement::Pre, Layout::Llama),
    },
};

/// Gemma 2, which has Llama's names and two norms more. `post_attention_layernorm` is another norm than Llama's.
static GEMMA2: Table<TransformerBlockConfig> = Table {
    entries: &[
        INPUT_NORM,
        Entry::of("post_attention_layernorm.weight", &["attention_post_norm.weight"]),
        Entry::of("pre_feedforward_layernorm.weight", &["mlp_norm.weight"]),
        Entry::of("post_feedforward_layernorm.weight", &["mlp_post_norm.weight"]),
        GATE,
        UP,
        DOWN,
    ],
    ignored: &[],
    check: |_| Ok(()),
};

static PHI3: Form = Form {
    attention: "self_attn",
    table: Table {
        entries: &[
            INPUT_NORM,
            Entry::of("post_attention_layernorm.weight", &["mlp_norm.weight"]),
            Entry::of("mlp.gate_up_proj.weight", &["mlp.gate.weight", "mlp.up.weight"]),
            DOWN,
        ],
        ignored: &[],
        check: |config| check_placement(config, NormPlacement::Pre, Layout::QkvProj),
    },
};

const INPUT_NORM: Entry = Entry::of("input_layernorm.weight", &["attention_norm.weight"]);
const GATE: Entry = Entry::of("mlp.gate_proj.weight", &["mlp.gate.weight"]);
const UP: Entry = Entry::of("mlp.up_proj.weight", &["mlp.up.weight"]);
const DOWN: Entry = Entry::of("mlp.down_proj.weight", &["mlp.down.weight"]);

/// Refuses norms at other places than in the models with these names: the names alone would fit them.
fn check_placement(
    config: &TransformerBlockConfig,
    placement: NormPlacement,
    layout: Layout,
) -> Result<(), AttentionError> {
    if config.placement == placement {
        return Ok(());
    }
    let and_gemma = if layout == Layout::Llama { ", or Sandwich (Gemma 2)" } else { "" };
    let expected = format!("{placement:?}{and_gemma}, as in models of the layout {layout}");
    Err(AttentionError::Config { field: "placement", expected, got: format!("{:?}", config.placement) })
}
