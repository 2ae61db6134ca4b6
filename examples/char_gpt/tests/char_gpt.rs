//! The program, run as a user runs it, and killed at random moments.

mod common;

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use attention_examples::program::{self, random_below};
use serde_json::Value;

use common::{command, file, result};

/// A model that learns in seconds, even if its program isn't optimised.
const SMALL: &[&str] =
    &["--width", "32", "--layers", "2", "--heads", "2", "--len", "32", "--batch", "8", "--lr", "0.01"];

fn number(result: &Value, field: &str) -> f64 {
    result[field].as_f64().unwrap_or_else(|| panic!("no number {field} in {result}"))
}

#[test]
fn short_run_beats_character_frequencies() {
    let folder = tempfile::tempdir().unwrap();
    for (positions, dtype) in [("rotary", "f32"), ("learned", "f32"), ("rotary", "bf16")] {
        let out = file(&folder, positions);
        let flags = ["--steps", "120", "--positions", positions, "--dtype", dtype, "--out", &out, "--sample", "50"];
        let result = result(&[SMALL, &flags].concat());
        let (learned, frequencies) = (number(&result, "validation_loss"), number(&result, "unigram_loss"));
        // The entropy of English by the frequency of its characters, and clearly less than that.
        assert!((2.9..3.2).contains(&frequencies), "{result}");
        assert!(learned < frequencies - 0.3, "{result}");
        assert_eq!(result["losses"].as_array().unwrap().len(), 120);
        assert_eq!(result["sample"].as_str().unwrap().chars().count(), 50);
    }
}

/// The licence is the second author. Its characters that the first one doesn't use are left out.
#[test]
fn adapter_learns_a_second_author() {
    let folder = tempfile::tempdir().unwrap();
    let (base, adapter) = (file(&folder, "base.safetensors"), file(&folder, "adapter"));
    result(&[SMALL, &["--steps", "60", "--out", &base, "--sample", "0"]].concat());
    let before = std::fs::read(&base).unwrap();
    let licence = concat!(env!("CARGO_MANIFEST_DIR"), "/../../LICENSE-APACHE");
    let flags = ["--base", &base, "--text", licence, "--adapter", &adapter, "--steps", "60", "--sample", "10"];
    let result = result(&flags);
    let (untouched, adapted) = (number(&result, "base_validation_loss"), number(&result, "validation_loss"));
    assert!(adapted < untouched - 0.1, "{result}");
    assert!(std::fs::read(&base).unwrap() == before, "the base stays as it is");
    let weights = std::fs::read(Path::new(&adapter).join("adapter_model.safetensors")).unwrap();
    assert!(weights.len() < before.len() / 3, "{} bytes beside {}", weights.len(), before.len());

    let refused = |flags: &[&str], expected: &[&str]| {
        program::assert_refused(&command(flags).output().unwrap(), 1, expected);
    };
    refused(&["--base", "/nowhere", "--text", licence, "--adapter", &adapter], &["--base /nowhere"]);
    refused(&["--base", &base, "--text", "/nowhere", "--adapter", &adapter], &["/nowhere"]);
    refused(&["--base", &base, "--text", licence, "--adapter", &adapter, "--width", "64"], &["--width", "32", "64"]);
    let alone = command(&["--base", &base]).output().unwrap();
    program::assert_refused(&alone, 2, &["--adapter"]);
}

#[test]
fn seed_alone_decides_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let run = |seed: &str| {
        let out = file(&folder, "run");
        let flags = ["--steps", "3", "--dropout", "0.2", "--seed", seed, "--out", &out, "--sample", "40"];
        let result = result(&[SMALL, &flags].concat());
        (std::fs::read(out).unwrap(), result["sample"].clone())
    };
    let first = run("1");
    assert!(first == run("1"));
    assert!(first.1 != run("2").1);
}

#[test]
fn killed_and_resumed_run_ends_with_the_same_bytes() {
    check_killed_run("f32");
}

#[test]
fn killed_and_resumed_run_in_bf16_ends_with_the_same_bytes() {
    check_killed_run("bf16");
}

