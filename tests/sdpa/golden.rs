//! Comparison with PyTorch: context, weights, log-sum-exp and all gradients of every case of
//! tests/golden/make_golden.py agree within |Δ| / (1 + |x|) < 1e-5 in f32 and 1e-12 in f64.

use candle_attention::{AttentionOptions, Backend, Mask, scaled_dot_product_attention};
use candle_core::{DType, Tensor, Var};
use serde_json::Value;

use crate::common::{Golden, assert_close, gradients, max_scaled_difference};

/// The number of cases in the script. A file with fewer cases is incomplete.
const CASES: usize = 25;

fn mask(golden: &Golden, case: &Value, dtype: DType) -> candle_core::Result<Mask> {
    let mut mask = match golden.get(name(case), dtype, "attn_mask") {
        Some(allowed) => Mask::from_tensor(allowed)?,
        None => Mask::full(),
    };
    if case["is_causal"] == Value::Bool(true) {
        mask = mask & Mask::causal();
    }
    if let Some(width) = case["window"].as_u64() {
        mask = mask & Mask::sliding_window(width as usize);
    }
    Ok(mask)
}

fn name(case: &Value) -> &str {
    case["name"].as_str().expect("a name")
}

/// The largest difference of one case, and the tensor in which it is.
fn check(
    golden: &Golden,
    case: &Value,
    dtype: DType,
    backend: Backend,
    tolerance: f64,
) -> anyhow::Result<(f64, String)> {
    let name = name(case);
    let input = |tensor| golden.get(name, dtype, tensor).map(Var::from_tensor).transpose();
    let expected = |tensor: &str| golden.expect(name, dtype, tensor);
    let required = |tensor| Var::from_tensor(expected(tensor));
    let (query, key, value) = (required("query")?, required("key")?, required("value")?);
    let (bias, sinks) = (input("attn_bias")?, input("sinks")?);
    let options = AttentionOptions {
        scale: case["scale"].as_f64(),
        softcap: case["softcap"].as_f64(),
        attn_mask: mask(golden, case, dtype)?,
        attn_bias: bias.as_ref().map(|bias| bias.as_tensor().clone()),
        alibi_slopes: golden.get(name, dtype, "alibi_slopes").cloned(),
        sinks: sinks.as_ref().map(|sinks| sinks.as_tensor().clone()),
        backend,
        return_weights: true,
        return_logsumexp: true,
        ..Default::default()
    };
    let output = scaled_dot_product_attention(&query, &key, &value, &options)?;

    let mut inputs = vec![("query", &query), ("key", &key), ("value", &value)];
    inputs.extend(bias.as_ref().map(|bias| ("attn_bias", bias)));
    inputs.extend(sinks.as_ref().map(|sinks| ("sinks", sinks)));
    let loss = (&output.context * expected("grad_context"))?.sum_all()?;
    let grads = gradients(&loss, &inputs.iter().map(|(_, var)| *var).collect::<Vec<_>>())?;

    let mut results: Vec<(String, Tensor)> = vec![
        ("context".into(), output.context),
        ("weights".into(), output.weights.expect("weights")),
        ("logsumexp".into(), output.logsumexp.expect("logsumexp")),
    ];
    let gradient_names = inputs.iter().map(|(input, _)| format!("grad_{input}"));
    results.extend(gradient_names.zip(grads));
    let mut worst = (0.0, String::new());
    for (tensor, result) in results {
        assert_eq!(result.dtype(), dtype, "{name}, {tensor}");
        assert_close(&result, expected(&tensor), tolerance, &format!("{backend:?}, {name}, {tensor}"));
        let difference = max_scaled_difference(&result, expected(&tensor))?;
        if difference > worst.0 {
            worst = (difference, format!("{name}, {tensor}"));
        }
    }
    Ok(worst)
}

fn check_all(dtype: DType, tolerance: f64) -> anyhow::Result<()> {
    let golden = Golden::load("sdpa")?;
    assert!(golden.cases.len() >= CASES, "{} cases", golden.cases.len());
    for backend in [Backend::Reference, Backend::Fused] {
        let mut worst = (0.0, String::new());
        for case in &golden.cases {
            let difference = check(&golden, case, dtype, backend, tolerance)?;
            if difference.0 > worst.0 {
                worst = difference;
            }
        }
        println!("{backend:?}, {dtype:?}: largest difference {:e} ({})", worst.0, worst.1);
    }
    Ok(())
}

#[test]
fn agrees_with_pytorch_in_f32() -> anyhow::Result<()> {
    check_all(DType::F32, 1e-5)
}

#[test]
fn agrees_with_pytorch_in_f64() -> anyhow::Result<()> {
    check_all(DType::F64, 1e-12)
}
