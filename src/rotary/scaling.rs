//! Rotary embedding for longer sequences than a model was first trained on.

use std::f64::consts::TAU;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::check::check_number;
use crate::error::AttentionError;
use crate::rotary::json::{Fields, whole_number};

/// How the frequencies of a rotary embedding are scaled, for sequences longer than those that a model was first trained
/// on (`rope_scaling`, or `rope_parameters`, of Hugging Face transformers).
///
/// The frequency of a pair is its rotation in radians per position. A scaling divides some or all of the frequencies,
/// so that later positions rotate slow pairs no further than in training. No scaling here depends on the current length
/// of the sequence, so that keys in a cache are rotated in the same way as later keys. Dynamic NTK scaling, whose base
/// grows with the sequence, is therefore not supported.
///
/// In JSON the fields are those of transformers, except for [`RotaryScaling::LongRope`]. `type` is an older name of
/// `rope_type`. The scaling of a [`RotaryConfig`](crate::rotary::RotaryConfig) may have the type `default`, which is no
/// scaling.
///
/// ```
/// use candle_attention::rotary::{RotaryConfig, RotaryEmbedding, RotaryScaling};
/// use candle_core::{Device, Tensor};
///
/// // The scaling of Llama 3.2. Its `rope_theta` is the base.
/// let scaling = serde_json::from_str(
///     r#"{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
///         "original_max_position_embeddings": 8192}"#,
/// )?;
/// let rotary = RotaryEmbedding::new(&RotaryConfig { base: 500_000.0, scaling: Some(scaling), ..Default::default() }, 64)?;
///
/// let linear = RotaryConfig { scaling: Some(RotaryScaling::Linear { factor: 4.0 }), ..Default::default() };
/// let x = Tensor::new(&[[[[1f32, 0.]]]], &Device::Cpu)?; // (batch, heads, len, head_dim)
/// let rotated = RotaryEmbedding::new(&linear, 2)?.apply(&x, 4)?.flatten_all()?.to_vec1::<f32>()?;
/// // Position 4 is rotated as position 1 is without scaling.
/// assert!((rotated[0] - 1f32.cos()).abs() < 1e-6 && (rotated[1] - 1f32.sin()).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields, remote = "Self")]
pub enum RotaryScaling {
    /// Divides every frequency by the factor: position interpolation. (Chen et al., "Extending Context Window of Large
    /// Language Models via Positional Interpolation", 2023, section 2.3.)
    Linear {
        /// How many times longer the sequences become. At least 1.
        factor: f64,
    },
    /// Keeps the frequency of a pair that makes more than `high_freq_factor` turns over the original length, divides it
    /// by the factor if the pair makes fewer than `low_freq_factor` turns, and interpolates linearly in between. (Llama
    /// 3.1 and later, as in Meta's code.)
    Llama3 {
        /// How many times longer the sequences become. At least 1.
        factor: f64,
        /// The number of turns below which a frequency is divided by the whole factor. At least 0.
        low_freq_factor: f64,
        /// The number of turns above which a frequency is kept. Above low_freq_factor.
        high_freq_factor: f64,
        /// The length in tokens of the sequences that the model was first trained on. At least 1.
        #[serde(deserialize_with = "whole_number")]
        original_max_position_embeddings: usize,
    },
    /// YaRN: gpt-oss, Qwen for long contexts.
    Yarn(Yarn),
    /// Divides the frequency of each pair by its own factor, and multiplies cosines and sines by `attention_factor`.
    /// (LongRoPE of Phi-3; Ding et al., "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", 2024, section
    /// 3.)
    ///
    /// Checkpoints have two sets of factors. transformers switches from one to the other as a sequence grows, so that
    /// the keys in a cache are rotated differently from later keys. Here the config has one set for all positions: take
    /// `short_factor` if no sequence will be longer than the original length, otherwise `long_factor`.
    LongRope {
        /// The divisors of the frequencies, one for each of dim / 2 pairs. Finite and above 0.
        factors: Vec<f64>,
        /// How many times longer the sequences become, for the attention factor. At least 1.
        factor: f64,
        /// The length in tokens of the sequences that the model was first trained on. At least 2.
        #[serde(deserialize_with = "whole_number")]
        original_max_position_embeddings: usize,
        /// The factor of cosines and sines; sqrt(1 + ln(factor) / ln(original_max_position_embeddings)) if not given.
        /// Finite and above 0.
        attention_factor: Option<f64>,
    },
}

// The derived functions know only `rope_type`, and `Fields` accepts its older name.
impl Serialize for RotaryScaling {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for RotaryScaling {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Fields(fields) = Fields::deserialize(deserializer)?;
        Self::deserialize(Value::Object(fields)).map_err(serde::de::Error::custom)
    }
}

