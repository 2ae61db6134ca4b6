//! [`Core`] on several ranks, each of which holds some of the heads.
//!
//! A rank has the rows of W_Q, W_K and W_V of its heads, with their biases and sinks, and the columns of W_O. The ranks sum what W_O makes
//! of their heads, and then each adds the bias of W_O. Weights of QK-norm belong to all heads, so that their gradients are summed. So are
//! those of key heads that several ranks use.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use attention_kernels::HeadNumbers;
use attention_kernels::mask::ScoreShape;
use candle_core::{DType, Device, Result as CandleResult, Tensor};
use candle_nn::Linear;

use crate::error::{AttentionError, Error, Result};
use crate::layer::bias_kv::BiasKv;
use crate::layer::config::SelfAttentionConfig;
use crate::layer::core::Core;
use crate::layer::options::ForwardOptions;
use crate::layer::shared_heads::SharedHeads;
use crate::parallel::communicator::Communicator;
use crate::parallel::hash::hash;
use crate::parallel::tensor::TensorParallel;
use crate::projection::{Adapted, Call, Projection, add_bias};

impl Core {
    /// A layer with this rank's heads.
    pub(super) fn shard(&self, communicator: &Arc<dyn Communicator>) -> Result<Self> {
        let shared = SharedHeads { ranks: TensorParallel::new(communicator), whole: self.config.clone() };
        let own = self.check_plain().and_then(|()| shared.check());
        let text = format!("{:?}, {:?}, {} parameters", self.kind, self.config, self.parameters().len());
        shared.ranks.agree_on("attention to share", text, own.map_err(Into::into))?;
        let parameters = shared.ranks.shard(self.parameters(), |name| shared.slice_of(name))?;
        let layer = self.of_parameters(&shared.own(), parameters)?;
        let heads = shared.heads();
        let slopes = self.alibi_slopes.as_ref().map(|slopes| slopes.narrow(0, heads.start, heads.len()));
        let slopes = slopes.map(|slopes| slopes?.force_contiguous()).transpose()?;
        Ok(Self { alibi_slopes: slopes, shared: Some(shared), ..layer })
    }

    /// The whole layer, on every rank.
    pub(super) fn gather(&self) -> Result<Self> {
        let Some(shared) = &self.shared else { return Ok(self.clone()) };
        let parameters = shared.ranks.gather(self.parameters(), |name| shared.slice_of(name))?;
        self.of_parameters(&shared.whole, parameters)
    }

