//! Large, small and special numbers.

use candle_attention::{AttentionOptions, AttentionOutput, Backend, Mask};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::common::{assert_close, assert_finite, assert_same_bits, gradients, numbers};

use super::setup::{SIZES, all_results, attend, attend_vars, logsumexp, random_sum, weights};

#[test]
fn scores_of_ten_thousand_do_not_overflow() -> Result<()> {
    // With one feature and a query of 1, the scores are the keys themselves.
    let query = Tensor::new(&[[1f32]], &Device::Cpu)?;
    let key = Tensor::new(&[[1e4f32], [-1e4], [1e4 - 1.0], [0.0]], &Device::Cpu)?;
    let value = Tensor::new(&[[1f32], [10.], [100.], [1000.]], &Device::Cpu)?;
    let output = attend(&[query, key, value], &all_results())?;
    // softmax([0, -1]) = [0.7310586, 0.2689414]
    let (first, third) = (0.731_058_6, 0.268_941_4);
    let expected = Tensor::new(&[[first, 0.0, third, 0.0]], &Device::Cpu)?;
    assert_close(&weights(&output).to_dtype(DType::F64)?, &expected, 1e-6, "weights");
    let context = numbers(&output.context)?[0];
    assert!((context - (first + 100.0 * third)).abs() < 1e-4, "{context}");
    let lse = numbers(logsumexp(&output))?[0];
    assert!((lse - (1e4 - f64::ln(first))).abs() < 2e-3, "{lse}");
    Ok(())
}

#[test]
fn bias_of_ten_thousand_does_not_overflow() -> Result<()> {
    let vars = SIZES.vars(1, DType::F32);
    for bias in [1e4, -1e4] {
        let plain = attend_vars(&vars, &all_results())?;
        let bias = Tensor::new(bias, &Device::Cpu)?;
        let moved = attend_vars(&vars, &AttentionOptions { attn_bias: Some(bias.clone()), ..all_results() })?;
        // Near 1e4, f32 numbers are 1e-3 apart.
        assert_close(&moved.context, &plain.context, 5e-3, "context");
        let expected = logsumexp(&plain).to_dtype(DType::F64)?.broadcast_add(&bias)?;
        assert_close(&logsumexp(&moved).to_dtype(DType::F64)?, &expected, 1e-6, "log-sum-exp");
        for grad in gradients(&random_sum(&moved.context, 2)?, &vars.each_ref())? {
            assert_finite(&grad, "gradient");
        }
    }
    Ok(())
}

/// Factors of query, key and value, and dtypes that can hold the products.
fn sizes_of_numbers() -> Vec<(DType, [f64; 3])> {
    let mut all = Vec::new();
    for dtype in [DType::BF16, DType::F32, DType::F64] {
        for size in [1e30, 1e-30] {
            all.extend([[size, size, size], [size, 1.0, 1.0], [1.0, size, 1.0], [1.0, 1.0, size]].map(|s| (dtype, s)));
        }
        all.push((dtype, [1e30, 1e-30, 1.0]));
    }
    all.extend([[200.0, 200.0, 200.0], [1e-7, 1e-7, 1e-7], [6e4 / 5.0, 6e4 / 5.0, 1.0]].map(|s| (DType::F16, s)));
    all
}

fn scaled_vars((dtype, factors): (DType, [f64; 3])) -> Result<[Var; 3]> {
    let tensors = SIZES.tensors(3, DType::F64);
    let scaled = |i: usize| -> Result<Var> { Var::from_tensor(&(&tensors[i] * factors[i])?.to_dtype(dtype)?) };
    Ok([scaled(0)?, scaled(1)?, scaled(2)?])
}

fn with_scale(scale: f64) -> AttentionOptions {
    AttentionOptions { scale: Some(scale), ..all_results() }
}

fn extreme_options() -> Result<Vec<AttentionOptions>> {
    let capped = AttentionOptions { attn_mask: Mask::causal(), softcap: Some(20.0), ..all_results() };
    let mut all = vec![all_results(), capped, with_scale(1e5), with_scale(-1e-30)];
    for extra in [1e30, -1e30, 1e-30] {
        // In f64, which can be combined with inputs of any dtype. The largest number of f16 is 65,504.
        let heads = (Tensor::ones(SIZES.heads, DType::F64, &Device::Cpu)? * extra)?;
        let bias = Some(heads.reshape((SIZES.heads, 1, 1))?);
        all.extend([
            AttentionOptions { attn_bias: bias, ..all_results() },
            AttentionOptions { alibi_slopes: Some(heads.clone()), ..all_results() },
            AttentionOptions { sinks: Some(heads), ..all_results() },
        ]);
    }
    Ok(all)
}

