//! The parameters of a layer: checked, created, initialised.

use attention_kernels::{philox, reserve};
use candle_core::{DType, Device, Result as CandleResult, Tensor, Var};
use candle_nn::VarBuilder;

use crate::block::norm::check_eps;
use crate::check::{check_dtype, compute_dtype};
use crate::checkpoint::{LayerKind, Parameters, check_all, check_built, prefixed};
use crate::error::{AttentionError, Result};
use crate::layer::config::{Init, Name, Parameter, SelfAttentionConfig};
use crate::memory;
use crate::sdpa::checks::check_scale_and_softcap;

/// Every parameter from the `VarBuilder`. Parameters that it has only just created are initialised from the config's
/// seed.
pub(crate) fn create(config: &SelfAttentionConfig, vb: &VarBuilder) -> Result<Parameters> {
    create_parameters(config.parameters(), |_| config.seed, vb)
}

/// Every parameter of this list from the `VarBuilder`. New ones are initialised from their names and the seed that belongs to the
/// name.
pub(crate) fn create_parameters(
    parameters: Vec<Parameter>,
    seed_of: impl Fn(&str) -> u64,
    vb: &VarBuilder,
) -> Result<Parameters> {
    ask_for_memory(&parameters, vb)?;
    let (old, new): (Vec<_>, Vec<_>) = parameters.into_iter().partition(|x| vb.contains_tensor(&x.name));
    let create =
        |parameter: &Parameter| Ok((parameter.name.clone(), create_one(parameter, seed_of(&parameter.name), vb)?));
    // What is there is checked before anything is created, since a `VarMap` keeps the parameters of a refused layer.
    let mut parameters = old.iter().map(create).collect::<CandleResult<Parameters>>()?;
    let prefix = vb.prefix();
    check_all(parameters.iter().map(|(name, tensor)| (prefixed(&prefix, name), check_built(vb, name, tensor))))?;
    for parameter in &new {
        parameters.push(create(parameter)?);
    }
    Ok(parameters)
}

/// Asks for the memory of all parameters together, before the first is created: a `VarMap` keeps those of a layer that is
/// then refused.
fn ask_for_memory(parameters: &[Parameter], vb: &VarBuilder) -> Result<(), AttentionError> {
    let sizes = parameters.iter().map(|parameter| memory::bytes(&parameter.shape, vb.dtype()));
    // Initial numbers are drawn in f64, and then cast.
    let new = parameters.iter().filter(|parameter| !vb.contains_tensor(&parameter.name));
    let drawn = new.map(|parameter| memory::bytes(&parameter.shape, DType::F64).saturating_mul(2));
    memory::ask("parameters", vb.device(), memory::sum(sizes.chain(drawn.max())))
}

fn create_one(parameter: &Parameter, seed: u64, vb: &VarBuilder) -> CandleResult<Tensor> {
    let Parameter { name, shape, init } = parameter;
    let bound = match shape[..] {
        [_, inputs] if *init == Init::LoraA => 1.0 / (inputs as f64).sqrt(),
        [outputs, inputs] => (6.0 / (inputs + outputs) as f64).sqrt(),
        [entries] => (6.0 / (entries + entries) as f64).sqrt(),
        _ => 0.0,
    };
    let (hint, count) = match init {
        Init::XavierUniform | Init::LoraA => {
            (candle_nn::Init::Uniform { lo: -bound, up: bound }, shape.iter().product())
        }
        Init::Zeros => (candle_nn::Init::Const(0.0), 0),
        Init::Ones => (candle_nn::Init::Const(1.0), 0),
    };
    let is_new = !vb.contains_tensor(name);
    let tensor = vb.get_with_hints(shape.as_slice(), name, hint)?;
    if is_new && count > 0 && tensor.is_variable() {
        // candle's CPU generator can't be seeded, so its numbers are replaced.
        let seed = philox::named_seed(seed, &full_name(&vb.prefix(), name));
        let mut numbers = reserve("initial numbers of a parameter", count).map_err(AttentionError::from)?;
        numbers.extend(philox::uniform(seed, bound, count));
        let numbers = Tensor::from_vec(numbers, shape.as_slice(), &Device::Cpu)?.to_dtype(tensor.dtype())?;
        Var::from_tensor(&tensor)?.set(&numbers.to_device(tensor.device())?)?;
    }
    Ok(tensor)
}

