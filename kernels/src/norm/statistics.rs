//! What a row is normalised by, and the normalised numbers.

use pulp::{Scalar, Simd};

use crate::simd::{SimdFloat, as_vectors};

/// So many numbers of a row are summed in their own type, and such sums in f64: a longer sum of f32 would lose more to rounding. It is
/// a multiple of the four vectors that are summed side by side.
pub(super) const PIECE: usize = 1024;

/// What a row is normalised by: (x - mean - correction) · inverse.
#[derive(Clone, Copy)]
pub(super) struct Statistics<R> {
    mean: R,
    /// The mean of x - mean, which rounding makes other than zero.
    correction: R,
    /// 1 / sqrt(variance + eps)
    pub(super) inverse: R,
}

impl<R: SimdFloat> Statistics<R> {
    /// The statistics of a row; without a mean for RMS norm. They are not finite if the row isn't, or if a square overflows.
    ///
    /// Source of the correction: Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance" (1983), equation 1.7.
    #[inline(always)]
    pub(super) fn of<S: Simd, const CENTRED: bool>(simd: S, x: &[R], eps: R) -> Self {
        let count = R::from_f64(x.len() as f64);
        let (mut total, mut rest, mut squares) = (0.0, 0.0, 0.0);
        if CENTRED {
            for piece in x.chunks(PIECE) {
                total += sum(simd, piece).to_f64();
            }
        }
        let mean = R::from_f64(total) / count;
        for piece in x.chunks(PIECE) {
            let [of_rest, of_squares] = moments::<R, S, CENTRED>(simd, piece, mean);
            rest += of_rest.to_f64();
            squares += of_squares.to_f64();
        }
        let (rest, squares) = (R::from_f64(rest), R::from_f64(squares));
        let correction = rest / count;
        let variance = squares / count - correction * correction;
        // Rounding can make the difference negative. NaN stays.
        let variance = if variance < R::ZERO { R::ZERO } else { variance };
        let inverse = R::from_f64(1.0 / (variance + eps).to_f64().sqrt());
        Self { mean, correction, inverse: if variance.is_finite() { inverse } else { R::ZERO * variance } }
    }
}

/// A row to normalise.
#[derive(Clone, Copy)]
pub(super) struct Row<'a, R> {
    /// Its numbers, divided by `divisor`.
    pub(super) x: &'a [R],
    pub(super) divisor: R,
    pub(super) statistics: Statistics<R>,
}

impl<'a, R: SimdFloat> Row<'a, R> {
    /// A row with its statistics. If they are not finite, it is divided by its largest number first, to `divided`.
    #[inline(always)]
    pub(super) fn new<S: Simd, const CENTRED: bool>(simd: S, x: &'a [R], eps: R, divided: &'a mut [R]) -> Self {
        let statistics = Statistics::of::<S, CENTRED>(simd, x, eps);
        if statistics.inverse.is_finite() {
            return Self { x, divisor: R::ONE, statistics };
        }
        Self::divided::<CENTRED>(x, eps, divided)
    }

    /// Without vectors: a function that isn't inlined is compiled without their instructions.
    #[cold]
    #[inline(never)]
    fn divided<const CENTRED: bool>(x: &'a [R], eps: R, divided: &'a mut [R]) -> Self {
        let divisor = divide_by_largest(x, divided);
        let statistics = Statistics::of::<_, CENTRED>(Scalar, divided, divided_eps(eps, divisor));
        Self { x: divided, divisor, statistics }
    }

    /// The same from number `first` on.
    #[inline(always)]
    pub(super) fn from(self, first: usize) -> Self {
        Self { x: &self.x[first..], ..self }
    }
}

/// The whole vectors of a slice and the numbers behind them.
#[inline(always)]
fn split<R: SimdFloat, S: Simd>(x: &[R]) -> (&[R::Vector<S>], &[R]) {
    let vectors = as_vectors::<R, S>(x);
    (vectors, &x[vectors.len() * R::lanes::<S>()..])
}

