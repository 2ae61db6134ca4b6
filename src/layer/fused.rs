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

use attention_kernels::matmul::{Operand, Plain, matmul, matmul_side_by_side, matmul_sum};
use attention_kernels::residual::add_dropped;
use attention_kernels::rotary::Heads;
use attention_kernels::{
    self as kernels, BackwardOptions, Dropout, Incoming, LogSumExp, Problem, ProblemOptions, Saved, View,
};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use candle_nn::Linear;

use crate::block::branch::OwnBranch;
use crate::block::epilogue::Add;
use crate::block::op::{Dtype, with_dtype};
use crate::block::operand::{
    Columns, ReadLinear, Reading, checked, linear_gradients, rows, tensor, with_contiguous_bias,
};
use crate::block::relay::{Gradients, relay};
use crate::gradient::to_be_added;
use crate::mask::Mask;
use crate::memory;
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
    pub(super) qkv: [Linear; 3],
    pub(super) out: Option<Linear>,
    pub(super) branch: OwnBranch,
    pub(super) scale: f64,
    pub(super) softcap: Option<f64>,
    pub(super) mask: Mask,
    /// Dropout of the weights.
    pub(super) dropout: Option<Dropout>,
    pub(super) angles: Option<KernelAngles>,
}

impl FusedLayer {
    /// The output for x (batch, len, embed_dim), or `None` if scores may have overflowed: what is to be done then is decided elsewhere.
    /// (A row whose log-sum-exp is not finite otherwise sees no key, or an input that isn't finite itself.)
    pub(super) fn forward(mut self, x: &Tensor) -> Result<Option<Tensor>> {
        let x = memory::contiguous("input of attention", x)?;
        for linear in self.qkv.iter_mut().chain(&mut self.out) {
            *linear = with_contiguous_bias(linear)?;
        }
        let parameters = self.parameters();
        let keeps = !self.branch.recompute && (x.track_op() || parameters.iter().any(Tensor::track_op));
        let (relay, gradients) = relay(&parameters)?;
        let overflows = Arc::new(AtomicBool::new(false));
        let op = Op { layer: self, keeps, kept: OnceLock::new(), gradients, overflows: overflows.clone() };
        let output = x.apply_op2(&relay, op)?;
        Ok((!overflows.load(Ordering::Relaxed)).then_some(output))
    }

    /// Every parameter, in the order of [`Op::backward`].
    fn parameters(&self) -> Vec<Tensor> {
        let linears = self.qkv.iter().chain(&self.out);
        let linears = linears.flat_map(|linear| std::iter::once(linear.weight()).chain(linear.bias())).cloned();
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
}

struct Op {
    layer: FusedLayer,
    keeps: bool,
    /// The [`Kept`] of the call's type.
    kept: OnceLock<Box<dyn Any + Send + Sync>>,
    gradients: Gradients,
    overflows: Arc<AtomicBool>,
}

impl Op {
    /// The columns of queries, keys and values in a row of `qkv`.
    fn widths(&self) -> [usize; 3] {
        let HeadSizes { num_heads, num_kv_heads, head_dim, value_dim } = self.layer.heads;
        [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * value_dim]
    }

    /// Everything up to the context.
    fn attend<E: Dtype>(&self, x: &[E], [batch, len, dim]: [usize; 3]) -> Result<Kept<E>> {
        let layer = &self.layer;
        let normed = layer.branch.input(x)?;
        let read = layer.qkv.each_ref().map(ReadLinear::new);
        let [q, k, v] = read.each_ref().map(|linear| Ok::<_, candle_core::Error>(linear.weight::<E>()?.transposed()));
        let weights = [q?, k?, v?];
        let bias = self.biases::<E>(&read)?;
        let add = Add { bias: bias.as_deref(), rows: None, columns: self.widths().iter().sum() };
        let mut qkv = checked(matmul_side_by_side(rows("input of attention", &normed, dim)?, &weights, &add))?;
        self.rotate(&mut qkv, len, false)?;
        let output = self.with_problem(&qkv, [batch, len], |problem| {
            checked(kernels::forward(problem, kernels::Layout::TokensFirst))
        })?;
        let normed = match normed {
            Cow::Owned(normed) => Some(normed),
            Cow::Borrowed(_) => None,
        };
        Ok(Kept { normed, qkv, context: output.context, logsumexp: output.logsumexp })
    }

