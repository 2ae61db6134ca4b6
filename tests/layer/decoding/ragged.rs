//! Sequences of different lengths side by side: each has the outputs that it has alone.

use candle_attention::{Backend, ForwardOptions, KvCache, Mask, Result, SelfAttention};
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use crate::common::{Random, assert_close, max_scaled_difference, randn};
use crate::layers::self_attention;

use super::setup::{EMBED_DIM, config, configs, tolerance};

/// Rows `starts[b]..starts[b] + len` of each sequence, with random numbers beyond the end of x.
fn pieces(x: &Tensor, starts: &[usize], len: usize) -> Result<Tensor> {
    let padded = Tensor::cat(&[x, &randn(99, (x.dim(0)?, len, EMBED_DIM), x.dtype())?], 1)?;
    let rows: Vec<_> = starts
        .iter()
        .enumerate()
        .map(|(b, &start)| padded.narrow(0, b, 1)?.narrow(1, start, len))
        .collect::<candle_core::Result<_>>()?;
    Ok(Tensor::cat(&rows, 0)?)
}

/// Checks that the first `added[b]` outputs of each sequence are those of the whole from `starts[b]` on.
fn assert_rows(
    output: &Tensor,
    (whole, tolerance): (&Tensor, f64),
    starts: &[usize],
    added: &[usize],
    what: &str,
) -> Result<()> {
    for (b, (&start, &added)) in starts.iter().zip(added).enumerate() {
        let expected = whole.get(b)?.narrow(0, start, added)?;
        assert_close(&output.get(b)?.narrow(0, 0, added)?, &expected, tolerance, &format!("{what}, sequence {b}"));
    }
    Ok(())
}

/// Decodes prompts of these lengths, then three single tokens and a piece of two tokens. `whole` are the outputs for all of x at once,
/// with the bound on the difference from them.
fn check(
    layer: &SelfAttention,
    (x, whole): (&Tensor, (&Tensor, f64)),
    lengths: &[usize],
    options: &ForwardOptions,
    what: &str,
) -> Result<KvCache> {
    let mut cache = layer.kv_cache(lengths.len())?;
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let zeros = vec![0; lengths.len()];
    let output = layer.prefill(&pieces(x, &zeros, longest)?, lengths, &mut cache)?;
    assert_rows(&output, whole, &zeros, lengths, what)?;
    for len in [1, 1, 2, 1] {
        let starts = cache.lengths().to_vec();
        let output = layer.forward_cached_with(&pieces(x, &starts, len)?, &mut cache, options)?.output;
        assert_rows(&output, whole, &starts, &vec![len; starts.len()], what)?;
    }
    Ok(cache)
}

#[test]
fn each_sequence_equals_itself_alone_and_whole() -> Result<()> {
    for (name, config) in configs() {
        for dtype in [DType::F32, DType::F64] {
            for backend in [Backend::Reference, Backend::Fused] {
                let layer = self_attention(&config, dtype)?;
                let x = randn(2, (4, 20, EMBED_DIM), dtype)?;
                let options = ForwardOptions { backend, ..Default::default() };
                let (whole, what) =
                    (layer.forward_with(&x, &options)?.output, format!("{name}, {dtype:?}, {backend:?}"));
                let cache = check(&layer, (&x, (&whole, tolerance(dtype))), &[15, 3, 0, 8], &options, &what)?;
                assert_eq!(cache.lengths(), [20, 8, 5, 13]);
            }
        }
    }
    Ok(())
}

