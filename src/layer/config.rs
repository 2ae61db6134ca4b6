//! [`SelfAttentionConfig`]: the config of a layer, and its checks.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::check::check_number;
use crate::error::{AttentionError, Result};
use crate::mask::Mask;
use crate::rotary::RotaryConfig;

/// The config of a [`SelfAttention`](crate::SelfAttention) or [`CrossAttention`](crate::CrossAttention) layer.
///
/// Start from [`new`](Self::new) or [`single_head`](Self::single_head) and change what you need:
///
/// ```
/// use candle_attention::rotary::RotaryConfig;
/// use candle_attention::SelfAttentionConfig;
///
/// // The attention of a small Llama.
/// let config = SelfAttentionConfig {
///     num_kv_heads: Some(2),
///     qkv_bias: false,
///     out_bias: false,
///     is_causal: true,
///     rotary: Some(RotaryConfig::default()),
///     ..SelfAttentionConfig::new(512, 8)
/// };
/// assert_eq!(config.head_dim(), 64);
/// config.validate()?;
///
/// // A JSON config needs only what differs from `new`.
/// let config: SelfAttentionConfig = serde_json::from_str(r#"{"embed_dim": 64, "num_heads": 4, "is_causal": true}"#)?;
/// assert_eq!(config, SelfAttentionConfig { is_causal: true, ..SelfAttentionConfig::new(64, 4) });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelfAttentionConfig {
    /// The size of an input token (d_in).
    pub embed_dim: usize,
    /// The number of query heads.
    pub num_heads: usize,
    /// The number of key and value heads, a divisor of num_heads, for grouped-query attention; num_heads if not given.
    pub num_kv_heads: Option<usize>,
    /// The size of a query or key head (d_k); embed_dim / num_heads if not given.
    pub head_dim: Option<usize>,
    /// The size of a value head (d_v); head_dim if not given.
    pub value_dim: Option<usize>,
    /// The size of a memory token in cross-attention; embed_dim if not given.
    pub kv_dim: Option<usize>,
    /// The size of a token that values are projected from, if keys and values come from two memories (`vdim` of
    /// PyTorch's `nn.MultiheadAttention`); kv_dim if not given.
    pub value_input_dim: Option<usize>,
    /// Whether W_O projects the merged heads back to embed_dim. Without W_O an output token has num_heads · value_dim
    /// entries.
    #[serde(default = "yes")]
    pub out_proj: bool,
    /// Whether W_Q, W_K and W_V have biases. In plain attention the bias of W_K adds the same number to all scores of a
    /// query. The softmax ignores that, so the gradient of this bias is zero up to rounding.
    #[serde(default = "yes")]
    pub qkv_bias: bool,
    /// Whether W_K has a bias, if qkv_bias is true. Whisper's W_K has none.
    #[serde(default = "yes")]
    pub k_bias: bool,
    /// Whether W_O, if there is one, has a bias.
    #[serde(default = "yes")]
    pub out_bias: bool,
    /// What the dot products are multiplied by; 1 / sqrt(head_dim) if not given.
    pub scale: Option<f64>,
    /// Bounds the scores smoothly: softcap · tanh(scores / softcap). 0 is none, as in ONNX.
    pub softcap: Option<f64>,
    /// Whether a token may attend only to itself and the tokens before it.
    ///
    /// The last query is aligned with the last key (bottom-right). `is_causal` of PyTorch and ONNX aligns the first query
    /// with the first key (top-left). The two differ only if q_len != kv_len, as in cross-attention: there, leave this
    /// false and give `Mask::causal().with_offset(0)` as `attn_mask`.
    #[serde(default)]
    pub is_causal: bool,
    /// If given, a token may attend only to positions less than this far away: its own, `sliding_window - 1` positions
    /// before it and, if not causal, as many after it. Queries and keys are aligned as for is_causal.
    pub sliding_window: Option<usize>,
    /// The probability, in [0, 1), that a weight is dropped in training.
    #[serde(default)]
    pub dropout_p: f64,
    /// The epsilon of QK-norm, which divides each query and key head by its root mean square and multiplies it by
    /// learned weights; no QK-norm if not given. (As in Qwen3; Henry et al., "Query-Key Normalization for
    /// Transformers", 2020.)
    pub qk_norm_eps: Option<f64>,
    /// Rotary position embedding of queries and keys; none if not given.
    pub rotary: Option<RotaryConfig>,
    /// Whether to add ALiBi, attention with linear biases, with the slopes of the paper (Press et al., ICLR 2022,
    /// section 3).
    #[serde(default)]
    pub alibi: bool,
    /// Whether each head has a learned attention sink.
    #[serde(default)]
    pub sinks: bool,
    /// Whether a learned key and value (`bias_k`, `bias_v`) are appended to the others. Every query may attend to them,
    /// whatever the mask. They have no position, and the weights have one more column for them. (As PyTorch's
    /// `nn.MultiheadAttention`.)
    #[serde(default)]
    pub add_bias_kv: bool,
    /// Whether a key and value of zeros are appended last. Every query may attend to them, whatever the mask. (As
    /// PyTorch's `nn.MultiheadAttention`.)
    #[serde(default)]
    pub add_zero_attn: bool,
    /// The seed of the initial parameters and of dropout. It is combined with the layer's name in the model, which is
    /// the prefix of its `VarBuilder`.
    #[serde(default)]
    pub seed: u64,
}

