//! [`LoraConfig`]: the config of an adapter, and its checks.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::check::check_number;
use crate::error::{AttentionError, Result};

/// A linear layer that can have an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// W_Q of an attention.
    #[serde(rename = "q_proj")]
    Query,
    /// W_K.
    #[serde(rename = "k_proj")]
    Key,
    /// W_V.
    #[serde(rename = "v_proj")]
    Value,
    /// W_O.
    #[serde(rename = "o_proj")]
    Output,
    /// The gate of an MLP.
    Gate,
    /// embed_dim -> hidden_dim of an MLP.
    Up,
    /// hidden_dim -> embed_dim of an MLP.
    Down,
}

impl Target {
    /// Every target.
    pub const ALL: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// The name of the linear layer: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate`, `up` or `down`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Query => "q_proj",
            Self::Key => "k_proj",
            Self::Value => "v_proj",
            Self::Output => "o_proj",
            Self::Gate => "gate",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Target {
    type Err = AttentionError;

    fn from_str(name: &str) -> Result<Self, AttentionError> {
        Self::ALL.into_iter().find(|target| target.name() == name).ok_or_else(|| {
            let expected = format!("one of {}", Self::ALL.map(Self::name).join(", "));
            AttentionError::Config { field: "lora.targets", expected, got: name.into() }
        })
    }
}

/// The config of a LoRA adapter: each target's weight W (out, in) is used as W + s · B · A with A (rank, in) and B (out, rank).
///
/// # Examples
///
/// ```
/// use candle_attention::adapter::{LoraConfig, Target};
///
/// let config = LoraConfig { targets: vec![Target::Query, Target::Value], ..LoraConfig::new(8, 16.0) };
/// assert_eq!(config.scale(), 2.0); // alpha / rank
/// assert_eq!(LoraConfig { use_rslora: true, ..LoraConfig::new(16, 8.0) }.scale(), 2.0); // alpha / sqrt(rank)
/// config.validate()?;
/// # Ok::<(), candle_attention::Error>(())
/// ```
///
/// Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022), section 4.1; Kalajdzievski, "A Rank
/// Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023), section 3.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// The rank of B · A: at least 1, and at most the smaller size of each target's weight.
    pub rank: usize,
    /// s = alpha / rank.
    pub alpha: f64,
    /// The probability, in [0, 1), that a number that A reads is dropped in training.
    #[serde(default)]
    pub dropout_p: f64,
    /// Which linear layers have an adapter.
    pub targets: Vec<Target>,
    /// Whether s is alpha / sqrt(rank) instead.
    #[serde(default)]
    pub use_rslora: bool,
    /// The seed of the initial A, combined with the names of the parameters. It is that of a
    /// [`LoraLinear`](crate::adapter::LoraLinear)'s dropout, too. In the other layers, dropout of adapters has the layer's own seed.
    #[serde(default)]
    pub seed: u64,
}

impl LoraConfig {
    /// Adapters without dropout on all projections of the attention.
    pub fn new(rank: usize, alpha: f64) -> Self {
        let targets = vec![Target::Query, Target::Key, Target::Value, Target::Output];
        Self { rank, alpha, dropout_p: 0.0, targets, use_rslora: false, seed: 0 }
    }

    /// The factor s.
    pub fn scale(&self) -> f64 {
        self.scale_of(self.rank, self.alpha)
    }

    /// The factor for another rank and alpha.
    pub(crate) fn scale_of(&self, rank: usize, alpha: f64) -> f64 {
        alpha / if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 }
    }

    /// Checks what can be checked without a layer.
    ///
    /// # Errors
    ///
    /// The first field whose value can't be used, with what it should be.
    pub fn validate(&self) -> Result<()> {
        Ok(self.check()?)
    }

    pub(crate) fn check(&self) -> Result<(), AttentionError> {
        let refused =
            |field, expected: &str, got: String| Err(AttentionError::Config { field, expected: expected.into(), got });
        if self.rank == 0 {
            return refused("lora.rank", "at least 1", "0".into());
        }
        check_number("lora.alpha", Some(self.alpha), "a finite number", f64::is_finite)?;
        let expected = "a probability in [0, 1)";
        check_number("lora.dropout_p", Some(self.dropout_p), expected, |x| (0.0..1.0).contains(&x))?;
        if self.targets.is_empty() {
            return refused("lora.targets", "at least one", "none".into());
        }
        for (i, target) in self.targets.iter().enumerate() {
            if self.targets[..i].contains(target) {
                return refused("lora.targets", "each target once", format!("{target} twice"));
            }
        }
        Ok(())
    }
}

/// Which adapter one call uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AdapterChoice {
    /// The active one: that which was added last, unless it was [changed](crate::adapter::Adapt::with_active_adapter).
    #[default]
    Active,
    /// None: the base as it was before.
    Base,
    /// The one of this name.
    Named(String),
}
