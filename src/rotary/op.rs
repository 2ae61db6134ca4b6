//! The rotation as one operation with a gradient, on the CPU.

use attention_kernels::rotary::{Heads, Pairing, Rotation};
use attention_kernels::{Number, collected};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
use half::{bf16, f16};

use crate::error::AttentionError;
use crate::gradient::give;
use crate::memory;

/// The angles of the tokens of one call, as the kernels take them.
#[derive(Clone, Debug)]
pub(crate) struct KernelAngles {
    pub(super) pairing: Pairing,
    /// The entries of a head that are rotated.
    pub(super) dim: usize,
    pub(super) len: usize,
    /// (lists, 1, len, dim / 2), contiguous, in the dtype to compute in.
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
}

impl KernelAngles {
    /// Rotates heads in place, or back with `inverse`.
    pub(crate) fn rotate<E>(&self, rows: &mut [E], heads: &Heads, inverse: bool) -> Result<()>
    where
        E: Number<Float: WithDType>,
    {
        let (cos, sin) = (self.cos.storage_and_layout(), self.sin.storage_and_layout());
        let (cos, sin) = (table::<E::Float>(&cos.0, cos.1)?, table::<E::Float>(&sin.0, sin.1)?);
        let rotation = Rotation { pairing: self.pairing, dim: self.dim, len: self.len, cos, sin };
        Ok(rotation.rotate(rows, heads, inverse).map_err(AttentionError::from)?)
    }
}

/// The numbers of a contiguous table.
fn table<'a, R: WithDType>(storage: &'a Storage, layout: &Layout) -> Result<&'a [R]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => Ok(&storage.as_slice::<R>()?[start..end]),
        _ => bail!("rotary: expected contiguous tables on the CPU, got strides {:?}", layout.stride()),
    }
}

/// Rotates the heads of a contiguous tensor: (batch, len, heads, head_dim) where `tokens_first`, else (batch, heads, len, head_dim).
#[derive(Clone)]
pub(super) struct Rotate {
    pub(super) angles: KernelAngles,
    pub(super) tokens_first: bool,
    /// Whether it rotates back.
    pub(super) inverse: bool,
}

impl Rotate {
    fn rotated<E>(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage>
    where
        E: Number<Float: WithDType> + WithDType,
    {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("rotary: expected contiguous heads, got strides {:?}", layout.stride());
        };
        let numbers = storage.as_slice::<E>()?[start..end].iter().copied();
        let mut rotated = collected("rotated heads", numbers).map_err(AttentionError::from)?;
        let (_, second, third, head_dim) = layout.shape().dims4()?;
        // A row is a token with all of its heads, or one head of a token.
        let columns = if self.tokens_first { third * head_dim } else { head_dim };
        let rows_per_sequence = second * third * head_dim / columns;
        let heads = Heads { stride: columns, columns: 0..columns, head_dim, rows_per_sequence };
        self.angles.rotate(&mut rotated, &heads, self.inverse)?;
        Ok(E::to_cpu_storage_owned(rotated))
    }
}

impl CustomOp1 for Rotate {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let rotated = match storage {
            CpuStorage::F16(_) => self.rotated::<f16>(storage, layout)?,
            CpuStorage::BF16(_) => self.rotated::<bf16>(storage, layout)?,
            CpuStorage::F32(_) => self.rotated::<f32>(storage, layout)?,
            CpuStorage::F64(_) => self.rotated::<f64>(storage, layout)?,
            other => bail!("rotary: expected F16, BF16, F32 or F64, got {:?}", other.dtype()),
        };
        Ok((rotated, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = memory::contiguous("gradient of rotated heads", &grad.detach())?;
        give(x, result, grad.apply_op1_no_bwd(&Self { inverse: !self.inverse, ..self.clone() })?)
    }
}
