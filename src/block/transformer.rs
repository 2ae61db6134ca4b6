//! [`TransformerBlock`]: attention and an MLP, each with its norm, dropout and residual.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use attention_kernels::{Dropout, philox};
use candle_core::{D, Result as CandleResult, Tensor, Var};
use candle_nn::{ModuleT, VarBuilder};

use crate::block::branch::Branch;
use crate::block::config::{ATTENTION, MLP, NORMS, NormPlacement, POST_NORMS, TransformerBlockConfig};
use crate::block::layouts::plan;
use crate::block::mlp::Mlp;
use crate::block::norm_layer::Norm;
use crate::checkpoint::{LayerConfig, Layout, Parameters, Plan, prefixed};
use crate::error::{AttentionError, Result};
use crate::layer::init::{create_parameters, full_name};
use crate::layer::{ForwardOptions, ForwardOutput, KvCache, SelfAttention};
use crate::projection::{Call, Change, Projection, Projections};
use crate::rotary::RotaryEmbedding;

/// A transformer block: attention and an MLP, each with its norm, dropout and residual, with a gradient for x and every parameter.
///
/// On the CPU attention and MLP are one operation each, with their norm, dropout and residual inside.
///
/// # Shapes
///
/// x (batch, len, embed_dim) or (len, embed_dim); the result has the shape and dtype of x.
///
/// # Errors
///
/// Those of [`SelfAttention`].
///
/// # Examples
///
/// ```
/// use candle_attention::SelfAttentionConfig;
/// use candle_attention::block::{MlpConfig, NormConfig, TransformerBlock, TransformerBlockConfig};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// // A block of Llama.
/// let attention = SelfAttentionConfig { is_causal: true, qkv_bias: false, out_bias: false, ..SelfAttentionConfig::new(8, 2) };
/// let config = TransformerBlockConfig::new(attention, MlpConfig::swiglu(8, 24), NormConfig::rms(1e-5));
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let block = TransformerBlock::new(&config, vb.pp("blocks.0"))?;
/// let x = Tensor::randn(0f32, 1.0, (2, 5, 8), &Device::Cpu)?;
/// let y = block.forward(&x)?;
/// assert_eq!(y.dims(), [2, 5, 8]);
///
/// let grads = y.sqr()?.mean_all()?.backward()?;
/// assert!(block.vars().iter().all(|var| grads.get(var).is_some()));
/// # Ok::<(), candle_attention::Error>(())
/// ```
///
/// Source: Vaswani et al., "Attention Is All You Need" (NIPS 2017), section 3.1.
#[derive(Clone, Debug)]
pub struct TransformerBlock {
    config: TransformerBlockConfig,
    attention: SelfAttention,
    mlp: Mlp,
    /// Before attention and MLP; after them where the placement is `Post`.
    norms: [Norm; 2],
    /// Those of a sandwich.
    post_norms: Option<[Norm; 2]>,
    recompute: bool,
    dropout_seed: u64,
    dropout_calls: Arc<AtomicU64>,
}

impl TransformerBlock {
    /// A block whose parameters are read from `vb` or created in it: `attention`, `mlp`, `attention_norm` and `mlp_norm`, and, in a
    /// sandwich, `attention_post_norm` and `mlp_post_norm`.
    ///
    /// # Errors
    ///
    /// An invalid config (see [`TransformerBlockConfig::validate`]); those of [`SelfAttention::new`].
    pub fn new(config: &TransformerBlockConfig, vb: VarBuilder) -> Result<Self> {
        config.check_for(vb.dtype())?;
        let parameters = create_parameters(config.parameters(), |name| config.seed_of(name), &vb)?;
        Self::from_parameters(config, parameters, &vb.prefix())
    }

