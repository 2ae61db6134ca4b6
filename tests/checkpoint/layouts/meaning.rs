//! Each tensor has the meaning that it has in its program: the projections are compared with those that the programs
//! compute.

use candle_attention::Layout;
use candle_core::{D, DType, Result, Tensor};

use crate::common::{assert_close, assert_same_bits, randn};

use super::models::{Model, Tensors, builder, models};

/// x·Wᵀ + b, as `nn.Linear`. The bias is optional.
fn linear(tensors: &Tensors, name: &str, x: &Tensor) -> Result<Tensor> {
    let y = x.matmul(&tensors[&format!("{name}.weight")].t()?)?;
    match tensors.get(&format!("{name}.bias")) {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// Splits the output of one packed matrix into queries, keys and values.
fn split(model: &Model, packed: &Tensor) -> Result<[Tensor; 3]> {
    let config = &model.config;
    let q = config.num_heads * config.head_dim();
    let k = config.num_kv_heads() * config.head_dim();
    let v = config.num_kv_heads() * config.value_dim();
    assert_eq!(packed.dim(D::Minus1)?, q + k + v);
    Ok([packed.narrow(1, 0, q)?, packed.narrow(1, q, k)?, packed.narrow(1, q + k, v)?])
}

/// Splits it as GPT-NeoX and Falcon do: for each key head there are its queries, its key and its value.
fn split_by_key_heads(model: &Model, packed: &Tensor) -> Result<[Tensor; 3]> {
    let (config, len) = (&model.config, packed.dim(0)?);
    let queries = config.num_heads / config.num_kv_heads();
    let heads = packed.reshape((len, config.num_kv_heads(), queries + 2, config.head_dim()))?;
    let take = |start, count| heads.narrow(2, start, count)?.reshape((len, ()));
    Ok([take(0, queries)?, take(queries, 1)?, take(queries + 1, 1)?])
}

/// The projections by W_Q, W_K and W_V, whose inputs can have different sizes, and by W_O, whose input is merged heads.
fn as_published(model: &Model, tensors: &Tensors, [x, key, value, merged]: [&Tensor; 4]) -> Result<[Tensor; 4]> {
    let three = |names: [&str; 3]| -> Result<[Tensor; 3]> {
        Ok([linear(tensors, names[0], x)?, linear(tensors, names[1], key)?, linear(tensors, names[2], value)?])
    };
    let packed = |name| split(model, &linear(tensors, name, x)?);
    let (qkv, o_proj) = match model.layout {
        Layout::Own | Layout::Llama => (three(["q_proj", "k_proj", "v_proj"])?, "o_proj"),
        Layout::OutProj => (three(["q_proj", "k_proj", "v_proj"])?, "out_proj"),
        Layout::Bert => (three(["self.query", "self.key", "self.value"])?, "output.dense"),
        Layout::Vit => (three(["attention.query", "attention.key", "attention.value"])?, "output.dense"),
        Layout::T5 => (three(["q", "k", "v"])?, "o"),
        Layout::QkvProj => (packed("qkv_proj")?, "o_proj"),
        Layout::Wqkv => (packed("Wqkv")?, "out_proj"),
        Layout::GptNeox => (split_by_key_heads(model, &linear(tensors, "query_key_value", x)?)?, "dense"),
        Layout::ModernBert => (packed("Wqkv")?, "Wo"),
        Layout::Torch => return as_pytorch(model, tensors, [x, key, value, merged]),
        // Conv1D: x·W + b.
        Layout::Gpt2 => {
            let conv = |name: &str, x: &Tensor| {
                x.matmul(&tensors[&format!("{name}.weight")])?.broadcast_add(&tensors[&format!("{name}.bias")])
            };
            let [q, k, v] = split(model, &conv("c_attn", x)?)?;
            return Ok([q, k, v, conv("c_proj", merged)?]);
        }
        other => panic!("{other} has no formula here"),
    };
    let [q, k, v] = qkv;
    Ok([q, k, v, linear(tensors, o_proj, merged)?])
}

/// `nn.MultiheadAttention`, whose bias is packed even if its weights are not.
fn as_pytorch(model: &Model, tensors: &Tensors, [x, key, value, merged]: [&Tensor; 4]) -> Result<[Tensor; 4]> {
    let weights = match tensors.get("in_proj_weight") {
        Some(packed) => packed.chunk(3, 0)?,
        None => ["q_proj_weight", "k_proj_weight", "v_proj_weight"].map(|name| tensors[name].clone()).to_vec(),
    };
    let biases = match tensors.get("in_proj_bias") {
        Some(packed) => packed.chunk(3, 0)?,
        None => vec![Tensor::zeros(model.config.embed_dim, x.dtype(), x.device())?; 3],
    };
    let project = |i: usize, x: &Tensor| x.matmul(&weights[i].t()?)?.broadcast_add(&biases[i]);
    let (q, k, v) = (project(0, x)?, project(1, key)?, project(2, value)?);
    Ok([q, k, v, linear(tensors, "out_proj", merged)?])
}

#[test]
fn projections_are_those_of_the_program() -> Result<()> {
    for model in models() {
        let tensors = model.tensors(DType::F64)?;
        let layer = model.layer_from(builder(&tensors, DType::F64))?;
        let config = &model.config;
        let tokens = |seed, dim| randn(seed, (3, dim), DType::F64);
        let inputs = [
            tokens(50, config.embed_dim)?,
            if config.kv_dim.is_some() { tokens(51, config.kv_dim())? } else { tokens(50, config.embed_dim)? },
            if config.kv_dim.is_some() { tokens(52, config.value_input_dim())? } else { tokens(50, config.embed_dim)? },
            tokens(53, config.num_heads * config.value_dim())?,
        ];
        let expected = as_published(&model, &tensors, inputs.each_ref())?;
        let projections = layer.projections().map(|projection| projection.expect("all four"));
        for (i, (projection, (x, expected))) in projections.into_iter().zip(inputs.iter().zip(&expected)).enumerate() {
            let y = candle_nn::Module::forward(projection, x)?;
            assert_close(&y, expected, 1e-13, &format!("{}, projection {i}", model.name));
        }
    }
    Ok(())
}

/// Parameters other than projections are the same numbers.
#[test]
fn norms_sinks_and_learned_keys_are_those_of_the_program() -> Result<()> {
    let mut seen = 0;
    for model in models() {
        let tensors = model.tensors(DType::F32)?;
        let layer = model.layer_from(builder(&tensors, DType::F32))?;
        for (name, parameter) in layer.parameters() {
            if matches!(name, "q_norm.weight" | "k_norm.weight" | "sinks" | "bias_k" | "bias_v") {
                assert_same_bits(parameter, &tensors[name].flatten_all()?, &format!("{}, {name}", model.name));
                seen += 1;
            }
        }
    }
    assert_eq!(seen, 10);
    Ok(())
}
