//! The emulator as a machine of the library.

use std::alloc::{Layout, alloc, dealloc};
use std::any::Any;
use std::ptr::NonNull;

use attention_kernels::Error;
use attention_kernels::cuda::problem::RawProblem;
use attention_kernels::cuda::{Launch, Limits, Machine, Memory};

use crate::emulator::{self, Library, Options, Region};

/// An emulated GPU.
pub struct Emulated {
    pub limits: Limits,
    pub options: Options,
}

/// Memory of the CPU that kernels write through its address.
struct HostMemory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: nothing but `download` and kernels reads or writes it, and a launch has ended when it returns.
unsafe impl Send for HostMemory {}
// SAFETY: likewise.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Every byte is 255, so that numbers that nobody has written are NaN.
    fn new(what: &'static str, bytes: usize) -> Result<Self, Error> {
        let failed = || Error::Memory { what, bytes };
        let layout = Layout::from_size_align(bytes.max(1), 256).map_err(|_| failed())?;
        // SAFETY: the size isn't zero.
        let start = NonNull::new(unsafe { alloc(layout) }).ok_or_else(failed)?;
        // SAFETY: the allocation has `layout.size()` bytes.
        unsafe { start.write_bytes(255, layout.size()) };
        Ok(Self { start, layout })
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and not freed before.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl Memory for HostMemory {
    fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    fn bytes(&self) -> usize {
        self.layout.size()
    }

    fn download(&self) -> Result<Vec<u8>, Error> {
        // SAFETY: all bytes have been written by `new`, and no kernel runs now.
        Ok(unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }.to_vec())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

impl Machine for Emulated {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn allocate(&self, what: &'static str, bytes: usize) -> Result<Box<dyn Memory>, Error> {
        Ok(Box::new(HostMemory::new(what, bytes)?))
    }

    fn upload(&self, what: &'static str, bytes: &[u8]) -> Result<Box<dyn Memory>, Error> {
        let memory = HostMemory::new(what, bytes.len())?;
        // SAFETY: the memory was allocated for as many bytes, and is apart from them.
        unsafe { memory.start.copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) };
        Ok(Box::new(memory))
    }

    fn launch(&self, launch: &Launch, problem: &RawProblem) -> Result<(), Error> {
        let failed = |reason| Error::Kernel { kernel: launch.kernel, reason };
        let mut defines: Vec<_> = launch.defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
        defines.extend(launch.hopper.then(|| "HOPPER".to_string()));
        let source = emulator::device_folder().join(launch.source.file_name());
        let library = Library::open(&source, &defines).map_err(failed)?;
        let regions = launch.regions.iter().map(|region| Region { start: region.start(), bytes: region.bytes() });
        // SAFETY: the struct has no padding, as its compile-time assertions say.
        let problem =
            unsafe { std::slice::from_raw_parts((&raw const *problem).cast::<u8>(), size_of::<RawProblem>()) };
        let emulated = emulator::Launch {
            kernel: launch.kernel,
            grid: launch.grid,
            threads: launch.threads,
            shared_bytes: launch.shared_bytes,
            problem,
            regions: &regions.collect::<Vec<_>>(),
        };
        library.launch(&emulated, &self.options).map(|_| ()).map_err(failed)
    }
}
