//! Comparison with PyTorch for the parts of a layer, in every case of tests/golden/make_golden.py: rotary embedding,
//! and the normalisation of queries and keys, alone and inside a layer.

use std::collections::HashMap;

use candle_attention::block::rms_norm;
use candle_attention::rotary::{Pairing, RotaryConfig, RotaryEmbedding};
use candle_attention::{SelfAttention, SelfAttentionConfig};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use serde_json::Value;

use crate::common::{Golden, assert_close, gradients, max_scaled_difference, randn};

/// The numbers of rotary and RMS norm cases in the script. A file with fewer cases is incomplete.
const ROTARY_CASES: usize = 8;
const RMS_NORM_CASES: usize = 1;

const DTYPES: [(DType, f64); 2] = [(DType::F32, 1e-5), (DType::F64, 1e-12)];

fn cases<'a>(golden: &'a Golden, kind: &str, at_least: usize) -> Vec<(&'a str, &'a Value)> {
    let cases = golden.cases.iter().filter(|case| case["kind"] == kind);
    let cases: Vec<_> = cases.map(|case| (case["name"].as_str().expect("a name"), case)).collect();
    assert!(cases.len() >= at_least, "{} cases of {kind}", cases.len());
    cases
}

/// Compares results with the tensors of the same name from the script. Returns the largest difference.
fn check(golden: &Golden, (case, dtype): (&str, DType), tolerance: f64, results: &[(&str, &Tensor)]) -> f64 {
    let mut worst = 0f64;
    for (tensor, result) in results {
        let (what, expected) = (format!("{case}, {tensor}"), golden.expect(case, dtype, tensor));
        assert_eq!(result.dtype(), dtype, "{what}");
        assert_close(result, expected, tolerance, &what);
        worst = worst.max(max_scaled_difference(result, expected).unwrap());
    }
    worst
}

#[test]
fn rotary_embedding_agrees_with_pytorch() -> anyhow::Result<()> {
    let golden = Golden::load("layer_parts")?;
    for (dtype, tolerance) in DTYPES {
        let mut worst = 0f64;
        for (name, case) in cases(&golden, "rotary", ROTARY_CASES) {
            let config = RotaryConfig {
                base: case["base"].as_f64().expect("a base"),
                dim: case["rotary_dim"].as_u64().map(|dim| dim as usize),
                pairing: serde_json::from_value::<Pairing>(case["pairing"].clone())?,
                ..RotaryConfig::default()
            };
            let x = Var::from_tensor(golden.expect(name, dtype, "x"))?;
            let rotary = RotaryEmbedding::new(&config, x.dim(D::Minus1)?)?;
            let offset = case["offset"].as_u64().expect("an offset") as usize;
            let out = rotary.apply(&x, offset)?;
            let loss = (&out * golden.expect(name, dtype, "grad_out"))?.sum_all()?;
            let grad = &gradients(&loss, &[&x])?[0];
            worst = worst.max(check(&golden, (name, dtype), tolerance, &[("out", &out), ("grad_x", grad)]));
        }
        println!("rotary, {dtype:?}: largest difference {worst:e}");
    }
    Ok(())
}

#[test]
fn rms_norm_agrees_with_pytorch() -> anyhow::Result<()> {
    let golden = Golden::load("layer_parts")?;
    for (dtype, tolerance) in DTYPES {
        let mut worst = 0f64;
        for (name, case) in cases(&golden, "rms_norm", RMS_NORM_CASES) {
            let x = Var::from_tensor(golden.expect(name, dtype, "x"))?;
            let weight = Var::from_tensor(golden.expect(name, dtype, "weight"))?;
            let out = rms_norm(&x, &weight, case["eps"].as_f64().expect("an epsilon"))?;
            let loss = (&out * golden.expect(name, dtype, "grad_out"))?.sum_all()?;
            let grads = gradients(&loss, &[&x, &weight])?;
            let results = [("out", &out), ("grad_x", &grads[0]), ("grad_weight", &grads[1])];
            worst = worst.max(check(&golden, (name, dtype), tolerance, &results));
        }
        println!("RMS norm, {dtype:?}: largest difference {worst:e}");
    }
    Ok(())
}

