//! Rotary embedding for longer sequences than a model was first trained on.

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};

use crate::error::{AttentionError, check_number};

/// How the frequencies of a rotary embedding are scaled, for sequences longer than those that a model was first trained on
/// (`rope_scaling`, or `rope_parameters`, of Hugging Face transformers).
///
/// A pair's frequency is how many radians it turns a position. A scaling divides some or all of them, so that later positions
/// turn slow pairs no further than the model has seen. None here depends on how long a sequence has grown, so that the keys
/// in a cache are turned as those that follow. Dynamic NTK scaling, whose base grows with the sequence, therefore isn't here.
///
/// Read from JSON, the fields are those of transformers, but for [`RotaryScaling::LongRope`]:
///
/// ```
/// use candle_attention::{RotaryConfig, RotaryEmbedding, RotaryScaling};
/// use candle_core::{Device, Tensor};
///
/// // Llama 3.2's, but for `rope_theta`, which is the base.
/// let scaling = serde_json::from_str(
///     r#"{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
///         "original_max_position_embeddings": 8192}"#,
/// )?;
/// let rotary = RotaryEmbedding::new(&RotaryConfig { base: 500_000.0, scaling: Some(scaling), ..Default::default() }, 64)?;
///
/// let linear = RotaryConfig { scaling: Some(RotaryScaling::Linear { factor: 4.0 }), ..Default::default() };
/// let x = Tensor::new(&[[[[1f32, 0.]]]], &Device::Cpu)?; // (batch, heads, len, head_dim)
/// let rotated = RotaryEmbedding::new(&linear, 2)?.apply(&x, 4)?.flatten_all()?.to_vec1::<f32>()?;
/// // Position 4 turns as position 1 does without scaling.
/// assert!((rotated[0] - 1f32.cos()).abs() < 1e-6 && (rotated[1] - 1f32.sin()).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RotaryScaling {
    /// Divides every frequency by the factor: position interpolation. (Chen et al., "Extending Context Window of Large
    /// Language Models via Positional Interpolation", 2023, section 2.3.)
    Linear {
        /// By how much longer sequences become. At least 1.
        factor: f64,
    },
    /// Keeps the frequencies of pairs that turn more than `high_freq_factor` times over the original length, divides by the
    /// factor those of pairs that turn less than `low_freq_factor` times, and goes evenly from one to the other between.
    /// (Llama 3.1 and its like, as in Meta's code.)
    Llama3 {
        /// By how much longer sequences become. At least 1.
        factor: f64,
        /// Turns below which the whole factor divides. At least 0.
        low_freq_factor: f64,
        /// Turns above which nothing changes. Above low_freq_factor.
        high_freq_factor: f64,
        /// Tokens of the sequences that the model was first trained on. At least 1.
        original_max_position_embeddings: usize,
    },
    /// YaRN: gpt-oss, Qwen for long contexts.
    Yarn(Yarn),
    /// Divides the frequency of each pair by a factor of its own, and multiplies cosines and sines by `attention_factor`.
    /// (LongRoPE of Phi-3; Ding et al., "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", 2024, section 3.)
    ///
    /// Checkpoints have two sets of factors, and transformers goes from one to the other as a sequence grows, which turns the
    /// keys in a cache otherwise than those that follow. Here one is chosen for all: `short_factor` where no sequence will
    /// be longer than the original length, else `long_factor`.
    LongRope {
        /// What the frequency of each pair is divided by, one for each of dim / 2 pairs. Finite and above 0.
        factors: Vec<f64>,
        /// By how much longer sequences become, for the attention factor. At least 1.
        factor: f64,
        /// Tokens of the sequences that the model was first trained on. At least 2.
        original_max_position_embeddings: usize,
        /// What cosines and sines are multiplied by; sqrt(1 + ln(factor) / ln(original_max_position_embeddings)) if not
        /// given. Finite and above 0.
        attention_factor: Option<f64>,
    },
}

