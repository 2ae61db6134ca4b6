//! A step of AdamW, and what is asked of all gradients before it: their norm.
//!
//! Parameters are cut into pieces of at most `PIECE` numbers, whatever their number and their sizes, so that all cores have work
//! until the last piece.

use pulp::{Simd, WithSimd};

use crate::alloc::reserve;
use crate::dtype::{Number, narrow_into};
use crate::error::Error;
use crate::matrix::MatrixMut;
use crate::schedule::for_each_chunk;
use crate::simd::{SimdFloat, as_vectors, as_vectors_mut, instruction_set, load_up_to, store_up_to};

/// Numbers of a piece: enough for some 10 µs of work, which a task should have, and few enough for many pieces.
const PIECE: usize = 16 * 1024;
/// Below so many numbers a second thread costs more to wake than it saves.
const SERIAL_BELOW: usize = 2 * PIECE;
/// Numbers that are widened at a time: whole vectors of any instruction set, and few enough for the first cache.
const BLOCK: usize = 512;

/// The settings of AdamW that all parameters share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConstants {
    /// How much of the first moment stays, in [0, 1).
    pub beta1: f64,
    /// How much of the second moment stays, in [0, 1).
    pub beta2: f64,
    /// What is added to the root of the second moment.
    pub eps: f64,
}

/// A parameter, its gradient, and AdamW's running means of the gradient and of its square.
///
/// The gradient has the parameter's type, or the type that the parameter is computed in.
#[derive(Debug)]
pub struct AdamWParameter<'a, E: Number, G: Number<Float = E::Float> = E> {
    /// The parameter's numbers.
    pub values: &'a mut [E],
    /// Their gradient.
    pub gradient: &'a [G],
    /// The parameter before it was rounded, if a copy of that is kept. The step goes from it, except where its rounding isn't the
    /// parameter's number: there somebody has changed the parameter, and the number is taken from the parameter.
    pub master: Option<&'a mut [E::Float]>,
    /// The running mean of the gradient.
    pub first_moment: &'a mut [E::Float],
    /// The running mean of the gradient's square.
    pub second_moment: &'a mut [E::Float],
    /// The number of the parameter's step; its first is 1.
    pub step: u64,
    /// The learning rate.
    pub learning_rate: f64,
    /// The share of the parameter that a step takes away, as a multiple of the learning rate.
    pub weight_decay: f64,
}

impl AdamWConstants {
    /// Refuses what would divide by zero in the type that is computed in.
    fn check<R: SimdFloat>(&self) -> Result<(), Error> {
        for (what, beta) in [("beta1 of AdamW", self.beta1), ("beta2 of AdamW", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::Option { what, expected: "a number in [0, 1)", got: beta.to_string() });
            }
        }
        if R::from_f64(self.eps) >= R::TINY {
            return Ok(());
        }
        Err(Error::Option { what: "eps of AdamW", expected: "a normal number above 0", got: self.eps.to_string() })
    }
}

impl<'a, E: Number, G: Number<Float = E::Float>> AdamWParameter<'a, E, G> {
    fn check(&self) -> Result<(), Error> {
        if self.step == 0 {
            return Err(Error::Option { what: "step of AdamW", expected: "at least 1", got: "0".into() });
        }
        let expected = self.values.len();
        let lengths = [
            ("gradient of a parameter", self.gradient.len()),
            ("master copy of a parameter", self.master.as_ref().map_or(expected, |master| master.len())),
            ("first moment of a parameter", self.first_moment.len()),
            ("second moment of a parameter", self.second_moment.len()),
        ];
        match lengths.into_iter().find(|(_, got)| *got != expected) {
            Some((what, got)) => Err(Error::Length { what, expected: format!("the parameter's {expected}"), got }),
            None => Ok(()),
        }
    }

    /// Appends the parameter to `pieces`.
    fn cut(self, pieces: &mut Vec<Self>) {
        let Self { step, learning_rate, weight_decay, .. } = self;
        let values = self.values.chunks_mut(PIECE).zip(self.gradient.chunks(PIECE));
        let moments = self.first_moment.chunks_mut(PIECE).zip(self.second_moment.chunks_mut(PIECE));
        let mut masters = self.master.map(|master| master.chunks_mut(PIECE));
        pieces.extend(values.zip(moments).map(|((values, gradient), (first_moment, second_moment))| Self {
            values,
            gradient,
            master: masters.as_mut().and_then(Iterator::next),
            first_moment,
            second_moment,
            step,
            learning_rate,
            weight_decay,
        }));
    }
}

