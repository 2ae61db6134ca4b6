//! Greedy decoding of 200 tokens by whole decoders. The tokens are the same with a cache and without, and they are
//! those of `generate` of transformers.

use std::collections::HashSet;

use candle_core::{DType, Result, Tensor};

use crate::common::max_scaled_difference;

use super::decoders::{Decoder, ModelFile};

/// The number of tokens that the script generated.
const TOKENS: usize = 200;

/// The logits of the two likeliest tokens differ by more than this in every step of the script.
const TOLERANCE: f64 = 1e-4;

fn check(kind: &str) -> anyhow::Result<()> {
    let file = ModelFile::load(kind)?;
    let tokens = |name: &str| file.expect(&format!("golden.greedy.{name}")).to_dtype(DType::U32);
    let (prompt, expected) = (tokens("prompt")?, tokens("tokens")?.to_vec2::<u32>()?);
    assert!(
        expected.iter().all(|row| row.len() == TOKENS && row[TOKENS / 2..].iter().collect::<HashSet<_>>().len() >= 20)
    );

    let decoder = Decoder::new(&file)?;
    let (cached, cached_logits) = decoder.greedy(&prompt, TOKENS, true)?;
    let (whole, whole_logits) = decoder.greedy(&prompt, TOKENS, false)?;
    assert_same_tokens(&whole, &expected, "recomputed")?;
    assert_same_tokens(&cached, &expected, "from the cache")?;
    let mut worst: f64 = 0.0;
    for (step, (cached, whole)) in cached_logits.iter().zip(&whole_logits).enumerate() {
        let difference = max_scaled_difference(cached, whole)?;
        assert!(difference < TOLERANCE, "step {step}: logits differ by {difference:e}");
        worst = worst.max(difference);
    }
    println!("{kind}: with and without the cache, logits differ by at most {worst:e}");

    // The comparison would prove nothing if the tokens didn't depend on much earlier ones.
    assert_ne!(greedy_from_half(&decoder, &prompt)?.to_vec2::<u32>()?, expected, "{kind} without the early tokens");
    Ok(())
}

#[track_caller]
fn assert_same_tokens(tokens: &Tensor, expected: &[Vec<u32>], what: &str) -> Result<()> {
    for (b, (tokens, expected)) in tokens.to_vec2::<u32>()?.iter().zip(expected).enumerate() {
        let index = tokens.iter().zip(expected).position(|(token, expected)| token != expected);
        assert_eq!(index, None, "{what}: first different token of sequence {b}\n{tokens:?}\n{expected:?}");
    }
    Ok(())
}

/// The greedy tokens of a decoder that restarts after half of them, with only the last eight tokens as the prompt.
fn greedy_from_half(decoder: &Decoder, prompt: &Tensor) -> Result<Tensor> {
    let (first, _) = decoder.greedy(prompt, TOKENS / 2, true)?;
    let (second, _) = decoder.greedy(&first.narrow(1, TOKENS / 2 - 8, 8)?, TOKENS / 2, true)?;
    Tensor::cat(&[first, second], 1)
}

macro_rules! decodes_as_transformers_does {
    ($($kind:ident,)*) => {
        mod decodes_as_transformers_does {
            $(
                #[test]
                fn $kind() -> anyhow::Result<()> {
                    super::check(stringify!($kind))
                }
            )*
        }
    };
}

decodes_as_transformers_does! {
    gemma2,
    gpt2,
    gpt_oss,
    llama,
    llama3,
    qwen3,
    t5,
    whisper,
}
