//! A valid file with random changes is loaded or refused; nothing panics.

use candle_attention::{CrossAttention, Result, SelfAttention};
use candle_core::{DType, Device};

use crate::common::{Random, randn};

use super::files::{ENTRY, Parts, odd_layer, small_file};

/// Loads the bytes as both kinds of layer, and uses the self-attention layer if that succeeds. Returns whether it does.
fn load_and_use(bytes: &[u8]) -> bool {
    let _ = CrossAttention::from_bytes(bytes, &Device::Cpu);
    let Ok(layer) = SelfAttention::from_bytes(bytes, &Device::Cpu) else {
        return false;
    };
    let dtype = layer.q_proj().weight().dtype();
    let x = randn(1, (2, 3, layer.config().embed_dim), dtype).expect("an input");
    let _ = layer.forward_t(&x, true);
    true
}

/// One change in the first `range` bytes: a byte is replaced, a bit is flipped, or bytes are removed, inserted or
/// swapped.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random, range: usize) {
    let (at, other) = (random.below(range), random.below(range));
    match random.below(6) {
        0 => bytes[at] = random.bits() as u8,
        1 => bytes[at] ^= 1 << random.below(8),
        2 => bytes.swap(at, other),
        // A digit or another character of JSON, since the header is JSON.
        3 => bytes[at] = b"0123456789{}[]\",:-.eE"[random.below(21)],
        4 => {
            bytes.drain(at..(at + 1 + random.below(8)).min(range));
        }
        _ => bytes.insert(at, random.bits() as u8),
    }
}

#[test]
fn mutated_file_never_panics() -> Result<()> {
    for (seed, original) in
        [(1, small_file()?), (2, odd_layer(DType::F32)?.to_bytes()?), (3, odd_layer(DType::BF16)?.to_bytes()?)]
    {
        assert!(load_and_use(&original));
        let header = 8 + u64::from_le_bytes(original[..8].try_into().expect("eight bytes")) as usize;
        let mut random = Random::new(seed);
        let mut loaded = 0;
        for round in 0..400 {
            let mut bytes = original.clone();
            // Most changes are in the header, since the data may be any bytes.
            let range = if round % 4 == 0 { bytes.len() } else { header };
            for _ in 0..=random.below(3) {
                let len = bytes.len();
                mutate(&mut bytes, &mut random, range.min(len));
            }
            loaded += usize::from(load_and_use(&bytes));
        }
        assert!(loaded > 0 && loaded < 400, "{loaded} of 400 changed files loaded");
    }
    Ok(())
}

/// Changes to the JSON of the config in an otherwise valid file, so that no earlier check refuses it.
#[test]
fn mutated_config_never_panics() -> Result<()> {
    let mut random = Random::new(4);
    let parts = Parts::of(&odd_layer(DType::F32)?.to_bytes()?)?;
    let original = parts.metadata[ENTRY].clone();
    let mut loaded = 0;
    for _ in 0..600 {
        let mut text = original.clone().into_bytes();
        for _ in 0..=random.below(2) {
            let range = text.len();
            mutate(&mut text, &mut random, range);
        }
        let mut parts = Parts { metadata: parts.metadata.clone(), tensors: parts.tensors.clone() };
        let text = String::from_utf8_lossy(&text).into_owned();
        parts.metadata.insert(ENTRY.to_string(), text);
        loaded += usize::from(load_and_use(&parts.to_bytes()?));
    }
    assert!(loaded > 0 && loaded < 600, "{loaded} of 600 changed configs loaded");
    Ok(())
}

#[test]
fn random_bytes_never_panic() {
    let mut random = Random::new(5);
    for _ in 0..500 {
        let len = random.below(300);
        let mut bytes: Vec<u8> = (0..len).map(|_| random.bits() as u8).collect();
        assert!(!load_and_use(&bytes));
        if len >= 8 {
            // A valid length of the header, so that the bytes after it are parsed.
            bytes[..8].copy_from_slice(&(random.below(len) as u64).to_le_bytes());
            assert!(!load_and_use(&bytes));
        }
    }
}
