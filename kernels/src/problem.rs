//! One call of attention: views of slices, and what is done to the scores. Everything is checked here, once.

use std::ops::Range;

use crate::alloc::product;
use crate::dropout::Dropout;
use crate::dtype::{Number, Source, widen_rows};
use crate::error::Error;
use crate::gemm::microkernel::pad;
use crate::mask::{Rule, ScoreShape};
use crate::matrix::Matrix;
use crate::part::{HeadNumbers, Part};
use crate::simd::SimdFloat;

/// A tensor (batch, heads, len, dim) in a slice, whose last axis is contiguous.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, E> {
    data: &'a [E],
    /// Of batch, heads and len.
    strides: [usize; 3],
    dims: [usize; 4],
}

/// The index of the last element of a tensor without empty axes; none if it can't be counted.
fn last_index(dims: [usize; 4], strides: [usize; 4]) -> Option<usize> {
    let steps = strides.iter().zip(dims);
    steps.into_iter().try_fold(0usize, |last, (stride, dim)| stride.checked_mul(dim - 1)?.checked_add(last))
}

pub(crate) fn check_bounds(what: &'static str, len: usize, dims: [usize; 4], strides: [usize; 4]) -> Result<(), Error> {
    let fits = dims.contains(&0) || last_index(dims, strides).is_some_and(|last| last < len);
    if fits { Ok(()) } else { Err(Error::OutOfBounds { what, dims, strides, len }) }
}

impl<'a, E: Number> View<'a, E> {
    /// The element at (b, h, i, c) is `data[b * strides[0] + h * strides[1] + i * strides[2] + c]`. `what` names the tensor in
    /// errors.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] if an element would lie outside `data`.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::{Error, View};
    ///
    /// // Two tokens of two heads, token by token.
    /// let data = [0.0f32, 0.1, 1.0, 1.1, 2.0, 2.1, 3.0, 3.1];
    /// let view = View::new("query", &data, [8, 2, 4], [1, 2, 2, 2])?;
    /// assert_eq!(view.row(0, 1, 0), [1.0, 1.1]);
    /// assert!(matches!(View::new("query", &data, [8, 2, 4], [1, 2, 3, 2]), Err(Error::OutOfBounds { .. })));
    /// # Ok::<(), Error>(())
    /// ```
    pub fn new(what: &'static str, data: &'a [E], strides: [usize; 3], dims: [usize; 4]) -> Result<Self, Error> {
        check_bounds(what, data.len(), dims, [strides[0], strides[1], strides[2], 1])?;
        Ok(Self { data, strides, dims })
    }

    /// (batch, heads, len, dim)
    pub fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// The indices `range` of an axis: 0 is batch, 1 heads, 2 len.
    ///
    /// # Errors
    ///
    /// [`Error::Dims`] if the axis has no such indices, or is none of the three.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::View;
    ///
    /// let data = [0.0f32, 1.0, 2.0, 3.0];
    /// let tokens = View::new("key", &data, [4, 4, 1], [1, 1, 4, 1])?.narrow(2, 1..3)?;
    /// assert_eq!((tokens.dims(), tokens.row(0, 0, 1)), ([1, 1, 2, 1], &[2.0][..]));
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    pub fn narrow(mut self, axis: usize, range: Range<usize>) -> Result<Self, Error> {
        if axis > 2 || range.start > range.end || range.end > self.dims[axis] {
            let expected = format!("indices {range:?} of axis {axis}");
            return Err(Error::Dims { what: "view", expected, got: self.dims });
        }
        self.dims[axis] = range.len();
        // An empty view may start behind the end of its slice.
        let first = if self.dims.contains(&0) { 0 } else { range.start * self.strides[axis] };
        self.data = &self.data[first..];
        Ok(self)
    }

    /// The numbers of one row.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    #[inline]
    pub fn row(&self, b: usize, h: usize, i: usize) -> &'a [E] {
        self.matrix((b, h), i..i + 1).row(0)
    }

    /// Some rows of a (sequence, head).
    #[inline(always)]
    fn matrix(&self, (b, h): (usize, usize), range: Range<usize>) -> Matrix<'a, E> {
        let ([sb, sh, si], [batch, heads, len, dim]) = (self.strides, self.dims);
        assert!(b < batch && h < heads && range.start < len && range.end <= len, "rows of the tensor");
        Matrix::new(&self.data[b * sb + h * sh + range.start * si..], range.len(), dim, si)
    }
}

impl<E: Number> Source<E::Float> for View<'_, E> {
    fn dims(&self) -> [usize; 4] {
        self.dims
    }

    fn rows<'m>(
        &'m self,
        at: (usize, usize),
        range: Range<usize>,
        scratch: &'m mut [E::Float],
    ) -> Matrix<'m, E::Float> {
        let matrix = self.matrix(at, range);
        matrix.downcast().unwrap_or_else(|| widen_rows(matrix, scratch))
    }

    fn bf16_rows(&self, at: (usize, usize), range: Range<usize>) -> Option<Matrix<'_, u16>> {
        self.matrix(at, range).downcast::<half::bf16>().map(Matrix::bits)
    }
}

