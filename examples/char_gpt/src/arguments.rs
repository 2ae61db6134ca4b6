//! The command line.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use attention_examples::device::DeviceName;
use clap::Parser;

use crate::model::{ModelConfig, Positions};
use crate::state::{Numbers, RunConfig};

/// The default of `--out`.
const DEFAULT_OUT: &str = "target/char_gpt.safetensors";

/// Trains a small GPT to write like a text, character by character.
#[derive(Parser, Debug)]
#[command(name = "char_gpt")]
pub struct Arguments {
    /// The text to learn from, in UTF-8 [default: the first volume of "Persuasion"]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    #[command(flatten)]
    run: RunFlags,
    /// Steps from one checkpoint and validation to the next
    #[arg(long, value_name = "STEPS", default_value_t = 100, value_parser = size)]
    pub save_every: usize,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Where to save the run [default: the resumed file, or target/char_gpt.safetensors]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Continue a saved run; flags that are given must agree with it, except --steps
    #[arg(long, value_name = "FILE")]
    pub resume: Option<PathBuf>,
    /// Train an adapter (LoRA) on the model of this run, whose weights stay as they are, to write like another --text
    #[arg(long, value_name = "FILE", conflicts_with = "resume", requires = "adapter")]
    pub base: Option<PathBuf>,
    /// Where to save the adapter, as PEFT does
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["resume", "out"], requires = "base", requires = "text")]
    pub adapter: Option<PathBuf>,
    /// Characters to write at the end
    #[arg(long, default_value_t = 300)]
    pub sample: usize,
    /// The text that they continue [default: the start of the held-out text]
    #[arg(long)]
    pub prompt: Option<String>,
    /// The temperature of the sampling: 0 always takes the likeliest character
    #[arg(long, default_value_t = 0.8, value_parser = from_zero, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Compute every character from the whole text before it, without a cache: slower, with the same result
    #[arg(long)]
    pub no_cache: bool,
    /// Ranks that share each batch: threads of this process, or the processes of mpirun [default: those of mpirun, or 1]
    #[arg(long, value_parser = size)]
    pub ranks: Option<usize>,
    /// Print the result to stdout as one line of JSON, everything else to stderr
    #[arg(long)]
    pub json: bool,
}

/// What defines a run. All of it is saved, so that `--resume` needs none of it.
#[derive(clap::Args, Debug)]
struct RunFlags {
    /// Training steps, those before a resumption included [default: 1000]
    #[arg(long)]
    steps: Option<usize>,
    /// The seed of initial weights, batches and dropout [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// Sequences in a step [default: 16]
    #[arg(long, value_parser = size)]
    batch: Option<usize>,
    /// Characters in a sequence [default: 128]
    #[arg(long, value_parser = size)]
    len: Option<usize>,
    /// Entries of a character's vector [default: 128]
    #[arg(long, value_parser = size)]
    width: Option<usize>,
    /// Transformer blocks [default: 4]
    #[arg(long, value_parser = size)]
    layers: Option<usize>,
    /// Attention heads of each block [default: 4]
    #[arg(long, value_parser = size)]
    heads: Option<usize>,
    /// The probability, in [0, 1), that a number is dropped in training [default: 0]
    #[arg(long, value_parser = probability, allow_negative_numbers = true)]
    dropout: Option<f64>,
    /// The highest learning rate [default: 0.002]
    #[arg(long, value_parser = above_zero, allow_negative_numbers = true)]
    lr: Option<f64>,
    /// How the model gets the order of the characters [default: rotary]
    #[arg(long, value_enum)]
    positions: Option<Positions>,
    /// The type of the model's numbers [default: f32]
    #[arg(long, value_enum)]
    dtype: Option<Numbers>,
}

impl RunFlags {
    /// Refuses flags that would make another model.
    fn agree_with_model(&self, saved: &RunConfig) -> Result<()> {
        let Self { len, width, layers, heads, dropout, positions, dtype, .. } = self;
        let model = &saved.model;
        agrees("--len", *len, model.len)?;
        agrees("--width", *width, model.width)?;
        agrees("--layers", *layers, model.layers)?;
        agrees("--heads", *heads, model.heads)?;
        agrees("--dropout", *dropout, model.dropout)?;
        agrees("--positions", *positions, model.positions)?;
        agrees("--dtype", *dtype, saved.dtype)
    }
}

