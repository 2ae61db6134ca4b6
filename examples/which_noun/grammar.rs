//! The sentences: an animal, a location, and a property that describes one of the two.

use std::collections::BTreeSet;

const ANIMALS: [&str; 8] = ["cat", "dog", "fox", "goat", "hen", "horse", "mouse", "rabbit"];
const LOCATIONS: [&str; 8] = ["mat", "bed", "blanket", "cushion", "hay", "lawn", "rug", "sofa"];
const OF_ANIMALS: [&str; 4] = ["hungry", "curious", "shy", "tired"];
const OF_LOCATIONS: [&str; 4] = ["warm", "clean", "dry", "soft"];

/// Animal, location and property in each of their six orders, so that the position of a noun doesn't tell whether the property
/// describes it.
const TEMPLATES: [&str; 6] = [
    "The ANIMAL sat on the LOCATION because it is PROPERTY",
    "On the LOCATION slept the ANIMAL since it was PROPERTY",
    "Because it is PROPERTY the ANIMAL lay down on the LOCATION",
    "It was PROPERTY so the LOCATION pleased the ANIMAL",
    "The ANIMAL saw how PROPERTY it was and left the LOCATION",
    "The LOCATION was too PROPERTY to please the ANIMAL",
];

/// A pair of noun and property is held out of training if the sum of their numbers is a multiple of this. Each property is
/// then trained with six of its eight nouns, and each noun with three of its four properties.
const HELD_OUT: usize = 4;

/// The sentences that are shown. Both are held out.
const SHOWN: [&str; 2] = ["The cat sat on the mat because it is warm", "The cat sat on the mat because it is hungry"];

/// A sentence, and what its property describes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sentence {
    pub words: Vec<String>,
    /// The index of the property.
    pub property: usize,
    /// The index of the noun that the property describes.
    pub noun: usize,
    /// The index of that noun in [`nouns`].
    pub label: u32,
}

impl Sentence {
    /// `described` is ANIMAL or LOCATION.
    fn new(template: &str, [animal, location, property]: [&str; 3], described: &str, label: usize) -> Self {
        let mut sentence = Self { words: Vec::new(), property: 0, noun: 0, label: label as u32 };
        for (position, slot) in template.split(' ').enumerate() {
            if slot == "PROPERTY" {
                sentence.property = position;
            } else if slot == described {
                sentence.noun = position;
            }
            let word = match slot {
                "ANIMAL" => animal,
                "LOCATION" => location,
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
            for (j, location) in LOCATIONS.into_iter().enumerate() {
                for (number, property) in OF_ANIMALS.into_iter().enumerate() {
                    sentences.add([animal, location, property], "ANIMAL", i, i + number);
                }
                for (number, property) in OF_LOCATIONS.into_iter().enumerate() {
                    sentences.add([animal, location, property], "LOCATION", ANIMALS.len() + j, j + number);
                }
            }
        }
        sentences
    }

    /// `label` is the described noun's index among all nouns. `sum` is the sum of the noun's and the property's numbers, each
    /// counted within its own list.
    fn add(&mut self, words: [&str; 3], described: &str, label: usize, sum: usize) {
        let set = if sum.is_multiple_of(HELD_OUT) { &mut self.held_out } else { &mut self.training };
        set.extend(TEMPLATES.map(|template| Sentence::new(template, words, described, label)));
    }

    /// "The cat sat on the mat because it is warm", and the same with "hungry".
    pub fn shown(&self) -> Vec<&Sentence> {
        let find = |text| self.held_out.iter().find(|sentence| sentence.words.join(" ") == text);
        SHOWN.into_iter().filter_map(find).collect()
    }

    /// Every word in lower case, in alphabetical order.
    pub fn vocabulary(&self) -> Vec<String> {
        let words = self.training.iter().chain(&self.held_out).flat_map(|sentence| &sentence.words);
        words.map(|word| word.to_lowercase()).collect::<BTreeSet<_>>().into_iter().collect()
    }
}

/// The nouns that the model chooses from: each animal and each location.
pub fn nouns() -> Vec<&'static str> {
    [ANIMALS, LOCATIONS].concat()
}
