//! [`Adapt`]: adapters added to a layer, chosen, merged.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

use crate::adapter::config::LoraConfig;
use crate::check::check_held;
use crate::checkpoint::{Parameters, is_finite, prefixed};
use crate::error::{AttentionError, Result};
use crate::layer::config::{Init, Parameter};
use crate::layer::init::create_parameters;
use crate::projection::{Adapter, LowRank, Projection, Projections};

/// A layer that can have adapters: [`SelfAttention`](crate::SelfAttention), [`CrossAttention`](crate::CrossAttention),
/// [`TransformerBlock`](crate::block::TransformerBlock), [`Mlp`](crate::block::Mlp) and [`LoraLinear`](crate::adapter::LoraLinear).
///
/// The methods return a new layer, which shares the tensors of the old one. All parameters of the new layer but those of its adapters are
/// constants: no gradient of them is computed. See [the module](crate::adapter) for an example.
pub trait Adapt: Projections + Clone {
    /// This layer with another LoRA adapter, which becomes the active one. For each target, `lora_A.weight` (rank, in) and
    /// `lora_B.weight` (out, rank) are read from `vb` or created in it, under the target's name: `q_proj.lora_A.weight` of an
    /// attention, `attention.q_proj.lora_A.weight` and `mlp.up.lora_A.weight` of a block. New A are uniform in ±1/sqrt(in), new B are
    /// zero, so that a new adapter changes nothing.
    ///
    /// # Errors
    ///
    /// A config that can't be used (see [`LoraConfig::validate`]); a target that the layer doesn't have; a rank above the smaller size of
    /// a target's weight; a name that is empty or that another adapter has; an adapter that is merged; a `vb` of another dtype or device
    /// than the layer's parameters; tensors that `vb` holds in another shape, or that aren't finite; those of another adapter of this layer
    /// (give each adapter a prefix of its own, as `vb.pp(name)`). No parameter is then created.
    fn with_lora(&self, name: &str, config: &LoraConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        check_name(self, name)?;
        check_targets(self, config)?;
        check_builder(self, &vb)?;
        check_scale(config.scale(), vb.dtype())?;
        let parameters = create_parameters(wanted(self, config)?, |_| config.seed, &vb)?;
        let find = |name: String| parameters.iter().find(|(other, _)| *other == name).map(|(_, tensor)| tensor.clone());
        check_own(self, name, &parameters)?;
        let (scale, prefix) = (config.scale(), vb.prefix());
        attach(self, name, config, |target| {
            let (a, b) = (find(format!("{target}.{LORA_A}"))?, find(format!("{target}.{LORA_B}"))?);
            Some(LowRank { a, b, scale, input: Some(prefixed(&prefix, target).into()) })
        })
    }

    /// The names of the adapters, in the order in which they were added.
    fn adapters(&self) -> Vec<String> {
        let projections = self.projections();
        let first = projections.first().map_or(&[][..], |(_, projection)| projection.adapters());
        first.iter().map(|adapter| adapter.name.to_string()).collect()
    }

    /// The name of the adapter that calls use which choose none.
    fn active_adapter(&self) -> Option<String> {
        self.projections().first().and_then(|(_, projection)| projection.active()).map(|name| name.to_string())
    }

    /// The config of an adapter.
    ///
    /// # Errors
    ///
    /// A name that no adapter has.
    fn adapter_config(&self, name: &str) -> Result<LoraConfig> {
        let projections = self.projections();
        let (_, first) = projections.first().ok_or_else(|| candle_core::Error::msg("a layer without projections"))?;
        Ok(LoraConfig::clone(&first.adapter(name)?.config))
    }

    /// The matrices of an adapter with their names in the layer, always in the same order. One that several projections share stands
    /// once, under the first name.
    ///
    /// # Errors
    ///
    /// A name that no adapter has.
    fn adapter_parameters(&self, name: &str) -> Result<Vec<(String, Tensor)>> {
        let mut parameters: Vec<(String, Tensor)> = Vec::new();
        for (target, projection) in self.projections() {
            let Some(LowRank { a, b, .. }) = &projection.adapter(name)?.low_rank else { continue };
            if parameters.iter().all(|(_, other)| other.id() != a.id()) {
                parameters.push((format!("{target}.{LORA_A}"), a.clone()));
            }
            parameters.push((format!("{target}.{LORA_B}"), b.clone()));
        }
        Ok(parameters)
    }

    /// This layer with another active adapter, or with none.
    ///
    /// # Errors
    ///
    /// A name that no adapter has; a merged adapter, unless it is this one.
    fn with_active_adapter(&self, name: Option<&str>) -> Result<Self> {
        self.map_projections(&mut |_, projection| projection.with_active(name))
    }

    /// This layer without an adapter. If it was the active one, no adapter is active.
    ///
    /// # Errors
    ///
    /// A name that no adapter has; an adapter that is merged.
    fn without_adapter(&self, name: &str) -> Result<Self> {
        self.map_projections(&mut |_, projection| projection.without_adapter(name))
    }

    /// This layer with W + s · B · A as the weight of each target. It is as fast as a layer without adapters, and can be saved like one,
    /// unless some of its weights are quantised. Calls can use no other adapter until [`unmerge`](Self::unmerge).
    ///
    /// # Errors
    ///
    /// A name that no adapter has; an adapter that is merged already; a sum that isn't finite; too little memory.
    fn merge(&self, name: &str) -> Result<Self> {
        self.map_projections(&mut |target, projection| {
            let merged = projection.merge(name)?;
            if !is_finite(merged.weight())? {
                let expected = format!("a finite sum with the weight of {target}");
                let got = "NaN or infinity".to_string();
                return Err(AttentionError::Adapter { name: name.into(), expected, got }.into());
            }
            Ok(merged)
        })
    }

