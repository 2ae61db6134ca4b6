//! How long several ranks take that share the processors of one machine. Run it optimised and alone:
//!
//! `cargo test --release -p candle-attention --test parallel context_time -- --ignored --nocapture`

use std::time::Instant;

use candle_attention::parallel::{ContextParallel, Order, Scheme, Split, threads};
use candle_attention::{AttentionOptions, Mask, Result, scaled_dot_product_attention};
use candle_core::{DType, Tensor, Var};

use crate::common::randn;

const LEN: usize = 16_384;
const HEADS: usize = 4;
const DIM: usize = 64;

fn step(x: &Tensor, options: &AttentionOptions) -> Result<()> {
    let [q, k, v] = [Var::from_tensor(x)?, Var::from_tensor(x)?, Var::from_tensor(x)?];
    scaled_dot_product_attention(&q, &k, &v, options)?.context.sum_all()?.backward()?;
    Ok(())
}

#[test]
#[ignore = "takes minutes, and the whole machine"]
fn context_time_is_that_of_the_work() {
    let x = randn(1, (1, HEADS, LEN, DIM), DType::F32).unwrap();
    let options = AttentionOptions { attn_mask: Mask::causal(), ..Default::default() };
    let timed = |f: &dyn Fn()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    let split = Split::new(LEN, 4, Order::ZigZag).unwrap();
    let ranks = |scheme| {
        threads(4, |communicator| {
            let x = split.shard(&x, 2, communicator.rank())?;
            let parallel = Some(ContextParallel { communicator, split, scheme });
            step(&x, &AttentionOptions { parallel, ..options.clone() })
        })
        .unwrap();
    };
    // By turns, so that all meet the same machine.
    let mut best = [f64::INFINITY; 3];
    for _ in 0..3 {
        best[0] = best[0].min(timed(&|| step(&x, &options).unwrap()));
        best[1] = best[1].min(timed(&|| ranks(Scheme::Ring)));
        best[2] = best[2].min(timed(&|| ranks(Scheme::Ulysses)));
    }
    println!("one process {:.2} s; 4 ranks: ring {:.2} s, Ulysses {:.2} s", best[0], best[1], best[2]);
    assert!(best[1] <= 1.15 * best[0] && best[2] <= 1.15 * best[0], "{best:?}");
}
