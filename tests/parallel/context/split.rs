//! Who holds which tokens, and who has how much work.

use candle_attention::parallel::{Order, Split, threads};
use candle_attention::{AttentionError, Error, Mask};
use candle_core::DType;

use super::setup::ORDERS;
use crate::common::{assert_same_bits, randn};

/// The busiest rank's pairs over the mean.
fn imbalance(len: usize, ranks: usize, order: Order, mask: &Mask) -> f64 {
    let pairs = Split::new(len, ranks, order).unwrap().visible_pairs(mask, 1, 1).unwrap();
    *pairs.iter().max().unwrap() as f64 * ranks as f64 / pairs.iter().sum::<u64>() as f64
}

#[test]
fn context_zig_zag_balances_causal_work() {
    for (len, ranks) in [(16_384, 4), (16_384, 7), (1000, 3), (4097, 4), (128, 2)] {
        let mask = Mask::causal();
        assert!(imbalance(len, ranks, Order::ZigZag, &mask) < 1.05, "{len} tokens, {ranks} ranks");
        assert!(imbalance(len, ranks, Order::Contiguous, &mask) > 1.4, "{len} tokens, {ranks} ranks");
        assert!(imbalance(len, ranks, Order::Contiguous, &Mask::sliding_window(16)) < 1.2);
    }
}

#[test]
fn context_work_is_counted_pair_by_pair() {
    let ids = [vec![0, 0, 1, 1, 1, 2, 0], vec![3; 7]];
    let table = randn(1, (1, 3, 7, 7), DType::F64).unwrap().gt(0.0).unwrap();
    for mask in [
        Mask::full(),
        Mask::causal() & Mask::key_lengths(&[4, 7]),
        Mask::document_ids(&ids),
        Mask::from_tensor(&table).unwrap(),
    ] {
        for order in ORDERS {
            let split = Split::new(7, 3, order).unwrap();
            let seen = mask.to_tensor((2, 3, 7, 7), &candle_core::Device::Cpu).unwrap();
            let seen = seen.broadcast_as((2, 3, 7, 7)).unwrap().to_dtype(DType::F64).unwrap();
            for (rank, pairs) in split.visible_pairs(&mask, 2, 3).unwrap().into_iter().enumerate() {
                let own = split.shard(&seen, 2, rank).unwrap();
                assert_eq!(own.sum_all().unwrap().to_scalar::<f64>().unwrap(), pairs as f64, "{mask:?}, {split:?}");
            }
        }
    }
}

#[test]
fn context_split_is_gathered_in_order() {
    for (len, ranks) in [(10, 3), (3, 4), (0, 2), (6, 1)] {
        for order in ORDERS {
            let split = Split::new(len, ranks, order).unwrap();
            let x = randn(2, (2, len, 3), DType::F32).unwrap();
            let all = threads(ranks, |communicator| {
                split.gather(&*communicator, &split.shard(&x, 1, communicator.rank())?, 1)
            });
            all.unwrap().iter().for_each(|all| assert_same_bits(all, &x, "gathered"));
        }
    }
}

#[test]
fn context_split_refuses_what_is_no_part() {
    let split = Split::new(6, 2, Order::Contiguous).unwrap();
    let x = randn(3, (5, 2), DType::F32).unwrap();
    let is_shape = |result: Result<candle_core::Tensor, Error>| {
        matches!(result, Err(Error::Attention(AttentionError::Shape { .. })))
    };
    assert!(is_shape(split.shard(&x, 0, 0)) && is_shape(split.shard(&x, 2, 0)));
    assert!(is_shape(split.join(&[x.clone(), x.clone()], 0)));
    let six = randn(3, (6, 2), DType::F32).unwrap();
    assert!(split.shard(&six, 0, 2).is_err() && split.join(&[six], 0).is_err());
    assert!(Split::new(6, 0, Order::ZigZag).is_err());
    let text = threads(2, |communicator| {
        let x = randn(3, (3, 2 + communicator.rank()), DType::F32)?;
        Ok(split.gather(&*communicator, &x, 0).unwrap_err().to_string())
    });
    text.unwrap().iter().for_each(|text| assert!(text.contains("[2]") && text.contains("[3]"), "{text}"));
}
