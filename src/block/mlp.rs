//! [`Mlp`]: the feed-forward part of a block.

use std::sync::Arc;

use candle_core::{DType, Result as CandleResult, Tensor};
use candle_nn::{Linear, VarBuilder};
use serde::{Deserialize, Serialize};

use crate::adapter::config::AdapterChoice;
use crate::block::activation::{Activation, gated};
use crate::block::branch::Branch;
use crate::block::mlp_op::FusedMlp;
use crate::check::{check_device, check_dtype};
use crate::checkpoint::Parameters;
use crate::error::{AttentionError, Result};
use crate::layer::config::{Init, Parameter};
use crate::layer::init::{create_parameters, new_variables};
use crate::memory;
use crate::parallel::communicator::Communicator;
use crate::parallel::tensor::{Slice, TensorParallel};
use crate::projection::{Call, Change, Projection, Projections, SideBySide, add_bias, project};

/// The config of an [`Mlp`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlpConfig {
    /// The size of a token.
    pub embed_dim: usize,
    /// The size between the products; 4 · embed_dim in the paper.
    pub hidden_dim: usize,
    /// f, between the products.
    pub activation: Activation,
    /// Whether f is taken of a product of its own, the gate, which multiplies the other: SwiGLU with SiLU, GEGLU with GELU.
    #[serde(default)]
    pub gated: bool,
    /// Whether the products have biases.
    #[serde(default)]
    pub bias: bool,
    /// The seed of the initial parameters. It is combined with their names.
    #[serde(default)]
    pub seed: u64,
}

impl MlpConfig {
    /// GELU between two products with biases, as in BERT and GPT-2.
    pub fn new(embed_dim: usize, hidden_dim: usize) -> Self {
        Self { embed_dim, hidden_dim, activation: Activation::Gelu, gated: false, bias: true, seed: 0 }
    }

    /// SwiGLU without biases, as in Llama. (Shazeer, "GLU Variants Improve Transformer", 2020.)
    pub fn swiglu(embed_dim: usize, hidden_dim: usize) -> Self {
        Self { activation: Activation::Silu, gated: true, bias: false, ..Self::new(embed_dim, hidden_dim) }
    }

    pub(crate) fn check(&self) -> Result<(), AttentionError> {
        for (field, size) in [("mlp.embed_dim", self.embed_dim), ("mlp.hidden_dim", self.hidden_dim)] {
            if size == 0 {
                return Err(AttentionError::Config { field, expected: "at least 1".into(), got: "0".into() });
            }
        }
        match memory::bytes(&[self.embed_dim, self.hidden_dim, 2], DType::F64) {
            usize::MAX => Err(AttentionError::Config {
                field: "mlp.embed_dim and mlp.hidden_dim",
                expected: "parameters that memory can address".into(),
                got: format!("{} and {}", self.embed_dim, self.hidden_dim),
            }),
            _ => Ok(()),
        }
    }

    pub(crate) fn parameters(&self) -> Vec<Parameter> {
        let Self { embed_dim, hidden_dim, .. } = *self;
        let gate = if self.gated { Some(("gate.weight", "gate.bias", hidden_dim, embed_dim)) } else { None };
        let others =
            [("up.weight", "up.bias", hidden_dim, embed_dim), ("down.weight", "down.bias", embed_dim, hidden_dim)];
        let mut parameters = Vec::new();
        for (weight, bias, outputs, inputs) in gate.into_iter().chain(others) {
            parameters.push(Parameter { name: weight.into(), shape: vec![outputs, inputs], init: Init::XavierUniform });
            if self.bias {
                parameters.push(Parameter { name: bias.into(), shape: vec![outputs], init: Init::Zeros });
            }
        }
        parameters
    }
}

