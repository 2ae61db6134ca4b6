//! The lesson without a teacher: a model learns which noun a property describes, and attention finds the noun by itself.
//!
//! ```text
//! cargo run --release --example which_noun
//! cargo run --release --example which_noun -- --seed 2 --out model.safetensors --picture which_noun.svg
//! cargo run --release --example which_noun -- --load weights/which_noun.safetensors
//! ```
//!
//! In "The cat sat on the mat because it is warm" the mat is warm. With "hungry" instead of "warm" it is the cat that is
//! hungry. In the example `warm_attends_to_mat` the loss says what "warm" should attend to. Here the model only has to name
//! the noun, and the loss never sees an attention weight. But the model can name the noun only if attention brings the noun's
//! value to the property's position.
//!
//! A quarter of the pairs of noun and property are held out: no training sentence has both "mat" and "warm" in it, or both
//! "cat" and "hungry". On all sentences with such a pair the program measures
//!
//! - `held_out_accuracy`: the share of sentences whose noun the model names, out of all sixteen nouns,
//! - `attention_on_noun`: the share of sentences in which the described noun gets more than half of the property's attention
//!   over all words of the sentence, the property included. The layer has a single head.
//!
//! `control_accuracy` and `control_attention` are the same shares for a control: a model that was trained on the same
//! sentences with shuffled labels. It shows what isn't learned from the task.
//!
//! `grammar.rs` makes the sentences, `model.rs` is the model, `lesson.rs` trains and measures it.

mod arguments;
mod file;
mod grammar;
mod lesson;
mod model;
mod reader;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use attention_examples::exit;
use attention_heatmap::{Colour, Heatmap};
use candle_core::Tensor;
use clap::Parser;
use serde_json::json;

use arguments::Arguments;
use grammar::{Sentence, Sentences};
use lesson::Report;
use model::Model;
use reader::Reader;

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    // With --json, stdout holds only the one line for another program.
    let (mut screen, colour): (Box<dyn Write>, Colour) = if arguments.json {
        (Box::new(std::io::stderr()), Colour::for_stream(&std::io::stderr()))
    } else {
        (Box::new(std::io::stdout()), Colour::for_stream(&std::io::stdout()))
    };
    let sentences = Sentences::all();
    let reader = Reader { vocabulary: sentences.vocabulary(), device: arguments.device.open()? };
    let loaded = arguments.load.as_ref().map(|path| file::load(path, &reader)).transpose()?;
    let seed = loaded.as_ref().map_or(arguments.seed, |model| model.config().seed);
    introduce(&mut screen, &sentences)?;

    let untrained = || Model::new(seed, reader.vocabulary.len(), grammar::nouns().len(), &reader.device);
    let before = untrained()?;
    let (after, control) = match loaded {
        Some(model) => (model, None),
        None => {
            let (model, control) = (untrained()?, untrained()?);
            lesson::teach(&model, &reader, &sentences.training, arguments.steps, "training")?;
            if let Some(path) = &arguments.out {
                file::save(&model, &reader, path)?;
                writeln!(screen, "Saved to {}.\n", path.display())?;
            }
            let shuffled = lesson::with_shuffled_labels(&sentences.training, seed);
            lesson::teach(&control, &reader, &shuffled, arguments.steps, "control")?;
            (model, Some(control))
        }
    };

    let shown = sentences.shown();
    let looks = [look(&before, &reader, &shown)?, look(&after, &reader, &shown)?];
    let heatmap = heatmap(&looks, &shown)?;
    writeln!(screen, "{}", heatmap.to_text(colour)?)?;
    if let Some(path) = &arguments.picture {
        heatmap.save_svg(path)?;
    }
    let report = |model: &Model| Report::new(model, &reader, &sentences.held_out);
    let reports = [report(&before)?, report(&after)?];
    let control = control.as_ref().map(report).transpose()?;
    tell(&mut screen, &reports, control.as_ref())?;
    if arguments.json {
        let steps = if arguments.load.is_some() { None } else { Some(arguments.steps) };
        println!("{}", to_json(&reports, control.as_ref(), on_noun(&looks, &shown)?, seed, steps));
    }
    Ok(())
}

