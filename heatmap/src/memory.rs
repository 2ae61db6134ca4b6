//! Memory is asked for before it is allocated: a failed allocation would abort the process.

use crate::HeatmapError;

/// What needs no question: a process that can't have so little can't go on anyway.
const ALWAYS_THERE: usize = 64 << 10;

/// Checks that there is memory for `bytes` more. It is given back at once.
pub(crate) fn ask(what: &'static str, bytes: usize) -> Result<(), HeatmapError> {
    if bytes <= ALWAYS_THERE {
        return Ok(());
    }
    Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| HeatmapError::Memory { what, bytes })
}

/// The most bytes of a text of `len` bytes while it is made a label, and of the label. An escape is at most five times as
/// long as its character, a text grows to twice its length, and the label is made of a first text.
pub(crate) fn of_label(len: usize) -> usize {
    size_of::<String>().saturating_add(len.saturating_mul(20))
}

/// The sum of some sizes; `usize::MAX` if it is more than can be counted.
pub(crate) fn sum(sizes: impl IntoIterator<Item = usize>) -> usize {
    sizes.into_iter().fold(0, usize::saturating_add)
}
