//! Rotary position embedding, with its gradient.

mod json;
mod op;
mod positions;
mod scaling;
mod tables;

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{D, DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::check::{check_dtype, check_held, check_number, compute_dtype};
use crate::error::{AttentionError, Result};
use crate::memory;
pub(crate) use op::KernelAngles;
use op::Rotate;
pub(crate) use positions::Positions;
pub use scaling::{RotaryScaling, Yarn};
use scaling::{frequency, has_angles};
use tables::Tables;

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

impl Pairing {
    fn of_kernels(self) -> attention_kernels::rotary::Pairing {
        match self {
            Self::HalfSplit => attention_kernels::rotary::Pairing::HalfSplit,
            Self::Interleaved => attention_kernels::rotary::Pairing::Interleaved,
        }
    }
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
    source: Source,
    pairing: Pairing,
    /// The number of rotated entries.
    dim: usize,
    head_dim: usize,
    /// The angles of the last call, since every call in training needs the same ones.
    last: Arc<Mutex<Option<Angles>>>,
}

/// Where cosines and sines come from.
#[derive(Clone, Debug)]
enum Source {
    Config(RotaryConfig),
    Tables(Tables),
}

/// Cosines and sines, times the attention factor of the scaling, of the angles at each position: (lists, 1, len, dim /
/// 2), with a list of positions for each sequence, or a single one for all sequences.
#[derive(Clone, Debug)]
struct Angles {
    positions: Positions,
    cos: Tensor,
    sin: Tensor,
}

impl RotaryEmbedding {
    /// A rotary embedding for heads of `head_dim` entries.
    ///
    /// # Errors
    ///
    /// An odd number of entries to rotate, or more than head_dim; a base that isn't finite and positive, or so small
    /// that angles overflow; an invalid scaling.
    pub fn new(config: &RotaryConfig, head_dim: usize) -> Result<Self> {
        config.validate(head_dim)?;
        let dim = config.dim.unwrap_or(head_dim);
        Ok(Self {
            source: Source::Config(config.clone()),
            pairing: config.pairing,
            dim,
            head_dim,
            last: Arc::default(),
        })
    }

    /// A rotary embedding for heads of `head_dim` entries from the cosines and sines of the angles, which another
    /// program has computed (`cos_cache` and `sin_cache` of ONNX's RotaryEmbedding). They are constants: they get no
    /// gradient.
    ///
    /// # Shapes
    ///
    /// cos and sin (max_position, dim / 2), whose row `p` holds the angles of position `p`; or (batch, max_position,
    /// dim / 2), with rows for each sequence. The first `dim` entries of a head are rotated. (The tables of Hugging Face
    /// transformers, (batch, len, dim), hold each half twice: take one half of them with `narrow`.)
    ///
    /// # Errors
    ///
    /// Another rank; tables of different shapes or devices; dim / 2 outside 1 to head_dim / 2; a dtype that isn't a
    /// float.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::rotary::{Pairing, RotaryEmbedding};
    /// use candle_core::{Device, Tensor};
    ///
    /// // One pair. It isn't rotated at position 0, and makes a quarter turn at position 1.
    /// let cos = Tensor::new(&[[1f32], [0.]], &Device::Cpu)?; // (max_position, dim / 2)
    /// let sin = Tensor::new(&[[0f32], [1.]], &Device::Cpu)?;
    /// let rotary = RotaryEmbedding::from_tables(&cos, &sin, 2, Pairing::HalfSplit)?;
    /// let x = Tensor::new(&[[[[1f32, 2.], [1., 2.]]]], &Device::Cpu)?; // (batch, heads, len, head_dim)
    /// assert_eq!(rotary.apply(&x, 0)?.flatten_all()?.to_vec1::<f32>()?, [1.0, 2.0, -2.0, 1.0]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn from_tables(cos: &Tensor, sin: &Tensor, head_dim: usize, pairing: Pairing) -> Result<Self> {
        let tables = Tables::new(cos, sin, head_dim)?;
        Ok(Self { dim: tables.dim(), source: Source::Tables(tables), pairing, head_dim, last: Arc::default() })
    }

    /// The config, if there is one and not tables.
    pub(crate) fn config(&self) -> Option<&RotaryConfig> {
        match &self.source {
            Source::Config(config) => Some(config),
            Source::Tables(_) => None,
        }
    }

    /// The size of the heads that are rotated.
    pub(crate) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Rotates x (batch, num_heads, len, head_dim), whose first token is at position `offset`.
    ///
    /// # Errors
    ///
    /// Another rank or head_dim, a dtype that isn't a float or can't hold the attention factor, positions that overflow,
    /// too little memory. With tables also: positions that they don't hold, tables for another number of sequences,
    /// another device.
    pub fn apply(&self, x: &Tensor, offset: usize) -> Result<Tensor> {
        self.apply_each(x, &[offset])
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
            let expected = format!("with {} sequences, one for each offset", offsets.len());
            return Err(AttentionError::Shape { tensor: "rotary input", expected, shape: x.dims().to_vec() }.into());
        }
        self.rotate_at(x, &Positions::from_offsets(offsets))
    }

    /// As [`RotaryEmbedding::apply`], with a position for each token, such as the `position_ids` of Hugging Face
    /// transformers for batches that are padded at the left.
    ///
    /// # Shapes
    ///
    /// x (batch, num_heads, len, head_dim); position_ids (len) or (batch, len), of integers.
    ///
    /// # Errors
    ///
    /// As [`RotaryEmbedding::apply`], and position ids of another shape or dtype, or below 0.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_attention::rotary::{RotaryConfig, RotaryEmbedding};
    /// use candle_core::{Device, Tensor};
    ///
    /// let rotary = RotaryEmbedding::new(&RotaryConfig::default(), 4)?;
    /// let x = Tensor::randn(0f32, 1.0, (2, 1, 3, 4), &Device::Cpu)?; // (batch, heads, len, head_dim)
    /// // The first token of the second sequence is padding.
    /// let rotated = rotary.apply_positions(&x, &Tensor::new(&[[0u32, 1, 2], [0, 0, 1]], &Device::Cpu)?)?;
    /// let alone = rotary.apply(&x.narrow(0, 1, 1)?.narrow(2, 1, 2)?, 0)?;
    /// let padded = rotated.narrow(0, 1, 1)?.narrow(2, 1, 2)?;
    /// assert_eq!(padded.flatten_all()?.to_vec1::<f32>()?, alone.flatten_all()?.to_vec1::<f32>()?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn apply_positions(&self, x: &Tensor, position_ids: &Tensor) -> Result<Tensor> {
        self.check(x)?;
        self.rotate_at(x, &Positions::from_ids(position_ids, x.dim(0)?, x.dim(2)?)?)
    }

    /// As [`RotaryEmbedding::apply`], for positions whose number has been checked.
    pub(crate) fn apply_at(&self, x: &Tensor, positions: &Positions) -> Result<Tensor> {
        self.check(x)?;
        self.rotate_at(x, positions)
    }

    fn rotate_at(&self, x: &Tensor, positions: &Positions) -> Result<Tensor> {
        // candle can't cast an empty tensor on CUDA.
        if x.elem_count() == 0 {
            return Ok(x.clone());
        }
        let dtype = x.dtype();
        if x.device().is_cpu() {
            return self.rotate_on_cpu(x, positions);
        }
        // Half types are rotated in f32. Each of the products and their sums is half as large as x.
        let wide = compute_dtype(dtype);
        memory::ask_for("rotated heads", 6, x, wide)?;
        let x = x.to_dtype(wide)?;
        let Angles { cos, sin, .. } = self.angles(x.dim(2)?, wide, x.device(), positions)?;
        let rotated = x.narrow(D::Minus1, 0, self.dim)?;
        let rotated = match self.pairing {
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

    /// One operation. Where the tokens of x lie one after the other, as a projection gives them, so do those of the result.
    fn rotate_on_cpu(&self, x: &Tensor, positions: &Positions) -> Result<Tensor> {
        memory::ask_for("rotated heads", 2, x, x.dtype())?;
        let Angles { cos, sin, .. } = self.angles(x.dim(2)?, compute_dtype(x.dtype()), x.device(), positions)?;
        let angles = KernelAngles { pairing: self.pairing.of_kernels(), dim: self.dim, len: x.dim(2)?, cos, sin };
        let op = |tokens_first| Rotate { angles, tokens_first, inverse: false };
        let by_tokens = x.transpose(1, 2)?;
        if by_tokens.is_contiguous() {
            return Ok(by_tokens.apply_op1(op(true))?.transpose(1, 2)?);
        }
        Ok(memory::contiguous("heads to rotate", x)?.apply_op1(op(false))?)
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
        memory::check_countable(tensor, x)?;
        check_dtype(tensor, x.dtype())?;
        match &self.source {
            Source::Config(config) => config.check_dtype(x.dtype()),
            Source::Tables(tables) => tables.check(x),
        }
    }

    /// Checks that there are angles for the tokens of x (batch, len, dim), which stand at these positions.
    pub(crate) fn check_positions(&self, x: &Tensor, positions: &Positions) -> Result<()> {
        match &self.source {
            Source::Config(_) => Ok(()),
            Source::Tables(tables) => {
                tables.check(x)?;
                Ok(tables.check_positions(&positions.flatten(x.dim(1)?)?)?)
            }
        }
    }

    /// The angles of `len` tokens at these positions for the kernels, whose numbers are computed in `dtype`. `None` for an
    /// embedding from tables.
    pub(crate) fn kernel_angles(
        &self,
        len: usize,
        dtype: DType,
        positions: &Positions,
    ) -> Result<Option<KernelAngles>> {
        if self.config().is_none() {
            return Ok(None);
        }
        let Angles { cos, sin, .. } = self.angles(len, dtype, &Device::Cpu, positions)?;
        Ok(Some(KernelAngles { pairing: self.pairing.of_kernels(), dim: self.dim, len, cos, sin }))
    }

    fn angles(&self, len: usize, dtype: DType, device: &Device, positions: &Positions) -> Result<Angles> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(angles) = last.as_ref().filter(|angles| angles.fit(len, dtype, device, positions)) {
            return Ok(angles.clone());
        }
        let [cos, sin] = match &self.source {
            Source::Config(config) => config.cos_sin(self.dim, positions, len, dtype, device)?,
            Source::Tables(tables) => tables.rows(positions, len, dtype)?,
        };
        let angles = Angles { positions: positions.clone(), cos, sin };
        *last = Some(angles.clone());
        Ok(angles)
    }
}