/// One step of AdamW on all parameters, in place.
///
/// θ ← θ - lr · λ · θ, m ← β₁ m + (1 - β₁) g, v ← β₂ v + (1 - β₂) g², and
/// θ ← θ - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε), in this order, where t is the step.
///
/// Half types are computed in f32, which their moments and master copies are kept in, and rounded once.
///
/// Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019), algorithm 2, with the learning rate before λ. Master
/// copies: Micikevicius et al., "Mixed Precision Training" (ICLR 2018), section 3.1.
///
/// # Errors
///
/// Slices of a parameter of different lengths; step 0; too little memory for a list of the pieces. Then nothing is changed.
///
/// # Examples
///
/// ```
/// use attention_kernels::optimizer::{AdamWParameter, AdamWConstants, adamw};
///
/// let (mut values, mut first_moment, mut second_moment) = ([1f32, 2.0], [0.0; 2], [0.0; 2]);
/// let parameter = AdamWParameter {
///     values: &mut values,
///     gradient: &[0.5f32, -3.0],
///     master: None,
///     first_moment: &mut first_moment,
///     second_moment: &mut second_moment,
///     step: 1,
///     learning_rate: 0.1,
///     weight_decay: 0.0,
/// };
/// adamw(AdamWConstants { beta1: 0.9, beta2: 0.999, eps: 1e-8 }, vec![parameter])?;
/// // The first step has the length of the learning rate.
/// assert!((values[0] - 0.9).abs() < 1e-6 && (values[1] - 2.1).abs() < 1e-6);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn adamw<E: Number, G: Number<Float = E::Float>>(
    constants: AdamWConstants,
    parameters: Vec<AdamWParameter<E, G>>,
) -> Result<(), Error> {
    constants.check::<E::Float>()?;
    parameters.iter().try_for_each(AdamWParameter::check)?;
    let count = parameters.iter().map(|parameter| parameter.values.len()).sum::<usize>();
    let pieces = parameters.iter().map(|parameter| parameter.values.len().div_ceil(PIECE)).sum();
    let mut cut = reserve("pieces of the parameters", pieces)?;
    parameters.into_iter().for_each(|parameter| parameter.cut(&mut cut));
    for_each(count, &mut cut, |piece| instruction_set().dispatch(Adam { constants, piece }));
    Ok(())
}

/// Calls `f` for each piece, in parallel if there are enough numbers.
fn for_each<T: Send>(count: usize, pieces: &mut [T], f: impl Fn(&mut T) + Send + Sync) {
    if count < SERIAL_BELOW {
        return pieces.iter_mut().for_each(f);
    }
    for_each_chunk(pieces, 1, |_, pieces| pieces.iter_mut().for_each(&f));
}

struct Adam<'p, 'a, E: Number, G: Number<Float = E::Float>> {
    constants: AdamWConstants,
    piece: &'p mut AdamWParameter<'a, E, G>,
}

impl<E: Number, G: Number<Float = E::Float>> WithSimd for Adam<'_, '_, E, G> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let factors = Factors::<E::Float, S>::new(simd, self.constants, self.piece);
        let AdamWParameter { values, gradient, master, first_moment, second_moment, .. } = self.piece;
        let len = values.len();
        if master.is_none() {
            let values = MatrixMut::new(values, 1, len, len).into_downcast::<E::Float>();
            if let (Some(values), Some(gradient)) = (values, G::as_floats(gradient)) {
                return factors.step(simd, values.into_row(0), gradient, first_moment, second_moment);
            }
        }
        let (mut wide, mut wide_gradient) = ([E::Float::ZERO; BLOCK], [E::Float::ZERO; BLOCK]);
        for start in (0..len).step_by(BLOCK) {
            let end = (start + BLOCK).min(len);
            let mut stepped = &mut wide[..end - start];
            let gradient_block = &mut wide_gradient[..end - start];
            E::widen_all(&values[start..end], stepped);
            G::widen_all(&gradient[start..end], gradient_block);
            if let Some(master) = master {
                take_changed::<E>(stepped, &mut master[start..end]);
                stepped = &mut master[start..end];
            }
            let first = &mut first_moment[start..end];
            factors.step(simd, stepped, gradient_block, first, &mut second_moment[start..end]);
            narrow_into(stepped, &mut values[start..end]);
        }
    }
}

/// Takes over from a parameter's numbers, widened and at most a block of them, those that aren't the master copy's rounded numbers.
#[inline(always)]
fn take_changed<E: Number>(wide: &[E::Float], master: &mut [E::Float]) {
    let (mut narrow, mut rounded) = ([E::default(); BLOCK], [E::Float::ZERO; BLOCK]);
    let (narrow, rounded) = (&mut narrow[..master.len()], &mut rounded[..master.len()]);
    narrow_into(master, narrow);
    E::widen_all(narrow, rounded);
    for ((master, rounded), x) in master.iter_mut().zip(rounded).zip(wide) {
        *master = if *rounded == *x { *master } else { *x };
    }
}