    /// A block with these parameters, which are exactly those of its config. `prefix` is its name in the model.
    pub(crate) fn from_parameters(
        config: &TransformerBlockConfig,
        parameters: Parameters,
        prefix: &str,
    ) -> Result<Self> {
        let of_part = |part: &str| -> Parameters {
            let own = |name: &str| name.strip_prefix(part)?.strip_prefix('.').map(str::to_string);
            parameters.iter().filter_map(|(name, tensor)| Some((own(name)?.into(), tensor.clone()))).collect()
        };
        let norm = |name: &str| Norm::from_named(&config.norm, of_part(name));
        let norms = |[first, second]: [&str; 2]| Ok::<_, crate::Error>([norm(first)?, norm(second)?]);
        let post_norms = (config.placement == NormPlacement::Sandwich).then(|| norms(POST_NORMS));
        let attention = prefixed(prefix, ATTENTION);
        Ok(Self {
            attention: SelfAttention::from_parameters(&config.attention, of_part(ATTENTION), &attention)?,
            mlp: Mlp::from_parameters(&config.mlp, of_part(MLP))?,
            norms: norms(NORMS)?,
            post_norms: post_norms.transpose()?,
            recompute: false,
            dropout_seed: philox::named_seed(config.attention.seed, &full_name(prefix, "dropout")),
            dropout_calls: Arc::default(),
            config: config.clone(),
        })
    }

    /// A copy of the block in which every parameter is a new variable, to train a block that was loaded as constants.
    ///
    /// # Errors
    ///
    /// A block with weights in blocks, or with adapters that aren't merged; too little memory on the device.
    pub fn trainable(&self) -> Result<Self> {
        self.with_parts(self.attention.trainable()?, self.mlp.trainable()?, |x| {
            Ok(Var::from_tensor(&x.detach())?.into_inner())
        })
    }

    /// A block with other parts of the same sizes, and with `parameter` of those of the norms. It counts its calls with dropout itself.
    pub(super) fn with_parts(
        &self,
        attention: SelfAttention,
        mlp: Mlp,
        parameter: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let both = |norms: &[Norm; 2]| Ok::<_, crate::Error>([norms[0].map(&parameter)?, norms[1].map(&parameter)?]);
        let (norms, post_norms) = (both(&self.norms)?, self.post_norms.as_ref().map(both).transpose()?);
        let dropout_calls = Arc::new(AtomicU64::new(self.dropout_calls.load(Ordering::Relaxed)));
        Ok(Self { attention, mlp, norms, post_norms, dropout_calls, ..self.clone() })
    }

    /// This block, which keeps only its inputs for the backward pass, and computes the rest again there: the same numbers with less memory, for
    /// about a third more time. It takes effect on the CPU, and not in calls that ask for weights, scores or a log-sum-exp.
    ///
    /// Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
    pub fn with_recompute(self, recompute: bool) -> Self {
        Self { recompute, ..self }
    }

    /// This block with another rotary embedding of its attention, as by [`SelfAttention::with_rotary`].
    ///
    /// # Errors
    ///
    /// A rotary embedding for another head_dim.
    pub fn with_rotary(self, rotary: RotaryEmbedding) -> Result<Self> {
        let attention = self.attention.with_rotary(rotary)?;
        let config = TransformerBlockConfig { attention: attention.config().clone(), ..self.config };
        Ok(Self { attention, config, ..self })
    }

