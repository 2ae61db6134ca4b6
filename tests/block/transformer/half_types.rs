//! Blocks in half types: output and gradients are near those in f64 with the same parameters.

use candle_attention::block::TransformerBlockConfig;
use candle_core::{DType, Result, Var};

use crate::blocks_common::{bert, block, gemma2, gpt2};
use crate::common::{max_abs_difference, numbers, randn};

use super::{rotated_llama, run, training};

/// By how many times the rounding of one number the numbers of a block may differ, relative to the largest of their tensor. A block
/// rounds at each of its dozen steps, and the softmax and the norms make differences larger.
const ROUNDOFFS: f64 = 16.0;

#[test]
fn half_types_are_near_f64() -> Result<()> {
    let mut worst = 0f64;
    for (name, config) in [("BERT", bert()), ("GPT-2", gpt2()), ("Llama", rotated_llama()), ("Gemma 2", gemma2())] {
        for (dtype, roundoff) in [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)] {
            let mut config = TransformerBlockConfig { dropout_p: 0.2, ..config.clone() };
            // A norm makes the rounding errors of a row as much larger as the row, and this bounds by how much.
            config.norm.eps = 0.1;
            let (half, wide) = (block(&config, dtype)?, block(&config, DType::F64)?);
            for (half, wide) in half.vars().iter().zip(wide.vars()) {
                wide.set(&half.to_dtype(DType::F64)?)?;
            }
            let x = randn(1, (2, 9, 6), dtype)?;
            let found = run(&half, &Var::from_tensor(&x)?, &training())?;
            let expected = run(&wide, &Var::from_tensor(&x.to_dtype(DType::F64)?)?, &training())?;
            let names = half.parameters().into_iter().map(|(name, _)| name);
            let names = ["output".to_string(), "x".to_string()].into_iter().chain(names);
            for ((what, found), expected) in names.zip(&found).zip(&expected) {
                // In exact numbers this gradient is zero.
                if what == "attention.k_proj.bias" {
                    continue;
                }
                let largest = numbers(expected)?.into_iter().fold(0f64, |largest, x| largest.max(x.abs()));
                let difference = max_abs_difference(found, expected)? / largest / roundoff;
                assert!(difference < ROUNDOFFS, "{name}, {dtype:?}, {what}: off by {difference} roundoffs");
                worst = worst.max(difference);
            }
        }
    }
    println!("off by at most {worst} roundoffs");
    Ok(())
}
