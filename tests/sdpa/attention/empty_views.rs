//! Parts of empty tensors. Such a view may begin behind the end of its storage, where candle can't read it.

use candle_attention::simplified::{Normalization, simplified_attention};
use candle_attention::{AttentionOptions, Backend, Mask, Result, scaled_dot_product_attention};
use candle_core::{DType, Device, Tensor, Var};

use crate::common::{gradients, randn, var};

/// Three parts of four entries each, along the last axis.
fn parts(x: &Var) -> Result<[Tensor; 3]> {
    Ok([x.narrow(3, 0, 4)?, x.narrow(3, 4, 4)?, x.narrow(3, 8, 4)?])
}

fn all_results(backend: Backend) -> AttentionOptions {
    AttentionOptions { backend, return_weights: true, return_logsumexp: true, ..Default::default() }
}

/// Attends, and gives the gradient of the sum of all results.
fn gradient(inputs: [&Tensor; 3], options: &AttentionOptions, vars: &[&Var]) -> Result<Vec<Tensor>> {
    let [q, k, v] = inputs;
    let output = scaled_dot_product_attention(q, k, v, options)?;
    assert_eq!(output.context.dims()[..3], q.dims()[..3]);
    let results = [Some(output.context), output.weights, output.logsumexp.filter(|x| x.elem_count() == 0)];
    let sums =
        results.iter().flatten().map(|x| x.sum_all()?.to_dtype(DType::F64)).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(gradients(&Tensor::stack(&sums, 0)?.sum_all()?, vars)?)
}

#[test]
fn keys_and_values_that_are_parts_of_an_empty_tensor_have_gradients() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        for backend in [Backend::Auto, Backend::Reference] {
            let (q, kv) = (var(1, (2, 2, 3, 4), dtype)?, var(2, (2, 2, 0, 12), dtype)?);
            let [_, k, v] = parts(&kv)?;
            gradient([q.as_tensor(), &k, &v], &all_results(backend), &[&q, &kv])?;
            gradient([q.as_tensor(), &v, &k], &all_results(backend), &[&q, &kv])?;
        }
    }
    Ok(())
}

#[test]
fn queries_that_are_parts_of_an_empty_tensor_have_gradients() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        for backend in [Backend::Auto, Backend::Reference] {
            let (queries, kv) = (var(1, (2, 2, 0, 12), dtype)?, var(2, (2, 2, 5, 12), dtype)?);
            let ([_, _, q], [_, k, v]) = (parts(&queries)?, parts(&kv)?);
            let bias = var(3, (2, 2, 0, 5), dtype)?;
            let options = AttentionOptions { attn_bias: Some(bias.narrow(3, 0, 5)?), ..all_results(backend) };
            gradient([&q, &k, &v], &options, &[&queries, &kv, &bias])?;
            // All three from one tensor, without sequences or without tokens.
            for shape in [(0, 2, 3, 12), (2, 2, 0, 12)] {
                let qkv = var(4, shape, dtype)?;
                let [q, k, v] = parts(&qkv)?;
                gradient([&q, &k, &v], &all_results(backend), &[&qkv])?;
            }
        }
    }
    Ok(())
}

#[test]
fn masks_from_parts_of_an_empty_tensor_are_empty() -> Result<()> {
    let table = Tensor::zeros((0, 8), DType::U8, &Device::Cpu)?.narrow(1, 3, 5)?;
    let mask = Mask::from_tensor(&table)?;
    assert_eq!(mask.to_tensor((1, 1, 0, 5), &Device::Cpu)?.dims(), [1, 1, 0, 5]);
    Mask::from_blocked(&table.t()?)?.check((1, 1, 5, 0))?;
    Mask::from_padding_mask(&table)?.check((0, 1, 3, 5))
}

#[test]
fn simplified_attention_of_a_part_of_an_empty_tensor_is_empty() -> Result<()> {
    let x = randn(1, (0, 8), DType::F32)?.narrow(1, 5, 3)?;
    for normalization in [Normalization::Softmax, Normalization::NaiveSoftmax, Normalization::SumNormalized] {
        let output = simplified_attention(&x, normalization)?;
        assert_eq!((output.scores.dims(), output.context.dims()), (&[0, 0][..], &[0, 3][..]));
    }
    Ok(())
}
