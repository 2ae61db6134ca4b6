use std::sync::Arc;

use super::*;
use crate::mask::PerSequence;
use crate::{BackwardOptions, Incoming, Layout, LogSumExp, MaskError, Saved, backward, forward};

/// Enough numbers for every tensor here.
const DATA: [f32; 4096] = [0.5; 4096];

/// (2, 4, 3, 6) queries on (2, 2, 5, 6) keys and (2, 2, 5, 7) values.
const DIMS: [[usize; 4]; 3] = [[2, 4, 3, 6], [2, 2, 5, 6], [2, 2, 5, 7]];

fn view(dims: [usize; 4]) -> View<'static, f32> {
    View::new("test", &DATA, Layout::HeadsFirst.strides(dims), dims).unwrap()
}

fn problem_of(dims: [[usize; 4]; 3], options: ProblemOptions<'static, f32>) -> Result<Problem<'static, f32>, Error> {
    Problem::new(view(dims[0]), view(dims[1]), view(dims[2]), options)
}

fn problem(options: ProblemOptions<'static, f32>) -> Result<Problem<'static, f32>, Error> {
    problem_of(DIMS, options)
}

#[track_caller]
fn refuses_dims(q: [usize; 4], k: [usize; 4], v: [usize; 4], tensor: &str) {
    match problem_of([q, k, v], ProblemOptions::default()) {
        Err(Error::Dims { what, .. }) if what == tensor => {}
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn fitting_sizes_are_accepted() {
    let problem = problem(ProblemOptions::default()).unwrap();
    assert_eq!(problem.context_dims(), [2, 4, 3, 7]);
    assert_eq!(problem.operands().group, 2);
}

#[test]
fn view_beyond_its_slice_is_refused() {
    let data = [0.0f32; 23];
    assert!(View::new("query", &data[..], [12, 6, 3], [2, 2, 2, 3]).is_err_and(|error| {
        error == Error::OutOfBounds { what: "query", dims: [2, 2, 2, 3], strides: [12, 6, 3, 1], len: 23 }
    }));
    // The last row ends with the slice.
    assert!(View::new("query", &data[..], [12, 6, 2], [2, 2, 2, 3]).is_ok());
}

#[test]
fn view_whose_end_cant_be_counted_is_refused() {
    for strides in [[usize::MAX, 1, 1], [usize::MAX / 2, usize::MAX / 2, usize::MAX / 2]] {
        assert!(matches!(View::new("key", &DATA[..], strides, [3, 3, 3, 3]), Err(Error::OutOfBounds { .. })));
    }
}

#[test]
#[should_panic(expected = "rows of the tensor")]
fn row_outside_a_view_is_refused() {
    // The element exists, but belongs to another head.
    view([1, 2, 2, 3]).row(0, 0, 2);
}

#[test]
fn bias_beyond_its_slice_is_refused() {
    let bias = BiasView::new(&DATA[..10], [1, 1, 3, 5], [0, 0, 5, 1]);
    assert!(matches!(bias, Err(Error::OutOfBounds { what: "bias", .. })));
    // An axis of length 1 broadcasts, whatever its stride.
    assert!(BiasView::new(&DATA[..5], [1, 1, 1, 5], [usize::MAX, 7, 5, 1]).is_ok());
}

#[test]
fn empty_tensors_are_refused() {
    for tensor in 0..3 {
        for axis in 0..4 {
            let mut dims = DIMS;
            dims[tensor][axis] = 0;
            let error = problem_of(dims, ProblemOptions::default()).err();
            assert!(matches!(error, Some(Error::Empty { .. })), "{error:?}");
        }
    }
    assert!(matches!(BiasView::new(&DATA[..], [1, 0, 3, 5], [0; 4]), Err(Error::Empty { what: "bias", .. })));
}

#[test]
fn key_of_another_batch_is_refused() {
    refuses_dims(DIMS[0], [1, 2, 5, 6], DIMS[2], "key");
}

#[test]
fn key_of_another_head_dim_is_refused() {
    refuses_dims(DIMS[0], [2, 2, 5, 7], DIMS[2], "key");
}

#[test]
fn key_heads_that_dont_divide_the_query_heads_are_refused() {
    refuses_dims(DIMS[0], [2, 3, 5, 6], [2, 3, 5, 7], "key");
    refuses_dims(DIMS[0], [2, 8, 5, 6], [2, 8, 5, 7], "key");
}

#[test]
fn value_of_another_size_than_the_key_is_refused() {
    for v in [[1, 2, 5, 7], [2, 4, 5, 7], [2, 2, 4, 7]] {
        refuses_dims(DIMS[0], DIMS[1], v, "value");
    }
}

#[test]
fn result_of_more_bytes_than_can_be_counted_is_refused() {
    let huge = |dims| View::new("test", &DATA[..], [0, 0, 0], dims).unwrap();
    let (len, options) = (usize::MAX / 64, ProblemOptions::default());
    let queries = Problem::new(huge([2, 4, len, 6]), view(DIMS[1]), view(DIMS[2]), options);
    let keys = Problem::new(view(DIMS[0]), huge([2, 2, len, 6]), huge([2, 2, len, 7]), options);
    for error in [queries.err(), keys.err()] {
        assert!(matches!(error, Some(Error::Memory { bytes: usize::MAX, .. })), "{error:?}");
    }
}

#[test]
fn result_larger_than_memory_is_an_error() {
    let huge = View::new("test", &DATA[..], [0, 0, 0], [1, 1, 1 << 45, 6]).unwrap();
    let key = view([1, 1, 5, 6]);
    let problem = Problem::new(huge, key, key, ProblemOptions::default()).unwrap();
    if !cfg!(miri) {
        let error = forward(&problem, Layout::HeadsFirst).err();
        assert!(matches!(error, Some(Error::Memory { what: "context", .. })), "{error:?}");
    }
}

#[track_caller]
fn refuses_option(options: ProblemOptions<'static, f32>, option: &str) {
    match problem(options) {
        Err(Error::Option { what, .. }) if what == option => {}
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn scale_that_is_not_finite_is_refused() {
    // The last is not finite as an f32.
    for scale in [f64::NAN, f64::INFINITY, 1e300] {
        refuses_option(ProblemOptions { scale: Some(scale), ..Default::default() }, "scale");
    }
}

#[test]
fn softcap_that_cant_be_divided_by_is_refused() {
    for softcap in [-1.0, f64::NAN, f64::INFINITY, 1e-60, 1e300] {
        refuses_option(ProblemOptions { softcap: Some(softcap), ..Default::default() }, "softcap");
    }
}

#[test]
fn softcap_of_zero_is_none() {
    for softcap in [0.0, -0.0] {
        let problem = problem(ProblemOptions { softcap: Some(softcap), ..Default::default() }).unwrap();
        assert_eq!((problem.options().softcap, problem.operands().softcap), (None, None));
    }
}

#[test]
fn dropout_that_is_no_probability_below_1_is_refused() {
    for p in [-0.1, 1.0, f64::NAN] {
        refuses_option(
            ProblemOptions { dropout: Some(Dropout { p, ..Dropout::default() }), ..Default::default() },
            "dropout",
        );
    }
}

#[test]
fn mask_of_another_size_is_refused() {
    static MASK: std::sync::LazyLock<Rule> =
        std::sync::LazyLock::new(|| Rule::FirstKeys(PerSequence::Each(Arc::new([1, 2, 3]))));
    let error = problem(ProblemOptions { mask: &MASK, ..Default::default() }).err();
    assert!(matches!(error, Some(Error::Mask(MaskError { part: "key lengths", .. }))), "{error:?}");
}

#[test]
fn bias_that_doesnt_broadcast_is_refused() {
    for dims in [[3, 1, 1, 1], [1, 2, 1, 1], [1, 1, 2, 1], [1, 1, 1, 4]] {
        let bias = BiasView::new(&DATA[..], dims, [100, 20, 5, 1]).unwrap();
        let error = problem(ProblemOptions { bias: Some(bias), ..Default::default() }).err();
        assert!(matches!(error, Some(Error::Dims { what: "bias", .. })), "{error:?}");
    }
}

#[test]
fn slopes_of_another_number_of_heads_are_refused() {
    for count in [0, 2, 5, 16] {
        let error = problem(ProblemOptions { slopes: Some(&DATA[..count]), ..Default::default() }).err();
        assert!(matches!(error, Some(Error::Length { what: "slopes", .. })), "{error:?}");
    }
    for count in [4, 8] {
        assert!(problem(ProblemOptions { slopes: Some(&DATA[..count]), ..Default::default() }).is_ok());
    }
}

fn backward_error(context: [usize; 4], grad: [usize; 4], lse: usize, grad_lse: usize, bias: bool) -> Option<Error> {
    let problem = problem(ProblemOptions::default()).unwrap();
    let logsumexp = vec![LogSumExp::default(); lse];
    let saved = Saved { context: view(context), logsumexp: &logsumexp };
    let incoming = Incoming { context: view(grad), logsumexp: Some(&DATA[..grad_lse]) };
    backward(&problem, saved, incoming, BackwardOptions { layout: Layout::HeadsFirst, bias }).err()
}

#[test]
fn backward_refuses_what_doesnt_fit_the_problem() {
    let (context, other) = ([2, 4, 3, 7], [2, 4, 3, 6]);
    assert_eq!(backward_error(context, context, 24, 24, false), None);
    assert!(matches!(backward_error(other, context, 24, 24, false), Some(Error::Dims { what: "context", .. })));
    let error = backward_error(context, other, 24, 24, false);
    assert!(matches!(error, Some(Error::Dims { what: "gradient of the context", .. })));
    assert!(matches!(backward_error(context, context, 23, 24, false), Some(Error::Length { what: "log-sum-exp", .. })));
    let error = backward_error(context, context, 24, 25, false);
    assert!(matches!(error, Some(Error::Length { what: "gradient of the log-sum-exp", .. })));
    let error = backward_error(context, context, 24, 24, true);
    assert!(matches!(error, Some(Error::Option { what: "gradient of the bias", .. })));
}