impl Angles {
    /// Whether these are the angles of `len` tokens at these positions, in this dtype and on this device.
    fn fit(&self, len: usize, dtype: DType, device: &Device, positions: &Positions) -> bool {
        self.positions == *positions
            && self.cos.dims()[2] == len
            && self.cos.dtype() == dtype
            && self.cos.device().location() == device.location()
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
        check_number("rotary.base", Some(self.base), "a finite number above 0", |x| x.is_finite() && x > 0.0)?;
        // The frequencies grow or shrink from pair to pair.
        let fits = |_| has_angles(frequency(self.base, 0, dim).max(frequency(self.base, dim / 2 - 1, dim)));
        check_number("rotary.base", Some(self.base), "a number that gives every position a finite angle", fits)?;
        self.scaling.as_ref().map_or(Ok(()), |scaling| scaling.validate(self.base, dim))
    }

    /// Checks that inputs of this dtype can be rotated and stay finite.
    pub(crate) fn check_dtype(&self, dtype: DType) -> Result<(), AttentionError> {
        let factor = self.scaling.as_ref().map(RotaryScaling::attention_factor);
        check_held("rotary.scaling.attention_factor", factor, dtype)
    }

    /// The rotation of each of the dim / 2 pairs, in radians per position.
    fn frequencies(&self, dim: usize) -> Vec<f64> {
        let mut frequencies: Vec<_> = (0..dim / 2).map(|i| frequency(self.base, i, dim)).collect();
        if let Some(scaling) = &self.scaling {
            scaling.scale(&mut frequencies, self.base);
        }
        frequencies
    }

