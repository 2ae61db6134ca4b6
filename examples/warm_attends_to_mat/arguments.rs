//! The command line.

use std::path::PathBuf;

use anyhow::{Context, Result};
use attention_examples::device::DeviceName;
use clap::Parser;

/// Teaches one attention head that a word should attend to another, and shows its weights.
#[derive(Parser, Debug)]
#[command(name = "warm_attends_to_mat")]
pub struct Arguments {
    /// Training steps
    #[arg(long, default_value_t = 200, conflicts_with = "load")]
    pub steps: usize,
    /// Learning rate of AdamW
    #[arg(long, default_value_t = 0.02, value_parser = positive_number, allow_negative_numbers = true, conflicts_with = "load")]
    pub lr: f64,
    /// The seed of the initial weights
    #[arg(long, default_value_t = 1, conflicts_with = "load")]
    pub seed: u64,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Where to save the layer [default: target/warm_attends_to_mat.safetensors]
    #[arg(long, value_name = "FILE", conflicts_with = "load")]
    pub out: Option<PathBuf>,
    /// Show a saved layer, without training
    #[arg(long, value_name = "FILE")]
    pub load: Option<PathBuf>,
    /// The sentence; words are separated by spaces
    #[arg(long, default_value = "The cat sat on the mat because it is warm")]
    pub sentence: String,
    /// The word that should attend; `word#2` is its second occurrence
    #[arg(long, default_value = "warm")]
    pub query: String,
    /// The word that it should attend to; `word#2` is its second occurrence
    #[arg(long, default_value = "mat")]
    pub target: String,
    /// Also draw the heat maps before and after to an SVG file
    #[arg(long, value_name = "FILE")]
    pub picture: Option<PathBuf>,
    /// Print the result to stdout as one line of JSON, everything else to stderr
    #[arg(long)]
    pub json: bool,
}

impl Arguments {
    /// The file to save to. The folder of the default is made if it is missing; the folder of `--out` must exist.
    pub fn output_file(&self) -> Result<PathBuf> {
        match &self.out {
            Some(file) => Ok(file.clone()),
            None => {
                std::fs::create_dir_all("target").context("can't make the folder target")?;
                Ok("target/warm_attends_to_mat.safetensors".into())
            }
        }
    }
}

fn positive_number(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("expected a finite number above 0".into()),
    }
}
