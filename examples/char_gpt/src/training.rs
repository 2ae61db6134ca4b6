//! Training, with validation and a checkpoint at regular intervals.

use std::f64::consts::PI;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use candle_nn::ParamsAdamW;
use candle_nn::loss::cross_entropy;
use indicatif::{ProgressBar, ProgressStyle};

use crate::model::Gpt;
use crate::state::{RunConfig, State};
use crate::text::{Batch, Corpus};

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

/// Takes the remaining steps. Saves the run every `save_every` steps and at the end.
pub fn train(
    state: &mut State,
    corpus: &Corpus,
    device: &Device,
    (file, save_every): (&Path, usize),
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
            state.save(file, corpus)?;
            let validation = validate(&state.model, &state.run, corpus, device)?;
            let line =
                format!("step {:>6}  loss {loss:.3}  held out {validation:.3}  {speed:.0} tokens/s", state.step());
            bar.suspend(|| writeln!(screen, "{line}"))?;
        }
    }
    bar.finish_and_clear();
    state.save(file, corpus)?;
    Ok(progress)
}

fn take_step(state: &mut State, corpus: &Corpus, device: &Device) -> Result<f32> {
    let (run, step) = (&state.run, state.step());
    let batch = corpus.batch(run.model.seed, step, (run.batch, run.model.len), device)?;
    let loss = loss(&state.model.forward_step(&batch.inputs, step)?, &batch)?;
    let gradients = loss.backward()?;
    let value = loss.to_scalar::<f32>()?;
    ensure!(value.is_finite(), "the loss of step {step} is {value}: try a smaller --lr");
    let settings = ParamsAdamW { lr: learning_rate(run, step), beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
    state.optimizer.step(&gradients, &settings)?;
    Ok(value)
}

/// Rises linearly, then falls along half a cosine.
fn learning_rate(run: &RunConfig, step: usize) -> f64 {
    let warm_up = WARM_UP.min(run.steps / 10);
    if step < warm_up {
        return run.lr * (step + 1) as f64 / warm_up as f64;
    }
    let done = (step - warm_up) as f64 / (run.steps - warm_up).max(1) as f64;
    run.lr * (LAST_RATE + (1.0 - LAST_RATE) * 0.5 * (1.0 + (PI * done).cos()))
}

/// The mean of -ln p(next character).
fn loss(logits: &Tensor, batch: &Batch) -> Result<Tensor> {
    Ok(cross_entropy(&logits.flatten_to(1)?, &batch.targets.flatten_all()?)?)
}

/// The loss on the held-out text, without dropout.
pub fn validate(model: &Gpt, run: &RunConfig, corpus: &Corpus, device: &Device) -> Result<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for batch in corpus.held_out((run.batch, run.model.len), device)? {
        let characters = batch.inputs.elem_count();
        let mean = loss(&model.forward(&batch.inputs)?, &batch)?.to_scalar::<f32>()?;
        sum += f64::from(mean) * characters as f64;
        count += characters;
    }
    Ok(sum / count as f64)
}