/// Over hundreds of keys two ways in f32 differ by the errors of both. So decoding is held against f64: it errs by no more than twice what
/// the whole sequence at once does.
#[test]
fn each_sequence_equals_itself_on_the_decode_kernel() -> Result<()> {
    for (name, config) in configs() {
        let (layer, exact) = (self_attention(&config, DType::F32)?, self_attention(&config, DType::F64)?);
        for (exact, rounded) in exact.vars().iter().zip(layer.vars()) {
            exact.set(&rounded.to_dtype(DType::F64)?)?;
        }
        let x = randn(2, (3, 305, EMBED_DIM), DType::F32)?;
        let options = ForwardOptions { backend: Backend::Fused, ..Default::default() };
        let whole = exact.forward_with(&x.to_dtype(DType::F64)?, &options)?.output.to_dtype(DType::F32)?;
        let of_whole = max_scaled_difference(&layer.forward_with(&x, &options)?.output, &whole)?;
        assert!(of_whole < 2e-6, "{name}: {of_whole}");
        check(&layer, (&x, (&whole, 2.0 * of_whole)), &[300, 4, 150], &options, name)?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Padded pieces of any lengths, with drafts that are removed in between.
    #[test]
    fn any_lengths_equal_the_whole(which in 0..configs().len(), seed in any::<u64>(), batch in 1..4usize) {
        let (name, config) = &configs()[which];
        let layer = self_attention(config, DType::F64).unwrap();
        let x = randn(seed, (batch, 60, EMBED_DIM), DType::F64).unwrap();
        let whole = layer.forward(&x).unwrap();
        let mut random = Random::new(seed);
        let mut cache = layer.kv_cache(batch).unwrap();
        for _ in 0..8 {
            let len = 1 + random.below(7);
            let added: Vec<_> = (0..batch).map(|_| random.below(len + 1)).collect();
            let starts = cache.lengths().to_vec();
            let output = layer.prefill(&pieces(&x, &starts, len).unwrap(), &added, &mut cache).unwrap();
            assert_rows(&output, (&whole, tolerance(DType::F64)), &starts, &added, name).unwrap();
            if random.below(3) == 0 {
                // Keeps some of the tokens that the last call added.
                let kept: Vec<_> = starts.iter().zip(&added).map(|(start, added)| start + random.below(added + 1)).collect();
                cache.truncate_each(&kept).unwrap();
                prop_assert_eq!(cache.lengths(), &kept[..]);
            }
        }
    }
}

/// A mask that depends on positions uses those of each sequence, and so does a bias.
#[test]
fn mask_and_bias_follow_each_sequence() -> Result<()> {
    let layer = self_attention(&config("alibi with sinks"), DType::F64)?;
    let lengths = [6, 2];
    let x = randn(2, (2, 7, EMBED_DIM), DType::F64)?;
    let mut cache = layer.kv_cache(2)?;
    layer.prefill(&pieces(&x, &[0, 0], 6)?, &lengths, &mut cache)?;
    let bias = randn(3, (2, 1, 1, 7), DType::F64)?;
    let options = ForwardOptions {
        attn_mask: Mask::sliding_window(2) | Mask::prefix(1),
        attn_bias: Some(bias.clone()),
        return_weights: true,
        ..Default::default()
    };
    let step = layer.forward_cached_with(&pieces(&x, &lengths, 1)?, &mut cache, &options)?;
    let weights = step.weights.expect("weights");
    for (b, len) in lengths.into_iter().enumerate() {
        let alone = ForwardOptions { attn_bias: Some(bias.get(b)?.narrow(2, 0, len + 1)?), ..options.clone() };
        let whole = layer.forward_with(&x.narrow(0, b, 1)?.narrow(1, 0, len + 1)?, &alone)?;
        assert_close(&step.output.get(b)?, &whole.output.get(0)?.narrow(0, len, 1)?, 1e-12, "output");
        let expected = whole.weights.expect("weights").get(0)?.narrow(1, len, 1)?;
        assert_close(&weights.get(b)?.narrow(2, 0, len + 1)?, &expected, 1e-12, "weights");
    }
    // A key that the shorter sequence doesn't have has no weight.
    assert_eq!(weights.get(1)?.narrow(2, 3, 4)?.abs()?.sum_all()?.to_scalar::<f64>()?, 0.0);
    Ok(())
}

/// The padding may hold anything, even NaN.
#[test]
fn padding_reaches_nobody() -> Result<()> {
    let layer = self_attention(&config("rotary, half split"), DType::F64)?;
    let x = randn(2, (2, 9, EMBED_DIM), DType::F64)?;
    let whole = layer.forward(&x)?;
    let nan = Tensor::full(f64::NAN, (1, 3, EMBED_DIM), &Device::Cpu)?;
    let short = Tensor::cat(&[x.narrow(0, 1, 1)?.narrow(1, 0, 2)?, nan], 1)?;
    let prompts = Tensor::cat(&[x.narrow(0, 0, 1)?.narrow(1, 0, 5)?, short], 0)?;
    let mut cache = layer.kv_cache(2)?;
    let output = layer.prefill(&prompts, &[5, 2], &mut cache)?;
    assert_rows(&output, (&whole, tolerance(whole.dtype())), &[0, 0], &[5, 2], "prompt")?;
    for _ in 0..4 {
        let starts = cache.lengths().to_vec();
        let output = layer.forward_cached(&pieces(&x, &starts, 1)?, &mut cache)?;
        assert_rows(&output, (&whole, tolerance(whole.dtype())), &starts, &[1, 1], "token")?;
    }
    Ok(())
}
