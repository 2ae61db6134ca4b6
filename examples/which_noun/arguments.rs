//! The command line.

use std::path::PathBuf;

use attention_examples::device::DeviceName;
use clap::Parser;

/// Teaches a model which noun a property describes, and shows what the property attends to.
#[derive(Parser, Debug)]
#[command(name = "which_noun")]
pub struct Arguments {
    /// Training steps
    #[arg(long, default_value_t = 300, conflicts_with = "load")]
    pub steps: usize,
    /// The seed of the initial weights, the order of the sentences and the control's labels
    #[arg(long, default_value_t = 1, conflicts_with = "load")]
    pub seed: u64,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Save the trained model
    #[arg(long, value_name = "FILE", conflicts_with = "load")]
    pub out: Option<PathBuf>,
    /// Show a saved model, without training
    #[arg(long, value_name = "FILE")]
    pub load: Option<PathBuf>,
    /// Also draw the heat maps before and after to an SVG file
    #[arg(long, value_name = "FILE")]
    pub picture: Option<PathBuf>,
    /// Print the result to stdout as one line of JSON, everything else to stderr
    #[arg(long)]
    pub json: bool,
}
