//! Ranks as processes. The tests start this program again through `mpirun`, with one ignored test and a case in the environment.
//! Without `mpirun` they say that they are skipped; `CANDLE_ATTENTION_MPI=required` makes that a failure.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs};

use candle_attention::parallel::{mpi, mpi_ranks, threads};
use candle_attention::{AttentionError, Result};
use candle_core::{DType, Device, Tensor};
use tempfile::TempDir;

use crate::laws::{self, numbers};
use crate::{HANG, Ranks, SIZES};

const CASE: &str = "CANDLE_ATTENTION_MPI_CASE";
const OUT: &str = "CANDLE_ATTENTION_MPI_OUT";

/// What a case has left.
struct Run {
    succeeded: bool,
    /// What `mpirun` and the ranks have printed.
    text: String,
    /// What each rank has written to a file, if it has.
    written: Vec<Option<Vec<u8>>>,
}

/// Runs a case on so many processes. `None` without `mpirun`.
fn mpirun(size: usize, case: &str) -> Option<Run> {
    for _ in 0..3 {
        match attempt(size, case) {
            Attempt::Run(run) => return Some(run),
            Attempt::NoMpirun => return None,
            Attempt::Stuck => println!("{case}: mpirun is stuck after the end of all ranks"),
        }
    }
    panic!("{case}: mpirun is always stuck");
}

enum Attempt {
    Run(Run),
    NoMpirun,
    /// All ranks have ended, but `mpirun` hasn't. Open MPI 4.1.4 has a deadlock there (in `PMIx_server_finalize`), which shows rarely,
    /// when ranks fail at the same time.
    Stuck,
}

fn attempt(size: usize, case: &str) -> Attempt {
    let out = TempDir::new().unwrap();
    let printed = out.path().join("printed");
    let file = fs::File::create(&printed).unwrap();
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", &size.to_string()]);
    command.arg(env::current_exe().unwrap()).args(["--exact", "mpirun::rank", "--ignored", "--nocapture"]);
    command.env(CASE, case).env(OUT, out.path()).env("RUST_BACKTRACE", "0").stdin(Stdio::null());
    let child = command.stdout(file.try_clone().unwrap()).stderr(file).spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            assert!(env::var("CANDLE_ATTENTION_MPI").is_err(), "mpirun: {error}");
            println!("skipped: mpirun: {error}");
            return Attempt::NoMpirun;
        }
    };
    let start = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if start.elapsed() > Duration::from_secs(10) && all_have_ended(child.id()) => {
                child.kill().unwrap();
                child.wait().unwrap();
                return Attempt::Stuck;
            }
            None if start.elapsed() > HANG => {
                child.kill().unwrap();
                panic!("{case} on {size} ranks hangs: {}", fs::read_to_string(&printed).unwrap());
            }
            None => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    let text = String::from_utf8_lossy(&fs::read(&printed).unwrap()).into_owned();
    let written = (0..size).map(|rank| fs::read(out.path().join(rank.to_string())).ok()).collect();
    Attempt::Run(Run { succeeded: status.success(), text, written })
}

#[test]
fn processes_keep_the_laws_and_have_the_bits_of_threads() {
    for size in SIZES {
        let Some(run) = mpirun(size, "laws") else { return };
        assert!(run.succeeded, "{size} ranks: {}", run.text);
        let expected = threads(size, |ranks| laws::sums(&ranks)).unwrap();
        assert!(run.written == expected.into_iter().map(Some).collect::<Vec<_>>(), "{size} ranks");
    }
}

/// A rank ends first, another one while the rest still works. All of them end.
#[test]
fn processes_may_end_at_other_times() {
    let Some(run) = mpirun(3, "late") else { return };
    assert!(run.succeeded, "{}", run.text);
}

#[test]
fn large_messages_come_in_parts() {
    let Some(run) = mpirun(2, "large") else { return };
    assert!(run.succeeded, "{}", run.text);
}

#[test]
fn one_communicator_serves_a_process() {
    let Some(run) = mpirun(3, "handle") else { return };
    assert!(run.succeeded, "{}", run.text);
}

#[test]
fn processes_that_disagree_all_know() {
    for (case, texts) in [
        ("exchange_and_sum", ["exchange of 1 tensors", "all_reduce of f32 [200000]"]),
        ("other_ranks", [", to rank", ", from rank"]),
    ] {
        let Some(run) = mpirun(3, case) else { return };
        assert!(!run.succeeded, "{}", run.text);
        for error in run.written {
            let error = String::from_utf8(error.unwrap_or_else(|| panic!("{}", run.text))).unwrap();
            assert!(texts.iter().all(|text| error.contains(text)), "{error}");
        }
    }
}

