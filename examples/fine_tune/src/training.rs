//! The steps of training, and what is measured of the result.

use std::fmt;
use std::time::Instant;

use anyhow::{Result, ensure};
use attention_examples::random::Random;
use candle_attention::block::{CrossEntropyOptions, cross_entropy};
use candle_attention::train::{AdamW, AdamWConfig, Schedule, backward};
use candle_core::{D, DType, Device, Tensor, Var};
use indicatif::{ProgressBar, ProgressStyle};

use crate::arguments::Arguments;
use crate::classifier::{Classifier, Embedder, Head};
use crate::data::Example;

/// The share of the steps in which the learning rate rises.
const WARM_UP: usize = 10;

/// Loss and accuracy on some sentences.
#[derive(Clone, Copy, Debug)]
pub struct Score {
    pub loss: f64,
    pub accuracy: f64,
}

impl Score {
    pub fn of(logits: &Tensor, examples: &[Example]) -> Result<Self> {
        let labels = labels(examples.iter(), logits.device())?;
        let hits = logits.argmax(D::Minus1)?.eq(&labels)?.to_dtype(DType::F64)?.mean_all()?;
        Ok(Self { loss: number(&loss(logits, &labels)?)?, accuracy: number(&hits)? })
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{:.1}% (loss {:.3})", 100.0 * self.accuracy, self.loss)
    }
}

fn number(x: &Tensor) -> Result<f64> {
    Ok(x.to_dtype(DType::F64)?.to_scalar()?)
}

fn loss(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    Ok(cross_entropy(logits, labels, &CrossEntropyOptions::default())?)
}

fn labels<'e>(examples: impl Iterator<Item = &'e Example>, device: &Device) -> Result<Tensor> {
    Ok(Tensor::new(examples.map(|example| example.label).collect::<Vec<_>>(), device)?)
}

/// The sentences in a random order, epoch after epoch.
struct Order {
    seed: u64,
    epoch: u64,
    items: Vec<usize>,
    next: usize,
}

impl Order {
    fn new(seed: u64, count: usize) -> Self {
        let mut order = Self { seed, epoch: 0, items: (0..count).collect(), next: 0 };
        order.shuffle();
        order
    }

    /// Each epoch is a shuffle of its own by Fisher and Yates, of the sentences as they stand in the file.
    fn shuffle(&mut self) {
        let mut random = Random::new(self.seed, "order", self.epoch);
        self.items = (0..self.items.len()).collect();
        for i in (1..self.items.len()).rev() {
            self.items.swap(i, random.below(i + 1));
        }
        (self.epoch, self.next) = (self.epoch + 1, 0);
    }

    fn batch(&mut self, size: usize) -> Vec<usize> {
        let mut batch = Vec::with_capacity(size);
        while batch.len() < size {
            if self.next == self.items.len() {
                self.shuffle();
            }
            batch.push(self.items[self.next]);
            self.next += 1;
        }
        batch
    }
}

struct Steps {
    optimizer: AdamW,
    schedule: Schedule,
}

impl Steps {
    fn new(arguments: &Arguments, parameters: &[(String, Var)]) -> Result<Self> {
        let config = AdamWConfig { lr: arguments.lr, weight_decay: 0.0, ..Default::default() };
        let schedule = Schedule::warm_up_linear(arguments.lr, 0.0, arguments.steps / WARM_UP, arguments.steps)?;
        Ok(Self { optimizer: AdamW::new(parameters, config)?, schedule })
    }

    fn take(&mut self, step: usize, loss: &Tensor) -> Result<f32> {
        let value = loss.to_scalar::<f32>()?;
        ensure!(value.is_finite(), "the loss of step {step} is {value}: try a smaller --lr");
        self.optimizer.set_learning_rate(self.schedule.learning_rate(step))?;
        self.optimizer.step(&backward(loss)?)?;
        Ok(value)
    }
}

/// The embeddings of the untouched encoder, on which a head alone is trained.
pub struct Frozen<'e> {
    training: Tensor,
    labels: Vec<u32>,
    held_out: Tensor,
    examples: &'e [Example],
}

impl<'e> Frozen<'e> {
    pub fn new(base: &Embedder, training: &[Example], held_out: &'e [Example]) -> Result<Self> {
        Ok(Self {
            training: base.embed_all(training)?,
            labels: training.iter().map(|example| example.label).collect(),
            held_out: base.embed_all(held_out)?,
            examples: held_out,
        })
    }

    /// The score of a head that was trained alone, from the same start and in the same steps as with the adapter.
    pub fn head(&self, arguments: &Arguments, seed: u64) -> Result<Score> {
        let device = self.training.device();
        let head = Head::new(self.training.dim(1)?, seed, device)?;
        let mut steps = Steps::new(arguments, &head.parameters())?;
        let mut order = Order::new(seed, self.labels.len());
        for step in 0..arguments.steps {
            let batch = order.batch(arguments.batch);
            let labels = Tensor::new(batch.iter().map(|&i| self.labels[i]).collect::<Vec<_>>(), device)?;
            let rows = Tensor::new(batch.iter().map(|&i| i as u32).collect::<Vec<_>>(), device)?;
            steps.take(step, &loss(&head.forward(&self.training.index_select(&rows, 0)?)?, &labels)?)?;
        }
        Score::of(&head.forward(&self.held_out)?.detach(), self.examples)
    }
}

/// A finished training.
pub struct Run {
    /// The loss before each step.
    pub losses: Vec<f32>,
    /// The median.
    pub seconds_per_step: f64,
}

/// Trains adapter and head.
pub fn train(classifier: &Classifier, arguments: &Arguments, examples: &[Example], seed: u64) -> Result<Run> {
    let mut steps = Steps::new(arguments, &classifier.parameters()?)?;
    let mut order = Order::new(seed, examples.len());
    // On stderr, and only if that is a terminal.
    let style = ProgressStyle::with_template("{wide_bar} step {pos}/{len}  {msg}")?;
    let bar = ProgressBar::new(arguments.steps as u64).with_style(style);
    let (mut losses, mut seconds) = (Vec::new(), Vec::new());
    for step in 0..arguments.steps {
        let start = Instant::now();
        let batch = order.batch(arguments.batch);
        let sentences: Vec<_> = batch.iter().map(|&i| &examples[i].sentence).collect();
        let labels = labels(batch.iter().map(|&i| &examples[i]), classifier.device())?;
        let value = steps.take(step, &loss(&classifier.logits(&sentences)?, &labels)?)?;
        losses.push(value);
        seconds.push(start.elapsed().as_secs_f64());
        bar.set_message(format!("seed {seed}  loss {value:.3}"));
        bar.inc(1);
    }
    bar.finish_and_clear();
    seconds.sort_by(f64::total_cmp);
    Ok(Run { losses, seconds_per_step: seconds[seconds.len() / 2] })
}
