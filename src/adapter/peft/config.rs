//! `adapter_config.json`: the fields that change an adapter's numbers, and those that are kept.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::adapter::config::LoraConfig;
use crate::error::AttentionError;
use crate::unique_map::UniqueMap;

/// One name or several: in PEFT a string is a regular expression, and each item of a list the end of a module's name.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Names {
    Expression(String),
    Ends(Vec<String>),
}

/// One number or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Layers {
    One(usize),
    Several(Vec<usize>),
}

/// The file. What it lacks has the value that PEFT gives it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct PeftConfig {
    pub(super) peft_type: String,
    #[serde(default = "default_rank")]
    pub(super) r: usize,
    #[serde(default = "default_alpha")]
    pub(super) lora_alpha: f64,
    #[serde(default)]
    pub(super) lora_dropout: f64,
    #[serde(default)]
    pub(super) use_rslora: bool,
    pub(super) target_modules: Option<Names>,
    pub(super) exclude_modules: Option<Names>,
    pub(super) layers_to_transform: Option<Layers>,
    pub(super) layers_pattern: Option<Names>,
    /// Ranks by regular expressions of modules, of which the first that matches counts.
    #[serde(default)]
    pub(super) rank_pattern: UniqueMap<usize>,
    #[serde(default)]
    pub(super) alpha_pattern: UniqueMap<f64>,
    pub(super) modules_to_save: Option<Vec<String>>,
    #[serde(flatten)]
    pub(super) others: Map<String, Value>,
}

fn default_rank() -> usize {
    8
}

fn default_alpha() -> f64 {
    8.0
}

/// Fields that say where an adapter comes from and how it was initialised. They don't change what it computes.
const KEPT: [&str; 17] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
    "velora_config",
];

/// Initialisations that leave the weight of the base as it is. With another one (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) the adapter alone
/// isn't enough.
const LEAVES_THE_BASE: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

impl PeftConfig {
    /// Reads the text of the file.
    pub(super) fn parse(text: &[u8]) -> Result<Self, AttentionError> {
        let refused =
            |expected: &str, got: String| AttentionError::Checkpoint { path: None, expected: expected.into(), got };
        let config: Self = serde_json::from_slice(text)
            .map_err(|error| refused("the config of an adapter", format!("other JSON: {error}")))?;
        if config.peft_type != "LORA" {
            return Err(refused("the peft_type LORA", config.peft_type));
        }
        for (field, value) in &config.others {
            if let Some(expected) = config.problem_with(field, value) {
                return Err(refused(&format!("{field}: {expected}"), value.to_string()));
            }
        }
        let expected = "a config that can be used (r is rank, lora_alpha alpha, lora_dropout dropout_p)";
        config.lora().check().map_err(|error| refused(expected, error.to_string()))?;
        Ok(config)
    }

    /// What the value of a field should be, if this isn't it.
    fn problem_with(&self, field: &str, value: &Value) -> Option<&'static str> {
        let leaves = |name: &str| LEAVES_THE_BASE.contains(&name.to_lowercase().as_str());
        match field {
            "init_lora_weights" if value.as_str().is_some_and(|name| !leaves(name)) => {
                Some("an initialisation that leaves the weights of the base as they are")
            }
            "bias" if value != "none" => Some("none, since the biases of the base stay as they are"),
            "bias" => None,
            _ if KEPT.contains(&field) => None,
            // A feature that is switched on, which this crate or this version of it doesn't have.
            _ if is_on(value) => Some("a feature that this crate has, or off"),
            _ => None,
        }
    }

    /// The config without patterns. Its targets are all that there are.
    pub(super) fn lora(&self) -> LoraConfig {
        let Self { r, lora_alpha, lora_dropout, use_rslora, .. } = *self;
        LoraConfig { rank: r, alpha: lora_alpha, dropout_p: lora_dropout, use_rslora, ..LoraConfig::new(r, lora_alpha) }
    }
}

/// Whether a value switches a feature on. A number alone is the size of a feature, and doesn't.
fn is_on(value: &Value) -> bool {
    match value {
        Value::Null | Value::Number(_) => false,
        Value::Bool(on) => *on,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

/// A module whose rank or alpha isn't that of the config.
pub(super) struct Exception {
    pub(super) module: String,
    pub(super) rank: usize,
    pub(super) alpha: f64,
}

/// The text of the file.
pub(super) fn to_text(
    config: &LoraConfig,
    modules: &[String],
    exceptions: &[Exception],
    modules_to_save: &[String],
    kept: &Map<String, Value>,
) -> serde_json::Result<Vec<u8>> {
    let ranks = exceptions.iter().filter(|exception| exception.rank != config.rank);
    let alphas = exceptions.iter().filter(|exception| exception.alpha != config.alpha);
    let mut fields = defaults();
    fields.extend(kept.clone());
    let own = json!({
        "r": config.rank,
        "lora_alpha": number(config.alpha),
        "lora_dropout": config.dropout_p,
        "use_rslora": config.use_rslora,
        "target_modules": modules,
        "modules_to_save": if modules_to_save.is_empty() { Value::Null } else { json!(modules_to_save) },
        "rank_pattern": ranks.map(|x| (x.module.clone(), json!(x.rank))).collect::<Map<_, _>>(),
        "alpha_pattern": alphas.map(|x| (x.module.clone(), number(x.alpha))).collect::<Map<_, _>>(),
    });
    fields.extend(own.as_object().cloned().unwrap_or_default());
    serde_json::to_vec_pretty(&fields)
}

/// A whole number without a point, as PEFT writes it.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

/// What PEFT writes for an adapter of no other feature.
fn defaults() -> Map<String, Value> {
    let fields = json!({
        "auto_mapping": null,
        "base_model_name_or_path": null,
        "bias": "none",
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_bias": false,
        "peft_type": "LORA",
        "revision": null,
        "task_type": null,
        "use_dora": false,
    });
    fields.as_object().cloned().unwrap_or_default()
}
