//! The main example, run as a user runs it.

#[path = "common/program.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use attention_examples::program::assert_refused;
use serde_json::Value;

use program::{json, run};

fn example(arguments: &[&str]) -> Output {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    run(PROGRAM.get_or_init(|| program::build("warm_attends_to_mat")), arguments)
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

#[test]
fn warm_learns_to_attend_to_mat_whatever_the_seed() {
    let folder = tempfile::tempdir().unwrap();
    for seed in 1..=20 {
        let result = result(&["--seed", &seed.to_string(), "--out", &file(&folder, "layer.safetensors")]);
        assert!(number(&result, "untrained") < 0.2, "{result}");
        assert!(number(&result, "before") < 0.2, "{result}");
        assert!(number(&result, "after") > 0.95, "{result}");
        assert!(number(&result, "loss") < 0.05, "{result}");
        assert_eq!(result["reload_identical"], true, "{result}");
        assert_eq!((&result["query"], &result["target"]), (&"warm".into(), &"mat".into()));
    }
}

#[test]
fn shipped_weights_attend_to_mat() {
    let weights = Path::new(env!("CARGO_MANIFEST_DIR")).join("weights/warm_attends_to_mat.safetensors");
    let result = result(&["--load", weights.to_str().unwrap()]);
    assert_eq!(result["steps"], 0);
    assert!(number(&result, "before") < 0.2, "{result}");
    assert!(number(&result, "after") > 0.95, "{result}");
}

#[test]
fn saved_layer_shows_what_was_learned_and_no_training_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let layer = file(&folder, "layer.safetensors");
    let own = ["--sentence", "The dog barked at the old clock", "--query", "barked", "--target", "clock"];
    let trained = result(&[&own[..], &["--out", &layer]].concat());
    assert!(number(&trained, "after") > 0.95, "{trained}");
    let loaded = result(&[&own[..], &["--load", &layer]].concat());
    assert_eq!(loaded["after"], trained["after"]);
    assert_eq!(loaded["before"], trained["before"]);
    let untouched = result(&["--steps", "0", "--out", &layer]);
    assert_eq!(untouched["before"], untouched["after"]);
}

#[test]
fn a_repeated_word_is_told_apart_by_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let layer = file(&folder, "layer.safetensors");
    let result = result(&["--query", "cat", "--target", "the#2", "--out", &layer]);
    assert_eq!(result["target"], "the", "the second one, in small letters");
    assert!(number(&result, "after") > 0.95, "{result}");
}

#[test]
fn picture_shows_both_heat_maps() {
    let folder = tempfile::tempdir().unwrap();
    let picture = file(&folder, "heatmap.svg");
    result(&["--steps", "1", "--picture", &picture, "--out", &file(&folder, "layer.safetensors")]);
    let svg = std::fs::read_to_string(picture).unwrap();
    assert!(svg.contains("before training") && svg.contains("after training") && svg.ends_with("</svg>\n"));
}

#[test]
fn bad_input_is_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = file(&folder, "missing/layer.safetensors");
    let no_layer = file(&folder, "no_layer");
    std::fs::write(&no_layer, "hello").unwrap();
    let cases: [(&[&str], i32, &[&str]); 9] = [
        (&["--query", "dog"], 1, &["--query", "dog", "The, cat, sat"]),
        (&["--target", "mat#2"], 1, &["--target", "from 1 to 1", "2"]),
        (&["--sentence", " "], 1, &["no words"]),
        (&["--lr", "-1"], 2, &["finite number above 0"]),
        (&["--lr", "NaN"], 2, &["finite number above 0"]),
        (&["--steps", "many"], 2, &["--steps", "many"]),
        (&["--load", &nowhere], 1, &["can't read", "missing"]),
        (&["--load", &no_layer], 1, &["expected a safetensors file", "5 bytes"]),
        (&["--steps", "1", "--out", &nowhere], 1, &["can't write", "missing"]),
    ];
    for (arguments, code, expected) in cases {
        assert_refused(&example(arguments), code, expected);
    }
}
