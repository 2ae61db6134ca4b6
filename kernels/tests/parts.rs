//! Parts of a problem, put together, are the whole: the forward pass merged by log-sum-exp, gradients summed.

mod common;

use std::ops::Range;

use attention_kernels::mask::{PerSequence, Rule, ScoreShape};
use attention_kernels::philox::uniform;
use attention_kernels::{
    BackwardOptions, Dropout, Element, Error, HeadNumbers, Incoming, Layout, LogSumExp, Output, Part, Problem,
    ProblemOptions, Saved, View, backward, backward_wide, forward, forward_wide,
};
use common::{Case, Sizes, cases, naive, narrow, run, to_f64, with_problem};
use half::bf16;

const LAYOUT: Layout = Layout::HeadsFirst;

/// Where the sequences, key heads, queries and keys are cut. The cuts of keys are no multiples of the four that share a random number.
struct Cuts([Vec<usize>; 4]);

impl Cuts {
    fn ranges(&self, axis: usize) -> Vec<Range<usize>> {
        self.0[axis].windows(2).map(|ends| ends[0]..ends[1]).collect()
    }
}

fn view<E: Element>(data: &[E], dims: [usize; 4]) -> View<'_, E> {
    View::new("test", data, LAYOUT.strides(dims), dims).unwrap()
}

/// Sequences, heads and tokens of a part.
type Place = [Range<usize>; 3];

fn rows([b, h, i]: &Place) -> impl Iterator<Item = (usize, usize, usize)> {
    let (h, i) = (h.clone(), i.clone());
    b.clone().flat_map(move |b| {
        let i = i.clone();
        h.clone().flat_map(move |h| i.clone().map(move |i| (b, h, i)))
    })
}

/// The numbers of a part of a tensor, and its sizes.
fn part_of<E: Element>(x: View<E>, place: &Place) -> (Vec<E>, [usize; 4]) {
    let part = (0..3).fold(x, |x, axis| x.narrow(axis, place[axis].clone()).unwrap());
    let [batch, heads, len, _] = part.dims();
    let all = rows(&[0..batch, 0..heads, 0..len]).flat_map(|(b, h, i)| part.row(b, h, i).to_vec()).collect();
    (all, part.dims())
}

/// Adds the rows of a part to those of the whole.
fn add(to: &mut [f64], dims: [usize; 4], numbers: &[f64], place: &Place) {
    for ((b, h, i), from) in rows(place).zip(numbers.chunks_exact(dims[3])) {
        let start = ((b * dims[1] + h) * dims[2] + i) * dims[3];
        to[start..start + dims[3]].iter_mut().zip(from).for_each(|(to, x)| *to += x);
    }
}

/// Gradients of q, k and v, and the context, from parts.
fn in_parts<E: Element>(sizes: &Sizes, case: &Case, data: &[Vec<E>; 4], cuts: &Cuts) -> [Vec<f64>; 4] {
    let dims = [sizes.q(), sizes.k(), sizes.v(), sizes.context()];
    let group = sizes.heads / sizes.kv_heads;
    let mut results = [0, 1, 2, 3].map(|i| vec![0.0; dims[i].iter().product()]);
    for b in cuts.ranges(0) {
        for kv_heads in cuts.ranges(1) {
            for i in cuts.ranges(2) {
                let queries = [b.clone(), kv_heads.start * group..kv_heads.end * group, i];
                let keys: Vec<Place> = cuts.ranges(3).into_iter().map(|j| [b.clone(), kv_heads.clone(), j]).collect();
                of_queries(sizes, case, data, &queries, &keys, &mut results);
            }
        }
    }
    results
}

