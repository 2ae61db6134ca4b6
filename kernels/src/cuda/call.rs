//! One call of attention on a machine: addresses, sizes and options, checked once.

use super::machine::{Limits, Region};
use super::mask::Lowered;
use super::mask_parts::MAX_LEN;
use super::plan::{Element, MAX_DIM, Variant};
use super::problem::{RawProblem, RawStrided};
use crate::dropout::Dropout;
use crate::error::Error;
use crate::layout::Layout;
use crate::mask::{Rule, ScoreShape};
use crate::problem::check_bounds;

/// The kernels copy 16 bytes at a time.
const ALIGNMENT: u64 = 16;

/// A tensor (batch, heads, len, dim) in a machine's memory, whose last axis is contiguous.
#[derive(Clone, Copy, Debug)]
pub struct MachineView<'a> {
    region: Region<'a>,
    start: usize,
    strides: [usize; 3],
    dims: [usize; 4],
    element: Element,
}

impl<'a> MachineView<'a> {
    /// The element at (b, h, i, c) is number `start + b * strides[0] + h * strides[1] + i * strides[2] + c` of the region.
    /// `what` names the tensor in errors.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] if an element would lie outside the region.
    pub fn new(
        what: &'static str,
        element: Element,
        region: Region<'a>,
        start: usize,
        strides: [usize; 3],
        dims: [usize; 4],
    ) -> Result<Self, Error> {
        let len = (region.bytes() as usize / element.bytes()).saturating_sub(start);
        check_bounds(what, len, dims, [strides[0], strides[1], strides[2], 1])?;
        Ok(Self { region, start, strides, dims, element })
    }

    pub(super) fn raw(&self) -> RawStrided {
        let [batch, head, row] = self.strides.map(|stride| stride as i64);
        let data = self.region.start() + (self.start * self.element.bytes()) as u64;
        RawStrided { data, batch, head, row }
    }

    pub(super) fn region(&self) -> Region<'a> {
        self.region
    }

    pub(super) fn dims(&self) -> [usize; 4] {
        self.dims
    }

    pub(super) fn element(&self) -> Element {
        self.element
    }

    /// Whether each row can be copied in pieces of 16 bytes.
    pub(super) fn is_aligned(&self) -> bool {
        let bytes = |stride: &usize| stride * self.element.bytes();
        self.raw().data.is_multiple_of(ALIGNMENT)
            && self.strides.iter().map(bytes).all(|bytes| bytes.is_multiple_of(ALIGNMENT as usize))
    }
}

/// A bias of f32 whose shape broadcasts to the scores, in a machine's memory.
#[derive(Clone, Copy, Debug)]
pub struct MachineBias<'a> {
    pub(super) region: Region<'a>,
    pub(super) address: u64,
    pub(super) strides: [usize; 4],
    pub(super) dims: [usize; 4],
}

impl<'a> MachineBias<'a> {
    /// The element at (b, h, i, j) is number `start + b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3]` of the
    /// region. An axis of length 1 broadcasts, whatever its stride.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] if an axis has length 0, [`Error::OutOfBounds`] if an element would lie outside the region.
    pub fn new(region: Region<'a>, start: usize, strides: [usize; 4], dims: [usize; 4]) -> Result<Self, Error> {
        if dims.contains(&0) {
            return Err(Error::Empty { what: "bias", dims });
        }
        let len = (region.bytes() as usize / size_of::<f32>()).saturating_sub(start);
        check_bounds("bias", len, dims, strides)?;
        let strides = std::array::from_fn(|axis| if dims[axis] == 1 { 0 } else { strides[axis] });
        Ok(Self { region, address: region.start() + (start * size_of::<f32>()) as u64, strides, dims })
    }

    pub(super) fn entries(&self) -> usize {
        self.dims.iter().product()
    }
}

/// Numbers of f32 in a machine's memory.
#[derive(Clone, Copy, Debug)]
pub struct MachineNumbers<'a> {
    pub(super) region: Region<'a>,
    pub(super) address: u64,
    pub(super) len: usize,
}

impl<'a> MachineNumbers<'a> {
    /// `len` numbers from number `start` of the region on. `what` names them in errors.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] if the region is too short.
    pub fn new(what: &'static str, region: Region<'a>, start: usize, len: usize) -> Result<Self, Error> {
        let got = (region.bytes() as usize / size_of::<f32>()).saturating_sub(start);
        if got < len {
            return Err(Error::Length { what, expected: format!("at least {len} elements"), got });
        }
        Ok(Self { region, address: region.start() + (start * size_of::<f32>()) as u64, len })
    }
}