/// A single head whose projections are identities, so that queries, keys and values are the input.
fn bare_layer(eps: f64, q_norm: &Var, k_norm: &Var) -> candle_core::Result<SelfAttention> {
    let (dim, dtype) = (q_norm.dim(0)?, q_norm.dtype());
    let identity = Tensor::eye(dim, dtype, &Device::Cpu)?;
    let mut tensors: HashMap<String, Tensor> =
        ["q", "k", "v"].map(|name| (format!("{name}_proj.weight"), identity.clone())).into();
    tensors.insert("q_norm.weight".into(), q_norm.as_tensor().clone());
    tensors.insert("k_norm.weight".into(), k_norm.as_tensor().clone());
    let config = SelfAttentionConfig { qk_norm_eps: Some(eps), ..SelfAttentionConfig::single_head(dim, dim, dim) };
    Ok(SelfAttention::new(&config, VarBuilder::from_tensors(tensors, dtype, &Device::Cpu))?)
}

/// softmax(q·kᵀ / sqrt(dim)), exponentials over their sum.
fn weights_by_hand(q: &Tensor, k: &Tensor) -> candle_core::Result<Tensor> {
    let scores = (q.contiguous()?.matmul(&k.t()?.contiguous()?)? / (q.dim(D::Minus1)? as f64).sqrt())?;
    let exponentials = scores.exp()?;
    exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)
}

fn normalise(x: &Tensor, weight: &Tensor, eps: f64) -> candle_core::Result<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean_square + eps)?.sqrt()?)?.broadcast_mul(weight)
}

/// If both weights are those of the golden case, queries and keys are the results of PyTorch's `rms_norm`.
#[test]
fn layer_attends_with_the_normalised_queries_and_keys_of_pytorch() -> anyhow::Result<()> {
    let golden = Golden::load("layer_parts")?;
    for (dtype, tolerance) in DTYPES {
        for (name, case) in cases(&golden, "rms_norm", RMS_NORM_CASES) {
            let weight = Var::from_tensor(golden.expect(name, dtype, "weight"))?;
            let layer = bare_layer(case["eps"].as_f64().expect("an epsilon"), &weight, &weight)?;
            // The axes (batch, heads) become a batch of single heads.
            let x = golden.expect(name, dtype, "x").flatten(0, 1)?;
            let normalised = golden.expect(name, dtype, "out").flatten(0, 1)?;
            let expected = weights_by_hand(&normalised, &normalised)?;
            let (output, weights) = layer.forward_with_weights(&x)?;
            assert_close(&weights, &expected.unsqueeze(1)?, tolerance, "weights");
            assert_close(&output, &expected.matmul(&x)?, tolerance, "output");
        }
    }
    Ok(())
}

/// Queries and keys have different weights. The gradients of both weights and of the input are compared, too.
#[test]
fn layer_with_qk_norm_equals_normalising_by_hand() -> anyhow::Result<()> {
    let golden = Golden::load("layer_parts")?;
    for (dtype, tolerance) in DTYPES {
        for (name, case) in cases(&golden, "rms_norm", RMS_NORM_CASES) {
            let eps = case["eps"].as_f64().expect("an epsilon");
            let x = Var::from_tensor(&golden.expect(name, dtype, "x").flatten(0, 1)?)?;
            let q_norm = Var::from_tensor(golden.expect(name, dtype, "weight"))?;
            let k_norm = Var::from_tensor(&randn(1, q_norm.shape(), dtype)?)?;
            let vars = [&x, &q_norm, &k_norm];
            let cotangent = golden.expect(name, dtype, "grad_out").flatten(0, 1)?;

            let output = bare_layer(eps, &q_norm, &k_norm)?.forward(&x)?;
            let grads = gradients(&(&output * &cotangent)?.sum_all()?, &vars)?;
            let weights = weights_by_hand(&normalise(&x, &q_norm, eps)?, &normalise(&x, &k_norm, eps)?)?;
            let expected = weights.matmul(&x)?;
            let expected_grads = gradients(&(&expected * &cotangent)?.sum_all()?, &vars)?;

            assert_close(&output, &expected, tolerance, "output");
            for (what, (grad, expected)) in ["x", "q_norm", "k_norm"].iter().zip(grads.iter().zip(&expected_grads)) {
                assert_close(grad, expected, tolerance, &format!("{dtype:?}, gradient of {what}"));
            }
        }
    }
    Ok(())
}