/// Adds the results of some queries, over all parts of the keys.
fn of_queries<E: Element>(
    sizes: &Sizes,
    case: &Case,
    data: &[Vec<E>; 4],
    queries: &Place,
    keys: &[Place],
    results: &mut [Vec<f64>; 4],
) {
    let dims = [sizes.q(), sizes.k(), sizes.v(), sizes.context()];
    let [q, k, v, grad] = [0, 1, 2, 3].map(|i| view(&data[i], dims[i]));
    let ((q, q_dims), (grad, context_dims)) = (part_of(q, queries), part_of(grad, queries));
    let whole = ScoreShape { batch: sizes.batch, num_heads: sizes.heads, q_len: sizes.q_len, kv_len: sizes.kv_len };
    let with_keys = |place: &Place, f: &mut dyn FnMut(&Problem<E>)| {
        let ((k, k_dims), (v, v_dims)) = (part_of(k, place), part_of(v, place));
        let first = [queries[0].start, queries[1].start, queries[2].start, place[2].start];
        let views = [view(&q, q_dims), view(&k, k_dims), view(&v, v_dims)];
        with_problem(case, Some(Part { whole, first }), views, f);
    };
    let mut merged: Option<Output<E::Float>> = None;
    for place in keys {
        with_keys(place, &mut |problem| {
            let output = forward_wide(problem, LAYOUT).unwrap();
            match &mut merged {
                None => merged = Some(output),
                Some(merged) => merged.merge(&output).unwrap(),
            }
        });
    }
    let merged = merged.unwrap();
    let context: Vec<E> = merged.context.iter().map(|&x| E::narrow(x)).collect();
    add(&mut results[3], dims[3], &to_f64(&context), queries);
    let grad_logsumexp: Vec<f64> = uniform(20, 1.0, sizes.batch * sizes.heads * sizes.q_len).collect();
    let of_part = rows(queries).map(|(b, h, i)| grad_logsumexp[(b * sizes.heads + h) * sizes.q_len + i]);
    let of_part = case.grad_logsumexp.then(|| narrow::<E::Float>(&of_part.collect::<Vec<_>>()));
    for place in keys {
        with_keys(place, &mut |problem| {
            let saved = Saved { context: view(&context, context_dims), logsumexp: &merged.logsumexp };
            let incoming = Incoming { context: view(&grad, context_dims), logsumexp: of_part.as_deref() };
            let gradients = backward_wide(problem, saved, incoming, BackwardOptions::default()).unwrap();
            add(&mut results[0], dims[0], &to_f64(&gradients.q), queries);
            add(&mut results[1], dims[1], &to_f64(&gradients.k), place);
            add(&mut results[2], dims[2], &to_f64(&gradients.v), place);
        });
    }
}

#[track_caller]
fn close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    let greatest = expected.iter().fold(1.0f64, |a, x| a.max(x.abs()));
    for (i, (x, y)) in got.iter().zip(expected).enumerate() {
        assert!((x - y).abs() <= tolerance * greatest, "{what}, {i}: {x}, not {y}");
    }
}

