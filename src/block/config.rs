//! [`TransformerBlockConfig`]: the config of a block, its checks and its parameters.

use candle_core::DType;
use serde::{Deserialize, Serialize};

use crate::block::mlp::MlpConfig;
use crate::block::norm_layer::NormConfig;
use crate::check::check_number;
use crate::checkpoint::{LayerConfig, LayerKind, prefixed};
use crate::error::{AttentionError, Result};
use crate::layer::config::{Init, Parameter, SelfAttentionConfig};
use crate::layer::init;

/// The names of a block's parts, which are the prefixes of their parameters.
pub(super) const ATTENTION: &str = "attention";
pub(super) const MLP: &str = "mlp";
/// Before attention and MLP; after them where the placement is `Post`.
pub(super) const NORMS: [&str; 2] = ["attention_norm", "mlp_norm"];
/// Those after attention and MLP in a sandwich.
pub(super) const POST_NORMS: [&str; 2] = ["attention_post_norm", "mlp_post_norm"];

/// Where the norms of a block stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormPlacement {
    /// x + f(norm(x)): GPT-2, Llama, Qwen3. (Xiong et al., "On Layer Normalization in the Transformer Architecture", ICML 2020.)
    #[default]
    Pre,
    /// norm(x + f(x)): the paper, BERT.
    Post,
    /// x + norm(f(norm(x))): Gemma 2.
    Sandwich,
}

/// The config of a [`TransformerBlock`](crate::block::TransformerBlock).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformerBlockConfig {
    /// The attention.
    pub attention: SelfAttentionConfig,
    /// The feed-forward part.
    pub mlp: MlpConfig,
    /// Every norm of the block.
    pub norm: NormConfig,
    /// Where the norms stand.
    #[serde(default)]
    pub placement: NormPlacement,
    /// The probability, in [0, 1), that an entry of the output of attention or of the MLP is dropped in training. (The attention's
    /// own `dropout_p` drops weights.)
    #[serde(default)]
    pub dropout_p: f64,
}

impl TransformerBlockConfig {
    /// A pre-norm block with these parts, without dropout.
    pub fn new(attention: SelfAttentionConfig, mlp: MlpConfig, norm: NormConfig) -> Self {
        Self { attention, mlp, norm, placement: NormPlacement::Pre, dropout_p: 0.0 }
    }

    /// Checks that a block can have this config.
    ///
    /// # Errors
    ///
    /// The first field whose value can't be used, with what it should be.
    pub fn validate(&self) -> Result<()> {
        Ok(self.check()?)
    }

    /// As [`validate`](Self::validate), for a block in this dtype.
    pub(crate) fn check_for(&self, dtype: DType) -> Result<(), AttentionError> {
        self.check()?;
        init::check(LayerKind::SelfAttention, &self.attention, dtype)?;
        self.norm.check(dtype)
    }

    fn norm_parameters(&self, name: &str) -> impl Iterator<Item = Parameter> {
        let shape = vec![self.attention.embed_dim];
        let start = if self.norm.unit_offset { Init::Zeros } else { Init::Ones };
        let weight = Parameter { name: prefixed(name, "weight").into(), shape: shape.clone(), init: start };
        let bias = Parameter { name: prefixed(name, "bias").into(), shape, init: Init::Zeros };
        std::iter::once(weight).chain(self.norm.bias.then_some(bias))
    }

    /// The seed of the initial values of this parameter.
    pub(super) fn seed_of(&self, parameter: &str) -> u64 {
        if parameter.starts_with("mlp.") { self.mlp.seed } else { self.attention.seed }
    }
}

impl LayerConfig for TransformerBlockConfig {
    fn check(&self) -> Result<(), AttentionError> {
        self.attention.check()?;
        init::check_kind(LayerKind::SelfAttention, &self.attention)?;
        self.mlp.check()?;
        // The norm's numbers depend on the dtype, and are checked when the block is made.
        self.norm.check(DType::F64)?;
        let dim = self.attention.embed_dim;
        for (field, got) in [("mlp.embed_dim", self.mlp.embed_dim), ("attention.out_proj", self.attention.output_dim())]
        {
            if got != dim {
                let expected = format!("the size of a token, embed_dim {dim}");
                return Err(AttentionError::Config { field, expected, got: got.to_string() });
            }
        }
        check_number("dropout_p", Some(self.dropout_p), "a probability in [0, 1)", |x| (0.0..1.0).contains(&x))
    }

    fn parameters(&self) -> Vec<Parameter> {
        let of_part = |prefix, parameters: Vec<Parameter>| {
            parameters.into_iter().map(move |x| Parameter { name: prefixed(prefix, &x.name).into(), ..x })
        };
        let mut parameters: Vec<_> = of_part(ATTENTION, self.attention.parameters()).collect();
        parameters.extend(of_part(MLP, self.mlp.parameters()));
        let sandwich = self.placement == NormPlacement::Sandwich;
        let norms = NORMS.iter().chain(POST_NORMS.iter().filter(|_| sandwich));
        parameters.extend(norms.flat_map(|name| self.norm_parameters(name)));
        parameters
    }
}
