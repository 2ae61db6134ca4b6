//! Sums over many rows in half types.

use candle_attention::{AttentionOptions, Backend, scaled_dot_product_attention};
use candle_core::{DType, Device, Tensor, Var};

use super::attention::Call;
use crate::common::{gradients, numbers, randn};

/// The gradients of a bias and of sinks that 16,384 rows share.
#[test]
fn gradients_that_many_rows_share_lose_nothing_in_half_types() {
    let (batch, kv_len, dim) = (16_384, 3, 2);
    for dtype in [DType::F16, DType::BF16] {
        let tensor = |seed, shape: &[usize]| Var::from_tensor(&randn(seed, shape, dtype).unwrap()).unwrap();
        let (q, k, v) =
            (tensor(1, &[batch, 1, 1, dim]), tensor(2, &[batch, 1, kv_len, dim]), tensor(3, &[batch, 1, kv_len, dim]));
        let (bias, sinks) = (tensor(4, &[1, 1, 1, kv_len]), tensor(5, &[1]));
        let of = |x: &Var| numbers(x).unwrap();
        let call = Call {
            batch,
            heads: 1,
            kv_heads: 1,
            q_len: 1,
            kv_len,
            dim,
            value_dim: dim,
            q: of(&q),
            k: of(&k),
            v: of(&v),
            scale: 0.5,
            softcap: None,
            bias: Some(([1, 1, 1, kv_len], of(&bias))),
            slopes: None,
            sinks: Some(of(&sinks)),
            allowed: vec![true; batch * kv_len],
            dropout: vec![1.0; batch * kv_len],
            is_f32: true,
            least_context: 0.0,
            grad_context: of(&v)[..].chunks_exact(kv_len * dim).flat_map(|v| v[..dim].to_vec()).collect(),
            grad_logsumexp: vec![0.0; batch],
        };
        let expected = call.results();
        let grad = Tensor::from_slice(&call.grad_context, (batch, 1, 1, dim), &Device::Cpu).unwrap();
        for backend in [Backend::Fused, Backend::Reference] {
            let options = AttentionOptions {
                scale: Some(0.5),
                attn_bias: Some(bias.as_tensor().clone()),
                sinks: Some(sinks.as_tensor().clone()),
                backend,
                ..Default::default()
            };
            let output = scaled_dot_product_attention(&q, &k, &v, &options).unwrap();
            let loss = (output.context * grad.to_dtype(dtype).unwrap()).unwrap().to_dtype(DType::F32).unwrap();
            let grads = gradients(&loss.sum_all().unwrap(), &[&bias, &sinks]).unwrap();
            let all = [("bias", expected.bias.clone().unwrap()), ("sinks", expected.sinks.clone().unwrap())];
            for ((name, expected), got) in all.into_iter().zip(&grads) {
                let tolerance = if dtype == DType::F16 { 4e-3 } else { 2e-2 };
                for ((got, value), size) in numbers(got).unwrap().iter().zip(&expected.value).zip(&expected.size) {
                    let error = (got - value).abs() / value.abs();
                    assert!(error < tolerance, "{name}, {dtype:?}, {backend:?}: {got}, not {value} of terms {size}");
                }
            }
        }
    }
}
