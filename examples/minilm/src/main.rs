//! The sentence encoder all-MiniLM-L6-v2, with candle-attention in each of its blocks.
//!
//! ```text
//! scripts/minilm
//! cargo run --release --bin minilm -- "A cat sat on the mat" "A kitten lies on a rug" "Stocks fell on Monday"
//! cargo run --release --bin minilm -- "The cat sat on the mat because it is warm" --attend warm
//! cargo run --release --bin minilm -- --file sentences.txt --json
//! ```
//!
//! `scripts/minilm` fetches the model, 91 MB, to target/minilm. `model/` is the model. `peer.rs` is the same model from
//! candle-transformers, for `--compare`.

mod arguments;
mod attend;
mod compare;
mod embed;

use std::process::ExitCode;

use anyhow::Result;
use attention_examples::exit;
use attention_heatmap::Colour;
use clap::Parser;
use minilm::model::{Model, Sentence};
use serde_json::json;

use arguments::Arguments;
use attend::{Look, looks};
use compare::{Comparison, compare};
use embed::{embed, most_similar, similarities};

/// The most sentences that are shown as a table. More wouldn't fit the width of a terminal.
const MAX_TABLE: usize = 12;
/// How many of the most similar pairs are shown where there are too many sentences for a table.
const PAIRS: usize = 10;

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    let texts = arguments.texts()?;
    let device = arguments.device.open()?;
    Model::check_pooling(&arguments.model)?;
    let model = Model::open(&arguments.model, &device)?;
    let sentences = texts.iter().map(|text| model.read(text)).collect::<Result<Vec<_>>>()?;
    for note in sentences.iter().filter_map(Sentence::cut_note) {
        eprintln!("note: {note}");
    }

    let embeddings = embed(&model, &sentences)?;
    let similarities = similarities(&embeddings)?.to_vec2::<f32>()?;
    let looks = looks(&model, &sentences, arguments)?;
    let comparison = arguments.compare.then(|| compare(&model, &arguments.model, &sentences, &device)).transpose()?;
    if arguments.json {
        let looks = looks.iter().map(Look::to_json).collect::<Result<Vec<_>>>()?;
        let line = json!({
            "sentences": texts, "embeddings": embeddings.to_vec2::<f32>()?,
            "similarities": similarities, "attention": looks,
            "comparison": comparison.as_ref().map(Comparison::to_json),
        });
        println!("{line}");
        return Ok(());
    }
    if looks.is_empty() {
        show_similarities(&sentences, &similarities);
    }
    for look in &looks {
        println!("{}", look.to_text(Colour::for_stream(&std::io::stdout()))?);
    }
    if let Some(comparison) = comparison {
        println!("{comparison}");
    }
    Ok(())
}

/// A table of all similarities, or the most similar pairs of too many sentences.
fn show_similarities(sentences: &[Sentence], similarities: &[Vec<f32>]) {
    if sentences.len() > MAX_TABLE {
        for (i, j, similarity) in most_similar(similarities, PAIRS) {
            println!("{similarity:>5.2}  {:?}\n       {:?}", sentences[i].text, sentences[j].text);
        }
        return;
    }
    for (i, sentence) in sentences.iter().enumerate() {
        println!("{:>2}  {:?}", i + 1, sentence.text);
    }
    print!("\n  ");
    (1..=sentences.len()).for_each(|number| print!("{number:>6}"));
    for (i, row) in similarities.iter().enumerate() {
        print!("\n{:>2}", i + 1);
        row.iter().for_each(|similarity| print!("{similarity:>6.2}"));
    }
    println!();
}