impl Arguments {
    /// A new run, for a text with so many different characters.
    pub fn new_run(&self, vocabulary: usize) -> RunConfig {
        let flags = &self.run;
        RunConfig {
            model: ModelConfig {
                vocabulary,
                len: flags.len.unwrap_or(128),
                width: flags.width.unwrap_or(128),
                layers: flags.layers.unwrap_or(4),
                heads: flags.heads.unwrap_or(4),
                dropout: flags.dropout.unwrap_or(0.0),
                positions: flags.positions.unwrap_or(Positions::Rotary),
                seed: flags.seed.unwrap_or(0),
            },
            batch: flags.batch.unwrap_or(16),
            lr: flags.lr.unwrap_or(2e-3),
            steps: flags.steps.unwrap_or(1000),
            dtype: flags.dtype.unwrap_or_default(),
        }
    }

    /// The saved run as these flags continue it: with another number of steps perhaps, but otherwise the same.
    pub fn resumed_run(&self, saved: &RunConfig, done: usize) -> Result<RunConfig> {
        let RunFlags { steps, seed, batch, lr, .. } = &self.run;
        self.run.agree_with_model(saved)?;
        agrees("--seed", *seed, saved.model.seed)?;
        agrees("--batch", *batch, saved.batch)?;
        agrees("--lr", *lr, saved.lr)?;
        let steps = steps.unwrap_or(saved.steps);
        ensure!(steps >= done, "--steps: expected at least {done}, the steps of the saved run, got {steps}");
        Ok(RunConfig { steps, ..saved.clone() })
    }

    /// A run that adapts a saved one: with its model, and these flags' steps, learning rate, batches and seed.
    pub fn adapted_run(&self, saved: &RunConfig) -> Result<RunConfig> {
        let (RunFlags { steps, seed, batch, lr, .. }, model) = (&self.run, &saved.model);
        self.run.agree_with_model(saved)?;
        Ok(RunConfig {
            model: ModelConfig { seed: seed.unwrap_or(model.seed), ..model.clone() },
            batch: batch.unwrap_or(saved.batch),
            lr: lr.unwrap_or(saved.lr),
            steps: steps.unwrap_or(saved.steps),
            dtype: saved.dtype,
        })
    }

    /// The file to save to. The folder of the default is made if it is missing; the folder of `--out` must exist.
    pub fn output_file(&self) -> Result<PathBuf> {
        if let Some(file) = self.out.as_ref().or(self.resume.as_ref()) {
            return Ok(file.clone());
        }
        std::fs::create_dir_all("target").context("can't make the folder target")?;
        Ok(DEFAULT_OUT.into())
    }
}

fn agrees<T: PartialEq + std::fmt::Debug>(flag: &str, given: Option<T>, saved: T) -> Result<()> {
    match given {
        Some(given) => {
            ensure!(
                given == saved,
                "{flag}: expected {saved:?}, that of the saved run, or no such flag, got {given:?}"
            );
            Ok(())
        }
        None => Ok(()),
    }
}

fn number(text: &str, expected: &str, allowed: impl Fn(f64) -> bool) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|&number| number.is_finite() && allowed(number));
    number.ok_or_else(|| format!("expected {expected}"))
}

fn above_zero(text: &str) -> Result<f64, String> {
    number(text, "a finite number above 0", |number| number > 0.0)
}

fn from_zero(text: &str) -> Result<f64, String> {
    number(text, "a finite number from 0 up", |number| number >= 0.0)
}

fn probability(text: &str) -> Result<f64, String> {
    number(text, "a probability in [0, 1)", |number| (0.0..1.0).contains(&number))
}

/// A size. The limit is beyond what a single machine can train.
fn size(text: &str) -> Result<usize, String> {
    let size = text.parse().ok().filter(|size| (1..=65536).contains(size));
    size.ok_or_else(|| "expected a whole number from 1 to 65536".into())
}
