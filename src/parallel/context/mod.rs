//! Context parallelism: attention over a sequence of which each rank holds some tokens.

mod call;
mod numbers;
mod pieces;
mod ring;
mod split;
mod ulysses;
mod work;

use std::ops::Range;
use std::sync::Arc;

pub(crate) use call::Call;
pub(crate) use numbers::Dtype;
pub use split::{Order, Split};

use crate::error::{AttentionError, Error, Result};
use crate::parallel::communicator::Communicator;

/// How the ranks exchange what attention needs of other ranks' tokens. Both give the same numbers but for rounding.
///
/// With n ranks, a batch of B sequences of L tokens, and H query heads and K key heads of D numbers each, a rank sends in a
/// forward pass
///
/// | | numbers | in messages |
/// |---|---|---|
/// | `Ring` | (n - 1) · B · L/n · K · 2D | that travel while it computes |
/// | `Ulysses` | (n - 1)/n · B · L/n · (2H + 2 max(K, n)) · D | that it waits for |
///
/// and in the backward pass twice as many, with `Ring` keys, values and the gradients of both, and with `Ulysses` queries, keys, values,
/// contexts and the gradients of each. Beside them `Ulysses` sends two numbers of each log-sum-exp in both passes.
///
/// `Ring` works with any number of heads, and its traffic shrinks with grouped-query attention and with windows. `Ulysses` sends
/// less over many ranks, since what a rank sends goes down with n, and it computes with the longest matrices. It needs a number of query
/// heads that n divides, and key heads that n divides or that divide n. It gathers all tokens of a rank's heads, so that its peak of memory is
/// higher than that of `Ring`: `tests/context_memory.rs` allows it 0.42 of one process's on 4 ranks, and the ring 0.28. On few ranks, with few
/// key heads, or on a slow network the ring is the better choice.
///
/// # Examples
///
/// ```
/// use candle_attention::parallel::{ContextParallel, Order, Scheme, Split, threads};
/// use candle_attention::{AttentionOptions, scaled_dot_product_attention};
/// use candle_core::{Device, Tensor};
///
/// // 4 query heads, 1 key head, 8 tokens of 16 numbers on 4 ranks.
/// let split = Split::new(8, 4, Order::Contiguous)?;
/// let sent = |scheme| {
///     threads(4, |communicator| {
///         let draw = |heads| Tensor::randn(0f32, 1.0, (1, heads, 2, 16), &Device::Cpu);
///         let (query, key, value) = (draw(4)?, draw(1)?, draw(1)?);
///         let parallel = Some(ContextParallel { communicator: communicator.clone(), split, scheme });
///         let options = AttentionOptions { parallel, ..Default::default() };
///         scaled_dot_product_attention(&query, &key, &value, &options)?;
///         Ok(communicator.bytes_sent())
///     })
/// };
/// // With one key head for four query heads, keys and values are less than queries and contexts.
/// assert!(sent(Scheme::Ring)?[0] < sent(Scheme::Ulysses)?[0]);
/// # Ok::<(), candle_attention::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scheme {
    /// Keys and values travel from rank to rank, and each rank merges what its queries find in them by log-sum-exp. Distances at which
    /// no rank sees anything under the mask are skipped, so that a window stops the ring early.
    ///
    /// Source: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite Context" (ICLR 2024).
    #[default]
    Ring,
    /// Each rank gets all tokens of some of the heads, attends, and gives the contexts back.
    ///
    /// Source: Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer
    /// Models" (2023).
    Ulysses,
}

