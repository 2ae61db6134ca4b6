//! With the weights of all-MiniLM-L6-v2, which `scripts/minilm` fetches. Without the weights these tests print that they are
//! skipped. If MINILM_DIR is set, they fail instead.

use std::path::{Path, PathBuf};

use attention_examples::program;
use candle_core::{DType, Device, Tensor};
use minilm::model::{Model, Sentence};
use minilm::peer::{Peer, max_difference};
use serde_json::Value;

/// From one token between the special ones to more than the model reads.
const TEXTS: [&str; 6] = [
    "warm",
    "The cat sat on the mat because it is warm",
    "The trophy doesn't fit in the suitcase, because it is too big.",
    "antidisestablishmentarianism and electroencephalography",
    "東京は日本の首都です 🙂",
    "Crème brûlée, naïvely flambéed: \"warm\" is what the mat was, and so the cat, which had the choice of all the house, \
     sat on it and stayed there until the evening, when it had grown cold.",
];

fn folder() -> Option<PathBuf> {
    let given = std::env::var_os("MINILM_DIR").map(PathBuf::from);
    let folder = given.clone().unwrap_or(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/minilm"));
    let there = folder.join("model.safetensors").exists();
    assert!(there || given.is_none(), "MINILM_DIR: no model.safetensors in {}", folder.display());
    if !there {
        eprintln!("SKIPPED: no model in {}. `scripts/minilm` fetches it.", folder.display());
    }
    there.then_some(folder)
}

fn open(folder: &Path) -> Model {
    Model::open(folder, &Device::Cpu).unwrap()
}

fn read<Text: AsRef<str>>(model: &Model, texts: &[Text]) -> Vec<Sentence> {
    texts.iter().map(|text| model.read(text.as_ref()).unwrap()).collect()
}

fn largest(difference: &Tensor) -> f32 {
    difference.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn token_states_are_those_of_candle_transformers() {
    let Some(folder) = folder() else { return };
    let (model, peer) = (open(&folder), Peer::open(&folder, &Device::Cpu).unwrap());
    let long = "The mat was warm and so was everything near it. ".repeat(40);
    let sentences = read(&model, &[&TEXTS[..], &[&long]].concat());
    let (ids, lengths) = model.batch(&sentences.iter().collect::<Vec<_>>()).unwrap();
    assert_eq!(lengths.last(), Some(&256), "max_seq_length");
    let (ours, theirs) = (model.states_of(&ids, &lengths).unwrap(), peer.states(&ids, &lengths).unwrap());
    assert!(largest(&ours) > 0.5);
    let difference = max_difference(&ours, &theirs, &lengths).unwrap();
    eprintln!("token states differ by at most {difference:e}");
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn similarities_are_those_of_sentence_transformers() {
    let Some(folder) = folder() else { return };
    let model = open(&folder);
    let golden: Value = serde_json::from_str(include_str!("../../../../tests/golden/minilm.json")).unwrap();
    let pairs = golden["pairs"].as_array().unwrap();
    assert_eq!(pairs.len(), 10);
    let mut largest = 0f64;
    for pair in pairs {
        let sentences = read(&model, &[pair[0].as_str().unwrap(), pair[1].as_str().unwrap()]);
        let embeddings = model.embed(&[&sentences[0], &sentences[1]]).unwrap().to_dtype(DType::F64).unwrap();
        let (a, b) = (embeddings.get(0).unwrap(), embeddings.get(1).unwrap());
        let cosine = (a * b).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        let difference = (cosine - pair[2].as_f64().unwrap()).abs();
        assert!(difference < 1e-5, "{pair}: got {cosine}");
        largest = largest.max(difference);
    }
    eprintln!("similarities differ by at most {largest:e}");
}

#[test]
fn a_sentence_means_the_same_in_any_batch() {
    let Some(folder) = folder() else { return };
    let model = open(&folder);
    let sentences = read(&model, &TEXTS);
    let together = model.embed(&sentences.iter().collect::<Vec<_>>()).unwrap();
    for (i, sentence) in sentences.iter().enumerate() {
        let alone = model.embed(&[sentence]).unwrap();
        let difference = largest(&(alone - together.narrow(0, i, 1).unwrap()).unwrap());
        assert!(difference < 1e-5, "sentence {i}: {difference}");
    }
}

#[test]
fn what_a_word_looks_at_sums_to_one() {
    let Some(folder) = folder() else { return };
    let model = open(&folder);
    for sentence in read(&model, &TEXTS) {
        let weights = model.attention(&sentence).unwrap();
        let (tokens, words) = (sentence.ids.len(), sentence.words.len());
        assert_eq!(weights.dims(), [6, 12, tokens, tokens]);
        let weights = sentence.by_word(&weights).unwrap();
        assert_eq!(weights.dims(), [6, 12, words, words]);
        let sums = weights.sum(3).unwrap();
        assert!(largest(&(sums - 1.0).unwrap()) < 1e-5);
    }
    let long_words = model.read(TEXTS[3]).unwrap();
    assert_eq!(long_words.words, ["[CLS]", "antidisestablishmentarianism", "and", "electroencephalography", "[SEP]"]);
    assert!(long_words.ids.len() > 10);
}

#[test]
fn the_program_says_what_the_model_does() {
    let Some(folder) = folder() else { return };
    let folder = folder.to_str().unwrap();
    let texts = ["A cat sat on the mat", "A kitten lies on a rug", "Stocks fell on Monday"];
    let attend = ["--attend", "mat", "--layer", "5", "--head", "11"];
    let result = program::json(&crate::minilm(&[&texts[..], &attend, &["--model", folder, "--json"]].concat()));
    let similarity = |i: usize, j: usize| result["similarities"][i][j].as_f64().unwrap();
    assert!(similarity(0, 1) > similarity(0, 2) + 0.3, "cats are like kittens");
    assert_eq!(result["embeddings"][2].as_array().unwrap().len(), 384);
    let looks = result["attention"].as_array().unwrap();
    assert_eq!(looks.len(), 1, "one sentence has a mat");
    let rows = looks[0]["rows"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[0]["name"]), (1, &"layer 5, head 11".into()));

    let model = open(Path::new(folder));
    let sentence = model.read(texts[0]).unwrap();
    let head = sentence.by_word(&model.attention(&sentence).unwrap()).unwrap().get(5).unwrap().get(11).unwrap();
    let mat = head.get(6).unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(sentence.words[6], "mat");
    assert_eq!(rows[0]["weights"].as_array().unwrap().len(), mat.len());
    for (weight, expected) in rows[0]["weights"].as_array().unwrap().iter().zip(mat) {
        assert!((weight.as_f64().unwrap() - f64::from(expected)).abs() < 1e-6);
    }
}