fn check_killed_run(dtype: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (undisturbed, killed) = (file(&folder, "undisturbed"), file(&folder, "killed"));
    let flags = ["--steps", "90", "--dtype", dtype, "--dropout", "0.1", "--save-every", "2", "--sample", "0"];
    result(&[SMALL, &flags, &["--out", &undisturbed]].concat());

    let mut moments = Vec::new();
    loop {
        let exists = Path::new(&killed).exists();
        let start: Vec<&str> = [SMALL, &flags, &["--out", &killed]].concat();
        let arguments = if exists { vec!["--resume", &killed, "--save-every", "2", "--sample", "0"] } else { start };
        let mut run = command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // The first three early, while the program reads the text and makes the file. After ten the program may finish.
        let patience = if moments.len() < 3 { 60 } else { 700 };
        let moment = if moments.len() < 10 { random_below(patience) } else { patience + random_below(5000) };
        std::thread::sleep(Duration::from_millis(moment));
        // SIGKILL. It has no effect if the run has ended.
        run.kill().unwrap();
        let status = run.wait().unwrap();
        if status.success() {
            break;
        }
        assert_eq!(status.code(), None, "killed after {moments:?}, it failed by itself");
        moments.push(moment);
        if let Ok(bytes) = std::fs::read(&killed) {
            safetensors::SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{moments:?}: {error}"));
        }
    }
    assert!(moments.len() >= 3, "killed too few times: {moments:?}");
    println!("killed after {moments:?} ms");
    assert!(std::fs::read(undisturbed).unwrap() == std::fs::read(killed).unwrap(), "other bytes: {moments:?}");
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 2, "something is left over");
}

#[test]
fn a_run_can_be_made_longer() {
    let folder = tempfile::tempdir().unwrap();
    let (short, long) = (file(&folder, "short"), file(&folder, "long"));
    result(&[SMALL, &["--steps", "3", "--out", &short, "--sample", "0"]].concat());
    let before = std::fs::read(&short).unwrap();
    let result = result(&["--resume", &short, "--steps", "5", "--out", &long, "--sample", "0"]);
    assert_eq!((&result["first_step"], &result["steps"]), (&3.into(), &5.into()));
    assert_eq!(result["losses"].as_array().unwrap().len(), 2);
    assert!(std::fs::read(&short).unwrap() == before);
}

#[test]
fn saved_run_keeps_its_type() {
    let folder = tempfile::tempdir().unwrap();
    let saved = file(&folder, "saved");
    result(&[SMALL, &["--dtype", "bf16", "--steps", "1", "--sample", "0", "--out", &saved]].concat());
    let bytes = std::fs::read(&saved).unwrap();
    let head = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor("model.head.weight").unwrap().dtype();
    assert_eq!(head, safetensors::Dtype::BF16);
    let refused = command(&["--resume", &saved, "--dtype", "f32"]).output().unwrap();
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("--dtype: expected Bf16"), "{error}");
}

#[test]
fn cached_writing_equals_uncached() {
    let folder = tempfile::tempdir().unwrap();
    for positions in ["rotary", "learned"] {
        let run = file(&folder, positions);
        result(&[SMALL, &["--steps", "40", "--positions", positions, "--out", &run, "--sample", "0"]].concat());
        for prompt in ["Anne", "It was a truth that was longer than what the model sees at once"] {
            let write = |more: &[&str]| {
                let flags = ["--resume", &run, "--sample", "200", "--temperature", "0", "--prompt", prompt];
                result(&[&flags, more].concat())["sample"].as_str().unwrap().to_string()
            };
            let cached = write(&[]);
            assert_eq!(cached.chars().count(), 200);
            assert_eq!(cached, write(&["--no-cache"]));
        }
    }
}

#[test]
fn another_text_is_learned_from() {
    let folder = tempfile::tempdir().unwrap();
    let (text, out) = (file(&folder, "text"), file(&folder, "out"));
    std::fs::write(&text, "Größe, naïveté, 気.\n".repeat(100)).unwrap();
    let flags = ["--text", &text, "--steps", "60", "--out", &out, "--temperature", "0"];
    let result = result(&[SMALL, &flags, &["--prompt", "Größe", "--sample", "12"]].concat());
    assert_eq!(result["sample"], ", naïveté, 気");
}