/// What the numbers of a step are multiplied by.
struct Factors<R: SimdFloat, S: Simd> {
    /// 1 - lr · λ
    keep: R::Vector<S>,
    /// 1 - β₁ and β₁
    first: [R::Vector<S>; 2],
    /// Whether PyTorch's `lerp` starts from the moment: where 1 - β₁ is below 1/2.
    from_moment: bool,
    /// β₂ and 1 - β₂
    second: [R::Vector<S>; 2],
    /// √(1 - β₂ᵗ)
    root_correction: R::Vector<S>,
    eps: R::Vector<S>,
    /// lr / (1 - β₁ᵗ)
    step_size: R::Vector<S>,
}

impl<R: SimdFloat, S: Simd> Factors<R, S> {
    #[inline(always)]
    fn new<E: Number<Float = R>, G: Number<Float = R>>(
        simd: S,
        constants: AdamWConstants,
        piece: &AdamWParameter<E, G>,
    ) -> Self {
        let AdamWConstants { beta1, beta2, eps } = constants;
        let AdamWParameter { step, learning_rate, weight_decay, .. } = *piece;
        macro_rules! splat {
            ($x:expr) => {
                R::splat(simd, R::from_f64($x))
            };
        }
        let [correction1, correction2] = [1.0 - beta1.powf(step as f64), 1.0 - beta2.powf(step as f64)];
        Self {
            keep: splat!(1.0 - learning_rate * weight_decay),
            first: [splat!(1.0 - beta1), splat!(beta1)],
            from_moment: 1.0 - beta1 < 0.5,
            second: [splat!(beta2), splat!(1.0 - beta2)],
            root_correction: splat!(correction2.sqrt()),
            eps: splat!(eps),
            step_size: splat!(learning_rate / correction1),
        }
    }

    /// A step of slices of equal length. The last numbers take the same way as whole vectors do, and get the same bits.
    #[inline(always)]
    fn step(&self, simd: S, values: &mut [R], gradient: &[R], first: &mut [R], second: &mut [R]) {
        let whole = values.len() / R::lanes::<S>() * R::lanes::<S>();
        let ((values, last_values), (gradient, last_gradient)) = (values.split_at_mut(whole), gradient.split_at(whole));
        let ((first, last_first), (second, last_second)) = (first.split_at_mut(whole), second.split_at_mut(whole));
        let values = as_vectors_mut::<R, S>(values).iter_mut().zip(as_vectors::<R, S>(gradient));
        let moments = as_vectors_mut::<R, S>(first).iter_mut().zip(as_vectors_mut::<R, S>(second));
        for ((value, gradient), (m, v)) in values.zip(moments) {
            [*value, *m, *v] = self.vector(simd, *gradient, [*value, *m, *v]);
        }
        let loaded = [load_up_to(simd, last_values), load_up_to(simd, last_first), load_up_to(simd, last_second)];
        let [value, m, v] = self.vector(simd, load_up_to(simd, last_gradient), loaded);
        store_up_to::<R, S>(last_values, value);
        store_up_to::<R, S>(last_first, m);
        store_up_to::<R, S>(last_second, v);
    }

    /// The parameter and its moments after the step, in the order of PyTorch's operations, so that long runs follow PyTorch's.
    #[inline(always)]
    fn vector(&self, simd: S, gradient: R::Vector<S>, [value, m, v]: [R::Vector<S>; 3]) -> [R::Vector<S>; 3] {
        let towards = R::vsub(simd, gradient, m);
        let m = if self.from_moment {
            R::mul_add(simd, self.first[0], towards, m)
        } else {
            R::vsub(simd, gradient, R::vmul(simd, towards, self.first[1]))
        };
        let square = R::vmul(simd, R::vmul(simd, self.second[1], gradient), gradient);
        let v = R::vadd(simd, R::vmul(simd, v, self.second[0]), square);
        let root = R::vadd(simd, R::vdiv(simd, R::vsqrt(simd, v), self.root_correction), self.eps);
        let update = R::vdiv(simd, R::vmul(simd, self.step_size, m), root);
        [R::vsub(simd, R::vmul(simd, value, self.keep), update), m, v]
    }
}

