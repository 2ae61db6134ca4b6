//! A word of a sentence, as the command line names it.

use anyhow::{Result, bail, ensure};

/// The place of a word, or of its n-th occurrence if it is written `word#n`. Capitals and punctuation don't matter.
pub fn find(words: &[String], wanted: &str, flag: &str) -> Result<usize> {
    let (word, occurrence) = match wanted.rsplit_once('#').map(|(word, number)| (word, number.parse::<usize>())) {
        Some((word, Ok(number))) => (word, number),
        _ => (wanted, 1),
    };
    let places = (0..words.len()).filter(|&place| plain(&words[place]) == plain(word)).collect::<Vec<_>>();
    ensure!(!places.is_empty(), "{flag}: expected a word of the sentence ({}), got \"{word}\"", words.join(", "));
    match occurrence.checked_sub(1).and_then(|index| places.get(index)) {
        Some(&place) => Ok(place),
        None => bail!("{flag}: expected an occurrence of \"{word}\" from 1 to {}, got {occurrence}", places.len()),
    }
}

/// Without capitals and the punctuation around it; a sign alone stays.
fn plain(word: &str) -> String {
    let letters = word.trim_matches(|c: char| c.is_ascii_punctuation());
    if letters.is_empty() { word.to_string() } else { letters.to_lowercase() }
}
