//! The fused path equals the reference: every value of every axis below, and every pair of values of two axes.

use candle_attention::{Backend, ScoreShape};
use candle_core::{DType, Device, Result};

use crate::common::{numbers, randn};
use crate::masks::MaskKind;
use crate::pairwise::pairwise;
use crate::problem::{Bias, Case, Inputs, Memory, Sizes, error};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];
/// Query heads and key heads: groups of 1, 2, 3, 4 and 8, with one key head and more.
const HEADS: [(usize, usize); 6] = [(1, 1), (2, 2), (4, 2), (6, 2), (4, 1), (8, 1)];
/// On both sides of every vector, panel and block, and odd.
const DIMS: [usize; 9] = [1, 8, 40, 59, 64, 80, 111, 128, 256];
/// None: that of the keys.
const VALUE_DIMS: [Option<usize>; 6] = [None, Some(1), Some(24), Some(59), Some(128), Some(200)];
const LENGTHS: [usize; 8] = [1, 2, 15, 16, 17, 113, 197, 1023];
const MEMORY: [Memory; 6] =
    [Memory::Contiguous, Memory::ByToken, Memory::Narrow, Memory::SharedBatch, Memory::SharedHead, Memory::ByColumn];
const BIASES: [Option<Bias>; 11] = [
    None,
    Some(Bias::Constant("bhqk")),
    Some(Bias::Constant("qk")),
    Some(Bias::Constant("bk")),
    Some(Bias::Constant("hq")),
    Some(Bias::Trained("bhqk")),
    Some(Bias::Trained("hqk")),
    Some(Bias::Trained("qk")),
    Some(Bias::Trained("bk")),
    Some(Bias::Trained("h")),
    Some(Bias::Trained("bq")),
];
const SCALES: [Option<f64>; 3] = [None, Some(0.3), Some(-0.05)];
const SOFTCAPS: [Option<f64>; 2] = [None, Some(1.5)];
const DROPOUTS: [f64; 2] = [0.0, 0.3];

fn masks() -> Vec<MaskKind> {
    use MaskKind::*;
    vec![
        Full,
        Causal,
        CausalAt(3),
        Window(Some(4), Some(6)),
        Window(None, Some(2)),
        Window(Some(40), None),
        Sliding(5),
        KeyLengths,
        Prefix(3).or(Causal),
        Documents.and(Causal),
        DocumentIds,
        Allowed("bhqk"),
        Allowed("qk"),
        Blocked("hk"),
        Padding,
        Causal.and(KeyLengths).or(Sliding(2)),
        Causal.with_extra_keys(1),
        Allowed("bqk").and(KeyLengths).with_extra_keys(2),
        Sliding(5).with_extra_keys(3),
    ]
}

/// About twice the worst that was seen. Half types round what they give back by up to half a unit in the last place, which is
/// 2^-11 and 2^-8, and the backward pass starts from a context that was rounded.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-13,
        DType::F32 => 1e-5,
        DType::F16 => 4.0 * 2f64.powi(-11),
        _ => 4.0 * 2f64.powi(-8),
    }
}

/// The most keys that a query sees, and at least one.
fn most_seen(case: &Case, inputs: &Inputs) -> Result<usize> {
    let [batch, num_heads, q_len, kv_len] = case.sizes.scores("bhqk");
    let mask = case.options(inputs, Backend::Fused)?.attn_mask;
    let table = mask.to_tensor(ScoreShape { batch, num_heads, q_len, kv_len }, &Device::Cpu)?;
    let seen = numbers(&table)?.chunks(kv_len).map(|row| row.iter().sum::<f64>() as usize).max();
    Ok(seen.unwrap_or(1).max(1))
}

