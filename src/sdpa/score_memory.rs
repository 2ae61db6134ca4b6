//! The memory of attention with every score in it, asked for before the reference allocates it.

use candle_core::Tensor;

use crate::check::compute_dtype;
use crate::error::AttentionError;
use crate::memory::{self, bytes};
use crate::sdpa::checks::Checked;
use crate::sdpa::options::AttentionOptions;

/// Asks for the memory of one call of the reference.
pub(crate) fn ask(checked: &Checked) -> Result<(), AttentionError> {
    let Checked { q, k, v, scores, options, value_dim, .. } = checked;
    // Without queries there are no scores, and no key is copied.
    if q.elem_count() == 0 {
        return Ok(());
    }
    let dtype = compute_dtype(q.dtype());
    let one = bytes(&[scores.batch, scores.num_heads, scores.q_len, scores.kv_len], dtype);
    let context = bytes(&[scores.batch, scores.num_heads, scores.q_len, *value_dim], dtype);
    let records = [q, k, v].iter().any(|x| x.track_op()) || options_record(options);
    let total = memory::sum([
        one.saturating_mul(score_tensors(options, records)),
        // Widened, made contiguous, and without their sign for the largest entry.
        bytes(q.dims(), dtype).saturating_mul(3),
        bytes(k.dims(), dtype).saturating_mul(3),
        bytes(v.dims(), dtype).saturating_mul(2),
        context.saturating_mul(3),
    ]);
    memory::ask("scores of all queries and keys", q.device(), total)
}

fn options_record(options: &AttentionOptions) -> bool {
    [&options.attn_bias, &options.alibi_slopes, &options.sinks].into_iter().flatten().any(Tensor::track_op)
}

/// How many tensors of all scores there are at the same time, at most. With a gradient candle keeps every step.
fn score_tensors(options: &AttentionOptions, records: bool) -> usize {
    let count = |is_there: bool, tensors: usize| if is_there { tensors } else { 0 };
    // The ALiBi distances have no axis for the heads, and count as much if there is one head.
    let slopes = count(options.alibi_slopes.is_some(), 4);
    if !records {
        // The scores, then the step's result and what it is computed from.
        return 4 + slopes / 4;
    }
    // Products, scaled; minus the largest, exponentials, weights, their cast.
    let softmax = 6;
    let softcap = count(options.softcap().is_some(), 3);
    let bias = count(options.attn_bias.is_some(), 2);
    let mask = count(!options.attn_mask.is_full(), 2);
    let dropout = count(options.dropout_p > 0.0, 4);
    softmax + softcap + bias + slopes + mask + dropout
}
