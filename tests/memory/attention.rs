//! Attention on both backends, and attention without trainable weights.

use candle_attention::simplified::{Normalization, normalize, simplified_attention};
use candle_attention::{AttentionOptions, Backend, Error, Mask, scaled_dot_product_attention};
use candle_core::{DType, Device, Tensor, Var};

use crate::room::{memory, number, refuses, returns, row};

/// So many queries and keys that one tensor of their scores is 9 MiB in f32.
const LEN: usize = 1536;

fn attend(dtype: DType, heads: usize, options: AttentionOptions) -> Result<(), Error> {
    let q = row(&[1, heads, LEN, 8], dtype);
    let k = row(&[1, 1, LEN, 8], dtype);
    scaled_dot_product_attention(&q, &k, &k, &options).map(drop)
}

fn reference() -> AttentionOptions {
    AttentionOptions { backend: Backend::Reference, ..Default::default() }
}

fn tensor(dims: &[usize], value: f32, dtype: DType) -> Tensor {
    Tensor::full(value, dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn variable(dims: &[usize]) -> Tensor {
    Var::from_tensor(&tensor(dims, 0.5, DType::F32)).unwrap().into_inner()
}

fn everything() -> AttentionOptions {
    AttentionOptions {
        softcap: Some(3.0),
        attn_mask: Mask::causal(),
        attn_bias: Some(variable(&[LEN, LEN])),
        alibi_slopes: Some(variable(&[1])),
        sinks: Some(variable(&[1])),
        dropout_p: 0.1,
        return_weights: true,
        return_logsumexp: true,
        ..reference()
    }
}

/// Attention whose query is one row of huge numbers, so that scores overflow.
fn huge(backend: Backend) -> Result<(), Error> {
    let x = tensor(&[1, 1, 1, 8], 1e30, DType::F32).broadcast_as((1, 1, LEN, 8)).unwrap();
    let options = AttentionOptions { backend, ..Default::default() };
    scaled_dot_product_attention(&x, &x, &x, &options).map(drop)
}

memory! {
    reference_in_f32: returns(|| attend(DType::F32, 1, reference()));
    reference_in_f64: returns(|| attend(DType::F64, 1, reference()));
    reference_in_f16: returns(|| attend(DType::F16, 2, AttentionOptions { return_weights: true, ..reference() }));
    reference_in_bf16: returns(|| attend(DType::BF16, 2, AttentionOptions { return_weights: true, ..reference() }));
    reference_with_dropout: returns(|| attend(DType::F32, 1, AttentionOptions { dropout_p: 0.5, ..reference() }));
    reference_with_a_mask: returns(|| attend(DType::F32, 2, AttentionOptions { attn_mask: Mask::sliding_window(9), ..reference() }));
    reference_with_slopes: {
        let slopes = Some(tensor(&[1], 0.5, DType::F32));
        returns(|| attend(DType::F32, 1, AttentionOptions { alibi_slopes: slopes.clone(), ..reference() }));
    };
    reference_that_trains: {
        let options = everything();
        returns(|| attend(DType::F32, 1, options.clone()));
    };
    weights_on_request: returns(|| attend(DType::F32, 1, AttentionOptions { return_weights: true, ..Default::default() }));
    trained_slopes: {
        let slopes = variable(&[1]);
        returns(|| attend(DType::F32, 1, AttentionOptions { alibi_slopes: Some(slopes.clone()), ..Default::default() }));
    };
    scores_that_overflow: {
        returns(|| huge(Backend::Reference));
        returns(|| huge(Backend::Auto));
    };
    fused_copies_of_its_input: returns(|| {
        let x = tensor(&[1, 1, 1, 1], 1.0, DType::F16).broadcast_as((1, 8, 4096, 64)).unwrap();
        let options = AttentionOptions { return_logsumexp: true, attn_mask: Mask::prefix(1), ..Default::default() };
        scaled_dot_product_attention(&x, &x, &x, &options)
    });
    fused_with_a_bias_in_another_dtype: {
        let bias = row(&[1, 1, LEN, LEN], DType::F16);
        returns(|| attend(DType::F32, 1, AttentionOptions { attn_bias: Some(bias.clone()), ..Default::default() }));
    };
    fused_with_sinks_and_a_trained_bias: {
        let options = AttentionOptions { sinks: Some(variable(&[2])), attn_bias: Some(variable(&[1, 1])), ..Default::default() };
        returns(|| {
            let x = row(&[1, 2, 65536, 64], DType::F32);
            let options = AttentionOptions { attn_mask: Mask::prefix(0), ..options.clone() };
            scaled_dot_product_attention(&x, &x, &x, &options)
        });
    };
    wide_options_beyond_the_address_space: {
        let len = 1 << 20;
        let q = row(&[1, 1, len, 1], DType::F32);
        let bias = Some(number(&[len, len], DType::F64));
        refuses(|| scaled_dot_product_attention(&q, &q, &q, &AttentionOptions { attn_bias: bias.clone(), ..Default::default() }));
        let q = row(&[1 << 20, 1 << 20, 1, 1], DType::F32);
        let slopes = Some(number(&[1 << 20, 1 << 20], DType::F64));
        refuses(|| scaled_dot_product_attention(&q, &q, &q, &AttentionOptions { alibi_slopes: slopes.clone(), ..Default::default() }));
    };
    sizes_beyond_the_address_space: {
        for len in [1 << 28, 1 << 29, (1 << 31) - 1] {
            for backend in [Backend::Reference, Backend::Auto] {
                refuses(|| {
                    let (q, k) = (row(&[1, 1, 64, 8], DType::F32), row(&[1, 1, len, 8], DType::F32));
                    let slopes = variable(&[1]);
                    let options = AttentionOptions { backend, alibi_slopes: Some(slopes), ..Default::default() };
                    scaled_dot_product_attention(&q, &k, &k, &options)
                });
            }
        }
    };
    simplified: {
        returns(|| simplified_attention(&row(&[LEN, 8], DType::F32), Normalization::Softmax));
        returns(|| simplified_attention(&row(&[2, LEN, 8], DType::F16), Normalization::SumNormalized));
        returns(|| normalize(&row(&[LEN, LEN], DType::F32), Normalization::NaiveSoftmax));
        for dims in [&[1 << 31, 8][..], &[1 << 40, 8], &[1, 1 << 40, 8], &[1 << 40, 1 << 40, 8], &[1 << 32, 1 << 32, 1]] {
            refuses(|| simplified_attention(&row(dims, DType::F32), Normalization::Softmax));
            refuses(|| normalize(&row(dims, DType::F32), Normalization::Softmax));
        }
    };
}
