//! A layer with an adapter is the layer with W + s · B · A as weights, in every path.

use candle_attention::adapter::{Adapt, LoraLinear};
use candle_attention::block::{Mlp, MlpConfig, TransformerBlock};
use candle_attention::{Backend, ForwardOptions, Layout, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, VarBuilder, VarMap};

use crate::common::{assert_close, assert_same_bits, gradients, randn, var};
use crate::{adapted, blocks_common, config, grids, layers, vb};

/// The output of a layer for x (and a memory).
type Forward<'a, L> = &'a dyn Fn(&L, &Tensor) -> Result<Tensor>;

/// The outputs, and the gradients of x, of the layer with an adapter and of the layer with the adapter merged.
fn check<L: Adapt>(layer: &L, forward: Forward<L>, x: [usize; 3], tolerance: f64, what: &str) -> Result<()> {
    let layer = adapted(layer, "default", &config(), 3)?;
    let dtype = layer.adapter_parameters("default")?[0].1.dtype();
    let x = var(1, x.to_vec(), dtype)?;
    let mut results = Vec::new();
    for layer in [&layer, &layer.merge("default")?] {
        let y = forward(layer, &x)?;
        let c = randn(9, y.shape(), DType::F64)?.to_dtype(dtype)?;
        let of_x = gradients(&(&y * c)?, &[&x])?.remove(0);
        results.push([y, of_x]);
    }
    for (beside, merged) in results[0].iter().zip(&results[1]) {
        assert_close(beside, merged, tolerance, what);
    }
    // What isn't adapted gives another result, so the comparison sees an adapter that is left out.
    let base = forward(&layer.with_active_adapter(None)?, &x)?;
    assert!((base - &results[0][0])?.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()? > 0.01, "{what}");
    Ok(())
}

#[test]
fn attention_with_an_adapter_is_attention_with_the_summed_weights() -> Result<()> {
    for (name, config, _) in grids::self_attention() {
        let layer = layers::self_attention(&config, DType::F64)?;
        for backend in [Backend::Auto, Backend::Reference] {
            let options = ForwardOptions { backend, ..Default::default() };
            check(
                &layer,
                &|layer, x| Ok(layer.forward_with(x, &options)?.output),
                [2, 5, config.embed_dim],
                1e-11,
                name,
            )?;
        }
        check(&layer, &|layer, x| Ok(layer.forward_with_weights(x)?.1), [2, 5, config.embed_dim], 1e-11, name)?;
    }
    Ok(())
}

#[test]
fn cross_attention_with_an_adapter_is_the_same_with_the_summed_weights() -> Result<()> {
    for (name, config, _) in grids::cross_attention() {
        let layer = layers::cross_attention(&config, DType::F64)?;
        let memory = randn(2, (2, 7, config.kv_dim()), DType::F64)?;
        check(&layer, &|layer, x| layer.forward(x, &memory), [2, 5, config.embed_dim], 1e-11, name)?;
        let projected =
            |layer: &candle_attention::CrossAttention, x: &Tensor| layer.forward_projected(x, &layer.project(&memory)?);
        check(&layer, &projected, [2, 5, config.embed_dim], 1e-11, name)?;
    }
    Ok(())
}

#[test]
fn block_with_an_adapter_is_the_block_with_the_summed_weights() -> Result<()> {
    for (name, config) in blocks_common::grid() {
        let block = blocks_common::block(&config, DType::F64)?;
        check(&block, &|block, x| block.forward(x), [2, 4, 6], 1e-10, &name)?;
        let again = block.with_recompute(true);
        check(&again, &|block, x| block.forward(x), [2, 4, 6], 1e-10, &name)?;
    }
    Ok(())
}

#[test]
fn decoding_with_an_adapter_equals_the_whole_sequence() -> Result<()> {
    let block = adapted(&blocks_common::block(&blocks_common::llama(), DType::F64)?, "default", &config(), 3)?;
    let x = randn(1, (2, 6, 6), DType::F64)?;
    let mut cache = block.kv_cache(2)?;
    let parts = [0, 1, 2, 3, 4, 5].map(|i| block.forward_cached(&x.narrow(1, i, 1)?, &mut cache));
    let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
    assert_close(&Tensor::cat(&parts, 1)?, &block.forward(&x)?, 1e-12, "decoding");
    Ok(())
}

