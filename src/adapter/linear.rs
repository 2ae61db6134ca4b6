//! [`LoraLinear`]: adapters on any linear layer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use attention_kernels::philox;
use candle_core::{Result as CandleResult, Tensor, Var};
use candle_nn::{Linear, ModuleT};

use crate::adapter::config::{AdapterChoice, LoraConfig};
use crate::block::linear::check;
use crate::error::Result;
use crate::projection::{Call, Change, Projection, Projections, project};

/// A linear layer with adapters, for the parts of a model that no layer of this crate stands for. Its projection is called `linear`, and
/// every adapter belongs to it, whatever targets its config has.
///
/// # Shapes
///
/// x (..., in), weight (out, in), bias (out); the result is (..., out).
///
/// # Errors
///
/// As [`block::linear`](crate::block::linear()).
///
/// # Examples
///
/// ```
/// use candle_attention::adapter::{Adapt, LoraConfig, LoraLinear};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Linear, VarBuilder, VarMap};
///
/// let weight = Tensor::new(&[[3f32, 4.], [5., 6.]], &Device::Cpu)?;
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let linear = LoraLinear::new(Linear::new(weight, None)).with_lora("default", &LoraConfig::new(1, 1.0), vb)?;
/// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// assert_eq!(linear.forward(&x)?.to_vec2::<f32>()?, [[11.0, 17.0]]); // B is zero
///
/// let grads = linear.forward_t(&x, true)?.sum_all()?.backward()?;
/// assert!(linear.vars().iter().all(|var| grads.get(var).is_some()));
/// # Ok::<(), candle_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LoraLinear {
    projection: Projection,
    dropout_calls: Arc<AtomicU64>,
}

impl LoraLinear {
    /// The linear layer without adapters.
    pub fn new(linear: Linear) -> Self {
        Self { projection: Projection::new("linear", linear), dropout_calls: Arc::default() }
    }

    /// The linear layer, of which a merged adapter is a part.
    pub fn linear(&self) -> &Linear {
        self.projection.linear()
    }

    /// Computes the output with the active adapter, without dropout.
    ///
    /// # Errors
    ///
    /// See [`LoraLinear`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_t(x, false)
    }

    /// Computes the output with the active adapter, and with its dropout if `train` is true.
    ///
    /// # Errors
    ///
    /// See [`LoraLinear`].
    pub fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.forward_with(x, &AdapterChoice::Active, train)
    }

    /// Computes the output with an adapter of choice.
    ///
    /// # Errors
    ///
    /// See [`LoraLinear`], and a name that no adapter has.
    pub fn forward_with(&self, x: &Tensor, adapter: &AdapterChoice, train: bool) -> Result<Tensor> {
        let (weight, bias) = (self.projection.weight(), self.projection.bias());
        check(x, weight, bias)?;
        let nth = || philox::nth_seed(self.seed(), self.dropout_calls.fetch_add(1, Ordering::Relaxed));
        let call = Call { adapter, seed: (train && self.projection.drops()).then(nth), ..Call::default() };
        let shape = [&x.dims()[..x.rank() - 1], &[weight.dim(0)?]].concat();
        Ok(project(self.projection.call(&call, 1)?, x, &shape)?)
    }

    /// The seed of dropout: that of the adapter which was added last.
    fn seed(&self) -> u64 {
        self.projection.adapters().last().map_or(0, |adapter| adapter.config.seed)
    }

    /// The parameters that an optimiser can train: with adapters those of the active one alone.
    pub fn vars(&self) -> Vec<Var> {
        let own = [Some(self.projection.weight()), self.projection.bias()].into_iter().flatten();
        let tensors = own.chain(self.active_tensors()).filter(|tensor| tensor.is_variable());
        tensors.filter_map(|tensor| Var::from_tensor(tensor).ok()).collect()
    }

    /// How many training passes have used dropout so far.
    pub fn dropout_calls(&self) -> u64 {
        self.dropout_calls.load(Ordering::Relaxed)
    }

    /// Sets [`dropout_calls`](Self::dropout_calls), to continue a training run. Clones share the count.
    pub fn set_dropout_calls(&self, calls: u64) {
        self.dropout_calls.store(calls, Ordering::Relaxed);
    }
}

impl Projections for LoraLinear {
    fn projections(&self) -> Vec<(String, &Projection)> {
        vec![(self.projection.name().to_string(), &self.projection)]
    }

    fn map_projections(&self, change: &mut Change) -> Result<Self> {
        Ok(Self { projection: change(self.projection.name(), &self.projection)?, ..self.clone() })
    }

    fn frozen(&self) -> Self {
        Self { projection: self.projection.frozen(), ..self.clone() }
    }

    fn is_target(_: &str, _: &LoraConfig) -> bool {
        true
    }
}

/// Dropout is on in training only.
impl ModuleT for LoraLinear {
    fn forward_t(&self, x: &Tensor, train: bool) -> CandleResult<Tensor> {
        Ok(LoraLinear::forward_t(self, x, train)?)
    }
}
