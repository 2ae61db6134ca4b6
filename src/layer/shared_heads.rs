//! [`SharedHeads`]: which heads of a layer a rank has, and which part of each parameter.

use std::ops::Range;

use candle_core::{Result as CandleResult, Tensor};

use crate::error::AttentionError;
use crate::layer::config::SelfAttentionConfig;
use crate::parallel::tensor::{Slice, TensorParallel};

/// What a layer knows of the others, if it has some of the heads.
#[derive(Clone, Debug)]
pub(super) struct SharedHeads {
    pub(super) ranks: TensorParallel,
    /// The config of the whole.
    pub(super) whole: SelfAttentionConfig,
}

impl SharedHeads {
    /// Refuses heads that the ranks can't divide. Ranks may share key heads, but then each rank has exactly one.
    pub(super) fn check(&self) -> Result<(), AttentionError> {
        let (num_heads, kv_heads, ranks) = (self.whole.num_heads, self.whole.num_kv_heads(), self.ranks.ranks());
        self.ranks.check_divides("num_heads", num_heads)?;
        if !kv_heads.is_multiple_of(ranks) && !ranks.is_multiple_of(kv_heads) {
            let expected = format!("a multiple or a divisor of the {ranks} ranks that share the layer");
            return Err(AttentionError::Config { field: "num_kv_heads", expected, got: kv_heads.to_string() });
        }
        if !self.whole.out_proj {
            let expected = "true for a layer that ranks share, which sum what W_O makes of their heads".to_string();
            return Err(AttentionError::Config { field: "out_proj", expected, got: "false".into() });
        }
        Ok(())
    }

    /// The config of a layer with this rank's heads alone.
    pub(super) fn own(&self) -> SelfAttentionConfig {
        let (whole, ranks) = (&self.whole, self.ranks.ranks());
        SelfAttentionConfig {
            num_heads: whole.num_heads / ranks,
            num_kv_heads: Some((whole.num_kv_heads() / ranks).max(1)),
            head_dim: Some(whole.head_dim()),
            value_dim: Some(whole.value_dim()),
            ..whole.clone()
        }
    }

    /// This rank's query heads.
    pub(super) fn heads(&self) -> Range<usize> {
        let own = self.whole.num_heads / self.ranks.ranks();
        self.ranks.rank() * own..(self.ranks.rank() + 1) * own
    }

    /// This rank's part of what belongs to key heads. Several ranks have the same part, if there are fewer key heads than ranks.
    pub(super) fn of_kv_heads(&self) -> Slice {
        let parts = self.ranks.ranks().min(self.whole.num_kv_heads());
        Slice { axis: 0, part: self.ranks.rank() * parts / self.ranks.ranks(), parts }
    }

    /// This rank's part of a parameter, `None` for one that every rank has.
    pub(super) fn slice_of(&self, name: &str) -> Option<Slice> {
        match name {
            "q_proj.weight" | "q_proj.bias" | "sinks" => Some(self.ranks.slice(0)),
            "o_proj.weight" => Some(self.ranks.slice(1)),
            "o_proj.bias" | "q_norm.weight" | "k_norm.weight" => None,
            _ => Some(self.of_kv_heads()),
        }
    }

    /// A parameter of key heads, whose gradient is the sum of those of the ranks that use it.
    pub(super) fn kv_parameter(&self, x: &Tensor) -> CandleResult<Tensor> {
        let slice = self.of_kv_heads();
        if slice.parts == self.ranks.ranks() {
            return Ok(x.clone());
        }
        self.ranks.with_sum_of_gradients(x, Some(slice))
    }
}
