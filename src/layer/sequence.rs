//! Self-attention of a sequence, all of which this process holds, or of which several ranks hold a part each.

use attention_kernels::mask::ScoreShape;
use candle_core::Tensor;

use crate::block::branch::Branch;
use crate::check::compute_dtype;
use crate::error::{AttentionError, Error, Result};
use crate::layer::core::Core;
use crate::layer::fused::{FusedLayer, HeadSizes};
use crate::layer::options::{ForwardOptions, ForwardOutput};
use crate::parallel::context::ContextParallel;
use crate::projection::{Call, SideBySide};
use crate::rotary::Positions;
use crate::sdpa::parallel::options_text;
use crate::sdpa::{AttentionOptions, Backend};

/// The error of what several ranks don't serve.
fn without(got: &'static str) -> AttentionError {
    AttentionError::Backend { expected: "self-attention over several ranks without it", got }
}

/// A call of self-attention, checked.
struct Prepared<'o> {
    /// (batch, len, embed_dim)
    x: Tensor,
    positions: Positions,
    /// The scores of the whole sequence.
    shape: ScoreShape,
    attention: AttentionOptions,
    call: Call<'o>,
}

impl Core {
    /// Self-attention over `x` (batch, len, embed_dim) or (len, embed_dim), with what stands around it in a block.
    pub(super) fn attend_to_itself(
        &self,
        x: &Tensor,
        options: &ForwardOptions,
        branch: Branch,
    ) -> Result<ForwardOutput> {
        if self.shared.is_some() {
            self.agree_on(&[x], options, &String::new, self.check_input("input", x, self.config.embed_dim))?;
        }
        let prepared = self.prepared(x, options);
        let Prepared { x: with_batch, positions, shape, attention, call } = match &options.parallel {
            Some(parallel) => {
                let seed = prepared.as_ref().ok().and_then(|prepared| prepared.call.seed);
                parallel.agree_on("self-attention", self.text(x, options, seed), prepared)?
            }
            None => prepared?,
        };
        let output = match self.attend_at_once(&with_batch, &attention, &positions, &shape, branch, &call)? {
            Some(output) => ForwardOutput { output, weights: None, scores: None, logsumexp: None },
            None => self.attend_in_branch(&with_batch, attention, &positions, branch, &call)?,
        };
        if x.rank() == 3 { Ok(output) } else { output.map(|tensor| tensor.squeeze(0)) }
    }

