//! What AdamW keeps of a parameter: the running means of its gradient and of its square, and its master copy.

use attention_kernels::{Number, filled};
use candle_core::{DType, Tensor, Var, WithDType};
use half::{bf16, f16};

use crate::check::compute_dtype;
use crate::error::Result;
use crate::train::in_place::Writable;

/// Numbers for each number of a parameter.
#[derive(Debug)]
pub(super) struct Kept<T> {
    /// The first and the second moment.
    pub(super) moments: [T; 2],
    /// The parameter in f32, before it was rounded.
    pub(super) master: Option<T>,
}

/// The moments, and the master copy if there is one.
#[derive(Debug)]
pub(super) enum Moments {
    /// On the CPU.
    F32(Kept<Vec<f32>>),
    /// On the CPU, for parameters in f64.
    F64(Kept<Vec<f64>>),
    /// On another device.
    Tensors(Kept<Tensor>),
}

/// A type of number whose parameters are stepped on the CPU.
pub(super) trait Stepped: Writable + Number<Float: WithDType> {
    fn kept(moments: &mut Moments) -> Option<&mut Kept<Vec<Self::Float>>>;
}

macro_rules! stepped {
    ($($number:ty => $variant:ident),*) => {$(
        impl Stepped for $number {
            fn kept(moments: &mut Moments) -> Option<&mut Kept<Vec<Self::Float>>> {
                match moments {
                    Moments::$variant(kept) => Some(kept),
                    _ => None,
                }
            }
        }
    )*};
}

stepped!(f16 => F32, bf16 => F32, f32 => F32, f64 => F64);

impl<T> Kept<T> {
    /// What `f` makes of each.
    pub(super) fn try_map<U>(&self, f: impl Fn(&T) -> candle_core::Result<U>) -> candle_core::Result<Kept<U>> {
        let [first, second] = &self.moments;
        Ok(Kept { moments: [f(first)?, f(second)?], master: self.master.as_ref().map(&f).transpose()? })
    }
}

impl Moments {
    pub(super) fn zeros(var: &Var) -> Result<Self> {
        const WHAT: &str = "moments of a parameter";
        let count = var.elem_count();
        if !var.device().is_cpu() {
            return Self::tensors(var);
        }
        Ok(match var.dtype() {
            DType::F64 => {
                Self::F64(Kept { moments: [filled(WHAT, count, 0.0)?, filled(WHAT, count, 0.0)?], master: None })
            }
            _ => Self::F32(Kept { moments: [filled(WHAT, count, 0.0)?, filled(WHAT, count, 0.0)?], master: None }),
        })
    }

    /// Zeros as tensors, on the parameter's device.
    pub(super) fn tensors(var: &Var) -> Result<Self> {
        let zeros = || Tensor::zeros(var.shape(), compute_dtype(var.dtype()), var.device());
        Ok(Self::Tensors(Kept { moments: [zeros()?, zeros()?], master: None }))
    }

    pub(super) fn has_master(&self) -> bool {
        match self {
            Self::F32(kept) => kept.master.is_some(),
            Self::F64(kept) => kept.master.is_some(),
            Self::Tensors(kept) => kept.master.is_some(),
        }
    }

    /// Makes the master copy of a parameter in a half type. There is nothing to do for others, which lose nothing.
    pub(super) fn copy_master(&mut self, var: &Var) -> Result<()> {
        if compute_dtype(var.dtype()) == var.dtype() || self.has_master() {
            return Ok(());
        }
        crate::memory::ask_for("master copy of a parameter", 2, var, DType::F32)?;
        let wide = var.as_detached_tensor().to_dtype(DType::F32)?;
        match self {
            Self::F32(kept) => kept.master = Some(wide.flatten_all()?.to_vec1()?),
            Self::Tensors(kept) => kept.master = Some(wide),
            Self::F64(_) => {}
        }
        Ok(())
    }

    /// Copies as tensors on the parameter's device.
    pub(super) fn to_tensors(&self, var: &Var) -> candle_core::Result<Kept<Tensor>> {
        match self {
            Self::F32(kept) => kept.try_map(|x| Tensor::from_slice(x, var.shape(), var.device())),
            Self::F64(kept) => kept.try_map(|x| Tensor::from_slice(x, var.shape(), var.device())),
            Self::Tensors(kept) => kept.try_map(|x| Ok(x.clone())),
        }
    }

    /// Of tensors of the parameter's shape, in the dtype of its moments.
    pub(super) fn from_tensors(kept: &Kept<Tensor>, var: &Var) -> candle_core::Result<Self> {
        if !var.device().is_cpu() {
            return Ok(Self::Tensors(kept.try_map(|x| x.to_device(var.device()))?));
        }
        Ok(match compute_dtype(var.dtype()) {
            DType::F64 => Self::F64(kept.try_map(|x| x.flatten_all()?.to_vec1())?),
            _ => Self::F32(kept.try_map(|x| x.flatten_all()?.to_vec1())?),
        })
    }
}