#[test]
fn finite_input_gives_finite_results() -> Result<()> {
    for case in sizes_of_numbers() {
        let vars = scaled_vars(case)?;
        vars.iter().for_each(|var| assert_finite(var, "the test's own input"));
        for options in extreme_options()? {
            let what = format!("{case:?}, scale {:?}", options.scale);
            let output = attend_vars(&vars, &options)?;
            assert_finite(&output.context, &what);
            assert_finite(logsumexp(&output), &what);
            assert_finite(weights(&output), &what);
            if options.sinks.is_none() {
                let sums = weights(&output).to_dtype(DType::F32)?.sum(3)?;
                assert_close(&sums, &sums.ones_like()?, 2e-2, &what);
            }
        }
    }
    Ok(())
}

#[test]
fn finite_input_never_gives_a_nan_gradient() -> Result<()> {
    for case in sizes_of_numbers() {
        let vars = scaled_vars(case)?;
        for options in extreme_options()? {
            let output = attend_vars(&vars, &options)?;
            let grads = gradients(&random_sum(&output.context, 4)?, &vars.each_ref())?;
            for (grad, name) in grads.iter().zip(["query", "key", "value"]) {
                let nan = numbers(grad)?.iter().filter(|x| x.is_nan()).count();
                assert_eq!(nan, 0, "NaN in the gradient of {name}, {case:?}, {options:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn number_beyond_the_dtype_never_gives_nan() -> Result<()> {
    // f32 can't hold 1e40 or 1e-50. It is correct to refuse them, and it is correct to compute with them.
    let [query, key, value] = SIZES.tensors(8, DType::F32);
    // A score of 0 times infinity is NaN.
    let zeros = Tensor::zeros((1, 1, 1, SIZES.head_dim), DType::F32, &Device::Cpu)?;
    let query = query.slice_assign(&[0..1, 0..1, 0..1, 0..SIZES.head_dim], &zeros)?;
    for number in [1e-50, 1e-40, 1e40, 1e300] {
        let softcap = AttentionOptions { softcap: Some(number), ..all_results() };
        for options in [with_scale(number), with_scale(-number), softcap] {
            if let Ok(output) = attend(&[query.clone(), key.clone(), value.clone()], &options) {
                let what = format!("scale {:?}, softcap {:?}", options.scale, options.softcap);
                assert_finite(&output.context, &what);
                assert_finite(weights(&output), &what);
            }
        }
    }
    Ok(())
}

#[test]
fn dot_products_beyond_the_dtype_may_have_scores_within_it() -> Result<()> {
    // Many dot products are beyond the range of f32, 3.4e38. Their products with the scale are ordinary scores.
    let [query, key, value] = SIZES.tensors(5, DType::F64);
    let huge = [(query * 2e19)?, (key * 2e19)?, value].map(|x| x.to_dtype(DType::F32).unwrap());
    let options = with_scale(2e-38);
    let output = attend(&huge, &options)?;
    let expected = attend(&huge.map(|x| x.to_dtype(DType::F64).unwrap()), &options)?;
    for (result, expected, what) in [
        (&output.context, &expected.context, "context"),
        (weights(&output), weights(&expected), "weights"),
        (logsumexp(&output), logsumexp(&expected), "log-sum-exp"),
    ] {
        assert_close(&result.to_dtype(DType::F64)?, expected, 1e-5, what);
    }
    Ok(())
}

#[test]
fn scores_up_to_the_end_of_the_dtype_pick_the_greatest() -> Result<()> {
    // The dot product of the query and the first key is 1e38, but the products of their features overflow.
    let query = Tensor::new(&[[1e20f32, 1e20]], &Device::Cpu)?;
    let key = Tensor::new(&[[1e20f32, -1e20 + 1e18], [1e15, 1e15], [-1e20, 1e18]], &Device::Cpu)?;
    let value = Tensor::new(&[[1f32], [10.], [100.]], &Device::Cpu)?;
    let output = attend(&[query, key, value], &AttentionOptions { scale: Some(1.0), ..all_results() })?;
    assert_eq!(numbers(weights(&output))?, [1.0, 0.0, 0.0]);
    assert_eq!(numbers(&output.context)?, [1.0]);
    Ok(())
}

/// The results of all queries but query `i`.
fn other_queries(output: &AttentionOutput, i: usize) -> Result<AttentionOutput> {
    let len = output.context.dim(2)?;
    let without = |x: &Tensor| Tensor::cat(&[x.narrow(2, 0, i)?, x.narrow(2, i + 1, len - i - 1)?], 2);
    Ok(AttentionOutput {
        context: without(&output.context)?,
        weights: Some(without(weights(output))?),
        scores: None,
        logsumexp: Some(without(logsumexp(output))?),
    })
}

/// Sets each query in turn to a special number, and checks that the results of the other queries stay the same.
fn check_special_query(dtype: DType, special: f64) -> Result<()> {
    let [query, key, value] = SIZES.tensors(6, dtype);
    let expected = attend(&[query.clone(), key.clone(), value.clone()], &all_results())?;
    for i in 0..SIZES.q_len {
        let row = (query.narrow(2, i, 1)?.ones_like()? * special)?;
        let ranges = [0..SIZES.batch, 0..SIZES.heads, i..i + 1, 0..SIZES.head_dim];
        let special_query = query.slice_assign(&ranges, &row)?;
        let output = attend(&[special_query, key.clone(), value.clone()], &all_results())?;
        let (output, expected) = (other_queries(&output, i)?, other_queries(&expected, i)?);
        let what = format!("{special} in query {i}, {dtype:?}");
        let assert_same = |a: &Tensor, b: &Tensor| match special.is_finite() {
            // If finite numbers overflow, the other backend takes over, which rounds in another order.
            true => assert_close(a, b, 1e-5, &what),
            false => assert_same_bits(a, b, &what),
        };
        assert_same(&output.context, &expected.context);
        assert_same(weights(&output), weights(&expected));
        assert_same(logsumexp(&output), logsumexp(&expected));
    }
    Ok(())
}

#[test]
fn nan_in_one_query_leaves_the_others_alone() -> Result<()> {
    [DType::BF16, DType::F32, DType::F64].into_iter().try_for_each(|dtype| check_special_query(dtype, f64::NAN))
}

/// Also if its first key is hidden, and if numbers are so large that scores would overflow.
#[test]
fn nan_in_a_query_is_in_its_results() -> Result<()> {
    let first_hidden = Mask::from_blocked(&Tensor::new(&[[1u8, 0, 0]], &Device::Cpu)?)?;
    for (size, attn_mask) in
        [(1f32, Mask::full()), (1., first_hidden.clone()), (1e20, Mask::full()), (1e20, first_hidden)]
    {
        let query = Tensor::new(&[[1., 1.], [size, f32::NAN]], &Device::Cpu)?;
        let key = Tensor::new(&[[1., 2.], [1., 3.], [size, 1.]], &Device::Cpu)?;
        for backend in [Backend::Reference, Backend::Auto] {
            let options = AttentionOptions { attn_mask: attn_mask.clone(), backend, ..all_results() };
            let output = attend(&[query.clone(), key.clone(), key.clone()], &options)?;
            let results = [numbers(&output.context.get(1)?)?, numbers(&logsumexp(&output).get(1)?)?].concat();
            assert!(results.iter().all(|x| x.is_nan()), "{results:?} of {size}, {backend:?}");
        }
    }
    Ok(())
}

#[test]
fn infinity_in_one_query_leaves_the_others_alone() -> Result<()> {
    [DType::BF16, DType::F32, DType::F64].into_iter().try_for_each(|dtype| {
        check_special_query(dtype, f64::INFINITY)?;
        check_special_query(dtype, f64::NEG_INFINITY)
    })
}

#[test]
fn huge_query_leaves_the_others_alone() -> Result<()> {
    check_special_query(DType::F32, 3e38)
}

#[test]
fn hidden_key_may_hold_anything() -> Result<()> {
    // The entries of a hidden key don't reach the results, since its score is replaced and not added to.
    let [query, key, value] = SIZES.tensors(7, DType::F32);
    let options = AttentionOptions { attn_mask: Mask::prefix(5), ..all_results() };
    let expected = attend(&[query.clone(), key.clone(), value.clone()], &options)?;
    for special in [f64::NAN, f64::INFINITY, 1e38] {
        let padding = (key.narrow(2, 5, 2)?.ones_like()? * special)?;
        let ranges = [0..SIZES.batch, 0..SIZES.kv_heads, 5..7, 0..SIZES.head_dim];
        let output = attend(&[query.clone(), key.slice_assign(&ranges, &padding)?, value.clone()], &options)?;
        let what = format!("{special} in a hidden key");
        assert_same_bits(&output.context, &expected.context, &what);
        assert_same_bits(logsumexp(&output), logsumexp(&expected), &what);
    }
    Ok(())
}
