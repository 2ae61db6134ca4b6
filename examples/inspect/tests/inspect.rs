//! The program, run as a user runs it.

#[path = "../../minilm/tests/minilm/tiny.rs"]
#[allow(dead_code)] // minilm's tests use all of it
mod tiny;

use std::collections::HashMap;
use std::fs;
use std::process::Output;

use attention_examples::program::{self, assert_refused, json};
use candle_attention::{SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use serde_json::Value;

use tiny::Folder;

const SENTENCE: &str = "the cat sat on the warmer mat";

fn example(arguments: &[&str]) -> Output {
    program::run(env!("CARGO_BIN_EXE_inspect"), arguments)
}

fn inspect(folder: &Folder, arguments: &[&str]) -> Output {
    example(&[arguments, &["--model", &folder.name()]].concat())
}

fn shipped() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../weights/warm_attends_to_mat.safetensors").into()
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).to_string()
}

fn weights(result: &Value) -> Vec<Vec<Vec<Vec<f64>>>> {
    serde_json::from_value(result["weights"].clone()).unwrap()
}

#[test]
fn every_head_gives_each_word_weights_that_sum_to_one() {
    let folder = Folder::new();
    let result = json(&inspect(&folder, &[SENTENCE, "--json"]));
    let words = serde_json::from_value::<Vec<String>>(result["words"].clone()).unwrap();
    assert_eq!(words, ["[CLS]", "the", "cat", "sat", "on", "the", "warmer", "mat", "[SEP]"]);
    let weights = weights(&result);
    assert_eq!((weights.len(), weights[0].len(), weights[0][0].len()), (1, 2, words.len()));
    for row in weights.iter().flatten().flatten() {
        assert_eq!(row.len(), words.len());
        assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{row:?}");
    }
    let pieces = json(&inspect(&folder, &[SENTENCE, "--json", "--pieces"]));
    assert_eq!(pieces["words"][6], "warm");
    assert_eq!(pieces["words"][7], "##er");
    assert_eq!(pieces["words"].as_array().unwrap().len(), words.len() + 1);
}

#[test]
fn ranking_names_the_heads_by_their_weights() {
    let folder = Folder::new();
    let arguments = [SENTENCE, "--from", "warmer", "--to", "the#2"];
    let result = json(&inspect(&folder, &[&arguments[..], &["--json"]].concat()));
    let weights = weights(&result);
    let mut expected = [weights[0][0][6][5], weights[0][1][6][5]];
    expected.sort_by(|a, b| b.total_cmp(a));
    let first = result["ranking"]["first"].as_array().unwrap();
    assert_eq!(first.len(), 2);
    for (head, expected) in first.iter().zip(expected) {
        assert_eq!(head["weight"], expected);
        assert_eq!(weights[0][head["head"].as_u64().unwrap() as usize][6][5], expected);
    }
    let printed = text(&inspect(&folder, &arguments));
    assert!(printed.contains(&format!("{:.4}", expected[0])), "{printed}");
}

#[test]
fn shipped_layer_shows_that_warm_looks_at_mat() {
    let result = json(&example(&["--layer-file", &shipped(), "--from", "warm", "--to", "mat", "--json"]));
    let first = &result["ranking"]["first"];
    assert_eq!(first.as_array().unwrap().len(), 1);
    assert!(first[0]["weight"].as_f64().unwrap() > 0.95, "{result}");
    let printed = text(&example(&["--layer-file", &shipped()]));
    assert!(printed.contains("warm") && printed.contains("1.00"), "{printed}");
}

