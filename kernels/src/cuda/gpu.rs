//! A GPU as a machine: memory and launches on one stream.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute, CUresult};
use cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, LaunchConfig, PushKernelArg,
    SyncOnDrop,
};
use cudarc::nvrtc::Ptx;

use super::compile::Program;
use super::machine::{Launch, Limits, Machine, Memory, Region};
use super::problem::RawProblem;
use crate::error::Error;

/// Blocks have as much shared memory without asking for more.
const ALWAYS_SHARED: u32 = 48 << 10;

/// One GPU. Everything happens on candle's stream, of which each thread has its own: a forward and its backward pass belong into one thread.
pub struct Gpu {
    stream: Arc<CudaStream>,
    limits: Limits,
    modules: Mutex<HashMap<Program, Arc<CudaModule>>>,
    functions: Mutex<HashMap<(Program, &'static str), CudaFunction>>,
}

impl Gpu {
    /// The GPU of a stream.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`] if it is older than compute capability 8.0, or doesn't answer.
    pub fn new(stream: Arc<CudaStream>) -> Result<Self, Error> {
        let context = stream.context();
        let no_answer =
            |error: DriverError| Error::Gpu { what: "driver", expected: "an answer", got: error.to_string() };
        let (major, minor) = context.compute_capability().map_err(no_answer)?;
        if major < 8 {
            let expected = "at least 8.0 (Ampere)";
            return Err(Error::Gpu { what: "compute capability", expected, got: format!("{major}.{minor}") });
        }
        let shared = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared_bytes = context.attribute(shared).map_err(no_answer)? as u32;
        let multiprocessors = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(multiprocessors).map_err(no_answer)? as u32;
        let limits = Limits { capability: (major as u32, minor as u32), shared_bytes, multiprocessors };
        Ok(Self { stream, limits, modules: Mutex::default(), functions: Mutex::default() })
    }

    /// A kernel, compiled and loaded before it is needed for the first time.
    fn function(&self, launch: &Launch) -> Result<CudaFunction, Error> {
        let program = Program::of(launch, self.limits.capability);
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(&(program.clone(), launch.kernel)) {
            return Ok(function.clone());
        }
        let function = self.load(&program, launch)?;
        functions.insert((program, launch.kernel), function.clone());
        Ok(function)
    }

    fn load(&self, program: &Program, launch: &Launch) -> Result<CudaFunction, Error> {
        let failed = |error: DriverError| Error::Kernel {
            kernel: launch.kernel,
            reason: format!("it can't be loaded, perhaps since the driver is older than NVRTC: {error}"),
        };
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match modules.get(program) {
            Some(module) => module.clone(),
            None => {
                let load = |code| self.stream.context().load_module(Ptx::from_binary(code));
                // If the first can't be loaded, its file may hold something else than it should.
                let module = load(program.machine_code(launch.kernel)?).or_else(|_| {
                    program.forget();
                    load(program.machine_code(launch.kernel)?).map_err(failed)
                })?;
                modules.insert(program.clone(), module.clone());
                module
            }
        };
        let function = module.load_function(launch.kernel).map_err(failed)?;
        if launch.shared_bytes > ALWAYS_SHARED {
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, launch.shared_bytes as i32).map_err(failed)?;
        }
        Ok(function)
    }
}

/// The error of an allocation.
fn no_memory(what: &'static str, bytes: usize) -> impl Fn(DriverError) -> Error {
    move |error| match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::Memory { what, bytes },
        _ => Error::Gpu { what: "memory", expected: "an allocation or a copy", got: error.to_string() },
    }
}

// SAFETY: `#[repr(C)]` numbers without padding, as `problem` asserts. Kernels read it as it is.
unsafe impl DeviceRepr for RawProblem {}

// SAFETY: allocations are the driver's, and kernels are this crate's, which the tests hold to their bounds.
unsafe impl Machine for Gpu {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn allocate(&self, what: &'static str, bytes: usize) -> Result<Box<dyn Memory>, Error> {
        // SAFETY: bytes may hold anything, and `download` reads them only after kernels have written them.
        let memory = unsafe { self.stream.alloc::<u8>(bytes) };
        Ok(Box::new(GpuMemory(memory.map_err(no_memory(what, bytes))?)))
    }

