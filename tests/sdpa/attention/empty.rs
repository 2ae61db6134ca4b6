//! Queries that may attend to no key, and empty inputs: the results are zeros or empty, never NaN.

use candle_attention::{AttentionOptions, AttentionOutput, Mask};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::common::{assert_close, assert_finite, assert_same_bits, gradients, randn};

use super::setup::{F64, SIZES, Sizes, all_results, attend_vars, everything, logsumexp, random_sum, var64, weights};

#[track_caller]
fn assert_zeros(x: &Tensor, what: &str) {
    // The absolute value, since -0 is allowed.
    assert_same_bits(&x.abs().unwrap(), &x.zeros_like().unwrap(), what);
}

#[track_caller]
fn assert_no_attention(output: &AttentionOutput) {
    assert_zeros(&output.context, "context");
    assert_zeros(weights(output), "weights");
    let lse = logsumexp(output);
    assert_same_bits(lse, &(lse.zeros_like().unwrap() + f64::NEG_INFINITY).unwrap(), "log-sum-exp");
}

/// The sum of all finite results, so that gradients flow through context, weights and log-sum-exp at once.
fn loss(output: &AttentionOutput) -> Result<Tensor> {
    let lse = logsumexp(output);
    let lse = lse.ge(-1e30)?.where_cond(lse, &lse.zeros_like()?)?;
    (random_sum(&output.context, 21)? + random_sum(weights(output), 22)?)? + random_sum(&lse, 23)?
}

/// Every way to hide all keys from all queries.
fn options_that_hide_all_keys() -> Result<Vec<AttentionOptions>> {
    let zeros = Tensor::zeros((SIZES.q_len, SIZES.kv_len), DType::U8, &Device::Cpu)?;
    let masks = [
        Mask::prefix(0),
        Mask::key_lengths(&[0, 0]),
        Mask::sliding_window(0),
        Mask::from_tensor(&zeros)?,
        Mask::causal() & Mask::causal().with_offset(100) & Mask::prefix(0),
    ];
    let mut all: Vec<_> = masks.map(|attn_mask| AttentionOptions { attn_mask, ..all_results() }).into();
    let bias = (Tensor::zeros((1, 1), DType::F64, &Device::Cpu)? + f64::NEG_INFINITY)?;
    all.push(AttentionOptions { attn_bias: Some(bias), ..all_results() });
    all.push(AttentionOptions { softcap: Some(2.0), dropout_p: 0.5, ..all[0].clone() });
    Ok(all)
}

