//! The colour of a weight.

/// Red, green and blue.
pub(crate) type Rgb = [u8; 3];

/// On a light background a larger weight is darker. The lightness alone tells the weights apart, so the map can also be
/// read without seeing hues.
pub(crate) const LIGHT: [Rgb; 5] = [[246, 248, 251], [178, 214, 230], [86, 160, 205], [30, 95, 164], [12, 33, 84]];
/// On a dark background a larger weight is brighter.
pub(crate) const DARK: [Rgb; 5] = [[26, 28, 48], [94, 34, 88], [190, 48, 84], [240, 130, 70], [252, 230, 120]];

/// The range of weights that the colours stand for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Scale {
    /// The scale runs from 0 to the largest weight. It starts below 0 if there are negative weights.
    pub(crate) fn of(weights: &[f32]) -> Self {
        let low = weights.iter().fold(0.0, |low, &weight| f64::min(low, weight.into()));
        let high = weights.iter().fold(0.0, |high, &weight| f64::max(high, weight.into()));
        Self { low, high: if high > low { high } else { low + 1.0 } }
    }

    /// The position of a weight on the scale: 0 is the lowest weight, 1 the highest.
    pub(crate) fn fraction(&self, weight: f32) -> f64 {
        ((f64::from(weight) - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

/// The colour for a fraction of the scale, interpolated linearly between evenly spaced stops.
pub(crate) fn colour(stops: &[Rgb; 5], fraction: f64) -> Rgb {
    let position = fraction * (stops.len() - 1) as f64;
    let below = (position as usize).min(stops.len() - 2);
    let part = position - below as f64;
    std::array::from_fn(|i| {
        (f64::from(stops[below][i]) * (1.0 - part) + f64::from(stops[below + 1][i]) * part).round() as u8
    })
}

/// Whether dark text is easier to read than light text on this background.
pub(crate) fn wants_dark_text(background: Rgb) -> bool {
    let [red, green, blue] = background.map(f64::from);
    // Luma, ITU-R BT.601. The threshold was chosen by eye.
    0.299 * red + 0.587 * green + 0.114 * blue > 115.0
}
