//! What a communicator computes, against the same on one rank.

use candle_attention::Result;
use candle_core::{DType, Device, Tensor, Var};

use crate::Ranks;

const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];
const ALL: [DType; 9] =
    [DType::F32, DType::F64, DType::BF16, DType::F16, DType::U8, DType::U32, DType::I16, DType::I32, DType::I64];

/// The numbers of rank `rank`: any rank can make those of any other. Their sizes differ, so that the order of a sum shows.
pub fn numbers(rank: usize, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(rank as u64 + 1);
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    };
    let count = shape.iter().product();
    let values = (0..count).map(|_| match dtype.is_int() {
        true => (next() % 100) as f64,
        false => (next() as f64 / 2f64.powi(30) - 1.0) * [1.0, 1e-3, 300.0][next() as usize % 3],
    });
    let values = values.collect::<Vec<f64>>();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?)
}

/// The bits of a tensor.
pub fn bits(tensor: &Tensor) -> Result<Vec<u8>> {
    match tensor.elem_count() {
        0 => Ok(Vec::new()),
        _ => Ok(safetensors::tensor::View::data(tensor).into_owned()),
    }
}

/// The same shape, dtype and bits.
fn assert_same(got: &Tensor, expected: &Tensor) -> Result<()> {
    assert_eq!((got.dims(), got.dtype()), (expected.dims(), expected.dtype()));
    assert!(bits(got)? == bits(expected)?, "expected {expected}, got {got}");
    Ok(())
}

/// ((x_0 + x_1) + x_2) + ..., half types in f32.
fn sum(tensors: &[Tensor]) -> Result<Tensor> {
    let dtype = tensors[0].dtype();
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let mut sum = tensors[0].to_dtype(wide)?;
    for tensor in &tensors[1..] {
        sum = (sum + tensor.to_dtype(wide)?)?;
    }
    Ok(sum.to_dtype(dtype)?)
}

pub fn all_reduce_adds_in_the_order_of_ranks(ranks: Ranks) -> Result<()> {
    for dtype in FLOATS {
        for shape in [&[][..], &[0], &[2, 0, 3], &[1], &[5], &[3, 7], &[3, 41, 100]] {
            let ours = numbers(ranks.rank(), shape, dtype)?;
            let all = (0..ranks.size()).map(|rank| numbers(rank, shape, dtype)).collect::<Result<Vec<_>>>()?;
            assert_same(&ranks.all_reduce(&ours)?, &sum(&all)?)?;
        }
    }
    Ok(())
}

pub fn all_reduce_of_a_view_is_that_of_its_numbers(ranks: Ranks) -> Result<()> {
    let matrix = numbers(ranks.rank(), &[6, 5], DType::F32)?;
    let views = [matrix.t()?, matrix.narrow(1, 1, 3)?, matrix.narrow(0, 2, 1)?.broadcast_as((4, 5))?, matrix.get(3)?];
    for view in views {
        assert_same(&ranks.all_reduce(&view)?, &ranks.all_reduce(&view.force_contiguous()?)?)?;
        assert_same(&ranks.all_gather(&view)?[ranks.rank()], &view)?;
    }
    Ok(())
}

/// A shape that differs from rank to rank; that of rank 1 is empty.
fn shape(rank: usize) -> Vec<usize> {
    match rank {
        0 => vec![],
        1 => vec![3, 0],
        rank => vec![rank, 2 * rank + 1],
    }
}

pub fn all_gather_has_every_rank_s_tensor(ranks: Ranks) -> Result<()> {
    for dtype in ALL {
        let all = ranks.all_gather(&numbers(ranks.rank(), &shape(ranks.rank()), dtype)?)?;
        assert_eq!(all.len(), ranks.size());
        for (rank, tensor) in all.iter().enumerate() {
            assert_same(tensor, &numbers(rank, &shape(rank), dtype)?)?;
        }
    }
    Ok(())
}

pub fn all_to_all_transposes(ranks: Ranks) -> Result<()> {
    let tensor = |from: usize, to: usize| numbers(100 * from + to, &shape(to), ALL[(from + to) % ALL.len()]);
    let ours = (0..ranks.size()).map(|to| tensor(ranks.rank(), to)).collect::<Result<Vec<_>>>()?;
    let theirs = ranks.all_to_all(&ours)?;
    assert_eq!(theirs.len(), ranks.size());
    theirs.iter().enumerate().try_for_each(|(from, got)| assert_same(got, &tensor(from, ranks.rank())?))
}