/// About what is summed up: weights of 1 / `seen` times values. Gradients of scores are differences of dot products of
/// value_dim numbers, which cancel to nothing where a query sees one key alone; so does the gradient of a bias that all keys
/// share, over each query's weights, which add up to 1.
fn floor(name: &str, case: &Case, seen: usize) -> f64 {
    let value_dim = case.sizes.value_dim;
    let entries = |axes: &str| case.sizes.scores(axes).iter().product::<usize>();
    let (shared_by, terms) = match (name, case.bias) {
        ("bias", Some(Bias::Trained(axes))) if !axes.contains('k') => (1, value_dim * entries("bhq") / entries(axes)),
        ("bias", Some(Bias::Trained(axes))) => (seen, value_dim * entries("bhqk") / entries(axes)),
        ("query" | "key" | "sinks", _) => (seen, value_dim),
        _ => (seen, 1),
    };
    (terms as f64).sqrt() / shared_by as f64
}

/// The fused path's results in `dtype`, held against the reference in f64 on the same numbers.
fn check(case: &Case, dtype: DType, tolerance: f64) -> Result<f64> {
    let inputs = case.inputs(dtype)?;
    let exact = case.run(&inputs.to_dtype(DType::F64)?, Backend::Reference)?;
    let fused = case.run(&inputs, Backend::Fused)?;
    assert_eq!(fused.len(), exact.len());
    let (mut worst, seen) = (0.0f64, most_seen(case, &inputs)?);
    for ((name, fused), (_, exact)) in fused.iter().zip(&exact) {
        let error = error(fused, exact, floor(name, case, seen))?;
        assert!(error <= tolerance, "{name} differs by {error:e}: {dtype:?}, {case:?}");
        worst = worst.max(error / tolerance);
    }
    Ok(worst)
}

/// Checks the cases of a grid, in the dtypes that they ask for.
fn check_all(cases: &[(DType, Case)]) -> Result<()> {
    let mut worst = [0.0f64; DTYPES.len()];
    for (dtype, case) in cases {
        let worst = &mut worst[DTYPES.iter().position(|x| x == dtype).expect("one of them")];
        *worst = worst.max(check(case, *dtype, tolerance(*dtype))?);
    }
    println!("{} cases; the worst errors, as parts of the tolerance: {DTYPES:?} {worst:.3?}", cases.len());
    Ok(())
}

#[test]
fn every_pair_of_properties_equals_the_reference() -> Result<()> {
    let masks = masks();
    let memory = MEMORY.len();
    let axes = [
        DTYPES.len(),
        masks.len(),
        BIASES.len(),
        HEADS.len(),
        DIMS.len(),
        VALUE_DIMS.len(),
        LENGTHS.len(),
        LENGTHS.len(),
        memory,
        memory,
        memory,
        SCALES.len(),
        SOFTCAPS.len(),
        DROPOUTS.len(),
        2,
        2,
        2,
        2,
    ];
    // Documents need a key at every query's position.
    let fits = |case: &[Option<usize>]| match (case[1], case[6], case[7]) {
        (Some(mask), Some(q), Some(k)) => q <= k || !masks[mask].needs_positions(),
        _ => true,
    };
    let cases = pairwise(&axes, fits).into_iter().map(|at| {
        let (heads, kv_heads) = HEADS[at[3]];
        let (q_len, kv_len) = (LENGTHS[at[6]], LENGTHS[at[7]]);
        // The reference would take a gigabyte for the two longest.
        let batch = if q_len * kv_len > 500_000 { 1 } else { 1 + at[14] };
        let (dim, value_dim) = (DIMS[at[4]], VALUE_DIMS[at[5]].unwrap_or(DIMS[at[4]]));
        let case = Case {
            sizes: Sizes { batch, heads, kv_heads, q_len, kv_len, dim, value_dim },
            memory: [MEMORY[at[8]], MEMORY[at[9]], MEMORY[at[10]]],
            mask: masks[at[1]].clone(),
            bias: BIASES[at[2]],
            scale: SCALES[at[11]],
            softcap: SOFTCAPS[at[12]],
            alibi: at[15] == 1,
            sinks: at[16] == 1,
            dropout_p: DROPOUTS[at[13]],
            logsumexp: at[17] == 1,
        };
        (DTYPES[at[0]], case)
    });
    check_all(&cases.collect::<Vec<_>>())
}

