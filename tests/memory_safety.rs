//! The kernels stay inside their tensors: the proof that miri and AddressSanitizer run (CONTRIBUTING.md says how), and an
//! ordinary test besides.
//!
//! A case is computed twice, on views and on copies of them. The copies fill their allocations to the last number, so
//! that miri and the sanitizer see any access beyond; the views stand in the midst of NaN, so that anything computed
//! from beyond shows in the numbers.
//!
//! Miri takes seconds for what takes a millisecond, so it gets each way through the unsafe code once.

mod common;

use candle_attention::{AttentionOptions, Backend, Mask, scaled_dot_product_attention};
use candle_core::{DType, Device, Result, Tensor, Var};
use common::{gradients, max_abs_difference, randn};

#[derive(Clone, Copy, Debug, PartialEq)]
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    q_len: usize,
    kv_len: usize,
    dim: usize,
    value_dim: usize,
}

const SMALL: Sizes = Sizes { batch: 2, heads: 2, kv_heads: 1, q_len: 3, kv_len: 7, dim: 3, value_dim: 2 };
/// One query against a cache.
const DECODING: Sizes = Sizes { q_len: 1, ..SMALL };

/// Lengths and head dims that leave a remainder in every block.
const LARGE: [Sizes; 3] = [
    Sizes { batch: 2, heads: 6, kv_heads: 2, q_len: 1, kv_len: 401, dim: 40, value_dim: 24 },
    Sizes { batch: 1, heads: 3, kv_heads: 3, q_len: 67, kv_len: 35, dim: 17, value_dim: 59 },
    Sizes { batch: 1, heads: 4, kv_heads: 2, q_len: 131, kv_len: 197, dim: 33, value_dim: 9 },
];

/// One of each option, and all together.
fn options(sizes: &Sizes) -> Result<Vec<(&'static str, AttentionOptions)>> {
    let Sizes { batch, heads, q_len, kv_len, .. } = *sizes;
    let plain = AttentionOptions { backend: Backend::Fused, ..Default::default() };
    let masked = |attn_mask| AttentionOptions { attn_mask, ..plain.clone() };
    let biased = |bias| AttentionOptions { attn_bias: Some(bias), ..plain.clone() };
    // The first sequence has no keys at all.
    let lengths = (0..batch).map(|b| (kv_len * b).min(kv_len - 1)).collect::<Vec<_>>();
    let table = randn(7, (q_len, kv_len), DType::F64)?.gt(-0.5)?;
    let bias = randn(8, (heads, q_len, kv_len), DType::F64)?;
    let slopes = randn(9, heads, DType::F64)?.abs()?;
    let sinks = randn(10, heads, DType::F64)?;
    let mut all = vec![
        ("plain", plain.clone()),
        ("log-sum-exp", AttentionOptions { return_logsumexp: true, ..plain.clone() }),
        ("causal", masked(Mask::causal())),
        ("window", masked(Mask::sliding_window(2))),
        ("prefix", masked(Mask::prefix(2) | Mask::causal())),
        ("lengths", masked(Mask::key_lengths(&lengths))),
        ("table", masked(Mask::from_tensor(&table)?)),
        ("softcap", AttentionOptions { softcap: Some(1.5), ..plain.clone() }),
        ("bias", biased(bias.clone())),
        ("key bias", biased(randn(11, (batch, 1, 1, kv_len), DType::F64)?)),
        ("query bias", biased(randn(12, (q_len, 1), DType::F64)?)),
        ("alibi", AttentionOptions { alibi_slopes: Some(slopes.clone()), ..plain.clone() }),
        ("sinks", AttentionOptions { sinks: Some(sinks.clone()), ..plain.clone() }),
        ("dropout", AttentionOptions { dropout_p: 0.3, dropout_seed: 5, ..plain.clone() }),
    ];
    if q_len <= kv_len {
        all.push(("documents", masked(Mask::documents(&[kv_len / 3, kv_len - kv_len / 3]) & Mask::causal())));
    }
    all.push((
        "everything",
        AttentionOptions {
            scale: Some(0.15),
            softcap: Some(3.0),
            attn_mask: Mask::causal() & Mask::key_lengths(&lengths),
            attn_bias: Some(bias),
            alibi_slopes: Some(slopes),
            sinks: Some(sinks),
            dropout_p: 0.2,
            dropout_seed: 6,
            return_logsumexp: true,
            ..plain
        },
    ));
    Ok(all)
}

