//! Attention over any small shapes, strides, masks and options, forward and backward. The fused path gives the numbers of
//! the reference in f64. It returns an error where the reference does, and where it can't serve. It never panics, and the
//! sanitizer checks that it stays within its memory.

#![no_main]

mod case;

use candle_attention::{AttentionError, AttentionOptions, Backend, Error, Result, scaled_dot_product_attention};
use candle_core::{DType, Tensor, Var};
use case::{Case, Extra, uniform};
use libfuzzer_sys::fuzz_target;

/// The context, the log-sum-exp if the case asks for it, and the gradients of everything that is trained.
fn run(case: &Case, dtype: DType, backend: Backend) -> Result<Vec<Tensor>> {
    let vars = case.inputs.each_ref().map(|input| input.var(dtype));
    let [q, k, v] = vars;
    let (q, k, v) = (q?, k?, v?);
    let mut leaves = vec![q.clone(), k.clone(), v.clone()];
    let mut extra = |extra: &Option<Extra>| -> Result<Option<Tensor>> {
        let Some(Extra { input, trained, dtype: own }) = extra else { return Ok(None) };
        // In f64 everything is f64, which holds all numbers of the other dtypes.
        let own = if dtype == DType::F64 { dtype } else { own.unwrap_or(dtype) };
        let var: Var = input.var(own)?;
        if !trained {
            return Ok(Some(input.view(&var.detach())?));
        }
        leaves.push(var.clone());
        Ok(Some(input.view(&var)?))
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
        Ok((x * factors)?.sum_all()?)
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
        results.push(gradient.unwrap_or_else(|| panic!("no gradient of shape {:?}: {case:?}", leaf.dims())));
    }
    results.iter().map(|x| Ok(x.to_dtype(DType::F64)?.flatten_all()?)).collect()
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

/// The rounding error that is allowed for scores near 1. candle sums the gradients of half types in that type.
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
        // The fused path can't serve all options.
        (Err(Error::Attention(AttentionError::Backend { .. })), Ok(_)) => return,
        (fused, plain) => panic!("fused {:?}, reference {:?}: {case:?}", fused.err(), plain.err()),
    };
    let exact = run(&case, DType::F64, Backend::Reference).expect("a case that one dtype can serve, f64 can serve");
    // Errors grow with the scores and with the length of the sums.
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