    /// The biases of the projections, one behind the other. A missing one is zero.
    fn biases<E: Dtype>(&self, linears: &[ReadLinear; 3]) -> Result<Option<Vec<E>>> {
        let [q, k, v] = linears.each_ref().map(ReadLinear::bias::<E>);
        let biases = [q?, k?, v?];
        if biases.iter().all(Option::is_none) {
            return Ok(None);
        }
        let mut all = Vec::new();
        for (bias, width) in biases.into_iter().zip(self.widths()) {
            match bias {
                Some(bias) => all.extend_from_slice(bias),
                None => all.resize(all.len() + width, E::zero()),
            }
        }
        Ok(Some(all))
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

    fn with_problem<E: Dtype, T>(
        &self,
        qkv: &[E],
        [batch, len]: [usize; 2],
        f: impl FnOnce(&Problem<E>) -> Result<T>,
    ) -> Result<T> {
        let HeadSizes { num_heads, num_kv_heads, head_dim, value_dim } = self.layer.heads;
        let [q, k, v] = self.widths();
        let stride = q + k + v;
        let view = |what, start: usize, heads, dim| {
            checked(View::new(what, &qkv[start..], [len * stride, dim, stride], [batch, heads, len, dim]))
        };
        let (query, key) = (view("query", 0, num_heads, head_dim)?, view("key", q, num_kv_heads, head_dim)?);
        let value = view("value", q + k, num_kv_heads, value_dim)?;
        let FusedLayer { scale, softcap, ref mask, dropout, .. } = self.layer;
        let options =
            ProblemOptions { scale: Some(scale), softcap, mask: mask.rule(), dropout, ..ProblemOptions::default() };
        f(&checked(Problem::new(query, key, value, options))?)
    }

    /// The output for a context.
    fn project<E: Dtype>(&self, x: &[E], context: &[E]) -> Result<Vec<E>> {
        let branch = &self.layer.branch;
        let Some(out) = &self.layer.out else {
            return checked(add_dropped(branch.residual.then_some(x), context, branch.dropout));
        };
        let (columns, inputs) = out.weight().dims2()?;
        let read = ReadLinear::new(out);
        let add = Add { bias: read.bias()?, rows: branch.residual_of_product(x), columns };
        let weight = read.weight::<E>()?.transposed();
        branch.output(x, checked(matmul(rows("context", context, inputs)?, weight, &add))?)
    }

    fn forward<E: Dtype>(&self, x: (&CpuStorage, &Layout)) -> Result<(CpuStorage, Shape)> {
        let (numbers, dims) = input::<E>(x)?;
        let kept = self.attend(numbers, dims)?;
        let has_non_finite = kept.logsumexp.iter().any(|x| !kernels::SimdFloat::is_finite(x.value()));
        if has_non_finite && self.scores_may_overflow(&kept.qkv) {
            self.overflows.store(true, Ordering::Relaxed);
        }
        let output = self.project(numbers, &kept.context)?;
        let columns = output.len() / (dims[0] * dims[1]);
        if self.keeps {
            // The cell is empty, since an operation serves only one call.
            let _ = self.kept.set(Box::new(kept));
        }
        Ok((E::to_cpu_storage_owned(output), Shape::from((dims[0], dims[1], columns))))
    }

    /// Whether a score of finite numbers might be larger than the largest number of the type that is computed in.
    fn scores_may_overflow<E: Dtype>(&self, qkv: &[E]) -> bool {
        let magnitudes = qkv.iter().map(|x| kernels::SimdFloat::to_f64(x.widen()).abs()).filter(|x| x.is_finite());
        let largest = magnitudes.fold(0.0, f64::max);
        let limit = if E::DTYPE == DType::F64 { f64::MAX } else { f64::from(f32::MAX) };
        // In logarithms, which don't overflow. A margin of 1 covers the rounding of the sum.
        let FusedLayer { heads, scale, .. } = &self.layer;
        2.0 * largest.ln() + (heads.head_dim as f64).ln() + scale.abs().max(1.0).ln() > limit.ln() - 1.0
    }

    /// The gradient of x. The parameters' gradients are left to the relay.
    fn backward<E: Dtype>(&self, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let (x_read, grad_read) = (Reading::new(x), Reading::new(grad));
        let (numbers, grad) = (x_read.numbers::<E>()?, grad_read.numbers::<E>()?);
        let (batch, len, dim) = x.dims3()?;
        let again;
        let kept = match self.kept.get().and_then(|kept| kept.downcast_ref::<Kept<E>>()) {
            Some(kept) => kept,
            None => {
                again = self.attend(numbers, [batch, len, dim])?;
                &again
            }
        };
        let of_output = self.layer.branch.gradient_of_output(grad)?;
        let (of_context, of_out) = self.gradients_of_out(&of_output, &kept.context)?;
        let qkv = self.gradients_of_qkv(kept, &of_context, [batch, len])?;
        let normed = kept.normed.as_deref().unwrap_or(numbers);
        let mut of_linears = Vec::new();
        for ((linear, grad), width) in self.layer.qkv.iter().zip(&qkv).zip(self.widths()) {
            of_linears.extend(linear_gradients(linear, Columns::all(grad, width), normed)?);
        }
        let of_normed = self.gradient_of_normed(&qkv)?;
        let (of_x, mut gradients) = self.layer.branch.gradient_of_x(numbers, of_normed, grad)?;
        gradients.extend(of_linears);
        gradients.extend(of_out);
        self.gradients.leave(gradients);
        tensor(of_x, x.shape())
    }

    /// The gradients of the context and of W_O's parameters.
    fn gradients_of_out<'g, E: Dtype>(&self, grad: &'g [E], context: &[E]) -> Result<(Cow<'g, [E]>, OfParameters)> {
        let Some(out) = &self.layer.out else { return Ok((Cow::Borrowed(grad), vec![])) };
        let outputs = out.weight().dim(0)?;
        let read = ReadLinear::new(out);
        let of_context = checked(matmul(rows("gradient", grad, outputs)?, read.weight::<E>()?, &Plain))?;
        Ok((Cow::Owned(of_context), linear_gradients(out, Columns::all(grad, outputs), context)?))
    }