/// The sum of the squares of each slice, in f64. It is infinite or NaN exactly if one of the numbers is, unless squares of f64
/// overflow.
///
/// # Errors
///
/// Too little memory for a list of the pieces.
///
/// # Examples
///
/// ```
/// use attention_kernels::optimizer::sums_of_squares;
///
/// assert_eq!(sums_of_squares(&[&[3f32, 4.0][..], &[1e30]])?, [25.0, f64::from(1e30f32).powi(2)]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn sums_of_squares<E: Number>(slices: &[&[E]]) -> Result<Vec<f64>, Error> {
    let count = slices.iter().map(|slice| slice.len()).sum::<usize>();
    let mut pieces = reserve("pieces of the gradients", slices.iter().map(|slice| slice.len().div_ceil(PIECE)).sum())?;
    for (index, slice) in slices.iter().enumerate() {
        pieces.extend(slice.chunks(PIECE).map(|piece| (index, piece, 0.0)));
    }
    for_each(count, &mut pieces, |(_, piece, sum)| *sum = instruction_set().dispatch(Squares { piece }));
    let mut sums = reserve("sums of squares", slices.len())?;
    sums.resize(slices.len(), 0.0);
    pieces.iter().for_each(|(index, _, sum)| sums[*index] += sum);
    Ok(sums)
}

struct Squares<'a, E: Number> {
    piece: &'a [E],
}

impl<E: Number> WithSimd for Squares<'_, E> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        if let Some(numbers) = E::as_floats(self.piece) {
            return squares(numbers);
        }
        let (mut wide, mut sum) = ([E::Float::ZERO; BLOCK], 0.0);
        for block in self.piece.chunks(BLOCK) {
            let wide = &mut wide[..block.len()];
            E::widen_all(block, wide);
            sum += squares(wide);
        }
        sum
    }
}

/// The sum of the squares of some numbers, in an order that is the same for every instruction set.
#[inline(always)]
fn squares<R: SimdFloat>(numbers: &[R]) -> f64 {
    // A core reads four streams from memory 1.6 times as fast as one: measured on two cores of a Zen 3 server.
    const STREAMS: usize = 4;
    const LINE: usize = 16;
    let (lines, rest) = numbers.as_chunks::<LINE>();
    let (streams, last) = lines.split_at(lines.len() / STREAMS * STREAMS);
    let [a, b, c, d] = std::array::from_fn(|i| &streams[i * streams.len() / STREAMS..][..streams.len() / STREAMS]);
    let mut sums = [0f64; LINE];
    for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
        add_squares(a, &mut sums);
        add_squares(b, &mut sums);
        add_squares(c, &mut sums);
        add_squares(d, &mut sums);
    }
    for line in last {
        add_squares(line, &mut sums);
    }
    sums.iter().sum::<f64>() + rest.iter().map(|x| x.to_f64() * x.to_f64()).sum::<f64>()
}

/// Adds the square of number i to sum i.
#[inline(always)]
fn add_squares<R: SimdFloat, const LINE: usize>(numbers: &[R; LINE], sums: &mut [f64; LINE]) {
    for (sum, x) in sums.iter_mut().zip(numbers) {
        *sum += x.to_f64() * x.to_f64();
    }
}

/// Multiplies all numbers of some slices by a factor, in place.
///
/// # Errors
///
/// Too little memory for a list of the pieces.
///
/// # Examples
///
/// ```
/// let mut gradient = [2f32, -4.0];
/// attention_kernels::optimizer::scale(vec![&mut gradient[..]], 0.5)?;
/// assert_eq!(gradient, [1.0, -2.0]);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
pub fn scale<E: Number>(slices: Vec<&mut [E]>, factor: f64) -> Result<(), Error> {
    let count = slices.iter().map(|slice| slice.len()).sum::<usize>();
    let mut pieces = reserve("pieces of the gradients", slices.iter().map(|slice| slice.len().div_ceil(PIECE)).sum())?;
    slices.into_iter().for_each(|slice| pieces.extend(slice.chunks_mut(PIECE)));
    for_each(count, &mut pieces, |piece| instruction_set().dispatch(Scale { piece, factor }));
    Ok(())
}

struct Scale<'a, E: Number> {
    piece: &'a mut [E],
    factor: f64,
}

impl<E: Number> WithSimd for Scale<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (factor, mut wide) = (E::Float::from_f64(self.factor), [E::Float::ZERO; BLOCK]);
        for block in self.piece.chunks_mut(BLOCK) {
            let wide = &mut wide[..block.len()];
            E::widen_all(block, wide);
            for x in wide.iter_mut() {
                *x *= factor;
            }
            narrow_into(wide, block);
        }
    }
}

#[cfg(test)]
#[path = "optimizer_tests.rs"]
mod tests;
