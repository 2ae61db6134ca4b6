//! What self- and cross-attention share: projections, heads, attention, and the way back.

mod cached;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Linear, RmsNorm, VarBuilder};

use crate::attention::attention;
use crate::axes::Axes;
use crate::checkpoint::{self, Header, LayerKind, Layout};
use crate::config::SelfAttentionConfig;
use crate::empty::connected;
use crate::error::AttentionError;
use crate::extra_keys::ExtraKeys;
use crate::file;
use crate::mask::Mask;
use crate::options::{AttentionOptions, Backend};
use crate::parameters::{self, Parameters};
use crate::philox;
use crate::projection::project;
use crate::rotary::RotaryEmbedding;
pub use cached::ProjectedMemory;

/// What one call of a layer can be asked for, beyond what its config says.
#[derive(Clone, Debug, Default)]
pub struct ForwardOptions {
    /// Which keys each query may attend to, besides what the config's own mask takes away.
    pub attn_mask: Mask,
    /// Added to the scores: broadcasts to (batch, num_heads, q_len, kv_len), without extra keys. Gets a gradient.
    pub attn_bias: Option<Tensor>,
    /// Whether dropout is on.
    pub train: bool,
    /// Position of the first token, for the rotary embedding.
    pub position_offset: usize,
    /// Which code computes the attention.
    pub backend: Backend,
    /// Whether [`ForwardOutput::weights`] is wanted. Changes no other number.
    pub return_weights: bool,
    /// Whether [`ForwardOutput::logsumexp`] is wanted. Changes other numbers of half types by rounding
    /// alone (they are widened for it), and of f32 and f64 not at all.
    pub return_logsumexp: bool,
}

/// What a layer gives back. For input without a batch axis, all of it is without one.
#[derive(Clone, Debug)]
pub struct ForwardOutput {
    /// (batch, len, output_dim).
    pub output: Tensor,
    /// What each token attends to, (batch, num_heads, q_len, kv_len), with a column more for each of the
    /// [extra keys](SelfAttentionConfig::extra_keys).
    pub weights: Option<Tensor>,
    /// ln Σ exp(scores), (batch, num_heads, q_len).
    pub logsumexp: Option<Tensor>,
}

impl ForwardOutput {
    fn map(self, f: impl Fn(Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            output: f(self.output)?,
            weights: self.weights.map(&f).transpose()?,
            logsumexp: self.logsumexp.map(&f).transpose()?,
        })
    }

    pub(crate) fn with_weights(self) -> Result<(Tensor, Tensor)> {
        let weights = self.weights.ok_or_else(|| candle_core::Error::msg("weights were not asked for"))?;
        Ok((self.output, weights))
    }
}

/// The parameters of a [`SelfAttention`](crate::SelfAttention) or [`CrossAttention`](crate::CrossAttention), and what
/// can be done with them. Both layers dereference to this.
#[derive(Clone, Debug)]
pub struct MultiHead {
    kind: LayerKind,
    config: SelfAttentionConfig,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Option<Linear>,
    qk_norm: Option<(RmsNorm, RmsNorm)>,
    sinks: Option<Tensor>,
    extra_keys: ExtraKeys,
    alibi_slopes: Option<Tensor>,
    rotary: Option<RotaryEmbedding>,
    dropout_seed: u64,
    dropout_calls: Arc<AtomicU64>,
}

impl MultiHead {
    pub(crate) fn new(kind: LayerKind, config: &SelfAttentionConfig, vb: &VarBuilder) -> Result<Self> {
        parameters::check(kind, config, vb.dtype())?;
        Self::of_parameters(kind, config, parameters::create(config, vb)?, &vb.prefix())
    }

    pub(crate) fn from_layout(
        kind: LayerKind,
        layout: Layout,
        config: &SelfAttentionConfig,
        vb: &VarBuilder,
    ) -> Result<Self> {
        parameters::check(kind, config, vb.dtype())?;
        Self::of_parameters(kind, config, checkpoint::from_var_builder(layout, config, vb)?, &vb.prefix())
    }

    pub(crate) fn load_layout(
        kind: LayerKind,
        layout: Layout,
        config: &SelfAttentionConfig,
        (path, prefix): (&Path, &str),
        (dtype, device): (Option<DType>, &Device),
    ) -> Result<Self> {
        parameters::check(kind, config, dtype.unwrap_or(DType::F32))?;
        let parameters = checkpoint::from_file(layout, config, (path, prefix), (dtype, device))?;
        Self::of_parameters(kind, config, parameters, prefix)
    }

