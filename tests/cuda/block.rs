//! Whole blocks, their parts, adapters and training: a GPU gives the results of the CPU.

use candle_attention::adapter::{Adapt, LoraConfig, Target};
use candle_attention::block::{
    CrossEntropyOptions, Embedding, Reduction, TransformerBlock, TransformerBlockConfig, cross_entropy,
    linear_cross_entropy,
};
use candle_attention::quantised::{Format, Quantise};
use candle_attention::train::{AdamW, AdamWConfig, clip_grad_norm, named_variables};
use candle_attention::{ForwardOptions, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use crate::blocks_common::{self, bert, gemma2, gpt2, llama};
use crate::common::{gradients, numbers, randn};
use crate::compare::{assert_alike, assert_as_precise, tolerance};
use crate::gpu;

#[track_caller]
fn compare(what: &str, gpu: &[Tensor], cpu: &[Tensor], dtype: DType) -> Result<()> {
    assert_eq!(gpu.len(), cpu.len(), "{what}");
    for (i, (gpu, cpu)) in gpu.iter().zip(cpu).enumerate() {
        assert_alike(&format!("{what}, number {i}"), gpu, cpu, 2.0 * tolerance(dtype))?;
    }
    Ok(())
}

/// The tokens of a sequence.
const TOKENS: usize = 5;

/// The output of a block in training, and the gradients of x and of every variable.
fn run(block: &TransformerBlock, device: &Device, dtype: DType) -> Result<Vec<Tensor>> {
    run_on(block, device, dtype, TOKENS)
}

/// The same for as many tokens, whose numbers are rounded to `rounded`. The block may have more digits.
fn run_on(block: &TransformerBlock, device: &Device, rounded: DType, tokens: usize) -> Result<Vec<Tensor>> {
    let (dim, dtype) = (block.config().attention.embed_dim, block.vars()[0].dtype());
    let tensor =
        |seed| randn(seed, (2, tokens, dim), DType::F64)?.to_dtype(rounded)?.to_dtype(dtype)?.to_device(device);
    let x = Var::from_tensor(&tensor(2)?)?;
    let y = block.forward_with(&x, &ForwardOptions { train: true, ..Default::default() })?.output;
    let vars = block.vars();
    let loss = (&y * tensor(9)?)?;
    Ok([vec![y], gradients(&loss, &[&x].into_iter().chain(&vars).collect::<Vec<_>>())?].concat())
}

#[test]
fn every_kind_of_block_equals_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for (what, config) in blocks_common::grid() {
        on_both(&gpu, &what, &config, DType::F32, TOKENS)?;
    }
    for dtype in [DType::F64, DType::F16, DType::BF16] {
        for (what, config) in [("BERT", bert()), ("Llama", llama()), ("GPT-2", gpt2()), ("Gemma 2", gemma2())] {
            on_both(&gpu, &format!("{what}, {dtype:?}"), &config, dtype, TOKENS)?;
        }
    }
    Ok(())
}

/// Heads of the kernels' own size, and more tokens than a tile has.
#[test]
fn a_block_of_many_tokens_equals_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let mut config = llama();
    config.attention.embed_dim = 128;
    config.attention.head_dim = Some(64);
    config.mlp = candle_attention::block::MlpConfig::swiglu(128, 96);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        on_both(&gpu, &format!("150 tokens, {dtype:?}"), &config, dtype, 150)?;
    }
    Ok(())
}

fn on_both(gpu: &Device, what: &str, config: &TransformerBlockConfig, dtype: DType, tokens: usize) -> Result<()> {
    let on_cpu = blocks_common::block(config, dtype)?;
    let on_gpu = TransformerBlock::from_bytes(&on_cpu.to_bytes()?, gpu)?;
    let of_gpu = run_on(&on_gpu, gpu, dtype, tokens)?;
    let of_cpu = run_on(&on_cpu, &Device::Cpu, dtype, tokens)?;
    compare(what, &of_gpu, &of_cpu, dtype)?;
    if matches!(dtype, DType::F16 | DType::BF16) {
        // The same weights in f64.
        let exact = blocks_common::block(config, DType::F64)?;
        for (exact, var) in exact.vars().iter().zip(on_cpu.vars()) {
            exact.set(&var.to_dtype(DType::F64)?)?;
        }
        assert_as_precise(what, &of_gpu, &of_cpu, &run_on(&exact, &Device::Cpu, dtype, tokens)?)?;
    }
    Ok(())
}

#[test]
fn recomputation_has_the_gradients_of_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let on_cpu = blocks_common::block(&llama(), DType::F32)?;
    let on_gpu = TransformerBlock::from_bytes(&on_cpu.to_bytes()?, &gpu)?.with_recompute(true);
    let (got, expected) = (run(&on_gpu, &gpu, DType::F32)?, run(&on_cpu, &Device::Cpu, DType::F32)?);
    compare("recomputed", &got, &expected, DType::F32)
}

#[test]
fn decoding_equals_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for config in [llama(), gpt2()] {
        let on_cpu = blocks_common::block(&config, DType::F32)?;
        let on_gpu = TransformerBlock::from_bytes(&on_cpu.to_bytes()?, &gpu)?;
        let decode = |block: &TransformerBlock, device: &Device| {
            let x = randn(2, (2, 5, config.attention.embed_dim), DType::F32)?.to_device(device)?;
            let mut cache = block.kv_cache(2)?;
            (0..5).map(|i| block.forward_cached(&x.narrow(1, i, 1)?, &mut cache)).collect::<Result<Vec<_>>>()
        };
        compare("decoded", &decode(&on_gpu, &gpu)?, &decode(&on_cpu, &Device::Cpu)?, DType::F32)?;
    }
    Ok(())
}

