//! [`Projection`]: a linear layer inside another layer, with the adapters that were added to it.

mod bias;
mod low_rank;
mod op;
mod quantised;
mod side_by_side;

use std::sync::Arc;

use attention_kernels::{Dropout, philox};
use candle_core::Tensor;
use candle_nn::Linear;

use attention_kernels::quantised::Format;

use crate::adapter::config::{AdapterChoice, LoraConfig};
use crate::error::{AttentionError, Result};
use crate::layer::config::Name;
pub(crate) use bias::add_bias;
pub(crate) use low_rank::LowRank;
pub(crate) use op::project;
pub(crate) use quantised::{Quantised, format_of, placeholder};
pub(crate) use side_by_side::{Adapted, Reduced, SideBySide};

/// An adapter at one linear layer.
#[derive(Clone, Debug)]
pub(crate) struct Adapter {
    pub(crate) name: Arc<str>,
    pub(crate) config: Arc<LoraConfig>,
    /// `None` where this linear layer is no target.
    pub(crate) low_rank: Option<LowRank>,
}

/// What one call of a layer asks of its projections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<'a> {
    pub(crate) adapter: &'a AdapterChoice,
    /// The seed of the call's dropout, in training only.
    pub(crate) seed: Option<u64>,
    /// The place of the first sequence in a larger batch.
    pub(crate) first_sequence: usize,
}

impl Call<'_> {
    /// The first number of a tensor (batch, len, dim) among those of the larger batch.
    pub(crate) fn first_number(&self, len: usize, dim: usize) -> u64 {
        [len, dim].iter().fold(self.first_sequence as u64, |first, &size| first.wrapping_mul(size as u64))
    }
}

impl Default for Call<'_> {
    fn default() -> Self {
        Self { adapter: &AdapterChoice::Active, seed: None, first_sequence: 0 }
    }
}

/// Changes one projection of a layer, whose name in the layer it is given.
pub(crate) type Change<'a> = dyn FnMut(&str, &Projection) -> Result<Projection> + 'a;

/// A layer of projections.
#[doc(hidden)]
pub trait Projections: Sized {
    /// Every projection with its name in the layer, as `attention.q_proj`, always in the same order.
    fn projections(&self) -> Vec<(String, &Projection)>;

    /// The same layer with other projections.
    fn map_projections(&self, change: &mut Change) -> Result<Self>;

    /// The same layer with constants as parameters, but for those of adapters.
    fn frozen(&self) -> Self;

    /// The matrices of the active adapter. One that several projections share stands once.
    fn active_tensors(&self) -> Vec<&Tensor> {
        let mut tensors: Vec<&Tensor> = Vec::new();
        for tensor in self.projections().into_iter().flat_map(|(_, projection)| projection.active_tensors()) {
            if tensors.iter().all(|other| other.id() != tensor.id()) {
                tensors.push(tensor);
            }
        }
        tensors
    }

    /// Whether an adapter belongs to the projection of this name.
    fn is_target(name: &str, config: &LoraConfig) -> bool {
        config.targets.iter().any(|target| name.rsplit('.').next() == Some(target.name()))
    }
}

/// A linear layer with its adapters. All projections of a model that was adapted as a whole have adapters of the same names.
#[derive(Clone, Debug)]
pub struct Projection {
    /// Its name in the layer, as `q_proj`.
    name: &'static str,
    linear: Linear,
    /// The weight, if it is in blocks; that of `linear` is then a placeholder.
    quantised: Option<Arc<Quantised>>,
    adapters: Vec<Adapter>,
    active: Option<Arc<str>>,
    merged: Option<Merged>,
}

/// The adapter that is a part of the weight, and what is restored when it no longer is.
#[derive(Clone, Debug)]
struct Merged {
    name: Arc<str>,
    active: Option<Arc<str>>,
    quantised: Option<Arc<Quantised>>,
}

impl Projection {
    pub(crate) fn new(name: &'static str, linear: Linear) -> Self {
        Self { name, linear, quantised: None, adapters: vec![], active: None, merged: None }
    }

    /// The projection of this name among a layer's parameters, if it is there.
    pub(crate) fn find(name: &'static str, parameters: &[(Name, Tensor)]) -> Option<Self> {
        let tensor = |kind: &str| {
            let full = format!("{name}.{kind}");
            parameters.iter().find(|(other, _)| *other == full).map(|(_, tensor)| tensor.clone())
        };
        Some(Self::new(name, Linear::new(tensor("weight")?, tensor("bias"))))
    }