pub fn broadcast_is_the_root_s_tensor(ranks: Ranks) -> Result<()> {
    for root in 0..ranks.size() {
        for dtype in ALL {
            let ours = numbers(ranks.rank(), &shape(ranks.rank()), dtype)?;
            let expected = numbers(root, &shape(root), dtype)?;
            // What others than the root give doesn't count.
            assert_same(&ranks.broadcast(Some(&ours), root)?, &expected)?;
            assert_same(&ranks.broadcast((ranks.rank() == root).then_some(&ours), root)?, &expected)?;
        }
    }
    Ok(())
}

pub fn a_ring_brings_everything_around(ranks: Ranks) -> Result<()> {
    let own = |rank: usize| Ok([numbers(rank, &shape(rank), DType::BF16)?, numbers(rank, &[3], DType::I64)?]);
    let mut held = own(ranks.rank())?.to_vec();
    for step in 1..=ranks.size() {
        held = ranks.start_ring(&held)?.wait()?;
        let owner = (ranks.rank() + ranks.size() - step) % ranks.size();
        let expected: Result<_> = own(owner);
        assert_eq!(held.len(), 2);
        held.iter().zip(expected?).try_for_each(|(got, expected)| assert_same(got, &expected))?;
    }
    assert!(ranks.start_ring(&[])?.wait()?.is_empty());
    Ok(())
}

pub fn any_rotation_can_be_exchanged(ranks: Ranks) -> Result<()> {
    let (rank, size) = (ranks.rank(), ranks.size());
    for by in 0..size {
        let (to, from) = ((rank + by) % size, (rank + size - by) % size);
        let got = ranks.start_exchange(&[numbers(rank, &[2, 5000], DType::F32)?], to, from)?.wait()?;
        assert_same(&got[0], &numbers(from, &[2, 5000], DType::F32)?)?;
    }
    // Pairs, where the last of an odd number of ranks stays alone.
    let partner = if (rank ^ 1) < size { rank ^ 1 } else { rank };
    let got = ranks.start_exchange(&[numbers(rank, &[4], DType::F32)?], partner, partner)?.wait()?;
    assert_same(&got[0], &numbers(partner, &[4], DType::F32)?)?;
    ranks.agree("what is left", "nothing")
}

pub fn calls_overlap_and_some_are_never_waited_for(ranks: Ranks) -> Result<()> {
    let (rank, size) = (ranks.rank(), ranks.size());
    let ours = numbers(rank, &[50_000], DType::F32)?;
    let mut rings = Vec::new();
    let mut sums = Vec::new();
    for _ in 0..5 {
        rings.push(ranks.start_ring(std::slice::from_ref(&ours))?);
        sums.push(ranks.start_all_reduce(&ours)?);
        drop(ranks.start_ring(&[ours.affine(2.0, 0.0)?])?);
        drop(ranks.start_all_reduce(&ours.affine(2.0, 0.0)?)?);
    }
    let before = numbers((rank + size - 1) % size, &[50_000], DType::F32)?;
    let total = sum(&(0..size).map(|rank| numbers(rank, &[50_000], DType::F32)).collect::<Result<Vec<_>>>()?)?;
    for pending in sums.into_iter().rev() {
        assert_same(&pending.wait()?[0], &total)?;
    }
    rings.into_iter().rev().try_for_each(|pending| assert_same(&pending.wait()?[0], &before))
}

