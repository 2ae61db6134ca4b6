//! The fused path equals the reference: every value of every axis below, and every pair of values of two axes.

use candle_attention::Backend;
use candle_core::{DType, Device, Result};

use crate::common::randn;

use super::check::{check, tolerance};
use super::masks::{self, MaskKind};
use super::pairwise::pairwise;
use super::problem::{Bias, Case, Memory, Sizes, error};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];
/// Query heads and key heads: groups of 1, 2, 3, 4 and 8, with one key head and more.
const HEADS: [(usize, usize); 6] = [(1, 1), (2, 2), (4, 2), (6, 2), (4, 1), (8, 1)];
/// Sizes below, at and above those of vectors, panels and blocks, and odd sizes.
const DIMS: [usize; 9] = [1, 8, 40, 59, 64, 80, 111, 128, 256];
/// `None` is the head_dim of the keys.
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

const FUSED: (Backend, &Device) = (Backend::Fused, &Device::Cpu);

/// Checks the cases of a grid, each in its dtype.
fn check_all(cases: &[(DType, Case)]) -> Result<()> {
    let mut worst = [0.0f64; DTYPES.len()];
    for (dtype, case) in cases {
        let worst = &mut worst[DTYPES.iter().position(|x| x == dtype).expect("one of them")];
        *worst = worst.max(check(case, *dtype, FUSED, |_| tolerance(*dtype))?);
    }
    println!("{} cases; the worst errors, as parts of the tolerance: {DTYPES:?} {worst:.3?}", cases.len());
    Ok(())
}

#[test]
fn every_pair_of_properties_equals_the_reference() -> Result<()> {
    let masks = masks::all();
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
    let cases = pairwise(&axes, |_| true).into_iter().map(|at| {
        let (heads, kv_heads) = HEADS[at[3]];
        let (q_len, kv_len) = (LENGTHS[at[6]], LENGTHS[at[7]]);
        // For the two longest sequences the reference would need a gigabyte of memory.
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
            // The fused operation on a CPU takes slopes as constants.
            train_slopes: false,
            sinks: at[16] == 1,
            dropout_p: DROPOUTS[at[13]],
            logsumexp: at[17] == 1,
        };
        (DTYPES[at[0]], case)
    });
    check_all(&cases.collect::<Vec<_>>())
}

/// Some processors multiply bf16 numbers in pairs, if heads have an even size and no result needs f32. Sums over keys
/// then start at odd and at even keys.
#[test]
fn bf16_by_pairs_equals_the_reference() -> Result<()> {
    const EVEN: [(usize, usize); 5] = [(2, 2), (8, 130), (64, 64), (80, 40), (58, 6)];
    const QUERIES: [usize; 6] = [1, 9, 16, 33, 150, 300];
    const KEYS: [usize; 5] = [1, 15, 97, 211, 400];
    let masks = masks::all();
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
    let cases = pairwise(&axes, |_| true).into_iter().map(|at| {
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
    // If many queries attend to one of only a few keys, the effect of the rounded context adds up in the gradients of
    // the key and of its bias, with and without pairs. tests/sdpa/precision.rs measures how precise they are.
    let allowed = |name: &str| match name {
        "key" | "bias" => 2f64.powi(-4),
        _ => tolerance(DType::BF16),
    };
    let worst = cases.map(|case| check(&case, DType::BF16, FUSED, allowed)).collect::<Result<Vec<_>>>()?;
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

/// Checks the measure of the error: a result that is off by a few units must exceed the tolerance.
#[test]
fn small_error_is_seen() -> Result<()> {
    for dtype in DTYPES {
        let exact = randn(1, (4, 100), dtype)?.to_dtype(DType::F64)?;
        let off = (&exact * (1.0 + 4.0 * tolerance(dtype)))?;
        assert!(error(&off, &exact, 0.01)? > tolerance(dtype), "{dtype:?}");
    }
    Ok(())
}
