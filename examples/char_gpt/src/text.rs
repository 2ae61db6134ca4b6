//! A text as numbers, one for each character, in a part for training and one that is held out.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use attention_examples::random::Random;
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::state::RunConfig;

/// The first volume of Jane Austen's "Persuasion" (see README.md).
const PERSUASION: &str = include_str!("../persuasion.txt");

/// The characters that a model knows, in the order of their code points. A token is an index into them.
pub struct Vocabulary(Vec<char>);

impl Vocabulary {
    /// Every character of the text.
    pub fn of(text: &str) -> Self {
        Self(text.chars().collect::<BTreeSet<_>>().into_iter().collect())
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let token = |character| match self.0.binary_search(&character) {
            Ok(index) => Ok(index as u32),
            Err(_) => bail!("the character {character:?} isn't in the text that the model learns from"),
        };
        text.chars().map(token).collect()
    }

    pub fn decode(&self, tokens: &[u32]) -> String {
        tokens.iter().filter_map(|&token| self.0.get(token as usize)).collect()
    }

    /// All characters, as a string.
    pub fn characters(&self) -> String {
        self.0.iter().collect()
    }
}

/// Identifies a text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextId {
    pub characters: usize,
    /// FNV-1a of its UTF-8.
    pub hash: u64,
}

/// The text to learn from, without its last tenth, which is held out.
pub struct Corpus {
    pub id: TextId,
    pub vocabulary: Vocabulary,
    train: Vec<u32>,
    held_out: Vec<u32>,
}

/// Sequences, and for each of their tokens the token that follows it: both (batch, len).
pub struct Batch {
    pub inputs: Tensor,
    pub targets: Tensor,
}

impl Corpus {
    /// The text of a file, or else "Persuasion".
    pub fn open(file: Option<&Path>) -> Result<Self> {
        let Some(file) = file else { return Self::new(PERSUASION) };
        let text = || -> Result<Self> { Self::new(&std::fs::read_to_string(file).context("can't read the text")?) };
        text().with_context(|| file.display().to_string())
    }

    /// The text of a file as far as its characters are in a vocabulary, and how often each other one stood in it.
    pub fn with_vocabulary(file: &Path, vocabulary: Vocabulary) -> Result<(Self, BTreeMap<char, usize>)> {
        let text = std::fs::read_to_string(file).with_context(|| format!("{}: can't read the text", file.display()))?;
        let mut unknown = BTreeMap::new();
        let known = |character: &char| {
            let is_known = vocabulary.0.binary_search(character).is_ok();
            if !is_known {
                *unknown.entry(*character).or_default() += 1;
            }
            is_known
        };
        let text: String = text.chars().filter(known).collect();
        Ok((Self::of(&text, vocabulary).with_context(|| file.display().to_string())?, unknown))
    }

    fn new(text: &str) -> Result<Self> {
        Self::of(text, Vocabulary::of(text))
    }

    fn of(text: &str, vocabulary: Vocabulary) -> Result<Self> {
        let tokens = vocabulary.encode(text)?;
        let (train, held_out) = tokens.split_at(tokens.len() - tokens.len() / 10);
        let id = TextId { characters: tokens.len(), hash: fnv(text.as_bytes()) };
        Ok(Self { id, vocabulary, train: train.to_vec(), held_out: held_out.to_vec() })
    }

    /// Checks that both parts are longer than a sequence.
    pub fn check_length(&self, len: usize) -> Result<()> {
        let expected = len.saturating_add(1).saturating_mul(10);
        let got = self.id.characters;
        ensure!(got >= expected, "--len {len}: expected a text of at least {expected} characters, got {got}");
        Ok(())
    }

    /// Some rows of the batch of a training step: sequences with random starts.
    pub fn batch(&self, run: &RunConfig, step: usize, rows: Range<usize>, device: &Device) -> Result<Batch> {
        let len = run.model.len;
        let mut random = Random::new(run.model.seed, "batch", step as u64);
        let starts = (0..run.batch).map(|_| random.below(self.train.len() - len)).collect::<Vec<_>>();
        to_batch(&self.train, &starts[rows], len, device)
    }

    /// The held-out text from end to end, `batch` sequences at a time. The ranks take the batches in turns: those of one rank.
    pub fn held_out(
        &self,
        (batch, len): (usize, usize),
        (rank, ranks): (usize, usize),
        device: &Device,
    ) -> Result<Vec<Batch>> {
        let starts = (0..(self.held_out.len() - 1) / len).map(|sequence| sequence * len).collect::<Vec<_>>();
        let own = starts.chunks(batch).skip(rank).step_by(ranks);
        own.map(|starts| to_batch(&self.held_out, starts, len, device)).collect()
    }

    /// The first characters of the held-out text.
    pub fn held_out_start(&self, characters: usize) -> &[u32] {
        &self.held_out[..characters.min(self.held_out.len())]
    }

    /// The loss on the held-out text of a model that knows only how frequent each character is. One is added to each count,
    /// so that no character is impossible.
    pub fn unigram_loss(&self) -> f64 {
        let mut counts = vec![1.0; self.vocabulary.len()];
        self.train.iter().for_each(|&token| counts[token as usize] += 1.0);
        let total: f64 = counts.iter().sum();
        let loss_of = |token: &u32| -(counts[*token as usize] / total).ln();
        self.held_out.iter().map(loss_of).sum::<f64>() / self.held_out.len() as f64
    }
}

/// FNV-1a.
pub fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

fn to_batch(tokens: &[u32], starts: &[usize], len: usize, device: &Device) -> Result<Batch> {
    let part = |shift: usize| {
        let part = starts.iter().flat_map(|start| &tokens[start + shift..][..len]).copied().collect();
        Tensor::from_vec(part, (starts.len(), len), device)
    };
    Ok(Batch { inputs: part(0)?, targets: part(1)? })
}