    /// A whole layer with these parameters, and with the rotary embedding and the dropout of this one.
    fn of_parameters(&self, config: &SelfAttentionConfig, parameters: Vec<(&'static str, Tensor)>) -> Result<Self> {
        let parameters = parameters.into_iter().map(|(name, tensor)| (name.into(), tensor)).collect();
        let layer = Self::from_parameters(self.kind, config, parameters, "")?;
        let (slopes, shared) = (layer.alibi_slopes.clone(), None);
        Ok(Self { alibi_slopes: slopes, shared, ..self.with_parameters_of(layer) })
    }

    /// The config of the whole layer.
    pub(super) fn whole_config(&self) -> &SelfAttentionConfig {
        self.shared.as_ref().map_or(&self.config, |shared| &shared.whole)
    }

    /// Scores of these sizes with the heads of the whole layer, of which masks and biases speak.
    pub(super) fn whole_scores(&self, scores: &ScoreShape) -> ScoreShape {
        ScoreShape { num_heads: self.whole_config().num_heads, ..*scores }
    }

    /// This rank's heads.
    pub(super) fn own_heads(&self) -> Option<Range<usize>> {
        self.shared.as_ref().map(SharedHeads::heads)
    }

    /// The numbers of the heads that dropout counts.
    pub(super) fn head_numbers(&self) -> Option<HeadNumbers> {
        let shared = self.shared.as_ref()?;
        Some(HeadNumbers { first: shared.heads().start, count: shared.whole.num_heads })
    }

    /// `ours`, if all ranks that share the layer make the same call. An error of one rank is an error on all. `more` is what else has to be the
    /// same.
    pub(super) fn agree_on<T>(
        &self,
        inputs: &[&Tensor],
        options: &ForwardOptions,
        more: &dyn Fn() -> String,
        ours: Result<T, impl Into<Error>>,
    ) -> Result<T> {
        let ours = ours.map_err(Into::into);
        let Some(shared) = &self.shared else { return ours };
        let ours = ours.and_then(|ours| match options.parallel {
            None => Ok(ours),
            Some(_) => {
                let (expected, got) =
                    ("a layer that ranks don't share, for ranks that share a sequence", "one they do");
                Err(AttentionError::Backend { expected, got }.into())
            }
        });
        let of_input = |x: &&Tensor| {
            let trained = if x.track_op() { "with" } else { "without" };
            format!("input {:?} {:?} {trained} gradient, ", x.dims(), x.dtype())
        };
        let inputs: String = inputs.iter().map(of_input).collect();
        let trained = self.parameters().iter().filter(|(_, parameter)| parameter.track_op()).count();
        let dropout = options.train.then(|| (self.dropout_seed, self.dropout_calls.load(Ordering::Relaxed)));
        let of_bias = options.attn_bias.as_ref().map(|bias| if bias.track_op() { "trained" } else { "constant" });
        let ids = options
            .position_ids
            .as_ref()
            .and_then(|ids| ids.to_dtype(DType::F64).and_then(|ids| ids.to_device(&Device::Cpu)).ok());
        let ids = ids.map(|ids| format!(", position ids {:?} {:016x}", ids.dims(), hash(&ids))).unwrap_or_default();
        let (options, more) = (self.text_of_options(options, None), more());
        let text = format!(
            "{inputs}{options}, {trained} trained parameters, bias {of_bias:?}, dropout {dropout:?}{ids}{more}"
        );
        shared.ranks.agree_on("attention that ranks share", text, ours)
    }

    /// x, from which W_Q, W_K and W_V of all ranks make their heads.
    pub(super) fn entering(&self, x: &Tensor) -> CandleResult<Tensor> {
        self.shared.as_ref().map_or(Ok(x.clone()), |shared| shared.ranks.entering(x))
    }

    /// The inputs of W_K and W_V, which may be one tensor.
    pub(super) fn entering_both(&self, [key, value]: [&Tensor; 2]) -> CandleResult<[Tensor; 2]> {
        let entered = self.entering(key)?;
        let value = if value.id() == key.id() { entered.clone() } else { self.entering(value)? };
        Ok([entered, value])
    }

    /// A bias, aligned with the whole scores, for some of the heads. Its gradient is that of all heads.
    pub(super) fn bias_of_heads(&self, bias: &Tensor, heads: &Range<usize>) -> CandleResult<Tensor> {
        let bias = self.entering(bias)?;
        match bias.rank().checked_sub(3) {
            Some(axis) if bias.dim(axis)? > 1 => bias.narrow(axis, heads.start, heads.len()),
            _ => Ok(bias),
        }
    }

    /// W_K or W_V in one call.
    pub(super) fn kv_call(&self, projection: &Projection, call: &Call, len: usize) -> Result<Adapted> {
        let adapted = projection.call(call, len)?;
        let Some(shared) = &self.shared else { return Ok(adapted) };
        let bias = adapted.linear.bias().map(|bias| shared.kv_parameter(bias)).transpose()?;
        let linear = Linear::new(shared.kv_parameter(adapted.linear.weight())?, bias);
        Ok(Adapted { linear, ..adapted })
    }

    /// W_O in one call, without its bias if ranks share the layer.
    pub(super) fn out_call(&self, projection: &Projection, call: &Call, len: usize) -> Result<Adapted> {
        let adapted = projection.call(call, len)?;
        Ok(if self.shared.is_some() { adapted.without_bias() } else { adapted })
    }

    /// The learned keys and values in one call.
    pub(super) fn bias_kv_call(&self) -> CandleResult<BiasKv> {
        let Some(shared) = &self.shared else { return Ok(self.bias_kv.clone()) };
        let learned = self.bias_kv.learned.as_ref();
        let learned =
            learned.map(|(k, v)| Ok::<_, candle_core::Error>((shared.kv_parameter(k)?, shared.kv_parameter(v)?)));
        Ok(BiasKv { learned: learned.transpose()?, zeros: self.bias_kv.zeros })
    }

    /// The weight of a norm of queries or keys in one call.
    pub(super) fn norm_weight(&self, weight: &Tensor) -> CandleResult<Tensor> {
        self.shared.as_ref().map_or(Ok(weight.clone()), |shared| shared.ranks.with_sum_of_gradients(weight, None))
    }

    /// The output from what W_O has made of this rank's heads.
    pub(super) fn summed(&self, output: Tensor) -> Result<Tensor> {
        let Some(shared) = &self.shared else { return Ok(output) };
        let bias = self.o_proj.as_ref().and_then(Projection::bias);
        Ok(add_bias(shared.ranks.sum(&output)?, bias)?)
    }
}
