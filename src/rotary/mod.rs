//! Rotary position embedding, with its gradient.

mod json;
mod scaling;

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{D, Device, DeviceLocation, Tensor};
use serde::{Deserialize, Serialize};

use crate::check::{check_dtype, compute_dtype};
use crate::error::{AttentionError, Result};
pub use scaling::{RotaryScaling, Yarn};

/// Which entries of a head are rotated together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pairing {
    /// Entry `i` with entry `i + dim / 2`: Llama, Qwen, Gemma, GPT-NeoX (`rotate_half`).
    #[default]
    HalfSplit,
    /// Entry `2i` with entry `2i + 1`: the paper, GPT-J.
    Interleaved,
}

/// How positions are turned into angles.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RotaryConfig {
    /// Pair `i` is rotated by base^(-2i / dim) radians per position, before any scaling. Finite and positive.
    pub base: f64,
    /// How many entries of a head are rotated; all of them if not given. The other entries are unchanged. Even.
    pub dim: Option<usize>,
    /// Which entries are rotated together.
    pub pairing: Pairing,
    /// How the frequencies are scaled, for longer sequences than a model was first trained on; no scaling if not given.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "json::none_if_default")]
    pub scaling: Option<RotaryScaling>,
}

impl Default for RotaryConfig {
    fn default() -> Self {
        Self { base: 10_000.0, dim: None, pairing: Pairing::HalfSplit, scaling: None }
    }
}

/// Rotary position embedding: rotates pairs of entries of queries and keys by angles that grow with their positions, so
/// that the dot product of a query and a key depends only on their relative position.
///
/// # Examples
///
/// ```
/// use candle_attention::rotary::{RotaryConfig, RotaryEmbedding};
/// use candle_core::{Device, Tensor};
///
/// let rotary = RotaryEmbedding::new(&RotaryConfig::default(), 2)?;
/// let x = Tensor::new(&[[[[1f32, 0.], [1., 0.]]]], &Device::Cpu)?; // (batch, heads, len, head_dim)
/// let rotated = rotary.apply(&x, 0)?.flatten_all()?.to_vec1::<f32>()?;
/// // Position 0 isn't rotated, position 1 is rotated by one radian.
/// assert_eq!(rotated[..2], [1.0, 0.0]);
/// assert!((rotated[2] - 1f32.cos()).abs() < 1e-6 && (rotated[3] - 1f32.sin()).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2.2.
#[derive(Clone, Debug)]
pub struct RotaryEmbedding {
    config: RotaryConfig,
    /// The number of rotated entries.
    dim: usize,
    head_dim: usize,
    /// The angles of the last call, since every call in training needs the same ones.
    last: Arc<Mutex<Option<Angles>>>,
}

/// Cosines and sines, times the attention factor of the scaling, of the angles at positions `offset..offset + len` for
/// each offset: (offsets, 1, len, dim / 2).
#[derive(Clone, Debug)]
struct Angles {
    offsets: Vec<usize>,
    cos: Tensor,
    sin: Tensor,
}

impl RotaryEmbedding {
    /// A rotary embedding for heads of `head_dim` entries.
    ///
    /// # Errors
    ///
    /// An odd number of entries to rotate, or more than head_dim; a base that isn't finite and positive; an invalid
    /// scaling.
    pub fn new(config: &RotaryConfig, head_dim: usize) -> Result<Self> {
        config.validate(head_dim)?;
        let dim = config.dim.unwrap_or(head_dim);
        Ok(Self { config: config.clone(), dim, head_dim, last: Arc::default() })
    }

    /// Rotates x (batch, num_heads, len, head_dim), whose first token is at position `offset`.
    ///
    /// # Errors
    ///
    /// Another rank or head_dim, a dtype that isn't a float, positions that overflow.
    pub fn apply(&self, x: &Tensor, offset: usize) -> Result<Tensor> {
        self.check(x)?;
        self.rotate_from(x, &[offset])
    }

    /// As [`RotaryEmbedding::apply`], with the first token of sequence `b` at position `offsets[b]`, for sequences of
    /// different lengths that are decoded together. A single offset applies to all sequences.
    ///
    /// # Errors
    ///
    /// As [`RotaryEmbedding::apply`], and offsets for another number of sequences.
    pub fn apply_each(&self, x: &Tensor, offsets: &[usize]) -> Result<Tensor> {
        self.check(x)?;
        let batch = x.dim(0)?;
        if offsets.len() != batch && offsets.len() != 1 {
            let expected = format!("{} sequences, one for each offset", offsets.len());
            return Err(AttentionError::Shape { tensor: "rotary input", expected, shape: x.dims().to_vec() }.into());
        }
        match offsets {
            // The offsets are usually equal. The angles are then computed only once.
            [first, rest @ ..] if rest.iter().all(|offset| offset == first) => self.rotate_from(x, &[*first]),
            [] => Ok(x.clone()),
            _ => self.rotate_from(x, offsets),
        }
    }

