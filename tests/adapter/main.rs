//! Adapters: their formula, their gradients, merging, the choice of one, and bad input.

#[path = "../common/blocks.rs"]
mod blocks_common;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/grids.rs"]
mod grids;
#[path = "../common/layers.rs"]
mod layers;

mod choice;
mod dropout;
mod errors;
mod formula;
mod peft;
mod quantised;
mod training;

use candle_attention::Result;
use candle_attention::adapter::{Adapt, LoraConfig, Target};
use candle_core::{DType, Device, Var};
use candle_nn::{VarBuilder, VarMap};

use crate::common::randn;

/// Rank 2 with s = 1.5 on every linear layer of a block with an ungated MLP.
fn config() -> LoraConfig {
    use Target::{Down, Key, Output, Query, Up, Value};
    LoraConfig { targets: vec![Query, Key, Value, Output, Up, Down], ..LoraConfig::new(2, 3.0) }
}

/// The targets that the layer has.
fn all_of(layer: &impl Adapt) -> Result<Vec<Target>> {
    let alone = |target| LoraConfig { targets: vec![target], ..LoraConfig::new(1, 1.0) };
    let has = |target: &Target| layer.with_lora("probe", &alone(*target), vb(layer)).is_ok();
    Ok(Target::ALL.into_iter().filter(has).collect())
}

/// A `VarBuilder` of an empty `VarMap` in the layer's dtype, the only one that an adapter can have.
fn vb(layer: &impl Adapt) -> VarBuilder<'static> {
    let one = |target| LoraConfig { targets: vec![target], ..LoraConfig::new(1, 1.0) };
    let in_dtype = |dtype| VarBuilder::from_varmap(&VarMap::new(), dtype, &Device::Cpu);
    let fits = |dtype: &DType| {
        [Target::Query, Target::Up]
            .into_iter()
            .any(|target| layer.with_lora("probe", &one(target), in_dtype(*dtype)).is_ok())
    };
    in_dtype([DType::F64, DType::F32, DType::F16, DType::BF16].into_iter().find(fits).expect("a dtype"))
}

/// The layer with an adapter of this name on all that it has, whose matrices are random: B isn't zero.
fn adapted<L: Adapt>(layer: &L, name: &str, config: &LoraConfig, seed: u64) -> Result<L> {
    let config = LoraConfig { targets: all_of(layer)?, ..config.clone() };
    let adapted = layer.with_lora(name, &config, vb(layer))?;
    for ((_, var), seed) in matrices(&adapted, name)?.into_iter().zip(seed * 1000..) {
        var.set(&randn(seed, var.shape(), DType::F64)?.affine(0.3, 0.0)?.to_dtype(var.dtype())?)?;
    }
    Ok(adapted)
}

/// The variables of an adapter.
fn matrices(layer: &impl Adapt, name: &str) -> Result<Vec<(String, Var)>> {
    let variable = |(name, tensor)| Ok((name, Var::from_tensor(&tensor)?));
    layer.adapter_parameters(name)?.into_iter().map(variable).collect()
}