#[test]
fn query_that_sees_nothing_gives_zeros_and_has_no_gradient() -> Result<()> {
    for dtype in [DType::BF16, DType::F16, DType::F32, DType::F64] {
        for options in options_that_hide_all_keys()? {
            let vars = SIZES.vars(1, dtype);
            let output = attend_vars(&vars, &options)?;
            assert_no_attention(&output);
            let [query, key, value] = vars.each_ref();
            for loss in [output.context.clone(), weights(&output).clone(), logsumexp(&output).clone()] {
                let mut grads = loss.sum_all()?.backward()?;
                for var in [query, key] {
                    assert_zeros(&grads.remove(var.as_tensor()).expect("a gradient"), "gradient");
                }
                if let Some(grad) = grads.remove(value.as_tensor()) {
                    assert_zeros(&grad, "gradient of value");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn query_that_sees_nothing_leaves_the_others_as_they_were() -> Result<()> {
    // The mask hides all keys from query 2 of every head. The other queries may attend to all keys.
    let mut allowed = [[1u8; 7]; 5];
    allowed[2] = [0; 7];
    let options =
        AttentionOptions { attn_mask: Mask::from_tensor(&Tensor::new(&allowed, &Device::Cpu)?)?, ..all_results() };
    let vars = SIZES.vars(2, DType::F64);
    let (masked, plain) = (attend_vars(&vars, &options)?, attend_vars(&vars, &all_results())?);
    let row = |output: &AttentionOutput, i: usize| AttentionOutput {
        context: output.context.narrow(2, i, 1).unwrap(),
        weights: Some(weights(output).narrow(2, i, 1).unwrap()),
        scores: None,
        logsumexp: Some(logsumexp(output).narrow(2, i, 1).unwrap()),
    };
    assert_no_attention(&row(&masked, 2));
    let rows = [0, 1, 3, 4];
    for i in rows {
        super::setup::assert_same_output(&row(&masked, i), &row(&plain, i));
    }
    let grads = gradients(&loss(&masked)?, &vars.each_ref())?;
    assert_zeros(&grads[0].narrow(2, 2, 1)?, "gradient of the query without keys");

    // The gradients equal those of a loss over the other rows.
    let mut expected = Tensor::new(0f64, &Device::Cpu)?;
    let parts = [(&plain.context, 21), (weights(&plain), 22), (logsumexp(&plain), 23)];
    for (x, seed) in parts {
        let products = (x * randn(seed, x.shape(), DType::F64)?)?;
        for i in rows {
            expected = (expected + products.narrow(2, i, 1)?.sum_all()?)?;
        }
    }
    for (a, b) in grads.iter().zip(gradients(&expected, &vars.each_ref())?) {
        assert_close(a, &b, F64, "gradient");
    }
    Ok(())
}

#[test]
fn query_that_sees_only_its_sink_gives_zeros() -> Result<()> {
    let vars = SIZES.vars(3, DType::F64);
    let sinks = var64(4, &[SIZES.heads]);
    let options =
        AttentionOptions { attn_mask: Mask::prefix(0), sinks: Some(sinks.as_tensor().clone()), ..all_results() };
    let output = attend_vars(&vars, &options)?;
    assert_zeros(&output.context, "context");
    assert_zeros(weights(&output), "weights");
    let sink = sinks.reshape((1, (), 1))?.broadcast_as(logsumexp(&output).shape())?;
    assert_close(logsumexp(&output), &sink, F64, "log-sum-exp");
    let [query, key, value] = vars.each_ref();
    let grads = gradients(&output.context.sum_all()?, &[query, key, value, &sinks])?;
    grads.iter().for_each(|grad| assert_zeros(grad, "gradient"));
    Ok(())
}

#[test]
fn sink_of_minus_infinity_is_none() -> Result<()> {
    let vars = SIZES.vars(3, DType::F64);
    let none = (Tensor::zeros(SIZES.heads, DType::F64, &Device::Cpu)? + f64::NEG_INFINITY)?;
    for attn_mask in [Mask::full(), Mask::prefix(0)] {
        let plain = AttentionOptions { attn_mask, ..all_results() };
        let output = attend_vars(&vars, &AttentionOptions { sinks: Some(none.clone()), ..plain.clone() })?;
        super::setup::assert_same_output(&output, &attend_vars(&vars, &plain)?);
        for grad in gradients(&loss(&output)?, &vars.each_ref())? {
            assert_finite(&grad, "gradient");
        }
    }
    Ok(())
}

#[test]
fn no_keys_give_zeros_that_are_connected_to_the_input() -> Result<()> {
    let sizes = Sizes { kv_len: 0, ..SIZES };
    for dtype in [DType::BF16, DType::F32, DType::F64] {
        let vars = sizes.vars(5, dtype);
        let masks = [Mask::full(), Mask::causal(), Mask::key_lengths(&[0, 0])];
        for attn_mask in masks {
            let output = attend_vars(&vars, &AttentionOptions { attn_mask, ..all_results() })?;
            assert_eq!(output.context.dims(), [2, 4, 5, 3]);
            assert_eq!(weights(&output).dims(), [2, 4, 5, 0]);
            assert_no_attention(&output);
            let grads = gradients(&output.context.sum_all()?, &vars.each_ref())?;
            grads.iter().for_each(|grad| assert_zeros(grad, "gradient"));
        }
    }
    Ok(())
}

#[test]
fn no_keys_with_everything_at_once_give_zeros() -> Result<()> {
    let sizes = Sizes { kv_len: 0, ..SIZES };
    let vars = sizes.vars(6, DType::F64);
    let bias = var64(7, &[SIZES.q_len, 0]);
    let (slopes, sinks) = (var64(8, &[SIZES.heads]), var64(9, &[SIZES.heads]));
    let options = AttentionOptions {
        attn_bias: Some(bias.as_tensor().clone()),
        alibi_slopes: Some(slopes.as_tensor().clone()),
        sinks: Some(sinks.as_tensor().clone()),
        ..everything(&sizes, 10, DType::F64)
    };
    let output = attend_vars(&vars, &options)?;
    assert_zeros(&output.context, "context");
    let sink = sinks.reshape((1, (), 1))?.broadcast_as(logsumexp(&output).shape())?;
    assert_close(logsumexp(&output), &sink, F64, "log-sum-exp");
    let [query, key, value] = vars.each_ref();
    let grads = gradients(&output.context.sum_all()?, &[query, key, value, &slopes, &sinks])?;
    grads.iter().for_each(|grad| assert_zeros(grad, "gradient"));
    Ok(())
}

/// No queries, no sequences, no heads, no features of the values, and several of these together.
#[test]
fn empty_input_gives_empty_results_forward_and_backward() -> Result<()> {
    let no_queries = Sizes { q_len: 0, ..SIZES };
    let no_batch = Sizes { batch: 0, ..SIZES };
    for sizes in [
        no_queries,
        no_batch,
        Sizes { heads: 0, ..SIZES },
        Sizes { value_dim: 0, ..SIZES },
        Sizes { kv_len: 0, ..no_queries },
        Sizes { kv_len: 0, ..no_batch },
        Sizes { batch: 0, kv_len: 0, ..no_queries },
        Sizes { value_dim: 0, kv_len: 0, ..SIZES },
    ] {
        for (dtype, all) in [(DType::F32, false), (DType::F64, true), (DType::BF16, true)] {
            check_empty(&sizes, dtype, all).map_err(|error| error.context(format!("{sizes:?} {dtype:?} {all}")))?;
        }
    }
    Ok(())
}

fn check_empty(sizes: &Sizes, dtype: DType, all: bool) -> Result<()> {
    let Sizes { batch, heads, q_len, kv_len, value_dim, .. } = *sizes;
    let vars: [Var; 3] = sizes.vars(11, dtype);
    let options = if all { everything(sizes, 12, dtype) } else { all_results() };
    let output = attend_vars(&vars, &options)?;
    assert_eq!(output.context.dims(), [batch, heads, q_len, value_dim]);
    assert_eq!(weights(&output).dims(), [batch, heads, q_len, kv_len]);
    assert_eq!(logsumexp(&output).dims(), [batch, heads, q_len]);
    for grad in gradients(&output.context.sum_all()?, &vars.each_ref())? {
        assert_zeros(&grad, "gradient");
    }
    Ok(())
}

/// Without keys, every input still has a gradient of zeros, also a bias that has no entries itself.
#[test]
fn inputs_of_attention_without_keys_have_gradients_of_zero() -> Result<()> {
    for dtype in [DType::F16, DType::F32, DType::F64] {
        let sizes = Sizes { kv_len: 0, ..SIZES };
        for bias in [[1, 1, 1, 0], [1, 1, 1, 1], [2, 4, 5, 0]] {
            let vars = sizes.vars(1, dtype);
            let extra = |seed, shape: &[usize]| Var::from_tensor(&randn(seed, shape, dtype)?);
            let others = [extra(5, &bias)?, extra(6, &[sizes.heads])?];
            let [attn_bias, alibi_slopes] = others.each_ref().map(|var| Some(var.as_tensor().clone()));
            let output = attend_vars(&vars, &AttentionOptions { attn_bias, alibi_slopes, ..all_results() })?;
            for (what, result) in [("context", &output.context), ("weights", weights(&output))] {
                let wanted = vars[..2].iter().chain(&others).collect::<Vec<_>>();
                for gradient in gradients(&result.sum_all()?, &wanted)? {
                    assert_zeros(&gradient, what);
                }
            }
        }
    }
    Ok(())
}

/// Whichever result the loss is computed from, query, key, bias, slopes and sinks have gradients of zeros, not missing
/// ones.
#[test]
fn nothing_that_attends_has_gradients_of_zero() -> Result<()> {
    for dtype in [DType::F16, DType::F32, DType::F64] {
        for sizes in [Sizes { batch: 0, ..SIZES }, Sizes { q_len: 0, ..SIZES }] {
            let vars = sizes.vars(1, dtype);
            let extra = |seed, shape: &[usize]| Var::from_tensor(&randn(seed, shape, DType::F32)?);
            let others = [extra(5, &[1, 1, 1, sizes.kv_len])?, extra(6, &[sizes.heads])?, extra(7, &[sizes.heads])?];
            let [bias, slopes, sinks] = others.each_ref().map(|var| Some(var.as_tensor().clone()));
            let options = AttentionOptions { attn_bias: bias, alibi_slopes: slopes, sinks, ..all_results() };
            let output = attend_vars(&vars, &options)?;
            for (what, result) in
                [("context", &output.context), ("weights", weights(&output)), ("lse", logsumexp(&output))]
            {
                let loss = result.sum_all()?;
                let wanted = vars[..2].iter().chain(&others).collect::<Vec<_>>();
                for gradient in gradients(&loss, &wanted)? {
                    assert_zeros(&gradient, what);
                }
            }
        }
    }
    Ok(())
}
