//! Losses beside PyTorch's, in every dtype: the error is at most twice PyTorch's.

use candle_attention::block::{CrossEntropyOptions, Reduction, cross_entropy, linear_cross_entropy};
use candle_core::{DType, Tensor, Var};
use serde_json::Value;

use crate::common::{Golden, gradients, numbers};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

fn options(case: &Value) -> CrossEntropyOptions {
    CrossEntropyOptions {
        label_smoothing: case["smoothing"].as_f64().expect("a number"),
        ignore_index: case["ignore_index"].as_i64(),
        reduction: if case["reduction"] == "sum" { Reduction::Sum } else { Reduction::Mean },
    }
}

/// The root of the mean square of the differences.
fn error(x: &Tensor, truth: &Tensor) -> f64 {
    let squares = numbers(x).unwrap().into_iter().zip(numbers(truth).unwrap()).map(|(x, y)| (x - y).powi(2));
    (squares.sum::<f64>() / truth.elem_count() as f64).sqrt()
}

/// Compares what `loss` computes of some inputs, and the gradients.
fn check(golden: &Golden, case: &str, dtype: DType, names: &[&str], loss: impl Fn(&[Var]) -> Tensor) {
    let part = |name: String| golden.expect(case, dtype, &name);
    let vars: Vec<Var> = names.iter().map(|name| Var::from_tensor(part(format!("in.{name}"))).unwrap()).collect();
    let result = loss(&vars);
    let mut results = vec![("result".to_string(), result.detach())];
    let grads = gradients(&result, &vars.iter().collect::<Vec<_>>()).unwrap();
    results.extend(names.iter().map(|name| format!("grad_{name}")).zip(grads));
    for (name, ours) in results {
        let truth = part(format!("truth.{name}"));
        let (ours, theirs) = (error(&ours, truth), error(part(format!("torch.{name}")), truth));
        // One rounding of a number is no error of ours where PyTorch happens to have none. In f64 its result is the truth itself.
        let (rounding, is_forgiven) = match dtype {
            DType::F64 => (1e-14, true),
            DType::F32 => (6e-8, truth.elem_count() == 1),
            DType::F16 => (5e-4, truth.elem_count() == 1),
            _ => (4e-3, truth.elem_count() == 1),
        };
        let size = (numbers(truth).unwrap().iter().map(|x| x * x).sum::<f64>() / truth.elem_count() as f64).sqrt();
        println!("{case} {dtype:?} {name}: {ours:.2e}, PyTorch {theirs:.2e}, size {size:.2e}");
        let slack = if is_forgiven { rounding * size } else { 0.0 };
        assert!(ours <= 2.0 * theirs + slack, "{case} {dtype:?} {name}: {ours:e}, PyTorch {theirs:e}");
    }
}

#[test]
fn losses_of_logits_err_at_most_twice_as_much_as_pytorchs() {
    let golden = Golden::load("training").unwrap();
    for (case, dtype) in golden.cases.iter().flat_map(|case| DTYPES.map(|dtype| (case, dtype))) {
        let name = case["name"].as_str().expect("a name");
        let targets = golden.raw(&format!("{name}.targets"));
        let loss = |vars: &[Var]| cross_entropy(&vars[0], targets, &options(case)).unwrap();
        check(&golden, &format!("ce_{name}"), dtype, &["logits"], loss);
    }
}

#[test]
fn losses_of_a_linear_layer_err_at_most_twice_as_much_as_pytorchs() {
    let golden = Golden::load("training").unwrap();
    for (case, dtype) in golden.cases.iter().flat_map(|case| DTYPES.map(|dtype| (case, dtype))) {
        let name = case["name"].as_str().expect("a name");
        let targets = golden.raw(&format!("{name}.targets"));
        let loss = |vars: &[Var]| {
            let [hidden, weight, bias] = [0, 1, 2].map(|i| vars[i].as_tensor());
            linear_cross_entropy(hidden, weight, Some(bias), targets, &options(case)).unwrap()
        };
        check(&golden, &format!("head_{name}"), dtype, &["hidden", "weight", "bias"], loss);
    }
}
