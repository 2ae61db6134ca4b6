//! Training, with validation and a checkpoint at regular intervals.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use candle_attention::train::Schedule;
use candle_core::{DType, Device};
use indicatif::{ProgressBar, ProgressStyle};

use crate::model::Gpt;
use crate::state::{RunConfig, State};
use crate::text::Corpus;

/// The learning rate rises for so many steps, but at most for a tenth of the run.
const WARM_UP: usize = 100;
/// The learning rate at the end, as a share of the highest.
const LAST_RATE: f64 = 0.1;

/// The result of a training.
#[derive(Default)]
pub struct Progress {
    /// The loss of each step.
    pub losses: Vec<f32>,
    pub tokens: usize,
    /// Time for the steps alone, without validation and checkpoints.
    pub time: Duration,
}

impl Progress {
    pub fn tokens_per_second(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.tokens as f64 / self.time.as_secs_f64().max(1e-9))
    }
}

/// What saves a run.
pub type Save<'a> = &'a dyn Fn(&State) -> Result<()>;

/// Takes the remaining steps. Saves every `save_every` steps and at the end.
pub fn train(
    state: &mut State,
    corpus: &Corpus,
    device: &Device,
    (save, save_every): (Save, usize),
    screen: &mut impl Write,
) -> Result<Progress> {
    let steps = state.run.steps;
    let mut progress = Progress::default();
    // On stderr, and only if that is a terminal.
    let style = ProgressStyle::with_template("{wide_bar} step {pos}/{len}  {msg}")?;
    let bar = ProgressBar::new(steps as u64).with_style(style).with_position(state.step() as u64);
    while state.step() < steps {
        let start = Instant::now();
        let loss = take_step(state, corpus, device)?;
        progress.time += start.elapsed();
        progress.tokens += state.run.batch * state.run.model.len;
        progress.losses.push(loss);
        let speed = progress.tokens_per_second().unwrap_or_default();
        bar.set_message(format!("loss {loss:.3}  {speed:.0} tokens/s"));
        bar.inc(1);
        if state.step().is_multiple_of(save_every) && state.step() < steps {
            save(state)?;
            let validation = validate(&state.model, &state.run, corpus, device)?;
            let line =
                format!("step {:>6}  loss {loss:.3}  held out {validation:.3}  {speed:.0} tokens/s", state.step());
            bar.suspend(|| writeln!(screen, "{line}"))?;
        }
    }
    bar.finish_and_clear();
    save(state)?;
    Ok(progress)
}

fn take_step(state: &mut State, corpus: &Corpus, device: &Device) -> Result<f32> {
    let (run, step) = (&state.run, state.step());
    let batch = corpus.batch(run.model.seed, step, (run.batch, run.model.len), device)?;
    let loss = state.model.loss(&batch.inputs, &batch.targets, Some(step))?;
    let gradients = loss.backward()?;
    let value = loss.to_dtype(DType::F32)?.to_scalar::<f32>()?;
    ensure!(value.is_finite(), "the loss of step {step} is {value}: try a smaller --lr");
    state.optimizer.set_learning_rate(schedule(run)?.learning_rate(step))?;
    state.optimizer.step(&gradients)?;
    Ok(value)
}

/// Rises linearly, then falls along half a cosine.
fn schedule(run: &RunConfig) -> Result<Schedule> {
    Ok(Schedule::warm_up_cosine(run.lr, run.lr * LAST_RATE, WARM_UP.min(run.steps / 10), run.steps)?)
}

/// The loss on the held-out text, without dropout.
pub fn validate(model: &Gpt, run: &RunConfig, corpus: &Corpus, device: &Device) -> Result<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for batch in corpus.held_out((run.batch, run.model.len), device)? {
        let characters = batch.inputs.elem_count();
        let mean = model.loss(&batch.inputs, &batch.targets, None)?.to_scalar::<f32>()?;
        sum += f64::from(mean) * characters as f64;
        count += characters;
    }
    Ok(sum / count as f64)
}
