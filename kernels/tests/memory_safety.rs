//! The kernels stay inside their slices: the proof that miri and AddressSanitizer run, and an ordinary test besides.
//!
//! A case is computed twice, on views and on copies of them. The copies fill their allocations to the last number, so
//! that miri and the sanitizer see any access beyond; the views stand in the midst of NaN, so that anything computed
//! from beyond shows in the numbers.
//!
//! `cargo +nightly miri test -p attention-kernels` needs no flags: under miri, tasks run on one thread, or, in
//! `threads_write_apart`, on two that aren't rayon's. Miri takes seconds for what takes a millisecond, so it gets each
//! way through the unsafe code once.

mod common;

use std::any::TypeId;

use attention_kernels::philox::uniform;
use attention_kernels::{Element, Layout, View};
use common::{Case, Sizes, cases, causal, narrow, run, to_f64, values};
use half::{bf16, f16};

const SMALL: Sizes = Sizes { batch: 2, heads: 2, kv_heads: 1, q_len: 3, kv_len: 7, dim: 3, value_dim: 2 };
/// One query against a cache.
const DECODING: Sizes = Sizes { q_len: 1, kv_len: 129, ..SMALL };

/// Lengths and head dims that leave a remainder in every block.
const LARGE: [Sizes; 3] = [
    Sizes { batch: 2, heads: 4, kv_heads: 2, q_len: 1, kv_len: 401, dim: 40, value_dim: 24 },
    Sizes { batch: 1, heads: 2, kv_heads: 2, q_len: 67, kv_len: 35, dim: 17, value_dim: 59 },
    Sizes { batch: 1, heads: 2, kv_heads: 1, q_len: 131, kv_len: 197, dim: 33, value_dim: 9 },
];

/// A tensor (batch, heads, len, dim) stored as (batch, len + 2, heads, dim + 2), with NaN around each row and sequence.
struct Spread<E> {
    data: Vec<E>,
    dims: [usize; 4],
}

impl<E: Element> Spread<E> {
    fn new(numbers: &[f64], dims: [usize; 4]) -> Self {
        let [batch, heads, len, dim] = dims;
        let mut spread = vec![f64::NAN; batch * (len + 2) * heads * (dim + 2)];
        for (row, numbers) in numbers.chunks_exact(dim).enumerate() {
            let (b, h, i) = (row / (heads * len), row / len % heads, row % len);
            let start = ((b * (len + 2) + 1 + i) * heads + h) * (dim + 2) + 1;
            spread[start..][..dim].copy_from_slice(numbers);
        }
        Self { data: narrow(&spread), dims }
    }

    /// A slice from the first number to the last.
    fn view(&self) -> View<'_, E> {
        let [batch, heads, len, dim] = self.dims;
        let strides = [(len + 2) * heads * (dim + 2), dim + 2, heads * (dim + 2)];
        let first = heads * (dim + 2) + 1;
        let last = first + (batch - 1) * strides[0] + (heads - 1) * strides[1] + (len - 1) * strides[2] + dim;
        View::new("view", &self.data[first..last], strides, self.dims).unwrap()
    }
}

