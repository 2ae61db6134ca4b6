//! Timing, and the speed of the machine itself.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;
use serde_json::{Value, json};

/// Runs `f` for the time of the warm-up, then for `time_ms`, each at least once.
pub fn median_ms(warm_up_ms: u64, time_ms: u64, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(warm_up_ms) {
        f()?;
    }
    let mut times = Vec::new();
    let start = Instant::now();
    while times.is_empty() || start.elapsed() < Duration::from_millis(time_ms) {
        let start = Instant::now();
        f()?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[times.len() / 2].as_secs_f64() * 1e3)
}

/// The mean time of runs that are queued one after another for about `time_ms`, as a training loop queues its layers, with
/// one synchronisation at their end. A synchronisation after each run would also count the launch of kernels, and the time
/// in which the driver takes back candle's free memory.
pub fn queued_ms(device: &Device, warm_up_ms: u64, time_ms: u64, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut time = |runs: usize| {
        let start = Instant::now();
        let done = (0..runs).try_for_each(|_| f());
        device.synchronize()?;
        done.map(|()| start.elapsed().as_secs_f64() * 1e3)
    };
    let (mut runs, mut ms) = (1, time(1)?);
    while ms < warm_up_ms as f64 {
        runs *= 2;
        ms = time(runs)?;
    }
    let runs = (runs as f64 * time_ms as f64 / ms).ceil().max(1.0) as usize;
    Ok(time(runs)? / runs as f64)
}

/// The median time of reading so many bytes with all threads.
pub fn read_ms(bytes: usize, warm_up_ms: u64, time_ms: u64) -> Result<f64> {
    let numbers = vec![1f32; bytes / size_of::<f32>()];
    median_ms(warm_up_ms, time_ms, || {
        let sum_of = |chunk: &[f32]| {
            // With so many independent sums, memory is the bottleneck.
            let mut sums = [0f32; 64];
            for numbers in chunk.chunks_exact(64) {
                for (sum, x) in sums.iter_mut().zip(numbers) {
                    *sum += x;
                }
            }
            sums.iter().sum::<f32>()
        };
        black_box(numbers.par_chunks(1 << 16).map(sum_of).sum::<f32>());
        Ok(())
    })
}

/// The median time of the product of two square matrices.
pub fn matmul_ms(size: usize, warm_up_ms: u64, time_ms: u64) -> Result<f64> {
    let matrix = Tensor::randn(0f32, 1.0, (size, size), &Device::Cpu)?;
    median_ms(warm_up_ms, time_ms, || matrix.matmul(&matrix).map(drop))
}

/// The peak and the present memory in bytes, from Linux.
pub fn memory() -> Result<Value> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let bytes = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    };
    Ok(json!({ "peak": bytes("VmHWM:"), "now": bytes("VmRSS:") }))
}

/// Lets Linux forget the peak memory so far.
pub fn reset_peak() -> Result<()> {
    Ok(std::fs::write("/proc/self/clear_refs", "5")?)
}
