//! `scaled_dot_product_attention` over several ranks.

use candle_attention::parallel::{ContextParallel, Order, Scheme, Split, threads};
use candle_attention::{AttentionOptions, Mask, scaled_dot_product_attention};
use candle_core::{DType, Tensor, Var};

use super::setup::{ORDERS, RANKS, Sizes, cases, check, error, results, results_of};
use crate::common::{assert_close, assert_same_bits, randn};

const SIZES: Sizes = Sizes { batch: 2, heads: 4, kv_heads: 2, len: 29, dim: 6, value_dim: 5 };

/// Two query heads a rank, and a key head for each rank, or one for all of them.
fn sizes_of_ulysses(ranks: usize) -> [Sizes; 2] {
    let sizes = Sizes { heads: 2 * ranks, ..SIZES };
    [Sizes { kv_heads: ranks, ..sizes }, Sizes { kv_heads: 1, ..sizes }]
}

#[test]
fn context_ring_is_one_process() {
    for ranks in RANKS {
        for (order, case) in
            ORDERS.into_iter().flat_map(|order| cases(&SIZES).unwrap().into_iter().map(move |case| (order, case)))
        {
            let split = Split::new(SIZES.len, ranks, order).unwrap();
            check(&SIZES, &case, DType::F64, split, Scheme::Ring);
            check(&SIZES, &case, DType::F32, split, Scheme::Ring);
        }
    }
}

#[test]
fn context_ulysses_is_one_process() {
    for ranks in RANKS {
        for sizes in sizes_of_ulysses(ranks) {
            for case in cases(&sizes).unwrap() {
                let order = ORDERS[case.name.len() % 2];
                let split = Split::new(sizes.len, ranks, order).unwrap();
                check(&sizes, &case, DType::F64, split, Scheme::Ulysses);
                check(&sizes, &case, DType::F32, split, Scheme::Ulysses);
            }
        }
    }
}

/// Lengths that ranks don't divide, more ranks than tokens, one token, no tokens.
#[test]
fn context_of_any_length_is_one_process() {
    for (len, ranks) in [(1, 1), (1, 3), (3, 7), (5, 4), (8, 7), (13, 2), (0, 2)] {
        for order in ORDERS {
            for scheme in [Scheme::Ring, Scheme::Ulysses] {
                let sizes = Sizes { len, heads: ranks, kv_heads: 1, ..SIZES };
                let split = Split::new(len, ranks, order).unwrap();
                let all = cases(&sizes).unwrap();
                let named = ["no mask", "causal", "sliding window", "dropout", "sinks", "log-sum-exp"];
                for case in all.iter().filter(|case| named.contains(&case.name)) {
                    check(&sizes, case, DType::F64, split, scheme);
                }
            }
        }
    }
}

/// So many numbers that the ring's heads travel one by one, and tasks are many.
#[test]
fn context_of_many_tokens_is_one_process() {
    let of_ring = Sizes { batch: 1, heads: 4, kv_heads: 2, len: 3001, dim: 32, value_dim: 24 };
    let of_ulysses = Sizes { batch: 2, heads: 4, kv_heads: 4, len: 1031, dim: 32, value_dim: 24 };
    for (sizes, ranks, scheme) in [
        (of_ring, 3, Scheme::Ring),
        (of_ulysses, 2, Scheme::Ulysses),
        (Sizes { kv_heads: 1, ..of_ulysses }, 2, Scheme::Ulysses),
    ] {
        let split = Split::new(sizes.len, ranks, Order::ZigZag).unwrap();
        let all = cases(&Sizes { len: 9, ..sizes }).unwrap();
        let case = all.iter().find(|case| case.name == "causal dropout").unwrap();
        check(&sizes, case, DType::F32, split, scheme);
    }
}

#[test]
fn context_has_the_same_bits_in_every_run() {
    for scheme in [Scheme::Ring, Scheme::Ulysses] {
        let sizes = sizes_of_ulysses(4)[0];
        let case = cases(&sizes).unwrap().pop().unwrap();
        let split = Split::new(sizes.len, 4, Order::ZigZag).unwrap();
        let run = || results(&sizes, &case, DType::F32, Some((split, scheme))).unwrap();
        let first = run();
        for _ in 0..3 {
            run().iter().zip(&first).for_each(|(again, first)| assert_same_bits(again, first, case.name));
        }
    }
}

/// Parts are rounded once, as a whole is.
#[test]
fn context_in_half_types_is_as_close_as_one_process() {
    let sizes = Sizes { batch: 2, heads: 8, kv_heads: 4, len: 101, dim: 16, value_dim: 16 };
    for dtype in [DType::BF16, DType::F16] {
        // Each rank has a key head of its own, and all share one.
        for sizes in [sizes, Sizes { kv_heads: 1, ..sizes }] {
            for case in cases(&sizes).unwrap().iter().filter(|case| ["no mask", "causal"].contains(&case.name)) {
                let exact = results_of(&sizes, case, [dtype, DType::F64], None).unwrap();
                let whole = results(&sizes, case, dtype, None).unwrap();
                for (scheme, order) in [Scheme::Ring, Scheme::Ulysses].into_iter().flat_map(|s| ORDERS.map(|o| (s, o)))
                {
                    let split = Split::new(sizes.len, 4, order).unwrap();
                    let parts = results(&sizes, case, dtype, Some((split, scheme))).unwrap();
                    for (i, ((part, whole), exact)) in parts.iter().zip(&whole).zip(&exact).enumerate() {
                        let [part, whole] = [part, whole].map(|x| error(x, exact).unwrap());
                        let what = format!("{}, result {i}, {dtype:?}, {scheme:?}, {order:?}", case.name);
                        assert!(part <= 1.1 * whole, "{what}: {part:e}, not {whole:e}");
                    }
                }
            }
        }
    }
}

