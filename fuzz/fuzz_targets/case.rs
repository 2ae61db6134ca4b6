//! From the fuzzer's bytes to a case: inputs of any small shape and any strides, and every option.

use arbitrary::{Arbitrary, Result, Unstructured};
use candle_attention::{AttentionOptions, Mask};
use candle_core::{DType, Device, Tensor, Var};

/// The sizes of one call. Any of them may be zero. Both passes cut sequences of 96 or more into blocks.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
    pub dim: usize,
    pub value_dim: usize,
}

impl<'a> Arbitrary<'a> for Sizes {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let length =
            |u: &mut Unstructured| if u.ratio(1, 8)? { u.int_in_range(0..=210) } else { u.int_in_range(1..=24) };
        let entries =
            |u: &mut Unstructured| if u.ratio(1, 8)? { u.int_in_range(0..=70) } else { u.int_in_range(1..=24) };
        let kv_heads = u.int_in_range(1..=3)?;
        let mut sizes = Self {
            batch: if u.ratio(1, 32)? { 0 } else { u.int_in_range(1..=3)? },
            heads: if u.ratio(1, 16)? { u.int_in_range(0..=5)? } else { kv_heads * u.int_in_range(1..=3)? },
            kv_heads,
            q_len: length(u)?,
            kv_len: length(u)?,
            dim: entries(u)?,
            value_dim: entries(u)?,
        };
        // Many small cases find more faults than a few large ones.
        if sizes.q_len * sizes.kv_len > 1000 {
            sizes = Self { batch: sizes.batch.min(1), heads: 1, kv_heads: 1, ..sizes };
        }
        Ok(sizes)
    }
}

/// Numbers in [-bound, bound), the same for the same seed.
fn numbers(seed: u64, bound: f64, count: usize) -> Vec<f64> {
    let mut state = seed;
    let mut next = || {
        // Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014): SplitMix64.
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..count).map(|_| (next() * 2.0 - 1.0) * bound).collect()
}

/// A tensor of these dims. Its numbers are a function of the seed alone.
pub fn uniform(seed: u64, bound: f64, dims: &[usize], dtype: DType) -> candle_core::Result<Tensor> {
    // Rounded to bf16, so that every dtype gets the same numbers.
    let x = Tensor::from_vec(numbers(seed, bound, dims.iter().product()), dims, &Device::Cpu)?;
    x.to_dtype(DType::BF16)?.to_dtype(dtype)
}

/// How a tensor lies in memory.
#[derive(Clone, Debug)]
struct Storage {
    /// The order of the axes, slowest first.
    order: Vec<usize>,
    /// The number of NaN entries before and behind the entries of each axis.
    around: Vec<(usize, usize)>,
    /// Whether every entry has a NaN behind it, so that no axis has stride 1.
    gaps: bool,
}

/// A tensor of any strides.
#[derive(Clone, Debug)]
pub struct Input {
    pub dims: Vec<usize>,
    /// `dims`, with 1 for the axes that are broadcast.
    stored: Vec<usize>,
    storage: Storage,
    seed: u64,
}

impl Input {
    pub fn new(u: &mut Unstructured, dims: Vec<usize>) -> Result<Self> {
        let mut order = (0..dims.len()).collect::<Vec<_>>();
        for last in (1..order.len()).rev() {
            order.swap(last, u.int_in_range(0..=last)?);
        }
        let broadcasts = u.ratio(1, 4)?;
        let mut stored = dims.clone();
        for dim in stored.iter_mut().filter(|dim| broadcasts && **dim > 0) {
            if u.ratio(1, 3)? {
                *dim = 1;
            }
        }
        let narrowed = u.ratio(1, 2)?;
        let mut around = vec![(0, 0); dims.len()];
        for sides in around.iter_mut().filter(|_| narrowed) {
            *sides = (u.int_in_range(0..=2)?, u.int_in_range(0..=2)?);
        }
        let storage = Storage { order, around, gaps: u.ratio(1, 8)? };
        Ok(Self { dims, stored, storage, seed: u.arbitrary()? })
    }

