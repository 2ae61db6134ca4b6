//! The error of norms and activations is at most twice that of PyTorch in the same dtype, for every case of
//! tests/golden/make_block_precision.py, as the largest error and as the root mean square.

use std::path::Path;

use candle_attention::Result;
use candle_attention::block::{Activation, geglu, layer_norm, rms_norm, swiglu};
use candle_core::{DType, Device, Tensor, Var};
use serde_json::Value;

use crate::common::{Random, gradients, numbers};

/// The largest ratio to PyTorch's error that the crate promises.
const MAX_RATIO: f64 = 2.0;
/// The epsilon of the script.
const EPS: f64 = 1e-5;
/// The cases of the script. A file with fewer cases is incomplete.
const CASES: usize = 18;

/// The same numbers as the function `draw` of the script.
fn draw(seed: u64, shape: &[usize], rounded: DType, dtype: DType) -> Result<Tensor> {
    let mut random = Random::new(seed);
    let mut number = || {
        let [a, b, c, d] = [(); 4].map(|()| random.uniform());
        (a + b + c + d - 2.0) * 1.7320508075688772
    };
    let numbers = (0..shape.iter().product()).map(|_| number()).collect::<Vec<f64>>();
    let x = Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(DType::F32)?;
    Ok(x.to_dtype(rounded)?.to_dtype(dtype)?)
}

/// Output and gradients by name, computed in `dtype` from inputs that are rounded to `rounded`.
fn results(case: &Value, rounded: DType, dtype: DType) -> Result<Vec<(&'static str, Tensor)>> {
    let size = |name: &str| case[name].as_u64().expect("a size") as usize;
    let (rows, n) = (size("rows"), size("n"));
    let (matrix, vector) = ([rows, n], [n]);
    let var = |seed: u64, shape: &[usize]| {
        Ok::<_, candle_attention::Error>(Var::from_tensor(&draw(seed, shape, rounded, dtype)?)?)
    };
    let x = var(1, &matrix)?;
    let activation = |name: &str| serde_json::from_str::<Activation>(&format!("\"{name}\"")).expect("an activation");
    let (vars, y) = match case["operation"].as_str().expect("a name") {
        "layer_norm" => {
            let (weight, bias) = (var(2, &vector)?, var(3, &vector)?);
            let y = layer_norm(&x, &weight, Some(&bias), EPS)?;
            (vec![("x", x), ("weight", weight), ("bias", bias)], y)
        }
        "rms_norm" => {
            let weight = var(2, &vector)?;
            let y = rms_norm(&x, &weight, EPS)?;
            (vec![("x", x), ("weight", weight)], y)
        }
        name @ ("swiglu" | "geglu") => {
            let up = var(2, &matrix)?;
            let y = if name == "swiglu" { swiglu(&x, &up)? } else { geglu(&x, &up)? };
            (vec![("x", x), ("up", up)], y)
        }
        name => {
            let y = activation(name).forward(&x)?;
            (vec![("x", x)], y)
        }
    };
    // The gradient of the loss with respect to the output is exact in every dtype.
    let loss = (y.to_dtype(DType::F64)? * draw(4, &matrix, rounded, DType::F64)?)?.sum_all()?;
    let grads = gradients(&loss, &vars.iter().map(|(_, var)| var).collect::<Vec<_>>())?;
    let mut results = vec![("output", y)];
    results.extend(vars.iter().map(|(name, _)| *name).zip(grads));
    Ok(results)
}

fn rms(numbers: &[f64]) -> f64 {
    (numbers.iter().map(|x| x * x).sum::<f64>() / numbers.len() as f64).sqrt()
}

/// The rows of the table whose error is too large.
fn check(case: &Value, dtype: DType) -> Result<Vec<String>> {
    let (truth, ours) = (results(case, dtype, DType::F64)?, results(case, dtype, dtype)?);
    let mut failures = Vec::new();
    for ((name, ours), (_, truth)) in ours.iter().zip(&truth) {
        let theirs = &case["errors"][dtype.as_str()][name];
        let number = |what: &str| theirs[what].as_f64().expect("a number");
        let (ours, truth) = (numbers(ours)?, numbers(truth)?);
        let agreed = (rms(&truth) / number("truth") - 1.0).abs();
        assert!(agreed < 1e-9, "{}, {name}: the script computed from other inputs ({agreed:e})", case["operation"]);
        let errors = ours.iter().zip(&truth).map(|(a, b)| (a - b).abs()).collect::<Vec<_>>();
        let (largest, mean) = (errors.iter().copied().fold(0.0, f64::max), rms(&errors));
        let row = format!(
            "{:4} {} {} {name}: max {largest:.2e} / {:.2e}, rms {mean:.2e} / {:.2e}",
            dtype.as_str(),
            case["operation"],
            case["n"],
            number("max"),
            number("rms"),
        );
        println!("{row}");
        // Written so that NaN fails.
        if !(largest <= MAX_RATIO * number("max") && mean <= MAX_RATIO * number("rms")) {
            failures.push(row);
        }
    }
    Ok(failures)
}

fn check_all(dtype: DType) -> anyhow::Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/block_precision.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path)?)?;
    let cases = golden["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), CASES);
    let mut failures = Vec::new();
    for case in cases {
        failures.extend(check(case, dtype)?);
    }
    assert!(failures.is_empty(), "errors of more than {MAX_RATIO} times PyTorch's:\n{}", failures.join("\n"));
    Ok(())
}

#[test]
fn f32_errs_at_most_twice_as_much_as_pytorch() -> anyhow::Result<()> {
    check_all(DType::F32)
}

#[test]
fn f16_errs_at_most_twice_as_much_as_pytorch() -> anyhow::Result<()> {
    check_all(DType::F16)
}

#[test]
fn bf16_errs_at_most_twice_as_much_as_pytorch() -> anyhow::Result<()> {
    check_all(DType::BF16)
}
