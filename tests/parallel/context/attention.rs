//! `scaled_dot_product_attention` over several ranks.

use candle_attention::parallel::{Order, Scheme, Split};
use candle_core::DType;

use super::setup::{ORDERS, RANKS, Sizes, cases, check, results};
use crate::common::assert_same_bits;

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

/// So many numbers that heads travel one by one, and tasks are many.
#[test]
fn context_of_many_tokens_is_one_process() {
    let sizes = Sizes { batch: 1, heads: 4, kv_heads: 2, len: 3001, dim: 32, value_dim: 24 };
    let split = Split::new(sizes.len, 3, Order::ZigZag).unwrap();
    let case =
        cases(&Sizes { len: 9, ..sizes }).unwrap().into_iter().find(|case| case.name == "causal dropout").unwrap();
    check(&sizes, &case, DType::F32, split, Scheme::Ring);
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

#[test]
fn context_in_half_types_is_as_close_as_one_process() {
    for dtype in [DType::BF16, DType::F16] {
        let all = cases(&SIZES).unwrap();
        let case = all.iter().find(|case| case.name == "causal").unwrap();
        let exact = results(&SIZES, case, DType::F64, None).unwrap();
        let whole = results(&SIZES, case, dtype, None).unwrap();
        let split = Split::new(SIZES.len, 3, Order::ZigZag).unwrap();
        let parts = results(&SIZES, case, dtype, Some((split, Scheme::Ring))).unwrap();
        for ((part, whole), exact) in parts.iter().zip(&whole).zip(&exact) {
            let error = |x| crate::common::max_scaled_difference(x, exact).unwrap();
            assert!(error(part) <= 2.0 * error(whole), "{dtype:?}: {} and {}", error(part), error(whole));
        }
    }
}
