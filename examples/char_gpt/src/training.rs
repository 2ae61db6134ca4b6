//! Training, with validation and a checkpoint at regular intervals.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use candle_attention::parallel::DataParallel;
use candle_attention::train::{Schedule, backward};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use indicatif::{ProgressBar, ProgressStyle};

use crate::model::{Gpt, Place, place_in_forward_pass};
use crate::ranks::Ranks;
use crate::state::{RunConfig, State};
use crate::text::Corpus;

/// The learning rate rises for so many steps, but at most for a tenth of the run.
const WARM_UP: usize = 100;
/// The learning rate at the end, as a share of the highest.
const LAST_RATE: f64 = 0.1;
/// A block of the default model has 768 KiB of gradients, so that each one is summed while the next is computed.
const BUCKET_BYTES: usize = 512 << 10;

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

/// Takes the remaining steps. Saves every `save_every` steps and at the end. All ranks take the same steps, each with its rows of the
/// batch.
pub fn train(
    state: &mut State,
    corpus: &Corpus,
    (device, ranks): (&Device, &Ranks),
    (save, save_every): (Save, usize),
    screen: &mut impl Write,
) -> Result<Progress> {
    let steps = state.run.steps;
    let mut progress = Progress::default();
    // On stderr, and only if that is a terminal.
    let style = ProgressStyle::with_template("{wide_bar} step {pos}/{len}  {msg}")?;
    let bar = if ranks.is_first() { ProgressBar::new(steps as u64) } else { ProgressBar::hidden() };
    let bar = bar.with_style(style).with_position(state.step() as u64);
    let data_parallel = data_parallel(state, ranks)?;
    while state.step() < steps {
        let start = Instant::now();
        let loss = take_step(state, corpus, device, data_parallel.as_ref())?;
        progress.time += start.elapsed();
        progress.tokens += state.run.batch * state.run.model.len;
        progress.losses.push(loss);
        let speed = progress.tokens_per_second().unwrap_or_default();
        bar.set_message(format!("loss {loss:.3}  {speed:.0} tokens/s"));
        bar.inc(1);
        if state.step().is_multiple_of(save_every) && state.step() < steps {
            save(state)?;
            let validation = validate(&state.model, &state.run, corpus, (device, ranks))?;
            let line =
                format!("step {:>6}  loss {loss:.3}  held out {validation:.3}  {speed:.0} tokens/s", state.step());
            bar.suspend(|| writeln!(screen, "{line}"))?;
        }
    }
    bar.finish_and_clear();
    save(state)?;
    Ok(progress)
}

/// The ranks that share the batches, with the parameters in the order of the forward pass.
fn data_parallel(state: &State, ranks: &Ranks) -> Result<Option<DataParallel>> {
    let Some(communicator) = ranks.communicator() else { return Ok(None) };
    let mut parameters: Vec<_> =
        state.optimizer.parameters().map(|(name, var)| (name.to_string(), var.clone())).collect();
    parameters.sort_by_key(|(name, _)| place_in_forward_pass(name));
    Ok(Some(DataParallel::new(&parameters, communicator)?.with_bucket_bytes(BUCKET_BYTES)?))
}

fn take_step(state: &mut State, corpus: &Corpus, device: &Device, data_parallel: Option<&DataParallel>) -> Result<f32> {
    let (run, step) = (&state.run, state.step());
    let rows = data_parallel.map_or(0..run.batch, |ranks| ranks.rows(run.batch));
    let batch = corpus.batch(run, step, rows.clone(), device)?;
    let place = Place { step, first_row: rows.start };
    let (gradients, value) = match data_parallel {
        None => {
            let loss = state.model.loss(&batch, Some(place))?;
            (backward(&loss)?, value_of(&loss)?)
        }
        Some(ranks) => {
            let segments = state.model.loss_in_segments(&batch, place)?;
            let part = f64::from(value_of(&segments.loss)?) * rows.len() as f64;
            // The losses are summed during the backward pass, as the gradients are.
            let sum = ranks.communicator().start_all_reduce(&Tensor::new(part, &Device::Cpu)?)?;
            let mut averaging = ranks.start(rows.len() as f64)?;
            segments.backward(&mut |gradients: &GradStore| averaging.add(gradients))?;
            let gradients = averaging.finish()?;
            let sum = sum.wait()?.remove(0).to_scalar::<f64>()?;
            (gradients, (sum / run.batch as f64) as f32)
        }
    };
    ensure!(value.is_finite(), "the loss of step {step} is {value}: try a smaller --lr");
    state.optimizer.set_learning_rate(schedule(run)?.learning_rate(step))?;
    state.optimizer.step(&gradients)?;
    Ok(value)
}

fn value_of(loss: &Tensor) -> Result<f32> {
    Ok(loss.to_dtype(DType::F32)?.to_scalar()?)
}

/// Rises linearly, then falls along half a cosine.
fn schedule(run: &RunConfig) -> Result<Schedule> {
    Ok(Schedule::warm_up_cosine(run.lr, run.lr * LAST_RATE, WARM_UP.min(run.steps / 10), run.steps)?)
}

/// The loss on the whole held-out text, without dropout. The ranks take the batches in turns.
pub fn validate(model: &Gpt, run: &RunConfig, corpus: &Corpus, (device, ranks): (&Device, &Ranks)) -> Result<f64> {
    let (mut sum, mut count) = (0.0, 0);
    for batch in &corpus.held_out((run.batch, run.model.len), (ranks.rank(), ranks.size()), device)? {
        let characters = batch.inputs.elem_count();
        let mean = model.loss(batch, None)?.to_scalar::<f32>()?;
        sum += f64::from(mean) * characters as f64;
        count += characters;
    }
    let [sum, count] = ranks.sums([sum, count as f64])?;
    Ok(sum / count)
}
