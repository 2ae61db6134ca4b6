//! Inputs, masks and biases that broadcast: how they meet the scores (batch, num_heads, q_len, kv_len).

use attention_kernels::mask::ScoreShape;
use candle_core::Tensor;

use crate::check::compute_dtype;
use crate::error::{AttentionError, Result};
use crate::mask::Mask;
use crate::memory;

/// The axes of the caller's inputs. They decide what the first of three axes of a mask or bias means
/// ([`Mask::from_tensor`]), and errors name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InputAxes {
    /// (batch, num_heads, len, dim)
    Heads,
    /// (batch, len, dim), with one head.
    Batch,
    /// (len, dim), with one head.
    Single,
    /// (batch, len, embed_dim) or (len, embed_dim), the tokens of a layer, which makes heads of them.
    Tokens,
}

impl InputAxes {
    /// Those of four axes that the caller's tensors have.
    pub(crate) fn of<T>(self, four: [T; 4]) -> Vec<T> {
        let [batch, heads, len, dim] = four;
        match self {
            InputAxes::Heads | InputAxes::Tokens => vec![batch, heads, len, dim],
            InputAxes::Batch => vec![batch, len, dim],
            InputAxes::Single => vec![len, dim],
        }
    }

    /// Names and sizes of the axes that the caller's tensors have, as errors show them.
    pub(crate) fn named(self, names: [&str; 4], sizes: [usize; 4]) -> String {
        format!("({}) = {:?}", self.of(names).join(", "), self.of(sizes))
    }
}

/// The mask with four axes for each of its tensors.
pub(crate) fn align_mask(mask: &Mask, scores: &ScoreShape, inputs: InputAxes) -> Result<Mask, AttentionError> {
    mask.map_axes(scores, |dims, scores| four_axes(dims, scores, inputs))
}

/// The bias, with axes that broadcast to the scores, aligned at the right.
pub(crate) fn align_bias(bias: &Tensor, scores: &ScoreShape, inputs: InputAxes) -> Result<Tensor> {
    let own = bias.dims();
    let refuse = |expected| AttentionError::Shape { tensor: "attn_bias", expected, shape: own.to_vec() };
    let dims = four_axes(own, scores, inputs).map_err(refuse)?;
    if dims.ends_with(own) {
        return Ok(bias.clone());
    }
    if dims[0] == own[0] {
        return Ok(bias.unsqueeze(1)?);
    }
    if !bias.is_contiguous() {
        memory::ask_for("copy of attn_bias", 1, bias, bias.dtype())?;
    }
    Ok(bias.reshape(&dims)?)
}

/// The four axes of a mask or bias with the axes `dims`, or what its shape should be.
fn four_axes(dims: &[usize], scores: &ScoreShape, inputs: InputAxes) -> Result<[usize; 4], String> {
    let &ScoreShape { batch, num_heads, q_len, kv_len } = scores;
    let sizes = [batch, num_heads, q_len, kv_len];
    let expected = || {
        let axes = inputs.named(["batch", "num_heads", "q_len", "kv_len"], sizes);
        let three = match inputs {
            InputAxes::Tokens => ", or (n, q_len, kv_len) where n is batch, num_heads or batch · num_heads",
            _ => "",
        };
        format!("that broadcasts to {axes}{three}")
    };
    let mut four = [1; 4];
    match *dims {
        [n, rows, keys] => {
            let first = match inputs {
                InputAxes::Heads | InputAxes::Single => [1, n],
                InputAxes::Batch => [n, 1],
                InputAxes::Tokens if n == batch && n == num_heads && n > 1 => {
                    return Err(format!(
                        "of 4 axes, since batch and num_heads are both {n}: ({n}, 1, q_len, kv_len) for each sequence \
                         or (1, {n}, q_len, kv_len) for each head"
                    ));
                }
                InputAxes::Tokens if n == batch => [n, 1],
                InputAxes::Tokens if Some(n) == batch.checked_mul(num_heads) => [batch, num_heads],
                InputAxes::Tokens => [1, n],
            };
            four = [first[0], first[1], rows, keys];
        }
        _ if dims.len() <= 4 => four[4 - dims.len()..].copy_from_slice(dims),
        _ => return Err(expected()),
    }
    if four.iter().zip(sizes).all(|(&dim, size)| dim == size || dim == 1) { Ok(four) } else { Err(expected()) }
}

/// The number of sequences of inputs with these batch axes, of which those of 1 broadcast.
pub(crate) fn common_batch<const N: usize>(batches: [usize; N]) -> usize {
    batches.into_iter().find(|&batch| batch != 1).unwrap_or(1)
}

/// `x` for a batch of this size, if it has a batch of 1.
pub(crate) fn broadcast_batch(x: &Tensor, batch: usize) -> Result<Tensor> {
    if batch == 1 || x.dim(0)? != 1 {
        return Ok(x.clone());
    }
    let mut dims = x.dims().to_vec();
    dims[0] = batch;
    broadcast(x, &dims)
}

/// `x` broadcast to a shape. Its gradient is a sum, which candle computes in the dtype of the broadcast. In a half type
/// the sum would stall, so it is taken in f32.
pub(crate) fn broadcast(x: &Tensor, dims: &[usize]) -> Result<Tensor> {
    let (dtype, wide) = (x.dtype(), compute_dtype(x.dtype()));
    // candle can't cast an empty tensor on CUDA.
    if !x.track_op() || dtype == wide || dims.contains(&0) {
        return Ok(x.broadcast_as(dims)?);
    }
    // The widened copy, and that of the result.
    memory::ask("copies of a tensor that broadcasts", x.device(), memory::bytes(dims, wide).saturating_mul(2))?;
    Ok(x.to_dtype(wide)?.broadcast_as(dims)?.to_dtype(dtype)?)
}
