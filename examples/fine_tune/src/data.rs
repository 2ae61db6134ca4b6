//! Rated sentences of product reviews, from the file that `scripts/reviews` fetches.
//!
//! A line is the number of a review and of its sentence, the mean rating from -4 to 4, and the text, with tabs between them. (Hutto and
//! Gilbert, "VADER", ICWSM 2014; the reviews are those of Hu and Liu, "Mining and Summarizing Customer Reviews", KDD 2004.)

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use minilm::model::{Model, Sentence};

/// A sentence with a rating closer to zero is left out.
const CLEAR: f64 = 0.5;
/// One in so many reviews is held out.
const HELD_OUT_EVERY: u64 = 5;

pub struct Example {
    pub sentence: Sentence,
    /// 1 for praise, 0 for complaint.
    pub label: u32,
}

/// The sentences to learn from, and those that are held out: sentences of other reviews.
pub fn read_all(file: &Path, model: &Model) -> Result<[Vec<Example>; 2]> {
    let text = fs::read_to_string(file)
        .with_context(|| format!("can't read {} (`scripts/reviews` fetches it)", file.display()))?;
    let (mut training, mut held_out) = (Vec::new(), Vec::new());
    for (number, line) in text.lines().enumerate() {
        let at = || format!("{}, line {}", file.display(), number + 1);
        let Some((review, rating, text)) = parse(line).with_context(at)? else { continue };
        let example = Example { sentence: model.read(text).with_context(at)?, label: u32::from(rating > 0.0) };
        let part = if review % HELD_OUT_EVERY == 0 { &mut held_out } else { &mut training };
        part.push(example);
    }
    ensure!(!training.is_empty() && !held_out.is_empty(), "{}: expected sentences of both parts", file.display());
    Ok([training, held_out])
}

/// The review, the rating and the text of a line; nothing if the rating isn't clear.
fn parse(line: &str) -> Result<Option<(u64, f64, &str)>> {
    let [name, rating, text] = line.split('\t').collect::<Vec<_>>()[..] else {
        bail!("expected a name, a rating and a text with tabs between them, got `{line}`");
    };
    let review = name.split('_').next().and_then(|review| review.parse().ok());
    let review = review.with_context(|| format!("expected the number of a review, got `{name}`"))?;
    let rating: f64 = rating.parse().with_context(|| format!("expected a rating, got `{rating}`"))?;
    Ok((rating.abs() >= CLEAR).then_some((review, rating, text)))
}
