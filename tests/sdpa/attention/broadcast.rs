//! A batch of 1 broadcasts, and masks and biases of any number of axes meet the axes of the inputs.

use candle_attention::{AttentionOptions, Backend, Mask, scaled_dot_product_attention};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::common::{assert_close, assert_same_bits, gradients, numbers, randn, var};

use super::setup::{F64, SIZES, all_results, assert_same_output, attend, logsumexp, random_sum, var64, weights};

const BACKENDS: [Backend; 2] = [Backend::Reference, Backend::Fused];

/// About two thirds of the entries are ones.
fn table(dims: &[usize]) -> Result<Tensor> {
    randn(7, dims, DType::F64)?.gt(-0.4)
}

#[test]
fn batch_of_one_equals_its_copies() -> Result<()> {
    for batches in [[1, 3, 3], [3, 1, 1], [3, 1, 3], [3, 3, 1], [1, 1, 3]] {
        let dims = [[4, 5, 6], [2, 7, 6], [2, 7, 3]];
        let vars: Vec<Var> = (0..3).map(|x| var64(x as u64, &[&[batches[x]], &dims[x][..]].concat())).collect();
        let copies =
            |x: &Var| if x.dims()[0] == 1 { Tensor::cat(&[x.as_tensor(); 3], 0) } else { Ok(x.as_tensor().clone()) };
        for backend in BACKENDS {
            let attn_mask = Mask::causal() & Mask::key_lengths(&[7, 4, 0]);
            let options = AttentionOptions { backend, attn_mask, ..all_results() };
            let output = scaled_dot_product_attention(&vars[0], &vars[1], &vars[2], &options)?;
            let expected = attend(&[copies(&vars[0])?, copies(&vars[1])?, copies(&vars[2])?], &options)?;
            assert_same_output(&output, &expected);
            let grads = |context: &Tensor| gradients(&random_sum(context, 9)?, &vars.iter().collect::<Vec<_>>());
            for (grad, expected) in grads(&output.context)?.iter().zip(grads(&expected.context)?) {
                assert_close(grad, &expected, F64, &format!("{backend:?}, batches {batches:?}"));
            }
        }
    }
    Ok(())
}

/// In a sum of 4096 gradients in a half type, the last ones would be too small to change it.
#[test]
fn gradient_of_a_batch_of_one_is_summed_in_f32() -> Result<()> {
    for dtype in [DType::BF16, DType::F16] {
        let inputs =
            [randn(1, (4096, 1, 1, 4), dtype)?, randn(2, (1, 1, 2, 4), dtype)?, randn(3, (1, 1, 2, 4), dtype)?];
        let gradients_in = |dtype: DType, backend: Backend| -> Result<Vec<Tensor>> {
            let vars = inputs.each_ref().map(|x| Var::from_tensor(&x.to_dtype(dtype).unwrap()).unwrap());
            let options = AttentionOptions { backend, ..Default::default() };
            let context = scaled_dot_product_attention(&vars[0], &vars[1], &vars[2], &options)?.context;
            gradients(&context.to_dtype(DType::F64)?.sum_all()?, &[&vars[1], &vars[2]])
        };
        let expected = gradients_in(DType::F64, Backend::Reference)?;
        for backend in BACKENDS {
            for (gradient, expected) in gradients_in(dtype, backend)?.iter().zip(&expected) {
                let largest = expected.abs()?.max_all()?.to_scalar::<f64>()?;
                let what = format!("{dtype:?}, {backend:?}");
                assert_close(&(gradient.to_dtype(DType::F64)? / largest)?, &(expected / largest)?, 0.01, &what);
            }
        }
    }
    Ok(())
}

#[test]
fn batch_of_one_without_other_sequences_gets_a_gradient_of_zero() -> Result<()> {
    let (query, key) = (var64(1, &[0, 2, 3, 4]), var64(2, &[1, 2, 5, 4]));
    let context = scaled_dot_product_attention(&query, &key, &key, &AttentionOptions::default())?.context;
    assert_eq!(context.dims(), [0, 2, 3, 4]);
    assert_eq!(numbers(&gradients(&context.sum_all()?, &[&query, &key])?[1])?, [0.0; 40]);
    Ok(())
}