    /// The projection of this name among a layer's parameters, which have it.
    pub(crate) fn required(name: &'static str, parameters: &[(Name, Tensor)]) -> Result<Self> {
        let missing = || candle_core::Error::msg(format!("no parameter named {name}.weight"));
        Ok(Self::find(name, parameters).ok_or_else(missing)?)
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// The linear layer without adapters that aren't merged.
    pub(crate) fn linear(&self) -> &Linear {
        &self.linear
    }

    pub(crate) fn weight(&self) -> &Tensor {
        self.linear.weight()
    }

    /// The weight, unless it is in blocks.
    pub(crate) fn weight_parameter(&self) -> Option<&Tensor> {
        self.quantised.is_none().then(|| self.weight())
    }

    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.linear.bias()
    }

    pub(crate) fn adapters(&self) -> &[Adapter] {
        &self.adapters
    }

    pub(crate) fn active(&self) -> Option<&Arc<str>> {
        self.active.as_ref()
    }

    /// The matrices of the active adapter, which a loss depends on; none if it is a part of the weight.
    pub(crate) fn active_tensors(&self) -> impl Iterator<Item = &Tensor> {
        let is_active = |adapter: &&Adapter| self.merged.is_none() && Some(&adapter.name) == self.active.as_ref();
        let low_rank = self.adapters.iter().find(is_active).and_then(|adapter| adapter.low_rank.as_ref());
        low_rank.into_iter().flat_map(|low_rank| [&low_rank.a, &low_rank.b])
    }

    /// The adapter of this name.
    pub(crate) fn adapter(&self, name: &str) -> Result<&Adapter, AttentionError> {
        self.adapters.iter().find(|adapter| &*adapter.name == name).ok_or_else(|| {
            let known: Vec<_> = self.adapters.iter().map(|adapter| &*adapter.name).collect();
            let expected = if known.is_empty() {
                "no name, since there is no adapter".into()
            } else {
                format!("one of {}", known.join(", "))
            };
            AttentionError::Adapter { name: name.into(), expected, got: "none of this name".into() }
        })
    }

    /// The adapter that a call has chosen.
    pub(crate) fn chosen(&self, choice: &AdapterChoice) -> Result<Option<&Adapter>, AttentionError> {
        let name = match choice {
            AdapterChoice::Active => self.active.as_deref(),
            AdapterChoice::Base => None,
            AdapterChoice::Named(name) => Some(name.as_str()),
        };
        name.map(|name| self.adapter(name)).transpose()
    }

    /// The linear layer in one call, for sequences of `len` tokens.
    pub(crate) fn call(&self, call: &Call, len: usize) -> Result<Adapted, AttentionError> {
        let adapter = self.chosen(call.adapter)?;
        let name = adapter.map(|adapter| &*adapter.name);
        let plain = || Adapted { quantised: self.quantised.clone(), ..Adapted::from(self.linear.clone()) };
        if let Some(Merged { name: merged, .. }) = &self.merged {
            if name == Some(&**merged) {
                return Ok(plain());
            }
            let expected = "it alone to be used, since it is merged into the weights".to_string();
            let got = name.map_or("a call without adapter".into(), |name| format!("a call with adapter {name}"));
            return Err(AttentionError::Adapter { name: merged.to_string(), expected, got });
        }
        let Some(Adapter { config, low_rank: Some(low_rank), .. }) = adapter else { return Ok(plain()) };
        let dropout = call.seed.filter(|_| config.dropout_p > 0.0);
        let input = low_rank.input.as_deref().unwrap_or(self.name);
        let first = call.first_number(len, low_rank.a.dims()[1]);
        let dropout = dropout.map(|seed| Dropout { p: config.dropout_p, seed: philox::named_seed(seed, input), first });
        Ok(Adapted { low_rank: Some(low_rank.clone()), dropout, ..plain() })
    }

    /// Whether a call in training drops inputs of an adapter.
    pub(crate) fn drops(&self) -> bool {
        self.adapters.iter().any(|adapter| adapter.config.dropout_p > 0.0)
    }

    /// The same linear layer as a constant.
    pub(crate) fn frozen(&self) -> Self {
        let linear = Linear::new(self.weight().detach(), self.bias().map(Tensor::detach));
        Self { linear, ..self.clone() }
    }

    /// With one adapter more, which becomes the active one.
    pub(crate) fn with_adapter(&self, adapter: Adapter) -> Self {
        let active = Some(adapter.name.clone());
        let adapters = self.adapters.iter().cloned().chain([adapter]).collect();
        Self { adapters, active, ..self.clone() }
    }

    /// Without the adapter of this name.
    pub(crate) fn without_adapter(&self, name: &str) -> Result<Self> {
        self.adapter(name)?;
        self.check_not_merged()?;
        let adapters = self.adapters.iter().filter(|adapter| &*adapter.name != name).cloned().collect();
        let active = self.active.clone().filter(|active| **active != *name);
        Ok(Self { adapters, active, ..self.clone() })
    }

