//! One rank's side of each call: what it tells the others, and the groups of messages in NCCL.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, ValidAsZeroBits};
use candle_core::cuda_backend::cudarc::nccl::safe::{Comm, Id, NcclType};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Storage, Tensor};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::super::communicator::Communicator;
use super::super::message::{TensorHead, own};
use super::super::share::share;
use super::super::sum;
use crate::error::{AttentionError, Result};
use crate::memory;

/// What the thread has.
pub(super) struct Worker {
    pub control: Arc<dyn Communicator>,
    device: CudaDevice,
    pub comm: Comm,
    bytes_sent: Arc<AtomicU64>,
}

/// What a rank says before the numbers go.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Notice {
    /// The same on every rank.
    pub call: String,
    /// Why the rank can't make the call.
    pub refusal: Option<String>,
    /// For each tensor, the rank that gets it.
    pub sends: Vec<(usize, TensorHead)>,
    /// The rank from which an exchange expects tensors.
    pub from: Option<usize>,
}

pub(super) fn failed(what: &str, rank: usize, got: String) -> AttentionError {
    AttentionError::Communication { what: what.to_string(), rank, got }
}

impl Worker {
    pub(super) fn new(control: Arc<dyn Communicator>, device: CudaDevice, bytes_sent: Arc<AtomicU64>) -> Result<Self> {
        let (rank, size) = (control.rank(), control.size());
        let stream = device.cuda_stream();
        // NCCL takes the thread's current device.
        let bound = stream.context().bind_to_thread().map_err(|error| format!("{error:?}"));
        let ours = match (rank, bound) {
            (0, Ok(())) => {
                Id::new().map(|id| id.internal().map(|byte| byte as u8).to_vec()).map_err(|e| format!("{e:?}"))
            }
            (_, bound) => bound.map(|()| Vec::new()),
        };
        let all = control.all_gather_bytes(&serde_json::to_vec(&ours).map_err(candle_core::Error::wrap)?)?;
        let mut id = None;
        for (rank, bytes) in all.iter().enumerate() {
            let theirs: Result<Vec<u8>, String> = serde_json::from_slice(bytes).map_err(candle_core::Error::wrap)?;
            let theirs = theirs.map_err(|got| failed("start of NCCL", rank, got))?;
            id.get_or_insert(theirs);
        }
        let id: Option<[u8; 128]> = id.and_then(|id| id.try_into().ok());
        let id = id.ok_or_else(|| failed("start of NCCL", 0, "no identifier of 128 bytes".to_string()))?;
        let id = Id::uninit(id.map(|byte| byte as std::ffi::c_char));
        let comm = Comm::from_rank(stream, rank, size, id);
        let comm = comm.map_err(|error| failed("start of NCCL", rank, format!("{error:?}")))?;
        Ok(Self { control, device, comm, bytes_sent })
    }

    /// Tells the others what this rank sends, and gets what they send. All of them make the same call.
    pub(super) fn notices(&self, ours: &Notice) -> Result<Vec<Notice>> {
        let bytes = serde_json::to_vec(ours).map_err(candle_core::Error::wrap)?;
        let all = self.control.all_gather_bytes(&bytes)?;
        let read = |bytes: &Vec<u8>| serde_json::from_slice(bytes).map_err(candle_core::Error::wrap);
        let all = all.iter().map(read).collect::<std::result::Result<Vec<Notice>, _>>()?;
        let text = |notice: &Notice| match &notice.refusal {
            Some(refusal) => format!("{} ({refusal})", notice.call),
            None => notice.call.clone(),
        };
        let what = "call of the communicator".to_string();
        if let Some(other) = all.iter().position(|notice| text(notice) != text(&all[0])) {
            let got = [text(&all[0]), text(&all[other])];
            return Err(AttentionError::Ranks { what, ranks: [0, other], got }.into());
        }
        // Every tensor of an exchange goes to a rank that expects it, and the other way round.
        for (rank, notice) in all.iter().enumerate() {
            let Some(from) = notice.from else { continue };
            let Some(sender) = all.get(from) else { continue };
            if let Some((to, _)) = sender.sends.iter().find(|(to, _)| *to != rank) {
                let got = [format!("{}, to rank {to}", notice.call), format!("{}, from rank {from}", notice.call)];
                return Err(AttentionError::Ranks { what, ranks: [from, rank], got }.into());
            }
        }
        Ok(all)
    }

