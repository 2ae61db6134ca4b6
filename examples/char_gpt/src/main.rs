//! A small GPT of candle-attention's transformer blocks learns to write like Jane Austen, one character at a time.
//!
//! ```text
//! cargo run --release --bin char_gpt
//! cargo run --release --bin char_gpt -- --steps 200 --out run.safetensors
//! cargo run --release --bin char_gpt -- --resume run.safetensors --steps 2000 --prompt "Anne "
//! cargo run --release --bin char_gpt -- --text my.txt --len 256 --dropout 0.1
//! cargo run --release --bin char_gpt -- --ranks 2
//! cargo run --release --bin char_gpt -- --base run.safetensors --text other.txt --adapter other
//! ```
//!
//! A run is saved at regular intervals. A run that was killed at any moment and continued with `--resume` ends with the same
//! weights, to the last bit, as an undisturbed run. `text.rs` is the data, `model.rs` the model,
//! `training.rs` the loop, `ranks.rs` the ranks that share the batches, `state.rs` the file, `sampling.rs` the writing. `parity.py` trains the same model with PyTorch and
//! compares.

mod adapter;
mod arguments;
mod model;
mod ranks;
mod sampling;
mod state;
mod text;
mod training;

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use attention_examples::exit;
use candle_attention::train::keep_freed_memory;
use candle_core::Device;
use clap::Parser;
use serde_json::json;

use arguments::Arguments;
use ranks::Ranks;
use sampling::Sampling;
use state::{Saved, State};
use text::Corpus;
use training::Progress;

/// The default prompt is so many characters from the start of the held-out text.
const PROMPT: usize = 20;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    exit::code(ranks::run(arguments.ranks, |ranks| run(&arguments, ranks)))
}

fn run(arguments: &Arguments, ranks: &Ranks) -> Result<()> {
    // With --json, stdout is for the one line that a program reads.
    let mut screen: Box<dyn Write> = match (ranks.is_first(), arguments.json) {
        (false, _) => Box::new(io::sink()),
        (true, true) => Box::new(io::stderr()),
        (true, false) => Box::new(io::stdout()),
    };
    // Each step allocates the same tensors again.
    keep_freed_memory();
    let device = arguments.device.open()?;
    let adapter = arguments.base.as_deref().zip(arguments.adapter.clone());
    let (mut state, corpus) = match &adapter {
        Some((base, _)) => adapter::start(arguments, base, (&device, ranks), &mut screen)?,
        None => {
            let corpus = Corpus::open(arguments.text.as_deref())?;
            (start(arguments, &corpus, &device)?, corpus)
        }
    };
    let first_step = state.step();
    // Bad input is refused before the training, not after it.
    let prompt = prompt(arguments, &corpus)?;
    let file = adapter.as_ref().map_or_else(|| arguments.output_file(), |(_, folder)| Ok(folder.clone()))?;
    // Before the first save: all ranks have read their files by then.
    check_ranks(ranks, &state, &corpus)?;
    let save = |state: &State| match &adapter {
        _ if !ranks.is_first() => Ok(()),
        Some((base, folder)) => adapter::save(state, base, folder),
        None => state.save(&file, &corpus),
    };
    save(&state)?;
    introduce(&mut screen, &state, &corpus)?;
    if ranks.size() > 1 {
        writeln!(screen, "{} ranks share each batch of {} sequences.", ranks.size(), state.run.batch)?;
    }
    let place = (&device, ranks);

    // Of the base alone, if there is an adapter: a new one changes nothing.
    let first_loss =
        adapter.as_ref().map(|_| training::validate(&state.model, &state.run, &corpus, place)).transpose()?;
    if let Some(loss) = first_loss {
        writeln!(screen, "Held out, by the base alone: {loss:.3}")?;
    }
    let progress = training::train(&mut state, &corpus, place, (&save, arguments.save_every), &mut screen)?;
    let validation_loss = training::validate(&state.model, &state.run, &corpus, place)?;
    report(&mut screen, &progress, validation_loss)?;
    if !ranks.is_first() {
        return Ok(());
    }
    writeln!(screen, "Saved to {}.", file.display())?;

    let sampling = Sampling {
        characters: arguments.sample,
        temperature: arguments.temperature,
        seed: state.run.model.seed,
        use_cache: !arguments.no_cache,
    };
    let written = corpus.vocabulary.decode(&sampling.write(&state.model, &prompt, &device)?);
    if arguments.sample > 0 {
        writeln!(screen, "\n{}|{written}", corpus.vocabulary.decode(&prompt))?;
    }
    if arguments.json {
        let line = json!({
            "first_step": first_step, "steps": state.step(), "losses": progress.losses,
            "validation_loss": validation_loss, "base_validation_loss": first_loss, "unigram_loss": corpus.unigram_loss(),
            "seconds": progress.time.as_secs_f64(), "tokens_per_second": progress.tokens_per_second(),
            "parameters": state.parameter_count(), "out": file.display().to_string(), "sample": written,
        });
        writeln!(io::stdout(), "{line}")?;
    }
    Ok(())
}