/// down(f(up(x))), or down(f(gate(x)) · up(x)): the feed-forward part of a transformer block, as one operation with a gradient for x and
/// every parameter.
///
/// # Shapes
///
/// x (..., embed_dim); the result has the shape and dtype of x. Weights are (out, in).
///
/// # Errors
///
/// Input of another size, dtype or device than the parameters; too little memory.
///
/// # Examples
///
/// ```
/// use candle_attention::block::{Mlp, MlpConfig};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let mlp = Mlp::new(&MlpConfig::swiglu(8, 32), vb.pp("mlp"))?;
/// let x = Tensor::randn(0f32, 1.0, (2, 3, 8), &Device::Cpu)?;
/// let y = mlp.forward(&x)?;
/// assert_eq!(y.dims(), [2, 3, 8]);
///
/// let hidden = (mlp.gate().unwrap().forward(&x)?.silu()? * mlp.up().forward(&x)?)?;
/// let difference = (y - mlp.down().forward(&hidden)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(difference < 1e-5);
/// # Ok::<(), candle_attention::Error>(())
/// ```
///
/// Source: Vaswani et al., "Attention Is All You Need" (NIPS 2017), section 3.3; Shazeer, "GLU Variants Improve Transformer" (2020),
/// section 2.
#[derive(Clone, Debug)]
pub struct Mlp {
    config: MlpConfig,
    gate: Option<Projection>,
    up: Projection,
    down: Projection,
    /// The others, if this rank has some of the hidden numbers. `config` is then that of an MLP with these alone.
    shared: Option<SharedHidden>,
}

/// What an MLP knows of the others, if it has some of the hidden numbers.
#[derive(Clone, Debug)]
struct SharedHidden {
    ranks: TensorParallel,
    /// The config of the whole.
    whole: MlpConfig,
}

impl SharedHidden {
    /// This rank's part of a parameter, `None` for one that every rank has.
    fn slice_of(&self, name: &str) -> Option<Slice> {
        match name {
            "down.weight" => Some(self.ranks.slice(1)),
            "down.bias" => None,
            _ => Some(self.ranks.slice(0)),
        }
    }
}

impl Mlp {
    /// An MLP whose parameters are read from `vb` or created in it: `gate`, `up` and `down` (`.weight`, `.bias`), as far as the config has
    /// them. New weights are initialised from the config's seed and their names.
    ///
    /// # Errors
    ///
    /// A size of 0; a dtype other than f16, bf16, f32 and f64; tensors that `vb` lacks or holds in another shape; too little memory.
    pub fn new(config: &MlpConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        check_dtype("parameters", vb.dtype())?;
        Self::from_parameters(config, create_parameters(config.parameters(), |_| config.seed, &vb)?)
    }

    /// An MLP with these parameters, which are exactly those of its config.
    pub(crate) fn from_parameters(config: &MlpConfig, parameters: Parameters) -> Result<Self> {
        let required = |name| Projection::required(name, &parameters);
        let (gate, config) = (Projection::find("gate", &parameters), config.clone());
        Ok(Self { config, gate, up: required("up")?, down: required("down")?, shared: None })
    }

