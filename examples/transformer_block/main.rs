//! A small transformer of candle-attention's blocks, trained with its optimiser, saved and loaded with candle's `VarMap`.
//!
//! The model reads random digits and writes them backwards (`3 1 4 1 5 = 5 1 4 1 3`) or, with `--task copy`, once more.
//! All parameters are in one `VarMap`. The model is trained with `AdamW`, saved with `VarMap::save` and loaded into a new
//! model, which must give the same logits to the last bit.
//!
//! ```text
//! cargo run --release --example transformer_block
//! cargo run --release --example transformer_block -- --task copy --seed 3
//! cargo run --release --example transformer_block -- --steps 20 --json
//! ```
//!
//! `model.rs` is the transformer, `data.rs` its task.

mod data;
mod model;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use attention_examples::device::DeviceName;
use attention_examples::exit;
use attention_examples::parameters::initialise;
use candle_attention::block::{CrossEntropyOptions, cross_entropy};
use candle_attention::train::{AdamW, AdamWConfig, backward, named_variables};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use data::{Batch, Data, Task};
use model::{BLOCKS, Transformer};

/// Train a transformer block to reverse or copy digits, save it, load it, and check that nothing changed.
#[derive(Parser)]
struct Flags {
    /// What to do with a sequence of digits
    #[arg(long, value_enum, default_value_t = Task::Reverse)]
    task: Task,
    /// Training steps; 0 only saves and loads
    #[arg(long, default_value_t = 200, allow_negative_numbers = true)]
    steps: usize,
    /// Learning rate
    #[arg(long, default_value_t = 3e-3, value_parser = learning_rate, allow_negative_numbers = true)]
    lr: f64,
    /// The seed of initial parameters and data
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    device: DeviceName,
    /// Where to save the model
    #[arg(long, value_name = "FILE", default_value = "target/transformer_block.safetensors")]
    out: PathBuf,
    /// Print the results as one JSON object on stdout, everything else on stderr
    #[arg(long)]
    json: bool,
}

fn learning_rate(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(lr) if lr > 0.0 && f64::is_finite(lr) => Ok(lr),
        _ => bail!("expected a finite number above 0"),
    }
}

fn main() -> ExitCode {
    exit::code(run(&Flags::parse()))
}

fn run(flags: &Flags) -> Result<()> {
    let mut out: Box<dyn Write> = if flags.json { Box::new(io::stderr()) } else { Box::new(io::stdout()) };
    let device = flags.device.open()?;
    prepare(&flags.out)?;

    let varmap = VarMap::new();
    let model = Transformer::new(flags.seed, VarBuilder::from_varmap(&varmap, DType::F32, &device))?;
    initialise(&named_variables(&varmap), flags.seed, BLOCKS)?;
    let mut data = Data::new(flags.task, flags.seed);
    let held_out = data.held_out(&device)?;
    let parameters: usize = varmap.all_vars().iter().map(|var| var.elem_count()).sum();
    writeln!(out, "A transformer of {parameters} parameters learns to {} {} digits.\n", flags.task, data::DIGITS)?;

    let before = evaluate(&model, &held_out)?;
    let start = Instant::now();
    train(&model, &varmap, &mut data, flags, &device)?;
    let seconds = start.elapsed().as_secs_f64();
    let after = evaluate(&model, &held_out)?;
    report(&mut out, &held_out, [&before, &after], (flags.steps, seconds))?;

    let reload_identical = reload_is_identical(&model, &varmap, &held_out, flags)?;
    writeln!(out, "\nSaved to {}, loaded into a new model.", flags.out.display())?;
    if flags.json {
        print_json(flags, [&before, &after], reload_identical)?;
    }
    ensure!(reload_identical, "the logits of the loaded model differ from those of the saved one");
    writeln!(out, "Its logits are the same, to the last bit.")?;
    Ok(())
}

/// Checks before the training, not after it, that the model can be saved.
fn prepare(path: &Path) -> Result<()> {
    ensure!(!path.is_dir(), "--out {}: expected a file, got a folder", path.display());
    match path.parent() {
        Some(folder) => std::fs::create_dir_all(folder).with_context(|| format!("can't make {}", folder.display())),
        None => Ok(()),
    }
}

/// The cross-entropy of the answer's digits, each predicted from the right digits before it.
fn loss(model: &Transformer, batch: &Batch) -> Result<Tensor> {
    let logits = model.forward(&batch.tokens)?.narrow(1, data::DIGITS, data::DIGITS)?;
    Ok(cross_entropy(&logits, &batch.answers, &CrossEntropyOptions::default())?)
}

