//! One call on one process, and the same call on several ranks.

use candle_attention::parallel::{ContextParallel, Order, Scheme, Split, threads};
use candle_attention::{AttentionOptions, Mask, Result, scaled_dot_product_attention};
use candle_core::{DType, Device, Tensor, Var};

use crate::common::{max_scaled_difference, randn};

pub const RANKS: [usize; 5] = [1, 2, 3, 4, 7];
pub const ORDERS: [Order; 2] = [Order::Contiguous, Order::ZigZag];

#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub len: usize,
    pub dim: usize,
    pub value_dim: usize,
}

/// A call, in full.
#[derive(Clone)]
pub struct Case {
    pub name: &'static str,
    pub options: AttentionOptions,
    /// Whether the sinks get a gradient.
    pub sinks: bool,
}

/// Every kind of mask, each other option, and many together. Masks and biases are those of the whole sequence.
pub fn cases(sizes: &Sizes) -> Result<Vec<Case>> {
    let Sizes { batch, heads, len, .. } = *sizes;
    let masked =
        |name, attn_mask| Case { name, options: AttentionOptions { attn_mask, ..Default::default() }, sinks: false };
    let with = |name, options| Case { name, options, sinks: false };
    let lengths: Vec<usize> = (0..batch).map(|b| len * (b + 1) / (batch + 1)).collect();
    let ids: Vec<Vec<u32>> =
        (0..batch).map(|b| (0..len).map(|j| (j * (b + 2) / len.max(1)) as u32).collect()).collect();
    let documents = [len / 3, len / 2 - len / 3, len - len / 2];
    let bits = |seed, dims: &[usize]| randn(seed, dims.to_vec(), DType::F64)?.gt(-0.5);
    let table = Mask::from_tensor(&bits(50, &[batch, heads, len, len])?)?;
    let padding = Mask::from_padding_mask(&bits(51, &[batch, len])?)?;
    let offsets: Vec<i64> = (0..batch as i64).map(|b| b - 1).collect();
    let bias = |seed, dims: &[usize]| Ok::<_, candle_core::Error>(Some(randn(seed, dims.to_vec(), DType::F64)?));
    let slopes = Some((randn(54, heads, DType::F64)?.abs()? * 0.1)?);
    let causal = Mask::causal;
    let dropout = |p, seed| AttentionOptions { dropout_p: p, dropout_seed: seed, ..Default::default() };
    Ok(vec![
        masked("no mask", Mask::full()),
        masked("causal", causal()),
        masked("sliding window", Mask::sliding_window(4)),
        masked("window on both sides", Mask::window(Some(3), Some(2))),
        masked("prefix", Mask::prefix(5) | causal()),
        masked("key lengths", Mask::key_lengths(&lengths)),
        masked("documents", Mask::documents(&documents) & causal()),
        masked("document ids", Mask::document_ids(&ids)),
        masked("table", table.clone()),
        masked("padding", padding & causal()),
        masked("offsets", causal().with_offsets(&offsets)),
        masked("nothing", Mask::sliding_window(0)),
        with("softcap and scale", AttentionOptions { softcap: Some(2.0), scale: Some(0.7), ..Default::default() }),
        with("dropout", dropout(0.3, 7)),
        with("causal dropout", AttentionOptions { attn_mask: causal(), ..dropout(0.5, 8) }),
        with("bias", AttentionOptions { attn_bias: bias(52, &[1, heads, len, len])?, ..Default::default() }),
        with(
            "key bias",
            AttentionOptions { attn_bias: bias(53, &[batch, 1, 1, len])?, attn_mask: causal(), ..Default::default() },
        ),
        with("alibi", AttentionOptions { alibi_slopes: slopes.clone(), attn_mask: causal(), ..Default::default() }),
        with(
            "alibi of each sequence",
            AttentionOptions {
                alibi_slopes: Some((randn(56, (batch, heads), DType::F64)?.abs()? * 0.1)?),
                ..Default::default()
            },
        ),
        with("log-sum-exp", AttentionOptions { return_logsumexp: true, attn_mask: causal(), ..Default::default() }),
        Case { sinks: true, ..masked("sinks", causal()) },
        Case {
            name: "everything",
            options: AttentionOptions {
                scale: Some(0.4),
                softcap: Some(3.0),
                attn_mask: causal() & table,
                attn_bias: bias(55, &[1, heads, 1, len])?,
                alibi_slopes: slopes,
                return_logsumexp: true,
                ..dropout(0.2, 9)
            },
            sinks: true,
        },
    ])
}