    /// Everything that can be wrong with a call, before anything is computed.
    fn prepared<'o>(&self, x: &Tensor, options: &'o ForwardOptions) -> Result<Prepared<'o>> {
        self.check_input("input", x, self.config.embed_dim)?;
        let x = if x.rank() == 3 { x.clone() } else { x.unsqueeze(0)? };
        let positions = options.positions(&x, &[options.position_offset])?;
        let (batch, len, _) = x.dims3()?;
        let whole = options.parallel.as_ref().map_or(len, |parallel| parallel.split.len());
        let shape = ScoreShape { batch, num_heads: self.config.num_heads, q_len: whole, kv_len: whole };
        let call = self.call(options);
        let attention = self.attention_options(options, &shape, &call)?;
        if let Some(parallel) = &options.parallel {
            self.check_parallel(&x, &positions, &shape, &attention, parallel)?;
            // What depends on the call's adapter and fails, fails before the ranks agree.
            for projection in [&self.q_proj, &self.k_proj, &self.v_proj].into_iter().chain(&self.o_proj) {
                projection.call(&call, len)?;
            }
            if call.seed.is_some() && self.q_proj.drops() {
                return Err(without("dropout of an adapter").into());
            }
        }
        Ok(Prepared { x, positions, shape, attention, call })
    }

    /// Refuses what several ranks don't serve. The rest of it, [`attention`] refuses.
    fn check_parallel(
        &self,
        x: &Tensor,
        positions: &Positions,
        shape: &ScoreShape,
        options: &AttentionOptions,
        parallel: &ContextParallel,
    ) -> Result<()> {
        parallel.check_tokens("input", x.dim(1)?, || x.dims().to_vec())?;
        if self.config.extra_keys() > 0 {
            return Err(without("extra keys (bias_k, zeros)").into());
        }
        parallel.check_heads(self.config.num_heads, self.config.num_kv_heads())?;
        if let Some(rotary) = &self.rotary {
            rotary.check_positions(x, positions)?;
        }
        Ok(options.attn_mask.rule().check(shape)?)
    }

    /// The error of a call that something around the layer refuses. Every rank gets it.
    pub(super) fn refuse<T>(&self, x: &Tensor, options: &ForwardOptions, error: Error) -> Result<T> {
        match &options.parallel {
            Some(parallel) => parallel.agree_on("self-attention", self.text(x, options, None), Err(error)),
            None => Err(error),
        }
    }

    /// What has to be the same on every rank.
    fn text(&self, x: &Tensor, options: &ForwardOptions, seed: Option<u64>) -> String {
        let axes = match x.dims() {
            [batch, _, dim] => format!("[{batch}, len, {dim}]"),
            [_, dim] => format!("[len, {dim}]"),
            other => format!("{other:?}"),
        };
        format!("input {axes} {:?}, {}", x.dtype(), self.text_of_options(options, seed))
    }

    /// The config and the options of a call.
    pub(super) fn text_of_options(&self, options: &ForwardOptions, seed: Option<u64>) -> String {
        let ForwardOptions { attn_mask, attn_bias, position_offset, position_ids, backend, adapter, .. } = options;
        let ForwardOptions { first_sequence, return_weights, return_scores, return_logsumexp, .. } = *options;
        let own = AttentionOptions {
            attn_mask: attn_mask.clone(),
            attn_bias: attn_bias.clone(),
            dropout_seed: seed.unwrap_or(0),
            first_sequence,
            backend: *backend,
            return_weights,
            return_scores,
            return_logsumexp,
            ..AttentionOptions::default()
        };
        let given = if position_ids.is_some() { "with" } else { "without" };
        let tables = if self.rotary.is_some() && self.config.rotary.is_none() { ", rotary tables" } else { "" };
        format!(
            "config {:?}{tables}, adapter {adapter:?}, position {position_offset} {given} ids, {}",
            self.config,
            options_text(&own)
        )
    }

    fn attend_in_branch(
        &self,
        x: &Tensor,
        attention: AttentionOptions,
        positions: &Positions,
        branch: Branch,
        call: &Call,
    ) -> Result<ForwardOutput> {
        let normed = self.entering(&branch.norm.map_or(Ok(x.clone()), |norm| norm.forward(x))?)?;
        let query = self.queries(&normed, positions, call)?;
        let (key, value) = self.keys_and_values([&normed, &normed], positions, call)?;
        let attended = self.attend_heads(&query, key, value, attention, call)?;
        Ok(ForwardOutput { output: branch.finish(x, attended.output)?, ..attended })
    }

    /// The output by one operation, if it serves this layer and this call.
    fn attend_at_once(
        &self,
        x: &Tensor,
        options: &AttentionOptions,
        positions: &Positions,
        shape: &ScoreShape,
        branch: Branch,
        call: &Call,
    ) -> Result<Option<Tensor>> {
        let config = &self.config;
        // All ranks go the same way: that of the last one without tokens.
        let has_tokens = match &options.parallel {
            Some(parallel) => x.elem_count() > 0 && parallel.split.has_tokens_everywhere(),
            None => x.elem_count() > 0,
        };
        let is_served = x.device().is_cpu()
            && has_tokens
            && options.backend != Backend::Reference
            && !(options.return_weights || options.return_logsumexp || options.return_scores.is_some())
            && options.attn_bias.is_none()
            && options.alibi_slopes.is_none()
            && options.sinks.is_none()
            && config.qk_norm_eps.is_none()
            && config.extra_keys() == 0;
        if !is_served {
            return Ok(None);
        }
        let angles = match &self.rotary {
            None => None,
            Some(rotary) => match rotary.kernel_angles(x.dim(1)?, compute_dtype(x.dtype()), positions)? {
                Some(angles) => Some(angles),
                None => return Ok(None),
            },
        };
        options.attn_mask.rule().check(shape).map_err(AttentionError::from)?;
        let heads = HeadSizes {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads(),
            head_dim: config.head_dim(),
            value_dim: config.value_dim(),
        };
        // What stands around a layer that ranks share also stands around their sum.
        let (input, inner) = match &self.shared {
            None => (x.clone(), branch),
            Some(_) => {
                let normed = branch.norm.map_or(Ok(x.clone()), |norm| norm.forward(x))?;
                (self.entering(&normed)?, Branch { recompute: branch.recompute, ..Branch::default() })
            }
        };
        let len = x.dim(1)?;
        let (k_proj, v_proj) = (self.kv_call(&self.k_proj, call, len)?, self.kv_call(&self.v_proj, call, len)?);
        let layer = FusedLayer {
            heads,
            numbers: self.head_numbers(),
            qkv: SideBySide::new([self.q_proj.call(call, len)?, k_proj, v_proj])?,
            out: self.o_proj.as_ref().map(|out| SideBySide::new([self.out_call(out, call, len)?])).transpose()?,
            branch: inner.to_owned(),
            scale: options.scale.unwrap_or(1.0 / (heads.head_dim as f64).sqrt()),
            softcap: options.softcap(),
            mask: options.attn_mask.clone(),
            dropout: options.dropout(self.whole_config().num_heads),
            angles,
            parallel: options.parallel.clone(),
        };
        let output = layer.forward(&input)?;
        let Some(shared) = &self.shared else { return Ok(output) };
        // Scores of some heads may overflow, which one operation doesn't serve. All ranks go the same way, since the order of the operations
        // is that of the sums in the backward pass.
        let overflows = shared.ranks.any(output.is_none())?;
        match output.filter(|_| !overflows) {
            Some(output) => Ok(Some(branch.finish(x, self.summed(output)?)?)),
            None => Ok(None),
        }
    }
}
