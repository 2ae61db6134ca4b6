//! [`Norm`]: a layer norm or RMS norm with its parameters.

use attention_kernels::norm::{Norm as KernelNorm, NormGradients, NormKind as KernelKind};
use candle_core::{Result as CandleResult, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use crate::block::norm::{NormRule, check_eps};
use crate::block::op::Dtype;
use crate::block::operand::{Reading, checked, tensor};
use crate::check::check_dtype;
use crate::error::{AttentionError, Result};
use crate::layer::config::Name;
use crate::memory;

/// Which norm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// Each row is divided by its root mean square: Llama, Qwen, Gemma.
    #[default]
    Rms,
    /// The mean of each row is subtracted before: BERT, GPT-2.
    Layer,
}

/// The config of a [`Norm`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormConfig {
    /// Which norm.
    pub kind: NormKind,
    /// Added to the mean square under the root.
    pub eps: f64,
    /// Whether a learned bias is added.
    #[serde(default)]
    pub bias: bool,
    /// Whether a row is multiplied by 1 + weight instead of the weight, which then starts at zero (Gemma).
    #[serde(default)]
    pub unit_offset: bool,
}

impl NormConfig {
    /// An RMS norm without a bias, as in Llama.
    pub fn rms(eps: f64) -> Self {
        Self { kind: NormKind::Rms, eps, bias: false, unit_offset: false }
    }

    /// A layer norm with a bias: `nn.LayerNorm`.
    pub fn layer(eps: f64) -> Self {
        Self { kind: NormKind::Layer, eps, bias: true, unit_offset: false }
    }
}

/// A layer norm or RMS norm over the last axis, with a gradient for x and every parameter.
///
/// # Shapes
///
/// x (..., dim) with dim = that of the weight; the result has the shape and dtype of x.
///
/// # Examples
///
/// ```
/// use candle_attention::block::{Norm, NormConfig};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let norm = Norm::new(&NormConfig::layer(1e-5), 2, vb)?;
/// let y = norm.forward(&Tensor::new(&[[1f32, 3.]], &Device::Cpu)?)?.to_vec2::<f32>()?;
/// assert!((y[0][0] + 1.0).abs() < 1e-4 && (y[0][1] - 1.0).abs() < 1e-4);
/// # Ok::<(), candle_attention::Error>(())
/// ```
///
/// Sources: Ba, Kiros, Hinton, "Layer Normalization" (2016), section 3; Zhang, Sennrich, "Root Mean Square Layer Normalization"
/// (NeurIPS 2019), section 3.
#[derive(Clone, Debug)]
pub struct Norm {
    config: NormConfig,
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Norm {
    /// A norm over `dim` entries whose `weight` and `bias` are read from `vb` or created in it.
    ///
    /// # Errors
    ///
    /// An eps that isn't a finite number above 0; a dtype that isn't a float; parameters of another shape.
    pub fn new(config: &NormConfig, dim: usize, vb: VarBuilder) -> Result<Self> {
        config.check(vb.dtype())?;
        let start = if config.unit_offset { 0.0 } else { 1.0 };
        let weight = vb.get_with_hints(dim, "weight", Init::Const(start))?;
        let bias = config.bias.then(|| vb.get_with_hints(dim, "bias", Init::Const(0.0))).transpose()?;
        Self::from_parameters(config, weight, bias)
    }

    /// A norm with these parameters, each (dim).
    ///
    /// # Errors
    ///
    /// As [`Norm::new`]; also a bias that the config doesn't have, or lacks.
    pub fn from_parameters(config: &NormConfig, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        config.check(weight.dtype())?;
        if weight.rank() != 1 {
            let (tensor, expected, shape) = ("weight", "1 axis (dim)", weight.dims().to_vec());
            return Err(AttentionError::Rank { tensor, expected, shape }.into());
        }
        if bias.is_some() != config.bias {
            let (expected, got) = (format!("bias: {}", config.bias), format!("bias: {}", bias.is_some()));
            return Err(AttentionError::Config { field: "norm", expected, got }.into());
        }
        if let Some(bias) = bias.as_ref().filter(|bias| bias.dims() != weight.dims()) {
            let (expected, shape) = (format!("{:?}, as the weight", weight.dims()), bias.dims().to_vec());
            return Err(AttentionError::Shape { tensor: "bias", expected, shape }.into());
        }
        memory::check_countable("weight", &weight)?;
        // The kernels read rows of a contiguous tensor.
        let contiguous = |x: Tensor| memory::contiguous("parameter of a norm", &x);
        Ok(Self { config: *config, weight: contiguous(weight)?, bias: bias.map(contiguous).transpose()? })
    }

    /// A norm with the parameters of these names, which are exactly those of its config.
    pub(crate) fn from_named(config: &NormConfig, parameters: Vec<(Name, Tensor)>) -> Result<Self> {
        let find = |name: &str| parameters.iter().find(|(other, _)| *other == name).map(|(_, tensor)| tensor.clone());
        let weight = find("weight").ok_or_else(|| candle_core::Error::msg("no parameter named weight"))?;
        Self::from_parameters(config, weight, find("bias"))
    }

    /// The normalised rows.
    ///
    /// # Errors
    ///
    /// As [`rms_norm`](crate::block::rms_norm).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.config.rule().apply(x, &self.weight, self.bias.as_ref())
    }