    /// The gradients of queries, keys and values before the rotary embedding.
    fn gradients_of_qkv<E: Dtype>(
        &self,
        kept: &Kept<E>,
        of_context: &[E],
        [batch, len]: [usize; 2],
    ) -> Result<[Vec<E>; 3]> {
        let layout = kernels::Layout::TokensFirst;
        let gradients = self.with_problem(&kept.qkv, [batch, len], |problem| {
            let dims = problem.context_dims();
            let view = |what, numbers| checked(View::new(what, numbers, layout.strides(dims), dims));
            let saved = Saved { context: view("context", &kept.context)?, logsumexp: &kept.logsumexp };
            let incoming = Incoming { context: view("gradient of the context", of_context)?, logsumexp: None };
            checked(kernels::backward(problem, saved, incoming, BackwardOptions { layout, bias: false }))
        })?;
        let (mut q, mut k) = (gradients.q, gradients.k);
        let [q_width, k_width, _] = self.widths();
        self.rotate_columns(&mut q, (q_width, q_width), len, true)?;
        self.rotate_columns(&mut k, (k_width, k_width), len, true)?;
        Ok([q, k, gradients.v])
    }

    /// dq · W_Q + dk · W_K + dv · W_V
    fn gradient_of_normed<E: Dtype>(&self, qkv: &[Vec<E>; 3]) -> Result<Vec<E>> {
        let read = self.layer.qkv.each_ref().map(ReadLinear::new);
        let mut pairs: Vec<(Operand<E>, Operand<E>)> = Vec::new();
        for ((grad, linear), width) in qkv.iter().zip(&read).zip(self.widths()) {
            pairs.push((rows("gradient", grad, width)?, linear.weight()?));
        }
        checked(matmul_sum(&pairs, &Plain))
    }
}

/// The numbers and the sizes of x (batch, len, dim).
fn input<'a, E: Dtype>((storage, layout): (&'a CpuStorage, &Layout)) -> Result<(&'a [E], [usize; 3])> {
    let dims = layout.shape().dims3()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok((&storage.as_slice::<E>()?[start..end], dims.into())),
        None => bail!("expected a contiguous input, got strides {:?}", layout.stride()),
    }
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "self-attention"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        with_dtype!(x.dtype(), E => self.forward::<E>((x, layout)))
    }

    fn bwd(&self, x: &Tensor, relay: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = memory::contiguous("gradient of attention", &grad.detach())?;
        let detached = x.detach();
        let of_x = with_dtype!(x.dtype(), E => self.backward::<E>(&detached, &grad))?;
        // It goes nowhere if the input is a constant.
        let of_relay = relay.track_op().then(|| relay.zeros_like()).transpose()?;
        Ok((x.track_op().then(|| to_be_added(of_x)).transpose()?, of_relay))
    }
}