    /// The memory of the tensor, with the entries around it. [`Input::view`] is a view of it.
    pub fn base(&self, dtype: DType) -> candle_core::Result<Tensor> {
        let Storage { order, around, gaps } = &self.storage;
        let mut x = uniform(self.seed, 2.0, &self.stored, dtype)?.permute(order.as_slice())?;
        let nan = |dims: Vec<usize>| Tensor::full(f32::NAN, dims, &Device::Cpu)?.to_dtype(dtype);
        let with = |x: &Tensor, axis, count| {
            let mut dims = x.dims().to_vec();
            dims[axis] = count;
            nan(dims)
        };
        for (axis, &from) in order.iter().enumerate() {
            let (before, behind) = around[from];
            x = Tensor::cat(&[&with(&x, axis, before)?, &x, &with(&x, axis, behind)?], axis)?;
        }
        if *gaps {
            let x_with_gaps = x.unsqueeze(x.rank())?;
            x = Tensor::cat(&[&x_with_gaps, &with(&x_with_gaps, x.rank(), 1)?], x.rank())?;
        }
        x.contiguous()
    }

    /// The tensor as a view of its memory.
    pub fn view(&self, base: &Tensor) -> candle_core::Result<Tensor> {
        let Storage { order, around, gaps } = &self.storage;
        let mut x = base.clone();
        if *gaps {
            x = x.narrow(order.len(), 0, 1)?.squeeze(order.len())?;
        }
        for (axis, &from) in order.iter().enumerate() {
            x = x.narrow(axis, around[from].0, self.stored[from])?;
        }
        let mut back = vec![0; order.len()];
        order.iter().enumerate().for_each(|(axis, &from)| back[from] = axis);
        x.permute(back.as_slice())?.broadcast_as(self.dims.as_slice())
    }

    pub fn tensor(&self, dtype: DType) -> candle_core::Result<Tensor> {
        self.view(&self.base(dtype)?)
    }

    pub fn var(&self, dtype: DType) -> candle_core::Result<Var> {
        Var::from_tensor(&self.base(dtype)?)
    }
}

/// Dims that broadcast to `dims`, sometimes of a lower rank.
fn broadcastable(u: &mut Unstructured, dims: &[usize]) -> Result<Vec<usize>> {
    let mut own = dims[u.int_in_range(0..=dims.len())?..].to_vec();
    for dim in &mut own {
        if u.ratio(1, 3)? {
            *dim = 1;
        }
    }
    Ok(own)
}

/// A number that is mostly small, and sometimes anything up to usize::MAX.
fn distance(u: &mut Unstructured) -> Result<usize> {
    if u.ratio(1, 16)? { u.arbitrary() } else { u.int_in_range(0..=24) }
}

/// A position that is mostly small, and sometimes anything.
fn offset(u: &mut Unstructured) -> Result<i64> {
    if u.ratio(1, 16)? { u.arbitrary() } else { u.int_in_range(-24..=24) }
}

fn mask(u: &mut Unstructured, sizes: &Sizes, depth: usize) -> Result<Option<Mask>> {
    let Sizes { batch, heads, q_len, kv_len, .. } = *sizes;
    let lengths = |u: &mut Unstructured| (0..batch).map(|_| u.int_in_range(0..=kv_len)).collect::<Result<Vec<_>>>();
    Ok(Some(match u.int_in_range(0..=if depth == 0 { 8 } else { 10 })? {
        0 => Mask::full(),
        1 => Mask::causal(),
        2 => Mask::sliding_window(distance(u)?),
        3 => {
            let left = if u.arbitrary()? { Some(distance(u)?) } else { None };
            Mask::window(left, if u.arbitrary()? { Some(distance(u)?) } else { None })
        }
        4 => Mask::key_lengths(&lengths(u)?),
        5 => Mask::prefix(distance(u)?),
        6 => {
            let first = u.int_in_range(0..=kv_len)?;
            let documents = Mask::documents(&[first, kv_len - first]);
            if u.ratio(1, 4)? { documents.with_offset(offset(u)?) } else { documents }
        }
        7 => {
            let ids = (0..batch).map(|_| (0..kv_len).map(|j| Ok((j + u.int_in_range(0..=9)?) as u32 / 10)).collect());
            Mask::document_ids(&ids.collect::<Result<Vec<Vec<u32>>>>()?)
        }
        8 => {
            let dims = broadcastable(u, &[batch, heads, q_len, kv_len])?;
            // candle can't make some tables of empty tensors. They are no case for the kernels.
            let Ok(table) = uniform(u.arbitrary()?, 1.0, &dims, DType::F32).and_then(|x| x.gt(-0.3)) else {
                return Ok(None);
            };
            return Ok(Mask::from_tensor(&table).ok());
        }
        combined => {
            let (Some(a), Some(b)) = (mask(u, sizes, depth - 1)?, mask(u, sizes, depth - 1)?) else { return Ok(None) };
            let both = if combined == 9 { a & b } else { a | b };
            if u.ratio(1, 4)? { both.with_offset(offset(u)?) } else { both }
        }
    }))
}