/// The sum of a piece of a row.
#[inline(always)]
fn sum<R: SimdFloat, S: Simd>(simd: S, x: &[R]) -> R {
    let (vectors, rest) = split::<R, S>(x);
    let (fours, others) = vectors.as_chunks::<4>();
    // Four sums at a time, since each addition waits for the one before it.
    let mut sums = [R::splat(simd, R::ZERO); 4];
    for four in fours {
        for i in 0..4 {
            sums[i] = R::vadd(simd, sums[i], four[i]);
        }
    }
    for &vector in others {
        sums[0] = R::vadd(simd, sums[0], vector);
    }
    let mut total = reduce(simd, sums);
    for &x in rest {
        total += x;
    }
    total
}

#[inline(always)]
fn reduce<R: SimdFloat, S: Simd>(simd: S, [a, b, c, d]: [R::Vector<S>; 4]) -> R {
    R::reduce_add(simd, R::vadd(simd, R::vadd(simd, a, b), R::vadd(simd, c, d)))
}

/// The sums of x - mean and of its squares over a piece of a row; of x² alone for RMS norm.
#[inline(always)]
fn moments<R: SimdFloat, S: Simd, const CENTRED: bool>(simd: S, x: &[R], mean: R) -> [R; 2] {
    let (vectors, rest) = split::<R, S>(x);
    let (fours, others) = vectors.as_chunks::<4>();
    let (zero, means) = (R::splat(simd, R::ZERO), R::splat(simd, mean));
    let (mut sums, mut squares) = ([zero; 4], [zero; 4]);
    for four in fours {
        for i in 0..4 {
            let x = if CENTRED { R::vsub(simd, four[i], means) } else { four[i] };
            if CENTRED {
                sums[i] = R::vadd(simd, sums[i], x);
            }
            squares[i] = R::mul_add(simd, x, x, squares[i]);
        }
    }
    for &x in others {
        let x = if CENTRED { R::vsub(simd, x, means) } else { x };
        if CENTRED {
            sums[0] = R::vadd(simd, sums[0], x);
        }
        squares[0] = R::mul_add(simd, x, x, squares[0]);
    }
    let (mut sum, mut square) = (if CENTRED { reduce(simd, sums) } else { R::ZERO }, reduce(simd, squares));
    for &x in rest {
        let x = if CENTRED { x - mean } else { x };
        if CENTRED {
            sum += x;
        }
        square += x * x;
    }
    [sum, square]
}

/// [`Statistics`] in every lane.
#[derive(Clone, Copy)]
pub(super) struct Splats<V> {
    mean: V,
    correction: V,
    inverse: V,
}

impl<R: SimdFloat> Statistics<R> {
    #[inline(always)]
    pub(super) fn splats<S: Simd>(self, simd: S) -> Splats<R::Vector<S>> {
        let splat = |x| R::splat(simd, x);
        Splats { mean: splat(self.mean), correction: splat(self.correction), inverse: splat(self.inverse) }
    }
}

/// A normalised vector, without weight and bias.
#[inline(always)]
pub(super) fn normalise_vector<R: SimdFloat, S: Simd, const CENTRED: bool>(
    simd: S,
    x: R::Vector<S>,
    by: Splats<R::Vector<S>>,
) -> R::Vector<S> {
    let x = if CENTRED { R::vsub(simd, R::vsub(simd, x, by.mean), by.correction) } else { x };
    R::vmul(simd, x, by.inverse)
}

/// Divides a row that is not finite, or whose squares are not, by its largest finite magnitude, which is the result: a row has the
/// same norm then, with another epsilon.
fn divide_by_largest<R: SimdFloat>(x: &[R], divided: &mut [R]) -> R {
    let mut largest = R::ZERO;
    for &x in x {
        let magnitude = if x < R::ZERO { -x } else { x };
        if magnitude.is_finite() && largest < magnitude {
            largest = magnitude;
        }
    }
    if largest == R::ZERO {
        largest = R::ONE;
    }
    for (to, &x) in divided.iter_mut().zip(x) {
        *to = x / largest;
    }
    largest
}

/// The epsilon of a divided row. A row of equal numbers has nothing else to be divided by.
fn divided_eps<R: SimdFloat>(eps: R, divisor: R) -> R {
    let eps = eps / divisor / divisor;
    if eps < R::TINY { R::TINY } else { eps }
}
