//! The main example, run as a user runs it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde_json::Value;

/// The example, built with the profile of this test.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let profile: &[&str] = if cfg!(debug_assertions) { &[] } else { &["--release"] };
        let build = ["build", "--quiet", "--example", "warm_attends_to_mat"];
        let status = Command::new(env!("CARGO")).args(build).args(profile).status().expect("cargo runs");
        assert!(status.success());
        // This test is PROFILE/deps/NAME, the example PROFILE/examples/NAME.
        let test = std::env::current_exe().expect("a test knows its own file");
        let profile = test.parent().and_then(Path::parent).expect("a test lies in PROFILE/deps");
        profile.join("examples/warm_attends_to_mat")
    })
}

fn example(arguments: &[&str]) -> Output {
    Command::new(program()).args(arguments).env_remove("RUST_BACKTRACE").output().expect("the example runs")
}

/// The last line on stdout, as JSON.
fn result(arguments: &[&str]) -> Value {
    let output = example(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(stdout.lines().count(), 1, "stdout is for the result alone: {stdout}");
    serde_json::from_str(stdout.lines().last().unwrap()).unwrap()
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
    let cases: [(&[&str], &[&str]); 9] = [
        (&["--query", "dog"], &["--query", "dog", "The, cat, sat"]),
        (&["--target", "mat#2"], &["--target", "from 1 to 1", "2"]),
        (&["--sentence", " "], &["no words"]),
        (&["--lr", "-1"], &["finite number above 0"]),
        (&["--lr", "NaN"], &["finite number above 0"]),
        (&["--steps", "many"], &["--steps", "many"]),
        (&["--load", &nowhere], &["can't read", "missing"]),
        (&["--load", &no_layer], &["expected a safetensors file", "5 bytes"]),
        (&["--steps", "1", "--out", &nowhere], &["can't write", "missing"]),
    ];
    for (arguments, expected) in cases {
        let output = example(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{arguments:?} was accepted");
        assert!(!stderr.contains("panicked"), "{stderr}");
        for text in expected {
            assert!(stderr.contains(text), "{arguments:?}: no `{text}` in {stderr}");
        }
    }
}