/// An additive bias of a shape that broadcasts to (batch, num_heads, q_len, kv_len), in a slice.
#[derive(Clone, Copy, Debug)]
pub struct BiasView<'a, R> {
    data: &'a [R],
    dims: [usize; 4],
    /// Of all four axes; 0 where the bias broadcasts.
    strides: [usize; 4],
}

impl<'a, R> BiasView<'a, R> {
    /// The element at (b, h, i, j) is `data[b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3]]`. An axis of
    /// length 1 broadcasts, whatever its stride.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] if an axis has length 0, [`Error::OutOfBounds`] if an element would lie outside `data`.
    pub fn new(data: &'a [R], dims: [usize; 4], mut strides: [usize; 4]) -> Result<Self, Error> {
        if dims.contains(&0) {
            return Err(Error::Empty { what: "bias", dims });
        }
        check_bounds("bias", data.len(), dims, strides)?;
        for (stride, dim) in strides.iter_mut().zip(dims) {
            *stride = if dim == 1 { 0 } else { *stride };
        }
        Ok(Self { data, dims, strides })
    }

    /// The lengths of the four axes, each of which may be 1.
    pub fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// Of all four axes; 0 where the bias broadcasts.
    #[inline(always)]
    pub(crate) fn strides(&self) -> [usize; 4] {
        self.strides
    }

    /// The elements from (b, h, i, j) on.
    #[inline(always)]
    pub(crate) fn from(&self, (b, h): (usize, usize), i: usize, j: usize) -> &'a [R] {
        let [sb, sh, si, sj] = self.strides;
        &self.data[b * sb + h * sh + i * si + j * sj..]
    }
}

/// What is done to the scores, in this order: scale, softcap, bias and ALiBi, mask, softmax, dropout. The default is plain
/// attention.
#[derive(Clone, Copy, Debug)]
pub struct ProblemOptions<'a, R> {
    /// What the dot products are multiplied by. None is 1 / sqrt(head_dim).
    pub scale: Option<f64>,
    /// Bounds the scores smoothly: softcap · tanh(scores / softcap). 0 is none.
    pub softcap: Option<f64>,
    /// Which keys each query may attend to.
    pub mask: &'a Rule,
    /// Added to the scores.
    pub bias: Option<BiasView<'a, R>>,
    /// ALiBi slopes, (num_heads) or (batch, num_heads): slope · |distance| is subtracted from the scores, where the last query
    /// stands at the last key.
    pub slopes: Option<&'a [R]>,
    /// Drops some of the weights.
    pub dropout: Option<Dropout>,
    /// Where the scores stand among those of a larger problem. Mask, bias, slopes and dropout are then those of the whole.
    pub part: Option<Part>,
    /// The numbers of the heads that dropout counts. None: 0, 1, 2, ...
    pub heads: Option<HeadNumbers>,
}

impl<R> Default for ProblemOptions<'_, R> {
    fn default() -> Self {
        Self {
            scale: None,
            softcap: None,
            mask: &Rule::Full,
            bias: None,
            slopes: None,
            dropout: None,
            part: None,
            heads: None,
        }
    }
}

/// A call of attention whose sizes and options have been checked.
///
/// context = softmax(mask(softcap(scale · q · kᵀ) + bias)) · v
pub struct Problem<'a, E: Number> {
    q: View<'a, E>,
    k: View<'a, E>,
    v: View<'a, E>,
    scale: f64,
    options: ProblemOptions<'a, E::Float>,
}

impl<'a, E: Number> Problem<'a, E> {
    /// Checks every size and option.
    ///
    /// # Shapes
    ///
    /// q (batch, num_heads, q_len, head_dim), k (batch, num_kv_heads, kv_len, head_dim), v (batch, num_kv_heads, kv_len,
    /// value_dim), where num_heads is a multiple of num_kv_heads.
    ///
    /// # Errors
    ///
    /// One variant for each kind of fault: [`Error::Empty`] for a size of 0, [`Error::Dims`] for sizes that don't fit each other
    /// or a bias that doesn't broadcast, [`Error::Length`] for slopes, [`Error::Option`] for a scale, softcap or dropout out of
    /// its range, [`Error::Mask`] for a mask of another size, [`Error::Memory`] for a result of more bytes than can be counted.
    pub fn new(
        q: View<'a, E>,
        k: View<'a, E>,
        v: View<'a, E>,
        options: ProblemOptions<'a, E::Float>,
    ) -> Result<Self, Error> {
        let scale = options.scale.unwrap_or(1.0 / (q.dims()[3] as f64).sqrt());
        let options = ProblemOptions { softcap: options.softcap.filter(|&cap| cap != 0.0), ..options };
        let problem = Self { q, k, v, scale, options };
        problem.check_dims()?;
        problem.check_numbers()?;
        problem.check_options()?;
        Ok(problem)
    }

