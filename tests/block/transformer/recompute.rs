//! A block that computes its forward pass again for the backward pass gives the same bits.

use candle_attention::ForwardOptions;
use candle_attention::block::{MlpConfig, TransformerBlockConfig};
use candle_core::{DType, Result};

use crate::blocks_common::{PLACEMENTS, block, grid};
use crate::common::{assert_same_bits, var};

use super::{rotated_llama, run, training};

#[test]
fn recomputing_changes_no_bit() -> Result<()> {
    for (what, config) in grid() {
        for options in [training(), ForwardOptions { return_weights: true, ..training() }] {
            let (block, x) = (block(&config, DType::F32)?, var(1, (2, 4, 6), DType::F32)?);
            let kept = run(&block, &x, &options)?;
            let again = run(&block.with_recompute(true), &x, &options)?;
            for (again, kept) in again.iter().zip(&kept) {
                assert_same_bits(again, kept, &what);
            }
        }
    }
    Ok(())
}

#[test]
fn recomputing_changes_no_bit_of_longer_sequences() -> Result<()> {
    let config = TransformerBlockConfig { dropout_p: 0.1, mlp: MlpConfig::swiglu(6, 70), ..rotated_llama() };
    for placement in PLACEMENTS {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let config = TransformerBlockConfig { placement, ..config.clone() };
            let (block, x) = (block(&config, dtype)?, var(1, (2, 67, 6), dtype)?);
            let kept = run(&block, &x, &training())?;
            let again = run(&block.with_recompute(true), &x, &training())?;
            for (again, kept) in again.iter().zip(&kept) {
                assert_same_bits(again, kept, &format!("{placement:?}, {dtype:?}"));
            }
        }
    }
    Ok(())
}
