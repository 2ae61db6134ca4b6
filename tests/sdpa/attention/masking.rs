//! Hidden keys have no influence: the result is attention over the other keys.

use candle_attention::{AttentionOptions, Mask};
use candle_core::{DType, Device, Result, Tensor, Var};
use proptest::prelude::*;

use crate::common::{assert_close, assert_same_bits, gradients, randn};

use super::setup::{
    F64, SIZES, Sizes, all_results, assert_same_output, attend, attend_vars, few, logsumexp, random_sum, sizes, weights,
};

fn masked(attn_mask: Mask) -> AttentionOptions {
    AttentionOptions { attn_mask, ..all_results() }
}

/// The first `len` rows of `x` along its third axis, then other numbers.
fn with_another_end(x: &Tensor, len: usize, seed: u64) -> Result<Tensor> {
    let (batch, heads, all, dim) = x.dims4()?;
    let end = randn(seed, (batch, heads, all - len, dim), x.dtype())?;
    Tensor::cat(&[&x.narrow(2, 0, len)?, &end], 2)
}

proptest! {
    #![proptest_config(few())]

    #[test]
    fn causal_row_ignores_future(sizes in sizes(), seed in 0..1u64 << 32, half in any::<bool>()) {
        let sizes = Sizes { kv_len: sizes.q_len + sizes.kv_len - 1, ..sizes };
        let dtype = if half { DType::BF16 } else { DType::F32 };
        let [query, key, value] = sizes.tensors(seed, dtype);
        let options = masked(Mask::causal());
        let before = attend(&[query.clone(), key.clone(), value.clone()], &options)?;
        for row in 0..sizes.q_len {
            let seen = row + 1 + sizes.kv_len - sizes.q_len;
            let (key, value) = (with_another_end(&key, seen, seed + 1)?, with_another_end(&value, seen, seed + 2)?);
            let after = attend(&[query.clone(), key, value], &options)?;
            let rows = |x: &Tensor| x.narrow(2, 0, row + 1);
            assert_same_bits(&rows(&before.context)?, &rows(&after.context)?, "context");
            assert_same_bits(&rows(weights(&before))?, &rows(weights(&after))?, "weights");
            assert_same_bits(&rows(logsumexp(&before))?, &rows(logsumexp(&after))?, "log-sum-exp");
        }
    }

    #[test]
    fn mask_equals_a_bias_of_minus_infinity(sizes in sizes(), seed in 0..1u64 << 32) {
        let vars = sizes.vars(seed, DType::F64);
        let mask = Mask::causal() | Mask::prefix(1);
        let allowed = mask.to_tensor((sizes.batch, sizes.heads, sizes.q_len, sizes.kv_len), &Device::Cpu)?;
        let zeros = Tensor::zeros(allowed.shape(), DType::F64, &Device::Cpu)?;
        let bias = allowed.where_cond(&zeros, &(&zeros + f64::NEG_INFINITY)?)?;
        let by_mask = attend_vars(&vars, &masked(mask))?;
        let by_bias = attend_vars(&vars, &AttentionOptions { attn_bias: Some(bias), ..all_results() })?;
        assert_close(&by_mask.context, &by_bias.context, F64, "context");
        assert_close(weights(&by_mask), weights(&by_bias), F64, "weights");
        assert_close(logsumexp(&by_mask), logsumexp(&by_bias), F64, "log-sum-exp");
        let gradients_of = |context: &Tensor| gradients(&random_sum(context, seed + 9).unwrap(), &vars.each_ref());
        for (a, b) in gradients_of(&by_mask.context)?.iter().zip(gradients_of(&by_bias.context)?) {
            assert_close(a, &b, F64, "gradient");
        }
    }

    #[test]
    fn decoding_by_steps_equals_the_whole(sizes in sizes(), seed in 0..1u64 << 32, step in 1..3usize) {
        let sizes = Sizes { kv_len: sizes.q_len, ..sizes };
        let [query, key, value] = sizes.tensors(seed, DType::F64);
        let slopes = randn(seed + 1, sizes.heads, DType::F64)?;
        let options = AttentionOptions { alibi_slopes: Some(slopes), ..masked(Mask::causal()) };
        let whole = attend(&[query.clone(), key.clone(), value.clone()], &options)?;
        for start in (0..sizes.q_len).step_by(step) {
            let len = step.min(sizes.q_len - start);
            let known = |x: &Tensor| x.narrow(2, 0, start + len);
            let output = attend(&[query.narrow(2, start, len)?, known(&key)?, known(&value)?], &options)?;
            assert_close(&output.context, &whole.context.narrow(2, start, len)?, F64, "context");
            assert_close(logsumexp(&output), &logsumexp(&whole).narrow(2, start, len)?, F64, "log-sum-exp");
        }
    }

    #[test]
    fn cache_with_room_to_spare_equals_a_full_one(sizes in sizes(), seed in 0..1u64 << 32, spare in 0..3usize) {
        // The cache holds `filled` keys, of which the last q_len belong to the queries. Arbitrary numbers follow them.
        let filled = sizes.q_len + sizes.kv_len - 1;
        let sizes = Sizes { kv_len: filled + spare, ..sizes };
        let [query, key, value] = sizes.tensors(seed, DType::F64);
        let mask = Mask::window(Some(3), Some(0));
        let full = [query.clone(), key.narrow(2, 0, filled)?, value.narrow(2, 0, filled)?];
        let expected = attend(&full, &masked(mask.clone()))?;
        let output = attend(&[query, key, value], &masked(mask.with_offset((filled - sizes.q_len) as i64)))?;
        assert_close(&output.context, &expected.context, F64, "context");
        assert_close(logsumexp(&output), logsumexp(&expected), F64, "log-sum-exp");
        let seen = weights(&output).narrow(3, 0, filled)?;
        assert_close(&seen, weights(&expected), F64, "weights");
    }
}

