//! A sentence with its query and its target.

use anyhow::{Result, ensure};
use attention_examples::words::find;

/// A sentence, the index of the word that should attend, and that of the word that it should attend to.
pub struct Sentence {
    pub words: Vec<String>,
    pub query: usize,
    pub target: usize,
}

impl Sentence {
    pub fn new(text: &str, query: &str, target: &str) -> Result<Self> {
        let words = text.split_whitespace().map(str::to_string).collect::<Vec<_>>();
        ensure!(!words.is_empty(), "the sentence has no words");
        let query = find(&words, query, "--query")?;
        let target = find(&words, target, "--target")?;
        Ok(Self { words, query, target })
    }

    pub fn query_word(&self) -> &str {
        &self.words[self.query]
    }

    pub fn target_word(&self) -> &str {
        &self.words[self.target]
    }
}
