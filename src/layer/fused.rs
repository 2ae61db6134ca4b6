//! Self-attention as one operation with a gradient, on the CPU: projections, rotary embedding, attention and W_O, with what stands
//! around them in a block.
//!
//! One operation instead of a dozen: candle zeroes and adds a tensor for every edge of its graph, and each of those passes
//! takes as long as a norm. The layers whose config or call needs more take the way of `core`, whose numbers
//! differ by rounding only.

use std::any::Any;
use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use attention_kernels::residual::add_dropped;
use attention_kernels::rotary::Heads;
use attention_kernels::{self as kernels, Dropout, HeadNumbers, Incoming, LogSumExp, ProblemOptions, Saved, View};
use candle_core::{Result, Shape, Tensor, bail};

use crate::block::branch::OwnBranch;
use crate::block::op::Dtype;
use crate::block::operand::{Columns, LayerGradients, checked};
use crate::block::relay::{self, Layer};
use crate::check::{log_bound_of_scores, scores_may_overflow};
use crate::mask::Mask;
use crate::parallel::context::{Call, ContextParallel};
use crate::projection::{Reduced, SideBySide};
use crate::rotary::KernelAngles;

/// The gradients of parameters, `None` for one that wants none.
type OfParameters = Vec<Option<Tensor>>;

/// The heads of a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeadSizes {
    pub(super) num_heads: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) value_dim: usize,
}

/// One call of a layer.
pub(super) struct FusedLayer {
    pub(super) heads: HeadSizes,
    /// The numbers of the heads that dropout counts.
    pub(super) numbers: Option<HeadNumbers>,
    pub(super) qkv: SideBySide,
    pub(super) out: Option<SideBySide>,
    pub(super) branch: OwnBranch,
    pub(super) scale: f64,
    pub(super) softcap: Option<f64>,
    pub(super) mask: Mask,
    /// Dropout of the weights.
    pub(super) dropout: Option<Dropout>,
    pub(super) angles: Option<KernelAngles>,
    /// The ranks that share the sequence.
    pub(super) parallel: Option<ContextParallel>,
}

impl FusedLayer {
    /// The output for x (batch, len, embed_dim), or `None` if scores may have overflowed: what is to be done then is decided elsewhere.
    /// (A row whose log-sum-exp is not finite otherwise sees no key, or an input that isn't finite itself.)
    pub(super) fn forward(self, x: &Tensor) -> Result<Option<Tensor>> {
        let parameters = self.parameters();
        let keeps = !self.branch.recompute && (x.track_op() || parameters.iter().any(Tensor::track_op));
        let overflows = Arc::new(AtomicBool::new(false));
        let op = Op { layer: self, keeps, kept: OnceLock::new(), overflows: overflows.clone() };
        let output = relay::apply(op, x, &parameters)?;
        Ok((!overflows.load(Ordering::Relaxed)).then_some(output))
    }

    /// Every parameter, in the order of its gradients.
    fn parameters(&self) -> Vec<Tensor> {
        let linears = [&self.qkv].into_iter().chain(&self.out).flat_map(SideBySide::parameters);
        self.branch.norm.iter().flat_map(|norm| norm.parameters()).chain(linears).collect()
    }
}

/// What the backward pass needs.
struct Kept<E: Dtype> {
    /// What the projections read, if it isn't x itself.
    normed: Option<Vec<E>>,
    /// Queries, keys and values of each token, side by side, after the rotary embedding.
    qkv: Vec<E>,
    /// (batch, len, num_heads, value_dim)
    context: Vec<E>,
    logsumexp: Vec<LogSumExp<E::Float>>,
    /// What the adapters of the projections and of W_O made of their inputs.
    reduced: Reduced<E>,
    out_reduced: Reduced<E>,
}

struct Op {
    layer: FusedLayer,
    keeps: bool,
    /// The [`Kept`] of the call's type.
    kept: OnceLock<Box<dyn Any + Send + Sync>>,
    overflows: Arc<AtomicBool>,
}

impl Op {
    /// The columns of queries, keys and values in a row of `qkv`.
    fn widths(&self) -> [usize; 3] {
        let HeadSizes { num_heads, num_kv_heads, head_dim, value_dim } = self.layer.heads;
        [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * value_dim]
    }