/// Context, log-sum-exp if there is one, and the gradients of query, key, value and, if there are any, sinks, of the whole sequence.
pub fn results(sizes: &Sizes, case: &Case, dtype: DType, ranks: Option<(Split, Scheme)>) -> Result<Vec<Tensor>> {
    results_of(sizes, case, [dtype; 2], ranks)
}

/// As [`results`], in the second dtype, for inputs that were rounded to the first.
pub fn results_of(
    sizes: &Sizes,
    case: &Case,
    [rounded, dtype]: [DType; 2],
    ranks: Option<(Split, Scheme)>,
) -> Result<Vec<Tensor>> {
    let Sizes { batch, heads, kv_heads, len, dim, value_dim } = *sizes;
    let draw = |seed, shape: &[usize]| randn(seed, shape.to_vec(), rounded)?.to_dtype(dtype);
    let q = draw(1, &[batch, heads, len, dim])?;
    let k = draw(2, &[batch, kv_heads, len, dim])?;
    let v = draw(3, &[batch, kv_heads, len, value_dim])?;
    let grads = [draw(4, &[batch, heads, len, value_dim])?, draw(5, &[batch, heads, len])?];
    let run = |parallel: Option<ContextParallel>| -> Result<Vec<Tensor>> {
        let shard = |x: &Tensor| match &parallel {
            Some(parallel) => parallel.split.shard(x, 2, parallel.communicator.rank()),
            None => Ok(x.clone()),
        };
        let var = |x: &Tensor| Ok::<_, candle_attention::Error>(Var::from_tensor(&shard(x)?.contiguous()?)?);
        let vars = [var(&q)?, var(&k)?, var(&v)?];
        let sinks = Var::from_tensor(&draw(6, &[heads])?)?;
        let options = AttentionOptions {
            parallel: parallel.clone(),
            sinks: case.sinks.then(|| sinks.as_tensor().clone()),
            ..case.options.clone()
        };
        let output = scaled_dot_product_attention(&vars[0], &vars[1], &vars[2], &options)?;
        let mut loss = (&output.context * shard(&grads[0])?)?.sum_all()?;
        let mut results = vec![output.context.detach()];
        if let Some(logsumexp) = &output.logsumexp {
            loss = (loss + (logsumexp * shard(&grads[1])?)?.sum_all()?)?;
            results.push(logsumexp.detach());
        }
        let grads = loss.backward()?;
        let wanted = vars.iter().chain(case.sinks.then_some(&sinks));
        results.extend(wanted.map(|var| grads.get(var).expect("a gradient").clone()));
        Ok(results)
    };
    let Some((split, scheme)) = ranks else { return run(None) };
    let of_ranks = threads(split.ranks(), |communicator| run(Some(ContextParallel { communicator, split, scheme })))?;
    let joined = (0..of_ranks[0].len()).map(|i| {
        let parts: Vec<_> = of_ranks.iter().map(|results| results[i].clone()).collect();
        if parts[0].rank() == 1 {
            // The gradient of a parameter is the sum over the ranks.
            return Ok(Tensor::stack(&parts, 0)?.sum(0)?);
        }
        split.join(&parts, 2)
    });
    joined.collect()
}

/// Panics unless ranks give what one process gives.
#[track_caller]
pub fn check(sizes: &Sizes, case: &Case, dtype: DType, split: Split, scheme: Scheme) {
    let tolerance = if dtype == DType::F64 { 1e-12 } else { 1e-5 };
    let expected = results(sizes, case, dtype, None).unwrap();
    let what = format!("{}, {split:?}, {scheme:?}, {dtype:?}", case.name);
    let got = results(sizes, case, dtype, Some((split, scheme))).unwrap_or_else(|error| panic!("{what}: {error}"));
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let difference = max_scaled_difference(got, expected).unwrap();
        assert!(difference < tolerance, "{what}, result {i}: differ by {difference:e}\n{got}\n{expected}");
    }
}

/// The root of the mean of the squares of the errors.
pub fn error(x: &Tensor, exact: &Tensor) -> Result<f64> {
    Ok((x.to_dtype(DType::F64)? - exact)?.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt())
}

/// Positions as a tensor.
pub fn ids(positions: impl Iterator<Item = usize>) -> Result<Tensor> {
    let ids: Vec<i64> = positions.map(|position| position as i64).collect();
    let len = ids.len();
    Ok(Tensor::from_vec(ids, len, &Device::Cpu)?)
}
