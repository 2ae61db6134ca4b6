//! The epsilon of a layer's norms of queries and keys.

use candle_attention::{Result, SelfAttentionConfig};
use candle_core::DType;

use crate::layers::{assert_error_says, self_attention};

/// A query of zeros would be divided by the root of an epsilon that is 0 in f32.
#[test]
fn layer_refuses_an_epsilon_of_qk_norm_that_its_dtype_cannot_hold() -> Result<()> {
    let config = SelfAttentionConfig { qk_norm_eps: Some(1e-50), ..SelfAttentionConfig::new(8, 2) };
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        assert_error_says(self_attention(&config, dtype), &["qk_norm_eps", "above 0, also in f32", "got 0.0000"]);
    }
    self_attention(&config, DType::F64)?;
    Ok(())
}
