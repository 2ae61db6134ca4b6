//! What ranks send, byte by byte.

use candle_attention::parallel::{ContextParallel, Order, Scheme, Split, threads};
use candle_attention::{AttentionOptions, Mask, scaled_dot_product_attention};
use candle_core::{DType, Var};

use crate::common::randn;

const LEN: usize = 640;
const DIM: usize = 16;

/// The bytes that each rank sends in the forward and in the backward pass.
fn bytes(ranks: usize, [heads, kv_heads]: [usize; 2], order: Order, mask: &Mask, scheme: Scheme) -> Vec<[f64; 2]> {
    let split = Split::new(LEN, ranks, order).unwrap();
    let sent = threads(ranks, |communicator| {
        let len = split.rank_len(communicator.rank());
        let draw = |heads| Var::from_tensor(&randn(1, (1, heads, len, DIM), DType::F32)?);
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