    /// The output, with the active [adapter](crate::adapter), if there is one, and without its dropout.
    ///
    /// # Errors
    ///
    /// See [`Mlp`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_in_branch(x, Branch::default(), &Call::default())
    }

    /// The output with the [adapter](crate::adapter) of choice. With a `dropout_seed` it is that of a call in training, in which the
    /// adapter drops numbers by this seed.
    ///
    /// # Errors
    ///
    /// See [`Mlp`], and a name that no adapter has.
    pub fn forward_with(&self, x: &Tensor, adapter: &AdapterChoice, dropout_seed: Option<u64>) -> Result<Tensor> {
        self.forward_in_branch(x, Branch::default(), &Call { adapter, seed: dropout_seed, ..Call::default() })
    }

    /// The output with what stands around the MLP in a block.
    pub(crate) fn forward_in_branch(&self, x: &Tensor, branch: Branch, call: &Call) -> Result<Tensor> {
        let Some(SharedHidden { ranks, .. }) = &self.shared else {
            self.check_input(x)?;
            return self.forward_alone(x, branch, call);
        };
        ranks.agree_on("MLP that ranks share", self.text(x, &branch, call), self.check_input(x).map_err(Into::into))?;
        // What stands around the MLP also stands around the sum.
        let normed = branch.norm.map_or(Ok(x.clone()), |norm| norm.forward(x))?;
        let inner = Branch { recompute: branch.recompute, ..Branch::default() };
        let output = ranks.sum(&self.forward_alone(&ranks.entering(&normed)?, inner, call)?)?;
        branch.finish(x, add_bias(output, self.down.bias())?)
    }

    /// The output of this rank's hidden numbers, without the last bias if ranks share the MLP.
    fn forward_alone(&self, x: &Tensor, branch: Branch, call: &Call) -> Result<Tensor> {
        let MlpConfig { activation, embed_dim, hidden_dim, .. } = self.config;
        let len = x.dims().iter().rev().nth(1).copied().unwrap_or(1);
        let gate = self.gate.as_ref().map(|gate| gate.call(call, len)).transpose()?;
        let (up, down) = (self.up.call(call, len)?, self.down.call(call, len)?);
        let down = if self.shared.is_some() { down.without_bias() } else { down };
        if x.device().is_cpu() && x.elem_count() > 0 {
            let (is_gated, inner) = (gate.is_some(), SideBySide::new(gate.into_iter().chain([up]))?);
            let (activation, down, branch) = (activation.kernel(), SideBySide::new([down])?, branch.to_owned());
            let mlp = FusedMlp { activation, inner, is_gated, down, embed_dim, hidden_dim, branch };
            return Ok(mlp.forward(x)?);
        }
        let normed = branch.norm.map_or(Ok(x.clone()), |norm| norm.forward(x))?;
        let hidden = |linear| project(linear, &normed, &[&x.dims()[..x.rank() - 1], &[hidden_dim]].concat());
        let hidden = match gate {
            Some(gate) => gated(activation, &hidden(gate)?, &hidden(up)?)?,
            None => activation.forward(&hidden(up)?)?,
        };
        branch.finish(x, project(down, &hidden, x.dims())?)
    }

    /// This rank's part of the MLP, which all ranks share (tensor parallelism): the hidden numbers r·h/n to (r + 1)·h/n of rank r of n, with
    /// the rows of `up` and `gate` and the columns of `down`. All ranks call it with the same MLP. The part has copies of its parameters,
    /// each a variable if it was one, so that the whole MLP can be dropped.
    ///
    /// All ranks call the part's methods with the same input, and get the same output, which is that of the whole MLP but for rounding. Every
    /// gradient is that of the whole MLP, or of this rank's part of it, if all ranks make the same backward pass. See
    /// [`TransformerBlock::shard`](crate::block::TransformerBlock::shard) for an example.
    ///
    /// # Errors
    ///
    /// On every rank: a hidden_dim that the ranks can't divide; an MLP that is a part already, with weights in blocks, or with adapters
    /// that aren't merged; ranks with other configs or parameters; a rank that is gone. The methods of the part return
    /// [`AttentionError::Ranks`](crate::AttentionError::Ranks) on every rank if the ranks call them with other inputs.
    pub fn shard(&self, communicator: &Arc<dyn Communicator>) -> Result<Self> {
        let shared = SharedHidden { ranks: TensorParallel::new(communicator), whole: self.config.clone() };
        let (ranks, hidden_dim) = (&shared.ranks, self.config.hidden_dim);
        let own = self.check_plain().and_then(|()| ranks.check_divides("mlp.hidden_dim", hidden_dim));
        let text = format!("{:?}, {} parameters", self.config, self.parameters().len());
        ranks.agree_on("MLP to share", text, own.map_err(Into::into))?;
        let parameters = ranks.shard(self.parameters(), |name| shared.slice_of(name))?;
        let config = MlpConfig { hidden_dim: hidden_dim / ranks.ranks(), ..self.config.clone() };
        Ok(Self { shared: Some(shared), ..Self::of_parameters(&config, parameters)? })
    }

    /// Whether other ranks have the rest of this MLP.
    pub(super) fn is_part(&self) -> bool {
        self.shared.is_some()
    }

    /// The whole MLP from its parts, on every rank; a clone of an MLP that is no part. All ranks call it.
    ///
    /// # Errors
    ///
    /// A rank that is gone; too little memory.
    pub fn gather(&self) -> Result<Self> {
        let Some(shared) = &self.shared else { return Ok(self.clone()) };
        let parameters = shared.ranks.gather(self.parameters(), |name| shared.slice_of(name))?;
        Self::of_parameters(&shared.whole, parameters)
    }

    fn of_parameters(config: &MlpConfig, parameters: Vec<(&'static str, Tensor)>) -> Result<Self> {
        Self::from_parameters(config, parameters.into_iter().map(|(name, tensor)| (name.into(), tensor)).collect())
    }

    /// A copy of the MLP in which every parameter is a new variable.
    pub(crate) fn trainable(&self) -> Result<Self> {
        self.check_projections()?;
        let copy = Self::from_parameters(&self.config, new_variables(self.parameters())?)?;
        Ok(Self { shared: self.shared.clone(), ..copy })
    }

    /// Refuses what a file of this crate doesn't hold: a part of an MLP, weights in blocks, and adapters that aren't merged.
    pub(crate) fn check_plain(&self) -> Result<(), AttentionError> {
        self.check_whole()?;
        self.check_projections()
    }

    fn check_projections(&self) -> Result<(), AttentionError> {
        self.projections().into_iter().try_for_each(|(name, projection)| projection.check_plain(&name))
    }

    fn check_whole(&self) -> Result<(), AttentionError> {
        self.shared.as_ref().map_or(Ok(()), |shared| shared.ranks.refuse())
    }

    /// What has to be the same on every rank.
    fn text(&self, x: &Tensor, branch: &Branch, call: &Call) -> String {
        let trained = self.parameters().iter().filter(|(_, parameter)| parameter.track_op()).count();
        let of_x = if x.track_op() { "with" } else { "without" };
        format!(
            "input {:?} {:?} {of_x} gradient, {trained} trained parameters, dropout {:?}, {call:?}",
            x.dims(),
            x.dtype(),
            branch.dropout
        )
    }

    fn check_input(&self, x: &Tensor) -> Result<(), AttentionError> {
        let weight = self.up.weight();
        if x.dims().last() != Some(&self.config.embed_dim) {
            let expected = format!("(..., embed_dim) with embed_dim {}", self.config.embed_dim);
            return Err(AttentionError::Shape { tensor: "input", expected, shape: x.dims().to_vec() });
        }
        if x.dtype() != weight.dtype() {
            let expected = format!("{:?}, that of the MLP's parameters", weight.dtype());
            return Err(AttentionError::DType { tensor: "input", expected, got: x.dtype() });
        }
        memory::check_countable("input", x)?;
        check_device("input", x, weight)
    }

    /// Whether a call in training drops inputs of an adapter.
    pub(crate) fn adapter_drops(&self) -> bool {
        self.up.drops()
    }

    /// The config; that of the whole MLP for a [part](Self::shard).
    pub fn config(&self) -> &MlpConfig {
        self.shared.as_ref().map_or(&self.config, |shared| &shared.whole)
    }

    /// embed_dim -> hidden_dim, whose activation multiplies [`up`](Self::up).
    pub fn gate(&self) -> Option<&Linear> {
        self.gate.as_ref().map(Projection::linear)
    }

    /// embed_dim -> hidden_dim.
    pub fn up(&self) -> &Linear {
        self.up.linear()
    }

    /// hidden_dim -> embed_dim.
    pub fn down(&self) -> &Linear {
        self.down.linear()
    }

    /// Every parameter with its name, always in the same order.
    pub fn parameters(&self) -> Vec<(&'static str, &Tensor)> {
        let linears = [
            ("gate.weight", "gate.bias", self.gate.as_ref()),
            ("up.weight", "up.bias", Some(&self.up)),
            ("down.weight", "down.bias", Some(&self.down)),
        ];
        let mut parameters = Vec::new();
        for (weight, bias, linear) in linears {
            let Some(linear) = linear else { continue };
            parameters.extend(linear.weight_parameter().map(|tensor| (weight, tensor)));
            parameters.extend(linear.bias().map(|tensor| (bias, tensor)));
        }
        parameters
    }
}

impl Projections for Mlp {
    fn projections(&self) -> Vec<(String, &Projection)> {
        self.gate.iter().chain([&self.up, &self.down]).map(|x| (x.name().to_string(), x)).collect()
    }

    fn map_projections(&self, change: &mut Change) -> Result<Self> {
        self.check_whole()?;
        let gate = self.gate.as_ref().map(|gate| change(gate.name(), gate)).transpose()?;
        let (up, down) = (change(self.up.name(), &self.up)?, change(self.down.name(), &self.down)?);
        Ok(Self { gate, up, down, ..self.clone() })
    }

    fn frozen(&self) -> Self {
        let gate = self.gate.as_ref().map(Projection::frozen);
        Self { gate, up: self.up.frozen(), down: self.down.frozen(), ..self.clone() }
    }
}

impl candle_nn::Module for Mlp {
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        Ok(Mlp::forward(self, x)?)
    }
}
