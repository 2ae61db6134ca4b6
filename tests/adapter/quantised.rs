//! Weights in blocks: a layer computes with exactly the numbers of its blocks, forward and backward, and its adapters learn.

use std::io::{Cursor, Seek};

use candle_attention::adapter::{Adapt, LoraConfig, LoraLinear};
use candle_attention::block::{MlpConfig, NormConfig, TransformerBlock, TransformerBlockConfig};
use candle_attention::quantised::{Format, Gguf, Quantise};
use candle_attention::rotary::{Pairing, RotaryConfig};
use candle_attention::{Backend, ForwardOptions, Layout, Result, SelfAttentionConfig};
use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Linear;

use crate::common::{assert_close, assert_same_bits, gradients, max_abs_difference, numbers, randn, var};
use crate::layers::assert_error_says;
use crate::{adapted, blocks_common, config, matrices};

const FORMATS: [Format; 7] =
    [Format::Q8_0, Format::Q4_0, Format::Q5_0, Format::Q4K, Format::Q5K, Format::Q6K, Format::Nf4];

/// A block whose weights have rows of whole blocks of every format.
fn large() -> TransformerBlockConfig {
    let attention = SelfAttentionConfig {
        num_kv_heads: Some(2),
        head_dim: Some(64),
        is_causal: true,
        qkv_bias: false,
        out_bias: false,
        rotary: Some(RotaryConfig { pairing: Pairing::Interleaved, ..RotaryConfig::default() }),
        ..SelfAttentionConfig::new(256, 4)
    };
    TransformerBlockConfig::new(attention, MlpConfig::swiglu(256, 512), NormConfig::rms(1e-5))
}

/// A block with its weights in each format, and in the formats of a file of llama.cpp's type Q4_K_M.
fn in_all_formats(block: &TransformerBlock, dtype: DType) -> Result<Vec<(String, TransformerBlock)>> {
    let of_format = |format: Format| Ok((format!("{format:?}"), block.quantise(format)?));
    let mut blocks = FORMATS.into_iter().map(of_format).collect::<Result<Vec<_>>>()?;
    let file = written(&gguf(block, q4_k_m)?);
    let mixed = TransformerBlock::from_gguf(&large(), &Gguf::open(file.path())?, "blk.3", dtype, &Device::Cpu)?;
    blocks.push(("Q4_K_M".into(), mixed));
    Ok(blocks)
}

/// The type of a matrix in a file of llama.cpp's type Q4_K_M.
fn q4_k_m(name: &str) -> GgmlDType {
    if ["attn_v.weight", "ffn_down.weight"].contains(&name) { GgmlDType::Q6K } else { GgmlDType::Q4K }
}

/// The output, and the gradients of x and of an adapter.
fn run(block: &TransformerBlock, x: &Var, options: &ForwardOptions) -> Result<Vec<Tensor>> {
    let y = block.forward_with(x, options)?.output;
    let c = randn(9, y.shape(), DType::F64)?.to_dtype(y.dtype())?;
    let vars = block.vars();
    let gradients = gradients(&(&y * c)?, &[x].into_iter().chain(&vars).collect::<Vec<_>>())?;
    Ok([vec![y], gradients].concat())
}

