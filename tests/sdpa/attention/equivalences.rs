//! Different ways to ask for the same attention.

use candle_attention::{AttentionOptions, Backend, Mask};
use candle_core::{D, DType, Device, Result, Tensor, Var};
use proptest::prelude::*;

use crate::common::{Random, assert_close, assert_same_bits, gradients, randn};

use super::setup::{
    F64, SIZES, Sizes, all_results, attend, attend_vars, few, logsumexp, random_sum, sizes, var64, weights,
};

/// 0, 1, ..., `len` - 1 in random order.
fn permutation(len: usize, seed: u64) -> Tensor {
    let mut random = Random::new(seed);
    let mut order: Vec<u32> = (0..len as u32).collect();
    for i in (1..len).rev() {
        order.swap(i, random.below(i + 1));
    }
    Tensor::new(order, &Device::Cpu).unwrap()
}

proptest! {
    #![proptest_config(few())]

    #[test]
    fn order_of_keys_does_not_matter(sizes in sizes(), seed in 0..1u64 << 32) {
        let [query, key, value] = sizes.tensors(seed, DType::F64);
        let bias = randn(seed + 1, &sizes.scores(), DType::F64)?;
        let order = permutation(sizes.kv_len, seed);
        let with_bias = |bias: Tensor| AttentionOptions { attn_bias: Some(bias), ..all_results() };
        let ordered = attend(&[query.clone(), key.clone(), value.clone()], &with_bias(bias.clone()))?;
        let [key, value] = [key, value].map(|x| x.index_select(&order, 2));
        let permuted = attend(&[query, key?, value?], &with_bias(bias.index_select(&order, 3)?))?;
        assert_close(&permuted.context, &ordered.context, F64, "context");
        assert_close(weights(&permuted), &weights(&ordered).index_select(&order, 3)?, F64, "weights");
        assert_close(logsumexp(&permuted), logsumexp(&ordered), F64, "log-sum-exp");
    }

    #[test]
    fn one_token_attends_to_itself(sizes in sizes(), seed in 0..1u64 << 32) {
        let sizes = Sizes { kv_heads: sizes.heads, q_len: 1, kv_len: 1, ..sizes };
        let inputs = sizes.tensors(seed, DType::F32);
        let output = attend(&inputs, &all_results())?;
        assert_same_bits(&output.context, &inputs[2], "context");
        assert_same_bits(weights(&output), &weights(&output).ones_like()?, "weights");
    }

    #[test]
    fn shared_heads_equal_repeated_ones(sizes in sizes(), seed in 0..1u64 << 32) {
        let group = sizes.heads / sizes.kv_heads;
        let vars = sizes.vars(seed, DType::F64);
        let repeat = |x: &Tensor| -> Result<Tensor> {
            let (batch, kv_heads, len, dim) = x.dims4()?;
            let copies = x.unsqueeze(2)?.broadcast_as((batch, kv_heads, group, len, dim))?;
            copies.reshape((batch, kv_heads * group, len, dim))
        };
        let repeated = [vars[0].as_tensor().clone(), repeat(&vars[1])?, repeat(&vars[2])?];
        let (shared, repeated) = (attend_vars(&vars, &all_results())?, attend(&repeated, &all_results())?);
        assert_close(&shared.context, &repeated.context, F64, "context");
        assert_close(weights(&shared), weights(&repeated), F64, "weights");
        let gradients_of = |x: &Tensor| gradients(&random_sum(x, seed).unwrap(), &vars.each_ref());
        for (a, b) in gradients_of(&shared.context)?.iter().zip(gradients_of(&repeated.context)?) {
            assert_close(a, &b, F64, "gradient");
        }
    }

    #[test]
    fn scale_is_a_factor_of_the_query(sizes in sizes(), seed in 0..1u64 << 32, scale in -2.0..2.0f64) {
        let [query, key, value] = sizes.tensors(seed, DType::F64);
        let with_scale = |scale| AttentionOptions { scale: Some(scale), ..all_results() };
        let scaled = attend(&[query.clone(), key.clone(), value.clone()], &with_scale(scale))?;
        let unscaled = attend(&[(query * scale)?, key, value], &with_scale(1.0))?;
        assert_close(&scaled.context, &unscaled.context, F64, "context");
        assert_close(weights(&scaled), weights(&unscaled), F64, "weights");
    }
}