/// YaRN: keeps the frequencies of pairs that turn more than `beta_fast` times over the original length, divides by the factor
/// those of pairs that turn less than `beta_slow` times, goes from one to the other pair by pair between, and multiplies
/// cosines and sines by `attention_factor`.
///
/// ```
/// use candle_attention::{RotaryConfig, RotaryScaling, Yarn};
///
/// // As in gpt-oss.
/// let scaling = RotaryScaling::Yarn(Yarn { truncate: false, ..Yarn::new(32.0, 4096) });
/// let rotary = RotaryConfig { base: 150_000.0, scaling: Some(scaling), ..RotaryConfig::default() };
/// assert_eq!(serde_json::from_str::<RotaryConfig>(&serde_json::to_string(&rotary)?)?, rotary);
/// # Ok::<(), serde_json::Error>(())
/// ```
///
/// Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023), sections 3.2 and 3.4; the
/// even steps from pair to pair are those of the authors' code.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Yarn {
    /// By how much longer sequences become. At least 1.
    pub factor: f64,
    /// Tokens of the sequences that the model was first trained on. At least 1.
    pub original_max_position_embeddings: usize,
    /// Turns over the original length above which nothing changes: 32 if not given. Above beta_slow.
    #[serde(default = "beta_fast")]
    pub beta_fast: f64,
    /// Turns over the original length below which the whole factor divides: 1 if not given. Above 0.
    #[serde(default = "beta_slow")]
    pub beta_slow: f64,
    /// What cosines and sines are multiplied by, so that scores grow by its square; 0.1 ln(factor) + 1 if not given. Finite
    /// and above 0.
    pub attention_factor: Option<f64>,
    /// With `mscale_all_dim`, if neither is 0, and where attention_factor isn't given: that is
    /// (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1). At least 0.
    pub mscale: Option<f64>,
    /// See `mscale`. (DeepSeek's code also multiplies its scores by the square of the denominator: that is `scale` of
    /// [`SelfAttentionConfig`](crate::SelfAttentionConfig).)
    pub mscale_all_dim: Option<f64>,
    /// Whether the first and the last of the pairs between are whole numbers, rounded outwards; true if not given.
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
    /// With what the paper suggests for everything else.
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

    /// The last pair that isn't scaled, and by how many the first stands behind it that is scaled by the whole factor.
    fn ramp(&self, base: f64, dim: f64) -> (f64, f64) {
        let original = self.original_max_position_embeddings as f64;
        let pair_of_turns = |turns: f64| dim * (original / (TAU * turns)).ln() / (2.0 * base.ln());
        let (mut first, mut last) = (pair_of_turns(self.beta_fast), pair_of_turns(self.beta_slow));
        if self.truncate {
            (first, last) = (first.floor(), last.ceil());
        }
        (first, last) = (first.max(0.0), last.min(dim - 1.0));
        // Where no pair lies between, a step in place of a division by zero.
        (first, (last - first).max(1e-3))
    }

    fn attention_factor(&self) -> f64 {
        let grown = |mscale: f64| 0.1 * mscale * self.factor.ln() + 1.0;
        let mscales = self.mscale.zip(self.mscale_all_dim).filter(|&(mscale, all)| mscale != 0.0 && all != 0.0);
        self.attention_factor.unwrap_or_else(|| match mscales {
            Some((mscale, all_dim)) => grown(mscale) / grown(all_dim),
            None => grown(1.0),
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

    /// What cosines and sines are multiplied by.
    pub(super) fn attention_factor(&self) -> f64 {
        match self {
            Self::Linear { .. } | Self::Llama3 { .. } => 1.0,
            Self::Yarn(yarn) => yarn.attention_factor(),
            &Self::LongRope { factor, original_max_position_embeddings, attention_factor, .. } => attention_factor
                .unwrap_or_else(|| (1.0 + factor.ln() / (original_max_position_embeddings as f64).ln()).sqrt()),
        }
    }

    /// For a rotary embedding of this base and of `dim` entries.
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
                for &factor in factors {
                    check_number("rotary.scaling.factors", Some(factor), "finite numbers above 0", above_zero)?;
                }
            }
        }
        // Given, or computed from what may be as great as an f64 can be.
        let name = "rotary.scaling.attention_factor";
        check_number(name, Some(self.attention_factor()), "a finite number above 0", above_zero)
    }
}

/// What a frequency is multiplied by of which this part, within 0 and 1, is divided by the factor.
fn blend(factor: f64, part: f64) -> f64 {
    let part = part.clamp(0.0, 1.0);
    (1.0 - part) + part / factor
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