/// A tensor that is to be seen through [`Spread::view`].
struct Spread {
    base: Var,
}

impl Spread {
    /// (batch, heads, len, dim), stored as (batch, len, heads, dim) with NaN at both ends of each row and of each sequence.
    fn new(seed: u64, (batch, heads, len, dim): (usize, usize, usize, usize), dtype: DType) -> Result<Self> {
        let numbers = common::numbers(&randn(seed, (batch, len, heads, dim), DType::BF16)?)?;
        let mut spread = vec![f64::NAN; batch * (len + 2) * heads * (dim + 2)];
        for (row, numbers) in numbers.chunks_exact(dim).enumerate() {
            let (sequence, row) = (row / (len * heads), row % (len * heads));
            let place = (sequence * (len + 2) + 1) * heads + row;
            spread[place * (dim + 2) + 1..][..dim].copy_from_slice(numbers);
        }
        let x = Tensor::from_vec(spread, (batch, len + 2, heads, dim + 2), &Device::Cpu)?.to_dtype(dtype)?;
        Ok(Self { base: Var::from_tensor(&x)? })
    }

    /// The numbers inside, of this tensor or of one like it.
    fn view(x: &Tensor) -> Result<Tensor> {
        let (_, len, _, dim) = x.dims4()?;
        x.narrow(1, 1, len - 2)?.narrow(3, 1, dim - 2)?.transpose(1, 2)
    }
}

/// Context, log-sum-exp and gradients of `vars`, of which the first three, seen through `view`, are query, key and value.
fn run(vars: &[&Var], view: impl Fn(&Tensor) -> Result<Tensor>, options: &AttentionOptions) -> Result<Vec<Tensor>> {
    let output = scaled_dot_product_attention(&view(vars[0])?, &view(vars[1])?, &view(vars[2])?, options)?;
    let context = output.context;
    let mut loss = (&context * randn(4, context.shape(), context.dtype())?)?.sum_all()?.to_dtype(DType::F64)?;
    if let Some(logsumexp) = &output.logsumexp {
        let seen = logsumexp.gt(f64::NEG_INFINITY)?.where_cond(logsumexp, &logsumexp.zeros_like()?)?;
        loss = (loss + seen.sum_all()?.to_dtype(DType::F64)?)?;
    }
    let mut results = vec![context.detach()];
    results.extend(output.logsumexp.map(|x| x.detach()));
    for (i, gradient) in gradients(&loss, vars)?.into_iter().enumerate() {
        results.push(if i < 3 { view(&gradient)? } else { gradient });
    }
    Ok(results)
}