/// Checks that the program fails with this exit code and a message that contains all of these texts.
fn assert_refused(arguments: &[&str], code: i32, expected: &[&str]) {
    let Output { status, stdout, stderr } = command(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(code), "{arguments:?}: {stderr}");
    assert!(stdout.is_empty() && !stderr.contains("panicked"), "{stderr}");
    for text in expected {
        assert!(stderr.contains(text), "{arguments:?}: no `{text}` in {stderr}");
    }
}

#[test]
fn bad_flags_are_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let (nowhere, short) = (file(&folder, "missing/run"), file(&folder, "short"));
    std::fs::write(&short, "a short text").unwrap();
    let bytes = file(&folder, "bytes");
    std::fs::write(&bytes, [0xff, 0xfe]).unwrap();
    for (arguments, expected) in [
        (&["--lr", "-1"][..], &["finite number above 0"][..]),
        (&["--lr", "NaN"], &["finite number above 0"]),
        (&["--dropout", "1"], &["probability in [0, 1)"]),
        (&["--temperature", "-1"], &["finite number from 0 up"]),
        (&["--batch", "0"], &["--batch", "from 1 to 65536"]),
        (&["--save-every", "0"], &["--save-every", "from 1 to 65536"]),
        (&["--steps", "many"], &["--steps", "many"]),
        (&["--positions", "none"], &["--positions", "rotary"]),
    ] {
        assert_refused(arguments, 2, expected);
    }
    for (arguments, expected) in [
        (&["--prompt", "Ånne"][..], &["--prompt", "'Å'", "isn't in the text"][..]),
        (&["--prompt", ""], &["--prompt", "at least one character"]),
        (&["--text", &nowhere], &["missing", "can't read the text"]),
        (&["--text", &bytes], &["bytes", "can't read the text", "UTF-8"]),
        (&["--text", &short, "--prompt", "a"], &["--len 128", "at least 1290 characters", "got 12"]),
        (&["--heads", "3"], &["multiple of num_heads 3", "128"]),
        (&["--resume", &nowhere], &["missing", "can't read the saved run"]),
        (&["--out", &nowhere], &["missing", "can't write"]),
        (&["--out", folder.path().to_str().unwrap()], &["can't write", "directory"]),
    ] {
        assert_refused(arguments, 1, expected);
    }
}

#[test]
fn file_of_another_run_is_refused_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (run, text) = (file(&folder, "run"), file(&folder, "text"));
    result(&[SMALL, &["--steps", "4", "--out", &run, "--sample", "0"]].concat());
    let whole = std::fs::read(&run).unwrap();
    let persuasion = Path::new(env!("CARGO_MANIFEST_DIR")).join("persuasion.txt");
    // The same characters, but another text.
    std::fs::write(&text, std::fs::read_to_string(persuasion).unwrap().replace("Anne", "Enna")).unwrap();
    for (more, expected) in [
        (&["--width", "64"][..], &["--width: expected 32", "got 64"][..]),
        (&["--lr", "0.1"], &["--lr: expected 0.01", "got 0.1"]),
        (&["--seed", "7"], &["--seed: expected 0", "got 7"]),
        (&["--positions", "learned"], &["--positions: expected Rotary", "got Learned"]),
        (&["--steps", "3"], &["--steps: expected at least 4", "got 3"]),
        (&["--text", &text], &["another text", "--text"]),
    ] {
        assert_refused(&[&["--resume", &run], more].concat(), 1, expected);
        assert!(std::fs::read(&run).unwrap() == whole);
    }
    let cut = |bytes: &[u8]| {
        std::fs::write(&run, bytes).unwrap();
        assert_refused(&["--resume", &run], 1, &["--resume", "run", "expected a"]);
        assert!(std::fs::read(&run).unwrap() == bytes);
    };
    for len in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        cut(&whole[..len]);
    }
    cut(b"not a run at all");
    cut(&std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../weights/warm_attends_to_mat.safetensors")).unwrap());
}
