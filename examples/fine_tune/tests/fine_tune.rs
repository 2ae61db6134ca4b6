//! The program, run as a user runs it. With `MINILM_DIR`, the folder that `scripts/minilm` makes, it trains.

use std::process::Output;

use attention_examples::program;
use serde_json::Value;

/// A few sentences in the form of the reviews.
const REVIEWS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reviews.txt");

/// What `parity.py --steps 5 --batch 4 --data tests/reviews.txt` prints for seeds 0 and 1.
const LOSSES: [[f64; 5]; 2] =
    [[0.7646453, 0.7825226, 0.7278079, 0.6597983, 0.6156751], [0.6831245, 0.6544794, 0.7683352, 0.6709257, 0.5305778]];

fn fine_tune(arguments: &[&str]) -> Output {
    program::run(env!("CARGO_BIN_EXE_fine_tune"), arguments)
}

/// The folder of the model, if there is one.
fn model() -> Option<String> {
    let folder = std::env::var("MINILM_DIR").ok();
    if folder.is_none() {
        eprintln!("nothing is trained: MINILM_DIR isn't set");
    }
    folder
}

#[test]
fn bad_input_is_refused() {
    let refused = |arguments: &[&str], expected: &[&str]| program::assert_refused(&fine_tune(arguments), 1, expected);
    refused(&["--rank", "0"], &["rank", "at least 1"]);
    refused(&["--steps", "0"], &["--steps", "at least 1"]);
    refused(&["--lr", "0"], &["--lr", "above 0"]);
    refused(&["--dropout", "1"], &["dropout_p", "[0, 1)"]);
    refused(&["--model", "/nowhere"], &["/nowhere"]);
    program::assert_refused(&fine_tune(&["--targets", "w_q"]), 2, &["q_proj, k_proj", "w_q"]);
    let Some(model) = model() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = |text: &str| {
        let path = folder.path().join("reviews.txt");
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    let with = |data: &str, expected: &[&str]| refused(&["--model", &model, "--data", data], expected);
    with("/nowhere/reviews.txt", &["/nowhere/reviews.txt", "scripts/reviews"]);
    with(&file("1_1\t2.0\tgood\nbad\n"), &["reviews.txt, line 2", "tabs", "bad"]);
    with(&file("x_1\t2.0\tgood\n"), &["line 1", "number of a review", "x_1"]);
    with(&file("1_1\tgood\tgood\n"), &["line 1", "a rating", "good"]);
    with(&file("1_1\t2.0\tgood\n"), &["both parts"]);
    refused(&["--model", &model, "--data", REVIEWS, "--rank", "500"], &["lora.rank", "1 to 384", "500"]);
    refused(&["--model", &model, "--data", REVIEWS, "--targets", "gate"], &["lora.targets", "gate"]);
    refused(&["--model", &model, "--data", REVIEWS, "--max-tokens", "2"], &["more than the 2 special tokens"]);
}

#[test]
fn losses_are_those_of_peft() {
    let Some(model) = model() else { return };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let flags = [
        "--model", &model, "--data", REVIEWS, "--steps", "5", "--batch", "4", "--seeds", "0,1", "--out", out, "--json",
    ];
    let result = program::json(&fine_tune(&flags));
    assert_eq!((&result["train"], &result["held_out"]), (&Value::from(13), &Value::from(4)));
    for (seed, expected) in LOSSES.iter().enumerate() {
        let losses = result["seeds"][seed]["losses"].as_array().unwrap();
        assert_eq!(losses.len(), expected.len());
        for (loss, expected) in losses.iter().zip(expected) {
            let loss = loss.as_f64().unwrap();
            assert!((loss - expected).abs() < 1e-5, "seed {seed}: {loss} instead of {expected}");
        }
        // The adapter is small, and has the head in it.
        let file = folder.path().join(format!("seed{seed}/adapter_model.safetensors"));
        let bytes = std::fs::read(file).unwrap();
        assert!(bytes.len() < 1_000_000, "{} bytes", bytes.len());
        assert!(String::from_utf8_lossy(&bytes).contains("base_model.model.classifier.weight"));
    }
}

#[test]
fn quantised_encoder_learns() {
    let Some(model) = model() else { return };
    for format in ["q8_0", "q4_0", "q5_0", "nf4"] {
        let flags = ["--model", &model, "--data", REVIEWS, "--quantise", format, "--seeds", "0"];
        let result =
            program::json(&fine_tune(&[&flags[..], &["--steps", "12", "--dropout", "0.1", "--json"]].concat()));
        let losses = result["seeds"][0]["losses"].as_array().unwrap();
        let [first, last] = [0, 11].map(|step: usize| losses[step].as_f64().unwrap());
        assert!(last < first, "{format}: {losses:?}");
    }
}
