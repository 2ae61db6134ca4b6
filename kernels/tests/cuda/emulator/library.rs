//! A library of emulated kernels, and what `emulator.cpp` says of a launch.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::compiler::{Compiler, Fnv, target};
use super::{device_folder, emulator_folder};

/// How to run a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Draws the order of blocks, warps and lanes; 0 is the natural order.
    pub seed: u64,
    /// Whether asynchronous copies and products happen at once, and not as late as they may.
    pub eager: bool,
    /// Whether to look for races and for reads of what nobody wrote. Bounds are always checked.
    pub check: bool,
    /// Threads of the CPU that run blocks.
    pub threads: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 0, eager: false, check: true, threads: 2 }
    }
}

/// Memory that a kernel may touch.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// The address of the first byte.
    pub start: u64,
    /// How many bytes there are.
    pub bytes: u64,
}

impl Region {
    /// The memory of a slice.
    pub fn of<T>(slice: &mut [T]) -> Self {
        Self { start: slice.as_mut_ptr() as u64, bytes: size_of_val(slice) as u64 }
    }
}

/// What happened in a launch. All are counted for warps, but `copies` for threads and `barriers` for blocks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Products of 16 x 8 results.
    pub products: u64,
    /// Loads of four matrices.
    pub ldmatrix: u64,
    /// How many times more than needed those had to go to shared memory.
    pub bank_conflicts: u64,
    /// Asynchronous copies of 16 bytes.
    pub copies: u64,
    /// Shuffles.
    pub shuffles: u64,
    /// Barriers of a block.
    pub barriers: u64,
    /// How often a thread went on.
    pub switches: u64,
    reserved: u64,
}

/// A kernel to run.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Its name.
    pub kernel: &'a str,
    /// Blocks.
    pub grid: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Shared memory of a block.
    pub shared_bytes: u32,
    /// The bytes of its argument.
    pub problem: &'a [u8],
    /// All memory that it may touch.
    pub regions: &'a [Region],
}

/// `EmulatorOptions` of block.h.
#[repr(C)]
struct RawOptions {
    seed: u64,
    eager: i32,
    check: i32,
    threads: u32,
    reserved: u32,
    counters: *mut Counters,
}

/// `emulated_launch` of emulator.cpp.
type RawLaunch = unsafe extern "C" fn(
    *const c_char,
    u32,
    u32,
    u64,
    *const c_void,
    u64,
    *const RawOptions,
    *const Region,
    u64,
    *mut c_char,
    u64,
) -> c_int;

/// A text that a mutant has in place of another.
#[derive(Clone, Copy, Debug)]
pub struct Replacement<'a> {
    /// The file, in the folder of the source.
    pub file: &'a str,
    /// The text.
    pub from: &'a str,
    /// What it becomes.
    pub to: &'a str,
    /// Which occurrence, from 1 on; 0 is all of them.
    pub nth: usize,
}

/// The kernels of one source file with one set of macros.
pub struct Library {
    launch: RawLaunch,
    // Never closed: it is kept for the whole process.
    _library: libloading::Library,
}

/// What has been opened, by source and macros.
type AllOpened = HashMap<(PathBuf, Vec<String>), Opened>;
type Opened = Arc<OnceLock<Result<Arc<Library>, String>>>;

impl Library {
    /// Compiles a source, unless that has been done before. A macro is `NAME` or `NAME=value`.
    ///
    /// # Errors
    ///
    /// What the compiler says.
    pub fn open(source: &Path, defines: &[String]) -> Result<Arc<Self>, String> {
        static OPENED: Mutex<Option<AllOpened>> = Mutex::new(None);
        let opened = {
            let mut all = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
            let key = (source.to_owned(), defines.to_vec());
            Arc::clone(all.get_or_insert_default().entry(key).or_default())
        };
        opened.get_or_init(|| Self::compile(source, defines).map(Arc::new)).clone()
    }

