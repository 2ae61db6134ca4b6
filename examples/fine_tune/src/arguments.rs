//! The command line.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use attention_examples::device::DeviceName;
use candle_attention::adapter::{LoraConfig, Target};
use candle_attention::quantised::Format;
use clap::{Parser, ValueEnum};

/// Adapts a sentence encoder to tell praise from complaint.
#[derive(Parser, Debug)]
#[command(name = "fine_tune")]
pub struct Arguments {
    /// The folder of the encoder, as `scripts/minilm` makes it
    #[arg(long, value_name = "FOLDER", default_value = "target/minilm")]
    pub model: PathBuf,
    /// The rated sentences, as `scripts/reviews` fetches them
    #[arg(long, value_name = "FILE", default_value = "target/reviews/amazonReviewSnippets_GroundTruth.txt")]
    pub data: PathBuf,
    /// The seeds of the initial numbers and of the order of the sentences: a run for each
    #[arg(long, value_delimiter = ',', default_value = "0,1,2")]
    pub seeds: Vec<u64>,
    /// Training steps of each run
    #[arg(long, default_value_t = 300)]
    pub steps: usize,
    /// Sentences in a step
    #[arg(long, default_value_t = 16)]
    pub batch: usize,
    /// The highest learning rate
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f64,
    /// The rank of the adapter's matrices
    #[arg(long, default_value_t = 8)]
    pub rank: usize,
    /// The adapter's part is multiplied by alpha / rank
    #[arg(long, default_value_t = 16.0)]
    pub alpha: f64,
    /// The probability that a number that the adapter reads is dropped in training
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f64,
    /// The linear layers of each block that are adapted: some of q_proj, k_proj, v_proj, o_proj, up, down
    #[arg(long, value_delimiter = ',', default_value = "q_proj,k_proj,v_proj,o_proj")]
    pub targets: Vec<Target>,
    /// Quantise the weights of the encoder first (QLoRA)
    #[arg(long, value_enum)]
    pub quantise: Option<FormatName>,
    /// The most tokens of a sentence
    #[arg(long, default_value_t = 64)]
    pub max_tokens: usize,
    /// Where to save the adapters: a folder for each seed
    #[arg(long, value_name = "FOLDER")]
    pub out: Option<PathBuf>,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Print the result to stdout as one line of JSON, everything else to stderr
    #[arg(long)]
    pub json: bool,
}

/// The formats whose blocks fit the encoder's rows.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum FormatName {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q5_0")]
    Q5_0,
    Nf4,
}

impl From<FormatName> for Format {
    fn from(name: FormatName) -> Self {
        match name {
            FormatName::Q8_0 => Format::Q8_0,
            FormatName::Q4_0 => Format::Q4_0,
            FormatName::Q5_0 => Format::Q5_0,
            FormatName::Nf4 => Format::Nf4,
        }
    }
}

impl Arguments {
    /// Refuses what would only fail after the model was loaded.
    pub fn check(&self) -> Result<()> {
        for (flag, size) in [("--steps", self.steps), ("--batch", self.batch), ("--seeds", self.seeds.len())] {
            ensure!(size > 0, "{flag}: expected at least 1, got 0");
        }
        ensure!(self.lr.is_finite() && self.lr > 0.0, "--lr: expected a finite number above 0, got {}", self.lr);
        Ok(self.lora().validate()?)
    }

    pub fn lora(&self) -> LoraConfig {
        LoraConfig { dropout_p: self.dropout, targets: self.targets.clone(), ..LoraConfig::new(self.rank, self.alpha) }
    }
}
