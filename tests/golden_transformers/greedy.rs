//! Whole decoders: 200 tokens, one by one, each the likeliest. With a cache they are those that recomputing everything
//! gives at every step, and those that `generate` of transformers gives.

use std::collections::HashSet;

use candle_core::{DType, Result, Tensor};

use crate::common::max_scaled_difference;
use crate::decoders::{Decoder, ModelFile};

/// What the script asked `generate` for.
const TOKENS: usize = 200;

/// The two likeliest tokens of every step lie further apart in the script.
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

    // Tokens that don't depend on what came long before would prove nothing.
    assert_ne!(forgetful(&decoder, &prompt)?.to_vec2::<u32>()?, expected, "{kind} with a short memory");
    Ok(())
}

#[track_caller]
fn assert_same_tokens(tokens: &Tensor, expected: &[Vec<u32>], what: &str) -> Result<()> {
    for (b, (tokens, expected)) in tokens.to_vec2::<u32>()?.iter().zip(expected).enumerate() {
        let place = tokens.iter().zip(expected).position(|(token, expected)| token != expected);
        assert_eq!(place, None, "{what}: first other token of sequence {b}\n{tokens:?}\n{expected:?}");
    }
    Ok(())
}

/// Greedy tokens of a decoder that starts anew at half of them, with the last eight alone.
fn forgetful(decoder: &Decoder, prompt: &Tensor) -> Result<Tensor> {
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