/// A tensor besides query, key and value, and whether it is trained.
#[derive(Clone, Debug)]
pub struct Extra {
    pub input: Input,
    pub trained: bool,
    pub dtype: Option<DType>,
}

fn extra(u: &mut Unstructured, dims: Vec<usize>) -> Result<Extra> {
    let dtype = if u.ratio(1, 8)? { Some(dtype(u)?) } else { None };
    Ok(Extra { input: Input::new(u, dims)?, trained: u.arbitrary()?, dtype })
}

fn dtype(u: &mut Unstructured) -> Result<DType> {
    Ok(*u.choose(&[DType::F64, DType::F32, DType::F16, DType::BF16])?)
}

/// One call of attention.
#[derive(Clone, Debug)]
pub struct Case {
    pub sizes: Sizes,
    pub dtype: DType,
    /// query, key and value
    pub inputs: [Input; 3],
    pub bias: Option<Extra>,
    pub sinks: Option<Extra>,
    pub slopes: Option<Input>,
    /// The options, without the tensors.
    pub options: AttentionOptions,
}

fn maybe<T>(u: &mut Unstructured, f: impl FnOnce(&mut Unstructured) -> Result<T>) -> Result<Option<T>> {
    if u.ratio(1, 3)? { f(u).map(Some) } else { Ok(None) }
}

impl<'a> Arbitrary<'a> for Case {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let sizes = Sizes::arbitrary(u)?;
        let Sizes { batch, heads, kv_heads, q_len, kv_len, dim, value_dim } = sizes;
        let mut dims =
            [[batch, heads, q_len, dim], [batch, kv_heads, kv_len, dim], [batch, kv_heads, kv_len, value_dim]];
        if u.ratio(1, 32)? {
            dims[u.int_in_range(0..=2)?][u.int_in_range(0..=3)?] = u.int_in_range(0..=9)?;
        }
        let axes = if heads == 1 && kv_heads == 1 { u.int_in_range(2..=4)? } else { 4 };
        let dims = dims.map(|[b, h, len, dim]| match axes {
            2 if batch == 1 => vec![len, dim],
            3 => vec![b, len, dim],
            _ => vec![b, h, len, dim],
        });
        let [q, k, v] = dims.map(|dims| Input::new(u, dims));
        let scores = [batch, heads, q_len, kv_len];
        let options = AttentionOptions {
            scale: maybe(u, |u| Ok(f64::from(u.arbitrary::<i8>()?) / 128.0))?,
            softcap: maybe(u, |u| Ok(f64::from(u.int_in_range(1..=255)?) / 16.0))?,
            attn_mask: mask(u, &sizes, 2)?.unwrap_or_default(),
            dropout_p: maybe(u, |u| Ok(f64::from(u.int_in_range(0..=14)?) / 16.0))?.unwrap_or(0.0),
            dropout_seed: u.arbitrary()?,
            return_logsumexp: u.arbitrary()?,
            ..Default::default()
        };
        Ok(Self {
            sizes,
            dtype: dtype(u)?,
            inputs: [q?, k?, v?],
            bias: maybe(u, |u| {
                let dims = broadcastable(u, &scores)?;
                extra(u, dims)
            })?,
            sinks: maybe(u, |u| extra(u, vec![heads]))?,
            slopes: maybe(u, |u| {
                let dims = if u.arbitrary()? { vec![heads] } else { vec![batch, heads] };
                Input::new(u, dims)
            })?,
            options,
        })
    }
}