fn yes() -> bool {
    true
}

/// How a parameter is initialised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Init {
    /// Uniform in ±sqrt(6 / (in + out)); for a vector, in and out are both its length. (Glorot, Bengio, AISTATS 2010,
    /// section 4.2.)
    XavierUniform,
    /// Uniform in ±1 / sqrt(in), as PEFT initialises the A of an adapter.
    LoraA,
    Zeros,
    Ones,
}

/// The name of a parameter in a layer, or of a tensor in a checkpoint. Those of a layer's part are made from the part's.
pub(crate) type Name = Cow<'static, str>;

/// A parameter of a layer.
#[derive(Clone, Debug)]
pub(crate) struct Parameter {
    pub(crate) name: Name,
    pub(crate) shape: Vec<usize>,
    pub(crate) init: Init,
}

impl SelfAttentionConfig {
    /// Multi-head attention with W_O and biases and no other feature: `nn.MultiheadAttention(embed_dim, num_heads)`.
    pub fn new(embed_dim: usize, num_heads: usize) -> Self {
        Self {
            embed_dim,
            num_heads,
            num_kv_heads: None,
            head_dim: None,
            value_dim: None,
            kv_dim: None,
            value_input_dim: None,
            out_proj: true,
            qkv_bias: true,
            k_bias: true,
            out_bias: true,
            scale: None,
            softcap: None,
            is_causal: false,
            sliding_window: None,
            dropout_p: 0.0,
            qk_norm_eps: None,
            rotary: None,
            alibi: false,
            sinks: false,
            add_bias_kv: false,
            add_zero_attn: false,
            seed: 0,
        }
    }

    /// The layer of the lecture notes: one head, with W_Q and W_K (d_in -> d_k) and W_V (d_in -> d_v), without biases
    /// and without W_O.
    pub fn single_head(d_in: usize, d_k: usize, d_v: usize) -> Self {
        Self {
            head_dim: Some(d_k),
            value_dim: Some(d_v),
            out_proj: false,
            qkv_bias: false,
            out_bias: false,
            ..Self::new(d_in, 1)
        }
    }

    /// The number of key and value heads.
    pub fn num_kv_heads(&self) -> usize {
        self.num_kv_heads.unwrap_or(self.num_heads)
    }