/// Checks that context and gradients of a whole batch equal those of separate runs over its parts.
fn assert_parts_make_the_whole(
    vars: &[Var; 3],
    whole: impl Fn(&[Tensor; 3]) -> Result<Tensor>,
    parts: impl Fn(&[Tensor; 3]) -> Result<Tensor>,
) -> Result<()> {
    let tensors = vars.each_ref().map(|var| var.as_tensor().clone());
    let (whole, parts) = (whole(&tensors)?, parts(&tensors)?);
    assert_close(&whole, &parts, F64, "context");
    let by_whole = gradients(&random_sum(&whole, 9)?, &vars.each_ref())?;
    let by_parts = gradients(&random_sum(&parts, 9)?, &vars.each_ref())?;
    for ((a, b), what) in by_whole.iter().zip(&by_parts).zip(["query", "key", "value"]) {
        assert_close(a, b, F64, &format!("gradient of {what}"));
    }
    Ok(())
}

#[test]
fn padded_batch_equals_its_sequences_alone() -> Result<()> {
    let lengths = [7, 4, 1];
    let sizes = Sizes { batch: 3, q_len: 7, ..SIZES };
    let vars = sizes.vars(1, DType::F64);
    let whole = |inputs: &[Tensor; 3]| {
        let options = masked(Mask::key_lengths(&lengths) & Mask::causal());
        let context = attend(inputs, &options)?.context;
        // The results of padded queries are ignored.
        let rows = lengths.iter().enumerate().map(|(b, &len)| context.narrow(0, b, 1)?.narrow(2, 0, len));
        Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 2)
    };
    let parts = |inputs: &[Tensor; 3]| {
        let alone = |b: usize, len: usize| -> Result<Tensor> {
            let [query, key, value] = inputs.each_ref().map(|x| x.narrow(0, b, 1)?.narrow(2, 0, len));
            Ok(attend(&[query?, key?, value?], &masked(Mask::causal()))?.context)
        };
        let rows = lengths.iter().enumerate().map(|(b, &len)| alone(b, len));
        Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 2)
    };
    assert_parts_make_the_whole(&vars, whole, parts)
}

#[test]
fn packed_documents_equal_separate_runs() -> Result<()> {
    let lengths = [3, 1, 0, 4];
    let sizes = Sizes { q_len: 8, kv_len: 8, ..SIZES };
    let vars = sizes.vars(2, DType::F64);
    for inner in [Mask::full(), Mask::causal(), Mask::sliding_window(2)] {
        let whole = |inputs: &[Tensor; 3]| {
            let options = masked(Mask::documents(&lengths) & inner.clone());
            Ok(attend(inputs, &options)?.context)
        };
        let parts = |inputs: &[Tensor; 3]| {
            let mut start = 0;
            let mut alone = |len: usize| -> Result<Tensor> {
                let [query, key, value] = inputs.each_ref().map(|x| x.narrow(2, start, len));
                start += len;
                Ok(attend(&[query?, key?, value?], &masked(inner.clone()))?.context)
            };
            let rows = lengths.iter().filter(|&&len| len > 0).map(|&len| alone(len));
            Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 2)
        };
        assert_parts_make_the_whole(&vars, whole, parts)?;
    }
    Ok(())
}

#[test]
fn described_mask_equals_the_same_mask_as_a_tensor() -> Result<()> {
    let inputs = SIZES.tensors(3, DType::F32);
    let [batch, heads, q_len, kv_len] = SIZES.scores();
    for mask in [
        Mask::causal(),
        Mask::sliding_window(3),
        Mask::key_lengths(&[6, 2]),
        Mask::document_ids(&[[0, 1, 0, 1, 2, 2, 0], [5, 5, 5, 5, 4, 4, 4]]),
        (Mask::prefix(2) | Mask::causal()) & Mask::key_lengths(&[7, 5]),
    ] {
        let table = Mask::from_tensor(&mask.to_tensor((batch, heads, q_len, kv_len), &Device::Cpu)?)?;
        assert_same_output(&attend(&inputs, &masked(mask))?, &attend(&inputs, &masked(table))?);
    }
    Ok(())
}

#[test]
fn window_of_one_gives_each_token_its_own_value() -> Result<()> {
    let sizes = Sizes { q_len: 7, kv_heads: 4, ..SIZES };
    let inputs = sizes.tensors(4, DType::F32);
    let output = attend(&inputs, &masked(Mask::sliding_window(1)))?;
    assert_same_bits(&output.context, &inputs[2], "context");
    Ok(())
}
