//! Numbers at the ends of their types: scores near the lowest number, large scores, long sums, and sums that overflow although
//! the result doesn't.
#![cfg(not(miri))] // no unsafe code, many products

mod common;

use attention_kernels::mask::{PerSequence, Rule};
use attention_kernels::philox::uniform;
use attention_kernels::{Dropout, Element, Gradients, Layout, Output, SimdFloat, View};
use common::{Case, Sizes, cases, narrow, run, to_f64, values};
use half::{bf16, f16};

/// Tiles; decoding in one split and in several; one query.
const SIZES: [Sizes; 5] = [
    Sizes { batch: 2, heads: 2, kv_heads: 1, q_len: 3, kv_len: 16, dim: 4, value_dim: 6 },
    Sizes { batch: 1, heads: 2, kv_heads: 1, q_len: 37, kv_len: 200, dim: 8, value_dim: 18 },
    Sizes { batch: 1, heads: 2, kv_heads: 2, q_len: 8, kv_len: 200, dim: 8, value_dim: 10 },
    Sizes { batch: 1, heads: 2, kv_heads: 1, q_len: 3, kv_len: 1100, dim: 6, value_dim: 4 },
    Sizes { batch: 1, heads: 1, kv_heads: 1, q_len: 1, kv_len: 128, dim: 2, value_dim: 2 },
];

/// Query, key, value and the gradient of the context, heads first.
type Data = [Vec<f64>; 4];

fn random(sizes: &Sizes) -> Data {
    let dims = [sizes.q(), sizes.k(), sizes.v(), sizes.context()];
    [0, 1, 2, 3].map(|i| uniform(i as u64 + 1, 1.0, dims[i].iter().product()).collect())
}

fn plain(sizes: &Sizes) -> Case {
    cases(sizes).remove(0)
}

fn attention<E: Element>(sizes: &Sizes, case: &Case, data: &Data) -> (Output<E>, Gradients<E>) {
    let dims = [sizes.q(), sizes.k(), sizes.v(), sizes.context()];
    let data = [0, 1, 2, 3].map(|i| narrow::<E>(&data[i]));
    let strides = dims.map(|dims| Layout::HeadsFirst.strides(dims));
    let views = [0, 1, 2, 3].map(|i| View::new("test", &data[i], strides[i], dims[i]).unwrap());
    run(case, views, Layout::HeadsFirst, true)
}

#[track_caller]
fn close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0f64, |a, x| a.max(x.abs()));
    for (i, (x, y)) in got.iter().zip(expected).enumerate() {
        let error = x * 0.25 - y * 0.25; // the difference of two large numbers is finite
        assert!(error.abs() <= tolerance * largest * 0.25, "{what}, {i}: {x}, not {y}");
    }
}

macro_rules! for_every_type {
    ($check:ident) => {
        $check::<f32>(1e-5);
        $check::<f64>(1e-12);
        $check::<f16>(4e-3);
        $check::<bf16>(2e-2);
    };
}

/// A bias of the lowest number everywhere is no mask: all keys are equal.
#[test]
fn lowest_score_is_a_score() {
    fn check<E: Element>(tolerance: f64) {
        for sizes in SIZES {
            let lowest = E::Float::LOWEST.to_f64();
            let bias = Some(([1, 1, 1, sizes.kv_len], vec![lowest; sizes.kv_len]));
            let mut data = random(&sizes);
            data[0].fill(0.0);
            let (without, gradients_without) = attention::<E>(&sizes, &plain(&sizes), &data);
            let (output, gradients) = attention::<E>(&sizes, &Case { bias, ..plain(&sizes) }, &data);
            close("context", &to_f64(&output.context), &to_f64(&without.context), tolerance);
            close("v", &to_f64(&gradients.v), &to_f64(&gradients_without.v), tolerance);
            close("k", &to_f64(&gradients.k), &to_f64(&gradients_without.k), tolerance);
            close("q", &to_f64(&gradients.q), &to_f64(&gradients_without.q), tolerance);
            assert!(values(&output.logsumexp).iter().all(|&x| x == lowest));
        }
    }
    for_every_type!(check);
}

