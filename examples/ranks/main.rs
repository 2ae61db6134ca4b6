//! Attention over several ranks: the processes of `mpirun`, or threads of this one.
//!
//! It times messages between the ranks. Then one process and the ranks attend to the same sequence in turns, forward and backward, by the
//! ring and by Ulysses. Rank 0 prints bytes, the medians of the times, and their ratio. The contexts must be equal but for rounding.
//!
//! Ranks on one machine share its processors with one another, and one process uses all of them. So a ratio of 1 is the best.
//!
//! ```text
//! cargo run --release --example ranks
//! cargo run --release --example ranks -- --len 16384 --ranks 4 --scheme ring --rounds 5
//! cargo build --release --features mpi --example ranks
//! mpirun -n 4 --bind-to none target/release/examples/ranks
//! ```

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use attention_examples::exit;
use candle_attention::parallel::{Communicator, ContextParallel, Order, Scheme, Split};
use candle_attention::{AttentionError, AttentionOptions, Error, Mask, Result, scaled_dot_product_attention};
use candle_core::{DType, Device, Tensor, Var};
use clap::Parser;

const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
/// The contexts are means of normal numbers, in f32.
const TOLERANCE: f32 = 1e-4;

/// Times attention over several ranks beside that of one process.
#[derive(Parser)]
struct Arguments {
    /// Tokens of the sequence
    #[arg(long, default_value_t = 4096, value_parser = len)]
    len: usize,
    /// Ranks
    #[cfg(not(feature = "mpi"))]
    #[arg(long, default_value_t = 4)]
    ranks: usize,
    /// ring or ulysses [default: both]
    #[arg(long, value_parser = scheme)]
    scheme: Option<Scheme>,
    /// How often one process and the ranks take turns
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

fn len(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|len| *len > 0).ok_or_else(|| "expected a number from 1 up".to_string())
}

fn scheme(text: &str) -> Result<Scheme, String> {
    match text {
        "ring" => Ok(Scheme::Ring),
        "ulysses" => Ok(Scheme::Ulysses),
        _ => Err("expected ring or ulysses".to_string()),
    }
}

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()).map_err(anyhow::Error::from))
}

#[cfg(feature = "mpi")]
fn run(arguments: &Arguments) -> Result<()> {
    candle_attention::parallel::mpi_ranks(|communicator| work(&communicator, arguments))
}

#[cfg(not(feature = "mpi"))]
fn run(arguments: &Arguments) -> Result<()> {
    candle_attention::parallel::threads(arguments.ranks, |communicator| work(&communicator, arguments)).map(drop)
}

