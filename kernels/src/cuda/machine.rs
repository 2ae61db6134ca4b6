//! [`Machine`]: what holds memory and runs kernels. A GPU is one, and an emulator in the tests is another.

use std::any::Any;
use std::marker::PhantomData;

use super::problem::RawProblem;
use crate::error::Error;

/// A machine that can hold memory and run kernels: a GPU, or the emulator. The launches of a thread run one after the other, in order.
///
/// # Safety
///
/// Memory of `allocate` and `upload` is nobody else's, and a launch reads and writes only what its arguments say.
pub unsafe trait Machine: Send + Sync {
    /// What the machine can do.
    fn limits(&self) -> Limits;

    /// Memory that isn't initialised. `what` names it in errors.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] if there is none.
    fn allocate(&self, what: &'static str, bytes: usize) -> Result<Box<dyn Memory>, Error>;

    /// Memory that holds a copy of these bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] if there is none.
    fn upload(&self, what: &'static str, bytes: &[u8]) -> Result<Box<dyn Memory>, Error>;

    /// Starts a kernel. It may still run when this function returns.
    ///
    /// # Errors
    ///
    /// The kernel can't be compiled or started.
    ///
    /// # Safety
    ///
    /// The addresses of the problem are those of memory of this machine, which has room for every tensor that the problem describes and
    /// for the grid of the launch. No other thread writes there.
    unsafe fn launch(&self, launch: &Launch, problem: &RawProblem) -> Result<(), Error>;
}

/// Memory of a machine, which is freed with it. All of it starts at a multiple of 256 bytes.
///
/// # Safety
///
/// There are as many bytes as `bytes` says from `address` on, for as long as the value lives.
pub unsafe trait Memory: Send + Sync {
    /// Where the memory starts, as kernels know it.
    fn address(&self) -> u64;

    /// How many bytes there are.
    fn bytes(&self) -> usize;

    /// Copies the memory, once all kernels before have run. It is for tests: on a GPU it waits.
    ///
    /// # Errors
    ///
    /// A kernel before it has failed.
    fn download(&self) -> Result<Vec<u8>, Error>;

    /// The memory as its machine made it.
    fn as_any(&self) -> &dyn Any;

    /// Likewise.
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

/// What a machine can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The compute capability, such as (9, 0).
    pub capability: (u32, u32),
    /// The most shared memory that a block may have, in bytes.
    pub shared_bytes: u32,
    /// How many multiprocessors there are.
    pub multiprocessors: u32,
}

/// The file that a kernel stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The forward pass.
    Forward,
    /// The forward pass of a few queries.
    Decode,
    /// The backward passes.
    Backward,
    /// The gradient of a bias.
    Bias,
    /// Both passes once more in f64, for rows whose results aren't finite.
    Careful,
}

impl Source {
    /// The name of the file in `kernels/src/cuda/device`.
    pub fn file_name(self) -> &'static str {
        match self {
            Source::Forward => "forward.cu",
            Source::Decode => "decode.cu",
            Source::Backward => "backward.cu",
            Source::Bias => "bias.cu",
            Source::Careful => "careful.cu",
        }
    }
}

/// Bytes of a machine's memory that a kernel may touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region<'a> {
    start: u64,
    bytes: u64,
    memory: PhantomData<&'a [u8]>,
}

impl<'a> Region<'a> {
    /// The memory of a slice, for a machine that shares the memory of the CPU.
    pub fn of_slice<T>(slice: &'a [T]) -> Self {
        Self { start: slice.as_ptr() as u64, bytes: size_of_val(slice) as u64, memory: PhantomData }
    }

    /// All of an allocation.
    pub fn of_memory(memory: &'a dyn Memory) -> Self {
        Self { start: memory.address(), bytes: memory.bytes() as u64, memory: PhantomData }
    }

    /// Bytes of an allocation on a GPU. They are there for as long as their owner.
    #[cfg(feature = "cuda")]
    pub(super) fn at<T: ?Sized>(_owner: &'a T, start: u64, bytes: u64) -> Self {
        Self { start, bytes, memory: PhantomData }
    }

    /// The address of the first byte.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// How many bytes there are.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// One kernel to run. Its grid and its blocks have one dimension.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// Where the kernel stands.
    pub source: Source,
    /// Its name.
    pub kernel: &'static str,
    /// The macros that it is compiled with.
    pub defines: Vec<(&'static str, u32)>,
    /// Whether it is compiled for the matrix instructions of compute capability 9.0 alone, with the macro `HOPPER`.
    pub hopper: bool,
    /// Blocks.
    pub grid: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// All memory that the kernel may touch.
    pub regions: Vec<Region<'a>>,
}
