//! Half types: decoding equals the whole sequence, in the dtype of the layer.

use candle_attention::{Backend, ForwardOptions, Result};
use candle_core::DType;

use crate::common::{assert_close, randn};
use crate::layers::self_attention;

use super::setup::{EMBED_DIM, configs, decode, tolerance};

#[test]
fn cached_equals_whole_in_half_types() -> Result<()> {
    for (name, config) in configs() {
        for dtype in [DType::F16, DType::BF16] {
            let layer = self_attention(&config, dtype)?;
            let x = randn(2, (2, 140, EMBED_DIM), dtype)?;
            for backend in [Backend::Reference, Backend::Fused] {
                let options = ForwardOptions { backend, ..Default::default() };
                let whole = layer.forward_with(&x, &options)?.output;
                let output = decode(&layer, &x, &[60, 70], &mut layer.kv_cache(2)?, &options)?;
                assert_eq!(output.dtype(), dtype);
                assert_close(&output, &whole, tolerance(dtype), &format!("{name}, {dtype:?}, {backend:?}"));
            }
        }
    }
    Ok(())
}