    fn compile(source: &Path, defines: &[String]) -> Result<Self, String> {
        let compiler = Compiler::find().ok_or("there is no C++ compiler")?;
        let own = source.parent().map(Path::to_owned).unwrap_or_default();
        let path = compiler.library(source, defines, &[own, device_folder(), emulator_folder()])?;
        let failed = |error: libloading::Error| format!("{}: {error}", path.display());
        // SAFETY: the library was made from the sources of this package. When loaded, it only fills a table.
        let library = unsafe { libloading::Library::new(&path) }.map_err(failed)?;
        // SAFETY: `RawLaunch` is the type of the function in emulator.cpp.
        let launch = *unsafe { library.get::<RawLaunch>(b"emulated_launch\0") }.map_err(failed)?;
        Ok(Self { launch, _library: library })
    }

    /// As `open`, but from a copy of the source's folder with some texts replaced.
    ///
    /// # Errors
    ///
    /// A text isn't there, or what the compiler says.
    pub fn open_mutant(source: &Path, replacements: &[Replacement], defines: &[String]) -> Result<Arc<Self>, String> {
        let folder = source.parent().ok_or("the source has no folder")?;
        let mut hash = Fnv::default();
        let mut files = Vec::new();
        for entry in fs::read_dir(folder).map_err(|error| error.to_string())? {
            let path = entry.map_err(|error| error.to_string())?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if matches!(path.extension().and_then(|e| e.to_str()), Some("cu" | "cuh" | "h")) {
                files.push((name, fs::read_to_string(&path).map_err(|error| error.to_string())?));
            }
        }
        files.sort();
        for replacement in replacements {
            let (_, text) = files
                .iter_mut()
                .find(|(name, _)| name == replacement.file)
                .ok_or_else(|| format!("there is no file {}", replacement.file))?;
            *text = replacement.apply(text)?;
        }
        for (name, text) in &files {
            hash.add(name.as_bytes());
            hash.add(text.as_bytes());
        }
        let copy = target().join(format!("mutant-{:016x}", hash.0));
        fs::create_dir_all(&copy).map_err(|error| error.to_string())?;
        for (name, text) in &files {
            // Not written again: another test may read it.
            if fs::read_to_string(copy.join(name)).ok().as_ref() != Some(text) {
                fs::write(copy.join(name), text).map_err(|error| error.to_string())?;
            }
        }
        Self::open(&copy.join(source.file_name().unwrap_or_default()), defines)
    }

    /// Runs a kernel.
    ///
    /// # Errors
    ///
    /// What the kernel does wrong.
    pub fn launch(&self, launch: &Launch, options: &Options) -> Result<Counters, String> {
        let kernel = CString::new(launch.kernel).map_err(|error| error.to_string())?;
        let mut counters = Counters::default();
        let raw = RawOptions {
            seed: options.seed,
            eager: options.eager.into(),
            check: options.check.into(),
            threads: options.threads,
            reserved: 0,
            counters: ptr::from_mut(&mut counters),
        };
        let mut message = [0u8; 1024];
        // SAFETY: all pointers are of live values, with their sizes. The emulator lets the kernel touch nothing but the regions.
        let code = unsafe {
            (self.launch)(
                kernel.as_ptr(),
                launch.grid,
                launch.threads,
                launch.shared_bytes.into(),
                launch.problem.as_ptr().cast(),
                launch.problem.len() as u64,
                &raw const raw,
                launch.regions.as_ptr(),
                launch.regions.len() as u64,
                message.as_mut_ptr().cast(),
                message.len() as u64,
            )
        };
        let text = || CStr::from_bytes_until_nul(&message).unwrap_or_default().to_string_lossy().into_owned();
        if code == 0 { Ok(counters) } else { Err(text()) }
    }
}

impl Replacement<'_> {
    fn apply(&self, text: &str) -> Result<String, String> {
        let missing = || format!("{}: occurrence {} of {:?} isn't there", self.file, self.nth, self.from);
        if self.nth == 0 {
            return if text.contains(self.from) { Ok(text.replace(self.from, self.to)) } else { Err(missing()) };
        }
        let (start, _) = text.match_indices(self.from).nth(self.nth - 1).ok_or_else(missing)?;
        Ok(format!("{}{}{}", &text[..start], self.to, &text[start + self.from.len()..]))
    }
}
