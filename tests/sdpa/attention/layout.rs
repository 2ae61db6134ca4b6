//! Ranks and strides: the memory layout of the input changes nothing.

use candle_attention::{AttentionOptions, Mask, scaled_dot_product_attention};
use candle_core::{DType, Result, Tensor, Var};

use crate::common::{assert_same_bits, gradients, randn};

use super::setup::{
    SIZES, Sizes, all_results, assert_same_output, attend, attend_vars, everything, logsumexp, random_sum, weights,
};

/// Views with other strides and offsets that hold the same numbers.
fn views(x: &Tensor) -> Result<Vec<Tensor>> {
    let (batch, heads, len, dim) = x.dims4()?;
    let by_token = x.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
    let by_column = x.t()?.contiguous()?.t()?;
    let by_head = x.transpose(0, 1)?.contiguous()?.transpose(0, 1)?;
    // The middle of a tensor that is larger on every side.
    let larger = randn(77, (batch + 1, heads + 2, len + 3, dim + 2), x.dtype())?;
    let middle = (1..batch + 1, 1..heads + 1, 2..len + 2, 1..dim + 1);
    let larger = larger.slice_assign(&[middle.0, middle.1, middle.2, middle.3], x)?;
    let inner = larger.narrow(0, 1, batch)?.narrow(1, 1, heads)?.narrow(2, 2, len)?.narrow(3, 1, dim)?;
    // One of three interleaved parts, as from a fused projection.
    let interleaved = Tensor::stack(&[&(x * 2.0)?, x, &(x * 3.0)?], 3)?.narrow(3, 1, 1)?.squeeze(3)?;
    Ok(vec![by_token, by_column, by_head, inner, interleaved])
}

#[test]
fn strides_do_not_matter() -> Result<()> {
    for dtype in [DType::BF16, DType::F32, DType::F64] {
        let vars = SIZES.vars(1, dtype);
        let options = everything(&SIZES, 2, dtype);
        let expected = attend_vars(&vars, &options)?;
        let expected_grads = gradients(&random_sum(&expected.context, 3)?, &vars.each_ref())?;
        let [queries, keys, values] = vars.each_ref().map(|var| views(var).unwrap());
        // Each input is another kind of view, so that their strides differ.
        for i in 0..queries.len() {
            let inputs = [&queries[i], &keys[(i + 1) % keys.len()], &values[(i + 2) % values.len()]];
            assert!(inputs.iter().all(|x| !x.is_contiguous()));
            let output = attend(&inputs.map(Clone::clone), &options)?;
            assert_same_output(&output, &expected);
            let grads = gradients(&random_sum(&output.context, 3)?, &vars.each_ref())?;
            for (a, b) in grads.iter().zip(&expected_grads) {
                assert_same_bits(a, b, "gradient");
            }
        }
    }
    Ok(())
}

#[test]
fn strides_of_the_extras_do_not_matter() -> Result<()> {
    let inputs = SIZES.tensors(4, DType::F32);
    let bias = randn(5, &SIZES.scores(), DType::F32)?;
    let pair = randn(6, (SIZES.heads, 2), DType::F32)?;
    let of = |bias: &Tensor, column: &Tensor| AttentionOptions {
        attn_bias: Some(bias.clone()),
        alibi_slopes: Some(column.clone()),
        sinks: Some(column.clone()),
        ..all_results()
    };
    let column = pair.narrow(1, 1, 1)?.squeeze(1)?;
    assert!(!column.is_contiguous());
    let expected = attend(&inputs, &of(&bias, &column.contiguous()?))?;
    for bias in views(&bias)? {
        assert_same_output(&attend(&inputs, &of(&bias, &column))?, &expected);
    }
    Ok(())
}

#[test]
fn broadcast_inputs_equal_copied_ones() -> Result<()> {
    // One key and one value, broadcast over sequences and heads without a copy.
    let [query, key, value] = SIZES.tensors(7, DType::F32);
    let shared = |x: &Tensor| x.narrow(0, 0, 1)?.narrow(1, 0, 1)?.broadcast_as(x.shape());
    let (key, value) = (shared(&key)?, shared(&value)?);
    let copied = [query.clone(), key.force_contiguous()?, value.force_contiguous()?];
    assert_same_output(&attend(&[query, key, value], &all_results())?, &attend(&copied, &all_results())?);
    Ok(())
}

#[test]
fn three_axes_are_one_head() -> Result<()> {
    let sizes = Sizes { heads: 1, kv_heads: 1, ..SIZES };
    let vars = sizes.vars(8, DType::F32);
    let options = everything(&sizes, 9, DType::F32);
    let expected = attend_vars(&vars, &options)?;
    let [query, key, value] = vars.each_ref().map(|var| var.squeeze(1).unwrap());
    let output = scaled_dot_product_attention(&query, &key, &value, &options)?;
    assert_same_bits(&output.context, &expected.context.squeeze(1)?, "context");
    assert_same_bits(weights(&output), &weights(&expected).squeeze(1)?, "weights");
    assert_same_bits(logsumexp(&output), &logsumexp(&expected).squeeze(1)?, "log-sum-exp");
    assert_same_gradients(&vars, &output.context, &expected.context)
}

#[test]
fn two_axes_are_one_head_of_one_sequence() -> Result<()> {
    let sizes = Sizes { batch: 1, heads: 1, kv_heads: 1, ..SIZES };
    let vars = sizes.vars(10, DType::F32);
    let options = AttentionOptions { attn_mask: Mask::causal(), ..all_results() };
    let expected = attend_vars(&vars, &options)?;
    let two_axes = |x: &Tensor| x.squeeze(0)?.squeeze(0);
    let [query, key, value] = vars.each_ref().map(|var| two_axes(var).unwrap());
    let output = scaled_dot_product_attention(&query, &key, &value, &options)?;
    assert_same_bits(&output.context, &two_axes(&expected.context)?, "context");
    assert_same_bits(weights(&output), &two_axes(weights(&expected))?, "weights");
    assert_same_bits(logsumexp(&output), &two_axes(logsumexp(&expected))?, "log-sum-exp");
    assert_same_gradients(&vars, &output.context, &expected.context)
}

fn assert_same_gradients(vars: &[Var; 3], a: &Tensor, b: &Tensor) -> Result<()> {
    let of = |context: &Tensor| gradients(&random_sum(context, 11).unwrap(), &vars.each_ref());
    for (a, b) in of(a)?.iter().zip(of(b)?) {
        assert_same_bits(a, &b, "gradient");
    }
    Ok(())
}

#[test]
fn values_may_have_another_dim_than_keys() -> Result<()> {
    for (head_dim, value_dim) in [(6, 1), (1, 6), (6, 0)] {
        let sizes = Sizes { head_dim, value_dim, ..SIZES };
        let vars = sizes.vars(12, DType::F64);
        let output = attend_vars(&vars, &all_results())?;
        assert_eq!(output.context.dims(), [2, 4, 5, value_dim]);
        // Each feature of the context depends only on the same feature of the values.
        for feature in 0..value_dim {
            let one = vars[2].narrow(3, feature, 1)?;
            let alone = attend(&[vars[0].as_tensor().clone(), vars[1].as_tensor().clone(), one], &all_results())?;
            let difference = crate::common::max_abs_difference(&output.context.narrow(3, feature, 1)?, &alone.context)?;
            assert!(difference < 1e-12, "{difference}");
        }
        gradients(&random_sum(&output.context, 13)?, &vars.each_ref())?;
    }
    Ok(())
}