#[test]
fn layer_reads_the_tokens_that_it_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu);
    let layer = SelfAttention::new(&SelfAttentionConfig::new(4, 2), vb).unwrap();
    layer.save(path("layer.safetensors")).unwrap();
    let tokens = Tensor::randn(0f32, 1.0, (3, 4), &Device::Cpu).unwrap();
    let save = |name: &str, tokens: &Tensor| {
        candle_core::safetensors::save(&HashMap::from([("tokens", tokens.clone())]), path(name)).unwrap();
    };
    save("tokens.safetensors", &tokens);
    save("four.safetensors", &Tensor::zeros((4, 4), DType::F32, &Device::Cpu).unwrap());

    let run = |tokens: &str| {
        example(&["a b c", "--layer-file", &path("layer.safetensors"), "--tokens", &path(tokens), "--json"])
    };
    let (_, expected) = layer.forward_with_weights(&tokens.to_dtype(DType::F64).unwrap()).unwrap();
    let expected = expected.to_vec3::<f64>().unwrap();
    let got = weights(&json(&run("tokens.safetensors")));
    for (got, expected) in got[0].iter().flatten().flatten().zip(expected.iter().flatten().flatten()) {
        assert!((got - expected).abs() < 1e-6);
    }
    assert_refused(&run("four.safetensors"), 1, &["four.safetensors", "[3, 4]", "[4, 4]"]);
    assert_refused(&run("missing.safetensors"), 1, &["can't read", "missing.safetensors"]);
}

#[test]
fn page_and_picture_are_written_as_a_whole() {
    let folder = Folder::new();
    let out = |name: &str| folder.path(name).to_str().unwrap().to_string();
    let draw = |name: &str, arguments: &[&str]| {
        text(&inspect(&folder, &[&[SENTENCE, "--out", &out(name)], arguments].concat()));
        fs::read_to_string(folder.path(name)).unwrap()
    };
    let page = draw("page.html", &[]);
    for text in ["<html", "all layers", "layer 0", "head 1", "mean", "warmer", "[SEP]"] {
        assert!(page.contains(text), "no `{text}` in the page");
    }
    let mean = draw("mean.svg", &[]);
    assert!(mean.contains("the mean of 1 layer of 2 heads") && mean.trim_end().ends_with("</svg>"));
    let head = draw("head.SVG", &["--layer", "0", "--head", "1"]);
    assert!(head.contains("layer 0, head 1") && !head.contains("layer 0, head 0"));
    let heads = draw("heads.svg", &["--layer", "0"]);
    assert!(heads.contains("layer 0, head 1") && heads.contains("layer 0, head 0"));
}

#[test]
fn bad_input_is_refused_with_a_reason() {
    let folder = Folder::new();
    let nowhere = folder.path("missing/page.html").to_str().unwrap().to_string();
    let (shipped, model) = (shipped(), folder.path("model.safetensors").to_str().unwrap().to_string());
    let cases: [(&[&str], i32, &[&str]); 9] = [
        (&[SENTENCE, "--out", "page.pdf"], 2, &[".html, .svg or .png"]),
        (&[SENTENCE, "--from", "cat"], 2, &["--to"]),
        (&[SENTENCE, "--head", "0"], 2, &["--layer"]),
        (&[SENTENCE, "--tokens", "tokens.safetensors"], 2, &["--tokens", "--model"]),
        (&[SENTENCE, "--layer-file", &shipped], 2, &["--model"]),
        (&[SENTENCE, "--from", "dog", "--to", "cat"], 1, &["--from", "dog", "the, cat"]),
        (&[SENTENCE, "--layer", "1"], 1, &["--layer: expected 0 to 0, got 1"]),
        (&[SENTENCE, "--layer", "0", "--head", "2"], 1, &["--head: expected 0 to 1, got 2"]),
        (&[SENTENCE, "--out", &nowhere], 1, &["can't write", "missing"]),
    ];
    for (arguments, code, expected) in cases {
        assert_refused(&inspect(&folder, arguments), code, expected);
    }
    assert_refused(&example(&["--tokens", "tokens.safetensors"]), 2, &["--layer-file"]);
    assert_refused(&example(&["--layer-file", &model]), 1, &["model.safetensors", "not saved by a layer"]);
    assert_refused(&example(&[" ", "--layer-file", &shipped]), 1, &["no words"]);
}
