//! Attention over any small shapes, strides, masks and options, forward and backward: the fused path gives what the
//! reference gives in f64, or an error where the reference gives one or the fused path says what it doesn't serve. It
//! never panics, and the sanitizer sees it stay inside its memory.

#![no_main]

mod case;

use candle_attention::{AttentionOptions, Backend, scaled_dot_product_attention};
use candle_core::{DType, Error, Result, Tensor, Var};
use case::{Case, Extra, uniform};
use libfuzzer_sys::fuzz_target;

/// Context, log-sum-exp if it was asked for, and the gradients of everything that is trained.
fn run(case: &Case, dtype: DType, backend: Backend) -> Result<Vec<Tensor>> {
    let vars = case.inputs.each_ref().map(|input| input.var(dtype));
    let [q, k, v] = vars;
    let (q, k, v) = (q?, k?, v?);
    let mut leaves = vec![q.clone(), k.clone(), v.clone()];
    let mut extra = |extra: &Option<Extra>| -> Result<Option<Tensor>> {
        let Some(Extra { input, trained, dtype: own }) = extra else { return Ok(None) };
        // In f64 all numbers that the other dtypes hold.
        let own = if dtype == DType::F64 { dtype } else { own.unwrap_or(dtype) };
        let var: Var = input.var(own)?;
        if !trained {
            return input.view(&var.detach()).map(Some);
        }
        leaves.push(var.clone());
        input.view(&var).map(Some)
    };
    let options = AttentionOptions {
        attn_bias: extra(&case.bias)?,
        sinks: extra(&case.sinks)?,
        alibi_slopes: case.slopes.as_ref().map(|input| input.tensor(dtype)).transpose()?,
        backend,
        ..case.options.clone()
    };
    let [of_q, of_k, of_v] = &case.inputs;
    let output = scaled_dot_product_attention(&of_q.view(&q)?, &of_k.view(&k)?, &of_v.view(&v)?, &options)?;
    let weigh = |x: &Tensor| -> Result<Tensor> {
        let x = x.to_dtype(DType::F64)?;
        let factors = uniform(1, 1.0, x.dims(), DType::F64)?;
        (x * factors)?.sum_all()
    };
    let mut results = vec![output.context.detach()];
    let mut loss = weigh(&output.context)?;
    if let Some(logsumexp) = output.logsumexp {
        results.push(logsumexp.detach());
        let seen = logsumexp.gt(f64::NEG_INFINITY)?;
        loss = (loss + weigh(&seen.where_cond(&logsumexp, &logsumexp.zeros_like()?)?)?)?;
    }
    let mut grads = loss.backward()?;
    for leaf in &leaves {
        let gradient = grads.remove(leaf);
        results.push(gradient.ok_or_else(|| Error::msg(format!("no gradient of shape {:?}", leaf.dims())))?);
    }
    results.iter().map(|x| x.to_dtype(DType::F64)?.flatten_all()).collect()
}

/// max |a - b| / (1 + |b|), infinite if one of them is NaN and the other isn't.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims(), "shapes differ");
    let numbers = |x: &Tensor| x.to_vec1::<f64>().expect("numbers in f64");
    let differ = |(x, y): (f64, f64)| match x == y {
        true => 0.0,
        false => Some((x - y).abs() / (1.0 + y.abs())).filter(|d| !d.is_nan()).unwrap_or(f64::INFINITY),
    };
    numbers(a).into_iter().zip(numbers(b)).map(differ).fold(0.0, f64::max)
}

/// Rounding that is let pass for scores near 1; candle sums half types' gradients in that type.
fn floor(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 5e-6,
        DType::F16 => 5e-3,
        _ => 4e-2,
    }
}

fuzz_target!(|case: Case| {
    let fused = run(&case, case.dtype, Backend::Fused);
    let plain = run(&case, case.dtype, Backend::Reference);
    let (fused, plain) = match (fused, plain) {
        (Ok(fused), Ok(plain)) => (fused, plain),
        (Err(_), Err(_)) => return,
        // It says what it doesn't serve.
        (Err(error), Ok(_)) if error.to_string().contains("backend Fused: expected") => return,
        (fused, plain) => panic!("fused {:?}, reference {:?}: {case:?}", fused.err(), plain.err()),
    };
    let exact = run(&case, DType::F64, Backend::Reference).expect("what serves in one dtype serves in f64");
    // Errors of large scores and of long sums grow with them.
    let scale = case.options.scale.unwrap_or(1.0).abs();
    let size = 1.0 + scale * 4.0 * case.sizes.dim as f64;
    for (i, exact) in exact.iter().enumerate() {
        let (own, allowed) = (difference(&fused[i], exact), difference(&plain[i], exact));
        assert!(
            own <= 4.0 * allowed + size * floor(case.dtype),
            "result {i}: {own:e}, reference {allowed:e}: {case:?}"
        );
    }
});