    /// Rotates x with an offset for each sequence, or one for all.
    fn rotate_from(&self, x: &Tensor, offsets: &[usize]) -> Result<Tensor> {
        // candle can't cast an empty tensor on CUDA.
        if x.elem_count() == 0 {
            return Ok(x.clone());
        }
        let dtype = x.dtype();
        // Half types are rotated in f32.
        let x = x.to_dtype(compute_dtype(dtype))?;
        let Angles { cos, sin, .. } = self.angles(&x, offsets)?;
        let rotated = x.narrow(D::Minus1, 0, self.dim)?;
        let rotated = match self.config.pairing {
            Pairing::HalfSplit => {
                let first = rotated.narrow(D::Minus1, 0, self.dim / 2)?;
                let second = rotated.narrow(D::Minus1, self.dim / 2, self.dim / 2)?;
                let (first, second) = rotate(&first, &second, &cos, &sin)?;
                Tensor::cat(&[first, second], 3)?
            }
            Pairing::Interleaved => {
                let (batch, heads, len, _) = x.dims4()?;
                let pairs = rotated.reshape((batch, heads, len, self.dim / 2, 2))?;
                let (even, odd) = (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?);
                let (even, odd) = rotate(&even, &odd, &cos, &sin)?;
                Tensor::stack(&[even, odd], 4)?.reshape((batch, heads, len, self.dim))?
            }
        };
        let rest = x.narrow(D::Minus1, self.dim, self.head_dim - self.dim)?;
        let x = if self.dim == self.head_dim { rotated } else { Tensor::cat(&[rotated, rest], 3)? };
        Ok(x.to_dtype(dtype)?)
    }

    fn check(&self, x: &Tensor) -> Result<(), AttentionError> {
        let shape = x.dims().to_vec();
        let tensor = "rotary input";
        if x.rank() != 4 {
            let expected = "4 axes (batch, num_heads, len, head_dim)";
            return Err(AttentionError::Rank { tensor, expected, shape });
        }
        if shape[3] != self.head_dim {
            let expected = format!("(batch, num_heads, len, head_dim) with head_dim {}", self.head_dim);
            return Err(AttentionError::Shape { tensor, expected, shape });
        }
        check_dtype(tensor, x.dtype())
    }

    fn angles(&self, x: &Tensor, offsets: &[usize]) -> Result<Angles> {
        let len = x.dim(2)?;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(angles) = last.as_ref().filter(|angles| angles.fit(x, offsets, len)) {
            return Ok(angles.clone());
        }
        // The angles are computed in f64 for every dtype: at position 100,000 an f32 angle is off by 0.004.
        let frequencies = self.config.frequencies(self.dim);
        let mut radians = Vec::with_capacity(offsets.len() * len * self.dim / 2);
        for &offset in offsets {
            for position in offset..offset.checked_add(len).ok_or(position_overflow(offset))? {
                radians.extend(frequencies.iter().map(|frequency| position as f64 * frequency));
            }
        }
        let attention_factor = self.config.scaling.as_ref().map_or(1.0, RotaryScaling::attention_factor);
        let table = |f: fn(f64) -> f64| -> candle_core::Result<Tensor> {
            let values = radians.iter().map(|&x| attention_factor * f(x)).collect::<Vec<_>>();
            let table = Tensor::from_vec(values, (offsets.len(), 1, len, self.dim / 2), &Device::Cpu)?;
            table.to_dtype(x.dtype())?.to_device(x.device())
        };
        let angles = Angles { offsets: offsets.to_vec(), cos: table(f64::cos)?, sin: table(f64::sin)? };
        *last = Some(angles.clone());
        Ok(angles)
    }
}

impl Angles {
    /// Whether these are the angles of `len` positions from each offset on, in the dtype and on the device of `x`.
    fn fit(&self, x: &Tensor, offsets: &[usize], len: usize) -> bool {
        let location = |tensor: &Tensor| -> DeviceLocation { tensor.device().location() };
        self.offsets == offsets
            && self.cos.dims()[2] == len
            && self.cos.dtype() == x.dtype()
            && location(&self.cos) == location(x)
    }
}

impl RotaryConfig {
    /// Checks that this config is valid for heads of `head_dim` entries.
    pub(crate) fn validate(&self, head_dim: usize) -> Result<(), AttentionError> {
        let dim = self.dim.unwrap_or(head_dim);
        if dim == 0 || !dim.is_multiple_of(2) || dim > head_dim {
            let expected = format!("an even number from 2 to head_dim {head_dim}");
            return Err(AttentionError::Config { field: "rotary.dim", expected, got: dim.to_string() });
        }
        if !(self.base.is_finite() && self.base > 0.0) {
            let expected = "a finite number above 0";
            return Err(AttentionError::Number { name: "rotary.base", expected, got: self.base });
        }
        self.scaling.as_ref().map_or(Ok(()), |scaling| scaling.validate(self.base, dim))
    }

    /// The rotation of each of the dim / 2 pairs, in radians per position.
    fn frequencies(&self, dim: usize) -> Vec<f64> {
        let mut frequencies: Vec<_> = (0..dim / 2).map(|i| self.base.powf(-2.0 * i as f64 / dim as f64)).collect();
        if let Some(scaling) = &self.scaling {
            scaling.scale(&mut frequencies, self.base);
        }
        frequencies
    }
}

/// Rotates pairs of coordinates: (a cos - b sin, a sin + b cos).
fn rotate(a: &Tensor, b: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<(Tensor, Tensor)> {
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (a.broadcast_mul(sin)? + b.broadcast_mul(cos)?)?;
    Ok((first, second))
}

fn position_overflow(offset: usize) -> AttentionError {
    let expected = "an offset that leaves room to count the positions";
    AttentionError::Number { name: "position_offset", expected, got: offset as f64 }
}