    /// With this adapter as the active one.
    pub(crate) fn with_active(&self, name: Option<&str>) -> Result<Self> {
        let active = name.map(|name| self.adapter(name).map(|adapter| adapter.name.clone())).transpose()?;
        if self.merged.as_ref().is_some_and(|merged| Some(&merged.name) != active.as_ref()) {
            self.check_not_merged()?;
        }
        Ok(Self { active, ..self.clone() })
    }

    /// With the adapter of this name as a part of the weight.
    pub(crate) fn merge(&self, name: &str) -> Result<Self> {
        let name = self.adapter(name)?.name.clone();
        self.check_not_merged()?;
        let (active, quantised) = (self.active.clone(), self.quantised.clone());
        let merged = Some(Merged { name: name.clone(), active, quantised });
        let active = Some(name.clone());
        match &self.adapter(&name)?.low_rank {
            Some(low_rank) => {
                let linear = Linear::new(low_rank.added_to(&self.numbers()?, 1.0)?, self.bias().cloned());
                Ok(Self { linear, quantised: None, active, merged, ..self.clone() })
            }
            None => Ok(Self { active, merged, ..self.clone() }),
        }
    }

    /// The inverse of [`merge`](Self::merge).
    pub(crate) fn unmerge(&self) -> Result<Self> {
        let Some(Merged { name, active, quantised }) = &self.merged else { return Ok(self.clone()) };
        let before = Self { active: active.clone(), merged: None, ..self.clone() };
        match (&self.adapter(name)?.low_rank, quantised) {
            (_, Some(quantised)) => before.with_quantised(quantised.clone()),
            (Some(low_rank), None) => {
                let linear = Linear::new(low_rank.added_to(self.weight(), -1.0)?, self.bias().cloned());
                Ok(Self { linear, ..before })
            }
            (None, None) => Ok(before),
        }
    }

    /// The weight as numbers.
    fn numbers(&self) -> Result<Tensor> {
        match &self.quantised {
            Some(quantised) => quantised.dequantise(self.weight().dtype(), self.weight().device()),
            None => Ok(self.weight().clone()),
        }
    }

    /// The weight in blocks, if it is.
    pub(crate) fn quantised(&self) -> Option<&Quantised> {
        self.quantised.as_deref()
    }

    /// With the weight in blocks, which has `weight` as its name in errors.
    pub(crate) fn quantise(&self, weight: &str, format: Format) -> Result<Self> {
        let changed = match &self.quantised {
            Some(quantised) if quantised.format() == format => self.clone(),
            Some(quantised) => {
                let got = format!("blocks of {:?}", quantised.format());
                return Err(quantised::refused(weight, format!("numbers, or blocks of {format:?}"), got));
            }
            None => self.with_quantised(Arc::new(Quantised::of(weight, self.weight(), format)?))?,
        };
        let Some(Merged { name, .. }) = &self.merged else { return Ok(changed) };
        let adapters = self.adapters.iter().filter(|adapter| adapter.name != *name).cloned().collect();
        Ok(Self { adapters, active: None, merged: None, ..changed })
    }

    /// With this weight in blocks, of the same sizes.
    pub(crate) fn with_quantised(&self, quantised: Arc<Quantised>) -> Result<Self> {
        let weight = placeholder(&quantised.dims(), self.weight().dtype(), self.weight().device())?;
        let linear = Linear::new(weight, self.bias().cloned());
        Ok(Self { linear, quantised: Some(quantised), ..self.clone() })
    }

    /// With the weight as numbers, if it is in blocks.
    pub(crate) fn dequantise(&self) -> Result<Self> {
        let linear = Linear::new(self.numbers()?, self.bias().cloned());
        Ok(Self { linear, quantised: None, ..self.clone() })
    }

    /// Refuses what a file of this crate doesn't hold: a weight in blocks, and an adapter that isn't merged. `name` is the projection's
    /// in the layer.
    pub(crate) fn check_plain(&self, name: &str) -> Result<(), AttentionError> {
        if let Some(quantised) = &self.quantised {
            let (name, expected) = (format!("{name}.weight"), "numbers (dequantise the layer first)".into());
            return Err(AttentionError::Parameter {
                name,
                expected,
                got: format!("blocks of {:?}", quantised.format()),
            });
        }
        match self.adapters.first() {
            Some(Adapter { name, .. }) if self.merged.is_none() => {
                let expected = "one that is merged into the weights, or none".to_string();
                Err(AttentionError::Adapter { name: name.to_string(), expected, got: "one beside them".into() })
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn check_not_merged(&self) -> Result<(), AttentionError> {
        let Some(Merged { name, .. }) = &self.merged else { return Ok(()) };
        let expected = "an adapter beside the weights (unmerge it first)".to_string();
        Err(AttentionError::Adapter { name: name.to_string(), expected, got: "one that is merged".into() })
    }
}