/// A row with a higher score gives those of the lowest number nothing; minus infinity next to them gets nothing either.
#[test]
fn lowest_score_is_above_minus_infinity() {
    fn check<E: Element>(_: f64) {
        for sizes in SIZES {
            let mut bias = vec![E::Float::LOWEST.to_f64(); sizes.kv_len];
            bias[1..].fill(f64::NEG_INFINITY);
            let mut data = random(&sizes);
            data[0].fill(0.0);
            let case = |bias| Case { bias: Some(([1, 1, 1, sizes.kv_len], bias)), ..plain(&sizes) };
            let v = to_f64(&narrow::<E>(&data[2]));
            let context_is = |key: usize, output: Output<E>| {
                let context = to_f64(&output.context);
                let group = sizes.heads / sizes.kv_heads;
                for (row, context) in context.chunks_exact(sizes.value_dim).enumerate() {
                    let head = row / sizes.q_len / group;
                    assert_eq!(context, &v[(head * sizes.kv_len + key) * sizes.value_dim..][..sizes.value_dim]);
                }
            };
            context_is(0, attention::<E>(&sizes, &case(bias.clone()), &data).0);
            bias[sizes.kv_len - 1] = 0.0;
            context_is(sizes.kv_len - 1, attention::<E>(&sizes, &case(bias), &data).0);
        }
    }
    for_every_type!(check);
}

/// With values and gradients of the context that are one-hot, the context and the gradient of the value are both the weights.
#[test]
fn backward_has_the_weights_of_the_forward_pass() {
    fn check<E: Element>(tolerance: f64) {
        for (q_len, kv_len) in [(1, 128), (3, 130), (8, 200), (9, 130), (5, 70)] {
            for amplitude in [1.0, 50.0, 4000.0] {
                let sizes = Sizes { batch: 1, heads: 2, kv_heads: 1, q_len, kv_len, dim: 32, value_dim: kv_len };
                let mut data = random(&sizes);
                data[..2].iter_mut().flatten().for_each(|x| *x *= amplitude);
                for (j, row) in data[2].chunks_exact_mut(kv_len).enumerate() {
                    row.iter_mut().enumerate().for_each(|(c, x)| *x = f64::from(u8::from(j % kv_len == c)));
                }
                // One head has a gradient, since both share a value.
                for (row, grad) in data[3].chunks_exact_mut(kv_len).enumerate() {
                    grad.iter_mut().enumerate().for_each(|(c, x)| *x = f64::from(u8::from(row == c && row < q_len)));
                }
                let (output, gradients) = attention::<E>(&sizes, &plain(&sizes), &data);
                let (forward, v) = (to_f64(&output.context), to_f64(&gradients.v));
                let backward: Vec<f64> =
                    (0..q_len * kv_len).map(|index| v[index % kv_len * kv_len + index / kv_len]).collect();
                let what = format!("weights of {q_len} x {kv_len} at {amplitude}");
                close(&what, &backward, &forward[..q_len * kv_len], tolerance);
            }
        }
    }
    for_every_type!(check);
}

/// The mean of equal values is that value, however many there are.
#[test]
fn long_sums_lose_nothing() {
    for (q_len, kv_len) in [(1, 200_000), (8, 40_000), (9, 65_536), (16, 500_000)] {
        let sizes = Sizes { batch: 1, heads: 1, kv_heads: 1, q_len, kv_len, dim: 1, value_dim: 2 };
        let k = (0..kv_len).map(|j| -0.002 * j as f64 / kv_len as f64).collect();
        // 0.7 is rounded in each sum.
        let data = [vec![1.0; q_len], k, [1.0, 0.7].repeat(kv_len), vec![1.0; 2 * q_len]];
        let (output, gradients) = attention::<f32>(&sizes, &plain(&sizes), &data);
        close("context", &to_f64(&output.context), &[1.0, 0.7].repeat(q_len), 5e-6);
        let sums = to_f64(&gradients.v).chunks_exact(2).fold([0.0; 2], |sum, x| [sum[0] + x[0], sum[1] + x[1]]);
        close("sum of the gradient of the value", &sums, &[q_len as f64; 2], 5e-6);
    }
}

/// As many keys as are summed in parts, with a scale that isn't a power of two, against f64.
#[test]
fn parts_of_many_keys_are_the_whole() {
    let sizes = Sizes { batch: 1, heads: 2, kv_heads: 1, q_len: 40, kv_len: 6_500, dim: 6, value_dim: 5 };
    let mut data = random(&sizes);
    // Large scores, so that the greatest ones of the parts differ.
    data[0].iter_mut().for_each(|x| *x *= 4.0);
    let data = data.map(|x| to_f64(&narrow::<bf16>(&x)));
    let window = Rule::Band { below: Some(6_450), above: Some(0), offset: None };
    for case in [plain(&sizes), Case { rule: window, ..plain(&sizes) }] {
        let (expected, of_expected) = attention::<f64>(&sizes, &case, &data);
        let (got, gradients) = attention::<bf16>(&sizes, &case, &data);
        close("context", &to_f64(&got.context), &to_f64(&expected.context), 2e-2);
        close(
            "log-sum-exp",
            &values(&got.logsumexp),
            &expected.logsumexp.iter().map(|x| x.value()).collect::<Vec<_>>(),
            1e-5,
        );
        close("q", &to_f64(&gradients.q), &to_f64(&of_expected.q), 2e-2);
        close("k", &to_f64(&gradients.k), &to_f64(&of_expected.k), 2e-2);
        close("v", &to_f64(&gradients.v), &to_f64(&of_expected.v), 2e-2);
    }
}