/// Query, key and value, and what is done to the scores, as in [`ProblemOptions`](crate::ProblemOptions).
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// (batch, num_heads, q_len, head_dim)
    pub q: MachineView<'a>,
    /// (batch, num_kv_heads, kv_len, head_dim)
    pub k: MachineView<'a>,
    /// (batch, num_kv_heads, kv_len, value_dim)
    pub v: MachineView<'a>,
    /// The order of the axes of the context and of all gradients.
    pub layout: Layout,
    /// What the dot products are multiplied by.
    pub scale: f64,
    /// Bounds the scores smoothly: softcap · tanh(scores / softcap). 0 is none.
    pub softcap: Option<f64>,
    /// Which keys each query may attend to.
    pub mask: &'a Rule,
    /// Added to the scores.
    pub bias: Option<MachineBias<'a>>,
    /// ALiBi slopes, (num_heads) or (batch, num_heads).
    pub slopes: Option<MachineNumbers<'a>>,
    /// One more score for each head, which has no value.
    pub sinks: Option<MachineNumbers<'a>>,
    /// Drops some of the weights.
    pub dropout: Option<Dropout>,
}

/// A call of attention on a machine whose sizes and options have been checked.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    pub(super) inputs: Inputs<'a>,
}

impl<'a> Call<'a> {
    /// Checks every size and option.
    ///
    /// # Errors
    ///
    /// One variant for each kind of fault, as [`Problem::new`](crate::Problem::new) has them, and [`Error::Unsupported`] for
    /// sizes that the kernels don't serve: more than 256 columns, or 2^28 queries or keys.
    pub fn new(inputs: Inputs<'a>) -> Result<Self, Error> {
        let inputs = Inputs { softcap: inputs.softcap.filter(|&cap| cap != 0.0), ..inputs };
        let call = Self { inputs };
        call.check_dims()?;
        call.check_sizes()?;
        call.check_numbers()?;
        call.check_options()?;
        Ok(call)
    }

    fn check_dims(&self) -> Result<(), Error> {
        let Inputs { q, k, v, .. } = &self.inputs;
        for (what, view) in [("query", q), ("key", k), ("value", v)] {
            if view.dims.contains(&0) {
                return Err(Error::Empty { what, dims: view.dims });
            }
        }
        let [batch, num_heads, _, d] = q.dims;
        let refuse = |what, expected, got| Err(Error::Dims { what, expected, got });
        if k.dims[0] != batch || k.dims[3] != d || !num_heads.is_multiple_of(k.dims[1]) {
            let expected = format!("batch {batch}, head_dim {d} and a number of heads that divides {num_heads}");
            return refuse("key", expected, k.dims);
        }
        if v.dims[..3] != k.dims[..3] {
            return refuse("value", format!("batch, heads and len {:?}, as the key", &k.dims[..3]), v.dims);
        }
        if [k.element, v.element] != [q.element; 2] {
            let expected = "the elements of the query";
            return Err(Error::Option { what: "key and value", expected, got: format!("{:?}", k.element) });
        }
        Ok(())
    }