/// That views give the same bits as their copies.
fn check<E: Element>(sizes: &Sizes, case: &Case, bias_gradient: bool) {
    let dims = [sizes.q(), sizes.k(), sizes.v(), sizes.context()];
    let numbers = [0, 1, 2, 3].map(|i| uniform(i as u64 + 1, 1.5, dims[i].iter().product()).collect::<Vec<_>>());
    // `into_boxed_slice` leaves no room behind the last number.
    let copies = numbers.each_ref().map(|numbers| narrow::<E>(numbers).into_boxed_slice());
    let layout = Layout::HeadsFirst;
    let views = [0, 1, 2, 3].map(|i| View::new("copy", &copies[i], layout.strides(dims[i]), dims[i]).unwrap());
    let of_copies = run(case, views, layout, bias_gradient);
    if cfg!(miri) && !(case.name == "everything" && bias_gradient) {
        return;
    }
    let spread = [0, 1, 2, 3].map(|i| Spread::<E>::new(&numbers[i], dims[i]));
    let of_views = run(case, spread.each_ref().map(Spread::view), layout, bias_gradient);
    let results = |(output, gradients): (attention_kernels::Output<E>, attention_kernels::Gradients<E>)| {
        let bias = gradients.bias.unwrap_or_default();
        let of_floats = [values(&output.logsumexp), to_f64(&bias)];
        let of_tensors = [output.context, gradients.q, gradients.k, gradients.v].map(|x| to_f64(&x));
        of_floats.into_iter().chain(of_tensors).collect::<Vec<_>>()
    };
    let (of_views, of_copies) = (results(of_views), results(of_copies));
    for (i, (views, copies)) in of_views.iter().zip(&of_copies).enumerate() {
        // Miri gives exp and ln of the standard library a random error.
        let is_close = |(x, y): (&f64, &f64)| x == y || cfg!(miri) && (x - y).abs() <= 1e-2 * x.abs().max(1.0);
        assert!(
            views.len() == copies.len() && views.iter().zip(copies).all(is_close),
            "{}, {sizes:?}, {}, result {i}",
            case.name,
            std::any::type_name::<E>()
        );
    }
}

fn check_all<E: Element>(all_sizes: &[Sizes]) {
    for sizes in all_sizes {
        for case in cases(sizes) {
            let alone =
                ["plain", "causal", "softcap", "bias", "key bias", "query bias", "dropout"].contains(&case.name);
            let first = *sizes == SMALL && TypeId::of::<E>() == TypeId::of::<f32>();
            let is_large = LARGE.contains(sizes);
            let other_type = TypeId::of::<E>() != TypeId::of::<f32>();
            // Large sizes are for the blocks, whose options f32 goes through.
            let brief = (cfg!(miri) && !(alone && first)) || (is_large && other_type && case.name != "causal");
            if case.name != "everything" && brief {
                continue;
            }
            if !is_large || case.bias.is_none() {
                check::<E>(sizes, &case, false);
            }
            if case.bias.is_some() && (first || !cfg!(miri)) {
                check::<E>(sizes, &case, true);
            }
        }
    }
}

#[test]
fn small_views_equal_copies() {
    check_all::<f32>(&[SMALL, DECODING]);
    check_all::<f64>(if cfg!(miri) { &[SMALL] } else { &[SMALL, DECODING] });
    check_all::<f16>(&[SMALL]);
    check_all::<bf16>(&[DECODING]);
}

#[test]
#[cfg_attr(miri, ignore = "takes hours")]
fn large_views_equal_copies() {
    check_all::<f32>(&LARGE);
    check_all::<f64>(&LARGE);
    check_all::<f16>(&LARGE);
    check_all::<bf16>(&LARGE);
}

/// More keys than a block of either pass, more queries than a block of either, and keys shared out over tasks.
#[test]
fn blocks_stay_inside_their_tensors() {
    let thin = Sizes { batch: 1, heads: 1, kv_heads: 1, q_len: 1, kv_len: 390, dim: 1, value_dim: 1 };
    for sizes in [thin, Sizes { q_len: 131, kv_len: 3, ..thin }] {
        check::<f32>(&sizes, &Case { rule: causal(), ..cases(&sizes).remove(0) }, false);
    }
}

/// Enough work for several threads, which miri watches for races. Almost all keys are masked, so that miri is quick.
#[test]
fn threads_write_apart() {
    use attention_kernels::mask::{PerSequence, Rule};
    let kv_len = if cfg!(miri) { 100 } else { 2000 };
    let sizes = Sizes { batch: 1, heads: 2, kv_heads: 2, q_len: 32, kv_len, dim: 2, value_dim: 2 };
    let window = Rule::Band { below: Some(1), above: Some(0), offset: None };
    let rule = Rule::FirstKeys(PerSequence::Same(2)) | window;
    check::<f32>(&sizes, &Case { rule, ..cases(&sizes).remove(0) }, false);
}