/// Inputs (batch, len, dim) have scores (batch, q_len, kv_len), as in PyTorch.
#[test]
fn three_axes_of_a_mask_or_bias_are_those_of_inputs_with_three_axes() -> Result<()> {
    let [query, key, value] = [(1, 5, 6), (2, 7, 6), (3, 7, 3)].map(|(seed, len, dim)| var64(seed, &[2, len, dim]));
    for dims in [[2, 5, 7], [2, 1, 7], [1, 5, 7], [2, 5, 1]] {
        let (mask, bias) = (table(&dims)?, var(4, &dims, DType::F64)?);
        for backend in BACKENDS {
            let options = |mask: &Tensor, bias: &Tensor| -> Result<AttentionOptions> {
                let attn_mask = Mask::from_tensor(mask)? & Mask::causal();
                Ok(AttentionOptions { attn_mask, attn_bias: Some(bias.clone()), backend, ..all_results() })
            };
            let own = scaled_dot_product_attention(&query, &key, &value, &options(&mask, &bias)?)?;
            let heads = |x: &Tensor| x.unsqueeze(1);
            let inputs = [heads(&query)?, heads(&key)?, heads(&value)?];
            let four = attend(&inputs, &options(&heads(&mask)?, &heads(&bias)?)?)?;
            assert_same_bits(&own.context, &four.context.squeeze(1)?, "context");
            assert_same_bits(weights(&own), &weights(&four).squeeze(1)?, "weights");
            assert_same_bits(logsumexp(&own), &logsumexp(&four).squeeze(1)?, "log-sum-exp");
            let grad = |context: &Tensor| gradients(&context.sqr()?.sum_all()?, &[&bias]);
            assert_same_bits(&grad(&own.context)?[0], &grad(&four.context)?[0], "gradient of the bias");
        }
    }
    Ok(())
}

#[test]
fn mask_of_one_axis_hides_the_same_keys_from_all() -> Result<()> {
    let keys = Tensor::new(&[1u8, 0, 1, 1, 0, 0, 1], &Device::Cpu)?;
    let of = |keys: &Tensor| {
        Ok::<_, candle_core::Error>(AttentionOptions { attn_mask: Mask::from_tensor(keys)?, ..all_results() })
    };
    let inputs = SIZES.tensors(1, DType::F64);
    assert_same_output(&attend(&inputs, &of(&keys)?)?, &attend(&inputs, &of(&keys.unsqueeze(0)?)?)?);
    let number = Tensor::new(1u8, &Device::Cpu)?;
    assert_same_output(&attend(&inputs, &of(&number)?)?, &attend(&inputs, &all_results())?);
    Ok(())
}

/// ONNX hides the keys after the last column of a short mask.
#[test]
fn keys_behind_a_short_mask_and_bias_have_no_influence() -> Result<()> {
    let [query, key, value] = SIZES.vars(2, DType::F64);
    let (short, bias) = (Mask::from_tensor(&table(&[5, 4])?)? & Mask::causal(), var64(5, &[5, 4]));
    for backend in BACKENDS {
        let options = |attn_mask: &Mask, bias: &Tensor| AttentionOptions {
            attn_mask: attn_mask.clone(),
            attn_bias: Some(bias.clone()),
            backend,
            ..Default::default()
        };
        let padded = bias.pad_with_zeros(1, 0, 3)?;
        let hidden = options(&short.clone().with_hidden_keys(3), &padded);
        let context = scaled_dot_product_attention(&query, &key, &value, &hidden)?.context;
        let (first_keys, first_values) = (key.narrow(2, 0, 4)?, value.narrow(2, 0, 4)?);
        let expected =
            scaled_dot_product_attention(&query, &first_keys, &first_values, &options(&short, &bias))?.context;
        assert_close(&context, &expected, F64, "context");
        let vars = [&query, &key, &value, &bias];
        for (grad, expected) in
            gradients(&random_sum(&context, 3)?, &vars)?.iter().zip(gradients(&random_sum(&expected, 3)?, &vars)?)
        {
            assert_close(grad, &expected, F64, "gradient");
        }
    }
    Ok(())
}

