//! The hash FNV-1a, which is the same on every machine and in every version of Rust.

/// FNV-1a over whole words in place of bytes, with a rotation so that high bits reach low ones.
///
/// # Examples
///
/// ```
/// use attention_kernels::fnv;
///
/// assert_ne!(fnv::hash([1, 2].into_iter()), fnv::hash([2, 1].into_iter()));
/// ```
pub fn hash(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0xCBF2_9CE4_8422_2325, |hash: u64, word| {
        (hash ^ word).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(29)
    })
}
