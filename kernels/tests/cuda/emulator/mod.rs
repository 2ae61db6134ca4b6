//! Runs the CUDA kernels on a CPU: a C++ compiler makes a library of a kernel's source and the emulator (`cuda_on_cpu.h`).
//!
//! Where there is no C++ compiler, the tests say that they were skipped. `CANDLE_ATTENTION_EMULATOR=required` makes that a failure.

#![allow(dead_code)]

mod compiler;
mod library;
mod machine;

pub use compiler::Compiler;
pub use library::{Counters, Launch, Library, Options, Region, Replacement};
#[allow(unused_imports)] // each package uses a part
pub use machine::{AMPERE, EmulatedMemory, Emulator, HOPPER, Launched};

use std::env;
use std::io::{Write, stderr};
use std::path::{Path, PathBuf};
use std::sync::Once;

/// The folder of the package attention-kernels. This module is used by its tests, and by those of the package that it is in.
fn package() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    if package.ends_with("kernels") { package.to_owned() } else { package.join("kernels") }
}

/// Where the device code is.
pub fn device_folder() -> PathBuf {
    package().join("src/cuda/device")
}

/// Where the emulator is.
pub fn emulator_folder() -> PathBuf {
    package().join("tests/cuda/emulator")
}

/// Whether kernels can be run here. If not, says so once.
pub fn is_there() -> bool {
    static SAID: Once = Once::new();
    if Compiler::find().is_some() {
        return true;
    }
    let asked = env::var("CANDLE_ATTENTION_EMULATOR").unwrap_or_default();
    assert_ne!(asked, "required", "CANDLE_ATTENTION_EMULATOR: there is no C++ compiler (CXX, c++, g++, clang++)");
    // libtest hides the output of `eprintln` if a test passes.
    SAID.call_once(|| {
        writeln!(
            stderr().lock(),
            "\nSKIPPED: no kernel was run, since there is no C++ compiler (CXX, c++, g++, clang++)"
        )
        .unwrap()
    });
    false
}
