//! [`Core`]: what self- and cross-attention share. Projections, heads, attention, and the projection of the output.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use attention_kernels::mask::ScoreShape;
use attention_kernels::philox;
use candle_core::{Result as CandleResult, Tensor};
use candle_nn::VarBuilder;

use crate::block::norm::rms_norm;
use crate::check::check_device;
use crate::checkpoint::{Header, LayerKind, Parameters};
use crate::error::{AttentionError, Result};
use crate::layer::bias_kv::BiasKv;
use crate::layer::config::SelfAttentionConfig;
use crate::layer::init;
use crate::layer::options::{ForwardOptions, ForwardOutput};
use crate::layer::shared_heads::SharedHeads;
use crate::memory;
use crate::projection::{Adapted, Call, Projection, Projections, project};
use crate::rotary::{Positions, RotaryEmbedding};
use crate::sdpa::broadcast::{InputAxes, align_bias, align_mask, common_batch};
use crate::sdpa::head_layout::HeadLayout;
use crate::sdpa::{AttentionOptions, AttentionOutput, Backend, attention};

/// The parameters of a layer, and the computation with them.
#[derive(Clone, Debug)]
pub(super) struct Core {
    pub(super) kind: LayerKind,
    pub(super) config: SelfAttentionConfig,
    pub(super) q_proj: Projection,
    pub(super) k_proj: Projection,
    pub(super) v_proj: Projection,
    pub(super) o_proj: Option<Projection>,
    /// The weights of the norms of queries and of keys.
    pub(super) qk_norm: Option<(Tensor, Tensor)>,
    pub(super) sinks: Option<Tensor>,
    pub(super) bias_kv: BiasKv,
    pub(super) alibi_slopes: Option<Tensor>,
    pub(super) rotary: Option<RotaryEmbedding>,
    pub(super) dropout_seed: u64,
    pub(super) dropout_calls: Arc<AtomicU64>,
    /// The others, if this rank has some of the heads. `config` is then that of a layer with these alone.
    pub(super) shared: Option<SharedHeads>,
}

impl Core {
    pub(super) fn new(kind: LayerKind, config: &SelfAttentionConfig, vb: &VarBuilder) -> Result<Self> {
        init::check(kind, config, vb.dtype())?;
        Self::from_parameters(kind, config, init::create(config, vb)?, &vb.prefix())
    }

    /// A layer with these parameters, which are exactly those of its config. `prefix` is its name in the model.
    pub(super) fn from_parameters(
        kind: LayerKind,
        config: &SelfAttentionConfig,
        parameters: Parameters,
        prefix: &str,
    ) -> Result<Self> {
        let find = |name: &str| parameters.iter().find(|(other, _)| *other == name).map(|(_, tensor)| tensor.clone());
        let required = |name| Projection::required(name, &parameters);
        let q_proj = required("q_proj")?;
        let (dtype, device) = (q_proj.weight().dtype(), q_proj.weight().device());
        let slopes = || init::alibi_slopes(config.num_heads, dtype, device);
        Ok(Self {
            kind,
            k_proj: required("k_proj")?,
            v_proj: required("v_proj")?,
            o_proj: Projection::find("o_proj", &parameters),
            qk_norm: find("q_norm.weight").zip(find("k_norm.weight")),
            sinks: find("sinks"),
            bias_kv: BiasKv { learned: find("bias_k").zip(find("bias_v")), zeros: config.add_zero_attn },
            alibi_slopes: config.alibi.then(slopes).transpose()?,
            rotary: config.rotary.as_ref().map(|rotary| RotaryEmbedding::new(rotary, config.head_dim())).transpose()?,
            dropout_seed: philox::named_seed(config.seed, &init::full_name(prefix, "dropout")),
            dropout_calls: Arc::default(),
            shared: None,
            config: config.clone(),
            q_proj,
        })
    }

    /// A copy of the layer in which every parameter is a new variable.
    pub(super) fn trainable(&self) -> Result<Self> {
        self.check_projections()?;
        let parameters = init::new_variables(self.parameters())?;
        Ok(self.with_parameters_of(Self::from_parameters(self.kind, &self.config, parameters, "")?))
    }

    /// A copy of the layer with the parameters of another one of the same config.
    pub(super) fn with_parameters_of(&self, other: Self) -> Self {
        let calls = Arc::new(AtomicU64::new(self.dropout_calls.load(Ordering::Relaxed)));
        let (rotary, alibi_slopes, shared) = (self.rotary.clone(), self.alibi_slopes.clone(), self.shared.clone());
        Self { rotary, alibi_slopes, shared, dropout_seed: self.dropout_seed, dropout_calls: calls, ..other }
    }