/// Refuses ranks that have read other files or flags, and more ranks than sequences.
fn check_ranks(ranks: &Ranks, state: &State, corpus: &Corpus) -> Result<()> {
    if ranks.communicator().is_none() {
        return Ok(());
    }
    let (size, batch) = (ranks.size(), state.run.batch);
    ensure!(size <= batch, "--ranks: expected at most {batch}, the sequences of a batch, got {size}");
    ranks.agree("text", &serde_json::to_string(&corpus.id)?)?;
    ranks.agree("run", &serde_json::to_string(&state.run)?)?;
    let hash = text::fnv(&state.to_bytes(corpus)?);
    ranks.agree("saved run", &format!("step {} with hash {hash:x}", state.step()))
}

/// A new run, or the saved run to continue.
fn start(arguments: &Arguments, corpus: &Corpus, device: &Device) -> Result<State> {
    let Some(file) = &arguments.resume else {
        let run = arguments.new_run(corpus.vocabulary.len());
        corpus.check_length(run.model.len)?;
        return State::new(run, device);
    };
    let resume = || -> Result<State> {
        let saved = Saved::read(file)?;
        saved.check_text(corpus)?;
        let run = arguments.resumed_run(&saved.header.run, saved.header.step)?;
        saved.into_state(run, device)
    };
    resume().with_context(|| format!("--resume {}", file.display()))
}

fn prompt(arguments: &Arguments, corpus: &Corpus) -> Result<Vec<u32>> {
    let Some(prompt) = &arguments.prompt else { return Ok(corpus.held_out_start(PROMPT).to_vec()) };
    ensure!(!prompt.is_empty(), "--prompt: expected at least one character, got none");
    corpus.vocabulary.encode(prompt).context("--prompt")
}

fn introduce(screen: &mut impl Write, state: &State, corpus: &Corpus) -> Result<()> {
    writeln!(
        screen,
        "A GPT of {} parameters learns from {} characters of {} kinds, steps {} to {}.\n\
         Who knows only how frequent each of them is has a loss of {:.3} on the held-out text.",
        state.parameter_count(),
        corpus.id.characters,
        corpus.vocabulary.len(),
        state.step(),
        state.run.steps,
        corpus.unigram_loss(),
    )?;
    Ok(())
}

fn report(screen: &mut impl Write, progress: &Progress, validation_loss: f64) -> Result<()> {
    if let (Some(loss), Some(speed)) = (progress.losses.last(), progress.tokens_per_second()) {
        let (steps, seconds) = (progress.losses.len(), progress.time.as_secs_f64());
        writeln!(screen, "{steps} steps in {seconds:.1} s, {speed:.0} tokens/s; last loss {loss:.3}")?;
    }
    Ok(writeln!(screen, "Held out: {validation_loss:.3}")?)
}
