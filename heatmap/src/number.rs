//! Weights as text.

/// A weight in two decimals. Four characters are enough for a weight from 0 to 1.
pub(crate) fn two_decimals(weight: f32) -> String {
    if weight.abs() < 9.995 { format!("{weight:.2}") } else { format!("{weight:.0e}") }
}

/// The lowest or the highest weight of a scale, to two significant digits or more.
pub(crate) fn end_of_scale(weight: f64) -> String {
    if weight == 0.0 || weight == 1.0 {
        format!("{weight}")
    } else if (0.1..9.995).contains(&weight.abs()) {
        format!("{weight:.2}")
    } else if (0.001..0.1).contains(&weight.abs()) {
        format!("{weight:.4}")
    } else {
        format!("{weight:.1e}")
    }
}
