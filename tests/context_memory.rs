//! The memory that a rank takes for its part of a sequence, beside that of one process.
//!
//! A program of its own, with a single test, since its allocator counts the bytes of the whole process. Only one rank runs. Its communicator
//! gives it its own tensors back in place of another rank's, which are as large.

#[path = "common/counting.rs"]
mod counting;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_attention::parallel::{Communicator, ContextParallel, Order, Pending, Scheme, Split};
use candle_attention::{ForwardOptions, Mask, Result, SelfAttention, SelfAttentionConfig};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

/// The first of several ranks, where every other rank sends what this one sends.
#[derive(Debug, Default)]
struct Mirror {
    size: usize,
    sent: AtomicU64,
}

impl Mirror {
    /// A message with these tensors, which takes memory of its own.
    fn message(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        let bytes = tensors.iter().map(|x| (x.elem_count() * x.dtype().size_in_bytes()) as u64).sum();
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        copies(tensors)
    }
}

fn copies(tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    Ok(tensors.iter().map(Tensor::copy).collect::<candle_core::Result<_>>()?)
}

impl Communicator for Mirror {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        self.size
    }

    fn start_exchange(&self, tensors: &[Tensor], _: usize, _: usize) -> Result<Pending> {
        let message = self.message(tensors)?;
        Ok(Pending::new(move || copies(&message)))
    }

    fn start_all_reduce(&self, tensor: &Tensor) -> Result<Pending> {
        let tensor = tensor.clone();
        Ok(Pending::new(move || Ok(vec![tensor])))
    }

    fn all_to_all(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        // This rank's own tensor doesn't travel.
        let (own, others) = (tensors[..1].to_vec(), self.message(&tensors[1..])?);
        Ok([own, copies(&others)?].concat())
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![tensor.clone(); self.size])
    }

    fn broadcast(&self, tensor: Option<&Tensor>, _: usize) -> Result<Tensor> {
        Ok(tensor.expect("a tensor of this rank").clone())
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes.to_vec(); self.size])
    }

    fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

const LEN: usize = 16_384;
const RANKS: usize = 4;
const EMBED_DIM: usize = 256;
const HEADS: usize = 8;

/// The bytes beyond what was there before: those kept for the backward pass, and the most at a time in both passes.
fn bytes(layer: &SelfAttention, len: usize, options: &ForwardOptions) -> Result<[usize; 2]> {
    let x = Var::zeros((1, len, EMBED_DIM), DType::F32, &Device::Cpu)?;
    let before = counting::start();
    let output = layer.forward_with(&x, options)?.output;
    let kept = counting::now() - before;
    let _ = output.sum_all()?.backward()?;
    Ok([kept, counting::most() - before])
}

#[test]
fn a_rank_of_four_takes_little_more_than_a_quarter() -> anyhow::Result<()> {
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let layer = SelfAttention::new(&SelfAttentionConfig::new(EMBED_DIM, HEADS), vb)?;
    // Every rank needs keys of every other, and yet the pairs are few.
    let attn_mask = Mask::prefix(LEN) & (Mask::sliding_window(16) | Mask::prefix(16));
    let options = ForwardOptions { attn_mask, ..Default::default() };
    // Memory that threads keep for themselves is there before.
    bytes(&layer, 512, &ForwardOptions::default())?;
    let whole = bytes(&layer, LEN, &options)?;
    println!("one process: {whole:?} bytes");
    for (scheme, most) in [(Scheme::Ring, 0.28), (Scheme::Ulysses, 0.42)] {
        let communicator = Arc::new(Mirror { size: RANKS, ..Default::default() });
        let split = Split::new(LEN, RANKS, Order::ZigZag)?;
        let parallel = Some(ContextParallel { communicator: communicator.clone(), split, scheme });
        let rank = bytes(&layer, LEN / RANKS, &ForwardOptions { parallel, ..options.clone() })?;
        let shares = [0, 1].map(|i| rank[i] as f64 / whole[i] as f64);
        println!(
            "a rank of {RANKS}, {scheme:?}: {rank:?} bytes, {shares:?} of one process, {} sent",
            communicator.bytes_sent()
        );
        assert!(shares[0] <= 0.26, "{shares:?} kept for the backward pass");
        assert!(shares[1] <= most, "{shares:?} of one process's peak");
    }
    Ok(())
}