pub fn bytes_are_those_of_theory(ranks: Ranks) -> Result<()> {
    let (rank, n) = (ranks.rank(), ranks.size() as u64);
    let tensor = numbers(rank, &[100, 101], DType::BF16)?;
    let bytes = 20_200;
    // Calls that nobody waits for are over when a later one is.
    ranks.agree("earlier calls", "over")?;
    let sent = |call: &dyn Fn() -> Result<()>| -> Result<u64> {
        let before = ranks.bytes_sent();
        call()?;
        Ok(ranks.bytes_sent() - before)
    };
    let all_reduce = sent(&|| ranks.all_reduce(&tensor).map(drop))?;
    assert!(all_reduce as f64 <= 1.1 * (2 * (n - 1) * bytes) as f64 / n as f64, "{all_reduce} of {bytes}");
    let all = ranks.all_gather_bytes(&all_reduce.to_le_bytes())?;
    let all = all.iter().map(|bytes| u64::from_le_bytes(bytes.as_slice().try_into().unwrap())).sum::<u64>();
    assert_eq!(all, 2 * (n - 1) * bytes);

    assert_eq!(sent(&|| ranks.all_gather(&tensor).map(drop))?, (n - 1) * bytes);
    let of_root = if rank == 0 { (n - 1) * bytes } else { 0 };
    assert_eq!(sent(&|| ranks.broadcast(Some(&tensor), 0).map(drop))?, of_root);
    let ring = if n == 1 { 0 } else { 2 * bytes };
    assert_eq!(sent(&|| ranks.start_ring(&[tensor.clone(), tensor.clone()])?.wait().map(drop))?, ring);
    let parts = vec![tensor.clone(); n as usize];
    assert_eq!(sent(&|| ranks.all_to_all(&parts).map(drop))?, (n - 1) * bytes);
    Ok(())
}

pub fn results_carry_no_gradient(ranks: Ranks) -> Result<()> {
    let variable = Var::from_tensor(&numbers(ranks.rank(), &[4], DType::F32)?)?;
    let tensor = (variable.as_tensor() * 2.0)?;
    let mut results = ranks.all_gather(&tensor)?;
    results.push(ranks.all_reduce(&tensor)?);
    results.push(ranks.broadcast(Some(&tensor), 0)?);
    results.extend(ranks.start_ring(std::slice::from_ref(&tensor))?.wait()?);
    results.extend(ranks.all_to_all(&vec![tensor.clone(); ranks.size()])?);
    assert!(results.iter().all(|result| !result.track_op()));
    Ok(())
}

pub fn a_message_keeps_the_numbers_of_its_start(ranks: Ranks) -> Result<()> {
    let numbers = numbers(ranks.rank(), &[10_000], DType::F32)?;
    let expected = ranks.all_reduce(&numbers)?;
    let variable = Var::from_tensor(&numbers)?;
    let sum = ranks.start_all_reduce(variable.as_tensor())?;
    let ring = ranks.start_ring(&[variable.as_tensor().clone(), numbers.clone()])?;
    variable.set(&variable.zeros_like()?)?;
    assert_same(&sum.wait()?[0], &expected)?;
    let ring = ring.wait()?;
    assert_same(&ring[0], &ring[1])
}

/// Also those that aren't sent, as a rank's own.
pub fn results_stay_when_a_variable_is_set(ranks: Ranks) -> Result<()> {
    let numbers = numbers(ranks.rank(), &[10], DType::F32)?;
    let variable = Var::from_tensor(&numbers)?;
    let calls = |tensor: &Tensor| -> Result<Vec<Tensor>> {
        let mut results = ranks.all_gather(tensor)?;
        results.extend(ranks.all_to_all(&vec![tensor.clone(); ranks.size()])?);
        results.push(ranks.broadcast(Some(tensor), 0)?);
        results.push(ranks.all_reduce(tensor)?);
        results.extend(ranks.start_exchange(std::slice::from_ref(tensor), ranks.rank(), ranks.rank())?.wait()?);
        Ok(results)
    };
    let (results, expected) = (calls(variable.as_tensor())?, calls(&numbers)?);
    variable.set(&variable.zeros_like()?)?;
    results.iter().zip(&expected).try_for_each(|(got, expected)| assert_same(got, expected))
}

pub fn bytes_are_gathered(ranks: Ranks) -> Result<()> {
    let bytes = |rank: usize| (0..rank as u8 * 3).collect::<Vec<_>>();
    let expected = (0..ranks.size()).map(bytes).collect::<Vec<_>>();
    assert_eq!(ranks.all_gather_bytes(&bytes(ranks.rank()))?, expected);
    ranks.agree("the number of ranks", &ranks.size().to_string())
}

/// The bits of some sums, which every rank has.
pub fn sums(ranks: Ranks) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    for dtype in FLOATS {
        all.extend(bits(&ranks.all_reduce(&numbers(ranks.rank(), &[3, 1001], dtype)?)?)?);
    }
    Ok(all)
}

pub fn runs_give_the_same_bits(ranks: Ranks) -> Result<()> {
    let bits = sums(ranks)?;
    assert!(bits == sums(ranks)?);
    assert!(ranks.all_gather_bytes(&bits)?.iter().all(|theirs| *theirs == bits));
    Ok(())
}
