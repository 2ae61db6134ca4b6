//! A parameter that is a constant gets no gradient, and the others get the same as before.

use std::collections::HashMap;

use candle_attention::block::TransformerBlock;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use crate::blocks_common::{block, grid};
use crate::common::{assert_same_bits, randn, var};

use super::{run, training};

/// The block with these parameters frozen.
fn frozen(block: &TransformerBlock, is_frozen: impl Fn(usize, &str) -> bool) -> Result<TransformerBlock> {
    let tensors = block.parameters().into_iter().enumerate();
    let tensors: HashMap<String, Tensor> = tensors
        .map(|(i, (name, tensor))| {
            let tensor = if is_frozen(i, &name) { tensor.detach() } else { tensor.clone() };
            (name, tensor)
        })
        .collect();
    Ok(TransformerBlock::new(block.config(), VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))?)
}

#[test]
fn frozen_parameters_get_no_gradient_and_the_others_the_same() -> Result<()> {
    for (what, config) in grid() {
        let (all, x) = (block(&config, DType::F32)?, var(1, (2, 4, 6), DType::F32)?);
        let expected = run(&all, &x, &training())?;
        for third in 0..3 {
            let block = frozen(&all, |i, _| i % 3 == third)?;
            assert!(block.vars().len() < all.vars().len());
            block.set_dropout_calls([0, 0]);
            let y = block.forward_t(&x, true)?;
            let grads = (y * randn(9, (2, 4, 6), DType::F64)?.to_dtype(DType::F32)?)?.backward()?;
            assert_same_bits(grads.get(&x).expect("a gradient of x"), &expected[1], &format!("{what}, x"));
            for (i, ((name, tensor), expected)) in block.parameters().into_iter().zip(&expected[2..]).enumerate() {
                match grads.get(tensor) {
                    Some(grad) if i % 3 != third => assert_same_bits(grad, expected, &format!("{what}, {name}")),
                    None if i % 3 == third => {}
                    other => panic!("{what}, {name}: gradient {}", if other.is_some() { "there" } else { "missing" }),
                }
            }
        }
    }
    Ok(())
}

#[test]
fn parameters_learn_from_a_constant_input() -> Result<()> {
    for (what, config) in grid() {
        let (block, x) = (block(&config, DType::F32)?, var(1, (2, 4, 6), DType::F32)?);
        let expected = run(&block, &x, &training())?;
        block.set_dropout_calls([0, 0]);
        let y = block.forward_t(&x.detach(), true)?;
        let grads = (y * randn(9, (2, 4, 6), DType::F64)?.to_dtype(DType::F32)?)?.backward()?;
        for ((name, tensor), expected) in block.parameters().into_iter().zip(&expected[2..]) {
            assert_same_bits(grads.get(tensor).expect("a gradient"), expected, &format!("{what}, {name}"));
        }
    }
    Ok(())
}

#[test]
fn block_of_constants_records_no_graph_for_a_constant_input() -> Result<()> {
    for (what, config) in grid() {
        let block = frozen(&block(&config, DType::F32)?, |_, _| true)?;
        let x = randn(1, (2, 4, 6), DType::F32)?;
        assert!(!block.forward_t(&x, true)?.track_op(), "{what}");
    }
    Ok(())
}