/// Copies of these parameters as new variables.
pub(crate) fn new_variables<N: Into<Name>>(parameters: Vec<(N, &Tensor)>) -> Result<Parameters> {
    if let Some((_, first)) = parameters.first() {
        let bytes = memory::sum(parameters.iter().map(|(_, x)| memory::bytes(x.dims(), x.dtype())));
        memory::ask("trainable parameters", first.device(), bytes)?;
    }
    let variable = |(name, x): (N, &Tensor)| Ok((name.into(), Var::from_tensor(&x.detach())?.into_inner()));
    Ok(parameters.into_iter().map(variable).collect::<CandleResult<_>>()?)
}

/// The name of a parameter in the model.
pub(crate) fn full_name(prefix: &str, name: &str) -> String {
    format!("{prefix}.{name}")
}

/// Checks a config before any parameter is created, since a `VarMap` keeps the parameters of a layer that is then
/// refused.
pub(crate) fn check(kind: LayerKind, config: &SelfAttentionConfig, dtype: DType) -> Result<(), AttentionError> {
    config.check()?;
    check_kind(kind, config)?;
    check_dtype("parameters", dtype)?;
    check_numbers(config, dtype)
}

/// Refuses numbers that a layer in this dtype can't compute with.
fn check_numbers(config: &SelfAttentionConfig, dtype: DType) -> Result<(), AttentionError> {
    check_scale_and_softcap(config.scale, config.softcap, dtype)?;
    check_eps("qk_norm_eps", config.qk_norm_eps, dtype)?;
    config.rotary.as_ref().map_or(Ok(()), |rotary| rotary.check_dtype(dtype))
}

/// Refuses a config that only the other kind of layer can have.
pub(crate) fn check_kind(kind: LayerKind, config: &SelfAttentionConfig) -> Result<(), AttentionError> {
    let refused = |field, expected, got| Err(AttentionError::Config { field, expected, got });
    let same_tokens = || format!("embed_dim {}, since keys and values come from the same tokens", config.embed_dim);
    match kind {
        LayerKind::SelfAttention if config.kv_dim() != config.embed_dim => {
            refused("kv_dim", same_tokens(), config.kv_dim().to_string())
        }
        LayerKind::SelfAttention if config.value_input_dim() != config.embed_dim => {
            refused("value_input_dim", same_tokens(), config.value_input_dim().to_string())
        }
        LayerKind::CrossAttention if config.rotary.is_some() => {
            refused("rotary", "none, since the two sequences share no positions".into(), "one".into())
        }
        _ => Ok(()),
    }
}

/// The slopes of ALiBi. If the number of heads n is a power of two: 2^(-8/n), 2^(-16/n), ... Otherwise the slopes for
/// the next lower power of two, followed by every other slope for the next higher one. (Press et al., ICLR 2022,
/// section 3 and the authors' code.)
pub(crate) fn alibi_slopes(num_heads: usize, dtype: DType, device: &Device) -> CandleResult<Tensor> {
    // A layer in f64 needs slopes in f64: slopes like 2^(-1/2) lose precision in f32.
    let dtype = compute_dtype(dtype);
    let geometric = |heads: usize| (1..=heads).map(move |i| 2f64.powf(-8.0 * i as f64 / heads as f64));
    let lower = if num_heads.is_power_of_two() { num_heads } else { num_heads.next_power_of_two() / 2 };
    let slopes = geometric(lower).chain(geometric(2 * lower).step_by(2)).take(num_heads);
    Tensor::from_iter(slopes, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}
