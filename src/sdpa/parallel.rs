//! Attention over several ranks: what they have to agree on, and which calls they serve.

use std::fmt::Write;

use candle_core::Tensor;

use crate::error::{AttentionError, Result};
use crate::parallel::hash::hash;
use crate::sdpa::checks::Checked;
use crate::sdpa::head_layout::HeadLayout;
use crate::sdpa::options::{AttentionOptions, Backend};

/// `ours`, what this rank has made of its inputs, if all ranks have inputs and options that go together.
pub(super) fn agree_on<T>(
    inputs: [&Tensor; 3],
    layout: HeadLayout,
    options: &AttentionOptions,
    ours: Result<T>,
) -> Result<T> {
    match &options.parallel {
        Some(parallel) => parallel.agree_on("attention", text(inputs, layout, options), ours),
        None => ours,
    }
}

/// Inputs that several ranks can serve.
pub(super) fn served(checked: Checked) -> Result<Checked> {
    let Checked { q, k, options, .. } = &checked;
    let refuse = |got| Err(AttentionError::Backend { expected: "attention over several ranks without it", got }.into());
    if !q.device().is_cpu() {
        return refuse("tensors on another device than the CPU");
    }
    if checked.value_dim == 0 {
        return refuse("values without numbers");
    }
    if options.backend == Backend::Reference {
        return refuse("Backend::Reference");
    }
    if options.return_weights || options.return_scores.is_some() {
        return refuse("a request for weights or scores");
    }
    if [&options.attn_bias, &options.alibi_slopes].into_iter().flatten().any(Tensor::track_op) {
        return refuse("a bias or ALiBi slopes that want a gradient");
    }
    if let Some(parallel) = &options.parallel {
        parallel.check_heads(q.dim(1)?, k.dim(1)?)?;
    }
    Ok(checked)
}

/// All that has to be the same on every rank.
fn text(inputs: [&Tensor; 3], layout: HeadLayout, options: &AttentionOptions) -> String {
    let mut text = String::new();
    for (name, x) in ["query", "key", "value"].into_iter().zip(inputs) {
        let sizes = match *x.dims() {
            [a, b, c, d] => {
                let [batch, heads, _, dim] = layout.bhld([a, b, c, d]);
                format!("[{batch}, {heads}, len, {dim}]")
            }
            _ => format!("{:?}", x.dims()),
        };
        let trained = if x.track_op() { "with" } else { "without" };
        let _ = write!(text, "{name} {sizes} {:?} {trained} gradient, ", x.dtype());
    }
    text + &options_text(options)
}

/// The options, with hashes in place of large ones.
pub(crate) fn options_text(options: &AttentionOptions) -> String {
    let AttentionOptions {
        scale,
        softcap,
        attn_mask,
        attn_bias,
        alibi_slopes,
        sinks,
        dropout_p,
        dropout_seed,
        first_sequence,
        backend,
        return_weights,
        return_scores,
        return_logsumexp,
        parallel: _,
    } = options;
    let mut text = format!("scale {scale:?}, softcap {softcap:?}, mask {}", attn_mask.rule());
    for (name, x) in [("bias", attn_bias), ("slopes", alibi_slopes), ("sinks", sinks)] {
        if let Some(x) = x {
            let _ = write!(text, ", {name} {:?} {:?} {:016x}", x.dims(), x.dtype(), hash(x));
        }
    }
    let _ = write!(text, ", dropout {dropout_p} of seed {dropout_seed} from sequence {first_sequence}, {backend:?}");
    let _ = write!(text, ", returns {return_weights} {return_scores:?} {return_logsumexp}");
    text
}