/// Some processors multiply bf16 two by two where heads have an even number of entries and nothing asks for f32: sums over keys
/// then start at any key, odd or even.
#[test]
fn bf16_by_pairs_equals_the_reference() -> Result<()> {
    const EVEN: [(usize, usize); 5] = [(2, 2), (8, 130), (64, 64), (80, 40), (58, 6)];
    const QUERIES: [usize; 6] = [1, 9, 16, 33, 150, 300];
    const KEYS: [usize; 5] = [1, 15, 97, 211, 400];
    let masks = masks();
    let axes = [
        masks.len(),
        EVEN.len(),
        QUERIES.len(),
        KEYS.len(),
        HEADS.len(),
        BIASES.len(),
        SOFTCAPS.len(),
        DROPOUTS.len(),
        MEMORY.len(),
        MEMORY.len(),
    ];
    let fits = |case: &[Option<usize>]| match (case[0], case[2], case[3]) {
        (Some(mask), Some(q), Some(k)) => QUERIES[q] <= KEYS[k] || !masks[mask].needs_positions(),
        _ => true,
    };
    let cases = pairwise(&axes, fits).into_iter().map(|at| {
        let ((dim, value_dim), (heads, kv_heads)) = (EVEN[at[1]], HEADS[at[4]]);
        let sizes = Sizes { batch: 2, heads, kv_heads, q_len: QUERIES[at[2]], kv_len: KEYS[at[3]], dim, value_dim };
        Case {
            memory: [MEMORY[at[8]], MEMORY[at[9]], MEMORY[at[9]]],
            mask: masks[at[0]].clone(),
            bias: BIASES[at[5]],
            softcap: SOFTCAPS[at[6]],
            dropout_p: DROPOUTS[at[7]],
            logsumexp: false,
            ..Case::plain(sizes)
        }
    });
    // Far below what an element left out or counted twice does, and above what rounding the context does to gradients of keys
    // that many queries look at, with pairs or without. How precise it is: tests/golden_precision.rs.
    let worst = cases.map(|case| check(&case, DType::BF16, 2f64.powi(-4))).collect::<Result<Vec<_>>>()?;
    let largest = worst.iter().fold(0.0, |largest: f64, worst| largest.max(*worst));
    println!("{} cases; the worst error, as part of the tolerance: {largest:.3}", worst.len());
    Ok(())
}

/// Decoding: few queries and a cache of any length, with and without groups.
#[test]
fn decoding_equals_the_reference() -> Result<()> {
    const QUERIES: [usize; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
    const KEYS: [usize; 6] = [8, 16, 95, 97, 385, 1023];
    const GROUPS: [usize; 3] = [1, 4, 8];
    let masks = [MaskKind::Full, MaskKind::Causal, MaskKind::Sliding(100), MaskKind::KeyLengths];
    let axes = [DTYPES.len(), QUERIES.len(), KEYS.len(), GROUPS.len(), DIMS.len(), masks.len(), 2, 2, MEMORY.len()];
    let cases = pairwise(&axes, |_| true).into_iter().map(|at| {
        let (kv_heads, dim) = (1 + at[6], DIMS[at[4]]);
        let heads = kv_heads * GROUPS[at[3]];
        let (q_len, kv_len) = (QUERIES[at[1]], KEYS[at[2]]);
        let sizes = Sizes { batch: 2, heads, kv_heads, q_len, kv_len, dim, value_dim: dim };
        let memory = [Memory::ByToken, MEMORY[at[8]], MEMORY[at[8]]];
        (DTYPES[at[0]], Case { memory, mask: masks[at[5]].clone(), logsumexp: at[7] == 1, ..Case::plain(sizes) })
    });
    check_all(&cases.collect::<Vec<_>>())
}

/// The measure is no stronger than the worst of what it lets pass: a result that is off by a few units must not.
#[test]
fn small_error_is_seen() -> Result<()> {
    for dtype in DTYPES {
        let exact = randn(1, (4, 100), dtype)?.to_dtype(DType::F64)?;
        let off = (&exact * (1.0 + 4.0 * tolerance(dtype)))?;
        assert!(error(&off, &exact, 0.01)? > tolerance(dtype), "{dtype:?}");
    }
    Ok(())
}