/// Masks and options under which sums are long.
fn long_cases(sizes: &Sizes) -> Vec<Case> {
    let plain = plain(sizes);
    let lengths = Rule::FirstKeys(PerSequence::Same(sizes.kv_len - 1));
    let bias = Some(([1, 1, sizes.q_len, sizes.kv_len], uniform(9, 1.0, sizes.q_len * sizes.kv_len).collect()));
    let dropout = Some(Dropout { p: 0.25, seed: 3, first: 0 });
    vec![
        Case { rule: lengths, ..plain.clone() },
        Case { bias, softcap: Some(2.0), ..plain.clone() },
        Case { dropout, ..plain.clone() },
        plain,
    ]
}

/// Context and gradients are linear in the value, up to the largest number.
#[test]
fn large_values_overflow_no_sum() {
    fn check<E: Element>(tolerance: f64) {
        let exponent = E::Float::MAX_EXPONENT - if size_of::<E>() == 8 { 1 } else { 2 };
        let exponent = if std::any::TypeId::of::<E>() == std::any::TypeId::of::<f16>() { 14 } else { exponent };
        let large = 2f64.powi(exponent);
        for sizes in SIZES {
            for case in long_cases(&sizes) {
                let mut data = random(&sizes);
                // With dropout, a context is larger than the mean of the values.
                data[2].iter_mut().for_each(|x| *x *= 0.5);
                let (expected, gradients_expected) = attention::<E>(&sizes, &case, &data);
                data[2].iter_mut().for_each(|x| *x *= large);
                let (output, gradients) = attention::<E>(&sizes, &case, &data);
                let times = |numbers: &[E]| to_f64(numbers).iter().map(|x| x * large).collect::<Vec<_>>();
                let name = |what| format!("{what}, {}, {sizes:?}, {}", case.name, std::any::type_name::<E>());
                close(&name("context"), &to_f64(&output.context), &times(&expected.context), tolerance);
                close(&name("q"), &to_f64(&gradients.q), &times(&gradients_expected.q), tolerance);
                close(&name("k"), &to_f64(&gradients.k), &times(&gradients_expected.k), tolerance);
                close(&name("v"), &to_f64(&gradients.v), &to_f64(&gradients_expected.v), tolerance);
                if let (Some(bias), Some(expected)) = (gradients.bias, gradients_expected.bias) {
                    let expected: Vec<_> = to_f64(&expected).iter().map(|x| x * large).collect();
                    close(&name("bias"), &to_f64(&bias), &expected, tolerance);
                }
            }
        }
    }
    for_every_type!(check);
}

/// Means of the largest numbers, of one sign and of both.
#[test]
fn means_of_the_largest_numbers_are_finite() {
    fn check<E: Element>(tolerance: f64) {
        let largest = [f64::from(f16::MAX), f64::from(bf16::MAX), f64::from(f32::MAX), f64::MAX];
        let largest = largest.into_iter().rfind(|&x| E::narrow(E::Float::from_f64(x)).widen().to_f64() == x).unwrap();
        for sizes in SIZES {
            let mut data = random(&sizes);
            data[0].fill(0.0);
            data[2].fill(largest);
            let (output, gradients) = attention::<E>(&sizes, &plain(&sizes), &data);
            close("context", &to_f64(&output.context), &vec![largest; output.context.len()], tolerance);
            let zeros = |gradient: &[E], bound: f64| to_f64(gradient).iter().all(|x| x.abs() <= bound);
            assert!(zeros(&gradients.q, largest * tolerance) && zeros(&gradients.k, 0.0), "{sizes:?}");
            if sizes.kv_len.is_multiple_of(2) {
                let rows = data[2].chunks_exact_mut(sizes.value_dim).enumerate();
                rows.filter(|(j, _)| j % 2 == 1).for_each(|(_, row)| row.fill(-largest));
                let (output, gradients) = attention::<E>(&sizes, &plain(&sizes), &data);
                assert!(to_f64(&output.context).iter().all(|x| x.abs() <= largest * tolerance), "{sizes:?}");
                assert!(to_f64(&gradients.v).iter().all(|x| x.is_finite()));
            }
        }
    }
    for_every_type!(check);
}

