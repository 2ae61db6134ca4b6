//! The emulator as a [`Machine`].

use std::any::Any;
use std::cell::UnsafeCell;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use attention_kernels::Error;
use attention_kernels::cuda::problem::RawProblem;
use attention_kernels::cuda::{self, Limits, Machine, Memory};

use super::{Counters, Launch, Library, Options, Region, Replacement, device_folder};

/// A machine whose kernels run on the CPU, and what has run on it.
pub struct Emulator {
    limits: Limits,
    options: Options,
    replacements: Vec<Replacement<'static>>,
    log: Mutex<Vec<Launched>>,
}

/// A launch that went well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    pub kernel: &'static str,
    pub defines: Vec<String>,
    pub grid: u32,
    pub counters: Counters,
}

/// So few, that a block of a small test has several blocks of queries, too.
const MULTIPROCESSORS: u32 = 3;
/// A GPU of the kind of an A100, whose kernels use mma.sync.
pub const AMPERE: Limits = Limits { capability: (8, 0), shared_bytes: 163 << 10, multiprocessors: MULTIPROCESSORS };
/// A GPU of the kind of an H100, whose kernels use wgmma.
pub const HOPPER: Limits = Limits { capability: (9, 0), shared_bytes: 227 << 10, multiprocessors: MULTIPROCESSORS };

impl Emulator {
    /// An emulator of a machine.
    pub fn new(limits: Limits, options: Options) -> Self {
        Self { limits, options, replacements: Vec::new(), log: Mutex::default() }
    }

    /// An emulator whose kernels have some texts replaced.
    pub fn of_mutant(limits: Limits, options: Options, replacements: &[Replacement<'static>]) -> Self {
        Self { replacements: replacements.to_vec(), ..Self::new(limits, options) }
    }

    /// What has run so far.
    pub fn launched(&self) -> Vec<Launched> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A kernel's source and macros.
    fn source(launch: &cuda::Launch) -> (PathBuf, Vec<String>) {
        let numbers = launch.defines.iter().map(|(name, value)| format!("{name}={value}"));
        let defines = numbers.chain(launch.hopper.then(|| "HOPPER".into())).collect();
        (device_folder().join(launch.source.file_name()), defines)
    }
}

// SAFETY: each allocation is its own vector, and a launch touches only its regions.
unsafe impl Machine for Emulator {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn allocate(&self, what: &'static str, bytes: usize) -> Result<Box<dyn Memory>, Error> {
        Ok(Box::new(EmulatedMemory::new(bytes).ok_or(Error::Memory { what, bytes })?))
    }

    fn upload(&self, what: &'static str, bytes: &[u8]) -> Result<Box<dyn Memory>, Error> {
        let memory = EmulatedMemory::new(bytes.len()).ok_or(Error::Memory { what, bytes: bytes.len() })?;
        // SAFETY: the memory is new and has at least as many bytes.
        unsafe { memory.start().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(Box::new(memory))
    }

    unsafe fn launch(&self, launch: &cuda::Launch, problem: &RawProblem) -> Result<(), Error> {
        let (source, defines) = Self::source(launch);
        let failed = |reason| Error::Kernel { kernel: launch.kernel, reason };
        // A mutant of one file leaves the others as they are.
        let own = |replacement: &&Replacement| replacement.file == launch.source.file_name() || !is_source(replacement);
        let replacements: Vec<_> = self.replacements.iter().filter(own).copied().collect();
        let library = match replacements.is_empty() {
            true => Library::open(&source, &defines),
            false => Library::open_mutant(&source, &replacements, &defines),
        };
        let regions: Vec<_> =
            launch.regions.iter().map(|region| Region { start: region.start(), bytes: region.bytes() }).collect();
        // SAFETY: a `RawProblem` has no padding, and any byte may be read of it.
        let problem =
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(problem).cast::<u8>(), size_of::<RawProblem>()) };
        let run = Launch {
            kernel: launch.kernel,
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: launch.shared_bytes,
            problem,
            regions: &regions,
        };
        let counters = library.and_then(|library| library.launch(&run, &self.options)).map_err(failed)?;
        let launched = Launched { kernel: launch.kernel, defines, grid: launch.grid, counters };
        self.log.lock().unwrap_or_else(PoisonError::into_inner).push(launched);
        Ok(())
    }
}

/// Whether it is of a file that is compiled by itself.
fn is_source(replacement: &Replacement) -> bool {
    replacement.file.ends_with(".cu")
}

/// 256 bytes at a multiple of 256.
#[repr(C, align(256))]
struct Line(UnsafeCell<[u8; 256]>);

/// Memory that kernels write to while others hold it, as that of a GPU.
pub struct EmulatedMemory {
    lines: Vec<Line>,
    bytes: usize,
}

// SAFETY: the bytes are read and written through pointers only. A launch ends before the call that starts it returns.
unsafe impl Sync for EmulatedMemory {}

impl EmulatedMemory {
    /// Memory whose floats are NaN: it isn't initialised.
    fn new(bytes: usize) -> Option<Self> {
        let count = bytes / 256 + 1;
        let mut lines = Vec::new();
        lines.try_reserve_exact(count).ok()?;
        lines.resize_with(count, || Line(UnsafeCell::new([0xFF; 256])));
        Some(Self { lines, bytes })
    }

    fn start(&self) -> *mut u8 {
        UnsafeCell::raw_get(self.lines.as_ptr().cast::<UnsafeCell<u8>>())
    }
}

// SAFETY: the lines hold that many bytes, and are never moved.
unsafe impl Memory for EmulatedMemory {
    fn address(&self) -> u64 {
        self.start() as u64
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn download(&self) -> Result<Vec<u8>, Error> {
        // SAFETY: the memory has that many bytes, and no kernel runs now.
        Ok(unsafe { std::slice::from_raw_parts(self.start(), self.bytes) }.to_vec())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
