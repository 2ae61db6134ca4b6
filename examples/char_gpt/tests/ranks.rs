//! The program on several ranks: threads of one process and, with the feature `mpi`, processes of `mpirun` that are killed.

mod common;

use attention_examples::program;
use serde_json::Value;

use common::{command, file, result};

/// A quick model, whose gradients are one bucket. The library's tests have several.
const SIZES: &[&str] =
    &["--width", "32", "--layers", "2", "--heads", "2", "--len", "32", "--batch", "6", "--lr", "0.01"];

/// A short text: its held-out part is quick to compute.
const TEXT: &[&str] = &["--text", concat!(env!("CARGO_MANIFEST_DIR"), "/../../LICENSE-APACHE")];

fn losses(result: &Value) -> Vec<f64> {
    let losses = result["losses"].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap());
    losses.chain([result["validation_loss"].as_f64().unwrap()]).collect()
}

fn assert_close(got: &[f64], expected: &[f64], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (step, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() < 1e-5, "{what}, step {step}: {got} instead of {expected}");
    }
}

/// Also with dropout, and where 6 sequences are shared unevenly.
#[test]
fn losses_do_not_depend_on_the_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let out = file(&folder, "run");
    for dropout in ["0", "0.2"] {
        let flags = [SIZES, TEXT, &["--steps", "20", "--dropout", dropout, "--out", &out, "--sample", "20"]].concat();
        let alone = result(&flags);
        for ranks in ["1", "2", "4"] {
            let together = result(&[&flags, &["--ranks", ranks][..]].concat());
            assert_close(&losses(&together), &losses(&alone), &format!("{ranks} ranks, dropout {dropout}"));
            assert_eq!(together["steps"], 20);
        }
    }
}

#[test]
fn a_run_is_resumed_on_another_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, parts) = (file(&folder, "whole"), file(&folder, "parts"));
    let flags = [SIZES, TEXT, &["--dropout", "0.1", "--sample", "0"]].concat();
    let expected = losses(&result(&[&flags, &["--steps", "12", "--out", &whole][..]].concat()));
    let start = result(&[&flags, &["--steps", "12", "--ranks", "3", "--out", &parts][..]].concat());
    assert_close(&losses(&start), &expected, "3 ranks");
    // Longer, so that there is something to do: the rates then follow the longer run.
    let more = |file: &str, ranks: &[&str]| {
        let copy = format!("{file}.copy");
        std::fs::copy(file, &copy).unwrap();
        losses(&result(&[&["--resume", &copy, "--steps", "18", "--sample", "0"], TEXT, ranks].concat()))
    };
    let expected = more(&whole, &[]);
    assert_eq!(expected.len(), 6 + 1);
    for ranks in ["1", "2", "4"] {
        assert_close(&more(&parts, &["--ranks", ranks]), &expected, &format!("resumed on {ranks} ranks"));
    }
}

#[test]
fn an_adapter_is_trained_on_several_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let (base, adapter) = (file(&folder, "base"), file(&folder, "adapter"));
    result(&[SIZES, TEXT, &["--steps", "4", "--out", &base, "--sample", "0"]].concat());
    let flags = [TEXT, &["--base", &base, "--adapter", &adapter, "--steps", "10", "--sample", "0"]].concat();
    let alone = losses(&result(&flags));
    assert_close(&losses(&result(&[&flags, &["--ranks", "2"][..]].concat())), &alone, "2 ranks");
}

#[test]
fn one_rank_prints_and_errors_are_those_of_one_process() {
    let folder = tempfile::tempdir().unwrap();
    let out = file(&folder, "run");
    let flags = [SIZES, TEXT, &["--steps", "2", "--out", &out, "--sample", "5", "--ranks", "3"]].concat();
    let printed = command(&flags).output().unwrap();
    let text = String::from_utf8(printed.stdout).unwrap();
    assert!(printed.status.success() && text.matches("A GPT of").count() == 1, "{text}");
    assert!(text.contains("3 ranks share each batch of 6 sequences."), "{text}");

    let refused = |arguments: &[&str], code: i32, expected: &[&str]| {
        program::assert_refused(&command(arguments).output().unwrap(), code, expected);
    };
    refused(&[SIZES, TEXT, &["--ranks", "7", "--out", &out]].concat(), 1, &["--ranks", "at most 6", "got 7"]);
    refused(&["--ranks", "0"], 2, &["--ranks"]);
    refused(&["--ranks", "2", "--resume", "/nowhere"], 1, &["--resume /nowhere", "can't read the saved run"]);
    refused(&["--ranks", "2", "--out", "/nowhere/run"], 1, &["/nowhere/run", "can't write"]);
}

#[cfg(not(feature = "mpi"))]
#[test]
fn mpirun_takes_a_program_with_mpi() {
    let output = command(&["--steps", "1"]).env("OMPI_COMM_WORLD_SIZE", "2").output().unwrap();
    program::assert_refused(&output, 1, &["--features mpi"]);
}

/// Processes of `mpirun`. Without it the tests say that they are skipped; `CANDLE_ATTENTION_MPI=required` makes that a failure.
#[cfg(feature = "mpi")]
mod processes {
    use std::path::Path;
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use attention_examples::program::random_below;

    use super::*;

    /// A run that ends by itself or is killed takes no longer.
    const PATIENCE: Duration = Duration::from_secs(240);

