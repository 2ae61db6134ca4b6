//! all-MiniLM-L6-v2, the sentence encoder, with this crate's attention in each of its blocks.
//!
//! ```text
//! .ci/minilm
//! cargo run --release --example minilm -- "A cat sat on the mat" "A kitten lies on a rug" "Stocks fell on Monday"
//! cargo run --release --example minilm -- "The cat sat on the mat because it is warm" --attend warm
//! cargo run --release --example minilm -- --file sentences.txt --json
//! ```
//!
//! `.ci/minilm` fetches the model, 91 MB, to target/minilm. `model/` is the model; `peer.rs` is the same one as
//! candle-transformers writes it, for `--compare`.

mod arguments;
mod attend;
mod compare;
#[path = "../common/device.rs"]
mod device;
mod embed;
#[path = "../common/exit.rs"]
mod exit;
mod model;
mod peer;
#[path = "../common/words.rs"]
mod words;

use std::process::ExitCode;

use anyhow::Result;
use candle_attention::heatmap::Colour;
use clap::Parser;
use serde_json::json;

use arguments::Arguments;
use attend::{Look, looks};
use compare::{Comparison, compare};
use embed::{embed, most_alike, similarities};
use model::{Model, Sentence};

/// A table of more sentences is too much to read.
const MAX_TABLE: usize = 12;
/// The pairs that are shown then.
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

/// A table, or the most alike of too many.
fn show_similarities(sentences: &[Sentence], similarities: &[Vec<f32>]) {
    if sentences.len() > MAX_TABLE {
        for (i, j, similarity) in most_alike(similarities, PAIRS) {
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
