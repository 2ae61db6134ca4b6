//! Shapes that need too much memory or time give an error that says what was expected: no panic, no abort, no giant
//! allocation. A broadcast view of one row takes no memory, whatever its shape.
//!
//! Each case runs in its own process, with little memory and little time.
#![cfg(target_os = "linux")]

use candle_attention::{AttentionOptions, Backend, Mask, scaled_dot_product_attention};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::own_process::with_memory;

const MEMORY_KIB: usize = 6 << 20;

/// One test for each entry: its name, a result that must be an error, and parts of the error's text.
macro_rules! hostile {
    ($($(#[$attribute:meta])* $name:ident: $result:expr => $($expected:expr),+;)*) => {
        $($(#[$attribute])* #[test]
        fn $name() {
            let test = concat!(module_path!(), "::", stringify!($name));
            with_memory(MEMORY_KIB, test, || {
                let result: Result<()> = $result;
                let text = result.expect_err("an error").to_string();
                for expected in [$($expected),+] {
                    assert!(text.contains(expected), "{expected:?} is not in {text:?}");
                }
            });
        })*
    };
}

/// One row, broadcast to (batch, heads, len, dim).
fn row(shape: [usize; 4], dtype: DType) -> Tensor {
    let [.., dim] = shape;
    Tensor::zeros((1, 1, 1, dim), dtype, &Device::Cpu).unwrap().broadcast_as(&shape).unwrap()
}

/// One number, broadcast to (batch, heads, len, dim). The stride of the last axis is 0, too.
fn number(shape: [usize; 4]) -> Tensor {
    Tensor::zeros((1, 1, 1, 1), DType::F32, &Device::Cpu).unwrap().broadcast_as(&shape).unwrap()
}

fn attend(q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> Result<()> {
    let options = AttentionOptions { backend, ..Default::default() };
    scaled_dot_product_attention(&q, &k, &v, &options)?;
    Ok(())
}

/// Self-attention over one repeated row, or with queries or keys of another shape.
fn fused(query: [usize; 4], key: [usize; 4]) -> Result<()> {
    let [q, k, v] = [query, key, key].map(|shape| row(shape, DType::F32));
    attend(q, k, v, Backend::Fused)
}

const ONE: [usize; 4] = [1, 1, 1, 8];
const LONG: usize = 1 << 31;
const LONGER: usize = 1 << 40;

// Sizes whose product overflows, and axes of size 0.
hostile! {
    scores_beyond_counting: fused([1, 1, LONGER, 8], [1, 1, LONGER, 8]) => "expected at most", "got more";
    heads_and_sequences_beyond_counting: fused([LONG, LONG, 1, 8], [LONG, 1, 1, 8]) => "expected at most", "got more";
    query_beyond_memory: fused([1, 1, 1 << 60, 8], ONE) => "expected at most", "got more";
    no_queries: fused([1, 1, 0, 8], ONE) => "expected tensors that are not empty";
    no_keys: fused(ONE, [1, 1, 0, 8]) => "expected tensors that are not empty";
    no_sequences: fused([0, 1, 1, 8], [0, 1, 1, 8]) => "expected tensors that are not empty";
    no_heads: fused([1, 0, 1, 8], [1, 0, 1, 8]) => "expected a multiple of num_kv_heads";
    no_features: fused([1, 1, 1, 0], [1, 1, 1, 0]) => "head_dim at least 1";
}

// Views that take no memory, with shapes whose result or copy would need too much memory or time.
hostile! {
    long_query: fused([1, 1, LONG, 8], ONE) => "expected", "got";
    longer_query: fused([1, 1, LONGER, 8], ONE) => "expected", "got";
    query_just_short_of_long: fused([1, 1, LONG - 1, 8], ONE) => "expected", "got";
    long_key: fused(ONE, [1, 1, LONG, 8]) => "expected", "got";
    longer_key: fused(ONE, [1, 1, LONGER, 8]) => "expected", "got";
    many_sequences: fused([LONG, 1, 1, 8], [LONG, 1, 1, 8]) => "expected", "got";
    many_heads: fused([1, LONG, 1, 8], ONE) => "expected", "got";
    one_number_as_long_key: attend(row(ONE, DType::F32), number([1, 1, LONG, 8]), number([1, 1, LONG, 8]), Backend::Fused)
        => "expected", "got";
    wide_value: attend(row(ONE, DType::F32), row(ONE, DType::F32), number([1, 1, 1, LONGER]), Backend::Fused)
        => "expected", "got";
    long_query_in_f16: attend(row([1, 1, LONG, 8], DType::F16), row(ONE, DType::F16), row(ONE, DType::F16), Backend::Fused)
        => "expected", "got";
    long_query_by_auto: attend(row([1, 1, LONG, 8], DType::F32), row(ONE, DType::F32), row(ONE, DType::F32), Backend::Auto)
        => "expected", "got";
    longer_key_by_reference:
        attend(row(ONE, DType::F32), row([1, 1, LONGER, 8], DType::F32), row([1, 1, LONGER, 8], DType::F32), Backend::Reference)
        => "expected", "got";
}

#[test]
fn gradient_of_a_shared_bias_takes_no_memory_for_every_score() -> Result<()> {
    let x = row([1, 1, 1 << 17, 1], DType::F32);
    let bias = Var::from_tensor(&Tensor::zeros((1, 1), DType::F32, &Device::Cpu)?)?;
    let options = AttentionOptions {
        attn_bias: Some(bias.as_tensor().clone()),
        // All keys are hidden, so that memory is allocated but nothing is computed.
        attn_mask: Mask::prefix(0),
        backend: Backend::Fused,
        ..Default::default()
    };
    let context = scaled_dot_product_attention(&x, &x, &x, &options)?.context;
    context.sum_all()?.backward().map(|_| ())
}