#[test]
fn query_before_the_first_key_sees_nothing_of_its_past_or_its_document() -> Result<()> {
    let inputs = SIZES.tensors(3, DType::F64);
    for mask in [Mask::causal(), Mask::documents(&[7]), Mask::documents(&[3, 4]) & Mask::causal()] {
        for backend in BACKENDS {
            let at = |mask: Mask| AttentionOptions { attn_mask: mask, backend, ..Default::default() };
            let late = attend(&inputs, &at(mask.clone().with_offset(-2)))?.context;
            assert_eq!(numbers(&late.narrow(2, 0, 2)?)?, vec![0.0; 2 * 4 * 2 * 3], "{mask:?}");
            // The other three queries stand at the first three keys.
            let [query, key, value] = &inputs;
            let rest = [query.narrow(2, 2, 3)?, key.clone(), value.clone()];
            let expected = attend(&rest, &at(mask.clone().with_offset(0)))?.context;
            assert_close(&late.narrow(2, 2, 3)?, &expected, F64, &format!("{mask:?}"));
        }
    }
    Ok(())
}

/// The message for inputs of these shapes, with this mask and bias.
fn message(shapes: [&[usize]; 3], mask: Option<&[usize]>, bias: Option<&[usize]>) -> Result<String> {
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
    let mask = mask.map(|dims| Mask::from_tensor(&zeros(dims)?.to_dtype(DType::U8)?)).transpose()?;
    let options = AttentionOptions {
        attn_mask: mask.unwrap_or_default(),
        attn_bias: bias.map(zeros).transpose()?,
        ..Default::default()
    };
    let [query, key, value] = shapes;
    let result = scaled_dot_product_attention(&zeros(query)?, &zeros(key)?, &zeros(value)?, &options);
    Ok(result.unwrap_err().to_string())
}

#[test]
fn errors_name_the_axes_and_shapes_of_the_caller() -> Result<()> {
    let batches: [&[usize]; 3] = [&[2, 3, 6], &[2, 5, 6], &[2, 5, 7]];
    let single: [&[usize]; 3] = [&[3, 6], &[5, 6], &[5, 7]];
    let broadcasts = |axes: &str, got: &str| format!("shape that broadcasts to {axes}, got {got}");
    for (shapes, dims, axes) in [
        (batches, &[3, 3, 5][..], "(batch, q_len, kv_len) = [2, 3, 5]"),
        (batches, &[2, 4, 5], "(batch, q_len, kv_len) = [2, 3, 5]"),
        (batches, &[2, 2, 3, 5], "(batch, q_len, kv_len) = [2, 3, 5]"),
        (single, &[4, 5], "(q_len, kv_len) = [3, 5]"),
        (single, &[4], "(q_len, kv_len) = [3, 5]"),
    ] {
        let expected = broadcasts(axes, &format!("{dims:?}"));
        for message in [message(shapes, Some(dims), None)?, message(shapes, None, Some(dims))?] {
            assert!(message.contains(&expected), "{expected:?} is not in {message:?}");
        }
    }
    let other_batch: [&[usize]; 3] = [&[2, 3, 6], &[3, 5, 6], &[3, 5, 7]];
    let other_len: [&[usize]; 3] = [&[3, 6], &[5, 6], &[4, 7]];
    let no_dim: [&[usize]; 3] = [&[3, 0], &[5, 0], &[5, 7]];
    // The value has a batch of 1, which could broadcast.
    let one_value: [&[usize]; 3] = [&[2, 4, 3, 6], &[2, 2, 5, 6], &[1, 2, 4, 7]];
    for (shapes, expected) in [
        (other_batch, "(batch, kv_len, head_dim) = [2, 5, 6], given query [2, 3, 6] and key [3, 5, 6], got [3, 5, 6]"),
        (other_len, "(kv_len, value_dim) = [5, 7], given query [3, 6] and key [5, 6], got [4, 7]"),
        (no_dim, "(q_len, head_dim) with head_dim at least 1, got [3, 0]"),
        (one_value, "got [1, 2, 4, 7]"),
    ] {
        let message = message(shapes, None, None)?;
        assert!(message.contains(expected), "{expected:?} is not in {message:?}");
    }
    Ok(())
}