/// The mean of the values, for every query.
fn mean_of_values(sizes: &Sizes, value: &Tensor) -> Result<Tensor> {
    value.mean_keepdim(2)?.broadcast_as((sizes.batch, sizes.heads, sizes.q_len, sizes.value_dim))
}

#[test]
fn scale_of_zero_weighs_all_keys_alike() -> Result<()> {
    let sizes = Sizes { kv_heads: SIZES.heads, ..SIZES };
    let inputs = sizes.tensors(1, DType::F64);
    let options = AttentionOptions { scale: Some(0.0), ..all_results() };
    let output = attend(&inputs, &options)?;
    assert_close(&output.context, &mean_of_values(&sizes, &inputs[2])?, F64, "context");
    let seventh = (weights(&output).ones_like()? / 7.0)?;
    assert_close(weights(&output), &seventh, F64, "weights");
    Ok(())
}

#[test]
fn query_of_zero_weighs_all_keys_alike() -> Result<()> {
    let sizes = Sizes { kv_heads: SIZES.heads, ..SIZES };
    let [query, key, value] = sizes.tensors(2, DType::F64);
    let output = attend(&[query.zeros_like()?, key, value.clone()], &all_results())?;
    assert_close(&output.context, &mean_of_values(&sizes, &value)?, F64, "context");
    Ok(())
}

/// Attention over two halves of the keys, merged: each half is weighted by its share of the sum of exponentials.
fn merged(vars: &[Var; 3], cut: usize, options: &AttentionOptions) -> Result<(Tensor, Tensor)> {
    let half = |start: usize, len: usize| {
        let [key, value] = [&vars[1], &vars[2]].map(|x| x.narrow(2, start, len));
        attend(&[vars[0].as_tensor().clone(), key?, value?], options)
    };
    let halves = [half(0, cut)?, half(cut, SIZES.kv_len - cut)?];
    let [a, b] = halves.each_ref().map(|half| logsumexp(half).unsqueeze(D::Minus1).unwrap());
    let largest = a.maximum(&b)?.detach();
    let whole = ((a.sub(&largest)?.exp()? + b.sub(&largest)?.exp()?)?.log()? + &largest)?;
    let share = |half: &Tensor, lse: &Tensor| half.broadcast_mul(&lse.sub(&whole)?.exp()?);
    let context = (share(&halves[0].context, &a)? + share(&halves[1].context, &b)?)?;
    Ok((context, whole.squeeze(D::Minus1)?))
}

#[test]
fn halves_of_the_keys_merge_by_their_logsumexp() -> Result<()> {
    let vars = SIZES.vars(3, DType::F64);
    for cut in 1..SIZES.kv_len {
        let whole = attend_vars(&vars, &all_results())?;
        let (context, lse) = merged(&vars, cut, &all_results())?;
        assert_close(&context, &whole.context, F64, "context");
        assert_close(&lse, logsumexp(&whole), F64, "log-sum-exp");
        let gradients_of = |context: &Tensor, lse: &Tensor| {
            let loss = (random_sum(context, 4)? + random_sum(lse, 5)?)?;
            gradients(&loss, &vars.each_ref())
        };
        let expected = gradients_of(&whole.context, logsumexp(&whole))?;
        for (a, b) in gradients_of(&context, &lse)?.iter().zip(&expected) {
            assert_close(a, b, F64, "gradient");
        }
    }
    Ok(())
}

#[test]
fn sink_is_one_more_key_with_a_value_of_zero() -> Result<()> {
    let vars = SIZES.vars(6, DType::F64);
    let sinks = var64(7, &[SIZES.heads]);
    let options = AttentionOptions { sinks: Some(sinks.as_tensor().clone()), ..all_results() };
    let with_sink = attend_vars(&vars, &options)?;

    let [batch, heads, q_len, kv_len] = SIZES.scores();
    let one_more = |x: &Var, dim| -> Result<Tensor> {
        let zeros = Tensor::zeros((batch, SIZES.kv_heads, 1, dim), DType::F64, &Device::Cpu)?;
        Tensor::cat(&[x.as_tensor(), &zeros], 2)
    };
    // A key of zeros has the score 0. The bias adds the score of the sink.
    let column = sinks.reshape((1, heads, 1, 1))?.broadcast_as((1, heads, q_len, 1))?;
    let none = Tensor::zeros((1, heads, q_len, kv_len), DType::F64, &Device::Cpu)?;
    let bias = Tensor::cat(&[&none, &column], 3)?;
    let inputs =
        [vars[0].as_tensor().clone(), one_more(&vars[1], SIZES.head_dim)?, one_more(&vars[2], SIZES.value_dim)?];
    let with_key = attend(&inputs, &AttentionOptions { attn_bias: Some(bias), ..all_results() })?;

    assert_close(&with_sink.context, &with_key.context, F64, "context");
    assert_close(weights(&with_sink), &weights(&with_key).narrow(3, 0, kv_len)?, F64, "weights");
    assert_close(logsumexp(&with_sink), logsumexp(&with_key), F64, "log-sum-exp");
    let [query, key, value] = vars.each_ref();
    let gradients_of = |x: &Tensor| gradients(&random_sum(x, 8).unwrap(), &[query, key, value, &sinks]);
    for (a, b) in gradients_of(&with_sink.context)?.iter().zip(gradients_of(&with_key.context)?) {
        assert_close(a, &b, F64, "gradient");
    }
    Ok(())
}

