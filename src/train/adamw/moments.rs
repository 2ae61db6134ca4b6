//! The running means of a parameter's gradient and of its square.

use attention_kernels::{Number, filled};
use candle_core::{DType, Tensor, Var};
use half::{bf16, f16};

use crate::check::compute_dtype;
use crate::error::Result;
use crate::train::in_place::Writable;

/// The first and the second moment.
#[derive(Debug)]
pub(super) enum Moments {
    /// On the CPU.
    F32([Vec<f32>; 2]),
    /// On the CPU, for parameters in f64.
    F64([Vec<f64>; 2]),
    /// On another device.
    Tensors([Tensor; 2]),
}

/// A type of number whose parameters are stepped on the CPU.
pub(super) trait Stepped: Writable + Number {
    fn moments(moments: &mut Moments) -> Option<[&mut Vec<Self::Float>; 2]>;
}

macro_rules! stepped {
    ($($number:ty => $variant:ident),*) => {$(
        impl Stepped for $number {
            fn moments(moments: &mut Moments) -> Option<[&mut Vec<Self::Float>; 2]> {
                match moments {
                    Moments::$variant(moments) => Some(moments.each_mut()),
                    _ => None,
                }
            }
        }
    )*};
}

stepped!(f16 => F32, bf16 => F32, f32 => F32, f64 => F64);

impl Moments {
    pub(super) fn zeros(var: &Var) -> Result<Self> {
        const WHAT: &str = "moments of a parameter";
        let count = var.elem_count();
        if !var.device().is_cpu() {
            return Self::tensors(var);
        }
        Ok(match var.dtype() {
            DType::F64 => Self::F64([filled(WHAT, count, 0.0)?, filled(WHAT, count, 0.0)?]),
            _ => Self::F32([filled(WHAT, count, 0.0)?, filled(WHAT, count, 0.0)?]),
        })
    }

    /// Zeros as tensors, on the parameter's device.
    pub(super) fn tensors(var: &Var) -> Result<Self> {
        let zeros = || Tensor::zeros(var.shape(), compute_dtype(var.dtype()), var.device());
        Ok(Self::Tensors([zeros()?, zeros()?]))
    }

    /// Copies as tensors on the parameter's device.
    pub(super) fn to_tensors(&self, var: &Var) -> candle_core::Result<[Tensor; 2]> {
        let [first, second] = match self {
            Self::F32(moments) => moments.each_ref().map(|x| Tensor::from_slice(x, var.shape(), var.device())),
            Self::F64(moments) => moments.each_ref().map(|x| Tensor::from_slice(x, var.shape(), var.device())),
            Self::Tensors(moments) => moments.each_ref().map(|x| Ok(x.clone())),
        };
        Ok([first?, second?])
    }

    /// Of two tensors of the parameter's shape, in the dtype of its moments.
    pub(super) fn from_tensors(moments: [Tensor; 2], var: &Var) -> candle_core::Result<Self> {
        let [first, second] = &moments;
        let flat = |x: &Tensor| x.flatten_all();
        Ok(match first.dtype() {
            _ if !var.device().is_cpu() => {
                Self::Tensors([first.to_device(var.device())?, second.to_device(var.device())?])
            }
            DType::F64 => Self::F64([flat(first)?.to_vec1()?, flat(second)?.to_vec1()?]),
            _ => Self::F32([flat(first)?.to_vec1()?, flat(second)?.to_vec1()?]),
        })
    }
}