    /// The config.
    pub fn config(&self) -> &NormConfig {
        &self.config
    }

    /// (dim)
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// (dim)
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Weight and bias.
    pub(crate) fn parameters(&self) -> Vec<Tensor> {
        std::iter::once(&self.weight).chain(&self.bias).cloned().collect()
    }

    /// The same norm with constants as parameters.
    pub(crate) fn frozen(&self) -> Self {
        Self { weight: self.weight.detach(), bias: self.bias.as_ref().map(Tensor::detach), ..self.clone() }
    }

    /// The same norm with `f` of each parameter.
    pub(crate) fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { weight: f(&self.weight)?, bias: self.bias.as_ref().map(f).transpose()?, ..self.clone() })
    }

    pub(crate) fn read(&self) -> ReadNorm<'_> {
        ReadNorm { norm: self, weight: Reading::new(&self.weight), bias: self.bias.as_ref().map(Reading::new) }
    }
}

impl candle_nn::Module for Norm {
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        Ok(Norm::forward(self, x)?)
    }
}

impl NormConfig {
    fn rule(&self) -> NormRule {
        let kind = match self.kind {
            NormKind::Rms => KernelKind::Rms,
            NormKind::Layer => KernelKind::Layer,
        };
        NormRule { kind, eps: self.eps, unit_offset: self.unit_offset }
    }

    pub(crate) fn check(&self, dtype: candle_core::DType) -> Result<(), AttentionError> {
        check_dtype("parameters", dtype)?;
        check_eps("norm.eps", Some(self.eps), dtype)
    }
}

/// A norm whose parameters the kernels read.
pub(crate) struct ReadNorm<'a> {
    norm: &'a Norm,
    weight: Reading<'a>,
    bias: Option<Reading<'a>>,
}

impl ReadNorm<'_> {
    fn kernel<E: Dtype>(&self) -> CandleResult<KernelNorm<'_, E>> {
        let NormRule { kind, eps, unit_offset } = self.norm.config.rule();
        let bias = self.bias.as_ref().map(Reading::numbers).transpose()?;
        Ok(KernelNorm { kind, weight: self.weight.numbers()?, bias, eps, unit_offset })
    }

    pub(crate) fn forward<E: Dtype>(&self, x: &[E]) -> CandleResult<Vec<E>> {
        checked(self.kernel()?.forward(x))
    }

    /// The gradient of x, plus `residual`, and those of the parameters that want one.
    pub(crate) fn backward<E: Dtype>(
        &self,
        x: &[E],
        grad: &[E],
        residual: Option<&[E]>,
    ) -> CandleResult<(Vec<E>, Vec<Option<Tensor>>)> {
        let NormGradients { x, weight, bias } = checked(self.kernel()?.backward(x, grad, residual))?;
        let of = |parameter: &Tensor, sums: Vec<E::Float>| {
            let sums = checked(E::from_floats("gradient of a norm", sums))?;
            parameter.track_op().then(|| tensor(sums, parameter.shape())).transpose()
        };
        let mut gradients = vec![of(&self.norm.weight, weight)?];
        if let Some((parameter, sums)) = self.norm.bias.as_ref().zip(bias) {
            gradients.push(of(parameter, sums)?);
        }
        Ok((x, gradients))
    }
}
