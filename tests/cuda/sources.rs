//! Every CUDA source of the crate compiles for every GPU that it is for. That takes NVRTC, but no GPU.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::cuda_backend::cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts};

/// Ampere and Hopper.
const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90"];

/// Compiles a source. The error is the log of the compiler.
fn compile(source: &str, name: &str, architecture: &'static str) -> Result<(), String> {
    let toolkit = std::env::var("CUDA_HOME").unwrap_or("/usr/local/cuda".into());
    let options = CompileOptions {
        arch: Some(architecture),
        include_paths: vec![format!("{toolkit}/include")],
        name: Some(name.into()),
        ..Default::default()
    };
    match compile_ptx_with_opts(source, options) {
        Ok(_) => Ok(()),
        Err(CompileError::CompileError { log, .. }) => Err(log.to_string_lossy().into_owned()),
        Err(other) => Err(format!("{other:?}")),
    }
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let own = files.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "cu"));
    own.chain(folders.iter().flat_map(|folder| sources(folder))).collect()
}

#[test]
fn every_source_compiles() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for path in ["src", "kernels/src"].iter().flat_map(|folder| sources(&root.join(folder))) {
        let source = fs::read_to_string(&path).unwrap();
        for architecture in ARCHITECTURES {
            if let Err(log) = compile(&source, &path.to_string_lossy(), architecture) {
                panic!("{} for {architecture}:\n{log}", path.display());
            }
        }
    }
}

/// Checks that the test above can fail, and that the compiler finds the headers that kernels need.
#[test]
fn the_compiler_takes_a_kernel_and_refuses_a_mistake() {
    let kernel = |statement: &str| {
        format!(
            "#include <cuda_bf16.h>\n#include <mma.h>\n\
             extern \"C\" __global__ void twice(__nv_bfloat16 *x) {{ {statement} }}"
        )
    };
    for architecture in ARCHITECTURES {
        assert_eq!(compile(&kernel("x[threadIdx.x] *= __float2bfloat16(2.0f);"), "twice.cu", architecture), Ok(()));
        let refused = compile(&kernel("x[threadIdx.x] *= factor;"), "twice.cu", architecture).unwrap_err();
        assert!(refused.contains("twice.cu(3)") && refused.contains("factor"), "{refused}");
    }
}
