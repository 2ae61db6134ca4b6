//! Dropout of a block: only in training, other entries in each call, and the same ones again from the same count.

use candle_attention::ForwardOptions;
use candle_attention::block::{TransformerBlock, TransformerBlockConfig};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{ModuleT, VarBuilder, VarMap};

use crate::blocks_common::{PLACEMENTS, bert, block, grid};
use crate::common::{assert_close, assert_same_bits, max_abs_difference, numbers, randn};

fn configs() -> impl Iterator<Item = TransformerBlockConfig> {
    PLACEMENTS.into_iter().map(|placement| TransformerBlockConfig { placement, dropout_p: 0.3, ..bert() })
}

#[test]
fn dropout_is_there_in_training_alone() -> Result<()> {
    let x = randn(1, (2, 4, 6), DType::F32)?;
    for (what, config) in grid() {
        let mut plain = TransformerBlockConfig { dropout_p: 0.0, ..config.clone() };
        plain.attention.dropout_p = 0.0;
        let (dropping, plain) = (block(&config, DType::F32)?, block(&plain, DType::F32)?);
        assert_same_bits(&dropping.forward(&x)?, &plain.forward(&x)?, &what);
        assert_same_bits(&ModuleT::forward_t(&dropping, &x, false)?, &plain.forward(&x)?, &what);
        assert_eq!(dropping.dropout_calls(), [0, 0]);
        let differs = max_abs_difference(&ModuleT::forward_t(&dropping, &x, true)?, &plain.forward(&x)?)? > 1e-3;
        assert_eq!(differs, config.dropout_p > 0.0, "{what}");
        assert_eq!(dropping.dropout_calls(), if config.dropout_p > 0.0 { [1, 1] } else { [0, 0] });
    }
    Ok(())
}

#[test]
fn dropout_goes_on_where_a_run_stopped() -> Result<()> {
    let x = randn(1, (2, 4, 6), DType::F32)?;
    for config in configs() {
        let first = block(&config, DType::F32)?;
        let passes = (0..4).map(|_| first.forward_t(&x, true)).collect::<candle_attention::Result<Vec<_>>>()?;
        for (i, a) in passes.iter().enumerate() {
            for b in &passes[..i] {
                assert!(max_abs_difference(a, b)? > 1e-3, "{:?}", config.placement);
            }
        }
        let again = block(&config, DType::F32)?;
        again.set_dropout_calls([2, 0]);
        assert_same_bits(&again.forward_t(&x, true)?, &passes[2], "third pass");
        // A clone shares the count.
        assert_same_bits(&again.clone().forward_t(&x, true)?, &passes[3], "fourth pass");
        assert_eq!(again.dropout_calls(), [4, 0]);
    }
    Ok(())
}

/// In one operation, and in several (with weights).
#[test]
fn batch_in_parts_drops_the_entries_of_the_whole() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
        // 5 x 6 numbers of a sequence are no whole group of random numbers.
        let x = randn(1, (7, 5, 6), dtype)?;
        for (config, return_weights) in configs().flat_map(|config| [(config.clone(), false), (config, true)]) {
            let mut config = config;
            config.attention.dropout_p = 0.2;
            let block = block(&config, dtype)?.with_recompute(true);
            let part = |first_sequence: usize, count: usize| {
                block.set_dropout_calls([3, 5]);
                let options = ForwardOptions { train: true, first_sequence, return_weights, ..Default::default() };
                Ok::<_, candle_core::Error>(block.forward_with(&x.narrow(0, first_sequence, count)?, &options)?.output)
            };
            let apart = Tensor::cat(&[part(0, 3)?, part(3, 1)?, part(4, 3)?], 0)?;
            assert_close(&apart, &part(0, 7)?, tolerance, &format!("{dtype:?}, {:?}", config.placement));
            assert!(max_abs_difference(&part(0, 1)?, &block.forward(&x.narrow(0, 0, 1)?)?)? > 1e-3);
        }
    }
    Ok(())
}

/// Where the block adds nothing but the attention's output to x, an entry is dropped or scaled by 1 / (1 - p).
#[test]
fn dropped_entries_are_zero_and_the_others_are_scaled() -> Result<()> {
    let config =
        TransformerBlockConfig { placement: candle_attention::block::NormPlacement::Pre, dropout_p: 0.3, ..bert() };
    let block = block(&config, DType::F64)?;
    for name in ["mlp.down.weight", "mlp.down.bias"] {
        let var = crate::blocks_common::variable(&block, name);
        var.set(&var.zeros_like()?)?;
    }
    let x = randn(1, (8, 40, 6), DType::F64)?;
    let (whole, dropped) = ((block.forward(&x)? - &x)?, (block.forward_t(&x, true)? - &x)?);
    let mut zeros = 0;
    for (whole, dropped) in numbers(&whole)?.into_iter().zip(numbers(&dropped)?) {
        if dropped == 0.0 {
            zeros += 1;
        } else {
            assert!((dropped - whole / 0.7).abs() < 1e-12, "{dropped}, not {whole} / 0.7");
        }
    }
    // 1920 entries: six standard deviations are 0.063.
    assert!((f64::from(zeros) / 1920.0 - 0.3).abs() < 0.063, "{zeros} of 1920 dropped");
    Ok(())
}

#[test]
fn blocks_of_a_model_drop_other_entries() -> Result<()> {
    let config = TransformerBlockConfig { dropout_p: 0.5, ..bert() };
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let blocks = ["h.0", "h.1"].map(|name| TransformerBlock::new(&config, vb.pp(name)));
    let x = randn(1, (2, 4, 6), DType::F32)?;
    let mut outputs = Vec::new();
    for block in blocks {
        let block = block?;
        crate::blocks_common::randomise(&block, 1)?;
        outputs.push(block.forward_t(&x, true)?);
    }
    let difference: f64 = max_abs_difference(&outputs[0], &outputs[1])?;
    assert!(difference > 1e-3);
    Ok(())
}
