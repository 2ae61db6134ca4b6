//! Kernels, compiled by NVRTC: the sources are part of this library, and the machine code is kept in files.

use std::ffi::{CString, c_char, c_int};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::nvrtc::result as nvrtc;
use cudarc::nvrtc::sys;

use super::machine::{Launch, Source};
use crate::error::Error;

/// The files that the sources include, by name.
const HEADERS: [(&str, &str); 8] = [
    ("primitives.cuh", include_str!("device/primitives.cuh")),
    ("wgmma.cuh", include_str!("device/wgmma.cuh")),
    ("problem.cuh", include_str!("device/problem.cuh")),
    ("engine.cuh", include_str!("device/engine.cuh")),
    ("scores.cuh", include_str!("device/scores.cuh")),
    ("softmax.cuh", include_str!("device/softmax.cuh")),
    ("forward_specialised.cuh", include_str!("device/forward_specialised.cuh")),
    ("gradients.cuh", include_str!("device/gradients.cuh")),
];

/// The first bytes of a file of machine code.
const MAGIC: &[u8; 8] = b"attn-cu1";
/// Bytes of the hash of the machine code, which follows it.
const HASH_BYTES: usize = 16;

fn text(source: Source) -> &'static str {
    match source {
        Source::Forward => include_str!("device/forward.cu"),
        Source::Decode => include_str!("device/decode.cu"),
        Source::Backward => include_str!("device/backward.cu"),
        Source::Bias => include_str!("device/bias.cu"),
        Source::Careful => include_str!("device/careful.cu"),
    }
}

/// A source with its macros, for one kind of GPU.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Program {
    source: Source,
    defines: Vec<(&'static str, u32)>,
    hopper: bool,
    capability: (u32, u32),
}

impl Program {
    /// What a launch runs on a GPU of this compute capability.
    pub fn of(launch: &Launch, capability: (u32, u32)) -> Self {
        Self { source: launch.source, defines: launch.defines.clone(), hopper: launch.hopper, capability }
    }

    /// What NVRTC is asked for.
    fn options(&self) -> Vec<String> {
        let (major, minor) = self.capability;
        let architecture = format!("--gpu-architecture=sm_{major}{minor}{}", if self.hopper { "a" } else { "" });
        // Without the last option NVRTC refuses lambdas with a parameter of type `auto`.
        let mut options = vec![architecture, "--std=c++17".to_string(), "-default-device".to_string()];
        options.extend(self.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        options.extend(self.hopper.then(|| "-DHOPPER".to_string()));
        options
    }

    /// The machine code, from the file that keeps it or from NVRTC.
    ///
    /// # Errors
    ///
    /// As [`Program::compile`].
    pub fn machine_code(&self, kernel: &'static str) -> Result<Vec<u8>, Error> {
        let file = cache_folder().map(|folder| folder.join(self.file_name()));
        if let Some(code) = file.as_deref().and_then(read) {
            return Ok(code);
        }
        let kept = file.as_deref().map_or("kept nowhere".to_string(), |file| format!("kept as {}", file.display()));
        log::info!("compiling the CUDA kernel {kernel}, which takes seconds; the machine code is {kept}");
        let code = self.compile(kernel)?;
        if let Some(Err(error)) = file.as_deref().map(|file| write(file, &code)) {
            log::debug!("CUDA kernels are compiled again in the next process, since they can't be kept: {error}");
        }
        Ok(code)
    }

    /// Removes the file that keeps the machine code.
    pub(super) fn forget(&self) {
        if let Some(folder) = cache_folder() {
            // The file may not be there.
            let _ = fs::remove_file(folder.join(self.file_name()));
        }
    }

    /// Everything that the machine code depends on, as a name.
    fn file_name(&self) -> String {
        let mut hash = Fnv::new();
        HEADERS.iter().for_each(|(_, header)| hash.add(header.as_bytes()));
        hash.add(text(self.source).as_bytes());
        self.options().iter().for_each(|option| hash.add(option.as_bytes()));
        hash.add(format!("{:?}", version()).as_bytes());
        format!("{}-{:032x}.cubin", self.source.file_name().trim_end_matches(".cu"), hash.0)
    }

    /// Compiles to machine code. `kernel` is named in errors.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] with what NVRTC says: it may not know the GPU, if it is older.
    pub fn compile(&self, kernel: &'static str) -> Result<Vec<u8>, Error> {
        let failed = |reason: String| Error::Kernel { kernel, reason };
        let nul = |_| failed("a zero byte in the source".to_string());
        let c_text = |text: &str| CString::new(text).map_err(nul);
        let (source, name) = (c_text(text(self.source))?, c_text(self.source.file_name())?);
        let headers = HEADERS.iter().map(|(name, text)| Ok((c_text(name)?, c_text(text)?)));
        let headers = headers.collect::<Result<Vec<_>, Error>>()?;
        let names: Vec<*const c_char> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
        let texts: Vec<*const c_char> = headers.iter().map(|(_, text)| text.as_ptr()).collect();
        let (mut program, count) = (ptr::null_mut(), headers.len() as c_int);
        // SAFETY: all texts end with a zero byte and live until the end of this function; both lists have `count` entries.
        let created = unsafe {
            sys::nvrtcCreateProgram(&mut program, source.as_ptr(), name.as_ptr(), count, texts.as_ptr(), names.as_ptr())
        };
        created.result().map_err(|error| failed(format!("NVRTC can't be used: {error:?}")))?;
        let program = Created(program);
        // SAFETY: the program has been created above, and is destroyed when it is dropped.
        let compiled = unsafe { nvrtc::compile_program(program.0, &self.options()) };
        compiled.map_err(|error| failed(format!("{error:?} by NVRTC {:?}: {}", version(), program.log())))?;
        program.code().map_err(|error| failed(format!("NVRTC gives no machine code: {error:?}")))
    }
}

/// A program of NVRTC, destroyed when dropped.
struct Created(sys::nvrtcProgram);

impl Created {
    fn log(&self) -> String {
        // SAFETY: the program lives as long as `self`.
        let log = unsafe { nvrtc::get_program_log(self.0) }.unwrap_or_default();
        let bytes: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
        String::from_utf8_lossy(&bytes).trim().to_string()
    }

