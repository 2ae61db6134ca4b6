//! Attention as loops over plain numbers, written only from the formula.

use candle_attention::{AttentionOptions, Mask};
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use crate::common::{Random, assert_close, numbers, randn};

use super::setup::{F64, Sizes, all_results, attend, few, logsumexp, sizes, weights};

/// The options as plain numbers, with every extra expanded to full size.
struct Plain {
    scale: f64,
    softcap: Option<f64>,
    bias: Vec<f64>,
    allowed: Vec<bool>,
    slopes: Vec<f64>,
    sinks: Option<Vec<f64>>,
}

/// Context, weights and log-sum-exp.
type Results = [Vec<f64>; 3];

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The scores of one query, minus infinity where it may not attend.
fn scores(sizes: &Sizes, query: &[f64], keys: &[f64], (head, i): (usize, usize), plain: &Plain) -> Vec<f64> {
    let row = (head * sizes.q_len + i) * sizes.kv_len;
    let score = |j: usize| {
        if !plain.allowed[row + j] {
            return f64::NEG_INFINITY;
        }
        let dot = dot(query, &keys[j * sizes.head_dim..][..sizes.head_dim]);
        let scaled = dot * plain.scale;
        let capped = plain.softcap.map_or(scaled, |cap| (scaled / cap).tanh() * cap);
        let distance = (i as f64 + sizes.kv_len as f64 - sizes.q_len as f64 - j as f64).abs();
        capped + plain.bias[row + j] - plain.slopes[head % sizes.heads] * distance
    };
    (0..sizes.kv_len).map(score).collect()
}

/// The formula as loops over heads and queries.
fn by_loops(sizes: &Sizes, [q, k, v]: &[Vec<f64>; 3], plain: &Plain) -> Results {
    let [mut context, mut weights, mut logsumexp] = Results::default();
    let (d, dv, kv_len) = (sizes.head_dim, sizes.value_dim, sizes.kv_len);
    for head in 0..sizes.batch * sizes.heads {
        // Head h of H uses key head h / (H / Hkv).
        let (b, h) = (head / sizes.heads, head % sizes.heads);
        let kv_head = b * sizes.kv_heads + h * sizes.kv_heads / sizes.heads;
        let keys = &k[kv_head * kv_len * d..][..kv_len * d];
        let values = &v[kv_head * kv_len * dv..][..kv_len * dv];
        for i in 0..sizes.q_len {
            let query = &q[(head * sizes.q_len + i) * d..][..d];
            let exponentials: Vec<f64> =
                scores(sizes, query, keys, (head, i), plain).into_iter().map(f64::exp).collect();
            let sink = plain.sinks.as_ref().map_or(0.0, |sinks| sinks[h].exp());
            let sum = exponentials.iter().sum::<f64>() + sink;
            let row: Vec<f64> = exponentials.iter().map(|e| if sum == 0.0 { 0.0 } else { e / sum }).collect();
            context.extend((0..dv).map(|c| row.iter().enumerate().map(|(j, w)| w * values[j * dv + c]).sum::<f64>()));
            weights.extend(row);
            logsumexp.push(sum.ln());
        }
    }
    [context, weights, logsumexp]
}

/// Random options, as plain numbers and as `AttentionOptions`. Bit `n` of `which` switches on the n-th extra.
fn options(sizes: &Sizes, seed: u64, which: u8) -> (Plain, AttentionOptions) {
    let on = |bit: u8| which >> bit & 1 == 1;
    let count = sizes.scores().iter().product::<usize>();
    let mut random = Random::new(seed);
    let allowed: Vec<bool> = (0..count).map(|_| !on(3) || random.uniform() < 0.6).collect();
    let bias = randn(seed + 1, &sizes.scores(), DType::F64).unwrap();
    let slopes = randn(seed + 2, sizes.heads, DType::F64).unwrap();
    let sinks = randn(seed + 3, sizes.heads, DType::F64).unwrap();
    let zeros_unless =
        |wanted: bool, x: &Tensor| numbers(&if wanted { x.clone() } else { x.zeros_like().unwrap() }).unwrap();
    let plain = Plain {
        scale: if on(0) { -0.6 } else { (sizes.head_dim as f64).powf(-0.5) },
        softcap: on(1).then_some(0.9),
        bias: zeros_unless(on(2), &bias),
        slopes: zeros_unless(on(4), &slopes),
        sinks: on(5).then(|| numbers(&sinks).unwrap()),
        allowed,
    };
    let table: Vec<u8> = plain.allowed.iter().map(|&allowed| u8::from(allowed)).collect();
    let table = Tensor::from_vec(table, &sizes.scores(), &Device::Cpu).unwrap();
    let options = AttentionOptions {
        scale: on(0).then_some(-0.6),
        softcap: plain.softcap,
        attn_bias: on(2).then_some(bias),
        attn_mask: if on(3) { Mask::from_tensor(&table).unwrap() } else { Mask::full() },
        alibi_slopes: on(4).then_some(slopes),
        sinks: on(5).then_some(sinks),
        ..all_results()
    };
    (plain, options)
}

fn check(sizes: &Sizes, seed: u64, which: u8) {
    let inputs = sizes.tensors(seed, DType::F64);
    let (plain, options) = options(sizes, seed, which);
    let output = attend(&inputs, &options).unwrap();
    let expected = by_loops(sizes, &inputs.map(|x| numbers(&x).unwrap()), &plain);
    let results = [(&output.context, "context"), (weights(&output), "weights"), (logsumexp(&output), "log-sum-exp")];
    for (numbers, (result, what)) in expected.into_iter().zip(results) {
        let expected = Tensor::from_vec(numbers, result.shape(), &Device::Cpu).unwrap();
        assert_close(result, &expected, F64, what);
    }
}

proptest! {
    #![proptest_config(few())]

    #[test]
    fn attention_follows_its_definition(sizes in sizes(), seed in 0..u64::MAX / 2, which in 0..64u8) {
        check(&sizes, seed, which);
    }
}
