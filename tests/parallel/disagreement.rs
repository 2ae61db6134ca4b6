//! Ranks that disagree, in calls after which all are at the same place: every rank gets an error that names both, and the next call
//! succeeds.

use candle_attention::{AttentionError, Error, Result};
use candle_core::{DType, Device, Tensor};

use crate::Ranks;
use crate::laws::numbers;

/// Every rank's error names rank 0 and the last rank, with both texts. The ranks can go on.
fn assert_disagree<T: std::fmt::Debug>(ranks: Ranks, result: Result<T>, texts: [&str; 2]) -> Result<()> {
    match result {
        Err(Error::Attention(error @ AttentionError::Ranks { .. })) => {
            let text = error.to_string();
            let AttentionError::Ranks { ranks: two, got, .. } = error else { unreachable!() };
            assert_eq!(two, [0, ranks.size() - 1]);
            for (got, expected) in got.iter().zip(texts) {
                assert!(got.contains(expected), "expected {expected}, got {got}");
                assert!(text.contains(expected), "{text}");
            }
        }
        other => panic!("expected an error of the ranks, got {other:?}"),
    }
    ranks.agree("what comes next", "the same")?;
    assert_eq!(
        ranks.all_reduce(&Tensor::ones(3, DType::F32, &Device::Cpu)?)?.to_vec1::<f32>()?,
        [ranks.size() as f32; 3]
    );
    Ok(())
}

/// `ours` on the last rank, `others` on the others. `None` on one rank, which agrees with itself.
fn last<T>(ranks: Ranks, ours: T, others: T) -> Option<T> {
    match (ranks.size(), ranks.rank() + 1 == ranks.size()) {
        (1, _) => None,
        (_, true) => Some(ours),
        (_, false) => Some(others),
    }
}

pub fn of_shapes(ranks: Ranks) -> Result<()> {
    let Some(shape) = last(ranks, [3, 2], [2, 3]) else { return Ok(()) };
    let result = ranks.all_reduce(&numbers(0, &shape, DType::F32)?);
    assert_disagree(ranks, result, ["f32 [2, 3]", "f32 [3, 2]"])
}

pub fn of_dtypes(ranks: Ranks) -> Result<()> {
    let Some(dtype) = last(ranks, DType::BF16, DType::F32) else { return Ok(()) };
    let result = ranks.all_reduce(&numbers(0, &[4], dtype)?);
    assert_disagree(ranks, result, ["f32 [4]", "bf16 [4]"])
}

pub fn of_calls(ranks: Ranks) -> Result<()> {
    let tensor = numbers(0, &[4], DType::F32)?;
    let Some(gathers) = last(ranks, true, false) else { return Ok(()) };
    let result = if gathers { ranks.all_gather(&tensor).map(drop) } else { ranks.all_reduce(&tensor).map(drop) };
    assert_disagree(ranks, result, ["all_reduce of f32 [4]", "all_gather"])
}

pub fn of_roots(ranks: Ranks) -> Result<()> {
    let Some(root) = last(ranks, 1, 0) else { return Ok(()) };
    let result = ranks.broadcast(Some(&numbers(0, &[4], DType::F32)?), root);
    assert_disagree(ranks, result, ["broadcast from rank 0", "broadcast from rank 1"])
}

pub fn of_texts(ranks: Ranks) -> Result<()> {
    let Some(text) = last(ranks, "window 64", "window 32") else { return Ok(()) };
    let result = ranks.agree("mask", text);
    let error = result.as_ref().unwrap_err().to_string();
    let who = ranks.size() - 1;
    let expected = "mask: expected the same on every rank, got window 32 on rank 0 and window 64 on rank";
    assert_eq!(error, format!("{expected} {who}"));
    assert_disagree(ranks, result, ["window 32", "window 64"])
}

/// The same text about two things.
pub fn of_what_they_agree_on(ranks: Ranks) -> Result<()> {
    let Some(what) = last(ranks, "heads", "window") else { return Ok(()) };
    assert_disagree(ranks, ranks.agree(what, "8"), ["agreement on window", "agreement on heads"])
}

pub fn about_whether_a_tensor_can_be_summed(ranks: Ranks) -> Result<()> {
    let Some(dtype) = last(ranks, DType::U32, DType::F32) else { return Ok(()) };
    let result = ranks.all_reduce(&numbers(0, &[4], dtype)?);
    match dtype {
        // This rank has its own error.
        DType::U32 => {}
        _ => return assert_disagree(ranks, result, ["f32 [4]", "expected dtype f32, f64, bf16 or f16, got U32"]),
    }
    assert_disagree(ranks, result, ["f32 [4]", "u32 [4]"])
}

/// All ranks make the same wrong call: the error is about the call.
pub fn none_where_all_are_wrong(ranks: Ranks) -> Result<()> {
    let tensor = numbers(0, &[4], DType::U32)?;
    let error = ranks.all_reduce(&tensor).unwrap_err();
    assert!(matches!(error, Error::Attention(AttentionError::DType { got: DType::U32, .. })), "{error}");
    let error = ranks.all_to_all(&vec![tensor.clone(); ranks.size() + 1]).unwrap_err();
    assert!(matches!(error, Error::Attention(AttentionError::Number { .. })), "{error}");
    let error = ranks.broadcast(Some(&tensor), ranks.size()).unwrap_err();
    assert!(matches!(error, Error::Attention(AttentionError::Number { name: "root", .. })), "{error}");
    let error = ranks.broadcast(None, 0).unwrap_err();
    let is_right = match ranks.size() {
        1 => matches!(error, Error::Attention(AttentionError::Communication { rank: 0, .. })),
        _ => matches!(error, Error::Attention(AttentionError::Ranks { ranks: [0, 1], .. })),
    };
    assert!(is_right, "{error}");
    ranks.agree("what comes next", "the same")
}