/// The work of one rank.
fn work(communicator: &Arc<dyn Communicator>, arguments: &Arguments) -> Result<()> {
    let is_first = communicator.rank() == 0;
    if communicator.size() > 1 {
        let [small, large] = [exchange(&**communicator, 1, 200)?, exchange(&**communicator, 4 << 20, 10)?];
        let (small, rate) = (small * 1e6, (16 << 20) as f64 / large / 1e9);
        if is_first {
            println!("{} ranks: {small:.1} µs for 4 bytes, {rate:.2} GB/s for 16 MiB", communicator.size());
        }
    }
    // Rank 0 draws the numbers. In a program for long sequences, each rank has only its own.
    let draw = |heads: usize| from_rank_0(communicator, || random(heads, arguments.len));
    let qkv = [draw(HEADS)?, draw(KV_HEADS)?, draw(KV_HEADS)?];
    let expected = from_rank_0(communicator, || attend(&variables(&qkv)?, None))?;
    for scheme in arguments.scheme.map_or(vec![Scheme::Ring, Scheme::Ulysses], |scheme| vec![scheme]) {
        match compare(communicator, (&qkv, &expected), scheme, arguments.rounds) {
            Ok(costs) if is_first => println!("{scheme:?}: {}", report(&costs)),
            Ok(_) => {}
            // Every rank gets this error, and goes on.
            Err(Error::Attention(error @ AttentionError::Config { field: "heads of Scheme::Ulysses", .. })) => {
                if is_first {
                    println!("{scheme:?}: {error}");
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// (1, heads, len, head_dim)
fn random(heads: usize, len: usize) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1.0, (1, heads, len, HEAD_DIM), &Device::Cpu)?)
}

/// What rank 0 makes, on every rank.
fn from_rank_0(communicator: &Arc<dyn Communicator>, make: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
    let made = (communicator.rank() == 0).then(make).transpose()?;
    communicator.broadcast(made.as_ref(), 0)
}

fn variables(qkv: &[Tensor; 3]) -> Result<[Var; 3]> {
    let [q, k, v] = qkv;
    Ok([Var::from_tensor(q)?, Var::from_tensor(k)?, Var::from_tensor(v)?])
}

/// Causal attention, by one process or by all ranks.
fn attend([q, k, v]: &[Var; 3], parallel: Option<ContextParallel>) -> Result<Tensor> {
    let options = AttentionOptions { attn_mask: Mask::causal(), parallel, ..Default::default() };
    Ok(scaled_dot_product_attention(q, k, v, &options)?.context)
}

/// Seconds in which a tensor of f32 goes to the next rank while another one comes: the mean of `times`, the best of five.
fn exchange(communicator: &dyn Communicator, numbers: usize, times: usize) -> Result<f64> {
    let tensors = [Tensor::zeros(numbers, DType::F32, &Device::Cpu)?];
    let ring = |_| communicator.start_ring(&tensors)?.wait().map(drop);
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let (cost, ()) = measure(Some(communicator), || (0..times).try_for_each(ring))?;
        best = best.min(cost.seconds / times as f64);
    }
    Ok(best)
}

struct Cost {
    /// Until the last rank is done.
    seconds: f64,
    /// What this rank has sent.
    bytes: u64,
}

/// What some work costs, if these ranks do it, or one process.
fn measure<T>(ranks: Option<&dyn Communicator>, work: impl FnOnce() -> Result<T>) -> Result<(Cost, T)> {
    let wait_for_all = || ranks.map_or(Ok(()), |ranks| ranks.agree("the clocks", ""));
    let sent = || ranks.map_or(0, |ranks| ranks.bytes_sent());
    wait_for_all()?;
    let (start, before) = (Instant::now(), sent());
    let result = work()?;
    let bytes = sent() - before;
    wait_for_all()?;
    Ok((Cost { seconds: start.elapsed().as_secs_f64(), bytes }, result))
}

/// What a forward and a backward pass cost, and the context.
fn pass(qkv: &[Var; 3], parallel: Option<ContextParallel>) -> Result<([Cost; 2], Tensor)> {
    let ranks = parallel.as_ref().map(|parallel| &*parallel.communicator);
    let (forward, context) = measure(ranks, || attend(qkv, parallel.clone()))?;
    let (backward, _) = measure(ranks, || Ok(context.sqr()?.sum_all()?.backward()?))?;
    Ok(([forward, backward], context.detach()))
}

/// What all passes have cost.
#[derive(Default)]
struct Costs {
    /// Of rank 0 alone, with all threads.
    one_process: Vec<[Cost; 2]>,
    ranks: Vec<[Cost; 2]>,
}

/// One process and the ranks attend in turns, so that both meet the same disturbances.
fn compare(
    communicator: &Arc<dyn Communicator>,
    (qkv, expected): (&[Tensor; 3], &Tensor),
    scheme: Scheme,
    rounds: u32,
) -> Result<Costs> {
    let split = Split::new(expected.dim(2)?, communicator.size(), Order::ZigZag)?;
    let shard = |x: &Tensor| split.shard(x, 2, communicator.rank());
    let [q, k, v] = qkv;
    let (whole, own) = (variables(qkv)?, variables(&[shard(q)?, shard(k)?, shard(v)?])?);
    let parallel = ContextParallel { communicator: communicator.clone(), split, scheme };
    let mut costs = Costs::default();
    for _ in 0..rounds {
        // The others wait until it is their turn.
        if communicator.rank() == 0 {
            costs.one_process.push(pass(&whole, None)?.0);
        }
        let (cost, context) = pass(&own, Some(parallel.clone()))?;
        costs.ranks.push(cost);
        let difference = (context - shard(expected)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(difference < TOLERANCE, "expected the contexts of one process, got a difference of {difference:e}");
    }
    Ok(costs)
}

fn report(costs: &Costs) -> String {
    let median = |passes: &[[Cost; 2]], seconds: fn(&[Cost; 2]) -> f64| {
        let mut times = passes.iter().map(seconds).collect::<Vec<_>>();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let forward = |passes| median(passes, |[forward, _]| forward.seconds);
    let backward = |passes| median(passes, |[_, backward]| backward.seconds);
    let whole = |passes| median(passes, |[forward, backward]| forward.seconds + backward.seconds);
    let Costs { one_process, ranks } = costs;
    format!(
        "{:.3} s forward, {:.3} s backward; one process: {:.3} s, {:.3} s; ratio {:.2}; sent: {} bytes, {} bytes",
        forward(ranks),
        backward(ranks),
        forward(one_process),
        backward(one_process),
        whole(ranks) / whole(one_process),
        ranks[0][0].bytes,
        ranks[0][1].bytes,
    )
}
