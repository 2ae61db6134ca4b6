//! The command line.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use attention_examples::device::DeviceName;
use clap::Parser;

/// Shows how similar sentences are, and what a word attends to in them, with all-MiniLM-L6-v2.
#[derive(Parser, Debug)]
#[command(name = "minilm")]
pub struct Arguments {
    /// The sentences
    #[arg(value_name = "SENTENCE", required_unless_present = "file")]
    pub sentences: Vec<String>,
    /// Read more sentences from a file, one a line
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// The folder with config.json, model.safetensors and tokenizer.json; scripts/minilm fetches one
    #[arg(long, value_name = "DIR", default_value = "target/minilm")]
    pub model: PathBuf,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Show what this word attends to in its sentences; `word#2` is its second occurrence
    #[arg(long, value_name = "WORD")]
    pub attend: Option<String>,
    /// Let --attend show the heads of this layer, from 0 [default: all layers, each the mean of its heads]
    #[arg(long, value_name = "N", requires = "attend")]
    pub layer: Option<usize>,
    /// Let --attend show this head of the layer alone, from 0
    #[arg(long, value_name = "N", requires = "layer")]
    pub head: Option<usize>,
    /// Also run candle-transformers' BERT, and compare its token states and its time
    #[arg(long)]
    pub compare: bool,
    /// Print the result to stdout as one line of JSON
    #[arg(long)]
    pub json: bool,
}

impl Arguments {
    /// The sentences of the command line, then the lines of the file that aren't empty.
    pub fn texts(&self) -> Result<Vec<String>> {
        let mut texts = self.sentences.clone();
        ensure!(texts.iter().all(|text| !text.trim().is_empty()), "expected a sentence, got an empty one");
        if let Some(file) = &self.file {
            let lines = fs::read_to_string(file).with_context(|| format!("can't read {}", file.display()))?;
            texts.extend(lines.lines().filter(|line| !line.trim().is_empty()).map(str::to_string));
        }
        ensure!(!texts.is_empty(), "expected at least one sentence, got none");
        Ok(texts)
    }
}