    /// Everything up to the context.
    fn attend<E: Dtype>(&self, x: &[E], [batch, len]: [usize; 2]) -> Result<Kept<E>> {
        let layer = &self.layer;
        let normed = layer.branch.input(x)?;
        let reduced = layer.qkv.reduce(&normed)?;
        let mut qkv = layer.qkv.forward(&normed, &reduced, None)?;
        self.rotate(&mut qkv, len, false)?;
        let output = self.with_call(&qkv, [batch, len], |call| Ok(call.forward(layer.parallel.as_ref())?))?;
        let normed = match normed {
            Cow::Owned(normed) => Some(normed),
            Cow::Borrowed(_) => None,
        };
        let out_reduced = layer.out.as_ref().map_or(Ok(vec![]), |out| out.reduce(&output.context))?;
        Ok(Kept { normed, qkv, context: output.context, logsumexp: output.logsumexp, reduced, out_reduced })
    }

    /// Rotates queries and keys, each token's side by side.
    fn rotate<E: Dtype>(&self, qkv: &mut [E], len: usize, inverse: bool) -> Result<()> {
        let [q, k, v] = self.widths();
        self.rotate_columns(qkv, (q + k + v, q + k), len, inverse)
    }

    fn rotate_columns<E: Dtype>(
        &self,
        numbers: &mut [E],
        (stride, columns): (usize, usize),
        len: usize,
        inverse: bool,
    ) -> Result<()> {
        let Some(angles) = &self.layer.angles else { return Ok(()) };
        let heads = Heads { stride, columns: 0..columns, head_dim: self.layer.heads.head_dim, rows_per_sequence: len };
        angles.rotate(numbers, &heads, inverse)
    }

    fn with_call<E: Dtype, T>(
        &self,
        qkv: &[E],
        [batch, len]: [usize; 2],
        f: impl FnOnce(&Call<E>) -> Result<T>,
    ) -> Result<T> {
        let HeadSizes { num_heads, num_kv_heads, head_dim, value_dim } = self.layer.heads;
        let [q, k, v] = self.widths();
        let stride = q + k + v;
        let view = |what, start: usize, heads, dim| {
            checked(View::new(what, &qkv[start..], [len * stride, dim, stride], [batch, heads, len, dim]))
        };
        let (query, key) = (view("query", 0, num_heads, head_dim)?, view("key", q, num_kv_heads, head_dim)?);
        let value = view("value", q + k, num_kv_heads, value_dim)?;
        let FusedLayer { scale, softcap, ref mask, dropout, numbers: heads, .. } = self.layer;
        let scale = Some(scale);
        let options = ProblemOptions { scale, softcap, mask: mask.rule(), dropout, heads, ..ProblemOptions::default() };
        f(&Call { q: query, k: key, v: value, options, layout: kernels::Layout::TokensFirst })
    }

    /// The output for a context.
    fn project<E: Dtype>(&self, x: &[E], Kept { context, out_reduced, .. }: &Kept<E>) -> Result<Vec<E>> {
        let branch = &self.layer.branch;
        match &self.layer.out {
            None => checked(add_dropped(branch.residual.then_some(x), context, branch.dropout)),
            Some(out) => branch.output(x, out.forward(context, out_reduced, branch.residual_of_product(x))?),
        }
    }

    /// Whether a score of finite numbers might be larger than the largest number of the type that is computed in.
    fn scores_may_overflow<E: Dtype>(&self, qkv: &[E]) -> bool {
        let magnitudes = qkv.iter().map(|x| kernels::SimdFloat::to_f64(x.widen()).abs()).filter(|x| x.is_finite());
        let largest = magnitudes.fold(0.0, f64::max);
        scores_may_overflow(log_bound_of_scores([largest; 2], self.layer.heads.head_dim, self.layer.scale), E::DTYPE)
    }

