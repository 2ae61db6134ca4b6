//! Bad folders and flags, each refused with its reason.

use std::fs;
use std::process::Output;

use attention_examples::program::{assert_refused, json};
use candle_core::{Device, Tensor};
use serde_json::json;

use crate::minilm;
use crate::tiny::{Folder, weights};

fn run(folder: &Folder, arguments: &[&str]) -> Output {
    minilm(&[arguments, &["--model", &folder.name()]].concat())
}

#[track_caller]
fn assert_bad(folder: &Folder, expected: &[&str]) {
    assert_refused(&run(folder, &["The cat sat"]), 1, expected);
}

#[test]
fn an_unbroken_folder_works() {
    let folder = Folder::new();
    let result = json(&run(&folder, &["The cat", "the CAT", "warmer mat", "--attend", "warmer", "--json"]));
    let similarity = |i: usize, j: usize| result["similarities"][i][j].as_f64().unwrap();
    assert!((similarity(0, 1) - 1.0).abs() < 1e-6);
    assert!(similarity(0, 2) < 0.999);
    assert_eq!(result["attention"][0]["words"], json!(["[CLS]", "warmer", "mat", "[SEP]"]));
}

#[test]
fn a_long_sentence_is_cut_and_the_cut_is_told() {
    let folder = Folder::new();
    let output = run(&folder, &["the cat sat on the warm mat is warmer", "the cat", "--json"]);
    let stderr = String::from_utf8_lossy(&output.stderr).to_string();
    assert!(stderr.contains("of the 12 tokens of a sentence, only 10 are read: \"the cat sat on"), "{stderr}");
    assert_eq!(stderr.matches("note:").count(), 1, "{stderr}");
    json(&output);
    folder.write("sentence_bert_config.json", &json!({"max_seq_length": 4}));
    let stderr = run(&folder, &["the cat sat on"]).stderr;
    assert!(String::from_utf8_lossy(&stderr).contains("of the 6 tokens of a sentence, only 4 are read"));
}

#[test]
fn a_missing_file_is_named() {
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = Folder::new();
        fs::remove_file(folder.path(file)).unwrap();
        assert_bad(&folder, &["can't read", file]);
    }
}

#[test]
fn a_file_of_another_kind_is_named() {
    for file in ["config.json", "tokenizer.json", "model.safetensors", "sentence_bert_config.json"] {
        let folder = Folder::new();
        fs::write(folder.path(file), "hello").unwrap();
        assert_bad(&folder, &[file]);
    }
    let folder = Folder::new();
    let bytes = fs::read(folder.path("model.safetensors")).unwrap();
    fs::write(folder.path("model.safetensors"), &bytes[..bytes.len() - 1]).unwrap();
    assert_bad(&folder, &["can't read", "model.safetensors"]);
}

#[test]
fn a_config_that_cannot_serve_is_refused() {
    let cases = [
        ("/model_type", json!("roberta"), vec!["model_type", "expected \"bert\"", "roberta"]),
        ("/model_type", json!(null), vec!["model_type", "none"]),
        ("/hidden_act", json!("snake"), vec!["config.json", "snake"]),
        ("/hidden_size", json!(-8), vec!["config.json", "-8"]),
        ("/hidden_size", json!(16), vec!["word_embeddings", "[12, 16]", "[12, 8]", "self.query.weight"]),
        ("/intermediate_size", json!(17), vec!["intermediate.dense.weight", "[17, 8]", "[16, 8]"]),
        ("/vocab_size", json!(11), vec!["word_embeddings", "[11, 8]", "[12, 8]"]),
        ("/max_position_embeddings", json!(4), vec!["position_embeddings", "[4, 8]", "[10, 8]"]),
        ("/max_position_embeddings", json!(2), vec!["more than the 2 special tokens"]),
        ("/num_hidden_layers", json!(2), vec!["expected 2 layers", "got 1"]),
        ("/num_hidden_layers", json!(0), vec!["expected 0 layers", "got 1"]),
        ("/num_attention_heads", json!(3), vec!["num_heads 3", "8"]),
        ("/num_attention_heads", json!(0), vec!["num_heads", "at least 1"]),
        ("/layer_norm_eps", json!(-1.0), vec!["layer_norm_eps", "above 0"]),
        ("/type_vocab_size", json!(0), vec!["token_type_embeddings", "[0, 8]"]),
    ];
    for (entry, value, expected) in cases {
        let folder = Folder::new();
        folder.set("config.json", entry, value);
        assert_bad(&folder, &expected);
    }
}

#[test]
fn companions_of_the_config_are_heeded() {
    let folder = Folder::new();
    folder.write("sentence_bert_config.json", &json!({"max_seq_length": 11}));
    assert_bad(&folder, &["max_seq_length", "1 to 10", "11"]);
    let folder = Folder::new();
    folder.write("1_Pooling/config.json", &json!({"pooling_mode_mean_tokens": false, "pooling_mode_cls_token": true}));
    assert_bad(&folder, &["1_Pooling", "mean"]);
}

#[test]
fn weights_that_cannot_serve_are_all_named() {
    let folder = Folder::new();
    let mut broken = weights();
    broken.remove("encoder.layer.0.output.dense.bias");
    let nan = Tensor::new(&[0f32, 0.0, f32::NAN, 0.0, 0.0, 0.0, 0.0, 0.0], &Device::Cpu).unwrap();
    broken.insert("encoder.layer.0.output.LayerNorm.bias".into(), nan);
    let infinite = Tensor::full(f32::INFINITY, (16, 8), &Device::Cpu).unwrap();
    broken.insert("encoder.layer.0.intermediate.dense.weight".into(), infinite);
    folder.write_weights(&broken);
    assert_bad(
        &folder,
        &[
            "`encoder.layer.0.output.dense.bias` is missing",
            "`encoder.layer.0.output.LayerNorm.bias` holds NaN or infinity",
            "`encoder.layer.0.intermediate.dense.weight` holds NaN or infinity",
        ],
    );
}

#[test]
fn a_token_that_the_embeddings_lack_is_named() {
    let folder = Folder::new();
    folder.set("tokenizer.json", "/model/vocab/cat", json!(99));
    assert_bad(&folder, &["`cat` is token 99", "vocab_size is 12"]);
}

#[test]
fn flags_that_cannot_serve_are_refused() {
    let folder = Folder::new();
    let nowhere = folder.path("sentences.txt");
    let empty = folder.path("empty.txt");
    fs::write(&empty, "\n \n").unwrap();
    let cases: [(&[&str], i32, &[&str]); 9] = [
        (&[], 2, &["SENTENCE"]),
        (&["the cat", "--layer", "0"], 2, &["--attend"]),
        (&["the cat", "--attend", "cat", "--head", "0"], 2, &["--layer"]),
        (&["the cat", "--attend", "cat", "--layer", "-1"], 2, &["-1"]),
        (&["the cat", " "], 1, &["empty"]),
        (&["the cat", "--attend", "dog"], 1, &["--attend", "dog", "the, cat"]),
        (&["the cat", "--attend", "cat", "--layer", "1"], 1, &["--layer: expected 0 to 0, got 1"]),
        (&["the cat", "--attend", "cat", "--layer", "0", "--head", "2"], 1, &["--head: expected 0 to 1, got 2"]),
        (&["--file", nowhere.to_str().unwrap()], 1, &["can't read", "sentences.txt"]),
    ];
    for (arguments, code, expected) in cases {
        assert_refused(&run(&folder, arguments), code, expected);
    }
    assert_refused(&run(&folder, &["--file", empty.to_str().unwrap()]), 1, &["at least one sentence"]);
}
