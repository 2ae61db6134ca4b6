//! A GPU gives the results of the CPU within rounding, the same files and the same errors.
//!
//! Where there is no GPU, the tests say that they were skipped. `CANDLE_ATTENTION_GPU=required` makes that a failure,
//! and `CANDLE_ATTENTION_GPU=cpu` uses the CPU instead of a GPU, to try the tests themselves.

#[path = "../common/blocks.rs"]
mod blocks_common;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/grids.rs"]
mod grids;
#[path = "../common/layers.rs"]
mod layers;
#[allow(dead_code)]
#[path = "../common/program.rs"]
mod program;
#[path = "../common/precision.rs"]
mod pytorch_precision;

// The cases and checks of the tests of the fused path.
#[allow(dead_code)]
#[path = "../sdpa/fused/check.rs"]
mod check;
#[allow(dead_code)]
#[path = "../sdpa/fused/masks.rs"]
mod masks;
#[path = "../sdpa/fused/pairwise.rs"]
mod pairwise;
#[allow(dead_code)]
#[path = "../sdpa/fused/problem.rs"]
mod problem;

#[allow(dead_code)]
#[path = "../layer/decoding/setup.rs"]
mod sequences;

#[path = "../../kernels/tests/cuda/emulator/mod.rs"]
mod emulator;

mod attention;
mod block;
mod compare;
mod decoding;
mod emulated;
mod files;
mod hostile;
mod layer;
#[cfg(feature = "cuda")]
mod sources;
mod training;

use std::env;
use std::io::{Write, stderr};
use std::sync::Once;

use candle_core::Device;

/// The GPU, if there is one.
fn gpu() -> Option<Device> {
    static SAID: Once = Once::new();
    let asked = env::var("CANDLE_ATTENTION_GPU").unwrap_or_default();
    if asked == "cpu" {
        return Some(Device::Cpu);
    }
    let error = match Device::new_cuda(0) {
        Ok(device) => return Some(device),
        Err(error) => error.to_string(),
    };
    assert_ne!(asked, "required", "CANDLE_ATTENTION_GPU: {error}");
    // libtest hides the output of `eprintln` if a test passes.
    let reason = error.lines().next().unwrap_or_default();
    SAID.call_once(|| {
        writeln!(stderr().lock(), "\nSKIPPED: nothing was compared, since there is no GPU ({reason})").unwrap()
    });
    None
}
