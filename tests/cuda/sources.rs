//! Every variant of the CUDA kernels that is shipped compiles for every GPU that it is for. That takes NVRTC, but no GPU.
//!
//! `variants.json` lists the variants. `scripts/cuda_instructions` holds the same list to limits of machine code.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::cuda_backend::cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts};
use serde_json::Value;

/// Virtual architectures, so that only PTX is made: `scripts/cuda_instructions` makes the machine code. Ampere, whose PTX Hopper takes.
const AMPERE: &str = "compute_80";
/// Hopper with `wgmma`, which is in no later GPU.
const HOPPER: &str = "compute_90a";

/// A source with its macros.
struct Variant {
    source: PathBuf,
    defines: Vec<(String, u64)>,
}

impl Variant {
    fn architecture(&self) -> &'static str {
        if self.defines.iter().any(|(name, _)| name == "HOPPER") { HOPPER } else { AMPERE }
    }

    /// Compiles it. The error is the log of the compiler.
    fn compile(&self) -> Result<(), String> {
        let source = fs::read_to_string(&self.source).unwrap();
        let defines = self.defines.iter().map(|(name, value)| format!("-D{name}={value}"));
        compile(&source, &self.source, self.architecture(), defines.collect())
    }
}

fn compile(source: &str, path: &Path, architecture: &'static str, defines: Vec<String>) -> Result<(), String> {
    let toolkit = std::env::var("CUDA_HOME").unwrap_or("/usr/local/cuda".into());
    let own = path.parent().map(|folder| folder.display().to_string()).unwrap_or_default();
    let options = CompileOptions {
        arch: Some(architecture),
        include_paths: vec![own, format!("{toolkit}/include")],
        name: Some(path.display().to_string()),
        // Without the second option NVRTC refuses lambdas with a parameter of type `auto`.
        options: [vec!["--std=c++17".into(), "-default-device".into()], defines].concat(),
        ..Default::default()
    };
    match compile_ptx_with_opts(source, options) {
        Ok(_) => Ok(()),
        Err(CompileError::CompileError { log, .. }) => Err(log.to_string_lossy().into_owned()),
        Err(other) => Err(format!("{other:?}")),
    }
}

fn device() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/src/cuda/device")
}

/// A row of the table stands for every combination of the values that it lists.
fn combinations(defines: &serde_json::Map<String, Value>) -> Vec<Vec<(String, u64)>> {
    defines.iter().fold(vec![Vec::new()], |so_far, (name, value)| {
        let values = value.as_array().cloned().unwrap_or(vec![value.clone()]);
        let values: Vec<_> = values.iter().map(|value| value.as_u64().expect("a number")).collect();
        let longer = |first: &Vec<_>| -> Vec<_> {
            values.iter().map(|&value| [first.clone(), vec![(name.clone(), value)]].concat()).collect()
        };
        so_far.iter().flat_map(longer).collect()
    })
}

fn variants() -> Vec<Variant> {
    let table: Value = serde_json::from_str(include_str!("variants.json")).unwrap();
    let rows = table["variants"].as_array().expect("rows").iter();
    let all = rows.flat_map(|row| {
        let source = device().join(row["source"].as_str().expect("a file"));
        let defines = combinations(row["defines"].as_object().expect("macros")).into_iter();
        defines.map(move |defines| Variant { source: source.clone(), defines })
    });
    all.collect()
}

#[test]
fn every_variant_compiles() {
    let variants = variants();
    let next = AtomicUsize::new(0);
    let compile_the_rest = || {
        while let Some(variant) = variants.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(log) = variant.compile() {
                panic!("{} {:?}:\n{log}", variant.source.display(), variant.defines);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(compile_the_rest);
        }
    });
}

#[test]
fn the_table_has_every_source() {
    let files = fs::read_dir(device()).unwrap().map(|entry| entry.unwrap().path());
    let sources: BTreeSet<_> =
        files.filter(|path| path.extension().is_some_and(|extension| extension == "cu")).collect();
    let known: BTreeSet<_> = variants().into_iter().map(|variant| variant.source).collect();
    assert_eq!(known, sources, "tests/cuda/variants.json and kernels/src/cuda/device");
}

/// Checks that the tests above can fail, and that the compiler finds the headers that kernels need.
#[test]
fn the_compiler_takes_a_kernel_and_refuses_a_mistake() {
    let kernel = |statement: &str| {
        format!(
            "#include <cuda_bf16.h>\n#include <mma.h>\n\
             extern \"C\" __global__ void twice(__nv_bfloat16 *x) {{ {statement} }}"
        )
    };
    let compile =
        |statement, architecture| compile(&kernel(statement), Path::new("twice.cu"), architecture, Vec::new());
    for architecture in [AMPERE, HOPPER] {
        assert_eq!(compile("x[threadIdx.x] *= __float2bfloat16(2.0f);", architecture), Ok(()));
        let refused = compile("x[threadIdx.x] *= factor;", architecture).unwrap_err();
        assert!(refused.contains("twice.cu(3)") && refused.contains("factor"), "{refused}");
    }
}