#[test]
fn mlp_and_any_linear_layer_can_have_adapters() -> Result<()> {
    for mlp in [MlpConfig::new(6, 5), MlpConfig::swiglu(6, 5)] {
        let mlp = Mlp::new(&mlp, VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu))?;
        check(&mlp, &|mlp, x| mlp.forward(x), [2, 3, 6], 1e-11, "mlp")?;
    }
    let (weight, bias) = (randn(1, (4, 6), DType::F64)?, randn(2, 4, DType::F64)?);
    let linear = LoraLinear::new(Linear::new(weight, Some(bias)));
    check(&linear, &|linear, x| linear.forward(x), [2, 3, 6], 1e-11, "linear")
}

#[test]
fn new_adapter_changes_no_bit() -> Result<()> {
    for (name, config) in blocks_common::grid() {
        let block = blocks_common::block(&config, DType::F32)?;
        let x = randn(1, (2, 4, 6), DType::F32)?;
        let adapter = candle_attention::adapter::LoraConfig { targets: crate::all_of(&block)?, ..crate::config() };
        let with_new = block.with_lora("default", &adapter, vb(&block))?;
        assert_same_bits(&with_new.forward(&x)?, &block.forward(&x)?, &name);
    }
    Ok(())
}

/// The errors are those of the whole block in a half type, against the same numbers in f64.
#[test]
fn half_types_err_no_more_with_an_adapter_than_with_the_summed_weights() -> Result<()> {
    for (dtype, config) in [(DType::BF16, blocks_common::bert()), (DType::F16, blocks_common::llama())] {
        let block = adapted(&blocks_common::block(&config, dtype)?, "default", &crate::config(), 3)?;
        let (x, tensors) = (randn(1, (8, 16, 6), dtype)?, |block: &TransformerBlock| block.to_layout(Layout::Own));
        let wide = |tensors: Vec<(String, Tensor)>| {
            VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F64, &Device::Cpu)
        };
        let base = block.unmerge()?.without_adapter("default")?;
        let base = TransformerBlock::from_layout(Layout::Own, &config, wide(tensors(&base)?))?;
        let matrices = block.adapter_parameters("default")?;
        let exact = base.with_lora("default", &block.adapter_config("default")?, wide(matrices))?;
        let expected = exact.forward(&x.to_dtype(DType::F64)?)?;
        let error = |block: &TransformerBlock| -> Result<f64> {
            Ok((block.forward(&x)?.to_dtype(DType::F64)? - &expected)?.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt())
        };
        let (beside, merged) = (error(&block)?, error(&block.merge("default")?)?);
        assert!(beside < 1.2 * merged, "{dtype:?}: {beside} beside the weights, {merged} merged");
    }
    Ok(())
}

#[test]
fn merged_equals_unmerged_and_back() -> Result<()> {
    let block = blocks_common::block(&blocks_common::bert(), DType::F32)?;
    let adapted = adapted(&block, "default", &config(), 3)?;
    let merged = adapted.merge("default")?;
    let x = randn(1, (2, 4, 6), DType::F32)?;
    assert_close(&merged.forward(&x)?, &adapted.forward(&x)?, 1e-6, "merged");
    let again = merged.unmerge()?;
    assert_close(&again.forward(&x)?, &adapted.forward(&x)?, 1e-6, "unmerged");
    for ((name, before), (_, after)) in block.parameters().into_iter().zip(again.parameters()) {
        assert_close(after, before, 1e-6, &name);
    }
    // A merged block is a plain one for files.
    let loaded = TransformerBlock::from_bytes(&merged.to_bytes()?, &Device::Cpu)?;
    assert_same_bits(&loaded.forward(&x)?, &merged.forward(&x)?, "saved");
    Ok(())
}
