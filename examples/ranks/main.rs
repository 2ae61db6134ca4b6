//! Attention over several ranks: the processes of `mpirun`, or four threads of this one.
//!
//! It times messages between the ranks. Then each rank attends with its part of a sequence, by the ring and by Ulysses. The contexts are
//! compared with those of one process. Rank 0 prints bytes and times.
//!
//! ```text
//! cargo run --release --example ranks
//! cargo build --release --features mpi --example ranks
//! mpirun -n 4 --bind-to none target/release/examples/ranks
//! ```

use std::sync::Arc;
use std::time::Instant;

use candle_attention::parallel::{Communicator, ContextParallel, Order, Scheme, Split};
use candle_attention::{AttentionOptions, Error, Mask, Result, scaled_dot_product_attention};
use candle_core::{DType, Device, Tensor, Var};

const LEN: usize = 4096;
const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;

#[cfg(feature = "mpi")]
fn main() -> Result<()> {
    candle_attention::parallel::mpi_ranks(work)
}

#[cfg(not(feature = "mpi"))]
fn main() -> Result<()> {
    candle_attention::parallel::threads(4, work).map(drop)
}

/// The work of one rank.
fn work(communicator: Arc<dyn Communicator>) -> Result<()> {
    let print = |text: String| {
        if communicator.rank() == 0 {
            println!("{text}");
        }
    };
    if communicator.size() > 1 {
        let [small, large] = [exchange(&*communicator, 1, 200)?, exchange(&*communicator, 4 << 20, 10)?];
        let rate = (16 << 20) as f64 / large / 1e9;
        print(format!("{} ranks: {:.1} µs for 4 bytes, {rate:.2} GB/s for 16 MiB", communicator.size(), small * 1e6));
    }
    // Rank 0 draws the numbers. In a program for long sequences, each rank has only its own.
    let draw = |heads: usize| {
        let ours = match communicator.rank() {
            0 => Some(Tensor::randn(0f32, 1.0, (1, heads, LEN, HEAD_DIM), &Device::Cpu)?),
            _ => None,
        };
        communicator.broadcast(ours.as_ref(), 0)
    };
    let qkv = [draw(HEADS)?, draw(KV_HEADS)?, draw(KV_HEADS)?];
    for scheme in [Scheme::Ring, Scheme::Ulysses] {
        match attend(&communicator, &qkv, scheme) {
            Ok(text) => print(format!("{scheme:?}: {text}")),
            // Every rank gets this error, and goes on.
            Err(Error::Attention(error)) if scheme == Scheme::Ulysses => print(format!("{scheme:?}: {error}")),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Seconds in which a tensor of f32 goes to the next rank while another one comes: the mean of `times`, the best of five.
fn exchange(communicator: &dyn Communicator, numbers: usize, times: usize) -> Result<f64> {
    let tensors = [Tensor::zeros(numbers, DType::F32, &Device::Cpu)?];
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        communicator.agree("the start of a measurement", "")?;
        let start = Instant::now();
        for _ in 0..times {
            communicator.start_ring(&tensors)?.wait()?;
        }
        best = best.min(start.elapsed().as_secs_f64() / times as f64);
    }
    Ok(best)
}

/// Attends with this rank's tokens, forward and backward.
fn attend(communicator: &Arc<dyn Communicator>, qkv: &[Tensor; 3], scheme: Scheme) -> Result<String> {
    let [q, k, v] = qkv;
    let options = AttentionOptions { attn_mask: Mask::causal(), ..Default::default() };
    let expected = scaled_dot_product_attention(q, k, v, &options)?.context;

    let split = Split::new(LEN, communicator.size(), Order::ZigZag)?;
    let shard = |x: &Tensor| split.shard(x, 2, communicator.rank());
    let own = |x: &Tensor| -> Result<Var> { Ok(Var::from_tensor(&shard(x)?)?) };
    let [q, k, v] = [own(q)?, own(k)?, own(v)?];
    let parallel = Some(ContextParallel { communicator: communicator.clone(), split, scheme });
    let options = AttentionOptions { parallel, ..options };

    let mut sent = vec![communicator.bytes_sent()];
    let start = Instant::now();
    let context = scaled_dot_product_attention(&q, &k, &v, &options)?.context;
    let forward = start.elapsed().as_secs_f64();
    sent.push(communicator.bytes_sent());
    let loss = context.sqr()?.sum_all()?;
    let start = Instant::now();
    loss.backward()?;
    let backward = start.elapsed().as_secs_f64();
    sent.push(communicator.bytes_sent());

    let difference = (context.detach() - shard(&expected)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
    Ok(format!(
        "{} bytes sent and {forward:.3} s forward, {} bytes and {backward:.3} s backward; at most {difference:.1e} from one process",
        sent[1] - sent[0],
        sent[2] - sent[1],
    ))
}
