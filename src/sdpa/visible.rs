//! [`Visible`]: products over the pairs of query and key that the mask allows.
//!
//! What the mask hides may hold anything, infinity and NaN included, and must not reach a result. A hidden weight is
//! zero, but zero times infinity is NaN. So every sum over pairs replaces non-finite numbers by zeros, and adds afterwards
//! what the visible ones among them give.
//!
//! | forward | backward |
//! |---|---|
//! | s = q·kᵀ | dq = ds·k and dk = dsᵀ·q, where ds is zero for hidden pairs |
//! | o = w·v | dw = do·vᵀ and dv = wᵀ·do, where w is zero for hidden pairs |

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, CustomOp3, DType, Layout, MetalStorage, Result, Shape, Tensor};

use crate::mask::Mask;
use crate::sdpa::overflow::{finite_or_zero, is_finite};

/// Which keys each query sees.
#[derive(Clone, Debug)]
pub(crate) struct Visible {
    /// 1 for a visible pair and 0 for a hidden one, in u8. It broadcasts to `scores`.
    pairs: Tensor,
    /// (batch, num_heads, q_len, kv_len)
    scores: (usize, usize, usize, usize),
}

impl Visible {
    /// The pairs that the mask allows and whose bias isn't minus infinity.
    pub(crate) fn new(mask: &Mask, bias: Option<&Tensor>, like: &Tensor, kv_len: usize) -> Result<Self> {
        let (batch, heads, q_len, _) = like.dims4()?;
        let scores = (batch, heads, q_len, kv_len);
        let allowed = mask.to_tensor(scores, like.device())?;
        let pairs = match bias {
            Some(bias) => allowed.broadcast_mul(&bias.detach().ne(f64::NEG_INFINITY)?)?,
            None => allowed,
        };
        Ok(Self { pairs, scores })
    }

    /// `x`, one number for each pair, with `instead` in place of those of hidden pairs. These get a gradient of zero.
    pub(crate) fn keep(&self, x: &Tensor, instead: f64) -> Result<Tensor> {
        let instead = Tensor::new(instead, x.device())?.to_dtype(x.dtype())?.broadcast_as(self.scores)?;
        let kept = self.pairs.broadcast_as(self.scores)?.where_cond(&x.reshape(self.scores)?, &instead)?;
        kept.reshape(x.shape())
    }

    /// q·kᵀ for q (batch, num_kv_heads, rows, dim), where the rows are the queries of a group of heads.
    pub(crate) fn dot_products(&self, q: &Tensor, k: &Tensor) -> Result<Tensor> {
        q.contiguous()?.apply_op2(k, DotProducts(self.clone()))
    }

    /// w·v for weights (batch, num_kv_heads, rows, kv_len) that are 0 for hidden pairs.
    pub(crate) fn weighted_sum(&self, w: &Tensor, v: &Tensor, values_are_finite: bool) -> Result<Tensor> {
        let op = WeightedSum(self.clone());
        if values_are_finite {
            return w.apply_op3(v, &v.detach(), op);
        }
        let sum = w.apply_op3(v, &finite_or_zero(&v.detach())?, op)?;
        sum + non_finite_terms(&w.detach(), &v.detach(), &self.like(w)?)?
    }

    /// The pairs, in the shape and the dtype of `x`, which has one number for each pair.
    fn like(&self, x: &Tensor) -> Result<Tensor> {
        self.pairs.to_dtype(x.dtype())?.broadcast_as(self.scores)?.contiguous()?.reshape(x.shape())
    }
}

/// What infinite and NaN numbers among `rows` add to weights·rows: 0, ±infinity or NaN. `visible` is 1 for the pairs whose
/// terms count, and the weights are at least 0.
fn non_finite_terms(weights: &Tensor, rows: &Tensor, visible: &Tensor) -> Result<Tensor> {
    let number = |is_so: Tensor| is_so.to_dtype(rows.dtype());
    // Whether a pair in `pairs` has one of the `entries`.
    let reached = |pairs: &Tensor, entries: Tensor| pairs.matmul(&number(entries)?)?.gt(0.0);
    let positive = number(weights.gt(0.0)?)?;
    let zero_or_nan = (visible - &positive)?;
    let [up, down] = [f64::INFINITY, f64::NEG_INFINITY].map(|infinity| reached(&positive, rows.eq(infinity)?));
    let nan = reached(visible, rows.ne(rows)?)?;
    let zero_times_infinity = reached(&zero_or_nan, rows.abs()?.eq(f64::INFINITY)?)?;
    let zeros = Tensor::zeros(nan.shape(), rows.dtype(), rows.device())?;
    let term = |is_there: Tensor, number: f64| is_there.where_cond(&(&zeros + number)?, &zeros);
    // Infinities of both signs add up to NaN, as they should.
    let infinities = (term(up?, f64::INFINITY)? + term(down?, f64::NEG_INFINITY)?)?;
    (infinities + term(nan, f64::NAN)?)? + term(zero_times_infinity, f64::NAN)?
}

