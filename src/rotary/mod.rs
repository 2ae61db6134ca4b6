//! Rotary position embedding, with its gradient.

mod scaling;

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{D, DType, Device, DeviceLocation, Result, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::AttentionError;
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
    /// Pair `i` turns by base^(-2i / dim) radians a position, if nothing scales that. Finite and positive.
    pub base: f64,
    /// How many entries of a head are rotated, the others being left as they are; all of them if not given. Even.
    pub dim: Option<usize>,
    /// Which entries are rotated together.
    pub pairing: Pairing,
    /// How the frequencies are scaled, for longer sequences than a model was first trained on; not at all if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling: Option<RotaryScaling>,
}

impl Default for RotaryConfig {
    fn default() -> Self {
        Self { base: 10_000.0, dim: None, pairing: Pairing::HalfSplit, scaling: None }
    }
}

/// Rotary position embedding: rotates pairs of entries of a query or key by angles that grow with its position, so that
/// their dot product depends on how far apart they stand.
///
/// # Examples
///
/// ```
/// use candle_attention::{RotaryConfig, RotaryEmbedding};
/// use candle_core::{Device, Tensor};
///
/// let rotary = RotaryEmbedding::new(&RotaryConfig::default(), 2)?;
/// let x = Tensor::new(&[[[[1f32, 0.], [1., 0.]]]], &Device::Cpu)?; // (batch, heads, len, head_dim)
/// let rotated = rotary.apply(&x, 0)?.flatten_all()?.to_vec1::<f32>()?;
/// // The first position doesn't turn, the second turns by one radian.
/// assert_eq!(rotated[..2], [1.0, 0.0]);
/// assert!((rotated[2] - 1f32.cos()).abs() < 1e-6 && (rotated[3] - 1f32.sin()).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2.2.
#[derive(Clone, Debug)]
pub struct RotaryEmbedding {
    config: RotaryConfig,
    /// How many entries are rotated.
    dim: usize,
    head_dim: usize,
    /// The angles of the last call: in training, every call is alike.
    last: Arc<Mutex<Option<Angles>>>,
}

/// Cosine and sine, times the scaling's attention factor, of the angles of positions `offset..offset + len` for each
/// offset, (offsets, 1, len, dim / 2).
#[derive(Clone, Debug)]
struct Angles {
    offsets: Vec<usize>,
    cos: Tensor,
    sin: Tensor,
}

impl RotaryEmbedding {
    /// For heads of `head_dim` entries.
    ///
    /// # Errors
    ///
    /// An odd number of entries to rotate, or more than head_dim; a base that isn't finite and positive; a scaling
    /// that can't serve.
    pub fn new(config: &RotaryConfig, head_dim: usize) -> Result<Self> {
        config.validate(head_dim)?;
        let dim = config.dim.unwrap_or(head_dim);
        Ok(Self { config: config.clone(), dim, head_dim, last: Arc::default() })
    }

    /// Rotates x (batch, num_heads, len, head_dim), whose first token stands at position `offset`.
    ///
    /// # Errors
    ///
    /// Another rank or head_dim, a dtype that isn't a float, positions that can't be counted.
    pub fn apply(&self, x: &Tensor, offset: usize) -> Result<Tensor> {
        self.check(x)?;
        self.turn(x, &[offset])
    }

    /// As [`RotaryEmbedding::apply`], where the first token of sequence `b` stands at position `offsets[b]`, or at the
    /// only offset: sequences of different lengths, decoded side by side.
    ///
    /// # Errors
    ///
    /// As there, or offsets for another number of sequences.
    pub fn apply_each(&self, x: &Tensor, offsets: &[usize]) -> Result<Tensor> {
        self.check(x)?;
        let batch = x.dim(0)?;
        if offsets.len() != batch && offsets.len() != 1 {
            let expected = format!("{} sequences, one for each offset", offsets.len());
            return Err(AttentionError::Shape { tensor: "rotary input", expected, shape: x.dims().to_vec() }.into());
        }
        match offsets {
            // As is usual: the angles are then computed once.
            [first, rest @ ..] if rest.iter().all(|offset| offset == first) => self.turn(x, &[*first]),
            [] => Ok(x.clone()),
            _ => self.turn(x, offsets),
        }
    }

    /// With an offset for each sequence, or one for all.
    fn turn(&self, x: &Tensor, offsets: &[usize]) -> Result<Tensor> {
        // candle can't cast nothing on CUDA.
        if x.elem_count() == 0 {
            return Ok(x.clone());
        }
        let dtype = x.dtype();
        // Half types rotate in f32.
        let x = x.to_dtype(if dtype == DType::F64 { DType::F64 } else { DType::F32 })?;
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
        x.to_dtype(dtype)
    }

    fn check(&self, x: &Tensor) -> std::result::Result<(), AttentionError> {
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
        if !x.dtype().is_float() {
            return Err(AttentionError::DType { tensor, expected: "F16, BF16, F32 or F64".into(), got: x.dtype() });
        }
        Ok(())
    }

    fn angles(&self, x: &Tensor, offsets: &[usize]) -> Result<Angles> {
        let len = x.dim(2)?;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(angles) = last.as_ref().filter(|angles| angles.serve(x, offsets, len)) {
            return Ok(angles.clone());
        }
        // In f64 whatever the dtype: at position 100,000 an f32 angle is off by 0.004.
        let frequencies = self.config.frequencies(self.dim);
        let mut radians = Vec::with_capacity(offsets.len() * len * self.dim / 2);
        for &offset in offsets {
            for position in offset..offset.checked_add(len).ok_or(too_far(offset))? {
                radians.extend(frequencies.iter().map(|frequency| position as f64 * frequency));
            }
        }
        let attention_factor = self.config.scaling.as_ref().map_or(1.0, RotaryScaling::attention_factor);
        let table = |f: fn(f64) -> f64| {
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
    fn serve(&self, x: &Tensor, offsets: &[usize], len: usize) -> bool {
        let location = |tensor: &Tensor| -> DeviceLocation { tensor.device().location() };
        self.offsets == offsets
            && self.cos.dims()[2] == len
            && self.cos.dtype() == x.dtype()
            && location(&self.cos) == location(x)
    }
}

impl RotaryConfig {
    /// Checked here alone; the layer's config calls it.
    pub(crate) fn validate(&self, head_dim: usize) -> std::result::Result<(), AttentionError> {
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

    /// By how many radians each of dim / 2 pairs turns a position.
    fn frequencies(&self, dim: usize) -> Vec<f64> {
        let mut frequencies: Vec<_> = (0..dim / 2).map(|i| self.base.powf(-2.0 * i as f64 / dim as f64)).collect();
        if let Some(scaling) = &self.scaling {
            scaling.scale(&mut frequencies, self.base);
        }
        frequencies
    }
}

/// One coordinate pair turned: (a cos - b sin, a sin + b cos).
fn rotate(a: &Tensor, b: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<(Tensor, Tensor)> {
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (a.broadcast_mul(sin)? + b.broadcast_mul(cos)?)?;
    Ok((first, second))
}

fn too_far(offset: usize) -> AttentionError {
    let expected = "an offset that leaves room to count the positions";
    AttentionError::Number { name: "position_offset", expected, got: offset as f64 }
}
