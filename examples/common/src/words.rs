//! A word of a sentence, as the command line names it.

use anyhow::{Result, bail, ensure};

/// The index of a word in the sentence. `word#n` is its n-th occurrence. Capitals and punctuation don't matter.
///
/// # Errors
///
/// A word or an occurrence that the sentence doesn't have; the error names the `flag`.
pub fn find(words: &[String], wanted: &str, flag: &str) -> Result<usize> {
    let (word, occurrence) = match wanted.rsplit_once('#').map(|(word, number)| (word, number.parse::<usize>())) {
        Some((word, Ok(number))) => (word, number),
        _ => (wanted, 1),
    };
    let found = (0..words.len()).filter(|&index| plain(&words[index]) == plain(word)).collect::<Vec<_>>();
    ensure!(!found.is_empty(), "{flag}: expected a word of the sentence ({}), got \"{word}\"", words.join(", "));
    match occurrence.checked_sub(1).and_then(|earlier| found.get(earlier)) {
        Some(&index) => Ok(index),
        None => bail!("{flag}: expected an occurrence of \"{word}\" from 1 to {}, got {occurrence}", found.len()),
    }
}

/// A word without capitals and the punctuation around it. A word that is all punctuation stays as it is.
fn plain(word: &str) -> String {
    let letters = word.trim_matches(|c: char| c.is_ascii_punctuation());
    if letters.is_empty() { word.to_string() } else { letters.to_lowercase() }
}