/// q·kᵀ as an operation whose gradients are free of what is hidden.
struct DotProducts(Visible);

impl DotProducts {
    fn forward<S: BackendStorage>(&self, q: (&S, &Layout), (k, k_layout): (&S, &Layout)) -> Result<(S, Shape)> {
        matmul(q, (k, &k_layout.transpose(2, 3)?))
    }
}

impl CustomOp2 for DotProducts {
    fn name(&self) -> &'static str {
        "dot-products-of-visible-pairs"
    }

    fn cpu_fwd(&self, q: &CpuStorage, ql: &Layout, k: &CpuStorage, kl: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward((q, ql), (k, kl))
    }

    fn cuda_fwd(&self, q: &CudaStorage, ql: &Layout, k: &CudaStorage, kl: &Layout) -> Result<(CudaStorage, Shape)> {
        self.forward((q, ql), (k, kl))
    }

    fn metal_fwd(&self, q: &MetalStorage, ql: &Layout, k: &MetalStorage, kl: &Layout) -> Result<(MetalStorage, Shape)> {
        self.forward((q, ql), (k, kl))
    }

    /// dq = ds·k, dk = dsᵀ·q. Where k or q isn't finite, ds of a visible pair is NaN, or zero because the weight is zero or
    /// the softcap is flat. Zero in place of k or q gives the same NaN, and no other number.
    fn bwd(&self, q: &Tensor, k: &Tensor, _: &Tensor, ds: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (q, k, ds) = (q.detach(), k.detach(), self.0.keep(&ds.detach(), 0.0)?);
        Ok((Some(ds.matmul(&finite_or_zero(&k)?)?), Some(ds.t()?.matmul(&finite_or_zero(&q)?)?)))
    }
}

/// w·v as an operation whose gradients are free of what is hidden. The third input stands in for v in the product: v with
/// zeros in place of non-finite numbers.
struct WeightedSum(Visible);

impl CustomOp3 for WeightedSum {
    fn name(&self) -> &'static str {
        "weighted-sum-of-visible-values"
    }

    fn cpu_fwd(
        &self,
        w: &CpuStorage,
        wl: &Layout,
        _: &CpuStorage,
        _: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        matmul((w, wl), (v, vl))
    }

    fn cuda_fwd(
        &self,
        w: &CudaStorage,
        wl: &Layout,
        _: &CudaStorage,
        _: &Layout,
        v: &CudaStorage,
        vl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        matmul((w, wl), (v, vl))
    }

    fn metal_fwd(
        &self,
        w: &MetalStorage,
        wl: &Layout,
        _: &MetalStorage,
        _: &Layout,
        v: &MetalStorage,
        vl: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        matmul((w, wl), (v, vl))
    }

    /// dw = do·vᵀ, whose hidden entries end at the weights' own mask; dv = wᵀ·do.
    fn bwd(
        &self,
        w: &Tensor,
        v: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (w, v, grad) = (w.detach(), v.detach(), grad.detach().contiguous()?);
        let dw = grad.matmul(&v.t()?)?;
        let mut dv = w.t()?.matmul(&finite_or_zero(&grad)?)?;
        let non_finite = is_finite(&grad)?.eq(0u8)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
        if non_finite > 0.0 {
            dv = (dv + non_finite_terms(&w.t()?, &grad, &self.0.like(&w)?.t()?)?)?;
        }
        Ok((Some(dw), Some(dv), None))
    }
}

/// The product of matrices (batch, heads, rows, columns).
fn matmul<S: BackendStorage>((a, a_layout): (&S, &Layout), (b, b_layout): (&S, &Layout)) -> Result<(S, Shape)> {
    let (batch, heads, rows, inner) = a_layout.shape().dims4()?;
    let columns = b_layout.shape().dims4()?.3;
    let product = a.matmul(b, (batch * heads, rows, columns, inner), a_layout, b_layout)?;
    Ok((product, Shape::from((batch, heads, rows, columns))))
}
