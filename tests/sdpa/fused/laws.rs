//! Properties of the fused path that hold for every input.

use candle_attention::{AttentionOptions, Backend, Mask, scaled_dot_product_attention};
use candle_core::{DType, Result};

use crate::common::{assert_same_bits, gradients, randn, var};

use super::masks::MaskKind;
use super::problem::{Case, Named, Sizes};

/// Panics unless both have the same results, bit for bit.
#[track_caller]
pub fn assert_same_results(a: &[Named], b: &[Named], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for ((name, a), (_, b)) in a.iter().zip(b) {
        assert_same_bits(a, b, &format!("{what}: {name}"));
    }
}

/// The results of `f` with this many threads.
pub fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(f)
}

#[test]
fn numbers_do_not_depend_on_the_number_of_threads() -> Result<()> {
    for sizes in [
        Sizes { batch: 1, heads: 1, kv_heads: 1, q_len: 300, kv_len: 900, dim: 32, value_dim: 32 },
        Sizes { batch: 2, heads: 6, kv_heads: 2, q_len: 200, kv_len: 200, dim: 24, value_dim: 40 },
        // Decoding: one query and many keys.
        Sizes { batch: 1, heads: 8, kv_heads: 2, q_len: 1, kv_len: 6000, dim: 64, value_dim: 64 },
    ] {
        let case = Case { mask: MaskKind::Causal, dropout_p: 0.1, ..Case::plain(sizes) };
        let inputs = case.inputs(DType::F32)?;
        let one = with_threads(1, || case.run(&inputs, Backend::Fused))?;
        for threads in [2, 5] {
            let many = with_threads(threads, || case.run(&inputs, Backend::Fused))?;
            assert_same_results(&many, &one, &format!("{threads} threads, {sizes:?}"));
        }
    }
    Ok(())
}

#[test]
fn backward_may_run_twice() -> Result<()> {
    let x = var(1, (1, 2, 9, 8), DType::F32)?;
    let options = AttentionOptions { backend: Backend::Fused, ..Default::default() };
    let loss = scaled_dot_product_attention(&x, &x, &x, &options)?.context.sqr()?.sum_all()?;
    assert_same_bits(&gradients(&loss, &[&x])?[0], &gradients(&loss, &[&x])?[0], "gradient");
    Ok(())
}

#[test]
fn what_the_fused_path_cannot_do_is_an_error_that_says_so() -> Result<()> {
    let x = randn(1, (1, 2, 4, 8), DType::F32)?;
    let fused = AttentionOptions { backend: Backend::Fused, ..Default::default() };
    let slopes = AttentionOptions { alibi_slopes: Some(var(2, 2, DType::F32)?.as_tensor().clone()), ..fused.clone() };
    let message = scaled_dot_product_attention(&x, &x, &x, &slopes).unwrap_err().to_string();
    assert!(message.contains("expected ALiBi slopes that are constants, got slopes that want a gradient"), "{message}");
    let none = x.narrow(2, 0, 0)?;
    let message = scaled_dot_product_attention(&none, &x, &x, &fused).unwrap_err().to_string();
    assert!(message.contains("got an empty one"), "{message}");
    let huge = (&x * 1e37)?;
    let message = scaled_dot_product_attention(&huge, &huge, &x, &fused).unwrap_err().to_string();
    assert!(message.contains("inputs so large"), "{message}");
    Ok(())
}

/// candle can't make a view that reaches past its storage, but it can make one that repeats a row.
#[test]
fn broadcast_views_equal_their_copies() -> Result<()> {
    let options = AttentionOptions { backend: Backend::Fused, ..Default::default() };
    let q = randn(1, (2, 4, 40, 16), DType::F32)?;
    let k = randn(2, (1, 1, 50, 16), DType::F32)?.broadcast_as((2, 2, 50, 16))?;
    let v = randn(3, (2, 2, 1, 16), DType::F32)?.broadcast_as((2, 2, 50, 16))?;
    let views = scaled_dot_product_attention(&q, &k, &v, &options)?;
    let copies = scaled_dot_product_attention(&q, &k.contiguous()?, &v.contiguous()?, &options)?;
    assert_same_bits(&views.context, &copies.context, "context");
    Ok(())
}

#[test]
fn causal_row_ignores_future() -> Result<()> {
    let options = AttentionOptions { backend: Backend::Fused, attn_mask: Mask::causal(), ..Default::default() };
    let [q, k, v] = [1, 2, 3].map(|seed| randn(seed, (1, 2, 150, 20), DType::F32));
    let (q, k, v) = (q?, k?, v?);
    let all = scaled_dot_product_attention(&q, &k, &v, &options)?.context;
    for len in [1, 33, 97, 129] {
        let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(2, 0, len));
        let past = scaled_dot_product_attention(&q?, &k?, &v?, &options)?.context;
        assert_same_bits(&past, &all.narrow(2, 0, len)?, "context");
    }
    Ok(())
}