    /// This layer with another rotary embedding. The config describes it, unless it was made from tables.
    pub(super) fn with_rotary(self, rotary: RotaryEmbedding) -> Result<Self> {
        let head_dim = self.config.head_dim();
        if rotary.head_dim() != head_dim {
            let (expected, got) = (format!("one for head_dim {head_dim}"), format!("one for {}", rotary.head_dim()));
            return Err(AttentionError::Config { field: "rotary", expected, got }.into());
        }
        let described = |config| SelfAttentionConfig { rotary: rotary.config().cloned(), ..config };
        let config = described(self.config);
        let shared = self.shared.map(|shared| SharedHeads { whole: described(shared.whole), ..shared });
        Ok(Self { rotary: Some(rotary), config, shared, ..self })
    }

    /// The description of the layer in a file.
    pub(super) fn header(&self) -> Result<Header<&SelfAttentionConfig>, AttentionError> {
        self.check_described()?;
        Ok(Header { layer: self.kind, config: &self.config })
    }

    /// Refuses a layer whose rotary embedding has no config, since a file would give a layer without it.
    pub(super) fn check_described(&self) -> Result<(), AttentionError> {
        self.check_plain()?;
        if self.rotary.is_some() && self.config.rotary.is_none() {
            let expected = "one with a RotaryConfig, since a file holds no tables (save_layout saves the parameters)";
            return Err(AttentionError::Config { field: "rotary", expected: expected.into(), got: "tables".into() });
        }
        Ok(())
    }

    /// Refuses what a file of this crate doesn't hold: a part of a layer, weights in blocks, and adapters that aren't merged.
    pub(super) fn check_plain(&self) -> Result<(), AttentionError> {
        self.shared.as_ref().map_or(Ok(()), |shared| shared.ranks.refuse())?;
        self.check_projections()
    }

    fn check_projections(&self) -> Result<(), AttentionError> {
        self.projections().into_iter().try_for_each(|(name, projection)| projection.check_plain(&name))
    }

