//! Ranks that are gone, or at different places: every other rank gets an error, and none hangs.

use std::sync::Barrier;

use candle_attention::parallel::threads;
use candle_attention::{AttentionError, Error, Result};
use candle_core::DType;

use crate::laws::numbers;
use crate::{Ranks, in_time};

/// Runs ranks, and returns the error of each besides that of the whole.
fn errors(size: usize, work: impl Fn(Ranks) -> Result<()> + Send + Sync + 'static) -> (Error, Vec<Option<String>>) {
    in_time(move || {
        let errors = std::sync::Mutex::new(vec![None; size]);
        let whole = threads(size, |ranks| {
            let result = work(&ranks);
            errors.lock().unwrap()[ranks.rank()] = result.as_ref().err().map(Error::to_string);
            result
        });
        (whole.unwrap_err(), errors.into_inner().unwrap())
    })
}

fn wait_for_all(ranks: Ranks) -> Result<()> {
    ranks.all_reduce(&numbers(ranks.rank(), &[4], DType::F32)?).map(drop)
}

#[test]
fn a_rank_s_error_reaches_all() {
    for size in [2, 3, 7] {
        let (whole, each) = errors(size, |ranks| match ranks.rank() {
            1 => Err(AttentionError::Memory { what: "test", bytes: 17 }.into()),
            _ => wait_for_all(ranks),
        });
        assert!(matches!(whole, Error::Attention(AttentionError::Memory { bytes: 17, .. })), "{whole}");
        for (rank, error) in each.iter().enumerate().filter(|(rank, _)| *rank != 1) {
            let error = error.as_ref().unwrap();
            assert!(error.contains("rank 1: its error") && error.contains("17 bytes"), "rank {rank}: {error}");
        }
    }
}

#[test]
fn a_rank_s_panic_is_an_error_everywhere() {
    let (whole, each) = errors(3, |ranks| match ranks.rank() {
        2 => panic!("something is wrong"),
        _ => wait_for_all(ranks),
    });
    assert!(whole.to_string().contains("rank 2: a panic: something is wrong"), "{whole}");
    for error in each[..2].iter().flatten() {
        assert!(error.contains("rank 2: a panic: something is wrong"), "{error}");
    }
    assert!(each[0].is_some() && each[1].is_some());
}

#[test]
fn a_rank_that_ends_early_is_an_error_for_those_that_wait() {
    let (whole, each) = errors(3, |ranks| match ranks.rank() {
        0 => Ok(()),
        _ => wait_for_all(ranks),
    });
    assert!(matches!(whole, Error::Attention(AttentionError::Communication { rank: 0, .. })), "{whole}");
    assert!(each[0].is_none() && each[1].is_some() && each[2].is_some());
}

#[test]
fn what_a_rank_sent_before_its_end_arrives() {
    let results = in_time(|| {
        threads(3, |ranks| {
            let pending = ranks.start_ring(&[numbers(ranks.rank(), &[4], DType::F32)?])?;
            match ranks.rank() {
                // Not even waited for.
                0 => Ok(true),
                _ => Ok(pending.wait()?.len() == 1),
            }
        })
    });
    assert_eq!(results.unwrap(), [true; 3]);
}

/// Every rank has an error of [`AttentionError::Ranks`] with these texts.
fn assert_all_disagree(size: usize, texts: [&str; 2], work: impl Fn(Ranks) -> Result<()> + Send + Sync + 'static) {
    let (whole, each) = errors(size, move |ranks| {
        let result = work(ranks);
        // No later call succeeds.
        assert!(result.is_err() && ranks.agree("what comes next", "the same").is_err());
        result
    });
    assert!(matches!(whole, Error::Attention(AttentionError::Ranks { .. })), "{whole}");
    for (rank, error) in each.iter().enumerate() {
        let error = error.as_ref().unwrap();
        for text in texts {
            assert!(error.contains("same on every rank") && error.contains(text), "rank {rank}: {error}");
        }
    }
}

#[test]
fn an_exchange_and_a_sum_disagree() {
    for size in [2, 3, 7] {
        assert_all_disagree(size, ["exchange of 1 tensors", "all_reduce of f32 [4]"], |ranks| {
            let tensor = numbers(ranks.rank(), &[4], DType::F32)?;
            match ranks.rank() {
                1 => ranks.start_ring(&[tensor])?.wait().map(drop),
                _ => ranks.all_reduce(&tensor).map(drop),
            }
        });
    }
}

#[test]
fn exchanges_of_other_numbers_of_tensors_disagree() {
    for size in [2, 3, 7] {
        assert_all_disagree(size, ["exchange of 1 tensors", "exchange of 2 tensors"], |ranks| {
            let tensors = vec![numbers(ranks.rank(), &[4], DType::F32)?; 1 + ranks.rank() % 2];
            let first = ranks.start_ring(&tensors)?.wait();
            // In a ring of an odd number the last rank has no neighbour that differs.
            first.and_then(|_| ranks.start_ring(&tensors)?.wait()).map(drop)
        });
    }
}

#[test]
fn exchanges_with_other_ranks_disagree() {
    for size in [3, 4, 7] {
        assert_all_disagree(size, [", to rank", ", from rank"], move |ranks| {
            let tensor = numbers(ranks.rank(), &[4], DType::F32)?;
            let (rank, size) = (ranks.rank(), ranks.size());
            // All send to the next; all but one receive from the one before.
            let from = if rank == 0 { 1 } else { rank - 1 };
            let exchange = || ranks.start_exchange(std::slice::from_ref(&tensor), (rank + 1) % size, from)?.wait();
            // It takes a step for each rank until the last one lacks a message.
            (0..=size).try_for_each(|_| exchange().map(drop))
        });
    }
}

#[test]
fn starting_needs_no_other_rank() {
    let results = in_time(|| {
        let barrier = Barrier::new(3);
        threads(3, |ranks| {
            let tensor = numbers(ranks.rank(), &[100_000], DType::F32)?;
            // Rank 0 starts everything before the others start anything.
            let start = || Ok((ranks.start_ring(std::slice::from_ref(&tensor))?, ranks.start_all_reduce(&tensor)?));
            let (ring, sum) = match ranks.rank() {
                0 => {
                    let started: Result<_> = start();
                    barrier.wait();
                    started?
                }
                _ => {
                    barrier.wait();
                    start()?
                }
            };
            Ok(sum.wait()?.len() + ring.wait()?.len())
        })
    });
    assert_eq!(results.unwrap(), [2; 3]);
}

#[test]
fn a_communicator_outlives_its_work_without_use() {
    let ranks = threads(2, Ok).unwrap();
    assert_eq!((ranks[0].rank(), ranks[1].rank(), ranks[1].size()), (0, 1, 2));
    let error = ranks[0].all_gather_bytes(b"late").unwrap_err();
    assert!(error.to_string().contains("its work has ended"), "{error}");
}

#[test]
fn there_is_at_least_one_rank() {
    let error = threads(0, |_| Ok(())).unwrap_err();
    assert!(matches!(error, Error::Attention(AttentionError::Number { .. })), "{error}");
}
