//! The task: digits, `=`, and the digits again, in reverse or in the same order.

use std::fmt;

use attention_examples::random::Random;
use candle_core::{Device, Result, Tensor};
use clap::ValueEnum;

/// Digits in a sequence.
pub const DIGITS: usize = 12;
/// The input of the model: the digits, `=`, and the answer without its last digit.
pub const LEN: usize = 2 * DIGITS;
/// The digits 0 to 9 and `=`.
pub const VOCAB: usize = 11;
const EQUALS: u32 = 10;

/// Sequences that are held out of training.
pub const HELD_OUT: usize = 256;
/// Sequences in a training step. With so few, candle's element-wise operations stay on one thread (up to 64K elements). On a
/// machine that also runs other programs, several threads would wait for each other.
const BATCH: usize = 16;

#[derive(Clone, Copy, ValueEnum)]
pub enum Task {
    Reverse,
    Copy,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Task::Reverse => "reverse",
            Task::Copy => "copy",
        })
    }
}

type Digits = [u32; DIGITS];

/// Questions and answers.
pub struct Batch {
    /// The input, (batch, [`LEN`]).
    pub tokens: Tensor,
    /// The right answers at the last [`DIGITS`] positions, (batch, [`DIGITS`]).
    pub answers: Tensor,
}

/// An endless supply of training sequences, none of which is held out.
pub struct Data {
    task: Task,
    random: Random,
    held_out: Vec<Digits>,
}

impl Data {
    pub fn new(task: Task, seed: u64) -> Self {
        let mut random = Random::new(seed, "held out", 0);
        let held_out = (0..HELD_OUT).map(|_| digits(&mut random)).collect();
        Self { task, random: Random::new(seed, "training", 0), held_out }
    }

    pub fn held_out(&self, device: &Device) -> Result<Batch> {
        self.to_batch(&self.held_out, device)
    }

    pub fn batch(&mut self, device: &Device) -> Result<Batch> {
        let mut sequences = Vec::with_capacity(BATCH);
        while sequences.len() < BATCH {
            let digits = digits(&mut self.random);
            if !self.held_out.contains(&digits) {
                sequences.push(digits);
            }
        }
        self.to_batch(&sequences, device)
    }

    fn to_batch(&self, sequences: &[Digits], device: &Device) -> Result<Batch> {
        let (mut tokens, mut answers) = (Vec::new(), Vec::new());
        for digits in sequences {
            let mut answer = *digits;
            if matches!(self.task, Task::Reverse) {
                answer.reverse();
            }
            tokens.extend(digits);
            tokens.push(EQUALS);
            tokens.extend(&answer[..DIGITS - 1]);
            answers.extend(answer);
        }
        Ok(Batch {
            tokens: Tensor::from_vec(tokens, (sequences.len(), LEN), device)?,
            answers: Tensor::from_vec(answers, (sequences.len(), DIGITS), device)?,
        })
    }
}

/// Tokens as text.
pub fn to_text(tokens: &[u32]) -> String {
    let words = tokens.iter().map(|&token| if token == EQUALS { "=".into() } else { token.to_string() });
    words.collect::<Vec<_>>().join(" ")
}

fn digits(random: &mut Random) -> Digits {
    std::array::from_fn(|_| random.below(10) as u32)
}
