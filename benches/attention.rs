//! The fused path against the reference, forward and in training: `cargo bench -p attention-benches`.
//!
//! Each case checks that both give the same numbers before it times them.

use std::hint::black_box;

use candle_attention::{AttentionOptions, Backend, Mask, scaled_dot_product_attention};
use candle_core::{DType, Device, Result, Tensor, Var};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// (batch, num_heads, len, head_dim)
const SHAPES: [(usize, usize, usize, usize); 4] =
    [(1, 8, 512, 64), (8, 12, 128, 64), (1, 16, 1024, 128), (1, 1, 2048, 64)];

fn options(causal: bool, backend: Backend) -> AttentionOptions {
    let attn_mask = if causal { Mask::causal() } else { Mask::full() };
    AttentionOptions { attn_mask, backend, ..Default::default() }
}

fn forward(inputs: &[Tensor; 3], options: &AttentionOptions) -> Result<Tensor> {
    let [query, key, value] = inputs;
    Ok(scaled_dot_product_attention(query, key, value, options)?.context)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

fn attention(criterion: &mut Criterion) {
    for shape in SHAPES {
        for causal in [false, true] {
            compare(criterion, shape, causal).expect("attention of these shapes");
        }
    }
}

fn compare(criterion: &mut Criterion, shape: (usize, usize, usize, usize), causal: bool) -> Result<()> {
    let var = || Var::from_tensor(&Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?.to_dtype(DType::F32)?);
    let vars = [var()?, var()?, var()?];
    let trained = vars.each_ref().map(|var| var.as_tensor().clone());
    let inputs = vars.each_ref().map(Var::as_detached_tensor);
    let [fused, reference] = [Backend::Fused, Backend::Reference].map(|backend| options(causal, backend));
    let difference = largest_difference(&forward(&inputs, &fused)?, &forward(&inputs, &reference)?)?;
    assert!(difference < 1e-5, "fused and reference differ by {difference}");

    let (batch, heads, len, dim) = shape;
    let scores = (batch * heads * len * len / if causal { 2 } else { 1 }) as u64;
    let name = format!("{batch}x{heads}x{len}x{dim}{}", if causal { " causal" } else { "" });
    let mut group = criterion.benchmark_group(name);
    // The operations of the forward pass: two each for score and context.
    group.throughput(Throughput::Elements(4 * scores * dim as u64)).sample_size(10);
    for (backend, options) in [("fused", &fused), ("reference", &reference)] {
        group.bench_function(BenchmarkId::new("forward", backend), |b| {
            b.iter(|| black_box(forward(&inputs, options).expect("a context")));
        });
        group.bench_function(BenchmarkId::new("forward+backward", backend), |b| {
            b.iter(|| {
                let loss = forward(&trained, options).and_then(|context| context.sum_all()).expect("a loss");
                black_box(loss.backward().expect("gradients"))
            });
        });
    }
    group.finish();
    Ok(())
}

criterion_group!(benches, attention);
criterion_main!(benches);