    /// The layer of these parameters, all that its config asks for, at `place` in the model.
    fn of_parameters(
        kind: LayerKind,
        config: &SelfAttentionConfig,
        parameters: Parameters,
        place: &str,
    ) -> Result<Self> {
        let find = |name: &str| parameters.iter().find(|(other, _)| *other == name).map(|(_, tensor)| tensor.clone());
        let linear = |weight, bias| find(weight).map(|weight| Linear::new(weight, find(bias)));
        let required = |weight, bias| {
            linear(weight, bias).ok_or_else(|| candle_core::Error::msg(format!("no parameter named {weight}")))
        };
        let norm = |name, eps| find(name).map(|weight| RmsNorm::new(weight, eps));
        let eps = config.qk_norm_eps.unwrap_or_default();
        let q_proj = required("q_proj.weight", "q_proj.bias")?;
        let (dtype, device) = (q_proj.weight().dtype(), q_proj.weight().device());
        let slopes = || parameters::alibi_slopes(config.num_heads, dtype, device);
        Ok(Self {
            kind,
            k_proj: required("k_proj.weight", "k_proj.bias")?,
            v_proj: required("v_proj.weight", "v_proj.bias")?,
            o_proj: linear("o_proj.weight", "o_proj.bias"),
            qk_norm: norm("q_norm.weight", eps).zip(norm("k_norm.weight", eps)),
            sinks: find("sinks"),
            extra_keys: ExtraKeys { learned: find("bias_k").zip(find("bias_v")), zeros: config.add_zero_attn },
            alibi_slopes: config.alibi.then(slopes).transpose()?,
            rotary: config.rotary.as_ref().map(|rotary| RotaryEmbedding::new(rotary, config.head_dim())).transpose()?,
            dropout_seed: philox::named_seed(config.seed, &parameters::full_name(place, "dropout")),
            dropout_calls: Arc::default(),
            config: config.clone(),
            q_proj,
        })
    }

    pub(crate) fn load(kind: LayerKind, path: &Path, device: &Device) -> Result<Self> {
        let bytes = file::read(path)?;
        Self::from_bytes(kind, &bytes, device).map_err(|error| error.with_path(path))
    }

    pub(crate) fn from_bytes(kind: LayerKind, bytes: &[u8], device: &Device) -> Result<Self> {
        let loaded = checkpoint::from_bytes(bytes, kind, device)?;
        let vb = VarBuilder::from_tensors(loaded.parameters, loaded.dtype, device);
        Self::new(kind, &loaded.config, &vb)
    }

    /// What the layer is made of.
    pub fn config(&self) -> &SelfAttentionConfig {
        &self.config
    }

    /// W_Q: embed_dim -> num_heads · head_dim.
    pub fn q_proj(&self) -> &Linear {
        &self.q_proj
    }

    /// W_K: kv_dim -> num_kv_heads · head_dim.
    pub fn k_proj(&self) -> &Linear {
        &self.k_proj
    }

    /// W_V: value_input_dim -> num_kv_heads · value_dim.
    pub fn v_proj(&self) -> &Linear {
        &self.v_proj
    }

    /// W_O: num_heads · value_dim -> embed_dim.
    pub fn o_proj(&self) -> Option<&Linear> {
        self.o_proj.as_ref()
    }

    /// Every parameter with its name, always in the same order.
    pub fn parameters(&self) -> Vec<(&'static str, &Tensor)> {
        let tensor_of = |name: &str| match name {
            "q_proj.weight" => Some(self.q_proj.weight()),
            "k_proj.weight" => Some(self.k_proj.weight()),
            "v_proj.weight" => Some(self.v_proj.weight()),
            "o_proj.weight" => self.o_proj.as_ref().map(Linear::weight),
            "q_proj.bias" => self.q_proj.bias(),
            "k_proj.bias" => self.k_proj.bias(),
            "v_proj.bias" => self.v_proj.bias(),
            "o_proj.bias" => self.o_proj.as_ref().and_then(Linear::bias),
            "q_norm.weight" => self.qk_norm.as_ref().map(|(q_norm, _)| q_norm.weight()),
            "k_norm.weight" => self.qk_norm.as_ref().map(|(_, k_norm)| k_norm.weight()),
            "sinks" => self.sinks.as_ref(),
            "bias_k" => self.extra_keys.learned.as_ref().map(|(bias_k, _)| bias_k),
            "bias_v" => self.extra_keys.learned.as_ref().map(|(_, bias_v)| bias_v),
            _ => None,
        };
        let names = self.config.parameters();
        names.iter().filter_map(|parameter| Some((parameter.name, tensor_of(parameter.name)?))).collect()
    }

