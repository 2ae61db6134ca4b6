//! Both passes against plain loops of f64, for every option, type and layout.

mod common;

use attention_kernels::philox::uniform;
use attention_kernels::{Element, Layout, View};
use common::{Case, Naive, Sizes, cases, naive, narrow, run, to_f64, values};
use half::{bf16, f16};

/// Prefill, decoding in splits, and head dims that leave a remainder in every block.
const SIZES: [Sizes; 5] = [
    Sizes { batch: 2, heads: 2, kv_heads: 1, q_len: 3, kv_len: 7, dim: 3, value_dim: 2 },
    Sizes { batch: 2, heads: 4, kv_heads: 2, q_len: 2, kv_len: 201, dim: 17, value_dim: 24 },
    Sizes { batch: 1, heads: 2, kv_heads: 2, q_len: 37, kv_len: 35, dim: 18, value_dim: 16 },
    Sizes { batch: 1, heads: 1, kv_heads: 1, q_len: 131, kv_len: 203, dim: 10, value_dim: 6 },
    Sizes { batch: 1, heads: 2, kv_heads: 1, q_len: 41, kv_len: 59, dim: 64, value_dim: 59 },
];

/// A tensor (batch, heads, len, dim) in memory as (batch, len, heads, dim).
fn tokens_first(numbers: &[f64], [batch, heads, len, dim]: [usize; 4]) -> Vec<f64> {
    let mut out = vec![0.0; numbers.len()];
    for (row, numbers) in numbers.chunks_exact(dim).enumerate() {
        let (b, h, i) = (row / (heads * len), row / len % heads, row % len);
        assert!(b < batch);
        out[((b * len + i) * heads + h) * dim..][..dim].copy_from_slice(numbers);
    }
    out
}

#[track_caller]
fn close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    let greatest = expected.iter().filter(|x| x.is_finite()).fold(1.0f64, |a, x| a.max(x.abs()));
    for (i, (x, y)) in got.iter().zip(expected).enumerate() {
        assert!(x == y || (x - y).abs() <= tolerance * greatest, "{what}, {i}: {x}, not {y}");
    }
}

fn check<E: Element>(sizes: &Sizes, case: &Case, layout: Layout, tolerance: f64) {
    let dims = [sizes.q(), sizes.k(), sizes.v(), sizes.context()];
    let numbers = [0, 1, 2, 3].map(|i| {
        let numbers = uniform(i as u64 + 1, 1.5, dims[i].iter().product()).collect::<Vec<_>>();
        to_f64(&narrow::<E>(&numbers))
    });
    let expected: Naive = naive(sizes, case, [&numbers[0], &numbers[1], &numbers[2], &numbers[3]]);
    let order = |numbers: &[f64], dims| match layout {
        Layout::HeadsFirst => numbers.to_vec(),
        Layout::TokensFirst => tokens_first(numbers, dims),
    };
    let data = [0, 1, 2, 3].map(|i| narrow::<E>(&order(&numbers[i], dims[i])));
    let views = [0, 1, 2, 3].map(|i| View::new("test", &data[i], layout.strides(dims[i]), dims[i]).unwrap());
    let (output, gradients) = run(case, views, layout, true);
    let name = |what: &str| format!("{what}, {}, {layout:?}, {sizes:?}, {}", case.name, std::any::type_name::<E>());
    close(&name("context"), &to_f64(&output.context), &order(&expected.context, dims[3]), tolerance);
    close(&name("log-sum-exp"), &values(&output.logsumexp), &expected.logsumexp, tolerance);
    close(&name("q"), &to_f64(&gradients.q), &order(&expected.q, dims[0]), tolerance);
    close(&name("k"), &to_f64(&gradients.k), &order(&expected.k, dims[1]), tolerance);
    close(&name("v"), &to_f64(&gradients.v), &order(&expected.v, dims[2]), tolerance);
    close(&name("bias"), &to_f64(&gradients.bias.unwrap_or_default()), &expected.bias, tolerance);
}

fn check_all<E: Element>(tolerance: f64) {
    let sizes = if cfg!(miri) { &SIZES[..1] } else { &SIZES };
    for sizes in sizes {
        for case in cases(sizes) {
            if cfg!(miri) && case.name != "everything" {
                continue;
            }
            check::<E>(sizes, &case, Layout::TokensFirst, tolerance);
            if case.name == "everything" {
                check::<E>(sizes, &case, Layout::HeadsFirst, tolerance);
            }
        }
    }
}

#[test]
fn f64_is_the_definition() {
    check_all::<f64>(1e-11);
}

#[test]
fn f32_is_the_definition() {
    check_all::<f32>(2e-5);
}

#[test]
fn f16_is_the_definition() {
    check_all::<f16>(4e-3);
}

#[test]
fn bf16_is_the_definition() {
    check_all::<bf16>(3e-2);
}

/// NaN and infinity behind a mask change nothing, and before it they show.
#[test]
fn hidden_keys_may_hold_anything() {
    for sizes in if cfg!(miri) { &SIZES[..1] } else { &SIZES } {
        let lengths = [sizes.kv_len - 1; 2][..sizes.batch].into();
        let rule = attention_kernels::mask::Rule::FirstKeys(attention_kernels::mask::PerSequence::Each(lengths));
        let case = Case { rule, ..cases(sizes).remove(0) };
        let dims = [sizes.q(), sizes.k(), sizes.v(), sizes.context()];
        let clean = [0, 1, 2, 3]
            .map(|i| narrow::<f32>(&uniform(i as u64 + 1, 1.5, dims[i].iter().product()).collect::<Vec<_>>()));
        let results = |data: &[Vec<f32>; 4]| {
            let strides = dims.map(|dims| Layout::HeadsFirst.strides(dims));
            let views = [0, 1, 2, 3].map(|i| View::new("test", &data[i], strides[i], dims[i]).unwrap());
            let (output, gradients) = run(&case, views, Layout::HeadsFirst, false);
            (output.context, output.logsumexp, gradients.q, gradients.k, gradients.v)
        };
        for poison in [f32::NAN, f32::INFINITY] {
            let mut data = clean.clone();
            for (i, dim) in [(1, sizes.dim), (2, sizes.value_dim)] {
                let rows = data[i].chunks_exact_mut(dim).skip(sizes.kv_len - 1).step_by(sizes.kv_len);
                rows.for_each(|row| row.fill(poison));
            }
            assert_eq!(results(&data), results(&clean), "{sizes:?}, {poison}");
            data[2][0] = poison;
            assert!(!results(&data).0[0].is_finite());
        }
    }
}
