//! Keys and values that a layer appends to the given ones, as PyTorch's `nn.MultiheadAttention` does with `add_bias_kv`
//! and `add_zero_attn`. Every query may attend to them.

use attention_kernels::mask::ScoreShape;
use candle_core::{D, Result, Tensor};

use crate::check::compute_dtype;
use crate::empty::readable;
use crate::memory;
use crate::sdpa::AttentionOptions;
use crate::sdpa::broadcast::{broadcast, common_batch};
use crate::sdpa::checks::check_bias;

/// The keys and values to append: first the learned ones, then those of zeros.
#[derive(Clone, Debug)]
pub(crate) struct BiasKv {
    /// `bias_k` (num_kv_heads · head_dim) and `bias_v` (num_kv_heads · value_dim).
    pub(crate) learned: Option<(Tensor, Tensor)>,
    pub(crate) zeros: bool,
}

impl BiasKv {
    /// Appends the extra keys and values to those given, (batch, kv_len, num_kv_heads, dim), and extends mask and bias.
    /// `query` is (batch, q_len, num_heads, head_dim).
    pub(crate) fn append(
        &self,
        query: &Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
    ) -> Result<(Tensor, Tensor, AttentionOptions)> {
        let count = usize::from(self.learned.is_some()) + usize::from(self.zeros);
        if count == 0 {
            return Ok((key, value, options));
        }
        let kv_len = key.dim(1)?;
        let (bias_k, bias_v) = self.learned.as_ref().map(|(bias_k, bias_v)| (bias_k, bias_v)).unzip();
        let (key, value) = (self.extend(&key, bias_k)?, self.extend(&value, bias_v)?);
        let attn_bias = match &options.attn_bias {
            Some(bias) => {
                let (batch, q_len, num_heads, _) = query.dims4()?;
                let batch = common_batch([batch, key.dim(0)?]);
                check_bias(bias, query, &ScoreShape { batch, num_heads, q_len, kv_len })?;
                Some(pad_bias(bias, kv_len, count)?)
            }
            None => None,
        };
        let attn_mask = options.attn_mask.with_extra_keys(count);
        Ok((key, value, AttentionOptions { attn_mask, attn_bias, ..options }))
    }

    fn extend(&self, x: &Tensor, learned: Option<&Tensor>) -> Result<Tensor> {
        let (batch, _, heads, dim) = x.dims4()?;
        memory::ask_for("keys or values and the appended ones", 1, x, x.dtype())?;
        let mut parts = vec![memory::contiguous("keys or values", x)?];
        if let Some(learned) = learned {
            let one = learned.reshape((1, 1, heads, dim))?;
            parts.push(broadcast(&one, &[batch, 1, heads, dim])?.contiguous()?);
        }
        if self.zeros {
            parts.push(Tensor::zeros((batch, 1, heads, dim), x.dtype(), x.device())?);
        }
        Tensor::cat(&parts, 1)
    }
}

/// Extends a bias, whose last axis has been checked, with zeros for the extra keys.
fn pad_bias(bias: &Tensor, kv_len: usize, count: usize) -> Result<Tensor> {
    let mut dims = bias.dims().to_vec();
    match dims.last_mut() {
        Some(last) => *last = kv_len,
        None => dims.push(kv_len),
    }
    // A contiguous copy, and that with zeros.
    let bytes = memory::bytes(&dims, compute_dtype(bias.dtype())).saturating_mul(3);
    memory::ask("attn_bias of the appended keys", bias.device(), bytes)?;
    broadcast(&readable(bias)?, &dims)?.pad_with_zeros(D::Minus1, 0, count)
}