    /// Computes the output, without dropout.
    ///
    /// # Errors
    ///
    /// See [`TransformerBlock`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_t(x, false)
    }

    /// Computes the output, with dropout if `train` is true.
    ///
    /// # Errors
    ///
    /// See [`TransformerBlock`].
    pub fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        Ok(self.forward_with(x, &ForwardOptions { train, ..Default::default() })?.output)
    }

    /// Computes the output with the given options of the attention. Weights, scores and log-sum-exp, if asked for, are the attention's.
    ///
    /// # Errors
    ///
    /// See [`TransformerBlock`].
    pub fn forward_with(&self, x: &Tensor, options: &ForwardOptions) -> Result<ForwardOutput> {
        if let Err(error) = self.check_call(x, options) {
            return self.attention.refuse(x, options, error.into());
        }
        let seed = self.call_seed(options.train);
        let call = Call { adapter: &options.adapter, seed, first_sequence: options.first_sequence };
        self.forward_by(x, &call, self.recompute, |x, branch| self.attention.forward_in_branch(x, options, branch))
    }

    /// Everything that can be wrong with a call, but for what the attention refuses.
    fn check_call(&self, x: &Tensor, options: &ForwardOptions) -> Result<(), AttentionError> {
        if options.parallel.is_some() && options.train && (self.config.dropout_p > 0.0 || self.mlp.adapter_drops()) {
            // Its numbers would be those of the places among this rank's tokens.
            let (expected, got) = ("a block over several ranks without it", "dropout of its branches or of an adapter");
            return Err(AttentionError::Backend { expected, got });
        }
        self.attention.check_input(x)
    }

    /// An empty cache for decoding a batch of this size.
    ///
    /// # Errors
    ///
    /// As [`SelfAttention::kv_cache`].
    pub fn kv_cache(&self, batch: usize) -> Result<KvCache> {
        self.attention.kv_cache(batch)
    }

    /// Computes the output for tokens that follow those of the cache, and adds them to the cache, as
    /// [`SelfAttention::forward_cached`].
    ///
    /// # Errors
    ///
    /// As [`SelfAttention::forward_cached`].
    pub fn forward_cached(&self, x: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        Ok(self.forward_cached_with(x, cache, &ForwardOptions::default())?.output)
    }

    /// As [`forward_cached`](Self::forward_cached), with the given options.
    ///
    /// # Errors
    ///
    /// As [`SelfAttention::forward_cached_with`]. If there is too little memory for the MLP, the tokens are in the cache all the same.
    pub fn forward_cached_with(
        &self,
        x: &Tensor,
        cache: &mut KvCache,
        options: &ForwardOptions,
    ) -> Result<ForwardOutput> {
        self.attention.agree_on(x, options)?;
        // There is no backward pass, for which to keep anything.
        let recompute = true;
        let call = Call { adapter: &options.adapter, ..Call::default() };
        let output = self.forward_by(&x.detach(), &call, recompute, |x, branch| {
            let normed = branch.norm.map_or(Ok(x.clone()), |norm| norm.forward(x))?;
            let output = self.attention.forward_cached_with(&normed, cache, options)?;
            Ok(ForwardOutput { output: branch.finish(x, output.output)?, ..output })
        })?;
        Ok(ForwardOutput { output: output.output.detach(), ..output })
    }

    /// The block around an attention.
    fn forward_by(
        &self,
        x: &Tensor,
        call: &Call,
        recompute: bool,
        attention: impl FnOnce(&Tensor, Branch) -> Result<ForwardOutput>,
    ) -> Result<ForwardOutput> {
        let [first, second] = self.dropout(x, call);
        let attended = attention(x, self.branch(0, first, recompute))?;
        let x = self.after(0, x, attended.output, first)?;
        let output = self.mlp.forward_in_branch(&x, self.branch(1, second, recompute), call)?;
        Ok(ForwardOutput { output: self.after(1, &x, output, second)?, ..attended })
    }

    /// What attention (0) or MLP (1) does beside its own work.
    fn branch(&self, part: usize, dropout: Option<Dropout>, recompute: bool) -> Branch<'_> {
        let norm = Some(&self.norms[part]);
        match self.config.placement {
            NormPlacement::Pre => Branch { norm, dropout, residual: true, recompute },
            NormPlacement::Post => Branch { norm: None, dropout, residual: true, recompute },
            NormPlacement::Sandwich => Branch { norm, dropout: None, residual: false, recompute },
        }
    }

    /// The part's result from what its operation gave.
    fn after(&self, part: usize, x: &Tensor, output: Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
        match (self.config.placement, &self.post_norms) {
            (NormPlacement::Post, _) => self.norms[part].forward(&output),
            (_, Some(norms)) => {
                Branch { dropout, residual: true, ..Branch::default() }.finish(x, norms[part].forward(&output)?)
            }
            _ => Ok(output),
        }
    }

    /// The seed of the dropout in one call. Every call has one of its own.
    fn call_seed(&self, train: bool) -> Option<u64> {
        let drops = train && (self.config.dropout_p > 0.0 || self.mlp.adapter_drops());
        drops.then(|| philox::nth_seed(self.dropout_seed, self.dropout_calls.fetch_add(1, Ordering::Relaxed)))
    }

    /// The dropout of both parts in one call, whose branches have the shape of x.
    fn dropout(&self, x: &Tensor, call: &Call) -> [Option<Dropout>; 2] {
        let p = self.config.dropout_p;
        let seed = call.seed.filter(|_| p > 0.0);
        // What x should be is checked later.
        let [len, dim] = [D::Minus2, D::Minus1].map(|axis| x.dim(axis).unwrap_or(1));
        let first = call.first_number(len, dim);
        [0, 1].map(|part| seed.map(|seed| Dropout { p, seed: philox::nth_seed(seed, part), first }))
    }

    /// The tensors of the block in a layout.
    pub(crate) fn plan(&self, layout: Layout) -> Result<Plan, AttentionError> {
        plan(layout, &self.config)
    }

    /// Refuses what a file of this crate doesn't hold: a part of a block, weights in blocks, and adapters that aren't merged.
    pub(super) fn check_plain(&self) -> Result<(), AttentionError> {
        self.attention.check_plain()?;
        self.mlp.check_plain()
    }

    /// The config; that of the whole block for a [part](Self::shard).
    pub fn config(&self) -> &TransformerBlockConfig {
        &self.config
    }

    /// The attention.
    pub fn attention(&self) -> &SelfAttention {
        &self.attention
    }

    /// The feed-forward part.
    pub fn mlp(&self) -> &Mlp {
        &self.mlp
    }

    /// Every parameter with its name, always in the same order.
    pub fn parameters(&self) -> Vec<(String, &Tensor)> {
        let named = |prefix: &str, (name, tensor)| (format!("{prefix}.{name}"), tensor);
        let attention = self.attention.parameters().into_iter().map(|x| named(ATTENTION, x));
        let mlp = self.mlp.parameters().into_iter().map(|x| named(MLP, x));
        let norms = self.norms.iter().zip(NORMS);
        let post_norms = self.post_norms.iter().flatten().zip(POST_NORMS);
        let norms = norms.chain(post_norms).flat_map(|(norm, prefix)| {
            let bias = norm.bias().map(|bias| ("bias", bias));
            std::iter::once(("weight", norm.weight())).chain(bias).map(move |x| named(prefix, x))
        });
        attention.chain(mlp).chain(norms).collect()
    }

    /// The parameters that an optimiser can train, always in the same order: with [adapters](crate::adapter) those of the active
    /// one alone.
    pub fn vars(&self) -> Vec<Var> {
        let own = self.parameters().into_iter().map(|(_, tensor)| tensor);
        let tensors = own.chain(self.active_tensors());
        tensors.filter(|tensor| tensor.is_variable()).filter_map(|x| Var::from_tensor(x).ok()).collect()
    }

    /// How many training passes have used dropout so far, of the block's own and of the attention's weights. To continue a
    /// training run, restore them with [`set_dropout_calls`](Self::set_dropout_calls).
    pub fn dropout_calls(&self) -> [u64; 2] {
        [self.dropout_calls.load(Ordering::Relaxed), self.attention.dropout_calls()]
    }

    /// Sets [`dropout_calls`](Self::dropout_calls). Clones of this block share the counts.
    pub fn set_dropout_calls(&self, [own, attention]: [u64; 2]) {
        self.dropout_calls.store(own, Ordering::Relaxed);
        self.attention.set_dropout_calls(attention);
    }
}

