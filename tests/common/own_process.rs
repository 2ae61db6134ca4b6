//! Tests that run again in a process of their own, with little memory and little time: an allocation that fails aborts the
//! process, and one that succeeds may stop the machine.

use std::process::{Command, exit};
use std::time::Duration;

/// Set in the process that runs one test.
const IN_OWN_PROCESS: &str = "CANDLE_ATTENTION_TEST_IN_OWN_PROCESS";
const TIME_LIMIT: Duration = Duration::from_secs(300);

/// Runs the body of a test in a process with this limit of its address space. `test` is the path of the test in its crate, with
/// the crate's name. The shell sets the limit, and only Linux keeps it.
pub fn with_memory(kib: usize, test: &str, body: impl FnOnce()) {
    if std::env::var_os(IN_OWN_PROCESS).is_some() {
        watch();
        return body();
    }
    let program = std::env::current_exe().expect("this program's path");
    let (_, name) = test.split_once("::").expect("a path in a crate");
    let script = format!("ulimit -v {kib}; exec \"$0\" --exact --include-ignored --nocapture \"$1\"");
    let output = Command::new("sh")
        .args(["-c".as_ref(), script.as_ref(), program.as_os_str(), name.as_ref()])
        .env(IN_OWN_PROCESS, name)
        .env("RUST_BACKTRACE", "0")
        // Stacks of many threads, and their heaps, would take the address space of a machine with many processors.
        .env("RAYON_NUM_THREADS", "2")
        .env("MALLOC_ARENA_MAX", "2")
        .output()
        .expect("a process");
    let text = format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("running 1 test") || !output.status.success(), "no test {name}: {text}");
    assert!(output.status.success(), "{}: {text}", output.status);
}

/// Exits the process if the test takes too long.
fn watch() {
    std::thread::spawn(|| {
        std::thread::sleep(TIME_LIMIT);
        eprintln!("no result after {TIME_LIMIT:?}");
        exit(3);
    });
}
