//! Which colour a weight has.

/// A colour in red, green and blue.
pub(super) type Rgb = [u8; 3];

/// On paper: the more weight, the darker. Lightness alone tells the weights apart, whatever colours the eye sees.
pub(super) const LIGHT: [Rgb; 5] = [[246, 248, 251], [178, 214, 230], [86, 160, 205], [30, 95, 164], [12, 33, 84]];
/// On a dark ground: the more weight, the brighter.
pub(super) const DARK: [Rgb; 5] = [[26, 28, 48], [94, 34, 88], [190, 48, 84], [240, 130, 70], [252, 230, 120]];

/// The weights from one end of the colours to the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Scale {
    /// From 0 to the greatest weight; from below 0 if there are such.
    pub(super) fn of(weights: &[f32]) -> Self {
        let low = weights.iter().fold(0.0, |low, &weight| f64::min(low, weight.into()));
        let high = weights.iter().fold(0.0, |high, &weight| f64::max(high, weight.into()));
        Self { low, high: if high > low { high } else { low + 1.0 } }
    }

    /// How far up the scale a weight is, from 0 to 1.
    pub(super) fn place(&self, weight: f32) -> f64 {
        ((f64::from(weight) - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

/// The colour at a place from 0 to 1.
pub(super) fn colour(stops: &[Rgb; 5], place: f64) -> Rgb {
    let place = place * (stops.len() - 1) as f64;
    let below = (place as usize).min(stops.len() - 2);
    let part = place - below as f64;
    std::array::from_fn(|i| {
        (f64::from(stops[below][i]) * (1.0 - part) + f64::from(stops[below + 1][i]) * part).round() as u8
    })
}

/// Whether black rather than white text can be read on a colour.
pub(super) fn wants_dark_text(colour: Rgb) -> bool {
    let [red, green, blue] = colour.map(f64::from);
    // Relative luminance, ITU-R BT.601.
    0.299 * red + 0.587 * green + 0.114 * blue > 115.0
}

/// A weight as in a cell: four characters where it is one.
pub(super) fn number(weight: f32) -> String {
    if weight.abs() < 9.995 { format!("{weight:.2}") } else { format!("{weight:.0e}") }
}
