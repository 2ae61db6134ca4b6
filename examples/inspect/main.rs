//! What the words of a sentence look at, in every layer and head, as a page, a picture or in the terminal.
//!
//! ```text
//! .ci/minilm
//! cargo run --release --example inspect -- "The cat sat on the mat because it is warm" --out page.html
//! cargo run --release --example inspect -- "The cat sat on the mat because it is warm" --from warm --to mat
//! cargo run --release --example inspect -- --layer-file weights/warm_attends_to_mat.safetensors
//! ```
//!
//! The model is all-MiniLM-L6-v2 from target/minilm, or another BERT (`--model`); `.ci/minilm` fetches it. With
//! `--layer-file` it is a single layer that this crate saved.

mod arguments;
#[path = "../common/device.rs"]
mod device;
#[path = "../common/embeddings.rs"]
mod embeddings;
#[path = "../common/exit.rs"]
mod exit;
mod look;
#[path = "../minilm/model/mod.rs"]
#[allow(dead_code)] // minilm uses all of it
mod model;
mod ranking;
#[path = "../common/words.rs"]
mod words;

use std::process::ExitCode;

use anyhow::Result;
use candle_attention::heatmap::Colour;
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