#[test]
fn embedding_and_cross_entropy_equal_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let run = |options: &CrossEntropyOptions, dtype, device: &Device| {
        let var = |seed, shape: (usize, usize)| {
            Var::from_tensor(&randn(seed, shape, DType::F64)?.to_dtype(dtype)?.to_device(device)?)
        };
        let (table, weight) = (var(1, (11, 6))?, var(2, (7, 6))?);
        let ids = Tensor::new(&[[0u32, 10, 3], [3, 3, 5]], device)?;
        let targets = Tensor::new(&[[6i64, 2, 0], [2, 2, 5]], device)?;
        let hidden = Embedding::new(table.as_tensor().clone())?.forward(&ids)?;
        let fused = linear_cross_entropy(&hidden, &weight, None, &targets, options)?;
        let logits = hidden.broadcast_matmul(&weight.t()?)?;
        let plain = cross_entropy(&logits, &targets, options)?;
        let of_fused = gradients(&fused, &[&table, &weight])?;
        let of_plain = gradients(&plain, &[&table, &weight])?;
        Ok::<_, candle_attention::Error>([vec![fused, plain], of_fused, of_plain].concat())
    };
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for label_smoothing in [0.0, 0.2] {
            for (ignore_index, reduction) in [(None, Reduction::Mean), (Some(2), Reduction::Sum)] {
                let options = CrossEntropyOptions { label_smoothing, ignore_index, reduction };
                let what = format!("{dtype:?}, {options:?}");
                let (got, expected) = (run(&options, dtype, &gpu)?, run(&options, dtype, &Device::Cpu)?);
                compare(&what, &got, &expected, dtype)?;
            }
        }
    }
    Ok(())
}

/// The losses of a block that AdamW trains with clipped gradients, and the bytes of its state.
fn losses(block: &TransformerBlock, device: &Device, steps: usize) -> Result<(Vec<f64>, AdamW)> {
    let parameters: Vec<_> = block.vars().into_iter().enumerate().map(|(i, var)| (format!("{i:03}"), var)).collect();
    let mut optimizer = AdamW::new(&parameters, AdamWConfig { lr: 1e-2, ..Default::default() })?;
    let tensor = |seed| randn(seed, (4, 5, block.config().attention.embed_dim), DType::F32)?.to_device(device);
    let (x, wanted) = (tensor(2)?, tensor(3)?);
    let mut losses = Vec::new();
    for _ in 0..steps {
        let loss = (block.forward_t(&x, true)? - &wanted)?.sqr()?.mean_all()?;
        losses.extend(numbers(&loss)?);
        let mut gradients = loss.backward()?;
        clip_grad_norm(&mut gradients, &parameters, 0.5)?;
        optimizer.step(&gradients)?;
    }
    Ok((losses, optimizer))
}

#[test]
fn adamw_has_the_losses_of_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for config in [llama(), bert()] {
        let on_cpu = blocks_common::block(&config, DType::F32)?;
        let on_gpu = TransformerBlock::from_bytes(&on_cpu.to_bytes()?, &gpu)?.trainable()?;
        let ((cpu, _), (losses, mut optimizer)) = (losses(&on_cpu, &Device::Cpu, 30)?, losses(&on_gpu, &gpu, 30)?);
        assert!(cpu[29] < 0.9 * cpu[0], "{cpu:?}");
        for (step, (cpu, gpu)) in cpu.iter().zip(&losses).enumerate() {
            assert!((cpu - gpu).abs() < 1e-3 * cpu, "step {step}: {gpu}, on the CPU {cpu}");
        }
        // The state comes back as it was.
        let state = optimizer.to_bytes()?;
        optimizer.load_bytes(&state)?;
        assert_eq!(optimizer.to_bytes()?, state);
    }
    Ok(())
}

#[test]
fn adapters_and_quantised_weights_equal_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let config = {
        let mut config = llama();
        config.attention.embed_dim = 64;
        config.attention.head_dim = Some(32);
        config.mlp = candle_attention::block::MlpConfig::swiglu(64, 128);
        config
    };
    use Target::{Down, Gate, Key, Output, Query, Up, Value};
    let lora = LoraConfig { targets: vec![Query, Key, Value, Output, Gate, Up, Down], ..LoraConfig::new(4, 8.0) };
    for dtype in [DType::F32, DType::BF16] {
        let plain = blocks_common::block(&config, dtype)?;
        for format in [None, Some(Format::Q8_0), Some(Format::Q4_0), Some(Format::Nf4)] {
            let base = |block: TransformerBlock| match format {
                Some(format) => block.quantise(format),
                None => Ok(block),
            };
            let adapted = |block: TransformerBlock, device: &Device| {
                let varmap = VarMap::new();
                let block = base(block)?.with_lora("task", &lora, VarBuilder::from_varmap(&varmap, dtype, device))?;
                for ((_, var), seed) in named_variables(&varmap).into_iter().zip(100..) {
                    let x = randn(seed, var.shape(), DType::F64)?.affine(0.1, 0.0)?.to_dtype(dtype)?;
                    var.set(&x.to_device(device)?)?;
                }
                run(&block, device, dtype)
            };
            let on_gpu = TransformerBlock::from_bytes(&plain.to_bytes()?, &gpu)?;
            let on_cpu = TransformerBlock::from_bytes(&plain.to_bytes()?, &Device::Cpu)?;
            let (got, expected) = (adapted(on_gpu, &gpu)?, adapted(on_cpu, &Device::Cpu)?);
            assert!(expected.len() > 14, "{}", expected.len());
            compare(&format!("{dtype:?}, {format:?}"), &got, &expected, dtype)?;
        }
    }
    Ok(())
}
