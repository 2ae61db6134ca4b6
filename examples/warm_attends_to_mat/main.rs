//! The lesson of the notes: in "The cat sat on the mat because it is warm", "warm" learns to attend to "mat".
//!
//! ```text
//! cargo run --release --example warm_attends_to_mat
//! cargo run --release --example warm_attends_to_mat -- --sentence "The dog barked at the old clock" --query barked --target clock
//! cargo run --release --example warm_attends_to_mat -- --load weights/warm_attends_to_mat.safetensors
//! ```
//!
//! Without trainable weights a word attends to words with similar embeddings, and the embeddings of "warm" and "mat" aren't
//! similar. W_Q and W_K learn a space in which they are. The program then saves the layer, loads it back, and checks that it
//! gives the same numbers.

mod arguments;
mod lesson;
mod sentence;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use attention_examples::exit;
use attention_heatmap::{Colour, Heatmap};
use candle_attention::{SelfAttention, SelfAttentionConfig, self_attention};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use clap::Parser;
use serde_json::json;

use arguments::Arguments;
use lesson::Lesson;
use sentence::Sentence;

/// Entries of an embedding, and of a query, key and value.
const DIM: usize = 16;

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    let sentence = Sentence::new(&arguments.sentence, &arguments.query, &arguments.target)?;
    let device = arguments.device.open()?;
    // With --json, stdout holds only the one line for another program.
    let (mut screen, colour): (Box<dyn Write>, Colour) = if arguments.json {
        (Box::new(std::io::stderr()), Colour::for_stream(&std::io::stderr()))
    } else {
        (Box::new(std::io::stdout()), Colour::for_stream(&std::io::stdout()))
    };

    let loaded = arguments.load.as_ref().map(|file| SelfAttention::load(file, &device)).transpose()?;
    let config = match &loaded {
        Some(layer) => layer.config().clone(),
        None => SelfAttentionConfig { seed: arguments.seed, ..SelfAttentionConfig::single_head(DIM, DIM, DIM) },
    };
    let untrained = new_layer(&config, &device)?;
    let lesson = Lesson::new(&sentence, &untrained, &device)?;
    let before = lesson.look(&untrained)?.weights;
    introduce(&mut screen, &sentence, &lesson)?;
    let before_text = heatmap(&before, &sentence)?.to_text(colour)?;
    writeln!(screen, "With W_Q, W_K and W_V as they start, untrained:\n\n{before_text}")?;

    let steps = if loaded.is_some() { 0 } else { arguments.steps };
    let layer = loaded.unwrap_or(untrained);
    if steps > 0 {
        lesson.teach(&layer, steps, arguments.lr)?;
    }
    let after = lesson.look(&layer)?.weights;
    match &arguments.load {
        Some(file) => writeln!(screen, "With the layer from {}:\n", file.display())?,
        None => writeln!(screen, "After {steps} steps of training W_Q and W_K:\n")?,
    }
    writeln!(screen, "{}", heatmap(&after, &sentence)?.to_text(colour)?)?;

    if let Some(file) = &arguments.picture {
        let both = heatmap(&Tensor::stack(&[&before, &after], 0)?, &sentence)?;
        both.titled(&["before training", "after training"])?.save_svg(file)?;
    }
    let reload_identical = save_and_reload(arguments, &lesson, &layer, &device, &mut screen)?;
    let (query, target) = (sentence.query_word(), sentence.target_word());
    let (before, on_target) = (lesson.on_target(&before)?, lesson.on_target(&after)?);
    writeln!(screen, "\"{query}\" gives \"{target}\" {before:.4} of its attention before, {on_target:.4} after.")?;
    if arguments.json {
        let line = json!({
            "query": query, "target": target, "untrained": lesson.without_parameters()?, "before": before,
            "after": on_target, "steps": steps, "loss": lesson.loss(&after)?.to_scalar::<f32>()?,
            "reload_identical": reload_identical,
        });
        println!("{line}");
    }
    ensure!(reload_identical, "the loaded layer gives other numbers than the one that was saved");
    Ok(())
}

fn new_layer(config: &SelfAttentionConfig, device: &Device) -> Result<SelfAttention> {
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, device);
    Ok(self_attention(config, vb)?)
}

/// Of weights (len, len), or of several (.., len, len).
fn heatmap(weights: &Tensor, sentence: &Sentence) -> Result<Heatmap> {
    Ok(Heatmap::new(&weights.flatten_all()?.to_vec1::<f32>()?, &sentence.words)?)
}

fn introduce(screen: &mut impl Write, sentence: &Sentence, lesson: &Lesson) -> Result<()> {
    let (query, target) = (sentence.query_word(), sentence.target_word());
    writeln!(screen, "{}\n", sentence.words.join(" "))?;
    writeln!(
        screen,
        "\"{query}\" should attend to \"{target}\". Without trainable weights a word attends to those with\n\
         embeddings like its own. The cosine of these two is {:.2}, and \"{target}\" gets {:.4}.\n",
        lesson.likeness()?,
        lesson.without_parameters()?
    )?;
    Ok(())
}

/// Saves the layer, loads it back, and compares the outputs of both for the sentence, bit by bit. A layer that came from a
/// file is saved to memory only.
fn save_and_reload(
    arguments: &Arguments,
    lesson: &Lesson,
    layer: &SelfAttention,
    device: &Device,
    screen: &mut impl Write,
) -> Result<bool> {
    let bits = |layer: &SelfAttention| -> Result<Vec<u32>> {
        let look = lesson.look(layer)?;
        let numbers = Tensor::cat(&[look.weights.flatten_all()?, look.output.flatten_all()?], 0)?;
        Ok(numbers.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    };
    if arguments.load.is_some() {
        return Ok(bits(layer)? == bits(&SelfAttention::from_bytes(&layer.to_bytes()?, device)?)?);
    }
    let file = arguments.output_file()?;
    layer.save(&file)?;
    let identical = bits(layer)? == bits(&SelfAttention::load(&file, device)?)?;
    let verdict = if identical { "the same numbers" } else { "OTHER numbers" };
    writeln!(screen, "Saved to {}; loaded back, it gives {verdict}.", file.display())?;
    Ok(identical)
}
