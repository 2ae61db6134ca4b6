//! Embeddings that aren't trained.

use anyhow::Result;
use candle_core::{Device, Tensor};

/// The embeddings (len, dim) of a sentence. Each is the sum of a fixed random vector for the word and a smaller one for its
/// position, so that two occurrences of a word have different embeddings.
pub fn embeddings(words: &[String], dim: usize, device: &Device) -> Result<Tensor> {
    let mut entries = Vec::with_capacity(words.len() * dim);
    for (position, word) in words.iter().enumerate() {
        let meaning = unit_vector(&word.to_lowercase(), dim);
        let position = unit_vector(&format!("position {position}"), dim);
        entries.extend(meaning.iter().zip(position).map(|(meaning, position)| meaning + 0.5 * position));
    }
    Ok(Tensor::from_vec(entries, (words.len(), dim), device)?)
}

/// A random direction: a function of the name alone.
fn unit_vector(name: &str, dim: usize) -> Vec<f32> {
    // FNV-1a turns the name into a seed, SplitMix64 the seed into numbers.
    let mut state = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3));
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((bits ^ (bits >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let vector = (0..dim).map(|_| uniform()).collect::<Vec<_>>();
    let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    vector.into_iter().map(|x| x / length).collect()
}