#[test]
fn a_process_that_fails_ends_the_others() {
    let cases = [("error", "17 bytes"), ("panic", "something is wrong"), ("error_of_one", "17 bytes"), ("killed", "")];
    for (case, reason) in cases {
        let start = Instant::now();
        // The others would sleep for ten minutes, or wait for a rank that is gone.
        let Some(Run { succeeded, text, written }) = mpirun(3, case) else { return };
        assert!(!succeeded && start.elapsed() < HANG, "{case}: {text}");
        assert!(text.contains(reason), "{case}: {text}");
        if ["error", "panic"].contains(&case) {
            for error in [&written[0], &written[2]] {
                let error = String::from_utf8(error.clone().unwrap_or_else(|| panic!("{case}: {text}"))).unwrap();
                assert!(error.contains("rank 1") && error.contains(reason), "{case}: {error}");
            }
        }
    }
}

/// Whether `mpirun` has had processes, and waits for none of them any more.
fn all_have_ended(mpirun: u32) -> bool {
    let ranks = Command::new("ps").args(["--ppid", &mpirun.to_string(), "-o", "stat="]).output().unwrap();
    let ranks = String::from_utf8(ranks.stdout).unwrap();
    !ranks.is_empty() && ranks.lines().all(|state| state.starts_with('Z'))
}

/// A rank of the tests above.
#[test]
#[ignore = "runs in mpirun"]
fn rank() {
    let Ok(case) = env::var(CASE) else { return };
    let out = env::var(OUT).unwrap();
    if case == "handle" {
        return handle().unwrap();
    }
    mpi_ranks(|ranks| {
        let result = run(&case, &ranks, Path::new(&out));
        if let Err(error) = &result {
            fs::write(Path::new(&out).join(ranks.rank().to_string()), error.to_string()).unwrap();
        }
        result
    })
    .unwrap();
}

fn run(case: &str, ranks: Ranks, out: &Path) -> Result<()> {
    let tensor = numbers(ranks.rank(), &[200_000], DType::F32)?;
    let (rank, size) = (ranks.rank(), ranks.size());
    let wait_for_all = || ranks.all_reduce(&tensor).map(drop);
    match case {
        "laws" => {
            for (name, law) in
                crate::laws().into_iter().chain(crate::disagreement()).chain(crate::data()).chain(crate::tensor_laws())
            {
                if rank == 0 {
                    println!("{name}");
                }
                law(ranks)?;
            }
            fs::write(out.join(rank.to_string()), laws::sums(ranks)?).unwrap();
            Ok(())
        }
        "large" => {
            // More than one part of 64 MiB, and not a multiple of it.
            let numbers = |rank: usize| (rank as u32)..18_000_000;
            let large = Tensor::from_iter(numbers(rank), &Device::Cpu)?;
            let got = ranks.start_ring(&[large])?.wait()?.remove(0);
            assert!(got.to_vec1::<u32>()?.into_iter().eq(numbers(1 - rank)));
            Ok(())
        }
        // Rank 1 gets its message at once, and ends. Rank 0 sees that while it waits for rank 2. Small messages need no receiver.
        "late" => {
            if rank == 2 {
                std::thread::sleep(Duration::from_millis(300));
            }
            ranks.start_ring(&[tensor.narrow(0, 0, 4)?])?.wait().map(drop)
        }
        "exchange_and_sum" => match rank {
            1 => ranks.start_ring(std::slice::from_ref(&tensor))?.wait().map(drop),
            _ => wait_for_all(),
        },
        "other_ranks" => {
            let from = if rank == 0 { 1 } else { rank - 1 };
            for _ in 0..3 {
                ranks.start_exchange(std::slice::from_ref(&tensor), (rank + 1) % size, from)?.wait()?;
            }
            Ok(())
        }
        "error" | "error_of_one" if rank == 1 => Err(AttentionError::Memory { what: "test", bytes: 17 }.into()),
        "panic" if rank == 1 => panic!("something is wrong"),
        "killed" if rank == 1 => {
            Command::new("kill").args(["-9", &std::process::id().to_string()]).status().unwrap();
            unreachable!()
        }
        // These would compute for long.
        "error_of_one" => {
            std::thread::sleep(Duration::from_secs(600));
            Ok(())
        }
        _ => wait_for_all(),
    }
}

/// Two handles are one communicator, which ends with the last.
fn handle() -> Result<()> {
    let first = mpi()?;
    let second = mpi()?;
    assert_eq!((first.rank(), first.size()), (second.rank(), second.size()));
    let pending = first.start_all_reduce(&Tensor::ones(4, DType::F32, &Device::Cpu)?)?;
    drop(first);
    second.agree("the number of ranks", &second.size().to_string())?;
    assert_eq!(pending.wait()?[0].to_vec1::<f32>()?, [second.size() as f32; 4]);
    drop(second);
    let error = mpi().unwrap_err();
    assert!(error.to_string().contains("start of MPI: expected the first"), "{error}");
    Ok(())
}
