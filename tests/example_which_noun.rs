//! The lesson without a teacher, run as a user runs it, and its parts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use serde_json::Value;

#[path = "common/program.rs"]
mod program;

// The example's own files. Items that only its main uses would count as unused here.
#[path = "../examples/which_noun/grammar.rs"]
#[allow(dead_code)]
mod grammar;
#[path = "../examples/which_noun/lesson.rs"]
#[allow(dead_code)]
mod lesson;
#[path = "../examples/which_noun/model.rs"]
#[allow(dead_code)]
mod model;
#[path = "../examples/which_noun/reader.rs"]
#[allow(dead_code)]
mod reader;

use grammar::{Sentence, Sentences};
use program::{json, run};

/// The example, built with the profile of this test.
fn built() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| program::build("which_noun"))
}

fn example(arguments: &[&str]) -> Output {
    run(built(), arguments)
}

/// The one line on stdout, as JSON.
fn result(arguments: &[&str]) -> Value {
    json(&example(&[arguments, &["--json"]].concat()))
}

fn number(result: &Value, field: &str) -> f64 {
    result[field].as_f64().unwrap_or_else(|| panic!("no number {field} in {result}"))
}

fn file(folder: &tempfile::TempDir, name: &str) -> String {
    folder.path().join(name).to_str().unwrap().to_string()
}

fn shipped() -> String {
    format!("{}/weights/which_noun.safetensors", env!("CARGO_MANIFEST_DIR"))
}

/// The noun is said, and gets most of the property's attention, in the held-out sentences and in the two that are shown.
fn assert_learned(result: &Value) {
    assert!(number(result, "held_out_accuracy") >= 0.99, "{result}");
    assert!(number(result, "attention_on_noun") >= 0.95, "{result}");
    let words = |shown: &Value| (shown["property"].clone(), shown["noun"].clone());
    let shown = result["shown"].as_array().unwrap();
    assert_eq!(
        shown.iter().map(words).collect::<Vec<_>>(),
        [("warm".into(), "mat".into()), ("hungry".into(), "cat".into())]
    );
    for sentence in shown {
        assert!(number(sentence, "before") < 0.2, "{result}");
        assert!(number(sentence, "after") > 0.5, "{result}");
    }
}

#[test]
fn attention_finds_the_noun_whatever_the_seed_and_only_if_the_labels_are_true() {
    for seed in 1..=5 {
        let result = result(&["--seed", &seed.to_string()]);
        assert_learned(&result);
        for untaught in ["control", "untrained"] {
            // One of sixteen nouns by chance.
            assert!(number(&result, &format!("{untaught}_accuracy")) < 0.2, "{result}");
            assert!(number(&result, &format!("{untaught}_attention")) < 0.2, "{result}");
        }
    }
}

#[test]
fn shipped_weights_find_the_noun() {
    let result = result(&["--load", &shipped()]);
    assert_learned(&result);
    assert_eq!((&result["steps"], &result["control_accuracy"]), (&Value::Null, &Value::Null));
}