/// Dropout is on in training only, as in candle's own layers.
impl ModuleT for TransformerBlock {
    fn forward_t(&self, x: &Tensor, train: bool) -> CandleResult<Tensor> {
        Ok(TransformerBlock::forward_t(self, x, train)?)
    }
}

impl Projections for TransformerBlock {
    fn projections(&self) -> Vec<(String, &Projection)> {
        let named = |prefix: &str, (name, projection): (String, _)| (prefixed(prefix, &name), projection);
        let attention = self.attention.projections().into_iter().map(|x| named(ATTENTION, x));
        attention.chain(Projections::projections(&self.mlp).into_iter().map(|x| named(MLP, x))).collect()
    }

    fn map_projections(&self, change: &mut Change) -> Result<Self> {
        let attention = self.attention.map_projections(&mut |name, x| change(&prefixed(ATTENTION, name), x))?;
        let mlp = self.mlp.map_projections(&mut |name, x| change(&prefixed(MLP, name), x))?;
        Ok(Self { attention, mlp, ..self.clone() })
    }

    fn frozen(&self) -> Self {
        let norms = |norms: &[Norm; 2]| norms.each_ref().map(Norm::frozen);
        Self {
            attention: self.attention.frozen(),
            mlp: self.mlp.frozen(),
            norms: norms(&self.norms),
            post_norms: self.post_norms.as_ref().map(norms),
            ..self.clone()
        }
    }
}