fn finite(loss: &Tensor) -> Result<f32> {
    let loss = loss.to_scalar::<f32>()?;
    ensure!(loss.is_finite(), "the loss is {loss}: try a smaller --lr");
    Ok(loss)
}

fn train(model: &Transformer, varmap: &VarMap, data: &mut Data, flags: &Flags, device: &Device) -> Result<()> {
    // A step refuses parameters that get no gradient: some of candle's operations drop it without an error.
    let mut optimizer = AdamW::from_varmap(varmap, AdamWConfig { lr: flags.lr, ..Default::default() })?;
    // Drawn on stderr, and only if that is a terminal.
    let style = ProgressStyle::with_template("training {bar:40} {pos}/{len} steps, {msg}")?;
    let progress = ProgressBar::new(flags.steps as u64).with_style(style);
    for _ in 0..flags.steps {
        let loss = loss(model, &data.batch(device)?)?;
        optimizer.step(&backward(&loss)?)?;
        progress.set_message(format!("loss {:.4}", finite(&loss)?));
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(())
}

/// The evaluation of a model.
struct Evaluation {
    loss: f32,
    /// The share of right digits, where the model continues its own answer.
    accuracy: f32,
    /// Its answers, (batch, digits).
    answers: Tensor,
}

fn evaluate(model: &Transformer, held_out: &Batch) -> Result<Evaluation> {
    // The question alone: digits and `=`.
    let mut tokens = held_out.tokens.narrow(1, 0, data::DIGITS + 1)?;
    for _ in 0..data::DIGITS {
        let logits = model.forward(&tokens)?;
        let next = logits.narrow(1, tokens.dim(1)? - 1, 1)?.argmax(D::Minus1)?;
        tokens = Tensor::cat(&[tokens, next], 1)?;
    }
    let answers = tokens.narrow(1, data::DIGITS + 1, data::DIGITS)?.contiguous()?;
    let right = answers.eq(&held_out.answers)?.to_dtype(DType::F32)?;
    Ok(Evaluation { loss: finite(&loss(model, held_out)?)?, accuracy: right.mean_all()?.to_scalar()?, answers })
}

fn report(
    out: &mut impl Write,
    held_out: &Batch,
    [before, after]: [&Evaluation; 2],
    (steps, seconds): (usize, f64),
) -> Result<()> {
    writeln!(out, "held out: {} sequences    before    after", data::HELD_OUT)?;
    writeln!(out, "  loss                    {:8.4} {:8.4}", before.loss, after.loss)?;
    writeln!(out, "  digits right            {:7.1}% {:7.1}%", before.accuracy * 100.0, after.accuracy * 100.0)?;
    writeln!(out, "  ({steps} steps in {seconds:.1} s)\n")?;
    writeln!(out, "one of them")?;
    for (name, tokens) in [
        ("digits", &held_out.tokens),
        ("expected", &held_out.answers),
        ("before", &before.answers),
        ("after", &after.answers),
    ] {
        let digits = tokens.get(0)?.narrow(0, 0, data::DIGITS)?.to_vec1::<u32>()?;
        writeln!(out, "  {name:<9} {}", data::to_text(&digits))?;
    }
    Ok(())
}

fn print_json(flags: &Flags, [before, after]: [&Evaluation; 2], reload_identical: bool) -> Result<()> {
    let results = serde_json::json!({
        "task": flags.task.to_string(),
        "steps": flags.steps,
        "loss_before": before.loss,
        "loss_after": after.loss,
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "reload_identical": reload_identical,
    });
    Ok(writeln!(io::stdout(), "{results}")?)
}

/// Saves the model and loads it into a new one with other initial parameters. Returns whether the logits are the same to
/// the last bit.
fn reload_is_identical(model: &Transformer, varmap: &VarMap, batch: &Batch, flags: &Flags) -> Result<bool> {
    let path = &flags.out;
    varmap.save(path).with_context(|| format!("can't save {}", path.display()))?;
    let mut loaded_varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&loaded_varmap, DType::F32, batch.tokens.device());
    let loaded = Transformer::new(flags.seed.wrapping_add(1), vb)?;
    loaded_varmap.load(path).with_context(|| format!("can't load {}", path.display()))?;

    let bits = |model: &Transformer| -> Result<Vec<u32>> {
        let logits = model.forward(&batch.tokens)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(logits.into_iter().map(f32::to_bits).collect())
    };
    Ok(bits(model)? == bits(&loaded)?)
}
