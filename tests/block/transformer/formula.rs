//! A block is its formula, composed of the public parts: attention, MLP, norms and dropout.

use attention_kernels::residual::add_dropped;
use attention_kernels::{Dropout, philox};
use candle_attention::block::{Norm, NormPlacement, TransformerBlock};
use candle_attention::{Backend, ForwardOptions};
use candle_core::{DType, Device, Result, Tensor};

use crate::blocks_common::{block, grid, parameter};
use crate::common::{assert_close, assert_same_bits, numbers, randn};

/// One training pass or inference by the formula. `call` counts the training passes before.
struct Formula<'a> {
    block: &'a TransformerBlock,
    options: ForwardOptions,
    call: u64,
}

impl Formula<'_> {
    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let parameter = |part: &str| parameter(self.block, &format!("{name}.{part}"));
        let weight = parameter("weight").expect("a weight");
        Ok(Norm::from_parameters(&self.block.config().norm, weight, parameter("bias"))?.forward(x)?)
    }

    /// x + dropout(y), by the part's dropout.
    fn add(&self, part: u64, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let (config, seed) = (self.block.config(), self.block.config().attention.seed);
        if !self.options.train || config.dropout_p == 0.0 {
            return x + y;
        }
        let seed = philox::nth_seed(philox::nth_seed(philox::named_seed(seed, ".dropout"), self.call), part);
        let first = (self.options.first_sequence * x.dim(1)? * x.dim(2)?) as u64;
        let dropout = Some(Dropout { p: config.dropout_p, seed, first });
        let sum = add_dropped(Some(&numbers(x)?), &numbers(y)?, dropout).expect("a sum");
        Tensor::from_vec(sum, x.shape(), &Device::Cpu)
    }

    fn part(&self, part: u64, x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let name = ["attention", "mlp"][part as usize];
        let norm = |x: &Tensor| self.norm(&format!("{name}_norm"), x);
        match self.block.config().placement {
            NormPlacement::Pre => self.add(part, x, &f(&norm(x)?)?),
            NormPlacement::Post => norm(&self.add(part, x, &f(x)?)?),
            NormPlacement::Sandwich => self.add(part, x, &self.norm(&format!("{name}_post_norm"), &f(&norm(x)?)?)?),
        }
    }

    fn compute(&self, x: &Tensor) -> Result<Tensor> {
        self.block.set_dropout_calls([self.call; 2]);
        let x = self.part(0, x, |x| Ok(self.block.attention().forward_with(x, &self.options)?.output))?;
        self.part(1, &x, |x| Ok(self.block.mlp().forward(x)?))
    }
}

#[test]
fn block_is_its_formula() -> Result<()> {
    let x = randn(1, (2, 4, 6), DType::F64)?;
    for (what, config) in grid() {
        let block = block(&config, DType::F64)?;
        for backend in [Backend::Auto, Backend::Reference] {
            for train in [false, true] {
                for call in 0..2 {
                    let options = ForwardOptions { train, backend, ..Default::default() };
                    let expected = Formula { block: &block, options: options.clone(), call }.compute(&x)?;
                    block.set_dropout_calls([call; 2]);
                    let found = block.forward_with(&x, &options)?.output;
                    assert_close(&found, &expected, 1e-12, &format!("{what}, {backend:?}, train {train}"));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn weights_that_are_asked_for_change_no_output() -> Result<()> {
    let x = randn(1, (2, 4, 6), DType::F64)?;
    for (what, config) in grid() {
        let block = block(&config, DType::F64)?;
        let options = ForwardOptions { return_weights: true, ..Default::default() };
        let with_weights = block.forward_with(&x, &options)?;
        assert_close(&with_weights.output, &block.forward(&x)?, 1e-12, &what);
        assert_eq!(with_weights.weights.expect("weights").dims(), [2, 2, 4, 4]);
    }
    Ok(())
}

#[test]
fn input_without_a_batch_axis_is_a_batch_of_one() -> Result<()> {
    for (what, config) in grid() {
        let block = block(&config, DType::F64)?;
        let x = randn(1, (4, 6), DType::F64)?;
        for options in [ForwardOptions::default(), super::training()] {
            let run = |x: &Tensor| -> Result<Tensor> {
                block.set_dropout_calls([0, 0]);
                Ok(block.forward_with(x, &options)?.output)
            };
            assert_same_bits(&run(&x)?, &run(&x.unsqueeze(0)?)?.squeeze(0)?, &what);
        }
    }
    Ok(())
}

#[test]
fn input_of_any_strides_gives_the_same_bits() -> Result<()> {
    for (what, config) in grid() {
        let block = block(&config, DType::F64)?;
        let x = randn(1, (4, 2, 6), DType::F64)?.transpose(0, 1)?;
        assert_same_bits(&block.forward(&x)?, &block.forward(&x.contiguous()?)?, &what);
    }
    Ok(())
}

#[test]
fn empty_input_gives_empty_output() -> Result<()> {
    for (what, config) in grid() {
        let block = block(&config, DType::F64)?;
        for dims in [vec![0, 4, 6], vec![2, 0, 6], vec![0, 6]] {
            let x = Tensor::zeros(dims.as_slice(), DType::F64, &Device::Cpu)?;
            assert_eq!(block.forward_t(&x, true)?.dims(), dims, "{what}");
        }
    }
    Ok(())
}