#[test]
fn quantised_block_is_the_block_with_the_numbers_of_its_blocks() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-11), (DType::F32, 1e-4)] {
        let block = blocks_common::block(&large(), dtype)?;
        for (format, quantised) in in_all_formats(&block, dtype)? {
            assert_eq!(quantised.formats().len(), 7);
            let dense = quantised.dequantise()?;
            assert!(max_abs_difference(dense.mlp().up().weight(), block.mlp().up().weight())? > 0.0);
            let adapters = [adapted(&quantised, "default", &config(), 3)?, adapted(&dense, "default", &config(), 3)?];
            // Many tokens, and few, whose products take another way.
            for tokens in [40, 1] {
                let x = var(1, (2, tokens, 256), dtype)?;
                for backend in [Backend::Auto, Backend::Reference] {
                    let options = ForwardOptions { backend, ..Default::default() };
                    let [blocks, numbers] = [run(&adapters[0], &x, &options)?, run(&adapters[1], &x, &options)?];
                    for (i, (blocks, numbers)) in blocks.iter().zip(&numbers).enumerate() {
                        let what = format!("{format}, {dtype:?}, {tokens} tokens, {backend:?}, {i}");
                        let largest = numbers.abs()?.to_dtype(DType::F64)?.max_all()?.to_scalar::<f64>()?.max(1.0);
                        let difference = max_abs_difference(blocks, numbers)? / largest;
                        assert!(difference < tolerance, "{what}: {difference}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// The mean error of numbers that are rounded in bf16, as a part of the mean size of the exact ones.
fn mean_error(x: &Tensor, exact: &Tensor) -> Result<f64> {
    let mean = |x: &Tensor| x.sqr()?.mean_all()?.to_scalar::<f64>();
    let (error, size) = (mean(&(x.to_dtype(DType::F64)? - exact)?)?, mean(exact)?);
    // Of one token, queries and keys have gradients of zero.
    Ok((error / size.max(1.0)).sqrt())
}

/// Both round, in other places, so that both are held against f64: weights in blocks err by no more than a small multiple of what the
/// same numbers in bf16 do. (Of two tokens, there are few numbers to take a mean of.)
#[test]
fn quantised_block_in_bf16_errs_as_the_numbers_of_its_blocks_do() -> Result<()> {
    for (format, quantised) in in_all_formats(&blocks_common::block(&large(), DType::BF16)?, DType::BF16)? {
        let (dense, exact) = (quantised.dequantise()?, blocks_common::block(&large(), DType::F64)?);
        for ((_, rounded), var) in dense.parameters().iter().zip(exact.vars()) {
            var.set(&rounded.to_dtype(DType::F64)?)?;
        }
        let [quantised, dense, exact] =
            [quantised, dense, exact].map(|block| adapted(&block, "default", &config(), 3).expect("adapters"));
        for ((_, rounded), (_, var)) in matrices(&dense, "default")?.iter().zip(matrices(&exact, "default")?) {
            var.set(&rounded.to_dtype(DType::F64)?)?;
        }
        for (tokens, most) in [(40, 4.0), (1, 6.0)] {
            let x = var(1, (2, tokens, 256), DType::BF16)?;
            let wide = Var::from_tensor(&x.to_dtype(DType::F64)?)?;
            for backend in [Backend::Auto, Backend::Reference] {
                let options = ForwardOptions { backend, ..Default::default() };
                let exact = run(&exact, &wide, &options)?;
                let [blocks, numbers] = [run(&quantised, &x, &options)?, run(&dense, &x, &options)?];
                for (i, ((blocks, numbers), exact)) in blocks.iter().zip(&numbers).zip(&exact).enumerate() {
                    let (blocks, numbers) = (mean_error(blocks, exact)?, mean_error(numbers, exact)?);
                    let what = format!("{format}, {tokens} tokens, {backend:?}, {i}");
                    assert!(blocks < most * numbers + 2f64.powi(-9), "{what}: {blocks}, {numbers} as numbers");
                    assert!(numbers < 0.15, "{what}: {numbers}");
                }
            }
        }
    }
    Ok(())
}

/// The formats lose as much as they should: 8 bits little, and with each bit less the error doubles.
#[test]
fn blocks_are_close_to_the_weights() -> Result<()> {
    let weight = randn(1, (64, 512), DType::F32)?;
    for (format, bound) in FORMATS.into_iter().zip([0.008, 0.12, 0.06, 0.1, 0.05, 0.025, 0.11]) {
        let linear = LoraLinear::new(Linear::new(weight.clone(), None)).quantise(format)?;
        let error = (linear.dequantise()?.linear().weight() - &weight)?.sqr()?.mean_all()?.to_scalar::<f32>()?.sqrt();
        assert!(error < bound && error > bound / 4.0, "{format:?}: {error}");
    }
    Ok(())
}

#[test]
fn training_leaves_the_blocks_as_they_are() -> Result<()> {
    let file = written(&gguf(&blocks_common::block(&large(), DType::F32)?, q4_k_m)?);
    let base = TransformerBlock::from_gguf(&large(), &Gguf::open(file.path())?, "blk.3", DType::F32, &Device::Cpu)?;
    let block = adapted(&base, "default", &LoraConfig { dropout_p: 0.1, ..config() }, 3)?;
    let before = base.dequantise()?;
    let parameters: Vec<(String, Var)> = matrices(&block, "default")?;
    let mut optimizer = candle_attention::train::AdamW::new(&parameters, Default::default())?;
    let (x, target) = (randn(1, (2, 8, 256), DType::F32)?, randn(2, (2, 8, 256), DType::F32)?);
    let mut losses = Vec::new();
    for _ in 0..10 {
        let loss = (block.forward_t(&x, true)? - &target)?.sqr()?.mean_all()?;
        losses.push(loss.to_scalar::<f32>()?);
        optimizer.step(&loss.backward()?)?;
    }
    assert!(losses[9] < losses[0], "{losses:?}");
    for ((name, before), (_, after)) in before.parameters().into_iter().zip(block.dequantise()?.parameters()) {
        assert_same_bits(after, before, &name);
    }
    // Merged, the weights are numbers, and can be quantised again.
    let merged = block.merge("default")?;
    assert_close(&merged.forward(&x)?, &block.forward(&x)?, 1e-3, "merged");
    assert_eq!(merged.formats(), []);
    let apart = merged.unmerge()?;
    assert_eq!(apart.formats(), block.formats());
    assert_same_bits(&apart.forward(&x)?, &block.forward(&x)?, "unmerged");
    let again = merged.quantise(Format::Q8_0)?;
    assert!(again.adapters().is_empty());
    let both = adapted(&block, "second", &config(), 4)?.merge("default")?.quantise(Format::Q8_0)?;
    assert_eq!(both.adapters(), ["second"]);
    assert_close(again.dequantise()?.mlp().up().weight(), merged.mlp().up().weight(), 0.01, "quantised again");
    Ok(())
}

#[test]
fn quantised_layer_has_no_weights_as_parameters_and_no_file() -> Result<()> {
    let block = blocks_common::block(&large(), DType::F32)?;
    let quantised = block.quantise(Format::Q4_0)?;
    let names: Vec<_> = quantised.parameters().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["attention_norm.weight", "mlp_norm.weight"]);
    let placeholder = quantised.mlp().up().weight();
    assert_eq!((placeholder.dims(), placeholder.dtype()), (&[512, 256][..], DType::F32));
    assert!(numbers(placeholder)?.iter().all(|x| x.is_nan()));
    let says = ["q_proj.weight", "numbers (dequantise", "Q4_0"];
    assert_error_says(quantised.to_bytes(), &says);
    assert_error_says(quantised.to_layout(Layout::Llama), &says);
    assert_error_says(quantised.trainable(), &says);
    assert_error_says(quantised.quantise(Format::Q8_0), &["attention.q_proj.weight", "numbers", "Q4_0"]);
    assert_eq!(quantised.quantise(Format::Q4_0)?.formats().len(), 7);
    assert_error_says(
        blocks_common::block(&blocks_common::bert(), DType::F32)?.quantise(Format::Q4_0),
        &["attention.q_proj.weight", "blocks of 32", "rows of 6"],
    );
    for format in FORMATS {
        let mut numbers = vec![1f32; 256];
        numbers[77] = f32::NAN;
        let nan = Linear::new(Tensor::from_vec(numbers, (1, 256), &Device::Cpu)?, None);
        assert_error_says(LoraLinear::new(nan).quantise(format), &["linear.weight", "finite", "NaN"]);
    }
    Ok(())
}

/// The formats of ggml have scales in f16, NF4 has one in f32. candle's quantisers make zeros of some larger numbers.
#[test]
fn numbers_that_are_too_large_for_blocks_are_an_error() -> Result<()> {
    for format in FORMATS {
        for large in [4e5, 1e9, -1e13, 1e17, -1e20, 1e30, 3e38f32] {
            for count in [1, 20, 256] {
                let numbers =
                    Tensor::from_iter((0..256).map(|i| if i < count { large } else { 0.01 * i as f32 }), &Device::Cpu)?;
                let layer = LoraLinear::new(Linear::new(numbers.reshape((1, 256))?, None));
                if format != Format::Nf4 && large.abs() > 4e5 {
                    assert_error_says(layer.quantise(format), &["linear.weight", "finite", "larger"]);
                } else {
                    let first =
                        layer.quantise(format)?.dequantise()?.linear().weight().get(0)?.get(0)?.to_scalar::<f32>()?;
                    assert!((first / large - 1.0).abs() < 0.01, "{format:?} {large} {count} {first}");
                }
            }
        }
    }
    Ok(())
}

/// candle's quantisers of Q4_K and Q5_K make zeros of 32 numbers that are equal, or nearly so.
#[test]
fn equal_numbers_stay_what_they_are() -> Result<()> {
    let some = [0.0, 0.75, -0.75, -0.1, -0.02, 1.0, -1.0].into_iter().map(|x| (x, 0));
    // f16 scales of smaller numbers have few digits.
    let drawn = numbers(&randn(1, 100, DType::F64)?)?.into_iter().filter(|x| x.abs() > 0.01);
    let drawn = drawn.zip([0, 1, 2, 40].into_iter().cycle());
    for format in FORMATS {
        for (number, ulps) in some.clone().chain(drawn.clone()) {
            // The last numbers lie some units in the last place above the others.
            let number = number as f32;
            let above = |i: usize| f32::from_bits(number.to_bits() + if i % 32 > 16 { ulps } else { 0 });
            let weight = Tensor::from_iter((0..512).map(above), &Device::Cpu)?.reshape((2, 256))?;
            let layer = LoraLinear::new(Linear::new(weight.clone(), None)).quantise(format)?;
            let error = max_abs_difference(layer.dequantise()?.linear().weight(), &weight)?;
            assert!(
                error <= 0.01 * f64::from(number.abs()),
                "{format:?}: {number} and {ulps} units above: off by {error}"
            );
        }
    }
    Ok(())
}

/// GGUF's names of the parameters of a block.
const NAMES: [(&str, &str); 9] = [
    ("attention.q_proj.weight", "attn_q.weight"),
    ("attention.k_proj.weight", "attn_k.weight"),
    ("attention.v_proj.weight", "attn_v.weight"),
    ("attention.o_proj.weight", "attn_output.weight"),
    ("mlp.gate.weight", "ffn_gate.weight"),
    ("mlp.up.weight", "ffn_up.weight"),
    ("mlp.down.weight", "ffn_down.weight"),
    ("attention_norm.weight", "attn_norm.weight"),
    ("mlp_norm.weight", "ffn_norm.weight"),
];

/// The bytes of a GGUF file with a block's matrices in this type, and its vectors in f32.
fn gguf(block: &TransformerBlock, dtype: impl Fn(&str) -> GgmlDType) -> Result<Vec<u8>> {
    let parameters = block.parameters();
    let quantise = |(own, name): &(&str, &str)| {
        let tensor = parameters.iter().find(|(other, _)| other == own).expect("a parameter").1;
        let dtype = if tensor.rank() == 2 { dtype(name) } else { GgmlDType::F32 };
        Ok((format!("blk.3.{name}"), QTensor::quantize(tensor, dtype)?))
    };
    let tensors = NAMES.iter().map(quantise).collect::<Result<Vec<_>>>()?;
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &[], &tensors)?;
    file.rewind().expect("a start");
    Ok(file.into_inner())
}

fn written(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), bytes).expect("a file");
    file
}

#[test]
fn gguf_files_give_the_blocks_that_they_hold() -> Result<()> {
    let block = blocks_common::block(&large(), DType::F32)?;
    let x = randn(1, (1, 7, 256), DType::F32)?;
    let types = [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q5_0, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K];
    for (dtype, format) in types.into_iter().zip(FORMATS) {
        let file = written(&gguf(&block, |name| if name == "ffn_down.weight" { GgmlDType::F16 } else { dtype })?);
        let file = Gguf::open(file.path())?;
        assert_eq!(file.tensor_names().len(), 9);
        let loaded = TransformerBlock::from_gguf(&large(), &file, "blk.3", DType::F32, &Device::Cpu)?;
        assert_eq!(loaded.formats().len(), 6);
        assert!(loaded.formats().iter().all(|(_, other)| *other == format));
        // All as this crate quantises it, but for the matrix in f16.
        let expected = block.quantise(format)?.dequantise()?;
        for ((name, expected), (_, got)) in expected.parameters().into_iter().zip(loaded.dequantise()?.parameters()) {
            if name != "mlp.down.weight" {
                assert_same_bits(got, expected, &name);
                assert_same_bits(got, &as_candle_reads(&file, &name)?, &name);
            }
        }
        let down = file.tensor("blk.3.ffn_down.weight", DType::F32, &Device::Cpu)?;
        assert_close(&down, block.mlp().down().weight(), 1e-3, "f16");
        assert_close(&loaded.forward(&x)?, &loaded.dequantise()?.forward(&x)?, 1e-4, "forward");
    }
    Ok(())
}

/// A parameter of this crate's name, whose numbers candle decodes.
fn as_candle_reads(file: &Gguf, own: &str) -> Result<Tensor> {
    let (_, name) = NAMES.iter().find(|(other, _)| *other == own).expect("a parameter");
    file.tensor(&format!("blk.3.{name}"), DType::F32, &Device::Cpu)
}

#[test]
fn matrices_of_a_file_have_types_of_their_own() -> Result<()> {
    let block = blocks_common::block(&large(), DType::F32)?;
    let file = written(&gguf(&block, q4_k_m)?);
    let file = Gguf::open(file.path())?;
    let loaded = TransformerBlock::from_gguf(&large(), &file, "blk.3", DType::F32, &Device::Cpu)?;
    let formats = loaded.formats();
    assert_eq!(formats.len(), 7);
    for (name, format) in formats {
        let is_six = ["attention.v_proj.weight", "mlp.down.weight"].contains(&&*name);
        assert_eq!(format, if is_six { Format::Q6K } else { Format::Q4K }, "{name}");
    }
    for (name, numbers) in loaded.dequantise()?.parameters() {
        assert_same_bits(numbers, &as_candle_reads(&file, &name)?, &name);
    }
    Ok(())
}

/// llama.cpp writes the rows of W_Q and W_K of Llama and Mistral in the order of rotary embedding by neighbours.
#[test]
fn files_of_llama_are_brought_into_the_order_of_the_config() -> Result<()> {
    let mut config = large();
    config.attention.rotary = Some(RotaryConfig::default());
    let block = blocks_common::block(&config, DType::F32)?;
    let x = randn(1, (1, 7, 256), DType::F32)?;
    // (heads, 2, head_dim / 2, in) to (heads, head_dim / 2, 2, in)
    let by_neighbours = |name: &str, weight: &Tensor| {
        let heads = if name == "attn_q.weight" { 4 } else { 2 };
        weight.reshape((heads, 2, 32, 256))?.transpose(1, 2)?.contiguous()?.reshape(weight.shape())
    };
    let parameters = block.parameters();
    for dtype in [GgmlDType::F32, GgmlDType::Q8_0] {
        let stored = |(own, name): &(&str, &str)| {
            let tensor = parameters.iter().find(|(other, _)| other == own).expect("a parameter").1.clone();
            let is_paired = ["attn_q.weight", "attn_k.weight"].contains(name);
            let tensor = if is_paired { by_neighbours(name, &tensor)? } else { tensor };
            let dtype = if tensor.rank() == 2 { dtype } else { GgmlDType::F32 };
            Ok((format!("blk.0.{name}"), QTensor::quantize(&tensor, dtype)?))
        };
        let tensors = NAMES.iter().map(stored).collect::<candle_core::Result<Vec<_>>>()?;
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let llama = gguf_file::Value::String("llama".into());
        let mut file = Cursor::new(Vec::new());
        gguf_file::write(&mut file, &[("general.architecture", &llama)], &tensors)?;
        let file = written(&file.into_inner());
        let load =
            |config| TransformerBlock::from_gguf(config, &Gguf::open(file.path())?, "blk.0", DType::F32, &Device::Cpu);
        let expected =
            if dtype == GgmlDType::F32 { block.clone() } else { block.quantise(Format::Q8_0)?.dequantise()? };
        let loaded = load(&config)?;
        for ((name, expected), (_, got)) in expected.parameters().into_iter().zip(loaded.dequantise()?.parameters()) {
            assert_same_bits(got, expected, &name);
        }
        // With the rows as they are, the pairing of the file computes the same.
        let interleaved = load(&large())?;
        assert_close(&interleaved.forward(&x)?, &loaded.forward(&x)?, 1e-4, "interleaved");
    }
    Ok(())
}

#[test]
fn files_that_do_not_fit_are_one_clear_error() -> Result<()> {
    let block = blocks_common::block(&large(), DType::F32)?;
    let whole = gguf(&block, q4_k_m)?;
    let load = |bytes: &[u8], config: &TransformerBlockConfig, prefix: &str| {
        let file = written(bytes);
        TransformerBlock::from_gguf(config, &Gguf::open(file.path())?, prefix, DType::F32, &Device::Cpu)
    };
    load(&whole, &large(), "blk.3")?;
    assert_error_says(load(&whole, &large(), "blk.4"), &["blk.4.attn_q.weight", "is missing", "blk.4.ffn_norm.weight"]);
    let q3 = gguf(&block, |name| if name == "attn_v.weight" { GgmlDType::Q3K } else { GgmlDType::Q8_0 })?;
    assert_error_says(load(&q3, &large(), "blk.3"), &["blk.3.attn_v.weight", "expected Q8_0", "Q6_K", "got Q3K"]);
    let mut other = large();
    other.mlp.hidden_dim = 768;
    assert_error_says(load(&whole, &other, "blk.3"), &["blk.3.ffn_up.weight", "[768, 256]", "[512, 256]"]);
    let file = written(&whole);
    let content = gguf_file::Content::read(&mut std::fs::File::open(file.path()).expect("a file"))?;
    let start = |name: &str| (content.tensor_data_offset + content.tensor_infos[name].offset) as usize;
    // In the header, and after the first byte of each tensor.
    let in_tensors = NAMES.map(|(_, name)| start(&format!("blk.3.{name}")) + 1);
    for cut in [0, 3, 20, 200, whole.len() / 2, whole.len() - 40].into_iter().chain(in_tensors) {
        let error = load(&whole[..cut], &large(), "blk.3").err().unwrap_or_else(|| panic!("{cut} bytes are no file"));
        assert!(error.to_string().contains("checkpoint"), "{cut}: {error}");
    }
    // NaN as the scale of a block: in Q4_K its first bytes, in Q6_K its last ones.
    for (name, at) in [("blk.3.ffn_up.weight", 0), ("blk.3.ffn_down.weight", 208)] {
        let mut nan = whole.clone();
        nan[start(name) + at..][..2].copy_from_slice(&[0xFF, 0x7F]);
        assert_error_says(load(&nan, &large(), "blk.3"), &[name, "finite"]);
    }
    let zero = gguf_file::Value::U32(0);
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &[("general.alignment", &zero)], &[])?;
    let file = written(&file.into_inner());
    assert_error_says(Gguf::open(file.path()).map(|_| ()), &["a GGUF file", "can't be read"]);
    assert_error_says(Gguf::open("/nowhere/model.gguf").map(|_| ()), &["/nowhere/model.gguf", "can't read"]);
    Ok(())
}