#[test]
fn alibi_is_a_bias_of_distances() -> Result<()> {
    let inputs = SIZES.tensors(9, DType::F64);
    let slopes = [0.5, 0.25, -0.125, 2.0];
    let mut bias = Vec::new();
    for slope in slopes {
        for i in 0..SIZES.q_len {
            let position = i + SIZES.kv_len - SIZES.q_len;
            bias.extend((0..SIZES.kv_len).map(|j| -slope * position.abs_diff(j) as f64));
        }
    }
    let bias = Tensor::from_vec(bias, (SIZES.heads, SIZES.q_len, SIZES.kv_len), &Device::Cpu)?;
    let slopes = Tensor::new(&slopes, &Device::Cpu)?;
    let by_slopes = attend(&inputs, &AttentionOptions { alibi_slopes: Some(slopes), ..all_results() })?;
    let by_bias = attend(&inputs, &AttentionOptions { attn_bias: Some(bias), ..all_results() })?;
    assert_close(&by_slopes.context, &by_bias.context, F64, "context");
    assert_close(logsumexp(&by_slopes), logsumexp(&by_bias), F64, "log-sum-exp");
    Ok(())
}

#[test]
fn bias_that_is_the_same_for_all_keys_moves_only_the_logsumexp() -> Result<()> {
    let inputs = SIZES.tensors(10, DType::F64);
    let bias = randn(11, (SIZES.batch, SIZES.heads, SIZES.q_len, 1), DType::F64)?;
    let plain = attend(&inputs, &all_results())?;
    let options = AttentionOptions { attn_bias: Some(bias.clone()), attn_mask: Mask::full(), ..all_results() };
    let moved = attend(&inputs, &options)?;
    assert_close(&moved.context, &plain.context, F64, "context");
    assert_close(weights(&moved), weights(&plain), F64, "weights");
    assert_close(logsumexp(&moved), &(logsumexp(&plain) + bias.squeeze(3)?)?, F64, "log-sum-exp");
    Ok(())
}

#[test]
fn softcap_bounds_the_scores() -> Result<()> {
    let [query, key, value] = SIZES.tensors(12, DType::F64);
    let options = AttentionOptions { softcap: Some(0.5), ..all_results() };
    let output = attend(&[(query * 100.0)?, key, value], &options)?;
    // The scores are within ±0.5, so that no weight is more than e times another.
    let [least, most] = [weights(&output).min(3)?, weights(&output).max(3)?];
    let ratio = (most / least)?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
    assert!(ratio <= std::f64::consts::E + 1e-9 && ratio > 2.0, "{ratio}");
    Ok(())
}

/// ONNX's Attention has a softcap of 0 where there is none.
#[test]
fn softcap_of_zero_is_none() -> Result<()> {
    for backend in [Backend::Reference, Backend::Fused] {
        for dtype in [DType::F16, DType::F32, DType::F64] {
            let inputs = SIZES.tensors(12, dtype);
            let results = AttentionOptions { backend, ..all_results() };
            let plain = attend(&inputs, &results)?;
            for zero in [0.0, -0.0] {
                let output = attend(&inputs, &AttentionOptions { softcap: Some(zero), ..results.clone() })?;
                assert_same_bits(&output.context, &plain.context, "context");
                assert_same_bits(weights(&output), weights(&plain), "weights");
                assert_same_bits(logsumexp(&output), logsumexp(&plain), "log-sum-exp");
            }
        }
    }
    Ok(())
}