/// YaRN: keeps the frequency of a pair that makes more than `beta_fast` turns over the original length, divides it by
/// the factor if the pair makes fewer than `beta_slow` turns, and interpolates linearly over the pairs in between. It
/// multiplies cosines and sines by `attention_factor`.
///
/// ```
/// use candle_attention::rotary::{RotaryConfig, RotaryScaling, Yarn};
///
/// // As in gpt-oss.
/// let scaling = RotaryScaling::Yarn(Yarn { truncate: false, ..Yarn::new(32.0, 4096) });
/// let rotary = RotaryConfig { base: 150_000.0, scaling: Some(scaling), ..RotaryConfig::default() };
/// assert_eq!(serde_json::from_str::<RotaryConfig>(&serde_json::to_string(&rotary)?)?, rotary);
/// # Ok::<(), serde_json::Error>(())
/// ```
///
/// Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023), sections 3.2 and
/// 3.4. The linear interpolation over the pairs is that of the authors' code.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Yarn {
    /// How many times longer the sequences become. At least 1.
    pub factor: f64,
    /// The length in tokens of the sequences that the model was first trained on. At least 1.
    #[serde(deserialize_with = "whole_number")]
    pub original_max_position_embeddings: usize,
    /// The number of turns over the original length above which a frequency is kept; 32 if not given. Above beta_slow.
    #[serde(default = "beta_fast")]
    pub beta_fast: f64,
    /// The number of turns over the original length below which a frequency is divided by the whole factor; 1 if not
    /// given. Above 0.
    #[serde(default = "beta_slow")]
    pub beta_slow: f64,
    /// The factor of cosines and sines, so that scores grow by its square; 0.1 ln(factor) + 1 if not given. Finite and
    /// above 0.
    pub attention_factor: Option<f64>,
    /// If `attention_factor` isn't given, and `mscale` and `mscale_all_dim` are given and not 0, the attention factor
    /// is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1). At least 0.
    pub mscale: Option<f64>,
    /// See `mscale`. (DeepSeek's code also multiplies the scores by the square of the denominator. Use `scale` of
    /// [`SelfAttentionConfig`](crate::SelfAttentionConfig) for that.)
    pub mscale_all_dim: Option<f64>,
    /// Whether the bounds of the interpolated pairs are rounded outwards to whole pairs; true if not given.
    #[serde(default = "truncate")]
    pub truncate: bool,
}

fn beta_fast() -> f64 {
    32.0
}

fn beta_slow() -> f64 {
    1.0
}

fn truncate() -> bool {
    true
}

impl Yarn {
    /// YaRN with the paper's values for all other fields.
    pub fn new(factor: f64, original_max_position_embeddings: usize) -> Self {
        Self {
            factor,
            original_max_position_embeddings,
            beta_fast: beta_fast(),
            beta_slow: beta_slow(),
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: truncate(),
        }
    }

    /// The index of the last pair that isn't scaled, and its distance to the first pair that is divided by the whole
    /// factor.
    fn ramp(&self, base: f64, dim: f64) -> (f64, f64) {
        let original = self.original_max_position_embeddings as f64;
        let pair_of_turns = |turns: f64| dim * (original / (TAU * turns)).ln() / (2.0 * base.ln());
        let (mut first, mut last) = (pair_of_turns(self.beta_fast), pair_of_turns(self.beta_slow));
        if self.truncate {
            (first, last) = (first.floor(), last.ceil());
        }
        (first, last) = (first.max(0.0), last.min(dim - 1.0));
        // If there is no pair in between, this makes a step and avoids a division by zero.
        (first, (last - first).max(1e-3))
    }

    fn attention_factor(&self) -> f64 {
        let scale_by = |mscale: f64| 0.1 * mscale * self.factor.ln() + 1.0;
        let mscales = self.mscale.zip(self.mscale_all_dim).filter(|&(mscale, all)| mscale != 0.0 && all != 0.0);
        self.attention_factor.unwrap_or_else(|| match mscales {
            Some((mscale, all_dim)) => scale_by(mscale) / scale_by(all_dim),
            None => scale_by(1.0),
        })
    }
}