    fn check_dims(&self) -> Result<(), Error> {
        for (what, view) in [("query", &self.q), ("key", &self.k), ("value", &self.v)] {
            if view.dims.contains(&0) {
                return Err(Error::Empty { what, dims: view.dims });
            }
        }
        let [batch, num_heads, q_len, d] = self.q.dims;
        let [_, kv_heads, kv_len, dv] = [self.k.dims[0], self.k.dims[1], self.k.dims[2], self.v.dims[3]];
        if self.k.dims[0] != batch || self.k.dims[3] != d {
            let expected = format!("batch {batch} and head_dim {d}, as the query");
            return Err(Error::Dims { what: "key", expected, got: self.k.dims });
        }
        if !num_heads.is_multiple_of(kv_heads) {
            let expected = format!("a number of heads that divides the query's {num_heads}");
            return Err(Error::Dims { what: "key", expected, got: self.k.dims });
        }
        if self.v.dims[..3] != self.k.dims[..3] {
            let expected = format!("batch, heads and len {:?}, as the key", &self.k.dims[..3]);
            return Err(Error::Dims { what: "value", expected, got: self.v.dims });
        }
        // Results and what a task keeps are at most 64 times as large as these, in numbers of 8 bytes.
        let row = pad(d.max(dv).min(isize::MAX as usize)).saturating_add(2);
        product("context", &[batch, num_heads, q_len, row, 64 * 8])?;
        product("gradient of the key", &[batch, kv_heads, kv_len, row, 64 * 8])?;
        Ok(())
    }

    /// Scale, softcap and dropout, as numbers of the type that is computed in.
    fn check_numbers(&self) -> Result<(), Error> {
        let is_finite = |x: f64| E::Float::from_f64(x).to_f64().is_finite();
        let refuse = |what, expected, got: f64| Err(Error::Option { what, expected, got: got.to_string() });
        if !is_finite(self.scale) {
            return refuse("scale", "a finite number", self.scale);
        }
        if let Some(cap) = self.options.softcap {
            // The scores are divided by the softcap.
            let is_invertible = E::Float::from_f64(cap) > E::Float::ZERO && is_finite(1.0 / cap);
            if !is_invertible || !is_finite(cap) {
                return refuse("softcap", "a finite number above 0, or 0 for none", cap);
            }
        }
        match self.options.dropout {
            Some(Dropout { p, .. }) if !(0.0..1.0).contains(&p) => refuse("dropout", "a probability in [0, 1)", p),
            _ => Ok(()),
        }
    }

    fn check_options(&self) -> Result<(), Error> {
        let shape = self.part().check(&self.shape())?.whole;
        self.options.heads.map_or(Ok(()), |heads| heads.check(&shape))?;
        self.options.mask.check(&shape)?;
        let scores = [shape.batch, shape.num_heads, shape.q_len, shape.kv_len];
        if let Some(bias) = self.options.bias
            && bias.dims.iter().zip(scores).any(|(&dim, size)| dim != 1 && dim != size)
        {
            let expected = format!("a shape that broadcasts to (batch, num_heads, q_len, kv_len) = {scores:?}");
            return Err(Error::Dims { what: "bias", expected, got: bias.dims });
        }
        let heads = [shape.num_heads, shape.batch * shape.num_heads];
        match self.options.slopes {
            Some(slopes) if !heads.contains(&slopes.len()) => {
                let expected = format!("one for each of {} heads, or of {} heads of all sequences", heads[0], heads[1]);
                Err(Error::Length { what: "slopes", expected, got: slopes.len() })
            }
            _ => Ok(()),
        }
    }

    /// The sizes of the scores.
    pub fn shape(&self) -> ScoreShape {
        let [batch, num_heads, q_len, _] = self.q.dims;
        ScoreShape { batch, num_heads, q_len, kv_len: self.k.dims[2] }
    }

    /// Where the scores stand among those of the whole: everywhere, if they are no part.
    pub(crate) fn part(&self) -> Part {
        self.options.part.unwrap_or_else(|| Part::all_of(self.shape()))
    }

    /// The sizes of the query: (batch, num_heads, q_len, head_dim).
    pub fn q_dims(&self) -> [usize; 4] {
        self.q.dims
    }

    /// The sizes of the key: (batch, num_kv_heads, kv_len, head_dim).
    pub fn k_dims(&self) -> [usize; 4] {
        self.k.dims
    }

    /// The sizes of the value: (batch, num_kv_heads, kv_len, value_dim).
    pub fn v_dims(&self) -> [usize; 4] {
        self.v.dims
    }

    /// The sizes of the context: (batch, num_heads, q_len, value_dim).
    pub fn context_dims(&self) -> [usize; 4] {
        [self.q.dims[0], self.q.dims[1], self.q.dims[2], self.v.dims[3]]
    }

    /// What is done to the scores.
    pub fn options(&self) -> &ProblemOptions<'a, E::Float> {
        &self.options
    }

    /// Query, key and value.
    pub(crate) fn views(&self) -> [&View<'a, E>; 3] {
        [&self.q, &self.k, &self.v]
    }

    /// What the dot products are multiplied by.
    pub(crate) fn scale(&self) -> f64 {
        self.scale
    }
}

#[cfg(test)]
#[path = "problem_tests.rs"]
mod tests;