/// Attention over a sequence that is split across ranks: an option of
/// [`scaled_dot_product_attention`](crate::scaled_dot_product_attention), as [`AttentionOptions::parallel`](crate::AttentionOptions), and
/// of [`SelfAttention`](crate::SelfAttention), as [`ForwardOptions::parallel`](crate::ForwardOptions).
///
/// Every rank calls the same function with the tokens that the split gives it. Masks, biases, slopes and seeds are those of the
/// whole sequence, the same on every rank; position 0 is the first token of the whole. Outputs and gradients are those of this rank's
/// tokens, and equal those of one process but for rounding. The same number of ranks gives the same bits in every run. Parameters get a
/// gradient from this rank's tokens: sum it over the ranks
/// ([`all_reduce`](Communicator::all_reduce)).
///
/// Between the passes a rank keeps queries, keys, values, contexts and log-sum-exps of its own tokens only. The backward pass exchanges as
/// the forward pass does. So every rank has to make one, and those of several calls in the same order.
///
/// # Errors
///
/// Before anything else the ranks compare shapes, dtypes, options and masks (large ones by a hash). If two of them differ, every rank
/// gets [`AttentionError::Ranks`](crate::AttentionError::Ranks), which names both. Refused on every rank are
/// returned weights and scores, a bias or ALiBi slopes that want a gradient, [`Backend::Reference`](crate::Backend), tensors on
/// another device than the CPU, numbers so large that scores might overflow, and heads that the ranks don't divide with
/// [`Scheme::Ulysses`].
///
/// # Examples
///
/// ```
/// use candle_attention::parallel::{ContextParallel, Order, Scheme, Split, threads};
/// use candle_attention::{AttentionOptions, Mask, scaled_dot_product_attention};
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::randn(0f64, 1.0, (1, 2, 10, 4), &Device::Cpu)?; // (batch, heads, len, dim)
/// let options = AttentionOptions { attn_mask: Mask::causal(), ..Default::default() };
/// let expected = scaled_dot_product_attention(&x, &x, &x, &options)?.context;
///
/// let split = Split::new(10, 3, Order::ZigZag)?;
/// let contexts = threads(3, |communicator| {
///     let x = split.shard(&x, 2, communicator.rank())?;
///     let parallel = Some(ContextParallel { communicator, split, scheme: Scheme::Ring });
///     let options = AttentionOptions { parallel, ..options.clone() };
///     Ok(scaled_dot_product_attention(&x, &x, &x, &options)?.context)
/// })?;
/// let difference = (split.join(&contexts, 2)? - expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
/// assert!(difference < 1e-12);
/// # Ok::<(), candle_attention::Error>(())
/// ```
///
/// A layer, whose rotary embedding turns each token by its position in the whole sequence, and the gradient of a parameter:
///
/// ```
/// use candle_attention::parallel::{Communicator, ContextParallel, Order, Scheme, Split, threads};
/// use candle_attention::rotary::RotaryConfig;
/// use candle_attention::{ForwardOptions, SelfAttention, SelfAttentionConfig};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let rotary = Some(RotaryConfig::default());
/// let config = SelfAttentionConfig { is_causal: true, rotary, ..SelfAttentionConfig::new(8, 2) };
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu);
/// let layer = SelfAttention::new(&config, vb)?;
/// let x = Tensor::randn(0f64, 1.0, (1, 6, 8), &Device::Cpu)?;
/// let gradient = |output: Tensor| {
///     let grads = output.sqr()?.sum_all()?.backward()?;
///     Ok::<_, candle_attention::Error>(grads.get(layer.v_proj().weight()).unwrap().clone())
/// };
/// let expected = gradient(layer.forward(&x)?)?;
///
/// let split = Split::new(6, 2, Order::ZigZag)?;
/// let gradients = threads(2, |communicator| {
///     let x = split.shard(&x, 1, communicator.rank())?;
///     let parallel = Some(ContextParallel { communicator: communicator.clone(), split, scheme: Scheme::Ulysses });
///     let options = ForwardOptions { parallel, ..Default::default() };
///     communicator.all_reduce(&gradient(layer.forward_with(&x, &options)?.output)?)
/// })?;
/// for ours in gradients {
///     assert!((ours - &expected)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-12);
/// }
/// # Ok::<(), candle_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ContextParallel {
    /// This rank's way to the others.
    pub communicator: Arc<dyn Communicator>,
    /// Which tokens each rank holds.
    pub split: Split,
    /// How the ranks exchange.
    pub scheme: Scheme,
}

impl ContextParallel {
    /// This rank.
    pub(crate) fn rank(&self) -> usize {
        self.communicator.rank()
    }

    /// The positions of this rank's tokens.
    pub(crate) fn own_positions(&self) -> Vec<Range<usize>> {
        self.split.positions(self.rank())
    }

    /// The tokens of this rank.
    pub(crate) fn own_len(&self) -> usize {
        self.split.rank_len(self.rank())
    }

    /// Checks that a tensor of this shape, with `len` tokens, holds those that the split gives to this rank.
    pub(crate) fn check_tokens(
        &self,
        tensor: &'static str,
        len: usize,
        shape: impl FnOnce() -> Vec<usize>,
    ) -> Result<(), AttentionError> {
        let own_len = self.own_len();
        if len == own_len {
            return Ok(());
        }
        let expected = format!("with the {own_len} tokens that the split gives to this rank");
        Err(AttentionError::Shape { tensor, expected, shape: shape() })
    }

    /// Checks that the scheme can divide the heads among the ranks.
    pub(crate) fn check_heads(&self, num_heads: usize, num_kv_heads: usize) -> Result<(), AttentionError> {
        match self.scheme {
            Scheme::Ring => Ok(()),
            Scheme::Ulysses => ulysses::check_heads(num_heads, num_kv_heads, self.split.ranks()),
        }
    }

    /// `ours`, what this rank has found, if all ranks have the same `text` to say. An error of one rank is an error on all.
    pub(crate) fn agree_on<T>(&self, what: &'static str, text: String, ours: Result<T>) -> Result<T> {
        let Self { split, scheme, .. } = self;
        let (len, ranks, order) = (split.len(), split.ranks(), split.order());
        let text = format!("{text}, {len} tokens on {ranks} ranks, {order:?}, {scheme:?}");
        let ours = ours.and_then(|ours| Ok(self.split.check_size(&*self.communicator).map(|()| ours)?));
        agree_on(&*self.communicator, what, text, ours)
    }
}

/// As [`ContextParallel::agree_on`].
pub(crate) fn agree_on<T>(
    communicator: &dyn Communicator,
    what: &'static str,
    text: String,
    ours: Result<T>,
) -> Result<T> {
    let text = match &ours {
        Ok(_) => text,
        Err(Error::Attention(error)) => format!("{text} (error: {error})"),
        Err(Error::Candle(error)) => format!("{text} (error: {error})"),
    };
    communicator.agree(what, &text)?;
    ours
}
