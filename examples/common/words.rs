//! A word of a sentence, as the command line names it.

use anyhow::{Result, bail, ensure};

/// The place of a word, or of its n-th occurrence if it is written `word#n`. Capitals and punctuation don't matter.
pub fn find(words: &[String], wanted: &str, flag: &str) -> Result<usize> {
    let (word, occurrence) = match wanted.rsplit_once('#').map(|(word, number)| (word, number.parse::<usize>())) {
        Some((word, Ok(number))) => (word, number),
        _ => (wanted, 1),
    };
    let places = places(words, word);
    ensure!(!places.is_empty(), "{flag}: expected a word of the sentence ({}), got \"{word}\"", words.join(", "));
    match occurrence.checked_sub(1).and_then(|index| places.get(index)) {
        Some(&place) => Ok(place),
        None => bail!("{flag}: expected an occurrence of \"{word}\" from 1 to {}, got {occurrence}", places.len()),
    }
}

/// Where it stands as it is written, capitals aside; else without the punctuation around it.
fn places(words: &[String], word: &str) -> Vec<usize> {
    let all = |like: &dyn Fn(&str) -> String| {
        (0..words.len()).filter(|&place| like(&words[place]) == like(word)).collect::<Vec<_>>()
    };
    let exact = all(&str::to_lowercase);
    if !exact.is_empty() {
        return exact;
    }
    all(&|word| word.trim_matches(|c: char| c.is_ascii_punctuation()).to_lowercase())
}
