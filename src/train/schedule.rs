//! The learning rate of each step.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::error::{AttentionError, Result};

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Fall {
    Constant,
    Linear,
    Cosine,
}

/// The learning rate of each step: constant, or a linear warm-up and then a fall along a line or half a cosine.
///
/// Step s counts from 0. In the warm-up of w steps the rate is lr · (s + 1) / w, so that no step has rate 0. After it, with
/// t = (s - w) / (steps - w), the rate is last + (lr - last) · (1 - t) for the line and
/// last + (lr - last) · (1 + cos(π t)) / 2 for the cosine. From step `steps` on it is the last rate.
///
/// Source of the cosine: Loshchilov, Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (ICLR 2017), equation 5.
///
/// # Examples
///
/// ```
/// use candle_attention::train::Schedule;
///
/// let schedule = Schedule::warm_up_cosine(1.0, 0.1, 10, 110)?;
/// assert_eq!(schedule.learning_rate(0), 0.1);
/// assert_eq!(schedule.learning_rate(9), 1.0);
/// assert!((schedule.learning_rate(60) - 0.55).abs() < 1e-12);
/// assert_eq!(schedule.learning_rate(1000), 0.1);
///
/// // A schedule is a part of a run's config.
/// let json = serde_json::to_string(&schedule).unwrap();
/// assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), schedule);
/// # Ok::<(), candle_attention::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct Schedule(Fields);

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    fall: Fall,
    learning_rate: f64,
    #[serde(default)]
    last: f64,
    #[serde(default)]
    warm_up: usize,
    #[serde(default)]
    steps: usize,
}

impl Schedule {
    /// The same rate at every step.
    ///
    /// # Errors
    ///
    /// A rate that is negative or not finite.
    pub fn constant(learning_rate: f64) -> Result<Self> {
        let fall = Fall::Constant;
        Ok(Self::try_from(Fields { fall, learning_rate, last: learning_rate, warm_up: 0, steps: 0 })?)
    }

    /// A linear rise to `learning_rate` in `warm_up` steps, then a line to `last` at step `steps`.
    ///
    /// # Errors
    ///
    /// Rates that are negative or not finite; no steps; a warm-up of more steps than there are.
    pub fn warm_up_linear(learning_rate: f64, last: f64, warm_up: usize, steps: usize) -> Result<Self> {
        Ok(Self::try_from(Fields { fall: Fall::Linear, learning_rate, last, warm_up, steps })?)
    }

    /// A linear rise to `learning_rate` in `warm_up` steps, then half a cosine to `last` at step `steps`.
    ///
    /// # Errors
    ///
    /// As [`Schedule::warm_up_linear`].
    pub fn warm_up_cosine(learning_rate: f64, last: f64, warm_up: usize, steps: usize) -> Result<Self> {
        Ok(Self::try_from(Fields { fall: Fall::Cosine, learning_rate, last, warm_up, steps })?)
    }

    /// The rate of a step; the first is step 0.
    pub fn learning_rate(&self, step: usize) -> f64 {
        let Fields { fall, learning_rate, last, warm_up, steps } = self.0;
        if fall == Fall::Constant {
            return learning_rate;
        }
        if step < warm_up {
            return learning_rate * (step + 1) as f64 / warm_up as f64;
        }
        if step >= steps {
            return last;
        }
        let done = (step - warm_up) as f64 / (steps - warm_up) as f64;
        let left = if fall == Fall::Linear { 1.0 - done } else { 0.5 * (1.0 + (PI * done).cos()) };
        last + (learning_rate - last) * left
    }
}

impl TryFrom<Fields> for Schedule {
    type Error = AttentionError;

    fn try_from(fields: Fields) -> Result<Self, AttentionError> {
        let wrong = |field, expected: String, got: String| Err(AttentionError::Config { field, expected, got });
        for (field, rate) in [("learning_rate", fields.learning_rate), ("last", fields.last)] {
            if !(rate.is_finite() && rate >= 0.0) {
                return wrong(field, "a finite number, at least 0".into(), rate.to_string());
            }
        }
        if fields.fall != Fall::Constant && fields.steps == 0 {
            return wrong("steps", "at least 1".into(), "0".into());
        }
        if fields.fall != Fall::Constant && fields.warm_up > fields.steps {
            return wrong("warm_up", format!("at most steps, which is {}", fields.steps), fields.warm_up.to_string());
        }
        Ok(Self(fields))
    }
}

impl From<Schedule> for Fields {
    fn from(schedule: Schedule) -> Self {
        schedule.0
    }
}