/// That views give what their copies give, with bias and sinks trained, or constants.
fn check(sizes: &Sizes, options: &AttentionOptions, dtype: DType, trained: bool, what: &str) -> Result<()> {
    let Sizes { batch, heads, kv_heads, q_len, kv_len, dim, value_dim } = *sizes;
    let spread = [
        Spread::new(1, (batch, heads, q_len, dim), dtype)?,
        Spread::new(2, (batch, kv_heads, kv_len, dim), dtype)?,
        Spread::new(3, (batch, kv_heads, kv_len, value_dim), dtype)?,
    ];
    let copies = spread.each_ref().map(|x| Var::from_tensor(&Spread::view(&x.base)?.contiguous()?));
    let [q, k, v] = copies;
    let extra = [&options.attn_bias, &options.sinks].map(|x| x.as_ref().filter(|_| trained).map(Var::from_tensor));
    let [bias, sinks] = extra.map(Option::transpose);
    let (bias, sinks) = (bias?, sinks?);
    let tensor =
        |var: &Option<Var>, or: &Option<Tensor>| var.as_ref().map_or(or.clone(), |x| Some(x.as_tensor().clone()));
    let options = AttentionOptions {
        attn_bias: tensor(&bias, &options.attn_bias),
        sinks: tensor(&sinks, &options.sinks),
        ..options.clone()
    };
    let with_extra = |own: [&Var; 3]| own.into_iter().chain(&bias).chain(&sinks).cloned().collect::<Vec<_>>();
    let views = with_extra(spread.each_ref().map(|x| &x.base));
    let copies = with_extra([&q?, &k?, &v?]);
    let of_copies = run(&copies.iter().collect::<Vec<_>>(), |x| Ok(x.clone()), &options)?;
    if cfg!(miri) && !(what == "everything" && trained) {
        return Ok(());
    }
    let of_views = run(&views.iter().collect::<Vec<_>>(), Spread::view, &options)?;
    for (i, (view, copy)) in of_views.iter().zip(&of_copies).enumerate() {
        // A gradient that flows back through a view is added to zeros, which makes 0 of -0.
        let difference = max_abs_difference(view, copy)?;
        assert!(difference == 0.0, "{what}, {dtype:?}, {sizes:?}, trained: {trained}, result {i}: {difference:e}");
    }
    Ok(())
}

fn check_all(dtype: DType, all_sizes: &[Sizes]) -> Result<()> {
    for sizes in all_sizes {
        for (what, options) in options(sizes)? {
            let alone = ["plain", "causal", "softcap", "bias", "key bias", "dropout"].contains(&what);
            let first = (dtype, *sizes) == (DType::F32, SMALL);
            if cfg!(miri) && what != "everything" && !(alone && first) {
                continue;
            }
            check(sizes, &options, dtype, false, what)?;
            if (options.attn_bias.is_some() || options.sinks.is_some()) && (first || !cfg!(miri)) {
                check(sizes, &options, dtype, true, what)?;
            }
        }
    }
    Ok(())
}

/// For miri without other threads: rayon's queues break Stacked Borrows, the rules of who may use which pointer.
fn on_this_thread(f: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    if !cfg!(miri) {
        return f();
    }
    rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build().expect("a pool").install(f)
}

#[test]
fn small_views_equal_copies() -> Result<()> {
    on_this_thread(|| {
        check_all(DType::F32, &[SMALL, DECODING])?;
        check_all(DType::F64, &[SMALL, DECODING])?;
        check_all(DType::F16, &[SMALL])?;
        check_all(DType::BF16, &[DECODING])
    })
}

#[test]
#[cfg_attr(miri, ignore = "takes hours")]
fn large_views_equal_copies() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        check_all(dtype, &LARGE)?;
    }
    Ok(())
}

/// More keys than a block of either pass, more queries than a block of either, and keys shared out over tasks.
#[test]
fn blocks_stay_inside_their_tensors() -> Result<()> {
    let thin = Sizes { batch: 1, heads: 1, kv_heads: 1, q_len: 1, kv_len: 390, dim: 1, value_dim: 1 };
    let causal = AttentionOptions { attn_mask: Mask::causal(), backend: Backend::Fused, ..Default::default() };
    on_this_thread(|| {
        for sizes in [thin, Sizes { q_len: 131, kv_len: 3, ..thin }] {
            check(&sizes, &causal, DType::F32, false, "blocks")?;
        }
        Ok(())
    })
}

/// So long that tasks go to several threads, which miri watches for races; all but a few keys are masked, for its sake.
#[test]
fn threads_write_apart() -> Result<()> {
    let sizes = Sizes { batch: 1, heads: 2, kv_heads: 2, q_len: 32, kv_len: 2000, dim: 2, value_dim: 2 };
    let options = AttentionOptions {
        attn_mask: Mask::prefix(2) | Mask::sliding_window(2),
        backend: Backend::Fused,
        ..Default::default()
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("a pool");
    pool.install(|| check(&sizes, &options, DType::F32, false, "threads"))
}