    /// The inverse of [`merge`](Self::merge). Quantised weights are those of before. Others are, up to the rounding of a sum and a difference.
    /// A layer without a merged adapter stays as it is.
    ///
    /// # Errors
    ///
    /// Too little memory.
    fn unmerge(&self) -> Result<Self> {
        self.map_projections(&mut |_, projection| projection.unmerge())
    }
}

impl<L: Projections + Clone> Adapt for L {}

/// The names of the matrices behind that of their linear layer, as in PEFT's files.
pub(crate) const LORA_A: &str = "lora_A.weight";
pub(crate) const LORA_B: &str = "lora_B.weight";

/// The layer as constants, with one more adapter.
pub(crate) fn attach<L: Projections>(
    layer: &L,
    name: &str,
    config: &LoraConfig,
    mut low_rank: impl FnMut(&str) -> Option<LowRank>,
) -> Result<L> {
    let (name, config): (Arc<str>, _) = (name.into(), Arc::new(config.clone()));
    layer.frozen().map_projections(&mut |target, projection| {
        let adapter = Adapter { name: name.clone(), config: config.clone(), low_rank: low_rank(target) };
        Ok(projection.with_adapter(adapter))
    })
}

/// Refuses the name of a new adapter, an adapter beside one that is merged, and a layer that takes none.
pub(crate) fn check_name<L: Projections>(layer: &L, name: &str) -> Result<()> {
    // A part of a layer, which ranks share, refuses every change.
    layer.map_projections(&mut |_, projection| Ok(projection.clone()))?;
    let refused = |expected: &str, got: &str| {
        Err(AttentionError::Adapter { name: name.into(), expected: expected.into(), got: got.into() }.into())
    };
    if name.is_empty() {
        return refused("a name", "an empty one");
    }
    for (_, projection) in layer.projections() {
        projection.check_not_merged()?;
        if projection.adapter(name).is_ok() {
            return refused("a name that no other adapter has", "one that is there already");
        }
    }
    Ok(())
}

/// Refuses a `VarBuilder` of another dtype or device than the layer's.
fn check_builder<L: Projections>(layer: &L, vb: &VarBuilder) -> Result<(), AttentionError> {
    let tensor = "VarBuilder of an adapter";
    for (_, projection) in layer.projections() {
        let weight = projection.weight();
        if vb.dtype() != weight.dtype() {
            let expected = format!("{:?}, that of the layer's parameters", weight.dtype());
            return Err(AttentionError::DType { tensor, expected, got: vb.dtype() });
        }
        let (expected, got) = (weight.device().location(), vb.device().location());
        if expected != got {
            return Err(AttentionError::Device { tensor, expected, got });
        }
    }
    Ok(())
}

/// Refuses a factor that the layer's numbers can't hold: infinity times a B of zero is NaN.
pub(crate) fn check_scale(scale: f64, dtype: DType) -> Result<(), AttentionError> {
    check_held("alpha / rank", Some(scale), dtype)
}

/// Refuses matrices that belong to another adapter of the layer.
fn check_own<L: Projections>(layer: &L, name: &str, parameters: &Parameters) -> Result<(), AttentionError> {
    let projections = layer.projections();
    let others = projections.iter().flat_map(|(_, projection)| projection.adapters());
    for (adapter, LowRank { a, b, .. }) in others.filter_map(|adapter| Some((adapter, adapter.low_rank.as_ref()?))) {
        if let Some((shared, _)) = parameters.iter().find(|(_, x)| x.id() == a.id() || x.id() == b.id()) {
            let expected = "matrices of its own (a prefix of its own for the VarBuilder)".to_string();
            let got = format!("`{shared}` of adapter {}", adapter.name);
            return Err(AttentionError::Adapter { name: name.into(), expected, got });
        }
    }
    Ok(())
}

/// Refuses targets that the layer doesn't have.
fn check_targets<L: Projections>(layer: &L, config: &LoraConfig) -> Result<(), AttentionError> {
    let names: Vec<_> = layer.projections().into_iter().map(|(name, _)| name).collect();
    for target in &config.targets {
        let alone = LoraConfig { targets: vec![*target], ..config.clone() };
        if !names.iter().any(|name| L::is_target(name, &alone)) {
            let expected = format!("linear layers that there are: {}", names.join(", "));
            return Err(AttentionError::Config { field: "lora.targets", expected, got: target.to_string() });
        }
    }
    Ok(())
}

/// The parameters of a new adapter.
fn wanted<L: Projections>(layer: &L, config: &LoraConfig) -> Result<Vec<Parameter>, AttentionError> {
    let mut parameters = Vec::new();
    for (name, projection) in layer.projections().into_iter().filter(|(name, _)| L::is_target(name, config)) {
        let [outputs, inputs] = check_rank(&name, projection, config.rank)?;
        let a =
            Parameter { name: format!("{name}.{LORA_A}").into(), shape: vec![config.rank, inputs], init: Init::LoraA };
        let b =
            Parameter { name: format!("{name}.{LORA_B}").into(), shape: vec![outputs, config.rank], init: Init::Zeros };
        parameters.extend([a, b]);
    }
    Ok(parameters)
}

/// The sizes of a target's weight, which the rank must fit.
fn check_rank(name: &str, projection: &Projection, rank: usize) -> Result<[usize; 2], AttentionError> {
    let dims = projection.weight().dims();
    let largest = dims.iter().copied().min().unwrap_or(0);
    match *dims {
        [outputs, inputs] if (1..=largest).contains(&rank) => Ok([outputs, inputs]),
        _ => {
            let expected = format!("1 to {largest} for {name}, whose weight is {dims:?}");
            Err(AttentionError::Config { field: "lora.rank", expected, got: rank.to_string() })
        }
    }
}
