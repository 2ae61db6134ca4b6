//! candle's GPUs as machines, and the storage of their tensors.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use attention_kernels::cuda::gpu::{self, Gpu, Use};
use attention_kernels::cuda::{Element, Machine, Memory, Region};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaStorageSlice, DeviceId};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result};
use half::{bf16, f16};

use crate::error::AttentionError;

/// The machine of a device, which keeps its kernels for as long as the process runs.
pub(super) fn machine_of(device: &CudaDevice) -> std::result::Result<Arc<dyn Machine>, AttentionError> {
    static MACHINES: Mutex<Option<HashMap<DeviceId, Arc<Gpu>>>> = Mutex::new(None);
    let mut machines = MACHINES.lock().unwrap_or_else(PoisonError::into_inner);
    let machines = machines.get_or_insert_default();
    if let Some(machine) = machines.get(&device.id()) {
        return Ok(machine.clone());
    }
    let machine = Arc::new(Gpu::new(device.cuda_stream())?);
    machines.insert(device.id(), machine.clone());
    Ok(machine)
}

/// The memory of a tensor's storage.
pub(super) fn borrow(storage: &CudaStorage) -> Result<(Element, Region<'_>, Use<'_>)> {
    let (element, (region, use_of)) = match &storage.slice {
        CudaStorageSlice::F32(x) => (Element::F32, gpu::borrow(x)),
        CudaStorageSlice::BF16(x) => (Element::Bf16, gpu::borrow(x)),
        CudaStorageSlice::F16(x) => (Element::F16, gpu::borrow(x)),
        _ => return Err(candle_core::Error::msg("CUDA attention: expected f32, bf16 or f16")),
    };
    Ok((element, region, use_of))
}

/// Memory as storage, without a copy.
pub(super) fn storage(memory: Box<dyn Memory>, dtype: DType, device: &CudaDevice) -> Result<CudaStorage> {
    let device = device.clone();
    Ok(match dtype {
        DType::F32 => {
            CudaStorage::wrap_cuda_slice(gpu::into_slice::<f32>(memory).map_err(AttentionError::from)?, device)
        }
        DType::BF16 => {
            CudaStorage::wrap_cuda_slice(gpu::into_slice::<bf16>(memory).map_err(AttentionError::from)?, device)
        }
        DType::F16 => {
            CudaStorage::wrap_cuda_slice(gpu::into_slice::<f16>(memory).map_err(AttentionError::from)?, device)
        }
        _ => return Err(candle_core::Error::msg("CUDA attention: expected f32, bf16 or f16")),
    })
}

/// The log-sum-exp as f32, from memory of f64 that stays as it is.
pub(super) fn logsumexp(memory: &dyn Memory, device: &CudaDevice) -> Result<CudaStorage> {
    let numbers = gpu::copy::<f64>(memory).map_err(AttentionError::from)?;
    let layout = Layout::contiguous(numbers.len());
    CudaStorage::wrap_cuda_slice(numbers, device.clone()).to_dtype(&layout, DType::F32)
}