    /// Cosines and sines of `len` tokens at these positions, as in [`Angles`].
    fn cos_sin(
        &self,
        dim: usize,
        positions: &Positions,
        len: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<[Tensor; 2]> {
        // The angles are computed in f64 for every dtype: at position 100,000 an f32 angle is off by 0.004.
        let frequencies = self.frequencies(dim);
        let dims = [positions.lists(), 1, len, dim / 2];
        // The angles, and the numbers and the table of one function.
        let bytes = memory::bytes(&dims, DType::F64).saturating_mul(3);
        memory::ask("angles of the positions", &Device::Cpu, bytes)?;
        let flat = positions.flatten(len)?;
        let mut radians = Vec::with_capacity(flat.len() * frequencies.len());
        for position in flat {
            radians.extend(frequencies.iter().map(|frequency| position as f64 * frequency));
        }
        let attention_factor = self.scaling.as_ref().map_or(1.0, RotaryScaling::attention_factor);
        let table = |f: fn(f64) -> f64| -> candle_core::Result<Tensor> {
            let values = radians.iter().map(|&x| attention_factor * f(x)).collect::<Vec<_>>();
            let table = Tensor::from_vec(values, &dims, &Device::Cpu)?;
            table.to_dtype(dtype)?.to_device(device)
        };
        Ok([table(f64::cos)?, table(f64::sin)?])
    }
}

/// Rotates pairs of coordinates: (a cos - b sin, a sin + b cos).
fn rotate(a: &Tensor, b: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<(Tensor, Tensor)> {
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (a.broadcast_mul(sin)? + b.broadcast_mul(cos)?)?;
    Ok((first, second))
}