fn check<E: Element>(tolerance: f64) {
    let short = Sizes { batch: 3, heads: 4, kv_heads: 2, q_len: 11, kv_len: 23, dim: 5, value_dim: 3 };
    let long = Sizes { batch: 1, heads: 2, kv_heads: 1, q_len: 70, kv_len: 150, dim: 20, value_dim: 18 };
    // Some parts are decoded, in one split or several, and the others have too few keys for it.
    let decoded = Sizes { batch: 2, heads: 4, kv_heads: 2, q_len: 3, kv_len: 300, dim: 8, value_dim: 6 };
    let one_query = Sizes { q_len: 1, kv_len: 1300, ..decoded };
    for (sizes, cuts) in [
        (decoded, Cuts([vec![0, 1, 2], vec![0, 1, 2], vec![0, 3], vec![0, 61, 149, 300]])),
        (decoded, Cuts([vec![0, 2], vec![0, 2], vec![0, 1, 3], vec![0, 61, 149, 300]])),
        (one_query, Cuts([vec![0, 2], vec![0, 2], vec![0, 1], vec![0, 1203, 1300]])),
        (short, Cuts([vec![0, 1, 3], vec![0, 1, 2], vec![0, 2, 7, 11], vec![0, 1, 6, 15, 23]])),
        (long, Cuts([vec![0, 1], vec![0, 1], vec![0, 1, 70], vec![0, 61, 149, 150]])),
    ] {
        let slopes = Some(uniform(9, 0.5, sizes.batch * sizes.heads).map(f64::abs).collect());
        let of_sequences = Case { name: "alibi of each sequence", slopes, ..cases(&sizes).remove(0) };
        for case in cases(&sizes).into_iter().chain([of_sequences]) {
            let dims = [sizes.q(), sizes.k(), sizes.v(), sizes.context()];
            let data = [0, 1, 2, 3]
                .map(|i| narrow::<E>(&uniform(i as u64 + 1, 1.5, dims[i].iter().product()).collect::<Vec<_>>()));
            let views = [0, 1, 2, 3].map(|i| view(&data[i], dims[i]));
            let (output, gradients) = run(&case, views, LAYOUT, false);
            let parts = in_parts(&sizes, &case, &data, &cuts);
            let whole = [&gradients.q, &gradients.k, &gradients.v, &output.context];
            for ((what, part), whole) in ["q", "k", "v", "context"].into_iter().zip(&parts).zip(whole) {
                close(&format!("{what}, {}, {sizes:?}", case.name), part, &to_f64(whole), tolerance);
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "many numbers")]
fn parts_together_are_the_whole() {
    check::<f64>(1e-13);
    check::<f32>(2e-6);
    check::<bf16>(2e-2);
}

/// Context and gradients of q, k and v of some key heads and their queries, with dropout.
fn dropped(data: &[Vec<f64>; 4], dims: [[usize; 4]; 4], kv_heads: Range<usize>, count: usize) -> [Vec<f64>; 4] {
    let group = dims[0][1] / dims[1][1];
    let heads = kv_heads.start * group..kv_heads.end * group;
    let own = [0, 1, 2, 3].map(|i| {
        let heads = if [0, 3].contains(&i) { heads.clone() } else { kv_heads.clone() };
        part_of(view(&data[i], dims[i]), &[0..dims[i][0], heads, 0..dims[i][2]])
    });
    let [q, k, v, grad] = own.each_ref().map(|(numbers, dims)| view(numbers, *dims));
    let numbers = HeadNumbers { first: heads.start, count };
    let (dropout, heads) = (Some(Dropout { p: 0.4, seed: 9, first: 3 }), Some(numbers));
    let problem = Problem::new(q, k, v, ProblemOptions { dropout, heads, ..Default::default() }).unwrap();
    let output = forward(&problem, LAYOUT).unwrap();
    let saved = Saved { context: view(&output.context, own[3].1), logsumexp: &output.logsumexp };
    let incoming = Incoming { context: grad, logsumexp: None };
    let gradients = backward(&problem, saved, incoming, BackwardOptions::default()).unwrap();
    [gradients.q, gradients.k, gradients.v, output.context]
}

#[test]
#[cfg_attr(miri, ignore = "many numbers")]
fn heads_drop_what_they_drop_among_all_heads() {
    // Several tiles, one tile, and a query alone, which is decoded.
    for (q_len, kv_len) in [(70, 150), (11, 23), (1, 150)] {
        let (q, k) = ([2, 6, q_len, 5], [2, 3, kv_len, 5]);
        let dims = [q, k, k, q];
        let data = [0, 1, 2, 3].map(|i| uniform(i as u64 + 1, 1.5, dims[i].iter().product()).collect::<Vec<f64>>());
        let whole = dropped(&data, dims, 0..3, 6);
        for kv_heads in [0..1, 1..3, 2..3] {
            let part = dropped(&data, dims, kv_heads.clone(), 6);
            for i in 0..4 {
                let heads = if [0, 3].contains(&i) { 2 * kv_heads.start..2 * kv_heads.end } else { kv_heads.clone() };
                let (expected, _) = part_of(view(&whole[i], dims[i]), &[0..2, heads, 0..dims[i][2]]);
                close(&format!("result {i} of {kv_heads:?}, {q_len} queries"), &part[i], &expected, 1e-13);
            }
        }
    }
}

#[test]
fn more_heads_than_there_are_numbers_are_an_error() {
    let data = [0.0f32; 4];
    let x = view(&data, [1, 2, 2, 1]);
    for (first, count, fits) in [(0, 2, true), (1, 3, true), (1, 2, false), (usize::MAX, usize::MAX, false)] {
        let options = ProblemOptions { heads: Some(HeadNumbers { first, count }), ..Default::default() };
        let problem = Problem::new(x, x, x, options);
        assert_eq!(
            matches!(problem, Err(Error::Dims { what: "numbers of the heads", .. })),
            !fits,
            "{first} of {count}"
        );
    }
    // Nor can the heads of two sequences be counted.
    let (data, heads) = ([0.0f32; 8], Some(HeadNumbers { first: 0, count: usize::MAX }));
    let x = view(&data, [2, 2, 2, 1]);
    assert!(Problem::new(x, x, x, ProblemOptions { heads, ..Default::default() }).is_err());
}

#[test]
fn part_outside_the_whole_is_an_error() {
    let data = [0.0f32; 4];
    let x = view(&data, [1, 1, 4, 1]);
    let whole = ScoreShape { batch: 1, num_heads: 1, q_len: 8, kv_len: 6 };
    for (first, fits) in
        [([0, 0, 4, 2], true), ([0, 0, 4, 3], false), ([0, 1, 0, 0], false), ([0, 0, usize::MAX, 0], false)]
    {
        let options = ProblemOptions { part: Some(Part { whole, first }), ..Default::default() };
        let problem = Problem::new(x, x, x, options);
        assert_eq!(matches!(problem, Err(Error::Dims { what: "part", .. })), !fits, "{first:?}");
    }
    assert!(x.narrow(2, 1..5).is_err() && x.narrow(3, 0..1).is_err() && x.narrow(2, 4..4).is_ok());
}

/// A result of one query, with one value.
fn output(context: f64, largest: f64) -> Output<f64> {
    Output { context: vec![context], logsumexp: vec![LogSumExp::from_parts(largest, 0.0)] }
}

#[test]
fn rows_without_keys_stay_zero_whatever_comes_first() {
    let (none, one) = (|| output(0.0, f64::NEG_INFINITY), || output(5.0, 1e300));
    for (first, second, context, value) in
        [(none(), none(), 0.0, f64::NEG_INFINITY), (none(), one(), 5.0, 1e300), (one(), none(), 5.0, 1e300)]
    {
        let mut merged = first;
        merged.merge(&second).unwrap();
        assert_eq!((merged.context[0], merged.logsumexp[0].value()), (context, value));
        assert!(merged.logsumexp[0].log_total().is_finite());
    }
}

#[test]
fn part_of_a_whole_that_cannot_be_counted_is_an_error() {
    let data = [0.0f32; 4];
    let x = view(&data, [1, 1, 4, 1]);
    let huge = usize::MAX / 2;
    for whole in [(huge, 4, 4, 4), (1, huge, 4, 4), (1, 4, 4, huge + 1), (1, 2, huge, 4)].map(ScoreShape::from) {
        let options = ProblemOptions { part: Some(Part { whole, first: [0; 4] }), ..Default::default() };
        assert!(matches!(Problem::new(x, x, x, options), Err(Error::Memory { .. })), "{whole:?}");
    }
}

/// One process computes with a weight above zero where a key is visible.
#[test]
fn visible_numbers_that_are_not_finite_show_whatever_their_share() {
    for (odd, largest) in [(f64::NAN, -1e5), (f64::INFINITY, -1e5), (f64::NEG_INFINITY, 0.0)] {
        for odd_first in [false, true] {
            let (mut first, mut second) = (output(5.0, 0.0), output(odd, largest));
            if odd_first {
                std::mem::swap(&mut first, &mut second);
            }
            first.merge(&second).unwrap();
            let got = first.context[0];
            assert!(got == odd || (got.is_nan() && odd.is_nan()), "{got}, not {odd}");
        }
    }
}

/// What a mask hides may hold anything, in every part.
#[test]
#[cfg_attr(miri, ignore = "many numbers")]
fn hidden_keys_of_parts_may_hold_anything() {
    for (q_len, kv_len) in [(11, 23), (3, 300)] {
        let sizes = Sizes { batch: 2, heads: 2, kv_heads: 1, q_len, kv_len, dim: 5, value_dim: 3 };
        let cuts = Cuts([vec![0, 1, 2], vec![0, 1], vec![0, q_len], vec![0, 1, 6, 15, kv_len]]);
        // Parts of which nothing is visible, some, and all.
        let count = 8;
        let case = Case { rule: Rule::FirstKeys(PerSequence::Same(count)), ..cases(&sizes).remove(0) };
        let dims = [sizes.q(), sizes.k(), sizes.v(), sizes.context()];
        let mut data = [0, 1, 2, 3].map(|i| uniform(i as u64 + 1, 1.5, dims[i].iter().product()).collect::<Vec<_>>());
        let expected = in_parts::<f64>(&sizes, &case, &data, &cuts);
        for (x, dim) in [(1, sizes.dim), (2, sizes.value_dim)] {
            for (row, numbers) in data[x].chunks_exact_mut(dim).enumerate() {
                if row % kv_len >= count {
                    numbers.fill(if row % 2 == 0 { f64::NAN } else { f64::INFINITY });
                }
            }
        }
        let got = in_parts::<f64>(&sizes, &case, &data, &cuts);
        for ((what, got), expected) in ["q", "k", "v", "context"].into_iter().zip(&got).zip(&expected) {
            close(what, got, expected, 1e-13);
        }
    }
}

/// The context is that of all parts, and may be much larger than the values of one.
#[test]
fn part_with_small_values_has_finite_gradients() {
    let sizes = Sizes { batch: 1, heads: 1, kv_heads: 1, q_len: 2, kv_len: 4, dim: 2, value_dim: 4 };
    let case = cases(&sizes).remove(0);
    let data = [
        uniform(1, 1e-4, 4).collect(),
        uniform(2, 1e-5, 8).collect(),
        [vec![3e38; 8], vec![1.0; 8]].concat(),
        vec![8.0; 8],
    ]
    .map(|x: Vec<f64>| narrow::<f32>(&x));
    let cuts = Cuts([vec![0, 1], vec![0, 1], vec![0, 2], vec![0, 2, 4]]);
    let got = in_parts(&sizes, &case, &data, &cuts);
    let wide = data.each_ref().map(|x| to_f64(x));
    let exact = naive(&sizes, &case, [&wide[0], &wide[1], &wide[2], &wide[3]]);
    let expected = [&exact.q, &exact.k, &exact.v, &exact.context];
    for ((what, got), expected) in ["q", "k", "v", "context"].into_iter().zip(&got).zip(expected) {
        close(what, got, expected, 1e-5);
    }
}
