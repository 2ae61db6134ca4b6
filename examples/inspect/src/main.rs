//! Shows what the words of a sentence attend to, in every layer and head: as a page, as a picture or in the terminal.
//!
//! ```text
//! scripts/minilm
//! cargo run --release --bin inspect -- "The cat sat on the mat because it is warm" --out page.html
//! cargo run --release --bin inspect -- "The cat sat on the mat because it is warm" --from warm --to mat
//! cargo run --release --bin inspect -- --layer-file weights/warm_attends_to_mat.safetensors
//! ```
//!
//! The model is all-MiniLM-L6-v2 from target/minilm, which `scripts/minilm` fetches, or another BERT (`--model`). With
//! `--layer-file` it is a single layer that candle-attention saved.

mod arguments;
mod look;
// Not as a dependency: `minilm` also depends on candle-transformers, which takes minutes to build.
#[path = "../../minilm/src/model/mod.rs"]
#[allow(dead_code)] // minilm uses all of it
mod model;
mod ranking;

use std::process::ExitCode;

use anyhow::Result;
use attention_examples::exit;
use attention_heatmap::Colour;
use clap::Parser;
use serde_json::{Value, json};

use arguments::{Arguments, Kind, Out};
use look::Look;
use ranking::Ranking;

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    let look = Look::new(arguments)?;
    let ranking = arguments.from.as_deref().zip(arguments.to.as_deref());
    let ranking = ranking.map(|(from, to)| Ranking::new(&look, from, to)).transpose()?;
    if let Some(out) = &arguments.out {
        draw(&look, arguments, out)?;
        eprintln!("{} is written", out.path.display());
    }
    if arguments.json {
        println!("{}", to_json(&look, ranking.as_ref())?);
    } else if let Some(ranking) = ranking {
        print!("{ranking}");
    } else if arguments.out.is_none() {
        let heatmap = look.heatmap(arguments.layer, arguments.head)?;
        print!("{}\n\n{}", look.title, heatmap.to_text(Colour::for_stream(&std::io::stdout()))?);
    }
    Ok(())
}

fn draw(look: &Look, arguments: &Arguments, out: &Out) -> Result<()> {
    let (layer, head) = (arguments.layer, arguments.head);
    match out.kind {
        Kind::Html => look.page(layer, head)?.save(&out.path)?,
        Kind::Svg => look.heatmap(layer, head)?.save_svg(&out.path)?,
        #[cfg(feature = "png")]
        Kind::Png => look.heatmap(layer, head)?.save_png(&out.path)?,
    }
    Ok(())
}

fn to_json(look: &Look, ranking: Option<&Ranking>) -> Result<Value> {
    let (layers, heads, _, _) = look.weights.dims4()?;
    let weights = (0..layers).map(|layer| {
        let heads = (0..heads).map(|head| Ok(look.weights.get(layer)?.get(head)?.to_vec2::<f32>()?));
        heads.collect::<Result<Vec<_>>>()
    });
    let weights = weights.collect::<Result<Vec<_>>>()?;
    let ranking = ranking.map(Ranking::to_json);
    Ok(json!({ "title": look.title, "words": look.words, "weights": weights, "ranking": ranking }))
}
