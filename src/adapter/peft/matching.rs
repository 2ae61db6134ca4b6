//! Which modules of a model an adapter belongs to, and with which rank and alpha, by PEFT's rules.

use regex_lite::Regex;

use crate::adapter::peft::config::{Layers, Names, PeftConfig};
use crate::error::AttentionError;
use crate::unique_map::UniqueMap;

/// The rules of one config, with their regular expressions compiled.
pub(super) struct Rules {
    targets: Matcher,
    excluded: Option<Matcher>,
    to_save: Vec<String>,
    layers: Option<Vec<usize>>,
    layer_number: Vec<Regex>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
    default: (usize, f64),
}

enum Matcher {
    All,
    Expression(Regex),
    Ends(Vec<String>),
}

impl Matcher {
    fn new(names: Names) -> Result<Self, AttentionError> {
        Ok(match names {
            Names::Expression(name) if name == "all-linear" => Self::All,
            Names::Expression(expression) => Self::Expression(compile(&format!("^(?:{expression})$"))?),
            Names::Ends(ends) => Self::Ends(ends),
        })
    }

    fn matches(&self, module: &str) -> bool {
        match self {
            Self::All => true,
            Self::Expression(expression) => expression.is_match(module),
            Self::Ends(ends) => ends.iter().any(|end| module == end || module.ends_with(&format!(".{end}"))),
        }
    }

    /// Whether the module is named as a whole, which counts for every layer.
    fn names(&self, module: &str) -> bool {
        matches!(self, Self::Ends(ends) if ends.iter().any(|end| module == end))
    }
}

fn compile(expression: &str) -> Result<Regex, AttentionError> {
    Regex::new(expression).map_err(|error| AttentionError::Checkpoint {
        path: None,
        expected: "regular expressions".into(),
        got: format!("`{expression}`: {error}"),
    })
}

/// As PEFT matches the names of a pattern: the whole module, or its end behind a dot.
fn compile_pattern<V: Copy>(pattern: &UniqueMap<V>) -> Result<Vec<(Regex, V)>, AttentionError> {
    let compiled = |(name, value): &(String, V)| Ok((compile(&format!(r"^(.*\.)?({name})$"))?, *value));
    pattern.0.iter().map(compiled).collect()
}

impl Rules {
    pub(super) fn new(config: &PeftConfig) -> Result<Self, AttentionError> {
        let targets = config.target_modules.clone().ok_or_else(|| AttentionError::Checkpoint {
            path: None,
            expected: "target_modules".into(),
            got: "none".into(),
        })?;
        let layers = config.layers_to_transform.clone().map(|layers| match layers {
            Layers::One(layer) => vec![layer],
            Layers::Several(layers) => layers,
        });
        let layer_number = match config.layers_pattern.clone() {
            Some(Names::Expression(name)) if !name.is_empty() => vec![of_layers(&name)],
            Some(Names::Ends(names)) if !names.is_empty() => names.iter().map(|name| of_layers(name)).collect(),
            _ => vec![r"^.*?\.[^.]*\.(\d+)\.".to_string()],
        };
        Ok(Self {
            targets: Matcher::new(targets)?,
            excluded: config.exclude_modules.clone().map(Matcher::new).transpose()?,
            to_save: config.modules_to_save.clone().unwrap_or_default(),
            layers: layers.filter(|layers| !layers.is_empty()),
            layer_number: layer_number.iter().map(|name| compile(name)).collect::<Result<_, _>>()?,
            ranks: compile_pattern(&config.rank_pattern)?,
            alphas: compile_pattern(&config.alpha_pattern)?,
            default: (config.r, config.lora_alpha),
        })
    }

    /// Whether the config has an adapter for the module of this name.
    pub(super) fn is_target(&self, module: &str) -> bool {
        let is_excluded = self.excluded.as_ref().is_some_and(|excluded| excluded.matches(module));
        if is_excluded || self.is_saved(module) || !self.targets.matches(module) {
            return false;
        }
        match &self.layers {
            Some(layers) if !self.targets.names(module) => {
                self.layer_of(module).is_some_and(|layer| layers.contains(&layer))
            }
            _ => true,
        }
    }

    /// Whether the module is one that is saved as a whole, or a part of one.
    pub(super) fn is_saved(&self, module: &str) -> bool {
        self.to_save.iter().any(|saved| format!(".{module}.").contains(&format!(".{saved}.")))
    }

    fn layer_of(&self, module: &str) -> Option<usize> {
        self.layer_number.iter().find_map(|number| number.captures(module)?.get(1)?.as_str().parse().ok())
    }

    /// The rank and alpha of the module of this name.
    pub(super) fn rank_and_alpha(&self, module: &str) -> (usize, f64) {
        fn first<V: Copy>(patterns: &[(Regex, V)], module: &str) -> Option<V> {
            patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
        }
        let (rank, alpha) = self.default;
        (first(&self.ranks, module).unwrap_or(rank), first(&self.alphas, module).unwrap_or(alpha))
    }
}

/// The number behind the name of the list of layers.
fn of_layers(name: &str) -> String {
    format!(r"^(?:|.*?\.){name}\.(\d+)\.")
}