    /// The size of a query or key head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.embed_dim.checked_div(self.num_heads).unwrap_or(0))
    }

    /// The size of a value head.
    pub fn value_dim(&self) -> usize {
        self.value_dim.unwrap_or(self.head_dim())
    }

    /// The size of a token that keys are projected from, and values too unless value_input_dim is given.
    pub fn kv_dim(&self) -> usize {
        self.kv_dim.unwrap_or(self.embed_dim)
    }

    /// The size of a token that values are projected from.
    pub fn value_input_dim(&self) -> usize {
        self.value_input_dim.unwrap_or(self.kv_dim())
    }

    /// The number of keys that the layer appends to the given ones.
    pub fn extra_keys(&self) -> usize {
        usize::from(self.add_bias_kv) + usize::from(self.add_zero_attn)
    }

    /// The size of an output token.
    pub fn output_dim(&self) -> usize {
        if self.out_proj { self.embed_dim } else { self.num_heads.saturating_mul(self.value_dim()) }
    }

    /// The mask of `is_causal` and `sliding_window`.
    pub fn mask(&self) -> Mask {
        match (self.sliding_window, self.is_causal) {
            (None, false) => Mask::full(),
            (None, true) => Mask::causal(),
            (Some(width), true) => Mask::sliding_window(width),
            (Some(width), false) => Mask::window(Some(width.saturating_sub(1)), Some(width.saturating_sub(1))),
        }
    }

    /// Checks that a layer can have this config.
    ///
    /// # Errors
    ///
    /// The first field whose value can't be used, with what it should be.
    pub fn validate(&self) -> Result<()> {
        Ok(self.check()?)
    }

    pub(crate) fn check(&self) -> Result<(), AttentionError> {
        self.check_sizes()?;
        self.check_numbers()?;
        if self.alibi && self.extra_keys() > 0 {
            let field = if self.add_bias_kv { "add_bias_kv" } else { "add_zero_attn" };
            let expected = "false with alibi, since such a key has no position".into();
            return Err(AttentionError::Config { field, expected, got: "true".into() });
        }
        match &self.rotary {
            Some(rotary) => rotary.validate(self.head_dim()),
            None => Ok(()),
        }
    }

    fn check_sizes(&self) -> Result<(), AttentionError> {
        let at_least_one = [
            ("embed_dim", self.embed_dim),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.num_kv_heads()),
            ("kv_dim", self.kv_dim()),
            ("value_input_dim", self.value_input_dim()),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
        ];
        for (field, size) in at_least_one {
            if size == 0 {
                return Err(AttentionError::Config { field, expected: "at least 1".into(), got: "0".into() });
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads()) {
            return Err(AttentionError::Heads { num_heads: self.num_heads, num_kv_heads: self.num_kv_heads() });
        }
        if self.head_dim.is_none() && !self.embed_dim.is_multiple_of(self.num_heads) {
            let expected = format!("a multiple of num_heads {}, or head_dim given", self.num_heads);
            return Err(AttentionError::Config { field: "embed_dim", expected, got: self.embed_dim.to_string() });
        }
        for (field, size) in [("head_dim", self.head_dim()), ("value_dim", self.value_dim())] {
            if size == 0 {
                return Err(AttentionError::Config { field, expected: "at least 1".into(), got: "0".into() });
            }
        }
        self.check_parameter_sizes()
    }

    /// Refuses parameters of more bytes than memory can address.
    fn check_parameter_sizes(&self) -> Result<(), AttentionError> {
        let inputs = self.embed_dim.max(self.kv_dim()).max(self.value_input_dim());
        let bytes = [self.num_heads, self.head_dim().max(self.value_dim()), inputs]
            .iter()
            .try_fold(size_of::<f64>(), |bytes, &size| bytes.checked_mul(size));
        match bytes.map(isize::try_from) {
            Some(Ok(_)) => Ok(()),
            _ => Err(AttentionError::Config {
                field: "embed_dim, num_heads and head_dim",
                expected: "parameters that memory can address".into(),
                got: format!(
                    "{} heads of {} for inputs of {inputs}",
                    self.num_heads,
                    self.head_dim().max(self.value_dim())
                ),
            }),
        }
    }

    fn check_numbers(&self) -> Result<(), AttentionError> {
        let above_zero = |x: f64| x.is_finite() && x > 0.0;
        check_number("scale", self.scale, "a finite number", f64::is_finite)?;
        let expected = "a finite number above 0, or 0 for none";
        check_number("softcap", self.softcap, expected, |x| x == 0.0 || above_zero(x))?;
        check_number("qk_norm_eps", self.qk_norm_eps, "a finite number above 0", above_zero)?;
        check_number("dropout_p", Some(self.dropout_p), "a probability in [0, 1)", |x| (0.0..1.0).contains(&x))
    }

    /// The parameters of a layer with this config, which must have been checked. Weights are (out, in).
    pub(crate) fn parameters(&self) -> Vec<Parameter> {
        let (q_dim, k_dim) = (self.num_heads * self.head_dim(), self.num_kv_heads() * self.head_dim());
        let v_dim = self.num_kv_heads() * self.value_dim();
        let merged = self.num_heads * self.value_dim();
        let mut parameters = Vec::new();
        let mut add = |wanted: bool, name: &'static str, shape: &[usize], init| {
            if wanted {
                parameters.push(Parameter { name: name.into(), shape: shape.to_vec(), init });
            }
        };
        add(true, "q_proj.weight", &[q_dim, self.embed_dim], Init::XavierUniform);
        add(true, "k_proj.weight", &[k_dim, self.kv_dim()], Init::XavierUniform);
        add(true, "v_proj.weight", &[v_dim, self.value_input_dim()], Init::XavierUniform);
        add(self.out_proj, "o_proj.weight", &[self.embed_dim, merged], Init::XavierUniform);
        add(self.qkv_bias, "q_proj.bias", &[q_dim], Init::Zeros);
        add(self.qkv_bias && self.k_bias, "k_proj.bias", &[k_dim], Init::Zeros);
        add(self.qkv_bias, "v_proj.bias", &[v_dim], Init::Zeros);
        add(self.out_proj && self.out_bias, "o_proj.bias", &[self.embed_dim], Init::Zeros);
        add(self.qk_norm_eps.is_some(), "q_norm.weight", &[self.head_dim()], Init::Ones);
        add(self.qk_norm_eps.is_some(), "k_norm.weight", &[self.head_dim()], Init::Ones);
        add(self.sinks, "sinks", &[self.num_heads], Init::Zeros);
        add(self.add_bias_kv, "bias_k", &[k_dim], Init::XavierUniform);
        add(self.add_bias_kv, "bias_v", &[v_dim], Init::XavierUniform);
        parameters
    }
}