    /// Every parameter with its name, always in the same order, which is that of the config's.
    pub(super) fn parameters(&self) -> Vec<(&'static str, &Tensor)> {
        let o_proj = self.o_proj.as_ref();
        let (q_norm, k_norm) = self.qk_norm.as_ref().map(|(q, k)| (q, k)).unzip();
        let (bias_k, bias_v) = self.bias_kv.learned.as_ref().map(|(k, v)| (k, v)).unzip();
        let all = [
            ("q_proj.weight", self.q_proj.weight_parameter()),
            ("k_proj.weight", self.k_proj.weight_parameter()),
            ("v_proj.weight", self.v_proj.weight_parameter()),
            ("o_proj.weight", o_proj.and_then(Projection::weight_parameter)),
            ("q_proj.bias", self.q_proj.bias()),
            ("k_proj.bias", self.k_proj.bias()),
            ("v_proj.bias", self.v_proj.bias()),
            ("o_proj.bias", o_proj.and_then(Projection::bias)),
            ("q_norm.weight", q_norm),
            ("k_norm.weight", k_norm),
            ("sinks", self.sinks.as_ref()),
            ("bias_k", bias_k),
            ("bias_v", bias_v),
        ];
        all.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))).collect()
    }

    /// Cross-attention: queries from `x` (batch, q_len, embed_dim), keys from `key` (batch, kv_len, kv_dim), values
    /// from `value` (batch, kv_len, value_input_dim). All three may lack the batch axis.
    pub(super) fn attend_to_memory(
        &self,
        x: &Tensor,
        [key, value]: [&Tensor; 2],
        options: &ForwardOptions,
    ) -> Result<ForwardOutput> {
        self.agree_on(&[x, key, value], options, &String::new, self.check_inputs(x, [key, value], options))?;
        if x.rank() == 3 {
            return self.attend(x, [key, value], options);
        }
        let is_one = key.id() == value.id();
        let key = key.unsqueeze(0)?;
        let value = if is_one { key.clone() } else { value.unsqueeze(0)? };
        self.attend(&x.unsqueeze(0)?, [&key, &value], options)?.map(|tensor| tensor.squeeze(0))
    }

    fn check_inputs(
        &self,
        x: &Tensor,
        [key, value]: [&Tensor; 2],
        options: &ForwardOptions,
    ) -> Result<(), AttentionError> {
        options.check_alone("cross-attention")?;
        self.check_input("input", x, self.config.embed_dim)?;
        self.check_memory([key, value])?;
        if x.rank() != key.rank() || (x.rank() == 3 && !batches_fit(x.dims()[0], key.dims()[0])) {
            let expected = format!("with the batch of the input, whose shape is {:?}, or with a batch of 1", x.dims());
            return Err(AttentionError::Shape { tensor: "memory", expected, shape: key.dims().to_vec() });
        }
        Ok(())
    }

    /// Attention over checked input with a batch axis.
    fn attend(&self, x: &Tensor, sources: [&Tensor; 2], options: &ForwardOptions) -> Result<ForwardOutput> {
        let (positions, call) = (options.positions(x, &[options.position_offset])?, self.call(options));
        let query = self.queries(&self.entering(x)?, &positions, &call)?;
        let [key, value] = self.entering_both(sources)?;
        let (key, value) = self.keys_and_values([&key, &value], &positions, &call)?;
        let options = self.attention_options(options, &score_shape(&query, &key)?, &call)?;
        self.attend_heads(&query, key, value, options, &call)
    }

    /// Queries (batch, len, num_heads, head_dim).
    pub(super) fn queries(&self, x: &Tensor, positions: &Positions, call: &Call) -> Result<Tensor> {
        let query = split_heads(self.q_proj.call(call, x.dim(1)?)?, x, self.config.num_heads, self.config.head_dim())?;
        let q_norm = self.qk_norm.as_ref().map(|(q_norm, _)| self.norm_weight(q_norm)).transpose()?;
        self.normalise_and_rotate(query, q_norm.as_ref(), positions)
    }

    /// Keys (batch, len, num_kv_heads, head_dim) and values (batch, len, num_kv_heads, value_dim).
    pub(super) fn keys_and_values(
        &self,
        [key, value]: [&Tensor; 2],
        positions: &Positions,
        call: &Call,
    ) -> Result<(Tensor, Tensor)> {
        let config = &self.config;
        let (kv_heads, [key_len, value_len]) = (config.num_kv_heads(), [key.dim(1)?, value.dim(1)?]);
        let key = split_heads(self.kv_call(&self.k_proj, call, key_len)?, key, kv_heads, config.head_dim())?;
        let value = split_heads(self.kv_call(&self.v_proj, call, value_len)?, value, kv_heads, config.value_dim())?;
        let k_norm = self.qk_norm.as_ref().map(|(_, k_norm)| self.norm_weight(k_norm)).transpose()?;
        Ok((self.normalise_and_rotate(key, k_norm.as_ref(), positions)?, value))
    }

    /// QK-norm with this weight, then rotary position embedding, each if the layer has it.
    fn normalise_and_rotate(&self, x: Tensor, weight: Option<&Tensor>, positions: &Positions) -> Result<Tensor> {
        let x = match (weight, self.config.qk_norm_eps) {
            (Some(weight), Some(eps)) => rms_norm(&x, weight, eps)?,
            _ => x,
        };
        match &self.rotary {
            Some(rotary) => Ok(rotary.apply_at(&x.transpose(1, 2)?, positions)?.transpose(1, 2)?),
            None => Ok(x),
        }
    }

    /// Computes the output from queries, keys and values (batch, len, heads, dim).
    pub(super) fn attend_heads(
        &self,
        query: &Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        call: &Call,
    ) -> Result<ForwardOutput> {
        let (key, value, options) = self.bias_kv_call()?.append(query, key, value, options)?;
        let heads = self.head_numbers();
        let attended = attention([query, &key, &value], HeadLayout::Blhd, InputAxes::Tokens, &options, heads);
        let attended = match &self.shared {
            // The fused path refuses scores that overflow, which each rank knows of its own heads.
            Some(shared) if options.backend == Backend::Fused => {
                shared.ranks.agree_on("attention that ranks share", String::new(), attended)?
            }
            _ => attended?,
        };
        let (batch, q_len, _, _) = attended.context.dims4()?;
        let output = [batch, q_len, self.config.output_dim()];
        let output = match &self.o_proj {
            Some(o_proj) => self.summed(project(self.out_call(o_proj, call, q_len)?, &attended.context, &output)?)?,
            None => attended.context.reshape(&output)?,
        };
        let AttentionOutput { weights, scores, logsumexp, .. } = attended;
        Ok(ForwardOutput { output, weights, scores, logsumexp })
    }

    /// What one call asks of the projections. Each call in training has a seed of its own.
    pub(super) fn call<'a>(&self, options: &'a ForwardOptions) -> Call<'a> {
        let drops = options.train && (self.config.dropout_p > 0.0 || self.q_proj.drops());
        let nth = || philox::nth_seed(self.dropout_seed, self.dropout_calls.fetch_add(1, Ordering::Relaxed));
        Call { adapter: &options.adapter, seed: drops.then(nth), first_sequence: options.first_sequence }
    }

    /// The options of one call, for scores of this shape without the extra keys. Mask and bias are aligned with them.
    pub(super) fn attention_options(
        &self,
        options: &ForwardOptions,
        scores: &ScoreShape,
        call: &Call,
    ) -> CandleResult<AttentionOptions> {
        let whole = self.whole_scores(scores);
        let mut attn_mask = align_mask(&options.attn_mask, &whole, InputAxes::Tokens)?;
        let align = |bias| align_bias(bias, &whole, InputAxes::Tokens);
        let mut attn_bias = options.attn_bias.as_ref().map(align).transpose()?;
        if let Some(heads) = self.own_heads() {
            attn_mask = attn_mask.of_heads(&whole, &heads)?;
            attn_bias = attn_bias.map(|bias| self.bias_of_heads(&bias, &heads)).transpose()?;
        }
        let dropout_p = if options.train { self.config.dropout_p } else { 0.0 };
        let dropout_seed = call.seed.unwrap_or(0);
        Ok(AttentionOptions {
            scale: self.config.scale,
            softcap: self.config.softcap,
            attn_mask: self.config.mask() & attn_mask,
            attn_bias,
            alibi_slopes: self.alibi_slopes.clone(),
            sinks: self.sinks.clone(),
            dropout_p,
            dropout_seed,
            first_sequence: options.first_sequence,
            backend: options.backend,
            return_weights: options.return_weights,
            return_scores: options.return_scores,
            return_logsumexp: options.return_logsumexp,
            parallel: options.parallel.clone(),
        })
    }

    /// Checks the memories of the keys and of the values. If both are the same tensor with the same expected size, it
    /// is checked once.
    pub(super) fn check_memory(&self, [key, value]: [&Tensor; 2]) -> Result<(), AttentionError> {
        self.check_input("memory", key, self.config.kv_dim())?;
        if key.id() == value.id() && self.config.kv_dim() == self.config.value_input_dim() {
            return Ok(());
        }
        self.check_input("memory of the values", value, self.config.value_input_dim())?;
        if value.dims()[..value.rank() - 1] != key.dims()[..key.rank() - 1] {
            let (tensor, shape) = ("memory of the values", value.dims().to_vec());
            let expected = format!("with the batch and len of the memory of the keys, whose shape is {:?}", key.dims());
            return Err(AttentionError::Shape { tensor, expected, shape });
        }
        Ok(())
    }

    pub(super) fn check_input(&self, tensor: &'static str, x: &Tensor, dim: usize) -> Result<(), AttentionError> {
        let shape = x.dims().to_vec();
        if !matches!(x.rank(), 2 | 3) {
            let expected = "2 axes (len, dim) or 3 (batch, len, dim)";
            return Err(AttentionError::Rank { tensor, expected, shape });
        }
        if shape.last() != Some(&dim) {
            let expected = format!("(len, {dim}) or (batch, len, {dim})");
            return Err(AttentionError::Shape { tensor, expected, shape });
        }
        memory::check_countable(tensor, x)?;
        self.check_dtype_and_device(tensor, x)
    }

    pub(super) fn check_dtype_and_device(&self, tensor: &'static str, x: &Tensor) -> Result<(), AttentionError> {
        let weight = self.q_proj.weight();
        if x.dtype() != weight.dtype() {
            let expected = format!("{:?}, that of the layer's parameters", weight.dtype());
            return Err(AttentionError::DType { tensor, expected, got: x.dtype() });
        }
        check_device(tensor, x, weight)
    }
}

/// The scores of queries and keys (batch, len, heads, dim), of which a batch of 1 broadcasts.
pub(super) fn score_shape(query: &Tensor, key: &Tensor) -> CandleResult<ScoreShape> {
    let (batch, q_len, num_heads, _) = query.dims4()?;
    Ok(ScoreShape { batch: common_batch([batch, key.dim(0)?]), num_heads, q_len, kv_len: key.dim(1)? })
}

/// Whether an input and a memory of these batches can meet: a batch of 1 broadcasts.
pub(super) fn batches_fit(input: usize, memory: usize) -> bool {
    input == memory || input == 1 || memory == 1
}

/// Projects all tokens and splits the result into heads, (batch, len, heads, dim).
fn split_heads(projection: Adapted, x: &Tensor, heads: usize, dim: usize) -> CandleResult<Tensor> {
    let (batch, len, _) = x.dims3()?;
    project(projection, x, &[batch, len, heads, dim])
}