#[test]
fn saved_model_shows_what_was_learned() {
    let folder = tempfile::tempdir().unwrap();
    let saved = file(&folder, "model.safetensors");
    let trained = result(&["--steps", "20", "--seed", "7", "--out", &saved]);
    let loaded = result(&["--load", &saved]);
    for field in ["held_out_accuracy", "attention_on_noun", "mean_attention", "untrained_accuracy", "shown", "seed"] {
        assert_eq!(loaded[field], trained[field], "{field}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left behind");
}

#[test]
fn no_training_changes_nothing() {
    let result = result(&["--steps", "0"]);
    assert_eq!(result["held_out_accuracy"], result["untrained_accuracy"]);
    assert_eq!(result["control_accuracy"], result["untrained_accuracy"]);
    assert_eq!(result["attention_on_noun"], result["untrained_attention"]);
}

#[test]
fn picture_shows_before_and_after() {
    let folder = tempfile::tempdir().unwrap();
    let picture = file(&folder, "which_noun.svg");
    let output = example(&["--load", &shipped(), "--picture", &picture]);
    let (svg, screen) = (std::fs::read_to_string(picture).unwrap(), String::from_utf8(output.stdout).unwrap());
    for text in ["before training", "after training", "mat", "hungry", "warm/hungry"] {
        assert!(svg.contains(text) && screen.contains(text), "no {text}");
    }
    assert!(svg.ends_with("</svg>\n"));
    assert!(screen.lines().all(|line| line.chars().count() <= 80), "{screen}");
}

/// Noun and property of a sentence.
fn pair(sentence: &Sentence) -> (&str, &str) {
    (sentence.noun_word(), sentence.property_word())
}

#[test]
fn no_training_sentence_has_the_noun_and_the_property_of_one_held_out() {
    let Sentences { training, held_out } = Sentences::all();
    let pairs = held_out.iter().map(pair).collect::<BTreeSet<_>>();
    for sentence in &training {
        let has = |word: &str| sentence.words.iter().any(|other| other == word);
        for (noun, property) in &pairs {
            assert!(!(has(noun) && has(property)), "{noun} and {property} in {sentence:?}");
        }
    }
    // But each noun and each property alone is learned from.
    let seen = training.iter().map(pair).collect::<Vec<_>>();
    for (noun, property) in pairs {
        assert!(seen.iter().any(|pair| pair.0 == noun) && seen.iter().any(|pair| pair.1 == property));
    }
    assert_eq!(Sentences::all().shown().len(), 2, "both shown sentences are held out");
}

#[test]
fn sentences_name_each_noun_once_and_in_any_order() {
    let Sentences { training, held_out } = Sentences::all();
    let nouns = grammar::nouns();
    let mut orders = BTreeMap::<(usize, usize), usize>::new();
    for sentence in training.iter().chain(&held_out) {
        assert_eq!(sentence.noun_word(), nouns[sentence.label as usize]);
        let at = |word: &&String| nouns.contains(&word.as_str());
        assert_eq!(sentence.words.iter().filter(at).count(), 2, "an animal and a place: {sentence:?}");
        // Which noun is described: the first or the second; and how many come before the property.
        let nouns_before = |end: usize| sentence.words[..end].iter().filter(at).count();
        *orders.entry((nouns_before(sentence.noun), nouns_before(sentence.property))).or_default() += 1;
    }
    // Wherever the property stands, it describes the first noun as often as the second.
    for before in 0..=2 {
        assert!(orders[&(0, before)] > 0);
        assert_eq!(orders[&(0, before)], orders[&(1, before)], "{orders:?}");
    }
}

#[test]
fn shuffled_labels_are_as_many_and_say_nothing() {
    let training = Sentences::all().training;
    let shuffled = lesson::with_shuffled_labels(&training, 1);
    let count = |sentences: &[Sentence]| {
        let mut counts = BTreeMap::<u32, usize>::new();
        sentences.iter().for_each(|sentence| *counts.entry(sentence.label).or_default() += 1);
        counts
    };
    assert_eq!(count(&shuffled), count(&training));
    let same = training.iter().zip(&shuffled).filter(|(a, b)| a.label == b.label).count();
    // One in sixteen by chance: 144 of 2304, with a standard deviation of 12.
    assert!((84..204).contains(&same), "{same} of {} labels stay", training.len());
    assert!(training.iter().zip(&shuffled).all(|(a, b)| a.words == b.words));
    assert_ne!(shuffled, lesson::with_shuffled_labels(&training, 2));
}

#[test]
fn padding_changes_nothing() {
    let sentences = Sentences::all();
    let device = candle_core::Device::Cpu;
    let reader = reader::Reader { vocabulary: sentences.vocabulary(), device: device.clone() };
    let model = model::Model::new(3, reader.vocabulary.len(), grammar::nouns().len(), &device).unwrap();
    let together = sentences.training[..6].iter().collect::<Vec<_>>();
    let logits = model.forward(&reader.read(&together).unwrap()).unwrap().to_vec2::<f32>().unwrap();
    let lengths = together.iter().map(|sentence| sentence.words.len()).collect::<BTreeSet<_>>();
    assert!(lengths.len() > 1, "sentences of several lengths");
    for (sentence, expected) in together.into_iter().zip(logits) {
        let alone = model.forward(&reader.read(&[sentence]).unwrap()).unwrap().to_vec2::<f32>().unwrap();
        for (a, b) in alone[0].iter().zip(&expected) {
            assert!((a - b).abs() < 1e-5, "{a} alone, {b} among others");
        }
    }
}

#[test]
fn bad_input_is_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let missing = file(&folder, "missing/file");
    let text = file(&folder, "text");
    std::fs::write(&text, "hello").unwrap();
    let other = format!("{}/weights/warm_attends_to_mat.safetensors", env!("CARGO_MANIFEST_DIR"));
    let cut = file(&folder, "cut");
    let whole = std::fs::read(shipped()).unwrap();
    std::fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    let own_folder = folder.path().to_str().unwrap();
    let cases: [(&[&str], i32, &[&str]); 10] = [
        (&["--steps", "many"], 2, &["--steps", "many"]),
        (&["--seed", "-1"], 2, &["-1"]),
        (&["--load", &missing, "--steps", "3"], 2, &["--load", "--steps"]),
        (&["--load", &missing], 1, &["can't read", "missing"]),
        (&["--load", &text], 1, &["expected a model that --out saved", "no safetensors file"]),
        (&["--load", &cut], 1, &["expected a model that --out saved", "no safetensors file"]),
        (&["--load", &other], 1, &["expected a model that --out saved", "no entry `which_noun`"]),
        (&["--steps", "1", "--out", &missing], 1, &["can't write", "missing"]),
        (&["--steps", "1", "--out", own_folder], 1, &["can't write", own_folder]),
        (&["--steps", "1", "--picture", &missing], 1, &["can't write", "missing"]),
    ];
    for (arguments, code, expected) in cases {
        let output = example(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        for text in expected {
            assert!(stderr.contains(text), "{arguments:?}: no `{text}` in {stderr}");
        }
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left behind");
}