fn introduce(screen: &mut impl Write, sentences: &Sentences) -> Result<()> {
    for sentence in sentences.shown() {
        let (property, noun) = (sentence.property_word(), sentence.noun_word());
        writeln!(screen, "{}: \"{property}\" describes \"{noun}\".", sentence.words.join(" "))?;
    }
    writeln!(
        screen,
        "\nA model learns to say the noun from {} other sentences. None of them has both\n\
         the noun and the property of one of these two, or of {} more that are held out.\n\
         Nobody tells it where to look.\n",
        sentences.training.len(),
        sentences.held_out.len() - sentences.shown().len()
    )?;
    Ok(())
}

/// The weights of each sentence's property, (sentences, len).
fn look(model: &Model, reader: &Reader, sentences: &[&Sentence]) -> Result<Tensor> {
    let weights = model.weights(&reader.read(sentences)?)?;
    let row = |(i, sentence): (usize, &&Sentence)| weights.get(i)?.get(sentence.property);
    let rows = sentences.iter().enumerate().map(row).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::stack(&rows, 0)?)
}

/// A heat map with a row for each property. The sentences differ only in the property, so they share the columns.
fn heatmap(looks: &[Tensor; 2], sentences: &[&Sentence]) -> Result<Heatmap> {
    let properties = sentences.iter().map(|sentence| sentence.property_word()).collect::<Vec<_>>();
    let mut words = sentences[0].words.clone();
    words[sentences[0].property] = properties.join("/");
    let weights = Tensor::stack(looks, 0)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(Heatmap::between(&weights, &properties, &words)?.titled(&["before training", "after training"])?)
}

/// The weight of the noun in the property's row of each sentence, before and after.
fn on_noun(looks: &[Tensor; 2], sentences: &[&Sentence]) -> Result<Vec<serde_json::Value>> {
    let share = |look: &Tensor, i: usize| -> Result<f32> { Ok(look.get(i)?.get(sentences[i].noun)?.to_scalar()?) };
    let line = |(i, sentence): (usize, &&Sentence)| -> Result<_> {
        let (before, after) = (share(&looks[0], i)?, share(&looks[1], i)?);
        Ok(
            json!({ "property": sentence.property_word(), "noun": sentence.noun_word(), "before": before, "after": after }),
        )
    };
    sentences.iter().enumerate().map(line).collect()
}

fn tell(screen: &mut impl Write, [before, after]: &[Report; 2], control: Option<&Report>) -> Result<()> {
    let columns = ["noun right", "most attention on it", "mean attention"];
    writeln!(screen, "{:<22}{:>12}{:>24}{:>18}", "Sentences held out", columns[0], columns[1], columns[2])?;
    let rows = [("before training", Some(before)), ("after training", Some(after)), ("labels shuffled", control)];
    for (title, report) in rows {
        if let Some(Report { accuracy, attention_on_noun, mean_attention }) = report {
            let (accuracy, most, mean) = (accuracy * 100.0, attention_on_noun * 100.0, mean_attention * 100.0);
            writeln!(screen, "  {title:<20}{accuracy:11.1}%{most:23.1}%{mean:17.1}%")?;
        }
    }
    Ok(())
}

fn to_json(
    [before, after]: &[Report; 2],
    control: Option<&Report>,
    shown: Vec<serde_json::Value>,
    seed: u64,
    steps: Option<usize>,
) -> serde_json::Value {
    json!({
        "held_out_accuracy": after.accuracy,
        "attention_on_noun": after.attention_on_noun,
        "mean_attention": after.mean_attention,
        "control_accuracy": control.map(|control| control.accuracy),
        "control_attention": control.map(|control| control.attention_on_noun),
        "untrained_accuracy": before.accuracy,
        "untrained_attention": before.attention_on_noun,
        "shown": shown,
        "seed": seed,
        "steps": steps,
    })
}