    /// The gradients of the context and of W_O's parameters.
    fn gradients_of_out<'g, E: Dtype>(
        &self,
        grad: &'g [E],
        kept: &Kept<E>,
        [batch, len]: [usize; 2],
    ) -> Result<(Cow<'g, [E]>, OfParameters)> {
        let Some(out) = &self.layer.out else { return Ok((Cow::Borrowed(grad), vec![])) };
        let grads = [Columns::all(grad, grad.len() / (batch * len))];
        let (of_context, of_out) = out.backward(&kept.context, &kept.out_reduced, &grads, true)?;
        Ok((Cow::Owned(of_context.unwrap_or_default()), of_out))
    }

    /// The gradients of queries, keys and values before the rotary embedding.
    fn gradients_of_qkv<E: Dtype>(
        &self,
        kept: &Kept<E>,
        of_context: &[E],
        [batch, len]: [usize; 2],
    ) -> Result<[Vec<E>; 3]> {
        let layout = kernels::Layout::TokensFirst;
        let parallel = self.layer.parallel.as_ref();
        let gradients = self.with_call(&kept.qkv, [batch, len], |call| {
            let dims = call.context_dims();
            let view = |what, numbers| checked(View::new(what, numbers, layout.strides(dims), dims));
            let saved = Saved { context: view("context", &kept.context)?, logsumexp: &kept.logsumexp };
            let incoming = Incoming { context: view("gradient of the context", of_context)?, logsumexp: None };
            Ok(call.backward(parallel, saved, incoming, false)?)
        })?;
        let (mut q, mut k) = (gradients.q, gradients.k);
        let [q_width, k_width, _] = self.widths();
        self.rotate_columns(&mut q, (q_width, q_width), len, true)?;
        self.rotate_columns(&mut k, (k_width, k_width), len, true)?;
        Ok([q, k, gradients.v])
    }
}

impl Layer for Op {
    const NAME: &'static str = "self-attention";

    fn forward<E: Dtype>(&self, x: &[E], dims: &[usize]) -> Result<(Vec<E>, Shape)> {
        let [batch, len] = sequences(dims)?;
        let kept = self.attend(x, [batch, len])?;
        let has_non_finite = || kept.logsumexp.iter().any(|x| !kernels::SimdFloat::is_finite(x.value()));
        // Several ranks have looked for that before, since all have to know.
        if self.layer.parallel.is_none() && has_non_finite() && self.scores_may_overflow(&kept.qkv) {
            self.overflows.store(true, Ordering::Relaxed);
        }
        let output = self.project(x, &kept)?;
        let columns = output.len() / (batch * len);
        if self.keeps {
            // The cell is empty, since an operation serves only one call.
            let _ = self.kept.set(Box::new(kept));
        }
        Ok((output, Shape::from((batch, len, columns))))
    }

    fn backward<E: Dtype>(&self, x: &[E], dims: &[usize], grad: &[E], wants_x: bool) -> Result<LayerGradients<E>> {
        let sequences = sequences(dims)?;
        let again;
        let kept = match self.kept.get().and_then(|kept| kept.downcast_ref::<Kept<E>>()) {
            Some(kept) => kept,
            None => {
                again = self.attend(x, sequences)?;
                &again
            }
        };
        let branch = &self.layer.branch;
        let of_output = branch.gradient_of_output(grad)?;
        let (of_context, of_out) = self.gradients_of_out(&of_output, kept, sequences)?;
        let [q, k, v] = self.gradients_of_qkv(kept, &of_context, sequences)?;
        let [q_width, k_width, v_width] = self.widths();
        let grads = [Columns::all(&q, q_width), Columns::all(&k, k_width), Columns::all(&v, v_width)];
        let wants_input = wants_x || branch.wants_input();
        let normed = kept.normed.as_deref().unwrap_or(x);
        let (of_input, of_qkv) = self.layer.qkv.backward(normed, &kept.reduced, &grads, wants_input)?;
        let (of_x, mut gradients) = branch.gradient_of_x(x, of_input, grad)?;
        gradients.extend(of_qkv);
        gradients.extend(of_out);
        Ok((of_x, gradients))
    }
}

/// Batch and len of the dims (batch, len, dim).
fn sequences(dims: &[usize]) -> Result<[usize; 2]> {
    match *dims {
        [batch, len, _] => Ok([batch, len]),
        _ => bail!("expected an input (batch, len, dim), got {dims:?}"),
    }
}
