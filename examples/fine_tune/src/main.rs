//! all-MiniLM-L6-v2, adapted by LoRA to tell praise from complaint in sentences of product reviews.
//!
//! ```text
//! scripts/minilm && scripts/reviews
//! cargo run --release --bin fine_tune
//! cargo run --release --bin fine_tune -- --quantise q4_0 --seeds 0
//! ```
//!
//! For each seed it trains a head on the untouched encoder, and a head together with an adapter, in the same number of steps. It judges both
//! on sentences of other reviews, and saves the adapter as PEFT does. `parity.py` is the same program on PyTorch and PEFT: it says how
//! the numbers are drawn, in which order the sentences come, and what the steps are.
//!
//! `data.rs` reads the sentences, `classifier.rs` is the model, `training.rs` its steps.

mod arguments;
mod classifier;
mod data;
mod training;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use attention_examples::exit;
use candle_core::DType;
use clap::Parser;
use minilm::model::Model;
use serde_json::{Value, json};

use arguments::Arguments;
use classifier::Embedder;
use data::{Example, read_all};
use training::{Frozen, Score, train};

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()))
}

/// What one seed gave.
struct Outcome {
    seed: u64,
    head: Score,
    tuned: Score,
    losses: Vec<f32>,
    seconds_per_step: f64,
    trained_numbers: usize,
}

fn run(arguments: &Arguments) -> Result<()> {
    arguments.check()?;
    let device = arguments.device.open()?;
    // In JSON mode stdout is for the result alone.
    let mut screen: Box<dyn Write> =
        if arguments.json { Box::new(std::io::stderr()) } else { Box::new(std::io::stdout()) };
    Model::check_pooling(&arguments.model)?;
    let model = Model::open(&arguments.model, &device)?.with_max_tokens(arguments.max_tokens)?;
    let [training, held_out] = read_all(&arguments.data, &model)?;
    writeln!(screen, "{} sentences to learn from, {} held out", training.len(), held_out.len())?;
    let base = Embedder::new(&model, arguments)?;
    let frozen = Frozen::new(&base, &training, &held_out)?;
    let mut outcomes = Vec::new();
    for &seed in &arguments.seeds {
        let outcome = run_seed(arguments, &base, &frozen, [&training, &held_out], seed)?;
        writeln!(
            screen,
            "seed {seed}: head alone {}, with the adapter {}, {:.3} s a step",
            outcome.head, outcome.tuned, outcome.seconds_per_step
        )?;
        outcomes.push(outcome);
    }
    let [head, tuned] = [|x: &Outcome| x.head.accuracy, |x: &Outcome| x.tuned.accuracy].map(|of| spread(&outcomes, of));
    writeln!(screen, "accuracy: head alone {}, with the adapter {}", show(head), show(tuned))?;
    if let Some(out) = &arguments.out {
        writeln!(screen, "adapters: {}", out.display())?;
    }
    if arguments.json {
        println!("{}", to_json(&outcomes, [training.len(), held_out.len()]));
    }
    Ok(())
}

fn run_seed(
    arguments: &Arguments,
    base: &Embedder,
    frozen: &Frozen,
    [training, held_out]: [&[Example]; 2],
    seed: u64,
) -> Result<Outcome> {
    let head = frozen.head(arguments, seed)?;
    let classifier = base.adapted(arguments, seed)?;
    let run = train(&classifier, arguments, training, seed)?;
    if let Some(out) = &arguments.out {
        let folder = out.join(format!("seed{seed}"));
        classifier.save(&folder).with_context(|| format!("can't save the adapter to {}", folder.display()))?;
    }
    let tuned = Score::of(&classifier.logits_of_all(held_out)?, held_out)?;
    let trained_numbers = classifier.parameters()?.iter().map(|(_, var)| var.elem_count()).sum();
    Ok(Outcome { seed, head, tuned, losses: run.losses, seconds_per_step: run.seconds_per_step, trained_numbers })
}

/// Mean and standard deviation over the seeds.
fn spread(outcomes: &[Outcome], of: impl Fn(&Outcome) -> f64) -> (f64, f64) {
    let values: Vec<f64> = outcomes.iter().map(of).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (values.len() - 1) as f64).sqrt() } else { 0.0 })
}

fn show((mean, deviation): (f64, f64)) -> String {
    format!("{:.1}% ± {:.1}", 100.0 * mean, 100.0 * deviation)
}

fn to_json(outcomes: &[Outcome], [training, held_out]: [usize; 2]) -> Value {
    let of_score = |score: &Score| json!({"loss": score.loss, "accuracy": score.accuracy});
    let of_outcome = |x: &Outcome| {
        json!({
            "seed": x.seed, "head": of_score(&x.head), "tuned": of_score(&x.tuned), "losses": x.losses,
            "seconds_per_step": x.seconds_per_step, "trained_numbers": x.trained_numbers,
            "dtype": DType::F32.as_str(),
        })
    };
    let of_spread = |of: fn(&Outcome) -> f64| {
        let (mean, deviation) = spread(outcomes, of);
        json!({"mean": mean, "deviation": deviation})
    };
    json!({
        "train": training, "held_out": held_out, "seeds": outcomes.iter().map(of_outcome).collect::<Vec<_>>(),
        "head": {"accuracy": of_spread(|x| x.head.accuracy), "loss": of_spread(|x| x.head.loss)},
        "tuned": {"accuracy": of_spread(|x| x.tuned.accuracy), "loss": of_spread(|x| x.tuned.loss)},
    })
}
