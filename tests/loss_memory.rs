//! The memory that a loss over a vocabulary takes, forward and backward, beside that of candle's own.
//!
//! This is a program of its own, with a single test, since its allocator counts the bytes of the whole process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_attention::block::{CrossEntropyOptions, cross_entropy, linear_cross_entropy};
use candle_core::{DType, Device, Result, Tensor, Var};

/// Counts bytes, and remembers the most there were at a time.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it is; beside it only two counters change.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps the conditions of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that a loss and its gradients take at a time beyond what is there before.
fn most(loss: impl Fn() -> Result<Tensor>) -> Result<usize> {
    let before = NOW.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    loss()?.backward()?;
    Ok(MOST.load(Ordering::Relaxed) - before)
}

#[test]
fn losses_take_less_than_a_third_of_candles_memory() -> anyhow::Result<()> {
    let (tokens, vocabulary, dim) = (1024, 32_768, 16);
    let draw = |shape: (usize, usize)| Var::rand_f64(-1.0, 1.0, shape, DType::F32, &Device::Cpu);
    let (hidden, weight) = (draw((tokens, dim))?, draw((vocabulary, dim))?);
    let targets = Tensor::from_vec((0..tokens as u32).map(|i| i * 31).collect(), tokens, &Device::Cpu)?;
    let options = CrossEntropyOptions::default();
    let logits = || hidden.matmul(&weight.t()?);
    let candles = most(|| candle_nn::loss::cross_entropy(&logits()?, &targets))?;
    let of_logits = most(|| Ok(cross_entropy(&logits()?, &targets, &options)?))?;
    let of_layer = most(|| Ok(linear_cross_entropy(&hidden, &weight, None, &targets, &options)?))?;

    let matrix = tokens * vocabulary * size_of::<f32>();
    println!(
        "in matrices of logits: candle {}, ours {}, of the layer {}",
        share(candles, matrix),
        share(of_logits, matrix),
        share(of_layer, matrix)
    );
    // The logits, their gradient, and the two that candle's store adds up.
    assert!(of_logits < 5 * matrix, "{of_logits} bytes");
    // A part of the logits, and the gradient of the weight several times.
    assert!(of_layer < matrix, "{of_layer} bytes");
    assert!(of_layer * 10 < candles * 3, "{of_layer} of {candles} bytes");
    Ok(())
}

fn share(bytes: usize, matrix: usize) -> f64 {
    bytes as f64 / matrix as f64
}