    fn upload(&self, what: &'static str, bytes: &[u8]) -> Result<Box<dyn Memory>, Error> {
        let memory = self.stream.clone_htod(bytes).map_err(no_memory(what, bytes.len()))?;
        Ok(Box::new(GpuMemory(memory)))
    }

    unsafe fn launch(&self, launch: &Launch, problem: &RawProblem) -> Result<(), Error> {
        let function = self.function(launch)?;
        let config = LaunchConfig {
            grid_dim: (launch.grid, 1, 1),
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: launch.shared_bytes,
        };
        let mut builder = self.stream.launch_builder(&function);
        builder.arg(problem);
        // SAFETY: the kernel's one parameter is the problem, and `launch`'s own condition says that its memory is there. Its owners
        // outlive the launch, or free it on the stream of this thread, behind it.
        let launched = unsafe { builder.launch(config) };
        launched.map(|_| ()).map_err(|error| Error::Kernel { kernel: launch.kernel, reason: error.to_string() })
    }
}

/// Memory of a GPU.
struct GpuMemory(CudaSlice<u8>);

// SAFETY: a slice of the driver's memory, which it owns.
unsafe impl Memory for GpuMemory {
    fn address(&self) -> u64 {
        // All launches are on the stream of the memory, so that nothing has to wait for another.
        let (address, _use) = self.0.device_ptr(self.0.stream());
        address
    }

    fn bytes(&self) -> usize {
        self.0.len()
    }

    fn download(&self) -> Result<Vec<u8>, Error> {
        let failed = no_memory("copy to the CPU", self.0.len());
        let bytes = self.0.stream().clone_dtoh(&self.0).map_err(&failed)?;
        self.0.stream().synchronize().map_err(failed)?;
        Ok(bytes)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Keeps a tensor's memory in order between streams, until the launches that use it have been made.
pub struct Use<'a>(#[allow(dead_code)] SyncOnDrop<'a>); // never read: it is there to be dropped

/// The memory of a slice of a GPU, to be read by launches on the slice's stream.
pub fn borrow<T>(slice: &CudaSlice<T>) -> (Region<'_>, Use<'_>) {
    let (address, in_use) = slice.device_ptr(slice.stream());
    (Region::at(slice, address, slice.num_bytes() as u64), Use(in_use))
}

/// A type of which all bits are numbers.
pub trait Bits: DeviceRepr + private::Sealed {}

mod private {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

impl<T: DeviceRepr + private::Sealed> Bits for T {}

fn foreign() -> Error {
    Error::Gpu { what: "memory", expected: "that of a GPU", got: "that of another machine".to_string() }
}

/// The memory as a slice of numbers, without a copy.
///
/// # Errors
///
/// [`Error::Gpu`] if it is the memory of another machine.
pub fn into_slice<T: Bits>(memory: Box<dyn Memory>) -> Result<CudaSlice<T>, Error> {
    let memory = memory.into_any().downcast::<GpuMemory>().map_err(|_| foreign())?.0;
    let (stream, len) = (memory.stream().clone(), memory.len() / size_of::<T>());
    // SAFETY: `leak` gives an allocation of at least `len` numbers, which nothing else frees. All bits are numbers of type `T`.
    Ok(unsafe { stream.upgrade_device_ptr(memory.leak(), len) })
}

/// A copy of the memory as numbers.
///
/// # Errors
///
/// [`Error::Gpu`] if it is the memory of another machine, [`Error::Memory`] if there is none for the copy.
pub fn copy<T: Bits>(memory: &dyn Memory) -> Result<CudaSlice<T>, Error> {
    let memory = &memory.as_any().downcast_ref::<GpuMemory>().ok_or_else(foreign)?.0;
    let copy = memory.stream().clone_dtod(memory).map_err(no_memory("copy", memory.len()))?;
    into_slice(Box::new(GpuMemory(copy)))
}