    fn check_sizes(&self) -> Result<(), Error> {
        let Inputs { q, k, v, .. } = &self.inputs;
        for (what, got) in [("head_dim", q.dims[3]), ("value_dim", v.dims[3])] {
            if got > MAX_DIM {
                return Err(Error::Unsupported { what, expected: "at most 256", got });
            }
        }
        for (what, got) in [("q_len", q.dims[2]), ("kv_len", k.dims[2]), ("batch", q.dims[0]), ("heads", q.dims[1])] {
            if got > MAX_LEN {
                return Err(Error::Unsupported { what, expected: "at most 2^28", got });
            }
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<(), Error> {
        let refuse = |what, expected, got: f64| Err(Error::Option { what, expected, got: got.to_string() });
        let Inputs { scale, softcap, dropout, .. } = self.inputs;
        if !(scale as f32).is_finite() {
            return refuse("scale", "a finite number", scale);
        }
        if let Some(cap) = softcap.filter(|&cap| !(cap as f32 > 0.0 && ((1.0 / cap) as f32).is_finite())) {
            return refuse("softcap", "a finite number above 0, or 0 for none", cap);
        }
        match dropout {
            Some(Dropout { p, .. }) if !(0.0..1.0).contains(&p) => refuse("dropout", "a probability in [0, 1)", p),
            _ => Ok(()),
        }
    }

    fn check_options(&self) -> Result<(), Error> {
        let (shape, inputs) = (self.shape(), &self.inputs);
        inputs.mask.check(&shape)?;
        let scores = [shape.batch, shape.num_heads, shape.q_len, shape.kv_len];
        if let Some(bias) = inputs.bias
            && bias.dims.iter().zip(scores).any(|(&dim, size)| dim != 1 && dim != size)
        {
            let expected = format!("a shape that broadcasts to (batch, num_heads, q_len, kv_len) = {scores:?}");
            return Err(Error::Dims { what: "bias", expected, got: bias.dims });
        }
        let (heads, all) = (shape.num_heads, shape.batch * shape.num_heads);
        for (what, numbers, lengths) in [("slopes", inputs.slopes, [heads, all]), ("sinks", inputs.sinks, [heads; 2])] {
            if let Some(got) = numbers.map(|numbers| numbers.len).filter(|len| !lengths.contains(len)) {
                return Err(Error::Length { what, expected: format!("{} or {}", lengths[0], lengths[1]), got });
            }
        }
        Ok(())
    }

    /// The sizes of the scores.
    pub fn shape(&self) -> ScoreShape {
        let [batch, num_heads, q_len, _] = self.inputs.q.dims;
        ScoreShape { batch, num_heads, q_len, kv_len: self.inputs.k.dims[2] }
    }

    /// The sizes of query, key and value.
    pub(super) fn dims(&self) -> [[usize; 4]; 3] {
        [self.inputs.q.dims, self.inputs.k.dims, self.inputs.v.dims]
    }

    /// The sizes of the context: (batch, num_heads, q_len, value_dim).
    pub fn context_dims(&self) -> [usize; 4] {
        let [batch, num_heads, q_len, _] = self.inputs.q.dims;
        [batch, num_heads, q_len, self.inputs.v.dims[3]]
    }

    /// Rows of the context.
    pub(super) fn rows(&self) -> usize {
        self.context_dims()[..3].iter().product()
    }

    /// The variant of the kernels for this call.
    pub(super) fn variant(&self, mask: &Lowered, limits: Limits) -> Result<Variant, Error> {
        let Inputs { q, v, .. } = &self.inputs;
        let variant = Variant::new(q.element, [q.dims[3], v.dims[3]], false, limits)?;
        let plain = self.is_plain(variant) && mask.is_limits(&self.shape());
        Ok(Variant { plain, ..variant })
    }

    /// Whether the kernels without options serve everything but the mask.
    pub(super) fn is_plain(&self, variant: Variant) -> bool {
        let Inputs { q, k, v, scale, .. } = &self.inputs;
        [q.dims[3], v.dims[3]] == [variant.head_dim as usize, variant.value_dim as usize]
            && [q, k, v].iter().all(|view| view.is_aligned())
            && *scale as f32 > 0.0
            && !self.has_options()
    }

    fn has_options(&self) -> bool {
        let Inputs { softcap, bias, slopes, sinks, dropout, .. } = &self.inputs;
        softcap.is_some()
            || bias.is_some()
            || slopes.is_some()
            || sinks.is_some()
            || dropout.is_some_and(|of| of.p > 0.0)
    }

    /// The arguments of the kernels that the inputs decide.
    pub(super) fn raw(&self) -> RawProblem {
        let Inputs { q, k, v, scale, softcap, bias, slopes, sinks, dropout, .. } = &self.inputs;
        let (shape, size) = (self.shape(), |size: usize| size as i32);
        let address = |numbers: &Option<MachineNumbers>| numbers.map_or(0, |numbers| numbers.address);
        let slopes_each = slopes.is_some_and(|slopes| slopes.len != shape.num_heads);
        let dropout = dropout.filter(|dropout| dropout.p > 0.0);
        RawProblem {
            q: q.raw(),
            k: k.raw(),
            v: v.raw(),
            bias: bias.map_or(0, |bias| bias.address),
            bias_strides: bias.map_or([0; 4], |bias| bias.strides.map(|stride| stride as i64)),
            bias_dims: bias.map_or([0; 4], |bias| bias.dims.map(size)),
            slopes: address(slopes),
            slopes_batch: if slopes_each { shape.num_heads as i64 } else { 0 },
            sinks: address(sinks),
            seed: dropout.map_or(0, |dropout| dropout.seed),
            dropout_first: dropout.map_or(0, |dropout| dropout.first),
            dropout_keep: dropout.map_or(1.0, |dropout| (1.0 / (1.0 - dropout.p)) as f32),
            dropout_threshold: dropout.map_or(0, |dropout| dropout.threshold()),
            batch: size(shape.batch),
            heads: size(shape.num_heads),
            kv_heads: size(k.dims[1]),
            q_len: size(shape.q_len),
            kv_len: size(shape.kv_len),
            head_dim: size(q.dims[3]),
            value_dim: size(v.dims[3]),
            scale: *scale as f32,
            softcap: softcap.map_or(0.0, |cap| cap as f32),
            ..Default::default()
        }
    }

    /// The memory that the inputs lie in.
    pub(super) fn regions(&self) -> Vec<Region<'a>> {
        let Inputs { q, k, v, bias, slopes, sinks, .. } = &self.inputs;
        let views = [q, k, v].map(|view| view.region).into_iter();
        let numbers = [slopes, sinks].into_iter().flatten().map(|numbers| numbers.region);
        views.chain(bias.map(|bias| bias.region)).chain(numbers).collect()
    }
}