    fn mpirun(ranks: usize, arguments: &[&str]) -> Command {
        let mut command = Command::new("mpirun");
        command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string()]);
        // The ranks share the processors.
        command.env("RAYON_NUM_THREADS", "1").arg(env!("CARGO_BIN_EXE_char_gpt")).args(arguments);
        command
    }

    fn is_missing() -> bool {
        let Err(error) = Command::new("mpirun").arg("--version").output() else { return false };
        assert!(std::env::var("CANDLE_ATTENTION_MPI").is_err(), "mpirun: {error}");
        println!("skipped: mpirun: {error}");
        true
    }

    #[test]
    fn processes_have_the_losses_of_one() {
        if is_missing() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let out = file(&folder, "run");
        let flags =
            [SIZES, TEXT, &["--steps", "20", "--dropout", "0.2", "--out", &out, "--sample", "5", "--json"]].concat();
        let expected = losses(&result(&flags[..flags.len() - 1]));
        for ranks in [1, 2, 4] {
            let together = program::json(&mpirun(ranks, &flags).output().unwrap());
            assert_close(&losses(&together), &expected, &format!("{ranks} processes"));
        }
        let refused = mpirun(2, &["--ranks", "3"]).output().unwrap();
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && text.contains("--ranks: expected 2"), "{text}");
    }

    /// Each process has its own command line, and the second one's base is that of another seed.
    #[test]
    fn processes_have_the_same_base() {
        if is_missing() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let bases = ["0", "1"].map(|seed| {
            let base = file(&folder, seed);
            result(&[SIZES, TEXT, &["--steps", "1", "--seed", seed, "--out", &base, "--sample", "0"]].concat());
            base
        });
        let adapter = file(&folder, "adapter");
        let flags = [TEXT, &["--adapter", &adapter, "--steps", "1", "--seed", "0", "--sample", "0"]].concat();
        let [first, second] = &bases;
        let mut command = mpirun(1, &[&["--base", first], &flags[..]].concat());
        command.args([":", "-n", "1", env!("CARGO_BIN_EXE_char_gpt"), "--base", second]).args(&flags);
        let refused = command.output().unwrap();
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && text.contains("--base: expected the same on every rank"), "{text}");
    }

    /// What `ps` says of each rank's process: `pid=` or `stat=`.
    fn ranks_of(mpirun: &Child, what: &str) -> Vec<String> {
        let listed = Command::new("ps").args(["--ppid", &mpirun.id().to_string(), "-o", what]).output().unwrap();
        String::from_utf8(listed.stdout).unwrap().split_whitespace().map(str::to_string).collect()
    }

    /// Whether it ended well. A hang is a failure; not if all ranks have ended, and only `mpirun` hasn't: Open MPI 4.1.4 has a rare
    /// deadlock there.
    fn ends_well(mpirun: &mut Child, what: &str) -> bool {
        let start = Instant::now();
        loop {
            if let Some(status) = mpirun.try_wait().unwrap() {
                return status.success();
            }
            if start.elapsed() > PATIENCE {
                let have_ended = ranks_of(mpirun, "stat=").iter().all(|state| state.starts_with('Z'));
                mpirun.kill().unwrap();
                mpirun.wait().unwrap();
                assert!(have_ended, "{what}: the ranks hang");
                println!("{what}: mpirun was stuck after the end of all ranks");
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Any rank is killed, at any moment, 20 times. No file is half written, and the run ends as an undisturbed one.
    #[test]
    #[ignore = "takes minutes"]
    fn killed_ranks_lose_nothing() {
        if is_missing() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let (undisturbed, killed) = (file(&folder, "undisturbed"), file(&folder, "killed"));
        // There is a validation at every save.
        let often = ["--save-every", "2", "--sample", "0"];
        let start = |out: &str| {
            let arguments = match Path::new(out).exists() {
                true => vec!["--resume", out],
                false => [SIZES, &["--steps", "600", "--dropout", "0.1", "--out", out]].concat(),
            };
            mpirun(3, &[&arguments[..], TEXT, &often].concat())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        };
        assert!(ends_well(&mut start(&undisturbed), "undisturbed"));

        let (mut moments, mut steps) = (Vec::new(), Vec::new());
        while moments.len() < 20 {
            let mut run = start(&killed);
            let (moment, rank) = (random_below(1500), random_below(3) as usize);
            // Counted from the start of the ranks.
            while ranks_of(&run, "pid=").len() < 3 && run.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(5));
            }
            std::thread::sleep(Duration::from_millis(moment));
            if let Some(process) = ranks_of(&run, "pid=").get(rank) {
                let sent = Command::new("kill").args(["-9", process]).output().unwrap().status.success();
                moments.extend(sent.then_some((moment, rank)));
            }
            let has_ended = ends_well(&mut run, &format!("{moments:?}"));
            if let Ok(bytes) = std::fs::read(&killed) {
                let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
                safetensors::SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{moments:?}: {error}"));
                let header: Value = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["char_gpt"]).unwrap();
                steps.push(header["step"].as_u64().unwrap());
            }
            assert!(!has_ended, "the run ended before it was killed 20 times: {moments:?}");
        }
        assert!(ends_well(&mut start(&killed), "the last one"));
        println!("killed after (ms, rank) {moments:?}, at steps {steps:?}");
        assert!(steps.is_sorted(), "{steps:?}");
        assert!(std::fs::read(undisturbed).unwrap() == std::fs::read(killed).unwrap(), "other bytes: {moments:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "something is left over");
    }
}
