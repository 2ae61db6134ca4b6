//! The storage of candle's tensors as memory of a machine, and the machine of a device.

use std::cell::RefCell;
use std::sync::Arc;

use attention_kernels::cuda::{Element, Machine, MachineBias, MachineNumbers, MachineView, Memory, Region};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, Tensor};
use half::{bf16, f16};

use crate::error::AttentionError;
use crate::sdpa::head_layout::HeadLayout;

thread_local! {
    static EMULATOR: RefCell<Option<Arc<dyn Machine>>> = const { RefCell::new(None) };
}

/// Runs `f`, in which calls with tensors on the CPU and `Backend::Fused` are served by the CUDA kernels on this machine. It is for
/// tests of the kernels.
pub fn with_machine<T>(machine: Arc<dyn Machine>, f: impl FnOnce() -> T) -> T {
    /// Puts back what was there before, after a panic too.
    struct Restore(Option<Arc<dyn Machine>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            EMULATOR.with(|emulator| *emulator.borrow_mut() = self.0.take());
        }
    }
    let before = EMULATOR.with(|emulator| emulator.borrow_mut().replace(machine));
    let _restore = Restore(before);
    f()
}

/// Whether there is a machine for tensors on the CPU.
pub(super) fn has_emulator() -> bool {
    EMULATOR.with(|emulator| emulator.borrow().is_some())
}

/// The machine of a device.
pub(super) fn machine_of(device: &Device) -> std::result::Result<Arc<dyn Machine>, AttentionError> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::gpu::machine_of(device),
        _ => EMULATOR
            .with(|emulator| emulator.borrow().clone())
            .ok_or(AttentionError::Backend { expected: "tensors on a GPU", got: "another device" }),
    }
}

/// The kernels' name of a dtype; none if they don't serve it.
pub(super) fn element(dtype: DType) -> Option<Element> {
    match dtype {
        DType::F32 => Some(Element::F32),
        DType::BF16 => Some(Element::Bf16),
        DType::F16 => Some(Element::F16),
        _ => None,
    }
}

/// A tensor's storage.
#[derive(Clone, Copy)]
pub(super) enum Stored<'a> {
    Cpu(&'a CpuStorage),
    #[cfg(feature = "cuda")]
    Cuda(&'a candle_core::CudaStorage),
}

/// A tensor's memory. On a GPU the launches that read it have to come before it is dropped.
pub(super) struct Borrowed<'a> {
    pub(super) region: Region<'a>,
    element: Element,
    #[cfg(feature = "cuda")]
    pub(super) _use: Option<attention_kernels::cuda::gpu::Use<'a>>,
}

impl<'a> Stored<'a> {
    pub(super) fn of(storage: &'a Storage) -> Result<Self> {
        match storage {
            Storage::Cpu(storage) => Ok(Self::Cpu(storage)),
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => Ok(Self::Cuda(storage)),
            _ => Err(candle_core::Error::msg("CUDA attention: expected a tensor on the CPU or on a GPU")),
        }
    }

    pub(super) fn borrow(self) -> Result<Borrowed<'a>> {
        let borrowed = |region, element| Borrowed {
            region,
            element,
            #[cfg(feature = "cuda")]
            _use: None,
        };
        match self {
            Self::Cpu(CpuStorage::F32(x)) => Ok(borrowed(Region::of_slice(x), Element::F32)),
            Self::Cpu(CpuStorage::BF16(x)) => Ok(borrowed(Region::of_slice(x), Element::Bf16)),
            Self::Cpu(CpuStorage::F16(x)) => Ok(borrowed(Region::of_slice(x), Element::F16)),
            Self::Cpu(_) => Err(candle_core::Error::msg("CUDA attention: expected f32, bf16 or f16")),
            #[cfg(feature = "cuda")]
            Self::Cuda(storage) => {
                let (element, region, use_of) = super::gpu::borrow(storage)?;
                Ok(Borrowed { region, element, _use: Some(use_of) })
            }
        }
    }
}

impl<'a> Borrowed<'a> {
    /// A tensor whose axes are in the order of `order`.
    pub(super) fn view(&self, what: &'static str, layout: &Layout, order: HeadLayout) -> Result<MachineView<'a>> {
        let ((a, b, c, d), stride) = (layout.shape().dims4()?, layout.stride());
        let [batch, head, row, _] = order.bhld([stride[0], stride[1], stride[2], 1]);
        let (dims, strides) = (order.bhld([a, b, c, d]), [batch, head, row]);
        let view = MachineView::new(what, self.element, self.region, layout.start_offset(), strides, dims);
        Ok(view.map_err(AttentionError::from)?)
    }

    /// A bias with axes of length 1 before its own.
    pub(super) fn bias(&self, layout: &Layout) -> Result<MachineBias<'a>> {
        let (mut dims, mut strides) = ([1; 4], [0; 4]);
        let first = 4 - layout.shape().rank();
        dims[first..].copy_from_slice(layout.dims());
        strides[first..].copy_from_slice(layout.stride());
        let bias = MachineBias::new(self.region, layout.start_offset(), strides, dims);
        Ok(bias.map_err(AttentionError::from)?)
    }

    /// The numbers of a contiguous tensor.
    pub(super) fn numbers(&self, what: &'static str, layout: &Layout) -> Result<MachineNumbers<'a>> {
        let len = layout.shape().elem_count();
        Ok(MachineNumbers::new(what, self.region, layout.start_offset(), len).map_err(AttentionError::from)?)
    }
}

/// Memory as the storage of a tensor.
pub(super) fn storage(memory: Box<dyn Memory>, dtype: DType, device: &Device) -> Result<Storage> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(Storage::Cuda(super::gpu::storage(memory, dtype, device)?)),
        _ => Ok(Storage::Cpu(cpu_storage(memory.as_ref(), dtype)?)),
    }
}

fn cpu_storage(memory: &dyn Memory, dtype: DType) -> Result<CpuStorage> {
    let bytes = memory.download().map_err(AttentionError::from)?;
    macro_rules! numbers {
        ($number:ty, $size:literal) => {
            bytes.as_chunks::<$size>().0.iter().map(|&bytes| <$number>::from_ne_bytes(bytes)).collect()
        };
    }
    match dtype {
        DType::F32 => Ok(CpuStorage::F32(numbers!(f32, 4))),
        DType::F64 => Ok(CpuStorage::F64(numbers!(f64, 8))),
        DType::BF16 => Ok(CpuStorage::BF16(numbers!(bf16, 2))),
        DType::F16 => Ok(CpuStorage::F16(numbers!(f16, 2))),
        _ => Err(candle_core::Error::msg("CUDA attention: expected a float dtype")),
    }
}

/// The log-sum-exp (batch, num_heads, q_len) as f32, from memory that stays as it is.
pub(super) fn logsumexp(memory: &dyn Memory, device: &Device) -> Result<Storage> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(Storage::Cuda(super::gpu::logsumexp(memory, device)?)),
        _ => match cpu_storage(memory, DType::F64)? {
            CpuStorage::F64(x) => Ok(Storage::Cpu(CpuStorage::F32(x.into_iter().map(|x| x as f32).collect()))),
            other => Ok(Storage::Cpu(other)),
        },
    }
}

/// Memory as a tensor without a history.
pub(super) fn tensor(
    memory: Box<dyn Memory>,
    dtype: DType,
    shape: impl Into<Shape>,
    device: &Device,
) -> Result<Tensor> {
    Ok(Tensor::from_storage(storage(memory, dtype, device)?, shape, BackpropOp::none(), false))
}