/// Only the product of query, key and scale matters. The gradients are those of the scaled tensors.
#[test]
fn small_scale_of_large_keys_overflows_no_sum() {
    for sizes in SIZES {
        let plain = plain(&sizes);
        let mut data = random(&sizes);
        let (expected, gradients_expected) = attention::<f32>(&sizes, &plain, &data);
        let [of_q, of_k, of_v] = [-60, 95, 60].map(|exponent: i32| 2f64.powi(exponent));
        for (i, factor) in [(0, of_q), (1, of_k), (2, of_v)] {
            data[i].iter_mut().for_each(|x| *x *= factor);
        }
        let case = Case { scale: plain.scale / of_q / of_k, ..plain };
        let (output, gradients) = attention::<f32>(&sizes, &case, &data);
        let times = |numbers: &[f32], factor: f64| to_f64(numbers).iter().map(|x| x * factor).collect::<Vec<_>>();
        close("context", &to_f64(&output.context), &times(&expected.context, of_v), 1e-5);
        close("q", &to_f64(&gradients.q), &times(&gradients_expected.q, of_v / of_q), 1e-5);
        close("k", &to_f64(&gradients.k), &times(&gradients_expected.k, of_v / of_k), 1e-5);
        close("v", &to_f64(&gradients.v), &to_f64(&gradients_expected.v), 1e-5);
    }
}

/// A bias of minus infinity hides keys as a mask does, whatever they hold.
#[test]
fn minus_infinity_hides_anything() {
    fn check<E: Element>(tolerance: f64) {
        for sizes in SIZES {
            let mut bias = vec![0.0; sizes.kv_len];
            bias[sizes.kv_len - 1] = f64::NEG_INFINITY;
            let bias = Some(([1, 1, 1, sizes.kv_len], bias));
            let case = Case { bias, softcap: Some(2.0), ..plain(&sizes) };
            let mut data = random(&sizes);
            let (expected, gradients_expected) = attention::<E>(&sizes, &case, &data);
            for (i, dim) in [(1, sizes.dim), (2, sizes.value_dim)] {
                let rows = data[i].chunks_exact_mut(dim).skip(sizes.kv_len - 1).step_by(sizes.kv_len);
                rows.for_each(|row| row.fill(f64::NAN));
            }
            let (output, gradients) = attention::<E>(&sizes, &case, &data);
            let name = format!("{sizes:?}, {}", std::any::type_name::<E>());
            close(&name, &to_f64(&output.context), &to_f64(&expected.context), tolerance);
            if std::any::TypeId::of::<E>() == std::any::TypeId::of::<bf16>() {
                // With AMX the careful pass has another exponential than the fast one, which rounds otherwise.
                close(&name, &values(&output.logsumexp), &values(&expected.logsumexp), 1e-6);
            } else {
                assert_eq!(values(&output.logsumexp), values(&expected.logsumexp), "{name}");
            }
            for (got, expected) in [
                (gradients.q, gradients_expected.q),
                (gradients.k, gradients_expected.k),
                (gradients.v, gradients_expected.v),
            ] {
                close(&name, &to_f64(&got), &to_f64(&expected), tolerance);
            }
        }
    }
    for_every_type!(check);
}

/// A visible NaN shows in the rows that see it, however small its weight, whatever else is hidden.
#[test]
fn visible_nan_shows() {
    for sizes in SIZES {
        for is_low in [false, true] {
            let mut bias = vec![0.0; sizes.kv_len];
            // Far below the other scores, where the exponential is zero.
            bias[0] = if is_low { -1e6 } else { 0.0 };
            bias[sizes.kv_len - 1] = f64::NEG_INFINITY;
            let case = Case { bias: Some(([1, 1, 1, sizes.kv_len], bias)), ..plain(&sizes) };
            let mut data = random(&sizes);
            data[2][0] = f64::NAN;
            let (output, gradients) = attention::<f32>(&sizes, &case, &data);
            let (rows, dv) = (sizes.heads / sizes.kv_heads * sizes.q_len, sizes.value_dim);
            for (row, context) in output.context.chunks_exact(dv).enumerate() {
                assert!(context[0].is_nan() == (row < rows) && context[1..].iter().all(|x| x.is_finite()), "{sizes:?}");
            }
            assert!(gradients.q[..rows * sizes.dim].iter().all(|x| x.is_nan()), "{sizes:?}");
            let hidden = (sizes.kv_len - 1) * sizes.dim..sizes.kv_len * sizes.dim;
            assert!(gradients.k[hidden].iter().all(|&x| x == 0.0), "{sizes:?}");
        }
    }
}
