//! The error of the fused operation beside that of PyTorch's kernel of the same dtype, for every case of
//! tests/golden/make_precision.py. It is measured for the context and for every gradient in f32, f16 and bf16, as the
//! largest error and as the root mean square.

use std::path::Path;

use candle_attention::{AttentionOptions, Backend, Mask, scaled_dot_product_attention};
use candle_core::{DType, Device, Result, Tensor, Var};
use serde_json::Value;

use crate::common::{Random, gradients, numbers};

/// The number of cases in the script. A file with fewer cases is incomplete.
const CASES: usize = 10;

/// One problem of the script.
struct Case<'a>(&'a Value);

impl Case<'_> {
    fn size(&self, name: &str) -> usize {
        self.0[name].as_u64().expect("a size") as usize
    }

    fn name(&self) -> &str {
        self.0["name"].as_str().expect("a name")
    }

    /// The same numbers as the function `draw` of the script.
    fn draw(&self, seed: u64, shape: &[&str], dtype: DType) -> Result<Tensor> {
        let shape = shape.iter().map(|axis| self.size(axis)).collect::<Vec<_>>();
        let mut random = Random::new(seed);
        let mut number = || {
            let [a, b, c, d] = [(); 4].map(|()| random.uniform());
            (a + b + c + d - 2.0) * 1.7320508075688772
        };
        let numbers = (0..shape.iter().product()).map(|_| number()).collect::<Vec<f64>>();
        Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(DType::F32)?.to_dtype(dtype)
    }

    fn mask(&self) -> Mask {
        match self.0["key_lengths"].as_array() {
            Some(lengths) => {
                let lengths = lengths.iter().map(|len| len.as_u64().expect("a length") as usize);
                Mask::key_lengths(&lengths.collect::<Vec<_>>())
            }
            None if self.0["is_causal"] == Value::Bool(true) => Mask::causal(),
            None => Mask::full(),
        }
    }

    /// Context and gradients by name, computed in `dtype` from inputs that are rounded to `rounded`.
    fn results(&self, rounded: DType, dtype: DType, backend: Backend) -> Result<Vec<(&'static str, Tensor)>> {
        let query = ["batch", "heads", "q_len", "head_dim"];
        let key = ["batch", "kv_heads", "kv_len", "head_dim"];
        let input = |seed, shape: &[&str]| self.draw(seed, shape, rounded)?.to_dtype(dtype);
        let var = |seed, shape: &[&str]| Var::from_tensor(&input(seed, shape)?);
        let mut vars = vec![("query", var(1, &query)?), ("key", var(2, &key)?), ("value", var(3, &key)?)];
        let mut attn_bias = None;
        if let Some(kind) = self.0["bias"].as_str() {
            let bias = var(5, &["heads", "q_len", "kv_len"])?;
            attn_bias = Some(if kind == "trained" { bias.as_tensor().clone() } else { bias.as_detached_tensor() });
            vars.extend((kind == "trained").then_some(("bias", bias)));
        }
        let options = AttentionOptions { attn_mask: self.mask(), attn_bias, backend, ..Default::default() };
        let context = scaled_dot_product_attention(&vars[0].1, &vars[1].1, &vars[2].1, &options)?.context;
        let loss = (&context * input(4, &query)?)?.sum_all()?;
        let grads = gradients(&loss, &vars.iter().map(|(_, var)| var).collect::<Vec<_>>())?;
        let mut results = vec![("context", context.detach())];
        results.extend(vars.iter().map(|(name, _)| *name).zip(grads));
        Ok(results)
    }
}

fn rms(numbers: &[f64]) -> f64 {
    (numbers.iter().map(|x| x * x).sum::<f64>() / numbers.len() as f64).sqrt()
}

/// The rows of the table whose error is too large.
fn check(case: &Case, dtype: DType, max_ratio: f64) -> Result<Vec<String>> {
    let truth = case.results(dtype, DType::F64, Backend::Reference)?;
    let ours = case.results(dtype, dtype, Backend::Fused)?;
    let mut failures = Vec::new();
    for ((name, ours), (_, truth)) in ours.iter().zip(&truth) {
        let theirs = &case.0["errors"][dtype.as_str()][name];
        let number = |what: &str| theirs[what].as_f64().expect("a number");
        let (ours, truth) = (numbers(ours)?, numbers(truth)?);
        let agreed = (rms(&truth) / number("truth") - 1.0).abs();
        assert!(agreed < 1e-9, "{}, {name}: the script computed from other inputs ({agreed:e})", case.name());
        let errors = ours.iter().zip(&truth).map(|(a, b)| (a - b).abs()).collect::<Vec<_>>();
        let (largest, mean) = (errors.iter().copied().fold(0.0, f64::max), rms(&errors));
        let (of_largest, of_rms) = (largest / number("max"), mean / number("rms"));
        let row = format!(
            "{:4} {:18} {name:8} max {largest:.2e} / {:.2e} = {of_largest:4.2}   rms {mean:.2e} / {:.2e} = {of_rms:4.2}",
            dtype.as_str(),
            case.name(),
            number("max"),
            number("rms"),
        );
        println!("{row}");
        // Written so that NaN fails.
        if !(of_largest <= max_ratio && of_rms <= max_ratio) {
            failures.push(row);
        }
    }
    Ok(failures)
}

/// Checks every case of the script in a dtype.
pub fn check_all(dtype: DType, max_ratio: f64) -> anyhow::Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/precision.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path)?)?;
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() >= CASES, "{} cases", cases.len());
    let mut failures = Vec::new();
    for case in cases {
        failures.extend(check(&Case(case), dtype, max_ratio)?);
    }
    assert!(failures.is_empty(), "errors of more than {max_ratio} times PyTorch's:\n{}", failures.join("\n"));
    Ok(())
}
