//! Tokens as labels: made visible, and cut to a width in columns of a terminal.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// The most characters in a row that have no width of their own, such as combining marks. Two on a letter are common.
/// A hundred would be drawn over the labels above.
const MAX_MARKS: usize = 3;

/// The token as a label. A character is escaped if it is invisible, or if it would act on the terminal or the page.
pub(crate) fn visible(token: &str) -> String {
    let mut label = String::new();
    let mut marks = 0;
    for c in token.chars() {
        marks = if c.width() == Some(0) { marks + 1 } else { 0 };
        if c.is_control() || (c.is_whitespace() && c != ' ') || acts(c) || marks > MAX_MARKS {
            label.extend(c.escape_default());
        } else {
            label.push(c);
        }
    }
    // An ASCII character of a label always has a width. This spares a long label the measurement.
    if !label.bytes().any(|byte| byte.is_ascii()) && label.width() == 0 {
        return if token.is_empty() { "∅".to_string() } else { token.escape_unicode().to_string() };
    }
    // Spaces at either end are part of a token. A picture would not show them.
    let start = label.len() - label.trim_start_matches(' ').len();
    let end = label.trim_end_matches(' ').len().max(start);
    format!("{}{}{}", "␣".repeat(start), &label[start..end], "␣".repeat(label.len() - end))
}

/// Whether a character reorders others, breaks lines or is a noncharacter. Joiners do not count: several emoji and the
/// joiners between them are one emoji.
fn acts(c: char) -> bool {
    matches!(u32::from(c), 0xAD | 0x61C | 0x180E | 0x200B | 0x200E | 0x200F | 0x2028..=0x202E | 0x2060..=0x206F)
        || matches!(u32::from(c), 0xFE00..=0xFE0E | 0xFEFF | 0xFFF0..=0xFFFB | 0xE0000..=0xE0FFF)
        || u32::from(c) & 0xFFFE == 0xFFFE
}

/// The label, cut to at most this many columns of a terminal. A cut label ends with an ellipsis.
pub(crate) fn cut(label: &str, columns: usize) -> String {
    if label.width() <= columns {
        return label.to_string();
    }
    let cut_at = |end: usize| format!("{}…", &label[..end]);
    cut_at(longest_prefix(label, |end| cut_at(end).width() <= columns))
}

/// The end of the longest prefix that fits, in bytes.
///
/// A prefix has to be measured as a whole. The width of a text isn't the sum of its characters' widths: several emoji
/// with joiners between them are as wide as one. So this searches: the step doubles after a prefix that fits, and
/// halves after one that doesn't. No measured prefix is much longer than twice the result, and there are at most three
/// measurements for each doubling. This assumes that a longer prefix isn't narrower. Few scripts have exceptions. There
/// the result still fits, but may not be the longest that does.
fn longest_prefix(label: &str, fits: impl Fn(usize) -> bool) -> usize {
    let boundary = |index: usize| (index..label.len()).find(|&i| label.is_char_boundary(i)).unwrap_or(label.len());
    let (mut end, mut step) = (0, 1);
    while step > 0 {
        let next = boundary(end + step);
        if next > end && fits(next) {
            (end, step) = (next, step * 2);
        } else {
            step /= 2;
        }
    }
    end
}
