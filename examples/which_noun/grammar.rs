//! The sentences: an animal, a place, and a property that belongs to one of the two.

use std::collections::BTreeSet;

const ANIMALS: [&str; 8] = ["cat", "dog", "fox", "goat", "hen", "horse", "mouse", "rabbit"];
const PLACES: [&str; 8] = ["mat", "bed", "blanket", "cushion", "hay", "lawn", "rug", "sofa"];
const OF_ANIMALS: [&str; 4] = ["hungry", "curious", "shy", "tired"];
const OF_PLACES: [&str; 4] = ["warm", "clean", "dry", "soft"];

/// Animal, place and property in each of their six orders, so that where a noun stands doesn't say whether it is meant.
const TEMPLATES: [&str; 6] = [
    "The ANIMAL sat on the PLACE because it is PROPERTY",
    "On the PLACE slept the ANIMAL since it was PROPERTY",
    "Because it is PROPERTY the ANIMAL lay down on the PLACE",
    "It was PROPERTY so the PLACE pleased the ANIMAL",
    "The ANIMAL saw how PROPERTY it was and left the PLACE",
    "The PLACE was too PROPERTY to please the ANIMAL",
];

/// A noun and a property are held out of training if their numbers add up to a multiple of this. That leaves each
/// property six of its eight nouns, and each noun three of its four properties, to learn from.
const HELD_OUT: usize = 4;

/// The sentences that are shown. Both are held out.
const SHOWN: [&str; 2] = ["The cat sat on the mat because it is warm", "The cat sat on the mat because it is hungry"];

/// A sentence, and what its property describes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sentence {
    pub words: Vec<String>,
    /// Where the property stands.
    pub property: usize,
    /// Where the noun stands that it describes.
    pub noun: usize,
    /// Which of [`nouns`] that is.
    pub label: u32,
}

impl Sentence {
    /// `described` is ANIMAL or PLACE.
    fn new(template: &str, [animal, place, property]: [&str; 3], described: &str, label: usize) -> Self {
        let mut sentence = Self { words: Vec::new(), property: 0, noun: 0, label: label as u32 };
        for (position, slot) in template.split(' ').enumerate() {
            if slot == "PROPERTY" {
                sentence.property = position;
            } else if slot == described {
                sentence.noun = position;
            }
            let word = match slot {
                "ANIMAL" => animal,
                "PLACE" => place,
                "PROPERTY" => property,
                other => other,
            };
            sentence.words.push(word.to_string());
        }
        sentence
    }

    pub fn property_word(&self) -> &str {
        &self.words[self.property]
    }

    pub fn noun_word(&self) -> &str {
        &self.words[self.noun]
    }
}

/// Every sentence of the grammar.
pub struct Sentences {
    pub training: Vec<Sentence>,
    /// No training sentence has both the noun and the property of one of these.
    pub held_out: Vec<Sentence>,
}

impl Sentences {
    pub fn all() -> Self {
        let mut sentences = Self { training: Vec::new(), held_out: Vec::new() };
        for (i, animal) in ANIMALS.into_iter().enumerate() {
            for (j, place) in PLACES.into_iter().enumerate() {
                for (number, property) in OF_ANIMALS.into_iter().enumerate() {
                    sentences.add([animal, place, property], "ANIMAL", i, i + number);
                }
                for (number, property) in OF_PLACES.into_iter().enumerate() {
                    sentences.add([animal, place, property], "PLACE", ANIMALS.len() + j, j + number);
                }
            }
        }
        sentences
    }

    /// `label` is the described noun's number among all nouns, `sum` that of its and the property's own numbers.
    fn add(&mut self, words: [&str; 3], described: &str, label: usize, sum: usize) {
        let set = if sum.is_multiple_of(HELD_OUT) { &mut self.held_out } else { &mut self.training };
        set.extend(TEMPLATES.map(|template| Sentence::new(template, words, described, label)));
    }

    /// "The cat sat on the mat because it is warm", and the same of "hungry".
    pub fn shown(&self) -> Vec<&Sentence> {
        let find = |text| self.held_out.iter().find(|sentence| sentence.words.join(" ") == text);
        SHOWN.into_iter().filter_map(find).collect()
    }

    /// Every word in small letters, in the order of the alphabet.
    pub fn vocabulary(&self) -> Vec<String> {
        let words = self.training.iter().chain(&self.held_out).flat_map(|sentence| &sentence.words);
        words.map(|word| word.to_lowercase()).collect::<BTreeSet<_>>().into_iter().collect()
    }
}

/// What the model may answer: each animal and each place.
pub fn nouns() -> Vec<&'static str> {
    [ANIMALS, PLACES].concat()
}