    fn code(&self) -> Result<Vec<u8>, nvrtc::NvrtcError> {
        let mut size = 0;
        // SAFETY: the program lives as long as `self`.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &mut size) }.result()?;
        let mut code = vec![0u8; size];
        // SAFETY: `code` has as many bytes as the program's machine code.
        unsafe { sys::nvrtcGetCUBIN(self.0, code.as_mut_ptr().cast()) }.result()?;
        Ok(code)
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        // SAFETY: the program has been created, and nothing else destroys it. Whether that succeeds changes nothing.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

/// The version of NVRTC; (0, 0) if it can't be told.
fn version() -> (c_int, c_int) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both are numbers to write to.
    let asked = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    asked.result().map_or((0, 0), |()| (major, minor))
}

/// Where machine code is kept: in `$CANDLE_ATTENTION_CACHE`, or in `candle-attention` of the user's folder for such files.
fn cache_folder() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let of_user = || folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")));
    folder("CANDLE_ATTENTION_CACHE").or_else(|| of_user().map(|folder| folder.join("candle-attention")))
}

/// The machine code in a file; none if the file isn't there, isn't whole or is another.
fn read(file: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(file).ok()?;
    let (hash, code) = bytes.strip_prefix(MAGIC)?.split_at_checked(HASH_BYTES)?;
    (hash == Fnv::of(code).0.to_le_bytes() && !code.is_empty()).then(|| code.to_vec())
}

/// Writes a file under another name first, so that no process reads a part of it.
fn write(file: &Path, code: &[u8]) -> io::Result<()> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let new = folder.join(format!(".{}-{number}.new", process::id()));
    let bytes = [MAGIC.as_slice(), &Fnv::of(code).0.to_le_bytes(), code].concat();
    let written = fs::write(&new, bytes).and_then(|()| fs::rename(&new, file));
    if written.is_err() {
        // It may not be there.
        let _ = fs::remove_file(&new);
    }
    written
}

/// The hash FNV-1a in 128 bits, which is the same in every version of Rust.
struct Fnv(u128);

impl Fnv {
    fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    fn of(bytes: &[u8]) -> Self {
        let mut hash = Self::new();
        hash.add(bytes);
        hash
    }

    /// Adds these bytes and their number.
    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes.iter().chain(&bytes.len().to_le_bytes()) {
            self.0 = (self.0 ^ u128::from(byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b);
        }
    }
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
