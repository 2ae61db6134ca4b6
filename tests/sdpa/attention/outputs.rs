//! The results, and that a request for one of them changes no other.

use candle_attention::AttentionOptions;
use candle_core::{DType, Result, Tensor};
use proptest::prelude::*;

use crate::common::{assert_close, assert_same_bits, gradients, numbers, randn};

use super::setup::{
    F64, SIZES, all_results, assert_same_output, attend, attend_vars, everything, few, logsumexp, random_sum, sizes,
    weights,
};

proptest! {
    #![proptest_config(few())]

    #[test]
    fn rows_of_weights_sum_to_one(sizes in sizes(), seed in 0..1u64 << 32) {
        let output = attend(&sizes.tensors(seed, DType::F64), &all_results())?;
        prop_assert!(numbers(weights(&output))?.iter().all(|w| (0.0..=1.0).contains(w)));
        let sums = weights(&output).sum(3)?;
        assert_close(&sums, &sums.ones_like()?, F64, "sum of a row");
    }

    #[test]
    fn sink_takes_the_rest_of_each_row(sizes in sizes(), seed in 0..1u64 << 32) {
        let sinks = randn(seed + 1, sizes.heads, DType::F64)?;
        let options = AttentionOptions { sinks: Some(sinks.clone()), ..all_results() };
        let output = attend(&sizes.tensors(seed, DType::F64), &options)?;
        let share = sinks.reshape((1, sizes.heads, 1))?.broadcast_sub(logsumexp(&output))?.exp()?;
        let sums = (weights(&output).sum(3)? + share)?;
        assert_close(&sums, &sums.ones_like()?, F64, "sum of a row and its sink");
    }

    #[test]
    fn context_is_the_weighted_sum_of_values(sizes in sizes(), seed in 0..1u64 << 32) {
        let inputs = sizes.tensors(seed, DType::F64);
        let options = AttentionOptions { dropout_p: 0.0, ..everything(&sizes, seed, DType::F64) };
        let output = attend(&inputs, &options)?;
        let value = inputs[2].unsqueeze(2)?.repeat((1, 1, sizes.heads / sizes.kv_heads, 1, 1))?;
        let value = value.reshape((sizes.batch, sizes.heads, sizes.kv_len, sizes.value_dim))?;
        assert_close(&output.context, &weights(&output).matmul(&value)?, F64, "context");
    }
}

#[test]
fn results_come_only_when_asked_for() -> Result<()> {
    let inputs = SIZES.tensors(1, DType::F32);
    for (return_weights, return_logsumexp) in [(false, false), (true, false), (false, true), (true, true)] {
        let options = AttentionOptions { return_weights, return_logsumexp, ..Default::default() };
        let output = attend(&inputs, &options)?;
        assert_eq!((output.weights.is_some(), output.logsumexp.is_some()), (return_weights, return_logsumexp));
        assert_eq!(output.context.dims(), [2, 4, 5, 3]);
        assert!(output.weights.is_none_or(|weights| weights.dims() == [2, 4, 5, 7]));
        assert!(output.logsumexp.is_none_or(|logsumexp| logsumexp.dims() == [2, 4, 5]));
    }
    Ok(())
}

#[test]
fn asking_for_a_result_changes_no_other_number() -> Result<()> {
    for dtype in [DType::BF16, DType::F32, DType::F64] {
        let vars = SIZES.vars(2, dtype);
        let all = everything(&SIZES, 3, dtype);
        let full = attend_vars(&vars, &all)?;
        let grads_of = |context: &Tensor| gradients(&random_sum(context, 4).unwrap(), &vars.each_ref());
        let full_grads = grads_of(&full.context)?;
        for (return_weights, return_logsumexp) in [(false, false), (true, false), (false, true)] {
            let options = AttentionOptions { return_weights, return_logsumexp, ..all.clone() };
            let output = attend_vars(&vars, &options)?;
            assert_same_output(&output, &full);
            for (a, b) in grads_of(&output.context)?.iter().zip(&full_grads) {
                assert_same_bits(a, b, "gradient");
            }
        }
    }
    Ok(())
}

#[test]
fn same_input_gives_the_same_numbers() -> Result<()> {
    let inputs = SIZES.tensors(5, DType::F32);
    let options = everything(&SIZES, 6, DType::F32);
    let first = attend(&inputs, &options)?;
    for _ in 0..3 {
        assert_same_output(&attend(&inputs, &options)?, &first);
    }
    Ok(())
}

#[test]
fn results_have_the_dtypes_that_are_documented() -> Result<()> {
    for (dtype, logsumexp_dtype) in
        [(DType::F16, DType::F32), (DType::BF16, DType::F32), (DType::F32, DType::F32), (DType::F64, DType::F64)]
    {
        let output = attend(&SIZES.tensors(7, dtype), &all_results())?;
        assert_eq!(output.context.dtype(), dtype);
        assert_eq!(weights(&output).dtype(), dtype);
        assert_eq!(logsumexp(&output).dtype(), logsumexp_dtype);
    }
    Ok(())
}