    /// Sends tensors, and receives those of other ranks, all in one group of NCCL. The tensors and the numbers of entries may be zero;
    /// such a message isn't sent.
    fn swap(&self, sends: &[(usize, Tensor)], receives: &[(usize, TensorHead)]) -> Result<Vec<Tensor>> {
        let Some(dtype) = sends
            .iter()
            .map(|(_, tensor)| Ok(tensor.dtype()))
            .chain(receives.iter().map(|(_, head)| head.dtype()))
            .next()
        else {
            return Ok(Vec::new());
        };
        // Messages of several dtypes go one dtype after the other; a caller passes one.
        match dtype? {
            DType::F32 => self.swap_as::<f32>(sends, receives),
            DType::F64 => self.swap_as::<f64>(sends, receives),
            DType::BF16 => self.swap_as::<bf16>(sends, receives),
            DType::F16 => self.swap_as::<f16>(sends, receives),
            got => Err(unsupported(got).into()),
        }
    }

    fn swap_as<T>(&self, sends: &[(usize, Tensor)], receives: &[(usize, TensorHead)]) -> Result<Vec<Tensor>>
    where
        T: CudaDType + NcclType + DeviceRepr + ValidAsZeroBits,
    {
        let nccl = |error: &dyn std::fmt::Debug| failed("a message of NCCL", self.comm.rank(), format!("{error:?}"));
        let mut buffers = Vec::with_capacity(receives.len());
        for (_, head) in receives {
            // Zeros and not memory as it is, which safe code can't ask for. A buffer isn't empty, which CUDA refuses.
            buffers.push(self.device.alloc_zeros::<T>(entries(head).max(1))?);
        }
        // The tensors stay borrowed until the group has ended.
        let sent = sends.iter().map(|(to, tensor)| (*to, tensor.storage_and_layout())).collect::<Vec<_>>();
        let mut views = Vec::with_capacity(sends.len());
        for (to, (storage, layout)) in &sent {
            let Storage::Cuda(storage) = &**storage else { return Err(candle_core::Error::msg("not on a GPU").into()) };
            let count = layout.shape().elem_count();
            if count > 0 {
                let start = layout.start_offset();
                views.push((*to, T::as_cuda_slice(storage)?.slice(start..start + count)));
                self.bytes_sent.fetch_add((count * size_of::<T>()) as u64, Ordering::Relaxed);
            }
        }
        let mut places = Vec::with_capacity(buffers.len());
        for ((from, head), buffer) in receives.iter().zip(&mut buffers) {
            if entries(head) > 0 {
                places.push((*from, buffer.as_view_mut()));
            }
        }
        let mut group = self.comm.group();
        for (to, view) in views {
            group.send(view, to as i32).map_err(|error| nccl(&error))?;
        }
        for (from, place) in places {
            group.recv(place, from as i32).map_err(|error| nccl(&error))?;
        }
        drop(group);
        let tensor = |((_, head), buffer): (&(usize, TensorHead), CudaSlice<T>)| -> Result<Tensor> {
            let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(buffer, self.device.clone()));
            let count = entries(head).max(1);
            let flat = Tensor::from_storage(storage, count, BackpropOp::none(), false);
            Ok(flat.narrow(0, 0, entries(head))?.reshape(head.shape.as_slice())?)
        };
        receives.iter().zip(buffers).map(tensor).collect()
    }

    /// One call in which each rank says what it sends to whom, then sends it. What comes is in the order of the ranks; what this rank
    /// sends to itself is handed on.
    pub(super) fn deliver(
        &self,
        call: &str,
        from: Option<usize>,
        sends: Result<Vec<(usize, Tensor)>>,
    ) -> Result<Vec<Vec<Tensor>>> {
        let (heads, refusal) = match &sends {
            Ok(sends) => (sends.iter().map(|(to, tensor)| (*to, TensorHead::of(tensor))).collect(), None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        let notices = self.notices(&Notice { call: call.to_string(), refusal, sends: heads, from })?;
        let (rank, sends) = (self.comm.rank(), sends?);
        let mut received = vec![Vec::new(); notices.len()];
        received[rank] = sends.iter().filter(|(to, _)| *to == rank).map(|(_, tensor)| tensor.clone()).collect();
        let comes = notices.iter().enumerate().filter(|(from, _)| *from != rank);
        let comes = comes.flat_map(|(from, notice)| {
            notice.sends.iter().filter(|(to, _)| *to == rank).map(move |(_, head)| (from, head.clone()))
        });
        let comes = comes.collect::<Vec<_>>();
        let goes = sends.into_iter().filter(|(to, _)| *to != rank).collect::<Vec<_>>();
        // NCCL matches the messages between two ranks by their order. So all ranks take the dtypes in the same order.
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            let goes = goes.iter().filter(|(_, tensor)| tensor.dtype() == dtype).cloned().collect::<Vec<_>>();
            let comes = comes.iter().filter(|(_, head)| head.dtype == dtype.as_str()).cloned().collect::<Vec<_>>();
            for ((from, _), tensor) in comes.iter().zip(self.swap(&goes, &comes)?) {
                received[*from].push(tensor);
            }
        }
        for (from, tensors) in received.iter_mut().enumerate().filter(|(from, _)| *from != rank) {
            restore_order(
                tensors,
                comes.iter().filter(|(sender, _)| *sender == from).map(|(_, head)| head.dtype.as_str()),
            );
        }
        Ok(received)
    }

    /// The sum in the order of the ranks: rank i sums part i, then everyone gets all parts.
    pub(super) fn all_reduce(&self, head: &TensorHead, tensor: Result<Tensor>) -> Result<Tensor> {
        let (size, dtype, shape) = (self.comm.world_size(), head.dtype()?, head.shape.as_slice());
        let call = format!("all_reduce of {} {shape:?}", head.dtype);
        let parts = tensor.and_then(|tensor| {
            let flat = tensor.flatten_all()?;
            let part = |to: usize| {
                let part = share(entries(head), to, size);
                Ok((to, flat.narrow(0, part.start, part.len())?))
            };
            (0..size).map(part).collect()
        });
        let parts = self.deliver(&call, None, parts)?.concat();
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let mut sum = parts[0].to_dtype(wide)?;
        for part in &parts[1..] {
            sum = (sum + part.to_dtype(wide)?)?;
        }
        let sum = sum.to_dtype(dtype)?;
        let sums =
            self.deliver(&format!("{call}, its parts"), None, Ok((0..size).map(|to| (to, sum.clone())).collect()))?;
        Ok(Tensor::cat(&sums.concat(), 0)?.reshape(shape)?)
    }
}

