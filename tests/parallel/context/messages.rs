//! What ranks send, byte by byte.

use candle_attention::parallel::{ContextParallel, Order, Scheme, Split, threads};
use candle_attention::{AttentionOptions, ForwardOptions, Mask, SelfAttentionConfig, scaled_dot_product_attention};
use candle_core::{DType, Var};

use crate::common::randn;
use crate::layers::self_attention;

const LEN: usize = 640;
const DIM: usize = 16;

/// The bytes that each rank sends in the forward and in the backward pass, in f32.
fn bytes(ranks: usize, heads: [usize; 2], order: Order, mask: &Mask, scheme: Scheme) -> Vec<[f64; 2]> {
    bytes_in(DType::F32, ranks, heads, order, mask, scheme)
}

fn bytes_in(
    dtype: DType,
    ranks: usize,
    [heads, kv_heads]: [usize; 2],
    order: Order,
    mask: &Mask,
    scheme: Scheme,
) -> Vec<[f64; 2]> {
    let split = Split::new(LEN, ranks, order).unwrap();
    let sent = threads(ranks, |communicator| {
        let len = split.rank_len(communicator.rank());
        let draw = |heads| Var::from_tensor(&randn(1, (1, heads, len, DIM), dtype)?);
        let (q, k, v) = (draw(heads)?, draw(kv_heads)?, draw(kv_heads)?);
        let parallel = Some(ContextParallel { communicator: communicator.clone(), split, scheme });
        let options = AttentionOptions { attn_mask: mask.clone(), parallel, ..Default::default() };
        let context = scaled_dot_product_attention(&q, &k, &v, &options)?.context;
        let forward = communicator.bytes_sent();
        context.sum_all()?.backward()?;
        Ok([forward as f64, (communicator.bytes_sent() - forward) as f64])
    });
    sent.unwrap()
}

/// The bytes of keys and values of a rank's tokens, for so many key heads.
fn kv(ranks: usize, kv_heads: usize) -> f64 {
    (LEN / ranks * kv_heads * 2 * DIM * size_of::<f32>()) as f64
}

#[test]
fn context_ring_sends_each_key_to_each_rank_once() {
    for ranks in [1, 2, 4] {
        for order in [Order::Contiguous, Order::ZigZag] {
            for [forward, backward] in bytes(ranks, [4, 2], order, &Mask::causal(), Scheme::Ring) {
                let theory = (ranks - 1) as f64 * kv(ranks, 2);
                // Little else: what the ranks have to agree on.
                assert!(forward >= theory && forward <= 1.1 * theory + 4096.0, "{forward} and {theory}");
                assert!(backward >= 2.0 * theory && backward <= 2.2 * theory, "{backward} and {theory}");
            }
        }
    }
}

#[test]
fn context_window_stops_the_ring() {
    let window = Mask::sliding_window(20);
    for (order, hops) in [(Order::Contiguous, 1.0), (Order::ZigZag, 2.0)] {
        for [forward, backward] in bytes(4, [4, 2], order, &window, Scheme::Ring) {
            let theory = hops * kv(4, 2);
            assert!(forward >= theory && forward <= 1.1 * theory + 4096.0, "{order:?}: {forward} and {theory}");
            // Keys, values and their gradients, which go home at the end.
            assert!(backward <= 2.2 * theory, "{order:?}: {backward} and {theory}");
        }
    }
    // Documents that no rank shares.
    for [forward, backward] in bytes(4, [4, 2], Order::Contiguous, &Mask::documents(&[LEN / 4; 4]), Scheme::Ring) {
        assert!(forward < 4096.0 && backward == 0.0, "{forward}, {backward}");
    }
}

#[test]
fn context_ulysses_sends_each_head_once() {
    for ranks in [2, 4] {
        let (heads, kv_heads) = (8, 4);
        let of_head = (LEN / ranks * DIM * size_of::<f32>()) as f64;
        let share = (ranks - 1) as f64 / ranks as f64;
        // Contexts, and two numbers a row of log-sum-exp.
        let (queries, keys, rows) =
            (heads as f64 * of_head, 2.0 * kv_heads as f64 * of_head, heads as f64 * of_head / DIM as f64);
        for [forward, backward] in bytes(ranks, [heads, kv_heads], Order::ZigZag, &Mask::causal(), Scheme::Ulysses) {
            let theory = share * (2.0 * queries + keys + 2.0 * rows);
            assert!(forward >= theory && forward <= 1.02 * theory + 4096.0, "{forward} and {theory}");
            let theory = share * (4.0 * queries + 2.0 * keys + 2.0 * rows);
            assert!(backward >= theory && backward <= 1.02 * theory + 4096.0, "{backward} and {theory}");
        }
    }
}

/// Ranks that share a key head send its gradient in f32, and add it up before it is narrowed.
#[test]
fn context_ulysses_sends_sums_of_half_types_in_f32() {
    let (ranks, heads) = (4, 8);
    for (kv_heads, of_gradient) in [(2, 4.0), (4, 2.0)] {
        // Of a token, for each other rank: two query heads and a key head.
        let (queries, keys, rows) = (2.0 * 2.0 * DIM as f64, 2.0 * DIM as f64, 2.0 * 4.0);
        let tokens = ((ranks - 1) * LEN / ranks) as f64;
        let all = bytes_in(DType::BF16, ranks, [heads, kv_heads], Order::ZigZag, &Mask::causal(), Scheme::Ulysses);
        for [forward, backward] in all {
            let theory = tokens * (2.0 * queries + 2.0 * keys + 2.0 * rows);
            assert!(forward >= theory && forward <= 1.02 * theory + 4096.0, "{forward} and {theory}");
            let theory = tokens * (4.0 * queries + 2.0 * keys + 2.0 * DIM as f64 * of_gradient + 2.0 * rows);
            assert!(backward >= theory && backward <= 1.02 * theory + 4096.0, "{backward} and {theory}");
        }
    }
}

/// What each rank tells every other before the forward pass.
#[test]
fn context_agreement_is_a_short_text() {
    let split = Split::new(LEN, 2, Order::Contiguous).unwrap();
    // No keys travel.
    let mask = Mask::documents(&[LEN / 2; 2]);
    for [forward, _] in bytes(2, [4, 2], Order::Contiguous, &mask, Scheme::Ring) {
        assert!(forward < 512.0, "{forward} bytes of attention");
    }
    let layer = self_attention(&SelfAttentionConfig::new(8, 2), DType::F32).unwrap();
    let sent = threads(2, |communicator| {
        let x = randn(1, (1, LEN / 2, 8), DType::F32)?;
        let parallel = Some(ContextParallel { communicator: communicator.clone(), split, scheme: Scheme::Ring });
        layer.forward_with(&x, &ForwardOptions { parallel, attn_mask: mask.clone(), ..Default::default() })?;
        Ok(communicator.bytes_sent())
    });
    sent.unwrap().iter().for_each(|&bytes| assert!(bytes < 1536, "{bytes} bytes of a layer"));
}