/// Rows that fill no vector.
#[test]
fn context_of_any_head_dim_is_one_process() {
    let sizes = Sizes { dim: 59, value_dim: 37, heads: 6, kv_heads: 3, ..SIZES };
    let named = ["causal", "everything"];
    for case in cases(&sizes).unwrap().iter().filter(|case| named.contains(&case.name)) {
        for (order, scheme) in [(Order::ZigZag, Scheme::Ring), (Order::Contiguous, Scheme::Ulysses)] {
            let split = Split::new(sizes.len, 3, order).unwrap();
            check(&sizes, case, DType::F64, split, scheme);
            check(&sizes, case, DType::F32, split, scheme);
        }
    }
}

/// Makes an input of a variable.
type View = fn(&Tensor) -> candle_core::Result<Tensor>;

/// The context, and the gradients of inputs that `view` makes of variables with these shapes, whose tokens are along `axis`.
fn of_views(
    shapes: &[Vec<usize>; 3],
    axis: usize,
    view: View,
    ranks: Option<(Split, Scheme)>,
) -> candle_attention::Result<Vec<Tensor>> {
    let run = |parallel: Option<ContextParallel>| -> candle_attention::Result<Vec<Tensor>> {
        let mut vars = Vec::new();
        for (i, shape) in shapes.iter().enumerate() {
            let x = randn(60 + i as u64, shape.clone(), DType::F64)?;
            let own = match &parallel {
                Some(parallel) => parallel.split.shard(&x, axis, parallel.communicator.rank())?,
                None => x,
            };
            vars.push(Var::from_tensor(&own.contiguous()?)?);
        }
        let [q, k, v] = [view(&vars[0])?, view(&vars[1])?, view(&vars[2])?];
        let options = AttentionOptions { attn_mask: Mask::causal(), parallel, ..Default::default() };
        let context = scaled_dot_product_attention(&q, &k, &v, &options)?.context;
        let grads = context.sqr()?.sum_all()?.backward()?;
        let of_vars = vars.iter().map(|var| grads.get(var).expect("a gradient").clone());
        Ok([context.detach()].into_iter().chain(of_vars).collect())
    };
    let Some((split, scheme)) = ranks else { return run(None) };
    let all = threads(split.ranks(), |communicator| run(Some(ContextParallel { communicator, split, scheme })))?;
    let joined = (0..4).map(|i| {
        let parts: Vec<_> = all.iter().map(|results| results[i].clone()).collect();
        split.join(&parts, if i == 0 { parts[0].rank() - 2 } else { axis })
    });
    joined.collect()
}

#[test]
fn context_takes_the_inputs_that_one_process_takes() {
    let (b, h, l, d) = (2, 4, 11, 5);
    let same = |dims: &[usize]| [0, 1, 2].map(|_| dims.to_vec());
    let one_query = [vec![1, h, l, d], vec![b, 2, l, d], vec![b, 2, l, d]];
    let one_key = [vec![b, h, l, d], vec![1, 2, l, d], vec![b, 2, l, d]];
    let views: [(&str, [Vec<usize>; 3], usize, View); 7] = [
        ("one query", one_query, 2, |x| Ok(x.clone())),
        ("one key", one_key, 2, |x| Ok(x.clone())),
        ("tokens first", same(&[b, l, h, d]), 1, |x| x.transpose(1, 2)),
        ("rows with gaps", same(&[b, h, d, l]), 3, |x| x.transpose(2, 3)),
        ("a part of each row", same(&[b, h, l, d]), 2, |x| x.narrow(3, 1, 3)),
        ("three axes", same(&[b, l, d]), 1, |x| Ok(x.clone())),
        ("two axes", same(&[l, d]), 0, |x| Ok(x.clone())),
    ];
    for (name, shapes, axis, view) in views {
        let expected = of_views(&shapes, axis, view, None).unwrap();
        for (ranks, scheme) in [(3, Scheme::Ring), (2, Scheme::Ulysses)] {
            if scheme == Scheme::Ulysses && shapes[0].len() < 4 {
                // It has one head.
                continue;
            }
            let split = Split::new(l, ranks, Order::ZigZag).unwrap();
            let got = of_views(&shapes, axis, view, Some((split, scheme))).unwrap();
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                assert_close(got, expected, 1e-12, &format!("{name}, result {i}, {scheme:?}"));
            }
        }
    }
}