impl RotaryScaling {
    /// Scales the frequencies of all pairs of a rotary embedding of this base.
    pub(super) fn scale(&self, frequencies: &mut [f64], base: f64) {
        match self {
            Self::Linear { factor } => frequencies.iter_mut().for_each(|frequency| *frequency /= factor),
            &Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                for frequency in frequencies {
                    let turns = original_max_position_embeddings as f64 * *frequency / TAU;
                    *frequency *= blend(factor, (high_freq_factor - turns) / (high_freq_factor - low_freq_factor));
                }
            }
            Self::Yarn(yarn) => {
                let (first, width) = yarn.ramp(base, 2.0 * frequencies.len() as f64);
                for (i, frequency) in frequencies.iter_mut().enumerate() {
                    *frequency *= blend(yarn.factor, (i as f64 - first) / width);
                }
            }
            Self::LongRope { factors, .. } => {
                frequencies.iter_mut().zip(factors).for_each(|(frequency, factor)| *frequency /= factor);
            }
        }
    }

    /// The factor of cosines and sines.
    pub(super) fn attention_factor(&self) -> f64 {
        match self {
            Self::Linear { .. } | Self::Llama3 { .. } => 1.0,
            Self::Yarn(yarn) => yarn.attention_factor(),
            &Self::LongRope { factor, original_max_position_embeddings, attention_factor, .. } => attention_factor
                .unwrap_or_else(|| (1.0 + factor.ln() / (original_max_position_embeddings as f64).ln()).sqrt()),
        }
    }

    /// Checks that this scaling is valid for a rotary embedding of this base that rotates `dim` entries.
    pub(super) fn validate(&self, base: f64, dim: usize) -> Result<(), AttentionError> {
        match self {
            &Self::Linear { factor } => check_factor(factor)?,
            &Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                check_factor(factor)?;
                check_original(original_max_position_embeddings, 1)?;
                let (low, high) = ("rotary.scaling.low_freq_factor", "rotary.scaling.high_freq_factor");
                check_number(low, Some(low_freq_factor), "a finite number of at least 0", at_least_zero)?;
                let above_low = |x: f64| x.is_finite() && x > low_freq_factor;
                check_number(high, Some(high_freq_factor), "a finite number above low_freq_factor", above_low)?;
            }
            Self::Yarn(yarn) => {
                check_factor(yarn.factor)?;
                check_original(yarn.original_max_position_embeddings, 1)?;
                check_number("rotary.scaling.beta_slow", Some(yarn.beta_slow), "a finite number above 0", above_zero)?;
                let above_slow = |x: f64| x.is_finite() && x > yarn.beta_slow;
                let expected = "a finite number above beta_slow";
                check_number("rotary.scaling.beta_fast", Some(yarn.beta_fast), expected, above_slow)?;
                check_number("rotary.scaling.mscale", yarn.mscale, "a finite number of at least 0", at_least_zero)?;
                let name = "rotary.scaling.mscale_all_dim";
                check_number(name, yarn.mscale_all_dim, "a finite number of at least 0", at_least_zero)?;
                check_number("rotary.base", Some(base), "a finite number above 1 with YaRN", |base| base > 1.0)?;
            }
            Self::LongRope { factors, factor, original_max_position_embeddings, .. } => {
                check_factor(*factor)?;
                check_original(*original_max_position_embeddings, 2)?;
                if factors.len() != dim / 2 {
                    let expected = format!("one for each of {} pairs", dim / 2);
                    let (field, got) = ("rotary.scaling.factors", factors.len().to_string());
                    return Err(AttentionError::Config { field, expected, got });
                }
                for (i, &factor) in factors.iter().enumerate() {
                    let name = "rotary.scaling.factors";
                    check_number(name, Some(factor), "finite numbers above 0", above_zero)?;
                    let fits = |factor: f64| has_angles(frequency(base, i, dim) / factor);
                    check_number(name, Some(factor), "numbers that give every position a finite angle", fits)?;
                }
            }
        }
        // It is checked even if it is computed, since the numbers that it is computed from can be as large as f64
        // allows.
        let name = "rotary.scaling.attention_factor";
        check_number(name, Some(self.attention_factor()), "a finite number above 0", above_zero)
    }
}

/// What a frequency is multiplied by: 1 if the fraction is 0 or less, 1 / factor if it is 1 or more, and linear in
/// between.
fn blend(factor: f64, fraction: f64) -> f64 {
    let fraction = fraction.clamp(0.0, 1.0);
    (1.0 - fraction) + fraction / factor
}

/// The rotation of pair `i` before any scaling, in radians per position.
pub(super) fn frequency(base: f64, i: usize, dim: usize) -> f64 {
    base.powf(-2.0 * i as f64 / dim as f64)
}

/// Whether the angle of every position that can be counted is finite.
pub(super) fn has_angles(frequency: f64) -> bool {
    (frequency * usize::MAX as f64).is_finite()
}

fn above_zero(x: f64) -> bool {
    x.is_finite() && x > 0.0
}

fn at_least_zero(x: f64) -> bool {
    x.is_finite() && x >= 0.0
}

fn check_factor(factor: f64) -> Result<(), AttentionError> {
    let allowed = |x: f64| x.is_finite() && x >= 1.0;
    check_number("rotary.scaling.factor", Some(factor), "a finite number of at least 1", allowed)
}

fn check_original(length: usize, least: usize) -> Result<(), AttentionError> {
    if length < least {
        let (field, expected) = ("rotary.scaling.original_max_position_embeddings", format!("at least {least}"));
        return Err(AttentionError::Config { field, expected, got: length.to_string() });
    }
    Ok(())
}