fn entries(head: &TensorHead) -> usize {
    head.shape.iter().product()
}

/// Brings tensors that came by dtype into the order in which they were sent.
fn restore_order<'a>(tensors: &mut Vec<Tensor>, dtypes: impl Iterator<Item = &'a str>) {
    let mut by_order = Vec::with_capacity(tensors.len());
    for dtype in dtypes {
        if let Some(at) = tensors.iter().position(|tensor| tensor.dtype().as_str() == dtype) {
            by_order.push(tensors.remove(at));
        }
    }
    *tensors = by_order;
}

fn unsupported(got: DType) -> AttentionError {
    let expected = "f32, f64, bf16 or f16".to_string();
    AttentionError::DType { tensor: "tensor of a message", expected, got }
}

/// A tensor as NCCL sends it: contiguous, on a GPU, without a gradient. Later changes of a variable don't reach it.
pub(super) fn prepared(tensor: &Tensor) -> Result<Tensor> {
    sum::check(tensor.dtype()).map_err(|_| unsupported(tensor.dtype()))?;
    if !tensor.device().is_cuda() {
        let got = tensor.device().location();
        return Err(candle_core::Error::Msg(format!("tensor of a message: expected a CUDA device, got {got:?}")).into());
    }
    Ok(memory::contiguous("tensor of a message", &own(tensor)?)?)
}
