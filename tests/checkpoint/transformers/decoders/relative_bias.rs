//! [`RelativeBias`]: what T5 adds to its scores.

use candle_core::{Result, Tensor};

use super::ModelFile;

/// A learned bias for each head and each distance between query and key. Large distances share a bias.
///
/// Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020),
/// section 2.1; the buckets are those of the authors' code.
pub struct RelativeBias {
    /// (buckets, num_heads)
    table: Tensor,
    max_distance: f64,
    is_causal: bool,
}

impl RelativeBias {
    /// The bias of the encoder or of the decoder. The first layer stores it for all layers.
    pub fn new(file: &ModelFile, stack: &str) -> Self {
        let name = format!("{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
        Self {
            table: file.expect(&name).clone(),
            max_distance: file.number("relative_attention_max_distance"),
            is_causal: stack == "decoder",
        }
    }

    /// The bias (1, num_heads, q_len, kv_len), with the last query aligned with the last key.
    pub fn scores(&self, q_len: usize, kv_len: usize) -> Result<Tensor> {
        let queries = kv_len - q_len..kv_len;
        let pairs = queries.flat_map(|query| (0..kv_len).map(move |key| (query as i64, key as i64)));
        let buckets: Vec<u32> = pairs.map(|(query, key)| self.bucket(key - query)).collect();
        let buckets = Tensor::from_vec(buckets, q_len * kv_len, self.table.device())?;
        let scores = self.table.index_select(&buckets, 0)?.reshape((q_len, kv_len, ()))?;
        scores.permute((2, 0, 1))?.unsqueeze(0)?.contiguous()
    }

    /// The bucket of a distance. Half of the buckets are for one distance each, the other half for ranges that grow
    /// with the distance. If a query may attend to later keys, these have separate buckets after those for earlier
    /// keys.
    fn bucket(&self, ahead: i64) -> u32 {
        let all = self.table.dims()[0] as u32;
        let (count, first) = match self.is_causal {
            true => (all, 0),
            false => (all / 2, if ahead > 0 { all / 2 } else { 0 }),
        };
        let distance = if self.is_causal { (-ahead).max(0) } else { ahead.abs() } as u32;
        let exact = count / 2;
        if distance < exact {
            return first + distance;
        }
        let part = (f64::from(distance) / f64::from(exact)).ln() / (self.max_distance / f64::from(exact)).ln();
        let far = exact + (part * f64::from(count - exact)) as u32;
        first + far.min(count - 1)
    }
}