    /// The parameters that an optimiser can train, always in the same order: all of them in a layer that was loaded or
    /// built on a `VarMap`, none in one built on a read-only `VarBuilder`.
    pub fn vars(&self) -> Vec<Var> {
        let parameters = self.parameters().into_iter();
        parameters
            .filter(|(_, tensor)| tensor.is_variable())
            .filter_map(|(_, tensor)| Var::from_tensor(tensor).ok())
            .collect()
    }

    /// How many training passes have drawn dropout so far. Each draws anew; set it to go on where a run stopped.
    pub fn dropout_calls(&self) -> u64 {
        self.dropout_calls.load(Ordering::Relaxed)
    }

    /// See [`MultiHead::dropout_calls`]. Shared with the clones of this layer.
    pub fn set_dropout_calls(&self, calls: u64) {
        self.dropout_calls.store(calls, Ordering::Relaxed);
    }

    /// Saves parameters and config to a safetensors file. The file is replaced as a whole or not at all.
    ///
    /// # Errors
    ///
    /// A folder that can't be written to, a full disk: an earlier file is then as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        Ok(file::write(path.as_ref(), &self.to_bytes()?)?)
    }

    /// What [`MultiHead::save`] writes.
    ///
    /// # Errors
    ///
    /// Parameters that can't be copied from their device.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let header = Header { layer: self.kind, config: self.config.clone() };
        checkpoint::to_bytes(&header, &self.parameters())
    }

    /// The parameters as another program names and arranges them, without a prefix, in the layer's dtype. They are copies.
    ///
    /// # Errors
    ///
    /// A layer with parameters that the layout has no place for.
    pub fn to_layout(&self, layout: Layout) -> Result<Vec<(String, Tensor)>> {
        checkpoint::to_tensors(layout, &self.config, &self.parameters())
    }

    /// Saves what [`MultiHead::to_layout`] gives as a safetensors file, each name behind `prefix` and a dot (an empty prefix
    /// is none). The file is replaced as a whole or not at all.
    ///
    /// # Errors
    ///
    /// As [`MultiHead::to_layout`] and [`MultiHead::save`].
    pub fn save_layout(&self, layout: Layout, prefix: &str, path: impl AsRef<Path>) -> Result<()> {
        Ok(file::write(path.as_ref(), &checkpoint::to_file(&self.to_layout(layout)?, prefix)?)?)
    }

    /// Queries from `x` (batch, q_len, embed_dim), keys from `key` (batch, kv_len, kv_dim) and values from `value` (batch,
    /// kv_len, value_input_dim), or all without a batch axis.
    pub(crate) fn attend(
        &self,
        x: &Tensor,
        [key, value]: [&Tensor; 2],
        options: &ForwardOptions,
    ) -> Result<ForwardOutput> {
        self.check_input("input", x, self.config.embed_dim)?;
        self.check_memories([key, value])?;
        if x.rank() != key.rank() || (x.rank() == 3 && x.dim(0)? != key.dim(0)?) {
            let expected = format!("the batch of the input, whose shape is {:?}", x.dims());
            return Err(AttentionError::Shape { tensor: "memory", expected, shape: key.dims().to_vec() }.into());
        }
        if x.rank() == 3 {
            return self.attend_batch(x, [key, value], options);
        }
        let (key, value) = (key.unsqueeze(0)?, value.unsqueeze(0)?);
        self.attend_batch(&x.unsqueeze(0)?, [&key, &value], options)?.map(|tensor| tensor.squeeze(0))
    }

    fn attend_batch(&self, x: &Tensor, sources: [&Tensor; 2], options: &ForwardOptions) -> Result<ForwardOutput> {
        let positions = [options.position_offset];
        let query = self.queries(x, &positions)?;
        let (key, value) = self.keys_and_values(sources, &positions)?;
        self.attend_heads(&query, key, value, self.attention_options(options))
    }

    /// (batch, len, num_heads, head_dim). The first token of each sequence stands at its position, or at the only one.
    fn queries(&self, x: &Tensor, positions: &[usize]) -> Result<Tensor> {
        let query = split_heads(&self.q_proj, x, self.config.num_heads, self.config.head_dim())?;
        self.normalise_and_rotate(query, self.qk_norm.as_ref().map(|(q_norm, _)| q_norm), positions)
    }

    /// (batch, len, num_kv_heads, head_dim or value_dim).
    fn keys_and_values(&self, [key, value]: [&Tensor; 2], positions: &[usize]) -> Result<(Tensor, Tensor)> {
        let config = &self.config;
        let key = split_heads(&self.k_proj, key, config.num_kv_heads(), config.head_dim())?;
        let value = split_heads(&self.v_proj, value, config.num_kv_heads(), config.value_dim())?;
        let k_norm = self.qk_norm.as_ref().map(|(_, k_norm)| k_norm);
        Ok((self.normalise_and_rotate(key, k_norm, positions)?, value))
    }

    fn normalise_and_rotate(&self, x: Tensor, norm: Option<&RmsNorm>, positions: &[usize]) -> Result<Tensor> {
        let x = match norm {
            // On CUDA candle panics.
            Some(norm) if x.elem_count() == 0 => connected(x, norm.weight())?,
            // The differentiable form: RmsNorm::forward drops the gradient in silence.
            Some(norm) => norm.forward_diff(&x)?,
            None => x,
        };
        match &self.rotary {
            Some(rotary) => rotary.apply_each(&x.transpose(1, 2)?, positions)?.transpose(1, 2),
            None => Ok(x),
        }
    }

    /// From queries, keys and values (batch, len, heads, dim) to the output.
    fn attend_heads(
        &self,
        query: &Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
    ) -> Result<ForwardOutput> {
        let (batch, q_len, _, _) = query.dims4()?;
        let (key, value, options) = self.extra_keys.append(key, value, options)?;
        let attended = attention(query, &key, &value, &options, Axes::TokensFirst)?;
        let output = [batch, q_len, self.config.output_dim()];
        let output = match &self.o_proj {
            Some(o_proj) => project(o_proj, &attended.context, &output)?,
            None => attended.context.reshape(&output)?,
        };
        Ok(ForwardOutput { output, weights: attended.weights, logsumexp: attended.logsumexp })
    }

    fn attention_options(&self, options: &ForwardOptions) -> AttentionOptions {
        let dropout_p = if options.train { self.config.dropout_p } else { 0.0 };
        let dropout_seed = if dropout_p > 0.0 {
            philox::nth_seed(self.dropout_seed, self.dropout_calls.fetch_add(1, Ordering::Relaxed))
        } else {
            0
        };
        AttentionOptions {
            scale: self.config.scale,
            softcap: self.config.softcap,
            attn_mask: self.config.mask() & options.attn_mask.clone(),
            attn_bias: options.attn_bias.clone(),
            alibi_slopes: self.alibi_slopes.clone(),
            sinks: self.sinks.clone(),
            dropout_p,
            dropout_seed,
            backend: options.backend,
            return_weights: options.return_weights,
            return_logsumexp: options.return_logsumexp,
        }
    }

    fn check_memories(&self, [key, value]: [&Tensor; 2]) -> std::result::Result<(), AttentionError> {
        self.check_input("memory", key, self.config.kv_dim())?;
        self.check_input("memory of the values", value, self.config.value_input_dim())?;
        if value.dims()[..value.rank() - 1] != key.dims()[..key.rank() - 1] {
            let (tensor, shape) = ("memory of the values", value.dims().to_vec());
            let expected = format!("batch and len of that of the keys, whose shape is {:?}", key.dims());
            return Err(AttentionError::Shape { tensor, expected, shape });
        }
        Ok(())
    }

    fn check_input(&self, tensor: &'static str, x: &Tensor, dim: usize) -> std::result::Result<(), AttentionError> {
        let shape = x.dims().to_vec();
        if !matches!(x.rank(), 2 | 3) {
            let expected = "2 axes (len, dim) or 3 (batch, len, dim)";
            return Err(AttentionError::Rank { tensor, expected, shape });
        }
        if shape.last() != Some(&dim) {
            let expected = format!("(len, {dim}) or (batch, len, {dim})");
            return Err(AttentionError::Shape { tensor, expected, shape });
        }
        let weight = self.q_proj.weight();
        if x.dtype() != weight.dtype() {
            let expected = format!("{:?}, that of the layer's parameters", weight.dtype());
            return Err(AttentionError::DType { tensor, expected, got: x.dtype() });
        }
        let (expected, got) = (weight.device().location(), x.device().location());
        if expected != got {
            return Err(AttentionError::Device { tensor, expected, got });
        }
        Ok(())
    }
}

/// A projection of all tokens, (batch, len, heads, dim).
fn split_heads(projection: &Linear, x: &Tensor, heads: usize, dim: usize) -> Result<Tensor> {
    let (batch, len, _) = x.dims3()?;
    project(projection, x, &[batch, len, heads, dim])
}
